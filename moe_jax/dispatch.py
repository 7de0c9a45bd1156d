"""Dispatch: which pairs travel, in which window, and the rows that they become at their experts."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import _compat, comm, layout
from moe_jax.errors import check_array, check_dtype, check_mask, check_rank, check_shape, check_type
from moe_jax.movement import send_rows
from moe_jax.plan import Plan
from moe_jax.types import Dispatched, DispatchHandle, DispatchStats, ExchangeMaps, GatherMaps

Array = jax.Array


def dispatch(
    x: Array,
    expert_ids: Array,
    plan: Plan,
    *,
    token_mask: Array | None = None,
) -> Dispatched:
    """Sends a copy of every token to each of its experts. Call it per shard, inside ``shard_map``.

    Rows come out by local expert, then source tp rank, then source ep rank, then token * K + k: the same rows, bit for
    bit, on every transport. Rows at or past ``sum(group_sizes)`` may hold anything and must not be read. With tp > 1
    all tp ranks of an ep rank get the rows of all of them. Repeated ids in a row are distinct copies. With
    ``plan.num_shared_ranks``, the copy for shared expert s counts as k = K + s, and lies in slot 0 of its rank.

    Args:
      x: [T, H] in ``plan.dtype``.
      expert_ids: [T, K] i32; -1 = this pair goes nowhere. Ids of zero, copy and constant experts (from E on) send no
        row; ids beyond them go nowhere and are counted in ``stats.num_invalid``.
      plan: the static plan. With overflow="dropless" M holds the worst skew, T * K * ep * tp rows; with "drop",
        ``plan.pair_capacity`` rows per pair of ranks.
      token_mask: [T] or [T, K] bool; false = the token, or the pair, goes nowhere.

    Returns:
      Dispatched. Differentiable in ``x``: the adjoint sends cotangents back and sums them in fp32.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError: an argument does not fit the plan.
      MeshError: not called inside ``shard_map`` over the plan's axes.

    >>> everywhere = P(("ep", "tp"))  # x is [8, 8] over 2 x 1 devices: 4 tokens each, both choices of each expert 0
    >>> count = lambda x, ids: dispatch(x, ids, plan).group_sizes
    >>> shard_map(count, mesh=mesh, in_specs=everywhere, out_specs=everywhere)(x, jnp.zeros((8, 2), jnp.int32))
    Array([16,  0,  0,  0], dtype=int32)

    Source: MoeDistributeDispatchV4, row order of its expandX.
    """
    _check_dispatch(x, expert_ids, plan, token_mask)
    if not plan.num_pairs:
        # No device has a token. XLA rejects a program that communicates and has none but empty inputs: say it outright.
        shapes = jax.eval_shape(functools.partial(_dispatch, plan=plan), x, expert_ids)
        return _compat.as_varying(jax.tree.map(jnp.zeros_like, shapes), plan.exchange_axes)
    return _dispatch(x, expert_ids, token_mask, plan=plan)


def _dispatch(x: Array, expert_ids: Array, token_mask: Array | None = None, *, plan: Plan) -> Dispatched:
    exchange = prepare(expert_ids, plan, token_mask=token_mask)
    capacity = plan.pair_capacity if plan.overflow == "drop" else plan.max_pair_rows
    handle = open_window(exchange, 0, capacity, plan)
    return Dispatched(
        x=send_rows(x, handle), scales=None, group_sizes=handle.group_sizes, handle=handle, stats=exchange.stats
    )


class Exchange(NamedTuple):
    """All windows of one dispatch: what is known once destinations and counts are."""

    expert_ids: Array  # [T, K] the choices that count, -1 otherwise
    pairs: layout.PairOrder
    send_counts: Array  # [W, L]
    recv_counts: Array | None  # [P, W, L]; None for "allgather", which counts what it gathered
    destinations: Array | None  # "allgather": [P, W, T * K] of all ranks
    sizes: Array | None  # [W, W] list lengths of all ranks, for transports that move unequal slices
    stats: DispatchStats


def prepare(expert_ids: Array, plan: Plan, *, token_mask: Array | None = None) -> Exchange:
    """Sorts the pairs and exchanges the counts."""
    with jax.named_scope("layout"):
        wanted = expert_ids != -1
        if token_mask is not None:
            wanted &= token_mask[:, None] if token_mask.ndim == 1 else token_mask
        valid = (expert_ids >= 0) & (expert_ids < plan.num_ids)
        chosen = _compat.as_varying(jnp.where(wanted & valid, expert_ids, -1), plan.exchange_axes)
        destination = _destinations(chosen, token_mask, plan)
        pairs = layout.sort_pairs(destination, plan.ep_size * plan.num_local_experts)
        send_counts = jnp.diff(pairs.offsets).reshape(plan.ep_size, plan.num_local_experts)
        dropped = jnp.zeros_like(send_counts[0, :1])
        if plan.overflow == "drop":
            over = jnp.maximum(jnp.sum(send_counts, axis=1) - plan.pair_capacity, 0)
            dropped = jnp.sum(over, dtype=jnp.int32)[None]
    invalid = jnp.sum(wanted & ~valid, dtype=jnp.int32)[None]
    stats = DispatchStats(num_dropped=dropped, num_invalid=_compat.as_varying(invalid, plan.exchange_axes))
    with jax.named_scope("exchange_counts"):
        if plan.transport == "allgather":
            everyone = comm.gather_tokens(destination, plan)
            everyone = everyone.reshape(plan.tp_size, plan.ep_size, plan.num_pairs)
            return Exchange(chosen, pairs, send_counts, None, everyone, None, stats)
        return Exchange(
            chosen,
            pairs,
            send_counts,
            comm.exchange_counts(send_counts, plan),
            None,
            comm.all_send_sizes(jnp.sum(send_counts, axis=1, dtype=jnp.int32), plan),
            stats,
        )


def _destinations(chosen: Array, token_mask: Array | None, plan: Plan) -> Array:
    """[T * num_copies] flat expert slot, rank * L + local expert, of every copy of every token; -1 where none travels.

    Routed expert e lives in slot S * L + e: behind the S ranks of shared experts. Experts without weights get no row.
    """
    num_local, num_shared = plan.num_local_experts, plan.num_shared_experts
    first = plan.num_shared_ranks * num_local
    routed = jnp.where((chosen >= 0) & (chosen < plan.num_experts), first + chosen, -1)
    if not plan.num_shared_ranks:
        return routed.ravel()
    per_expert = plan.num_shared_ranks // num_shared
    rank = comm.ep_rank(plan) % per_expert + per_expert * jnp.arange(num_shared, dtype=jnp.int32)
    active = jnp.ones_like(chosen[:, 0], dtype=bool)
    if token_mask is not None:
        active &= token_mask if token_mask.ndim == 1 else jnp.any(token_mask, axis=1)
    shared = jnp.where(active[:, None], rank * num_local, -1)
    return jnp.concatenate([routed, shared], axis=1).ravel()


def count_rounds(exchange: Exchange, plan) -> Array:
    """Windows of ``plan.pair_capacity`` that hold every list of every rank of the group; at least 1. i32 scalar."""
    if plan.max_rounds == 1:
        return jnp.ones((), jnp.int32)
    longest = comm.max_over_ranks(jnp.max(jnp.sum(exchange.send_counts, axis=1)), plan)
    return jnp.maximum(1, (longest + plan.pair_capacity - 1) // plan.pair_capacity).astype(jnp.int32)


def open_window(exchange: Exchange, start: Array | int, capacity: int, plan) -> DispatchHandle:
    """The handle of the pairs at places [start, start + capacity) of every list."""
    num_rows = plan.num_rows(capacity)
    with jax.named_scope("layout"):
        if plan.transport == "allgather":
            picked = layout.gather_maps(
                exchange.destinations, comm.ep_rank(plan), plan.num_local_experts, start, capacity, num_rows=num_rows
            )
            recv_counts, group_sizes = picked.recv_counts, picked.group_sizes
            sources = plan.tp_size * plan.ep_size
            pair_row = picked.pair_row.reshape(sources, plan.tokens_per_rank, plan.num_copies)
            maps = GatherMaps(row_pair=picked.row_pair, pair_row=pair_row)
        else:
            compact = _is_compact(capacity, plan)
            send = layout.send_maps(exchange.pairs, plan.ep_size, start, capacity, compact=compact)
            receive = layout.receive_maps(
                exchange.recv_counts, start, capacity, compact=compact, num_rows=num_rows
            )
            sizes = jnp.clip(exchange.sizes - start, 0, capacity) if compact else exchange.sizes[:0, :0]
            recv_counts, group_sizes = exchange.recv_counts, receive.group_sizes
            maps = ExchangeMaps(
                send_pair=send.slot_pair,
                pair_slot=send.pair_slot.reshape(plan.tokens_per_rank, plan.num_copies),
                row_slot=receive.row_slot,
                slot_row=receive.slot_row,
                sizes=sizes,
            )
    return DispatchHandle(
        plan=plan,
        expert_ids=exchange.expert_ids,
        group_sizes=group_sizes,
        send_counts=exchange.send_counts,
        recv_counts=recv_counts,
        maps=maps,
    )


def _is_compact(capacity: int, plan) -> bool:
    """Whether a window's rows travel end to end, rather than in one equal block per rank."""
    return plan.transport == "ragged" or capacity > plan.pair_capacity


def _check_dispatch(x, expert_ids, plan, token_mask):
    check_type("plan", plan, Plan, "build one with moe_jax.make_plan(...)")
    comm.check_axes(plan)
    check_rank("x", x, 2, "[T, H]")
    remedy = "T and H are fixed by the plan; mask what is not there with token_mask, or make another plan"
    check_shape("x", x, (plan.tokens_per_rank, plan.hidden), "[T, H]", remedy)
    check_dtype("x", x, (plan.dtype,), "the plan's dtype: cast x, or make a plan with dtype=...")
    check_shape("expert_ids", expert_ids, (plan.tokens_per_rank, plan.top_k), "[T, K]")
    check_dtype("expert_ids", expert_ids, ("int32",), "cast it with .astype(jnp.int32)")
    if token_mask is not None:
        check_array("token_mask", token_mask)
        pairs = (plan.tokens_per_rank, plan.top_k)
        check_mask("token_mask", token_mask, pairs if token_mask.ndim == 2 else pairs[:1], "[T], or [T, K] for pairs")
