"""Maps over a mesh of nodes: a token crosses to each node at most once, and so does what comes back of it.

Out: rank i of a node sends a token once to rank i of every node that one of its experts lives on, and that rank sends
copies on to the experts' ranks inside its node. Back: the same rank weights and adds the rows of all copies of a token
on its node, and one partial sum per token and node goes home. W = N * R ranks, R on each of N nodes, numbered node by
node; rows have the order of every other transport: (local expert, tp rank, source rank, token, copy).

Addresses: a *crossing slot* is a row of the buffer that goes to other nodes (B for each), a *guest slot* a row of the
one that comes from them; slot b of the block from node n is there what slot b of the block for this node is to its
sender. An *inner slot* is a row of the buffer that goes to the ranks of this node (D for each where blocks are of equal
size), an *arrival slot* a row of what comes from them, a *row* one of the experts' input.

Extents hold the worst skew of a window of ``capacity`` rows per pair of ranks, repeated destinations included:
B = min(T, R * capacity) and D = N * min(capacity, T * C). With the windows of the layer, inner blocks are as long as
those of the padded transport, W * capacity rows in all. A window longer than ``plan.pair_capacity``, such as that of
a dropless ``dispatch``, travels inside the node end to end, in chunks that follow the true counts; its arrival buffer
still has R * D = W * T * C rows, a P-th of the M rows that the caller asks for.
"""

import jax
import jax.numpy as jnp

from moe_jax import _compat, collectives, layout
from moe_jax.collectives import nodes
from moe_jax.derivatives import take_rows
from moe_jax.types import HierarchyMaps

Array = jax.Array


def open_hierarchy(
    destination: Array,
    start: Array | int,
    capacity: int,
    plan,
    *,
    num_rows: int,
    source_order: Array | None = None,
) -> tuple[HierarchyMaps, Array, Array]:
    """The maps of the pairs at places [start, start + capacity) of every list; see ``layout`` for lists and windows.

    Two exchanges of integers: counts between all ranks, destinations between nodes; a third one inside the node, of
    R numbers, where rows travel end to end.

    Args:
      destination: [T, C] i32 flat expert slot, rank * L + local expert, of every copy of every token, or -1.
      start: first place, may be traced.
      capacity: places, static.
      plan: names the axes and sizes; its transport is not read.
      num_rows: M, static row capacity, at least the rows that may come: P * W * capacity always are enough.
      source_order: as for ``layout.receive_maps``.

    Returns:
      (maps, group_sizes [L] of this window, recv_counts [P, W, L] pairs of each source for each local expert, over
      all windows).
    """
    destination = _compat.as_varying(destination, plan.exchange_axes)
    (tokens, copies), num_nodes, num_local = destination.shape, nodes.num_nodes(plan), plan.num_local_experts
    per_node = plan.ep_size // num_nodes
    compact = capacity > plan.pair_capacity
    with jax.named_scope("layout"):
        pairs = layout.sort_pairs(destination.ravel(), plan.ep_size * num_local)
        window = layout.send_maps(pairs, plan.ep_size, start, capacity, compact=True)
        chosen = jnp.where(window.pair_slot.reshape(destination.shape) >= 0, destination, -1)
        node = jnp.where(chosen >= 0, chosen // (per_node * num_local), -1)
        slot_token, token_slot = _crossing_maps(node, num_nodes, min(tokens, per_node * capacity))
        leaving = _destinations_by_node(chosen, node, slot_token, num_nodes, per_node * num_local)
    with jax.named_scope("exchange_counts"):
        recv_counts = collectives.exchange_counts(pairs.counts.reshape(plan.ep_size, num_local), plan)
        guests = nodes.swap_with_nodes(leaving, plan)
    with jax.named_scope("layout"):
        block = num_nodes * min(capacity, tokens * copies)
        inner_pairs = layout.sort_pairs(guests.ravel(), per_node * num_local)
        inner = layout.send_maps(inner_pairs, per_node, 0, block, compact=compact)
        _, arriving = layout.clip_to_window(recv_counts, start, capacity)
        row_slot, slot_row = _receive_maps(arriving, num_nodes, block, num_rows, source_order, compact=compact)
    sizes = nodes.all_inside_sizes(inner.sizes, plan) if compact else jnp.zeros_like(slot_row, shape=(0, 0))
    maps = HierarchyMaps(
        slot_token=slot_token,
        token_slot=token_slot,
        inner_pair=inner.slot_pair,
        pair_inner=inner.pair_slot.reshape(-1, copies),
        row_slot=row_slot,
        slot_row=slot_row,
        sizes=sizes,
    )
    return maps, jnp.sum(arriving, axis=(0, 1), dtype=jnp.int32), recv_counts


def _crossing_maps(node: Array, num_nodes: int, block: int) -> tuple[Array, Array]:
    """Slots of tokens that cross, by node and token: ([N * B] token of each slot, [T, N] slot of each token).

    Args:
      node: [T, C] of each copy, or -1.
      num_nodes: N.
      block: B, at least the tokens that any node gets.
    """
    tokens, length = node.shape[0], num_nodes * block
    every_node = jnp.arange(num_nodes, dtype=jnp.int32)
    wanted = jnp.zeros((tokens, num_nodes), bool)
    for c in range(node.shape[1]):
        wanted |= node[:, c, None] == every_node
    place = jnp.cumsum(wanted, axis=0, dtype=jnp.int32) - 1
    token_slot = jnp.where(wanted, every_node * block + place, -1)
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], token_slot.shape)
    target = jnp.where(wanted, token_slot, length)
    return jnp.full(length, -1, jnp.int32).at[target].set(token, mode="drop"), token_slot


def _destinations_by_node(chosen: Array, node: Array, slot_token: Array, num_nodes: int, slots_per_node: int) -> Array:
    """[N, B, C] for each crossing slot, the place of each copy among the expert slots of that node, or -1."""
    if not chosen.shape[0]:
        return jnp.zeros_like(chosen, shape=(num_nodes, 0, chosen.shape[1]))
    token = slot_token.reshape(num_nodes, -1)
    target = jnp.arange(num_nodes, dtype=jnp.int32)[:, None, None]
    there = take_rows(node, token, absent=-1) == target
    return jnp.where(there, take_rows(chosen, token) - target * slots_per_node, -1)


def _receive_maps(
    sizes: Array, num_nodes: int, block: int, num_rows: int, source_order: Array | None, *, compact: bool
) -> tuple[Array, Array]:
    """Where arrivals become rows: (row_slot [M], slot_row [P * R * D]).

    What rank i of this node passes on stands by (local expert, source node), and is one block for each of them: the
    pairs of source (n, i) for that expert, in order. Counts alone say where a block lies on both sides.

    Args:
      sizes: [P, W, L] of the blocks, by source and local expert.
      num_nodes, block, num_rows: N, D and M.
      source_order: [P * W] as for ``layout.receive_maps``.
      compact: True: what comes from the ranks of the node lies end to end; False: each has D slots.
    """
    num_tp, num_ranks, num_local = sizes.shape
    per_node = num_ranks // num_nodes

    def by_slot(blocks):
        """[P, W, L] -> [P, R, L * N]: the blocks that each rank of the node passes on, in order."""
        split = blocks.reshape(num_tp, num_nodes, per_node, num_local)
        return split.transpose(0, 2, 3, 1).reshape(num_tp, per_node, num_local * num_nodes)

    lists = by_slot(sizes)
    if compact:
        from_rank = jnp.sum(lists, axis=-1, dtype=jnp.int32)
        bases = layout.exclusive_cumsum(from_rank)
    else:
        bases = jnp.broadcast_to(jnp.arange(per_node, dtype=jnp.int32) * block, (num_tp, per_node))
    bases = bases + jnp.arange(num_tp, dtype=jnp.int32)[:, None] * (per_node * block)
    starts = (bases[..., None] + layout.exclusive_cumsum(lists)).reshape(num_tp, per_node, num_local, num_nodes)
    slot_start = starts.transpose(0, 3, 1, 2).reshape(sizes.shape)
    row_start = layout.row_starts(sizes, source_order)
    return (
        layout.map_blocks(row_start, slot_start, sizes, num_rows),
        layout.map_blocks(slot_start, row_start, sizes, num_tp * per_node * block),
    )
