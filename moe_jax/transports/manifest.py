"""From choices to handles: which pairs travel, where to, in which window. Integers only."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat, collectives, layout
from moe_jax.collectives.rendezvous import hold
from moe_jax.elastic.rank_table import RankTable, read_rank_table
from moe_jax.plan import Plan
from moe_jax.transports.hierarchy_maps import open_hierarchy
from moe_jax.types import DispatchHandle, DispatchStats, ExchangeMaps, GatherMaps

Array = jax.Array


class Exchange(NamedTuple):
    """All windows of one dispatch: what is known once destinations and counts are."""

    expert_ids: Array  # [T, K] the choices that count, -1 otherwise
    pairs: layout.PairOrder
    send_counts: Array  # [W, L]
    recv_counts: Array | None  # [P, W, L]; None where the window's maps come with them
    destinations: Array | None  # "allgather": [P, W, T * C] of all ranks; "hierarchy": [T, C] of this one
    sizes: Array | None  # [P, W, W] list lengths of all ranks; None where they are not known here
    travels: Array  # [T, C] bool, the pairs that go somewhere in one of the windows
    source_order: Array | None  # [P * W] the sources in the order of their rows; None: ascending
    stats: DispatchStats
    microseconds: Array | None = None  # [W] waited for each rank's counts


def prepare(
    expert_ids: Array,
    plan: Plan,
    *,
    token_mask: Array | None = None,
    rank_table: Array | None = None,
    fresh: Array | None = None,
    recv_counts: Array | None = None,
    timed: bool = False,
) -> Exchange:
    """Sorts the pairs and exchanges the counts.

    Args:
      expert_ids, token_mask, rank_table: as for ``dispatch``.
      plan: static.
      fresh: [W] bool, ranks that may be sent something; None: all.
      recv_counts: [P, W, L] where they are known already; None: they are exchanged.
      timed: measure how long this rank waits for the counts of each other one; before any other exchange, which would
        hold up everybody.
    """
    with jax.named_scope("layout"):
        ranks = None if rank_table is None else read_table(rank_table, plan)
        wanted = expert_ids != -1
        if token_mask is not None:
            wanted &= token_mask[:, None] if token_mask.ndim == 1 else token_mask
        if ranks is not None:
            wanted &= ranks.logical[collectives.ep_rank(plan)] >= 0
            # Special experts follow the routed ones that are left; from here on they follow all of the plan's.
            lost = plan.num_experts - ranks.num_experts
            expert_ids = jnp.where(expert_ids >= ranks.num_experts, expert_ids + lost, expert_ids)
        valid = (expert_ids >= 0) & (expert_ids < plan.num_ids)
        chosen = _compat.as_varying(jnp.where(wanted & valid, expert_ids, -1), plan.exchange_axes)
        destination = _destinations(chosen, token_mask, plan, ranks)
        stale = jnp.zeros_like(destination[:0], shape=(1,))
        if fresh is not None:
            sendable = (destination < 0) | fresh[jnp.maximum(destination, 0) // plan.num_local_experts]
            destination = jnp.where(sendable, destination, -1)
            stale = jnp.sum(~sendable, dtype=jnp.int32)[None]
        pairs = layout.sort_pairs(destination, plan.ep_size * plan.num_local_experts)
        send_counts = pairs.counts.reshape(plan.ep_size, plan.num_local_experts)
        travels, dropped = destination >= 0, jnp.zeros_like(send_counts[0, :1])
        if plan.overflow == "drop":
            kept = layout.send_maps(pairs, plan.ep_size, 0, plan.pair_capacity, compact=False)
            dropped = jnp.sum(pairs.counts, dtype=jnp.int32)[None] - jnp.sum(kept.sizes, dtype=jnp.int32)[None]
            travels = kept.pair_slot >= 0
        travels = travels.reshape(plan.tokens_per_rank, plan.num_copies)
    invalid = jnp.sum(wanted & ~valid, dtype=jnp.int32)[None]
    stats = DispatchStats(num_dropped=dropped, num_invalid=invalid, num_stale=stale)
    stats = _compat.as_varying(stats, plan.exchange_axes)
    everyone = sizes = microseconds = None
    with jax.named_scope("exchange_counts"):
        if plan.transport == "allgather":
            everyone = collectives.gather_tokens(destination, plan)
            everyone = everyone.reshape(plan.tp_size, plan.ep_size, plan.num_pairs)
        elif plan.transport == "hierarchy":
            everyone = destination.reshape(plan.tokens_per_rank, plan.num_copies)
        else:
            if timed:
                recv_counts, microseconds = collectives.exchange_counts_timed(send_counts, plan)
                pairs = hold(pairs, jnp.max(microseconds))  # all that follows comes after it
            else:
                counts = collectives.gather_counts(send_counts, plan)
                sizes = jnp.sum(counts, axis=-1, dtype=jnp.int32)
                if recv_counts is None:
                    counts = _compat.as_varying(counts, plan.exchange_axes)
                    recv_counts = lax.dynamic_index_in_dim(counts, collectives.ep_rank(plan), axis=2, keepdims=False)
    order = None if ranks is None else source_order(ranks, plan)
    return Exchange(chosen, pairs, send_counts, recv_counts, everyone, sizes, travels, order, stats, microseconds)


def read_table(rank_table: Array, plan: Plan) -> RankTable:
    """``rank_table`` checked and taken apart."""
    return read_rank_table(rank_table, plan.ep_size, plan.num_experts, plan.num_shared_ranks)


def source_order(ranks: RankTable, plan: Plan) -> Array:
    """[P * W] sources by tp rank, then logical rank; removed ranks last, who send nothing."""
    order = jnp.argsort(jnp.where(ranks.logical < 0, plan.ep_size, ranks.logical)).astype(jnp.int32)
    return (jnp.arange(plan.tp_size, dtype=jnp.int32)[:, None] * plan.ep_size + order).ravel()


def _destinations(chosen: Array, token_mask: Array | None, plan: Plan, ranks: RankTable | None) -> Array:
    """[T * num_copies] flat expert slot, rank * L + local expert, of every copy of every token; -1 where none travels.

    Routed expert e lives in slot S * L + e: behind the S ranks of shared experts. Experts without weights get no row.
    """
    num_local, num_shared, me = plan.num_local_experts, plan.num_copies - plan.top_k, collectives.ep_rank(plan)
    num_experts, shared_ranks = plan.num_experts, plan.num_shared_ranks
    if ranks is not None:
        num_experts, shared_ranks, me = ranks.num_experts, ranks.num_shared_ranks, ranks.logical[me]
    slots = jnp.where((chosen >= 0) & (chosen < num_experts), shared_ranks * num_local + chosen, -1)
    if num_shared:
        per_expert = jnp.maximum(shared_ranks // num_shared, 1)
        rank = me % per_expert + per_expert * jnp.arange(num_shared, dtype=jnp.int32)
        active = jnp.broadcast_to((me >= 0) & (shared_ranks >= num_shared), chosen.shape[:1])
        if token_mask is not None:
            active &= token_mask if token_mask.ndim == 1 else jnp.any(token_mask, axis=1)
        slots = jnp.concatenate([slots, jnp.where(active[:, None], rank * num_local, -1)], axis=1)
    slots = slots.ravel()
    if ranks is None:
        return slots
    logical = jnp.clip(slots // num_local, 0, plan.ep_size - 1)
    return jnp.where(slots < 0, -1, ranks.physical[logical] * num_local + slots % num_local)


def count_rounds(exchange: Exchange, plan) -> Array:
    """Windows of ``plan.pair_capacity`` that hold every list of every rank of the group; at least 1. i32 scalar."""
    if plan.max_rounds == 1:
        return jnp.ones((), jnp.int32)
    if exchange.sizes is None:
        longest = collectives.max_over_ranks(jnp.max(jnp.sum(exchange.send_counts, axis=1)), plan)
    else:  # all ranks know all of them
        longest = jnp.max(exchange.sizes)
    return jnp.maximum(1, (longest + plan.pair_capacity - 1) // plan.pair_capacity).astype(jnp.int32)


def open_window(
    exchange: Exchange,
    start: Array | int,
    capacity: int,
    plan,
    *,
    compact: bool | None = None,
    num_rows: int | None = None,
) -> DispatchHandle:
    """The handle of the pairs at places [start, start + capacity) of every list.

    ``compact``: whether rows travel end to end, rather than in one equal block per rank; None: as suits the transport.
    ``num_rows``: M where the caller knows that so many suffice.
    """
    num_rows = plan.num_rows(capacity) if num_rows is None else num_rows
    with jax.named_scope("layout"):
        if plan.transport == "allgather":
            picked = layout.gather_maps(
                exchange.destinations,
                collectives.ep_rank(plan),
                plan.num_local_experts,
                start,
                capacity,
                num_rows=num_rows,
                source_order=exchange.source_order,
            )
            recv_counts, group_sizes = picked.recv_counts, picked.group_sizes
            sources = plan.tp_size * plan.ep_size
            pair_row = picked.pair_row.reshape(sources, plan.tokens_per_rank, plan.num_copies)
            maps = GatherMaps(row_pair=picked.row_pair, pair_row=pair_row)
        elif plan.transport == "hierarchy":
            maps, group_sizes, recv_counts = open_hierarchy(
                exchange.destinations, start, capacity, plan, num_rows=num_rows, source_order=exchange.source_order
            )
        else:
            if compact is None:
                compact = plan.transport == "ragged" or capacity > plan.pair_capacity
            send = layout.send_maps(exchange.pairs, plan.ep_size, start, capacity, compact=compact)
            receive = layout.receive_maps(
                exchange.recv_counts,
                start,
                capacity,
                compact=compact,
                num_rows=num_rows,
                source_order=exchange.source_order,
            )
            sizes = jnp.zeros_like(send.sizes, shape=(0, 0))
            if compact:
                sizes = lax.dynamic_index_in_dim(exchange.sizes, collectives.tp_rank(plan), keepdims=False)
                sizes = jnp.clip(sizes - start, 0, capacity)
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
