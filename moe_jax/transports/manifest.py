"""From choices to rounds: which pairs travel, where they go, and in which round. Integers only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import _compat, collectives, layout
from moe_jax.elastic.rank_table import RankTable, read_rank_table
from moe_jax.plan import Plan
from moe_jax.types import DispatchHandle, DispatchStats

Array = jax.Array


class Manifest(NamedTuple):
    """What one dispatch ships, in all its rounds.

    Attributes:
      expert_ids: [T, K] i32, the choices that count, -1 otherwise.
      pairs: sorted by destination.
      send_counts: [W, L] i32, pairs of this rank by destination.
      known: what the ranks told each other, in the transport's own form.
      travels: [T, C] bool, the pairs that go somewhere in one of the rounds.
      source_order: [P * W] i32, the sources in the order of their rows; None: ascending.
      stats: what became of this device's pairs.
    """

    expert_ids: Array
    pairs: layout.PairOrder
    send_counts: Array
    known: Any
    travels: Array
    source_order: Array | None
    stats: DispatchStats


def count_pairs(
    transport: Any,
    expert_ids: Array,
    plan: Plan,
    *,
    token_mask: Array | None = None,
    rank_table: Array | None = None,
    fresh: Array | None = None,
) -> Manifest:
    """Sorts the pairs by destination, and lets the ranks tell each other how many there are.

    Args:
      transport: of the plan, or a ``Stopwatch`` of it.
      expert_ids, token_mask, rank_table: as for ``dispatch``.
      plan: static.
      fresh: [W] bool, ranks that may be sent something; None: all.
    """
    with jax.named_scope("layout"):
        # 1. The choices that count: not masked, and an id that the plan has.
        ranks = None if rank_table is None else read_table(rank_table, plan)
        wanted = expert_ids != -1
        if token_mask is not None:
            wanted &= token_mask[:, None] if token_mask.ndim == 1 else token_mask
        if ranks is not None:
            wanted &= ranks.logical[collectives.ep_rank(plan)] >= 0
            # So far the ids of weightless experts follow those of the routed experts that are left. From here on they
            # follow those of all routed experts of the plan.
            lost = plan.num_experts - ranks.num_experts
            expert_ids = jnp.where(expert_ids >= ranks.num_experts, expert_ids + lost, expert_ids)
        valid = (expert_ids >= 0) & (expert_ids < plan.num_ids)
        chosen = _compat.as_varying(jnp.where(wanted & valid, expert_ids, -1), plan.exchange_axes)
        # 2. Where each pair goes. It goes nowhere if the receive window of that rank is at another step.
        destination = _destinations(chosen, token_mask, plan, ranks)
        stale = jnp.zeros_like(destination[:0], shape=(1,))
        if fresh is not None:
            sendable = (destination < 0) | fresh[jnp.maximum(destination, 0) // plan.num_local_experts]
            destination = jnp.where(sendable, destination, -1)
            stale = jnp.sum(~sendable, dtype=jnp.int32)[None]
        # 3. One list of pairs for each rank; and how many of its pairs do not fit, where overflow is dropped.
        pairs = layout.sort_pairs(destination, plan.ep_size * plan.num_local_experts)
        send_counts = pairs.counts.reshape(plan.ep_size, plan.num_local_experts)
        travels, dropped = destination >= 0, jnp.zeros_like(send_counts[0, :1])
        if plan.overflow == "drop":
            kept = layout.send_maps(pairs, plan.ep_size, 0, plan.pair_capacity, compact=False)
            dropped = jnp.sum(pairs.counts, dtype=jnp.int32)[None] - jnp.sum(kept.sizes, dtype=jnp.int32)[None]
            travels = kept.pair_slot >= 0
    invalid = jnp.sum(wanted & ~valid, dtype=jnp.int32)[None]
    stats = DispatchStats(num_dropped=dropped, num_invalid=invalid, num_stale=stale)
    with jax.named_scope("exchange_counts"):
        pairs, known = transport.count(destination, pairs, plan)
    return Manifest(
        expert_ids=chosen,
        pairs=pairs,
        send_counts=send_counts,
        known=known,
        travels=travels.reshape(plan.tokens_per_rank, plan.pairs_per_token),
        source_order=None if ranks is None else source_order(ranks, plan),
        stats=_compat.as_varying(stats, plan.exchange_axes),
    )


def count_rounds(transport: Any, manifest: Manifest, plan: Plan) -> Array:
    """Rounds of ``plan.pair_capacity`` that hold every list of every rank of the group; at least 1. i32 scalar."""
    if plan.max_rounds == 1:
        return jnp.ones((), jnp.int32)
    longest = transport.longest_list(manifest, plan)
    return jnp.maximum(1, (longest + plan.pair_capacity - 1) // plan.pair_capacity).astype(jnp.int32)


def open_round(
    transport: Any, manifest: Manifest, start: Array | int, capacity: int, plan: Plan, *, num_rows: int | None = None
) -> DispatchHandle:
    """The handle of the pairs at places [start, start + capacity) of every list.

    ``num_rows`` is M, where the caller knows that so many rows suffice.
    """
    num_rows = plan.num_rows(capacity) if num_rows is None else num_rows
    with jax.named_scope("layout"):
        opened = transport.open(manifest, start, capacity, plan, num_rows=num_rows)
    return DispatchHandle(
        plan=plan,
        expert_ids=manifest.expert_ids,
        group_sizes=opened.group_sizes,
        send_counts=manifest.send_counts,
        recv_counts=opened.recv_counts,
        maps=opened.maps,
    )


def read_table(rank_table: Array, plan: Plan) -> RankTable:
    """Checks ``rank_table``, and takes it apart."""
    return read_rank_table(rank_table, plan.ep_size, plan.num_experts, plan.num_shared_ranks)


def source_order(ranks: RankTable, plan: Plan) -> Array:
    """[P * W] sources by tp rank, then logical rank. Removed ranks, which send nothing, come last."""
    order = jnp.argsort(jnp.where(ranks.logical < 0, plan.ep_size, ranks.logical)).astype(jnp.int32)
    return (jnp.arange(plan.tp_size, dtype=jnp.int32)[:, None] * plan.ep_size + order).ravel()


def _destinations(chosen: Array, token_mask: Array | None, plan: Plan, ranks: RankTable | None) -> Array:
    """[T * pairs_per_token] flat expert slot, rank * L + local expert, of every pair; -1 where none travels.

    Routed expert e lives in slot S * L + e, behind the S ranks of shared experts. Weightless experts get no row.
    """
    num_local, num_shared, me = plan.num_local_experts, plan.pairs_per_token - plan.top_k, collectives.ep_rank(plan)
    num_experts, shared_ranks = plan.num_experts, plan.num_shared_ranks
    if ranks is not None:
        num_experts, shared_ranks, me = ranks.num_experts, ranks.num_shared_ranks, ranks.logical[me]
    # 1. Routed experts, in the slots of the ranks that are left.
    slots = jnp.where((chosen >= 0) & (chosen < num_experts), shared_ranks * num_local + chosen, -1)
    # 2. Shared experts on ranks of their own, per_expert ranks for each: the active tokens of rank ``me`` go to the
    #    (me mod per_expert)-th of them.
    if num_shared:
        per_expert = jnp.maximum(shared_ranks // num_shared, 1)
        rank = me % per_expert + per_expert * jnp.arange(num_shared, dtype=jnp.int32)
        active = jnp.broadcast_to((me >= 0) & (shared_ranks >= num_shared), chosen.shape[:1])
        if token_mask is not None:
            active &= token_mask if token_mask.ndim == 1 else jnp.any(token_mask, axis=1)
        slots = jnp.concatenate([slots, jnp.where(active[:, None], rank * num_local, -1)], axis=1)
    # 3. Ranks have been logical so far: they are numbered without gaps. Rows go to physical ranks.
    slots = slots.ravel()
    if ranks is None:
        return slots
    logical = jnp.clip(slots // num_local, 0, plan.ep_size - 1)
    return jnp.where(slots < 0, -1, ranks.physical[logical] * num_local + slots % num_local)
