"""Integer bookkeeping: from destinations to counts, offsets and permutations. No floats, no collectives.

Everything is i32 and O(n + E * W) in memory for n pairs, E experts and W ranks. A *pair* is one copy of a token that
must travel; its *destination* is a flat expert slot, rank * L + local expert, or -1. The pairs of one rank, sorted by
destination and then by flat index, form one list per destination rank; a *window* is the stretch
[start, start + capacity) of every such list, and it is what one exchange moves.

Addresses: a *send slot* is a row of the buffer that leaves, an *arrival slot* a row of the buffer that comes, a *row*
a row of the experts' input, ordered by (local expert, tp rank, source rank, pair).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat

Array = jax.Array


class PairOrder(NamedTuple):
    """Pairs sorted by destination. n pairs, D destinations."""

    order: Array  # [n] pair at each sorted position; pairs without destination come last
    position: Array  # [n] sorted position of each pair
    destination: Array  # [n] as given: 0..D-1 or -1
    offsets: Array  # [D + 1] sorted position at which each destination starts


class SendMaps(NamedTuple):
    """One window as its sender sees it."""

    sizes: Array  # [W] rows for each rank
    bases: Array  # [W] first send slot for each rank
    slot_pair: Array  # [S] pair in each send slot, or -1
    pair_slot: Array  # [n] send slot of each pair, or -1


class ReceiveMaps(NamedTuple):
    """One window as its receiver sees it; P tp ranks, W source ranks, L local experts."""

    sizes: Array  # [P, W] rows from each source
    bases: Array  # [P, W] first arrival slot of each source
    group_sizes: Array  # [L]
    row_slot: Array  # [M] arrival slot of each row, or -1
    slot_row: Array  # [P * A] row of each arrival slot, or -1


class GatherMaps(NamedTuple):
    """One window as seen by a rank that holds the tokens of all P * W ranks; n pairs each."""

    recv_counts: Array  # [P, W, L] pairs of each source for each local expert, over all windows
    group_sizes: Array  # [L]
    row_pair: Array  # [M] pair of each row, as source * n + pair, or -1
    pair_row: Array  # [P * W, n] row of each pair of each source, or -1


def exclusive_cumsum(sizes: Array) -> Array:
    """Where each entry starts when all are laid end to end. [B] -> [B]."""
    return jnp.cumsum(sizes) - sizes


def sort_pairs(destination: Array, num_destinations: int) -> PairOrder:
    """Sorts pairs by destination, stably.

    Args:
      destination: [n] i32 in [-1, num_destinations); -1 sorts last.
      num_destinations: static.
    """
    n = destination.shape[0]
    iota = jnp.arange(n, dtype=jnp.int32)
    key = jnp.where(destination < 0, num_destinations, destination)
    if (num_destinations + 1) * n < 2**31:  # key and index packed in one integer sort several times faster
        packed = jnp.sort(key * n + iota)
        sorted_key, order = packed // max(n, 1), packed % max(n, 1)
    else:
        sorted_key, order = lax.sort((key, iota), num_keys=1, is_stable=True)
    position = jnp.zeros(n, jnp.int32).at[order].set(iota, unique_indices=True)
    offsets = _compat.searchsorted(sorted_key, jnp.arange(num_destinations + 1, dtype=jnp.int32), side="left")
    return PairOrder(order=order, position=position, destination=destination, offsets=offsets)


def map_blocks(source_start: Array, target_start: Array, sizes: Array, length: int) -> Array:
    """Where each source address lies in the target layout, for blocks that keep their inner order.

    Args:
      source_start: [B] ascending; empty blocks may share a start.
      target_start: [B].
      sizes: [B]; blocks do not overlap in the source.
      length: extent of the source, static.

    Returns:
      [length] target address, or -1 where no block lies.
    """
    if not sizes.shape[0]:
        return jnp.full((length,), -1, jnp.int32)
    address = jnp.arange(length, dtype=jnp.int32)
    block = _compat.searchsorted(source_start, address, side="right") - 1
    inner = address - source_start[block]
    inside = (block >= 0) & (inner < sizes[block])
    return jnp.where(inside, target_start[block] + inner, -1)


def clip_to_window(lists: Array, start: Array | int, capacity: int) -> tuple[Array, Array]:
    """The part of each block that lies in a window of the list it belongs to.

    Args:
      lists: [..., L] sizes of the consecutive blocks of each list.
      start, capacity: the window of every list.

    Returns:
      (first, sizes), both [..., L]: offset in the window, and number of entries inside it.
    """
    stop = jnp.cumsum(lists, axis=-1)
    first = jnp.clip(stop - lists - start, 0, capacity)
    return first, jnp.clip(stop - start, 0, capacity) - first


def send_maps(pairs: PairOrder, num_ranks: int, start: Array | int, capacity: int, *, compact: bool) -> SendMaps:
    """The sender's side of a window.

    Args:
      pairs: this rank's pairs.
      num_ranks: W.
      start, capacity: the window.
      compact: True lays the rows for all ranks end to end; False gives each rank ``capacity`` slots.
    """
    n, per_rank = pairs.order.shape[0], (pairs.offsets.shape[0] - 1) // num_ranks
    list_start = pairs.offsets[:-1:per_rank]
    list_sizes = jnp.diff(pairs.offsets[::per_rank])
    sizes = jnp.clip(list_sizes - start, 0, capacity)
    bases = exclusive_cumsum(sizes) if compact else jnp.arange(num_ranks, dtype=jnp.int32) * capacity
    length = min(n, num_ranks * capacity) if compact else num_ranks * capacity
    slot_position = map_blocks(bases, list_start + start, sizes, length)
    slot_pair = jnp.where(slot_position < 0, -1, _take(pairs.order, slot_position))
    rank = jnp.maximum(pairs.destination, 0) // per_rank
    inner = pairs.position - list_start[rank] - start
    inside = (pairs.destination >= 0) & (inner >= 0) & (inner < capacity)
    return SendMaps(
        sizes=sizes, bases=bases, slot_pair=slot_pair, pair_slot=jnp.where(inside, bases[rank] + inner, -1)
    )


def receive_maps(
    recv_counts: Array,
    start: Array | int,
    capacity: int,
    *,
    compact: bool,
    num_rows: int,
    source_order: Array | None = None,
) -> ReceiveMaps:
    """The receiver's side of a window.

    Args:
      recv_counts: [P, W, L] entries of each source's list for this rank, by local expert.
      start, capacity: the window.
      compact: True: the rows of all sources of one tp rank arrive end to end; False: each has ``capacity`` slots.
      num_rows: M, static row capacity.
      source_order: [P * W] a permutation of the sources p * W + w, in the order of their rows within an expert;
        None: ascending.
    """
    num_tp, num_ranks, _ = recv_counts.shape
    arrival_len = num_ranks * capacity
    first, sizes = clip_to_window(recv_counts, start, capacity)
    from_source = jnp.sum(sizes, axis=-1, dtype=jnp.int32)
    if compact:
        bases = jnp.cumsum(from_source, axis=1) - from_source
    else:
        bases = jnp.broadcast_to(jnp.arange(num_ranks, dtype=jnp.int32) * capacity, (num_tp, num_ranks))
    bases = bases + jnp.arange(num_tp, dtype=jnp.int32)[:, None] * arrival_len
    slot_start = bases[..., None] + first
    row_start = row_starts(sizes, source_order)
    flat = functools.partial(by_row, source_order=source_order)
    return ReceiveMaps(
        sizes=from_source,
        bases=bases,
        group_sizes=jnp.sum(sizes, axis=(0, 1), dtype=jnp.int32),
        row_slot=map_blocks(flat(row_start), flat(slot_start), flat(sizes), num_rows),
        slot_row=map_blocks(slot_start.ravel(), row_start.ravel(), sizes.ravel(), num_tp * arrival_len),
    )


def gather_maps(
    destinations: Array,
    rank: Array,
    num_local: int,
    start: Array | int,
    capacity: int,
    *,
    num_rows: int,
    source_order: Array | None = None,
) -> GatherMaps:
    """A window as seen by a rank that holds everybody's tokens and picks its own.

    Args:
      destinations: [P, W, n] the flat expert slot of every pair of every rank, or -1.
      rank: this rank, traced.
      num_local: L.
      start, capacity: the window.
      num_rows: M, static row capacity.
      source_order: as for ``receive_maps``.
    """
    num_tp, num_ranks, n = destinations.shape
    num_sources = num_tp * num_ranks
    local = destinations - rank * num_local
    mine = (destinations >= 0) & (local >= 0) & (local < num_local)
    source = jnp.arange(num_sources, dtype=jnp.int32) if source_order is None else jnp.argsort(source_order)
    source = source.astype(jnp.int32).reshape(num_tp, num_ranks, 1)
    block = jnp.where(mine, local * num_sources + source, -1)
    pairs = sort_pairs(block.ravel(), num_local * num_sources)
    recv_counts = _by_source(jnp.diff(pairs.offsets), destinations.shape[:2], source_order)

    _, sizes = clip_to_window(recv_counts, start, capacity)
    list_start = jnp.cumsum(recv_counts, axis=-1) - recv_counts
    skipped = jnp.clip(start - list_start, 0, recv_counts)  # of each block, by earlier windows
    flat = functools.partial(by_row, source_order=source_order)
    sorted_start = flat(row_starts(recv_counts, source_order) + skipped)
    row_start = flat(row_starts(sizes, source_order))
    row_position = map_blocks(row_start, sorted_start, flat(sizes), num_rows)
    position_row = map_blocks(sorted_start, row_start, flat(sizes), pairs.order.shape[0])
    return GatherMaps(
        recv_counts=recv_counts,
        group_sizes=jnp.sum(sizes, axis=(0, 1), dtype=jnp.int32),
        row_pair=jnp.where(row_position < 0, -1, _take(pairs.order, row_position)),
        pair_row=_take(position_row, pairs.position).reshape(num_tp * num_ranks, n),
    )


def row_starts(sizes: Array, source_order: Array | None = None) -> Array:
    """First row of each (tp rank, source, local expert) block when rows are ordered by expert first. [P, W, L]."""
    return _by_source(exclusive_cumsum(by_row(sizes, source_order)), sizes.shape[:2], source_order)


def by_row(blocks: Array, source_order: Array | None) -> Array:
    """[P, W, L] -> flat, in row order: local expert, then source."""
    by_source = lax.collapse(blocks, 0, 2)
    return (by_source if source_order is None else by_source[source_order]).T.ravel()


def _by_source(flat: Array, sources: tuple[int, int], source_order: Array | None) -> Array:
    """The inverse of ``by_row``: [L * P * W] -> [P, W, L]."""
    by_source = flat.reshape(-1, sources[0] * sources[1]).T
    if source_order is not None:
        by_source = by_source[jnp.argsort(source_order)]
    return by_source.reshape(*sources, by_source.shape[1])


def _take(table: Array, index: Array) -> Array:
    """``table[index]`` with -1 clipped; an empty table gives zeros."""
    return jnp.take(table, index, mode="clip") if table.shape[0] else jnp.zeros_like(index)
