"""Integer bookkeeping: from destinations to counts, offsets and permutations. No floats, no collectives.

Everything is i32 and O(n + E * W) in memory for n pairs, E experts and W ranks. On accelerators the launch of an
operation costs more than its arithmetic on so few numbers: look-ups and running sums compare all with all, which is one
fused operation there, instead of searching in a loop. (On CPUs the comparisons of n pairs with E experts, or of M rows
with their blocks, pass through memory: 4 bytes each, where a row has as many as it is wide.) A *pair* is one copy of a
token that must travel; its *destination* is a flat expert slot, rank * L + local expert, or -1. The pairs of one rank,
sorted by destination and then by flat index, form one list per destination rank; a *window* is the stretch
[start, start + capacity) of every such list, and it is what one exchange moves.

Addresses: a *send slot* is a row of the buffer that leaves, an *arrival slot* a row of the buffer that comes, a *row*
a row of the experts' input, ordered by (local expert, tp rank, source rank, pair).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.derivatives import take_rows

Array = jax.Array


class PairOrder(NamedTuple):
    """Pairs sorted by destination. n pairs, D destinations."""

    order: Array  # [n] pair at each sorted position; pairs without destination come last
    position: Array  # [n] sorted position of each pair
    counts: Array  # [D] pairs of each destination


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
    """Where each entry starts when all of the last axis are laid end to end. [..., B] -> [..., B]."""
    place = np.arange(sizes.shape[-1])
    return _sum_where(place[:, None] < place, sizes[..., None])


def searchsorted(ascending: Array, values: Array, *, side: str) -> Array:
    """``jnp.searchsorted`` as i32: how many of ``ascending`` are less than each value, or with side="right" at most."""
    ascending = ascending[:, None]
    return jnp.sum(ascending < values if side == "left" else ascending <= values, axis=0, dtype=jnp.int32)


def count_each(ids: Array, num_ids: int) -> Array:
    """How often each of 0..num_ids-1 stands in ``ids``; others do not count. i32 [num_ids]."""
    return jnp.sum(ids.ravel()[:, None] == jnp.arange(num_ids, dtype=ids.dtype), axis=0, dtype=jnp.int32)


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
        order = jnp.sort(key * n + iota) % max(n, 1)
    else:
        _, order = lax.sort((key, iota), num_keys=1, is_stable=True)
    position = jnp.zeros(n, jnp.int32).at[order].set(iota, unique_indices=True)
    # Counted apart, so that what needs the counts does not wait for the sort.
    return PairOrder(order=order, position=position, counts=count_each(destination, num_destinations))


def map_blocks(source_start: Array, target_start: Array, sizes: Array, address: Array | int) -> Array:
    """Where source addresses lie in the target layout, for blocks that keep their inner order.

    Args:
      source_start, target_start, sizes: of the blocks, in any order, all of one shape [...]. In the source no two
        blocks that hold something overlap.
      address: [n] of the source; or an int, for all addresses below it.

    Returns:
      [n] target addresses, or -1 where no block lies.
    """
    if isinstance(address, int):
        address = jnp.arange(address, dtype=jnp.int32)
    start, target, size = (part.ravel()[:, None] for part in (source_start, target_start, sizes))
    inner = address - start
    inside = (inner >= 0) & (inner < size)
    found = jnp.where(inside, target + inner, -1)  # of at most one block
    return lax.reduce(found, np.int32(-1), lax.max, (0,))


def clip_to_window(lists: Array, start: Array | int, capacity: Array | int) -> tuple[Array, Array]:
    """The part of each block that lies in a window of the list it belongs to.

    Args:
      lists: [..., L] sizes of the consecutive blocks of each list.
      start, capacity: the window of every list.

    Returns:
      (first, sizes), both [..., L]: offset in the window, and number of entries inside it.
    """
    begin = exclusive_cumsum(lists) - start
    first = jnp.clip(begin, 0, capacity)
    return first, jnp.clip(begin + lists, 0, capacity) - first


def send_maps(pairs: PairOrder, num_ranks: int, start: Array | int, capacity: int, *, compact: bool) -> SendMaps:
    """The sender's side of a window.

    Args:
      pairs: this rank's pairs.
      num_ranks: W.
      start, capacity: the window.
      compact: True lays the rows for all ranks end to end; False gives each rank ``capacity`` slots.
    """
    n = pairs.order.shape[0]
    list_sizes = jnp.sum(pairs.counts.reshape(num_ranks, -1), axis=1, dtype=jnp.int32)
    window_start = exclusive_cumsum(list_sizes) + start
    sizes = jnp.clip(list_sizes - start, 0, capacity)
    bases = exclusive_cumsum(sizes) if compact else jnp.asarray(np.arange(num_ranks, dtype=np.int32) * capacity)
    length = min(n, num_ranks * capacity) if compact else num_ranks * capacity
    slot_position = map_blocks(bases, window_start, sizes, length)
    return SendMaps(
        sizes=sizes,
        bases=bases,
        slot_pair=take_rows(pairs.order, slot_position, absent=-1),
        pair_slot=map_blocks(window_start, bases, sizes, pairs.position),
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
        bases = exclusive_cumsum(from_source)
    else:
        bases = np.broadcast_to(np.arange(num_ranks, dtype=np.int32) * capacity, (num_tp, num_ranks))
    bases = jnp.asarray(bases + np.arange(num_tp, dtype=np.int32)[:, None] * arrival_len)
    slot_start = bases[..., None] + first
    row_start = row_starts(sizes, source_order)
    return ReceiveMaps(
        sizes=from_source,
        bases=bases,
        group_sizes=jnp.sum(sizes, axis=(0, 1), dtype=jnp.int32),
        row_slot=map_blocks(row_start, slot_start, sizes, num_rows),
        slot_row=map_blocks(slot_start, row_start, sizes, num_tp * arrival_len),
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
    place = _places(num_sources, source_order)
    block = jnp.where(mine, local * num_sources + place.reshape(num_tp, num_ranks, 1), -1)
    pairs = sort_pairs(block.ravel(), num_local * num_sources)
    by_source = pairs.counts.reshape(num_local, num_sources).T
    recv_counts = (by_source if source_order is None else by_source[place]).reshape(num_tp, num_ranks, num_local)

    _, sizes = clip_to_window(recv_counts, start, capacity)
    skipped = jnp.clip(start - exclusive_cumsum(recv_counts), 0, recv_counts)  # of each block, by earlier windows
    sorted_start = row_starts(recv_counts, source_order) + skipped
    row_start = row_starts(sizes, source_order)
    row_position = map_blocks(row_start, sorted_start, sizes, num_rows)
    pair_row = map_blocks(sorted_start, row_start, sizes, pairs.position)
    return GatherMaps(
        recv_counts=recv_counts,
        group_sizes=jnp.sum(sizes, axis=(0, 1), dtype=jnp.int32),
        row_pair=take_rows(pairs.order, row_position, absent=-1),
        pair_row=pair_row.reshape(num_tp * num_ranks, n),
    )


def row_starts(sizes: Array, source_order: Array | None = None) -> Array:
    """First row of each (tp rank, source, local expert) block when rows are ordered by expert first. [P, W, L]."""
    place = _places(sizes.shape[0] * sizes.shape[1], source_order)
    order = (place[:, None] + np.arange(sizes.shape[-1], dtype=np.int32) * len(place)).ravel()  # of the blocks
    return _sum_where(order[:, None] < order, sizes.reshape(-1, 1)).reshape(sizes.shape)


def _places(num_sources: int, source_order: Array | None) -> Array | np.ndarray:
    """[P * W] the place of each source in the order of the rows of an expert."""
    if source_order is None:
        return np.arange(num_sources, dtype=np.int32)
    return jnp.argsort(source_order).astype(jnp.int32)


def _sum_where(wanted: Array | np.ndarray, sizes: Array) -> Array:
    """The sum over the last axis but one of the ``sizes`` that are ``wanted``."""
    return jnp.sum(jnp.where(wanted, sizes, 0), axis=-2, dtype=jnp.int32)
