"""The route of "hierarchy": tokens cross to each node once, partial sums come home from each node once.

``moe_jax.transports.hierarchy_maps`` has the maps and says what the slots are.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat, collectives
from moe_jax.collectives import nodes
from moe_jax.derivatives import take_rows
from moe_jax.quant.message import join_some, split_some
from moe_jax.transports.picking import Moves, as_received, as_sent, by_token, pick
from moe_jax.types import HierarchyMaps

Array = jax.Array


def scatter(
    tokens: Array | None, pairs: Array | None, maps: HierarchyMaps, plan, *, ordered: bool = True
) -> tuple[Array | None, Array | None, None]:
    """As ``exchange.scatter``: tokens [T, F] -> [M, F], pairs [C, T, G] -> [M, G]; one message on each leg."""
    with jax.named_scope("pack"):
        flat = None if pairs is None else by_token(pairs)
        message, parts = join_some([tokens, flat])
        leaving = pick(message, maps.slot_token, plan)
    with jax.named_scope("exchange"):
        guests, guest_pairs = split_some(nodes.exchange_nodes(leaving, plan), parts)
    with jax.named_scope("pack"):
        if tokens is not None:
            guest = jnp.where(maps.inner_pair < 0, -1, maps.inner_pair // maps.pair_inner.shape[1])
            guests = pick(guests, guest, plan)
        if pairs is not None:
            guest_pairs = pick(guest_pairs.reshape(-1, pairs.shape[2]), maps.inner_pair, plan)
        packed, parts = join_some([guests, guest_pairs])
    with jax.named_scope("exchange"):
        if maps.sizes.size:
            num_out = maps.slot_row.shape[0] // plan.tp_size
            arrived = nodes.exchange_inside_compact(packed, maps.sizes, num_out, plan, chunk=_chunk(plan))
        else:
            arrived = nodes.exchange_inside(packed, plan)
        arrived = collectives.gather_tp(arrived, plan)
    with jax.named_scope("permute"):
        return *split_some(pick(arrived, maps.row_slot, plan) if ordered else arrived, parts), None


def collect(
    rows: Array | None,
    weights: Array | None,
    maps: HierarchyMaps,
    plan,
    *,
    ordered: bool = True,
    recipe=None,
    scalars: Array | None = None,
) -> tuple[Array, Array | None]:
    """``y[t] = sum over nodes of round(sum over the copies c on that node of w[t, c] * row(t, c))``, fp32 [T, F].

    Products and both sums in fp32, copies and nodes ascending; ``round`` is to ``plan.dtype``, the dtype in which
    partial sums travel, and with a recipe what that leaves of it. With tp > 1 the rows of the tp ranks are partial
    sums, and are added first, in their own dtype. Scalars [M, G] -> [C, T, G], added over tp alone. Weights of shape
    [M] stand beside the rows and are added over tp too: of each row one tp rank holds the weight, the others zero.
    They go without scalars, and with rows that are in order. Rows may be None where there are scalars.

    Source: the layered combine kernels of MoeDistributeCombine, without their fp16 special case.
    """
    if weights is not None and weights.ndim == 1:
        home, home_weights = _gather_back([rows, weights[:, None]], maps, plan, ordered)
        guest_weights, weights = pick(home_weights[:, 0], maps.pair_inner, plan, absent=0), None
    else:
        home, home_scalars = _gather_back([rows, scalars], maps, plan, ordered)
        guest_weights = None
    with jax.named_scope("exchange"):
        if weights is not None:
            guest_weights = nodes.exchange_nodes(pick(weights, maps.slot_token, plan), plan)
    with jax.named_scope("partial_sum"):
        message = None if rows is None else as_sent(_partial_sums(home, guest_weights, maps, plan), recipe)
        flat = None
        if scalars is not None:
            flat = lax.collapse(pick(home_scalars, maps.pair_inner, plan, absent=0), 1)
    with jax.named_scope("exchange"):
        packed, parts = join_some([message, flat])
        returned, returned_scalars = split_some(nodes.exchange_nodes(packed, plan), parts)
    with jax.named_scope("combine_sum"):
        total = None if rows is None else _sum_over_nodes(as_received(returned, recipe, rows.shape[1]), maps)
        if scalars is None:
            return total, None
        summed = _sum_over_nodes(returned_scalars, maps)
        return total, jnp.swapaxes(summed.reshape(len(summed), -1, scalars.shape[1]), 0, 1)


def together(collected: Array, more: Array, maps: HierarchyMaps) -> Array:
    """Sums of other windows and of this one."""
    del maps
    return collected + more


def total(collected: Array, maps: HierarchyMaps) -> Array:
    """As ``exchange.total``: the sums themselves."""
    del maps
    return collected


def _partial_sums(home: Array, guest_weights: Array | None, maps: HierarchyMaps, plan) -> Array:
    """Inner slots [S, F] -> what each crossing slot [N * B, F] brings home, rounded to ``plan.dtype``."""
    partial = jnp.zeros((maps.pair_inner.shape[0], home.shape[1]), jnp.float32)
    for c in range(maps.pair_inner.shape[1]):
        here = maps.pair_inner[:, c]
        term = pick(home, here, plan, absent=0).astype(jnp.float32)
        if guest_weights is not None:
            term = jnp.where(here >= 0, guest_weights[:, c], 0.0)[:, None] * term
        partial = partial + term
    # The barrier keeps XLA from dropping the narrow type where nothing is exchanged.
    return lax.optimization_barrier(partial.astype(plan.dtype))


def collect_adjoint(rows: Array, weights: Array, ct: Array, plan, moves: Moves) -> tuple[Array, Array]:
    """Cotangents of rows and weights from that of the sums, ct [T, F] fp32; roundings count as identity.

    ``d_row(t, c) = w[t, c] * ct[t]`` on every tp rank, and ``d_w[t, c] = <ct[t], row(t, c)>``, with the row summed over
    tp. The cotangent crosses to each node once, as a row in ``plan.dtype``; products and sums are fp32.
    """
    of_rows = weights.ndim == 1
    row_ct, row_weight = moves.send(ct.astype(plan.dtype), None, None if of_rows else weights.T[..., None])
    row_ct = row_ct.astype(jnp.float32)
    with jax.named_scope("dot"):
        dots = jnp.sum(rows.astype(jnp.float32) * row_ct, axis=-1, keepdims=True)
    if of_rows:
        maps, both = moves.maps, jnp.concatenate([dots, weights[:, None]], axis=1)
        if plan.tp_size > 1:  # rows and weights are sums over tp, whose ranks may order rows differently, but not slots
            slots = collectives.sum_over(pick(both, maps.slot_row, plan, absent=0), plan.tp_axis)
            both = pick(_compat.as_varying(slots, plan.exchange_axes), maps.row_slot, plan, absent=0)
        d_weights = jnp.where(maps.row_slot >= 0, both[:, 0], 0.0)
        return (both[:, 1:] * row_ct).astype(rows.dtype), d_weights
    _, d_weights = moves.collect(None, dots)
    return (row_weight * row_ct).astype(rows.dtype), d_weights[..., 0].T


def _gather_back(parts: list[Array | None], maps: HierarchyMaps, plan, ordered: bool) -> list[Array | None]:
    """Expert rows, each [M, .] -> inner slots, each [S, .], summed over tp; one message."""
    slots = parts
    with jax.named_scope("unpermute"):
        # Slots of the tp ranks are summed, so an unread one may be anything: it only meets its like.
        if ordered:
            slots = [None if part is None else pick(part, maps.slot_row, plan) for part in parts]
    with jax.named_scope("exchange"):
        slots = [None if part is None else collectives.reduce_scatter_tp(part, plan) for part in slots]
        message, held = join_some(slots)
        if maps.sizes.size:
            num_out = maps.inner_pair.shape[0]
            message = nodes.exchange_inside_compact(message, maps.sizes.T, num_out, plan, chunk=_chunk(plan))
        else:
            message = nodes.exchange_inside(message, plan)
        return split_some(message, held)


def _chunk(plan) -> int:
    """Rows per pair of ranks of a node and step: what a window of the layer holds."""
    return nodes.num_nodes(plan) * plan.pair_capacity


def _sum_over_nodes(returned: Array, maps: HierarchyMaps) -> Array:
    """Crossing slots [N * B, G] as they came back -> fp32 sums over the nodes, one after the other. [T, G]."""
    total = jnp.float32(0.0)
    for node in range(maps.token_slot.shape[1]):
        slot = maps.token_slot[:, node]
        total = total + take_rows(returned, slot, absent=0).astype(jnp.float32)
    return total
