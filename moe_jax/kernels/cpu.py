"""Grouped products for the CPU: loops over row tiles, so that work follows the rows that are there.

``lax.ragged_dot`` multiplies every row with every group's weights on a CPU. Here the outer loop runs over the groups
that have rows and takes a group's weights once; the inner loops run over that group's row tiles, first large ones, then
small ones for what is left.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from moe_jax._compat import as_varying, union_of_varying_axes
from moe_jax.kernels.table import Backend

_MAX_TILE = 512  # with tiles no larger, a group that is a little fuller than others costs little more


class _Tiles(NamedTuple):
    """How many rows a large tile has, and how many a small one."""

    large: int
    small: int


def _tiles(num_rows: int, num_groups: int, dtype) -> _Tiles:
    """Tile sizes such that an even load consists of whole large tiles.

    A plan makes buffers that an even load fills to four fifths, so that many rows are expected. XLA packs 16-bit
    weights anew for every tile, which would be a waste for the smallest tiles; so with such weights small tiles have
    twice the rows.
    """
    least = min(num_rows, 32 if jnp.dtype(dtype).itemsize == 2 else 16)
    even = max(1, 4 * num_rows // (5 * num_groups))
    tiles_in_group = -(-even // _MAX_TILE)
    large = -(-even // (16 * tiles_in_group)) * 16
    return _Tiles(min(max(large, least), num_rows), least)


class _Steps(NamedTuple):
    """Which tiles each group has. The products of one buffer share this table, so XLA computes it once.

    Attributes:
      order: [G] i32, the groups that have rows, in ascending order; entries behind these are not read.
      start, stop: [G] i32, the first row of each group, and the row behind its last one.
      num_large, num_small: [G] i32, how many tiles of either size each group has.
    """

    order: jax.Array
    start: jax.Array
    stop: jax.Array
    num_large: jax.Array
    num_small: jax.Array


def _steps(group_sizes: jax.Array, num_rows: int, tiles: _Tiles) -> _Steps:
    """Large tiles are at least half full and end inside the buffer; small tiles take the rows behind them."""
    # 1. The groups that have rows: the i-th of them is the first group up to which i + 1 groups have some.
    groups = jnp.arange(len(group_sizes), dtype=jnp.int32)
    present = jnp.cumsum(group_sizes > 0, dtype=jnp.int32)
    order = jnp.sum(present <= groups[:, None], axis=1, dtype=jnp.int32)
    stop = jnp.cumsum(group_sizes, dtype=jnp.int32)
    start = stop - group_sizes
    # 2. Large tiles, also for a last part that fills at least half of one; then small tiles for the rest.
    large, small = np.int32(tiles.large), np.int32(tiles.small)  # lax.div wants one dtype, also where integers are wide
    num_large = jnp.minimum(lax.div(group_sizes + large // 2, large), lax.div(num_rows - start, large))
    rest = jnp.maximum(group_sizes - num_large * large, 0)
    return _Steps(order, start, stop, num_large, lax.div(rest + small - 1, small))


def _entry(table: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(table, index, keepdims=False, allow_negative_indices=False)


def _rows(array: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, first, size, allow_negative_indices=False)


def _for_each_group(group_sizes: jax.Array, steps: _Steps, body: Callable, init: Any) -> Any:
    """Calls ``carry = body(group, carry)`` for each group that has rows, in ascending order; returns the last one."""
    num_groups = jnp.sum(group_sizes > 0, dtype=jnp.int32)
    return lax.fori_loop(0, num_groups, lambda i, carry: body(_entry(steps.order, i), carry), init)


def _for_each_tile(group, steps: _Steps, num_rows: int, tiles: _Tiles, large_tile, small_tile, init: Any) -> Any:
    """Calls ``carry = large_tile(first, mine, carry)`` or ``small_tile`` for each tile of a group; returns the last.

    ``first`` is the first row of the tile, and ``mine`` [tile, 1] marks those rows of it that this call is for. A large
    tile begins with rows of its group; rows of later groups may follow them. A small tile that would reach past the end
    of the buffer is shifted back, so that rows which an earlier tile has done precede its own.
    """
    _, start, stop, num_large, num_small = (_entry(table, group) for table in steps)

    def large_step(i, carry):
        first = start + i * tiles.large
        return large_tile(first, (jnp.arange(tiles.large) < stop - first)[:, None], carry)

    def small_step(i, carry):
        wanted = start + num_large * tiles.large + i * tiles.small
        first = jnp.minimum(wanted, num_rows - tiles.small)
        row = first + jnp.arange(tiles.small)
        return small_tile(first, ((row >= wanted) & (row < stop))[:, None], carry)

    return lax.fori_loop(0, num_small, small_step, lax.fori_loop(0, num_large, large_step, init))


def _zeros(shape, dtype, *like) -> jax.Array:
    return as_varying(jnp.zeros(shape, dtype), union_of_varying_axes(like))


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), group_sizes [G] -> [M, N]."""
    num_rows, out_dim = lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    out = _zeros((num_rows, out_dim), lhs.dtype, lhs, rhs, group_sizes)
    if not out.size:
        return out
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))
    tiles = _tiles(num_rows, rhs.shape[0], lhs.dtype)
    steps = _steps(group_sizes, num_rows, tiles)

    def group_body(group, out):
        weight = _entry(rhs, group)

        def product(first, size):
            rows = _rows(lhs, first, size)
            return lax.dot_general(rows, weight, contract, preferred_element_type=jnp.float32).astype(out.dtype)

        def large_tile(first, mine, out):
            del mine  # rows of later groups are written here too, and again by their own tiles
            return put(out, product(first, tiles.large), first)

        def small_tile(first, mine, out):
            return put(out, jnp.where(mine, product(first, tiles.small), _rows(out, first, tiles.small)), first)

        return _for_each_tile(group, steps, num_rows, tiles, large_tile, small_tile, out)

    put = functools.partial(lax.dynamic_update_slice_in_dim, axis=0, allow_negative_indices=False)
    return _for_each_group(group_sizes, steps, group_body, out)


def grouped_outer(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, dtype: DTypeLike) -> jax.Array:
    """lhs [M, H], rhs [M, N], group_sizes [G] -> [G, H, N] in ``dtype``."""
    num_rows, num_groups = lhs.shape[0], group_sizes.shape[0]
    out = _zeros((num_groups, lhs.shape[1], rhs.shape[1]), dtype, lhs, rhs, group_sizes)
    if not out.size or not num_rows:
        return out
    tiles = _tiles(num_rows, num_groups, lhs.dtype)
    steps = _steps(group_sizes, num_rows, tiles)

    def tile(first, mine, total):
        rows, cts = (jnp.where(mine, _rows(a, first, mine.shape[0]), jnp.zeros((), a.dtype)) for a in (lhs, rhs))
        return total + lax.dot_general(rows, cts, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    def group_body(group, out):
        total = _zeros(out.shape[1:], jnp.float32, lhs, rhs, group_sizes)
        total = _for_each_tile(group, steps, num_rows, tiles, tile, tile, total)
        return lax.dynamic_update_index_in_dim(out, total.astype(dtype), group, 0, allow_negative_indices=False)

    return _for_each_group(group_sizes, steps, group_body, out)


BACKEND = Backend(
    name="cpu",
    platforms=("cpu",),
    kernels={"grouped_matmul": grouped_matmul, "grouped_outer": grouped_outer},
)
