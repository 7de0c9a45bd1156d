"""Dispatch and combine: rows to their experts and back. Each one's adjoint is the other, on the same handle.

Two linear maps do all the moving, and both are gathers around a collective:
``_scatter``: token rows [T, H] -> expert rows [M, H], a copy for every pair in the window;
``_collect``: expert rows [M, H] -> what came back: [T, K, H] for the exchanging transports, or for "allgather", whose
sums are made where the experts are, fp32 sums [T, H].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import _compat, comm, layout
from moe_jax.errors import check_array, check_dtype, check_mask, check_rank, check_shape, check_type
from moe_jax.plan import Plan
from moe_jax.types import DispatchHandle, Dispatched, DispatchStats, ExchangeMaps, GatherMaps

Array = jax.Array


def dispatch(
    x: Array,
    expert_ids: Array,
    plan,
    *,
    token_mask: Array | None = None,
) -> Dispatched:
    """Sends a copy of every token to each of its experts. Call it per shard, inside ``shard_map``.

    Rows come out by local expert, then source tp rank, then source ep rank, then token * K + k: the same rows, bit for
    bit, on every transport. Rows at or past ``sum(group_sizes)`` may hold anything and must not be read. With tp > 1
    all tp ranks of an ep rank get the rows of all of them. Repeated ids in a row are distinct copies.

    Args:
      x: [T, H] in ``plan.dtype``.
      expert_ids: [T, K] i32; -1 = this pair goes nowhere. Ids outside -1 .. E-1 go nowhere and are counted.
      plan: the static plan. With overflow="dropless" M holds the worst skew, T * K * ep * tp rows; with "drop",
        ``plan.pair_capacity`` rows per pair of ranks.
      token_mask: [T] or [T, K] bool; false = the token, or the pair, goes nowhere.

    Returns:
      Dispatched. Differentiable in ``x``: the adjoint sends cotangents back and sums them in fp32.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError: an argument does not fit the plan.
      MeshError: not called inside ``shard_map`` over the plan's axes.

    Source: MoeDistributeDispatchV4, row order of its expandX.
    """
    exchange = prepare(x, expert_ids, plan, token_mask=token_mask)
    capacity = plan.pair_capacity if plan.overflow == "drop" else max(1, plan.num_pairs)
    handle = open_window(exchange, 0, capacity, plan)
    return Dispatched(
        x=send_rows(x, handle), scales=None, group_sizes=handle.group_sizes, handle=handle, stats=exchange.stats
    )


def combine(
    rows: Array, combine_weights: Array, handle: DispatchHandle, *, shared_x: Array | None = None
) -> Array:
    """Brings expert rows back to their tokens and sums them with weights. Call it per shard, inside ``shard_map``.

    ``y[t] = sum_k combine_weights[t, k] * row(t, k)`` in fp32, rounded once. The exchanging transports add in
    ascending k, so a token's result does not depend on the other tokens; "allgather" adds within each rank in
    ascending k and then over ranks. With tp > 1 the rows of the tp ranks are partial sums and are added first.
    Pairs that went nowhere contribute nothing, whatever their weight.

    Args:
      rows: [M, H] expert outputs in the order of ``dispatch``; those past ``sum(group_sizes)`` are not read.
      combine_weights: [T, K] f32.
      handle: from ``dispatch``.
      shared_x: [T, H] in ``plan.dtype``, added with weight 1 before rounding: what shared experts made of the tokens.

    Returns:
      [T, H] in ``rows.dtype``. Differentiable in ``rows``, ``combine_weights`` and ``shared_x``.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError, MeshError: as for ``dispatch``.

    Source: MoeDistributeCombineV4.
    """
    check_type("handle", handle, DispatchHandle, "pass the .handle that dispatch returned")
    plan = handle.plan
    comm.check_axes(plan)
    check_rank("rows", rows, 2, "[M, H]")
    row_map = handle.maps.row_slot if isinstance(handle.maps, ExchangeMaps) else handle.maps.row_pair
    check_shape("rows", rows, (row_map.shape[0], plan.hidden), "[M, H], the extent that dispatch gave")
    check_dtype("rows", rows, (plan.dtype,), "the plan's dtype")
    check_shape("combine_weights", combine_weights, (plan.tokens_per_rank, plan.top_k), "[T, K]")
    check_dtype("combine_weights", combine_weights, ("float32",), "cast it with .astype(jnp.float32)")
    if shared_x is not None:
        check_shape("shared_x", shared_x, (plan.tokens_per_rank, plan.hidden), "[T, H]")
        check_dtype("shared_x", shared_x, (plan.dtype,), "the plan's dtype")
    total = finish(collect_rows(rows, combine_weights, handle), combine_weights, plan)
    if shared_x is not None:
        total = total + shared_x.astype(jnp.float32)
    return total.astype(plan.dtype)


class Exchange(NamedTuple):
    """All windows of one dispatch: what is known once destinations and counts are."""

    pairs: layout.PairOrder
    send_counts: Array  # [W, L]
    recv_counts: Array | None  # [P, W, L]; None for "allgather", which counts what it gathered
    destinations: Array | None  # "allgather": [P, W, T * K] of all ranks
    sizes: Array | None  # [W, W] list lengths of all ranks, for transports that move unequal slices
    stats: DispatchStats


def prepare(x: Array, expert_ids: Array, plan, *, token_mask: Array | None = None) -> Exchange:
    """Checks the arguments, sorts the pairs and exchanges the counts."""
    _check_dispatch(x, expert_ids, plan, token_mask)
    with jax.named_scope("layout"):
        wanted = expert_ids != -1
        if token_mask is not None:
            wanted &= token_mask[:, None] if token_mask.ndim == 1 else token_mask
        valid = (expert_ids >= 0) & (expert_ids < plan.num_experts)
        destination = jnp.where(wanted & valid, expert_ids, -1).ravel()
        destination = _compat.as_varying(destination, plan.exchange_axes)
        pairs = layout.sort_pairs(destination, plan.num_experts)
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
            return Exchange(pairs, send_counts, None, everyone, None, stats)
        return Exchange(
            pairs,
            send_counts,
            comm.exchange_counts(send_counts, plan),
            None,
            comm.all_send_sizes(jnp.sum(send_counts, axis=1, dtype=jnp.int32), plan),
            stats,
        )


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
            pair_row = picked.pair_row.reshape(sources, plan.tokens_per_rank, plan.top_k)
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
                pair_slot=send.pair_slot.reshape(plan.tokens_per_rank, plan.top_k),
                row_slot=receive.row_slot,
                slot_row=receive.slot_row,
                sizes=sizes,
            )
    return DispatchHandle(
        plan=plan, group_sizes=group_sizes, send_counts=exchange.send_counts, recv_counts=recv_counts, maps=maps
    )


def send_rows(x: Array, handle: DispatchHandle) -> Array:
    """Token rows [T, H] -> expert rows [M, H] of the handle's window; differentiable in ``x``."""
    plan = handle.plan
    x = _compat.as_varying(x, plan.exchange_axes)
    if not plan.num_pairs:  # no device has a token: nothing moves, and no row is written
        return jnp.full_like(x, jnp.nan if plan.poison else 0, shape=(plan.num_rows(1), plan.hidden))
    return _send_rows(x, handle)


def collect_rows(rows: Array, combine_weights: Array, handle: DispatchHandle) -> Array:
    """Expert rows of one window -> what ``finish`` takes; windows add up. Differentiable in both arrays."""
    plan = handle.plan
    rows, combine_weights = _compat.as_varying((rows, combine_weights), plan.exchange_axes)
    if not plan.num_pairs:
        pairs = jnp.zeros_like(combine_weights, dtype=plan.dtype)[..., None] * jnp.ones(plan.hidden, plan.dtype)
        return jnp.sum(pairs, axis=1, dtype=jnp.float32) if plan.transport == "allgather" else pairs
    return _collect_rows(rows, combine_weights, handle)


def finish(collected: Array, combine_weights: Array, plan) -> Array:
    """The weighted sum over k, ascending. -> [T, H] fp32."""
    with jax.named_scope("combine_sum"):
        return collected if plan.transport == "allgather" else _weighted_sum(collected, combine_weights)


def _is_compact(capacity: int, plan) -> bool:
    """Whether a window's rows travel end to end, rather than in one equal block per rank."""
    return plan.transport == "ragged" or capacity > plan.pair_capacity


def _weighted_sum(pair_rows: Array, weights: Array | None) -> Array:
    """[T, K, H], [T, K] -> [T, H] fp32, one k after the other."""
    total = jnp.zeros_like(pair_rows[:, 0], jnp.float32)
    for k in range(pair_rows.shape[1]):
        term = pair_rows[:, k].astype(jnp.float32)
        total = total + (term if weights is None else weights[:, k, None] * term)
    return total


# The two linear maps.


def _pick(rows: Array, index: Array, plan, *, absent: float | None = None) -> Array:
    """``rows[index]``. Where index is -1: ``absent`` if given, NaN under ``plan.poison``, anything otherwise."""
    picked = jnp.take(rows, index, axis=0, mode="clip")
    fill = jnp.nan if absent is None and plan.poison else absent
    if fill is None:
        return picked
    written = (index >= 0).reshape(*index.shape, *(1,) * (picked.ndim - index.ndim))
    return jnp.where(written, picked, jnp.asarray(fill, picked.dtype))


def _scatter(x: Array, handle: DispatchHandle) -> Array:
    """x [T, H] -> rows [M, H]: row(t, k) = x[t]."""
    plan, maps = handle.plan, handle.maps
    if isinstance(maps, GatherMaps):
        with jax.named_scope("exchange"):
            everyone = jax.lax.collapse(comm.gather_tokens(x, plan), 0, 2)
        with jax.named_scope("permute"):
            return _pick(everyone, _token_of(maps.row_pair, plan), plan)
    with jax.named_scope("pack"):
        packed = _pick(x, _token_of(maps.send_pair, plan), plan)
    return _exchange_packed(packed, handle)


def _exchange_packed(packed: Array, handle: DispatchHandle) -> Array:
    """Send slots [S, H] -> rows [M, H]."""
    plan, maps = handle.plan, handle.maps
    with jax.named_scope("exchange"):
        if maps.sizes.size:
            arrived = comm.exchange_compact(packed, maps.sizes, maps.slot_row.shape[0] // plan.tp_size, plan)
        else:
            arrived = comm.exchange_blocks(packed, plan)
        arrived = comm.gather_tp(arrived, plan)
    with jax.named_scope("permute"):
        return _pick(arrived, maps.row_slot, plan)


def _collect(rows: Array, weights: Array | None, handle: DispatchHandle) -> Array:
    """rows [M, H] -> [T, K, H], zero for pairs outside the window; "allgather": fp32 weighted sums [T, H]."""
    plan, maps = handle.plan, handle.maps
    if isinstance(maps, GatherMaps):
        with jax.named_scope("partial_sum"):
            everyone = None if weights is None else comm.gather_tokens(weights, plan)
            partial = _partial_sums(rows, everyone, maps, plan)
        with jax.named_scope("exchange"):
            return comm.reduce_scatter_tokens(partial, plan)
    with jax.named_scope("unpermute"):
        # Slots of the tp ranks are summed, so an unread one may be anything: it only meets its like.
        arrived = _pick(rows, maps.slot_row, plan)
    with jax.named_scope("exchange"):
        arrived = comm.reduce_scatter_tp(arrived, plan)
        if maps.sizes.size:
            packed = comm.exchange_compact(arrived, maps.sizes.T, maps.send_pair.shape[0], plan)
        else:
            packed = comm.exchange_blocks(arrived, plan)
    with jax.named_scope("unpack"):
        return _pick(packed, maps.pair_slot, plan, absent=0)


def _token_of(pair: Array, plan) -> Array:
    return jnp.where(pair < 0, -1, pair // plan.top_k)


def _partial_sums(rows: Array, weights: Array | None, maps: GatherMaps, plan) -> Array:
    """This rank's share of every token's sum, fp32 [P * W, T, H], one k after the other."""
    total = jnp.zeros((*maps.pair_row.shape[:2], plan.hidden), jnp.float32)
    for k in range(plan.top_k):
        term = _pick(rows, maps.pair_row[..., k], plan, absent=0).astype(jnp.float32)
        total = total + (term if weights is None else weights[..., k, None] * term)
    return total


def _gathered_adjoint(rows: Array, weights: Array, ct: Array, handle: DispatchHandle) -> tuple[Array, Array]:
    """Cotangents of rows and weights where the sums were made at the experts; ct [T, H] fp32."""
    plan, maps = handle.plan, handle.maps
    with jax.named_scope("exchange"):
        everyone = comm.gather_tokens(ct.astype(plan.dtype), plan)  # exact: ``finish`` rounds to that dtype
        all_weights = comm.gather_tokens(weights, plan).ravel()
    with jax.named_scope("permute"):
        scale = _pick(all_weights, maps.row_pair, plan, absent=0)
        d_rows = _pick(jax.lax.collapse(everyone, 0, 2), _token_of(maps.row_pair, plan), plan)
        d_rows = (scale[:, None] * d_rows.astype(jnp.float32)).astype(rows.dtype)
        dots = [
            jnp.sum(
                _pick(rows, maps.pair_row[..., k], plan, absent=0).astype(jnp.float32) * everyone.astype(jnp.float32),
                axis=-1,
            )
            for k in range(plan.top_k)
        ]
    with jax.named_scope("exchange"):
        return d_rows, comm.reduce_scatter_tokens(jnp.stack(dots, axis=-1), plan)


# Their differentiable forms: each is the other's adjoint.


@jax.custom_vjp
def _send_rows(x, handle):
    return _scatter(x, handle)


def _send_forward(x, handle):
    return _scatter(x, handle), handle


def _send_backward(handle, ct):
    collected = _collect(ct, None, handle)
    total = collected if isinstance(handle.maps, GatherMaps) else _weighted_sum(collected, None)
    return total.astype(ct.dtype), None


_send_rows.defvjp(_send_forward, _send_backward)


@jax.custom_vjp
def _collect_rows(rows, weights, handle):
    return _collect(rows, weights, handle)


def _collect_forward(rows, weights, handle):
    gathered = isinstance(handle.maps, GatherMaps)
    return _collect(rows, weights, handle), (rows if gathered else rows[:0], weights, handle)


def _collect_backward(residuals, ct):
    rows, weights, handle = residuals
    if isinstance(handle.maps, GatherMaps):
        return *_gathered_adjoint(rows, weights, ct, handle), None
    with jax.named_scope("pack"):  # one row per pair: as dispatch, with pairs for tokens
        packed = _pick(jax.lax.collapse(ct, 0, 2), handle.maps.send_pair, handle.plan)
    return _exchange_packed(packed, handle), jnp.zeros_like(weights), None


_collect_rows.defvjp(_collect_forward, _collect_backward)


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
