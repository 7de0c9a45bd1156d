"""The collectives of a mesh of nodes: between ranks of equal index on all nodes, and between the ranks of one node.

Rank (node, index) talks to (other node, index) in the first and to (node, other index) in the second. Without a node
axis there is one node, and nothing crosses.
"""

import math

import jax
from jax import lax

from moe_jax import _compat
from moe_jax.collectives.bits import swap_blocks, unwritten
from moe_jax.collectives.ragged import chunked_all_to_all
from moe_jax.kernels.table import find_transport
from moe_jax.layout import exclusive_cumsum

Array = jax.Array


def num_nodes(plan) -> int:
    """N, the nodes that the expert-parallel group spans; its ranks are numbered node by node."""
    return math.prod(_compat.bound_axis_size(axis) for axis in _across(plan))


def exchange_nodes(rows: Array, plan) -> Array:
    """[N * B, F]: block m of B slots goes to node m; block n of the result came from node n."""
    return _exchange(rows, num_nodes(plan), _across(plan), plan) if _across(plan) else rows


def exchange_inside(rows: Array, plan) -> Array:
    """[R * D, F]: block j of D slots goes to rank j of this node; block i of the result came from its rank i."""
    return _exchange(rows, plan.ep_size // num_nodes(plan), _inside(plan), plan)


def exchange_inside_compact(rows: Array, sizes: Array, num_out: int, plan, *, chunk: int) -> Array:
    """Rows laid end to end by destination -> rows end to end by source, between the ranks of a node.

    Args:
      rows: [S, F], those for rank 0 of the node first.
      sizes: [R, R] rows from each rank of the node to each.
      num_out: extent of the result, static; rows past those that came may hold anything.
      chunk: rows per pair of ranks and all_to_all; their number follows the largest of ``sizes`` of this node.
    """
    me = lax.axis_index(_inside(plan))
    arrival_starts = exclusive_cumsum(sizes[:, me])
    output = unwritten(num_out, rows, plan)
    starts = exclusive_cumsum(sizes[me])
    custom = find_transport("padded", plan.kernels)
    return chunked_all_to_all(
        rows, output, sizes, starts, arrival_starts, _inside(plan), chunk=chunk, all_to_all=custom
    )


def swap_with_nodes(entries: Array, plan) -> Array:
    """[N, ...] integers for this rank's peer on each node -> [N, ...] from each."""
    return lax.all_to_all(entries, _across(plan), 0, 0, tiled=True) if _across(plan) else entries


def all_inside_sizes(sizes: Array, plan) -> Array:
    """[R] rows for each rank of this node -> [R, R] rows from each to each."""
    return lax.all_gather(sizes, _inside(plan))


def _across(plan) -> tuple[str, ...]:
    return plan.ep_axis[:-1]


def _inside(plan) -> tuple[str, ...]:
    return plan.ep_axis[-1:]


def _exchange(rows, num_blocks, axes, plan):
    blocks = rows.reshape(num_blocks, rows.shape[0] // num_blocks, rows.shape[1])
    custom = find_transport("padded", plan.kernels)
    moved = custom(blocks, axes) if custom else swap_blocks(blocks, axes)
    return moved.reshape(rows.shape)
