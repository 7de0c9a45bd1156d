"""What every transport must do, as laws that an author of a new one can run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.derivatives import take_rows
from moe_jax.errors import MoEError, check_type
from moe_jax.layer.combine import combine, finish
from moe_jax.layer.dispatch import dispatch
from moe_jax.mesh import ensure_devices, make_mesh
from moe_jax.plan import Plan
from moe_jax.plan.transport_table import entered
from moe_jax.transports import Transport, collect_rows, dequantized, send_rows, transport_of
from moe_jax.transports.manifest import count_pairs, count_rounds, open_round
from moe_jax.verify.cases import HIDDEN, PATTERNS, TOKENS, TOP_K, deviation, expert_ids, integers, make_case_plan, over
from moe_jax.verify.exchange import Exchange

CAPACITY = 4  # rows per pair of ranks in a round; the worst skew has TOKENS * TOP_K


class TransportContractError(MoEError, AssertionError):
    """A transport breaks a law; the text lists every law that it breaks."""


def transport_contract(transport: Transport, *, mesh: Mesh | None = None) -> dict[str, float]:
    """Runs the laws of a transport on integers, where all sums are exact, with NaN in all that nobody may read.

    - dispatch, combine and the gradients of both equal the float64 oracle, rows in its order and bit for bit;
    - ``<dispatch x, y> = <x, combine y>``, over the whole mesh;
    - round trip: rows that go out and come back in rounds of bounded capacity, each left in its inbox slot, give every
      token back as often as it has choices, weighted; and so do the gradients of tokens and weights;
    - counts: what every rank hears of the others, the rows of each expert over all rounds, and the number of rounds;
    - masked pairs and pairs without an expert go nowhere; a mesh without a token moves nothing.

    Args:
      transport: need not be registered.
      mesh: where to run; None: 8 devices as 2 nodes of 2 expert-parallel ranks, each of 2 tensor-parallel ones,
        emulated where there are no accelerators.

    Returns:
      The largest deviation by law: zero for all of them.

    Raises:
      TransportContractError: lists the laws that the transport breaks.
      MeshError: there are too few devices.

    >>> import moe_jax as moe
    >>> from moe_jax.transports import PADDED
    >>> from moe_jax.verify import transport_contract
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> max(transport_contract(PADDED, mesh=moe.make_mesh(ep=2)).values())
    0.0
    """
    check_type("transport", transport, Transport, "derive a class from moe_jax.transports.Transport and pass an object")
    if mesh is None:
        ensure_devices(8)
        mesh = make_mesh(ep=4, nodes=2, tp=2)
    with entered(transport):
        exchange = Exchange(mesh, transport.name, "auto")
        laws = ("dispatch = oracle", "combine = oracle", "gradients of both = oracle")
        found = {law: _worst(exchange.of(law)) for law in laws}
        found["<dispatch x, y> = <x, combine y>"] = _worst(exchange.adjoint())
        found |= _rounds(mesh, make_case_plan(mesh, transport.name, "auto", capacity_factor=_factor(mesh)))
        found["no tokens"] = _no_tokens(mesh, make_case_plan(mesh, transport.name, "auto", tokens_per_rank=0))
    broken = [f"{law}: deviates by {worst}" for law, worst in found.items() if np.isnan(worst) or worst]
    if broken:
        raise TransportContractError(f"transport {transport.name!r} breaks the contract:\n- " + "\n- ".join(broken))
    return found


def _worst(deviations: list[float]) -> float:
    """The largest of some deviations; NaN if one of them is NaN."""
    return float(np.max(deviations))


def _factor(mesh: Mesh) -> float:
    """The capacity factor of rounds of ``CAPACITY`` rows."""
    ranks = mesh.size // mesh.shape["tp"]
    return CAPACITY * ranks / (TOKENS * TOP_K) - 1e-6


def _round_trip(plan: Plan, x, ids, weights, mask, ct) -> tuple:
    """Sends rows out and back, unchanged, in as many rounds as the worst skew needs; and takes the gradients."""
    transport = transport_of(plan)
    manifest = count_pairs(transport, ids, plan, token_mask=mask)
    num_rounds = count_rounds(transport, manifest, plan)
    starts = range(0, plan.max_pair_rows, plan.pair_capacity)
    handles = [open_round(transport, manifest, start, plan.pair_capacity, plan) for start in starts]

    def there_and_back(x, weights):
        collected: Any = None
        for handle in handles:
            rows = dequantized(send_rows(transport, None, ordered=False, x=x, handle=handle).rows, plan)
            order = transport.inbox_order(handle.maps)
            if order is not None:  # into the order of the experts, and back into the slots
                rows = take_rows(rows, order.row_inbox, poison=True)
                rows = take_rows(rows, order.inbox_row, poison=True)
            back, _ = collect_rows(transport, ordered=False, rows=rows, weights=weights, handle=handle)
            collected = back if collected is None else transport.together(collected, back, handle.maps)
        return finish(transport, collected, jnp.where(manifest.travels, weights, 0.0), manifest.travels, None, plan)

    y, pull = jax.vjp(there_and_back, x, weights)
    group_sizes = sum(handle.group_sizes for handle in handles)
    recv_counts = [handle.recv_counts for handle in handles]
    return y, *pull(ct), group_sizes, jnp.stack(recv_counts), num_rounds


def _rounds(mesh: Mesh, plan: Plan) -> dict[str, float]:
    """Deviations of ``_round_trip`` from loops over pairs."""
    program = over(mesh, functools.partial(_round_trip, plan))
    rng, lead = np.random.default_rng(7), (plan.ep_size, plan.tp_size, TOKENS)
    trips, gradients, counts = [], [], []
    for pattern in (*PATTERNS, "nowhere"):
        ids = expert_ids(pattern, rng, lead, plan.num_experts)
        mask = rng.random(lead) < 0.6 if pattern == "masked" else np.ones(lead, bool)
        if pattern == "nowhere":
            ids[:] = -1
        x, ct, weights = integers(rng, *lead, HIDDEN), integers(rng, *lead, HIDDEN), integers(rng, *lead, TOP_K)
        there = mask[..., None] & (ids >= 0)
        weights[~there] = np.nan  # nobody may read them
        y, d_x, d_weights, sizes, received, num_rounds = (np.asarray(a) for a in program(x, ids, weights, mask, ct))
        # Every tp rank has all rows and returns them, so they come back once from each.
        scale = plan.tp_size * np.where(there, weights, 0).sum(-1, keepdims=True)
        trips.append(deviation(y, scale * x))
        dots = np.where(there, plan.tp_size * np.sum(ct * x, axis=-1, keepdims=True), 0)
        gradients += [deviation(d_x, scale * ct), deviation(d_weights, dots)]
        want = np.zeros((plan.ep_size, plan.tp_size, plan.ep_size, plan.num_local_experts), int)
        for w, p, t, k in np.argwhere(there):
            rank, local = divmod(ids[w, p, t, k], plan.num_local_experts)
            want[rank, p, w, local] += 1
        longest = max(1, -(-want.sum(axis=-1).max() // plan.pair_capacity))
        everyone = np.broadcast_to(want[:, None, None], received.shape)
        totals = np.broadcast_to(want.sum(axis=(1, 2))[:, None], sizes.shape)
        counts += [deviation(received, everyone), deviation(sizes, totals), deviation(num_rounds.max(), longest)]
    found = {"round trip in rounds": trips, "gradients of rounds": gradients, "counts": counts}
    return {law: _worst(deviations) for law, deviations in found.items()}


def _no_tokens(mesh: Mesh, plan: Plan) -> float:
    """What comes of a mesh without a token: no row arrives, and no token gets a sum."""

    def shard(x, ids, weights):
        sent = dispatch(x, ids, plan)
        return sent.group_sizes, combine(sent.x, weights, sent.handle)

    lead = (plan.ep_size, plan.tp_size, 0)
    ids, weights = np.zeros((*lead, TOP_K), np.int32), np.zeros((*lead, TOP_K), np.float32)
    sizes, y = over(mesh, shard)(np.zeros((*lead, HIDDEN), np.float32), ids, weights)
    return float(np.sum(sizes)) + deviation(y, np.zeros((*lead, HIDDEN)))
