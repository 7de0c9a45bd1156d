"""Whole slots between ranks, each from the slot that a table names, with no more than these on the wire.

- *At once*, on GPU and TPU, which have a ragged exchange. It may carry several slices from each rank to each, so every
  slot is a slice, and goes from where it is to where it belongs. What stays on its rank is a slice to itself, and does
  not go over the wire. Nothing is packed, so there is no buffer either.
- *In columns*, where a back end brings a ragged exchange of its own: S of them, each of one slot of every rank.
- *In turns*, elsewhere: in a turn each rank sends at most one slot and receives at most one, by two all-to-alls of 1/R
  of a slot to each of the R ranks. That is 2 (R - 1) / R slots on the wire of each device, whoever talks to whom.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax.collectives.group import swap_with_peers
from moe_jax.collectives.ragged import NATIVE
from moe_jax.kernels.table import find_transport

Array = jax.Array


def fetch_slots(
    slots: Array, sources: Array, turns: Array, num_turns: Array, *, axes: tuple[str, ...], kernels: tuple[str, ...]
) -> Array:
    """Bit by bit: slot i of rank r becomes what slot ``sources[r, i]``, of all R * S, was before.

    Args:
      slots: [S, ...] of this rank.
      sources: [R, S] i32, the same everywhere.
      turns: [R, S] i32, the same everywhere: the turn in which a slot comes from another rank, -1 if it does not. No
        two slots of a rank come in one turn, and no rank sends two slots in one. Read where slots come in turns.
      num_turns: [1] i32.
      axes: mesh axes of the R ranks.
      kernels: registrations of back ends, of which one may bring a ragged exchange.

    Returns:
      [S, ...], varying over ``axes`` and as ``slots`` does.
    """
    if lax.axis_size(axes) == 1:
        return _on_bits(slots, lambda bits: jnp.take(bits, sources[0], axis=0, mode="clip"))
    operands, exchange = (slots, sources, turns, num_turns), find_transport("ragged", kernels)
    if exchange is not None:
        return _on_bits(slots, lambda bits: _in_columns(bits, sources, axes=axes, exchange=exchange))

    def at_once(slots, sources, *_):
        # Nothing computes with what travels, so numbers need not become bits, which would be a copy on TPU.
        slots, into, *slices = _slices(slots, sources, axes)
        return lax.ragged_all_to_all(slots, into, *(table.reshape(-1) for table in slices), axis_name=axes)

    def in_turns(slots, *tables):
        return _on_bits(slots, lambda bits: _in_turns(bits, *tables, axes=axes))

    return lax.platform_dependent(*operands, **dict.fromkeys(NATIVE, at_once), default=in_turns)


def _slices(slots: Array, sources: Array, axes: tuple[str, ...]) -> list[Array]:
    """Operand, output and the four tables of a ragged exchange that writes every slot of its output."""
    into = _compat.empty(slots.shape, slots.dtype)
    return list(_compat.as_varying_alike((slots, into, *slices_of(sources, lax.axis_index(axes))), axes))


def slices_of(sources: Array, rank: Array) -> tuple[Array, Array, Array, Array]:
    """What ``rank`` tells a ragged exchange of S slices from each rank to each, as four tables [R, S].

    Slice i for a rank is what that rank's slot i takes: from this slot here, 1 or 0 slots of it, to slot i there. And
    slice i from a rank is what comes to slot i here: 1 or 0 slots.
    """
    num_ranks, num_slots = sources.shape
    ranks = jnp.arange(num_ranks, dtype=jnp.int32)
    source_rank = sources // num_slots
    starts = sources % num_slots
    sends = (source_rank == rank).astype(jnp.int32)
    lands = jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32), sources.shape)
    comes = (source_rank[rank] == ranks[:, None]).astype(jnp.int32)
    return starts, sends, lands, comes


def _on_bits(slots: Array, move: Callable[[Array], Array]) -> Array:
    """``move`` applied to bits: what computes with numbers may widen narrow ones, and quiet what is no number."""
    if not jnp.issubdtype(slots.dtype, jnp.floating):
        return move(slots)
    bits = lax.bitcast_convert_type(slots, f"uint{jnp.finfo(slots.dtype).bits}")
    return lax.bitcast_convert_type(move(bits), slots.dtype)


def _in_columns(slots: Array, sources: Array, *, axes: tuple[str, ...], exchange: Callable) -> Array:
    """The slots 0 of all ranks, then the slots 1, ...: a back end need not know more than one slice for each rank."""
    slots, into, *slices = _slices(slots, sources, axes)

    def column(i: Array, into: Array) -> Array:
        return exchange(slots, into, *(table[:, i] for table in slices), axis_name=axes)

    return lax.fori_loop(0, len(slots), column, into)


def _in_turns(slots: Array, sources: Array, turns: Array, num_turns: Array, *, axes: tuple[str, ...]) -> Array:
    (num_ranks, num_slots), size = sources.shape, slots[0].size
    me, piece = lax.axis_index(axes), -(-size // num_ranks)
    # 1. What a rank has itself. The result starts as a copy, so that turns read what was there before.
    at_home = jnp.where(turns[me] < 0, sources[me] % num_slots, jnp.arange(num_slots, dtype=jnp.int32))
    result = jnp.take(slots, at_home, axis=0, mode="clip")

    def turn(t: Array, result: Array) -> Array:
        # 2. Which of its slots each rank writes in this turn, if any, and the slot of all that it takes.
        wanted = jnp.any(turns == t, axis=1)  # [R]
        written = jnp.argmax(turns == t, axis=1)  # [R]
        taken = jnp.take_along_axis(sources, written[:, None], axis=1)[:, 0]  # [R]
        sent = jnp.max(jnp.where(wanted & (taken // num_slots == me), taken % num_slots, 0))
        # 3. Cut the slot to be sent into a piece for each rank: rank j gets piece j of every rank's slot.
        row = lax.dynamic_index_in_dim(slots, sent, keepdims=False).reshape(-1)
        pieces = jnp.pad(row, (0, num_ranks * piece - size)).reshape(num_ranks, piece)
        pieces = swap_with_peers(pieces, axes)
        # 4. From there rank r gets the pieces of that slot which it wants. So every turn loads all links alike.
        pieces = swap_with_peers(jnp.take(pieces, taken // num_slots, axis=0, mode="clip"), axes)
        row = pieces.reshape(-1)[:size].reshape(slots.shape[1:])
        # 5. Write it, or what is there already where this rank wants nothing.
        row = jnp.where(wanted[me], row, lax.dynamic_index_in_dim(result, written[me], keepdims=False))
        return lax.dynamic_update_index_in_dim(result, row, written[me], 0)

    return lax.fori_loop(0, num_turns[0], turn, result)
