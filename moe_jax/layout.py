"""Integers alone: from destinations to counts, offsets and permutations. No floats, no collectives.

A *pair* is a (token, choice) that may travel. Its *destination* is a flat expert slot, rank * L + local expert, or -1
if it stays where it is. The pairs of one rank, sorted by destination and then by flat index, form one list for each
destination rank. One *round* moves the *stretch* [start, start + capacity) of every such list.

There are three kinds of addresses:

- an *outbox slot* is a row of the buffer that leaves a rank,
- an *inbox slot* is a row of the buffer that has arrived,
- a *row* is a row of the experts' input, where rows stand by (local expert, tp rank, source rank, pair).

Everything is i32 and takes O(n + E * W) memory for n pairs, E experts and W ranks. Look-ups and running sums compare
every number with every other instead of searching in a loop: on an accelerator the launch of an operation costs more
than the arithmetic on so few numbers, and all comparisons are one fused operation there. On a CPU the results of
comparing n pairs with E experts, and M rows with their blocks, pass through memory. Each takes 4 bytes, which is little
beside a row of activations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.derivatives import take_rows

Array = jax.Array


class PairOrder(NamedTuple):
    """Pairs sorted by destination. n pairs, D destinations.

    Attributes:
      order: [n] the pair at each sorted position; pairs without a destination come last.
      position: [n] the sorted position of each pair, the inverse of ``order``.
      counts: [D] how many pairs each destination has.
    """

    order: Array
    position: Array
    counts: Array


class SendMaps(NamedTuple):
    """One round as its sender sees it. W ranks, S outbox slots, n pairs.

    Attributes:
      sizes: [W] how many rows go to each rank.
      bases: [W] the first outbox slot of the rows for each rank.
      slot_pair: [S] the pair in each outbox slot, or -1.
      pair_slot: [n] the outbox slot of each pair, or -1.
    """

    sizes: Array
    bases: Array
    slot_pair: Array
    pair_slot: Array


class ReceiveMaps(NamedTuple):
    """One round as its receiver sees it. P tp ranks, W source ranks, L local experts, M rows, P * A inbox slots.

    Attributes:
      sizes: [P, W] how many rows come from each source.
      bases: [P, W] the first inbox slot of the rows of each source.
      group_sizes: [L] how many rows each local expert gets.
      row_slot: [M] the inbox slot of each row, or -1.
      slot_row: [P * A] the row of each inbox slot, or -1.
    """

    sizes: Array
    bases: Array
    group_sizes: Array
    row_slot: Array
    slot_row: Array


class GatherMaps(NamedTuple):
    """One round as seen by a rank that holds the tokens of all P * W ranks, each of which has n pairs.

    Attributes:
      recv_counts: [P, W, L] how many pairs each source has for each local expert, over all rounds.
      group_sizes: [L] how many rows each local expert gets in this round.
      row_pair: [M] the pair of each row, as source * n + pair, or -1.
      pair_row: [P * W, n] the row of each pair of each source, or -1.
    """

    recv_counts: Array
    group_sizes: Array
    row_pair: Array
    pair_row: Array


def exclusive_cumsum(sizes: Array) -> Array:
    """Where each block starts if the blocks along the last axis lie end to end: the sum of the sizes before it.

    [..., B] -> [..., B].
    """
    place = np.arange(sizes.shape[-1])
    before = jnp.where(place[:, None] < place, sizes[..., None], 0)
    return jnp.sum(before, axis=-2, dtype=jnp.int32)


def searchsorted(ascending: Array, values: Array, *, side: str) -> Array:
    """``jnp.searchsorted`` as i32, by comparing all with all.

    For each value: how many entries of ``ascending`` are less than it (side="left"), or at most as large
    (side="right").
    """
    ascending = ascending[:, None]
    return jnp.sum(ascending < values if side == "left" else ascending <= values, axis=0, dtype=jnp.int32)


def count_each(ids: Array, num_ids: int) -> Array:
    """How often each of 0 .. num_ids - 1 stands in ``ids``, i32 [num_ids]; other ids are not counted."""
    return jnp.sum(ids.ravel()[:, None] == jnp.arange(num_ids, dtype=ids.dtype), axis=0, dtype=jnp.int32)


def sort_pairs(destination: Array, num_destinations: int) -> PairOrder:
    """Sorts pairs by destination, stably.

    Args:
      destination: [n] i32 in [-1, num_destinations); -1 sorts last.
      num_destinations: static.
    """
    n = destination.shape[0]
    iota = jnp.arange(n, dtype=jnp.int32)
    # 1. Pairs without a destination get the largest key, so that they come last.
    key = jnp.where(destination < 0, num_destinations, destination)
    # 2. Sort by (key, index). Both packed in one integer sort several times faster, where there is room for both.
    if (num_destinations + 1) * n < 2**31:
        order = jnp.sort(key * n + iota) % max(n, 1)
    else:
        _, order = lax.sort((key, iota), num_keys=1, is_stable=True)
    # 3. Invert the permutation.
    position = jnp.zeros(n, jnp.int32).at[order].set(iota, unique_indices=True)
    # 4. Count the keys without the sort, so that an exchange of counts does not wait for it.
    return PairOrder(order=order, position=position, counts=count_each(destination, num_destinations))


def map_blocks(source_start: Array, target_start: Array, sizes: Array, address: Array | int) -> Array:
    """Translates addresses between two buffers that hold the same blocks in different places.

    A block of ``size`` entries lies at ``source_start`` in one buffer and at ``target_start`` in the other, in the same
    inner order. So the address a of the source, if it lies in a block, is target_start + (a - source_start) in the
    target.

    Args:
      source_start, target_start, sizes: of the blocks, in any order, all of one shape [...]. In the source no two
        blocks that hold something overlap.
      address: [n] addresses of the source; or an int, which stands for all addresses below it.

    Returns:
      [n] target addresses, -1 for an address that lies in no block.
    """
    if isinstance(address, int):
        address = jnp.arange(address, dtype=jnp.int32)
    start, target, size = (part.ravel()[:, None] for part in (source_start, target_start, sizes))
    # 1. The place of each address in each block: [blocks, n].
    inner = address - start
    inside = (inner >= 0) & (inner < size)
    # 2. At most one block holds an address, so the others contribute -1 and the maximum over blocks is that block's.
    found = jnp.where(inside, target + inner, -1)
    return lax.reduce(found, np.int32(-1), lax.max, (0,))


def clip_to_stretch(lists: Array, start: Array | int, capacity: Array | int) -> tuple[Array, Array]:
    """The part of each block that lies in the stretch [start, start + capacity) of the list that it belongs to.

    Args:
      lists: [..., L] the sizes of the blocks that each list consists of, one behind the other.
      start, capacity: the stretch: one for all lists, or arrays that broadcast to ``lists``.

    Returns:
      (first, sizes), both [..., L]: where the part of each block begins inside the stretch, and how long it is.
    """
    begin = exclusive_cumsum(lists) - start
    first = jnp.clip(begin, 0, capacity)
    return first, jnp.clip(begin + lists, 0, capacity) - first


def send_maps(pairs: PairOrder, num_ranks: int, start: Array | int, capacity: int, *, compact: bool) -> SendMaps:
    """The sender's side of a round.

    Args:
      pairs: this rank's pairs.
      num_ranks: W.
      start, capacity: the stretch of the round in the list for each rank.
      compact: True lays the rows for all ranks end to end; False gives each rank ``capacity`` outbox slots.
    """
    n = pairs.order.shape[0]
    # 1. The list for each rank, and where its stretch begins among the sorted pairs.
    list_sizes = jnp.sum(pairs.counts.reshape(num_ranks, -1), axis=1, dtype=jnp.int32)
    stretch_start = exclusive_cumsum(list_sizes) + start
    # 2. How much of the list lies in the stretch, and where that part begins in the outbox.
    sizes = jnp.clip(list_sizes - start, 0, capacity)
    bases = exclusive_cumsum(sizes) if compact else jnp.asarray(np.arange(num_ranks, dtype=np.int32) * capacity)
    length = min(n, num_ranks * capacity) if compact else num_ranks * capacity
    # 3. A stretch keeps its order in the outbox, so each is one block, and slots and pairs are looked up both ways:
    #    outbox slot -> sorted position -> pair, and pair -> sorted position -> outbox slot.
    slot_position = map_blocks(bases, stretch_start, sizes, length)
    return SendMaps(
        sizes=sizes,
        bases=bases,
        slot_pair=take_rows(pairs.order, slot_position, absent=-1),
        pair_slot=map_blocks(stretch_start, bases, sizes, pairs.position),
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
    """The receiver's side of a round.

    Args:
      recv_counts: [P, W, L] how many pairs each source's list for this rank has for each local expert.
      start, capacity: the stretch of the round in each of these lists.
      compact: True: the rows of all sources of one tp rank arrive end to end; False: each source has ``capacity``
        inbox slots.
      num_rows: M, static row capacity.
      source_order: [P * W] a permutation of the sources p * W + w: the order of their rows within an expert. None:
        ascending.
    """
    num_tp, num_ranks, _ = recv_counts.shape
    inbox_length = num_ranks * capacity  # of one tp rank
    # 1. A block is what one source sends to one local expert. Its part in the stretch, and what each source sends in
    #    all.
    first, sizes = clip_to_stretch(recv_counts, start, capacity)
    from_source = jnp.sum(sizes, axis=-1, dtype=jnp.int32)
    # 2. Where each source begins in the inbox, and so where each of its blocks does.
    if compact:
        bases = exclusive_cumsum(from_source)
    else:
        bases = np.broadcast_to(np.arange(num_ranks, dtype=np.int32) * capacity, (num_tp, num_ranks))
    bases = jnp.asarray(bases + np.arange(num_tp, dtype=np.int32)[:, None] * inbox_length)
    slot_start = bases[..., None] + first
    # 3. Where each block begins among the rows; then inbox slots and rows are looked up both ways.
    row_start = row_starts(sizes, source_order)
    return ReceiveMaps(
        sizes=from_source,
        bases=bases,
        group_sizes=jnp.sum(sizes, axis=(0, 1), dtype=jnp.int32),
        row_slot=map_blocks(row_start, slot_start, sizes, num_rows),
        slot_row=map_blocks(slot_start, row_start, sizes, num_tp * inbox_length),
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
    """A round as seen by a rank that holds everybody's tokens and picks those of its own experts.

    Args:
      destinations: [P, W, n] the flat expert slot of every pair of every rank, or -1.
      rank: this rank, traced.
      num_local: L.
      start, capacity: the stretch of the round in the list that each source has for this rank.
      num_rows: M, static row capacity.
      source_order: as for ``receive_maps``.
    """
    num_tp, num_ranks, n = destinations.shape
    num_sources = num_tp * num_ranks
    # 1. The pairs for this rank, sorted by (local expert, place of the source), which is the order of the rows.
    local = destinations - rank * num_local
    mine = (destinations >= 0) & (local >= 0) & (local < num_local)
    place = _places(num_sources, source_order)
    block = jnp.where(mine, local * num_sources + place.reshape(num_tp, num_ranks, 1), -1)
    pairs = sort_pairs(block.ravel(), num_local * num_sources)
    # 2. Counts by expert and place, put back into the order of the sources.
    by_source = pairs.counts.reshape(num_local, num_sources).T
    recv_counts = (by_source if source_order is None else by_source[place]).reshape(num_tp, num_ranks, num_local)

    # 3. The part of each block in the stretch. In the sorted list this part begins behind what earlier rounds have
    #    taken of its block; among the rows of this round the parts stand end to end.
    _, sizes = clip_to_stretch(recv_counts, start, capacity)
    skipped = jnp.clip(start - exclusive_cumsum(recv_counts), 0, recv_counts)
    sorted_start = row_starts(recv_counts, source_order) + skipped
    row_start = row_starts(sizes, source_order)
    # 4. Rows and pairs are looked up both ways.
    row_position = map_blocks(row_start, sorted_start, sizes, num_rows)
    pair_row = map_blocks(sorted_start, row_start, sizes, pairs.position)
    return GatherMaps(
        recv_counts=recv_counts,
        group_sizes=jnp.sum(sizes, axis=(0, 1), dtype=jnp.int32),
        row_pair=take_rows(pairs.order, row_position, absent=-1),
        pair_row=pair_row.reshape(num_tp * num_ranks, n),
    )


def row_starts(sizes: Array, source_order: Array | None = None) -> Array:
    """The first row of each (tp rank, source, local expert) block, where rows stand by expert first. [P, W, L]."""
    # 1. The place of each block among the blocks: by expert, then by the place of its source.
    place = _places(sizes.shape[0] * sizes.shape[1], source_order)
    order = (place[:, None] + np.arange(sizes.shape[-1], dtype=np.int32) * len(place)).ravel()
    # 2. A block starts behind all blocks of a lower place.
    before = jnp.where(order[:, None] < order, sizes.reshape(-1, 1), 0)
    return jnp.sum(before, axis=0, dtype=jnp.int32).reshape(sizes.shape)


def _places(num_sources: int, source_order: Array | None) -> Array | np.ndarray:
    """[P * W] the place that each source has in the order of the rows of an expert: the inverse of ``source_order``."""
    if source_order is None:
        return np.arange(num_sources, dtype=np.int32)
    return jnp.argsort(source_order).astype(jnp.int32)
