"""The route of "padded" and "ragged": every rank sends each rank its rows; sums are made at the tokens."""

import jax
import jax.numpy as jnp

from moe_jax import collectives
from moe_jax.quant.message import join_some, split_some
from moe_jax.transports.picking import (
    Moves,
    as_received,
    as_sent,
    only_present,
    pick,
    place_of,
    sum_over_pairs,
    token_of,
)
from moe_jax.types import Arrival, ExchangeMaps

Array = jax.Array


def scatter(
    tokens: Array | None,
    pairs: Array | None,
    maps: ExchangeMaps,
    plan,
    *,
    ordered: bool = True,
    buffer: Array | None = None,
    timed: bool = False,
) -> tuple[Array | None, Array | None, Arrival | None]:
    """What every pair of the window carries, at its row, in one message: row(t, c) = tokens[t], pairs[c, t].

    Args:
      tokens: [T, F] of any dtype, or None.
      pairs: [C, T, G] of any dtype, or None; not both.
      maps, plan: of the window.
      ordered: False leaves everything in its arrival slot: M is then P * A.
      buffer: the arrival buffer to write into, as wide as the message; None makes one.
      timed: measure how long this rank waits for each source. Slots must be equal blocks.

    Returns:
      ([M, F], [M, G], what arrived here if ``buffer`` or ``timed``).
    """
    with jax.named_scope("pack"):
        packed_tokens = None if tokens is None else pick(tokens, token_of(maps.send_pair, plan), plan)
        packed_pairs = None
        if pairs is not None:
            packed_pairs = pick(jax.lax.collapse(pairs, 0, 2), place_of(maps.send_pair, plan), plan)
        message, parts = join_some([packed_tokens, packed_pairs])
    with jax.named_scope("exchange"):
        microseconds = None
        if timed:
            arrived, microseconds = collectives.exchange_blocks_timed(message, plan)
        elif maps.sizes.size:
            num_slots = maps.slot_row.shape[0] // plan.tp_size
            arrived = collectives.exchange_compact(message, maps.sizes, num_slots, plan, output=buffer)
        else:
            arrived = collectives.exchange_blocks(message, plan)
        everything = collectives.gather_tp(arrived, plan)
    with jax.named_scope("permute"):
        rows = split_some(pick(everything, maps.row_slot, plan) if ordered else everything, parts)
    return *rows, None if buffer is None and not timed else Arrival(data=arrived, microseconds=microseconds)


def collect(
    rows: Array,
    weights: Array | None,
    maps: ExchangeMaps,
    plan,
    *,
    ordered: bool = True,
    recipe=None,
    scalars: Array | None = None,
) -> tuple[Array, Array | None]:
    """Rows [M, H] at their pairs: [C, T, H], and scalars [M, G] -> [C, T, G].

    Of pairs outside the window, which are not ``present``, rows may be anything, and scalars are zero. tp > 1: the tp
    ranks' rows are partial sums, and are added. fp32 with a ``recipe``, else in the dtype of the rows. ``ordered``: as
    for ``scatter``.
    """
    del weights  # they are applied at the tokens
    message, parts = _home_message(rows, scalars, maps, plan, recipe, ordered)
    with jax.named_scope("exchange"):
        if maps.sizes.size:
            packed = collectives.exchange_compact(message, maps.sizes.T, maps.send_pair.shape[0], plan)
        else:
            packed = collectives.exchange_blocks(message, plan)
    with jax.named_scope("unpack"):
        collected, pair_scalars = split_some(pick(packed, maps.pair_slot.T, plan), parts)
        if scalars is not None:
            pair_scalars = only_present(pair_scalars, present(maps))
        return _decoded(collected, rows, recipe), pair_scalars


def collect_timed(rows: Array, maps: ExchangeMaps, plan, *, recipe=None) -> tuple[Array, Array]:
    """As ``collect`` in equal blocks, one peer after the other; and [W] i32 microseconds waited for each."""
    message, _ = _home_message(rows, None, maps, plan, recipe, ordered=True)
    with jax.named_scope("exchange"):
        packed, microseconds = collectives.exchange_blocks_timed(message, plan)
    with jax.named_scope("unpack"):
        return _decoded(pick(packed, maps.pair_slot.T, plan), rows, recipe), microseconds


def present(maps: ExchangeMaps) -> Array:
    """[T, C] bool, the pairs of the window."""
    return maps.pair_slot >= 0


def together(collected: Array, more: Array, maps: ExchangeMaps) -> Array:
    """What was ``collected`` in other windows, and what came ``more`` in this one: each pair comes back in one."""
    return jnp.where(present(maps).T[..., None], more, collected)


def total(collected: Array, maps: ExchangeMaps) -> Array:
    """What was collected in this window, summed over the copies of each token: [T, H] fp32."""
    return sum_over_pairs(collected, present(maps))


def _home_message(rows, scalars, maps, plan, recipe, ordered):
    """What every arrival slot sends back."""
    slots = [rows, scalars]
    with jax.named_scope("unpermute"):
        # Slots of the tp ranks are summed, so an unread one may be anything: it only meets its like.
        if ordered:
            slots = [None if part is None else pick(part, maps.slot_row, plan) for part in slots]
    with jax.named_scope("exchange"):
        slots = [None if part is None else collectives.reduce_scatter_tp(part, plan) for part in slots]
        return join_some([as_sent(slots[0], recipe), slots[1]])


def _decoded(collected, rows, recipe):
    if recipe is None:
        return collected
    values = as_received(jax.lax.collapse(collected, 0, 2), recipe, rows.shape[1])
    return values.reshape(*collected.shape[:2], rows.shape[1])


def collect_adjoint(rows: Array, weights: Array, ct: Array, plan, moves: Moves) -> tuple[Array, Array]:
    """Cotangents of rows and weights from that of what was collected, [C, T, H]: as scatter, with pairs for tokens."""
    del rows
    return moves.send(None, ct.astype(plan.dtype), None)[0].astype(plan.dtype), jnp.zeros_like(weights)
