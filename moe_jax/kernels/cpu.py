"""Grouped products for the CPU: loops over row tiles, so that work follows the rows that are there.

``lax.ragged_dot`` multiplies every row with every group's weights on a CPU. Here the outer loop runs over the groups
that have rows and takes a group's weights once; the inner loops run over that group's row tiles: in a product of rows
large ones while they are full, then small ones. A tile that reaches past its group, or that was shifted back at the end
of the buffer, writes only its own group's rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax._compat import as_varying, union_of_varying_axes
from moe_jax.kernels.table import Backend

_MIN_TILE = 16


class _Tiling(NamedTuple):
    """Measured. For 16-bit numbers XLA packs the weights anew for every tile, and products take half the time."""

    max_rows: int
    tiles_in_group: int  # at least so many large ones in an average group
    tiles_in_large: int  # so many small ones


_TILING, _TILING16 = _Tiling(256, 2, 8), _Tiling(1024, 1, 4)


def _tile_rows(num_rows: int, num_groups: int, dtype) -> tuple[int, int]:
    """Rows of a large tile, a power of two that goes with the average group; and of a small one."""
    tiling, tile = _TILING16 if jnp.dtype(dtype).itemsize == 2 else _TILING, _MIN_TILE
    while tile < tiling.max_rows and 2 * tile * tiling.tiles_in_group * num_groups <= num_rows:
        tile *= 2
    return min(tile, num_rows), min(max(tile // tiling.tiles_in_large, _MIN_TILE), num_rows)


def _for_each_group(group_sizes: jax.Array, body, init):
    """Folds ``body(group, start, stop, carry)`` over the groups that have rows, in ascending order."""
    stops = jnp.cumsum(group_sizes)
    present = group_sizes > 0
    order = jnp.argsort(~present, stable=True)

    def step(i, carry):
        group = order[i]
        return body(group, stops[group] - group_sizes[group], stops[group], carry)

    return lax.fori_loop(0, jnp.sum(present), step, init)


def _for_each_tile(start, stop, tile: int, num_rows: int, body, init):
    """Folds ``body(first, mine [tile, 1], carry)`` over the tiles of rows [start, stop); ``mine`` marks its rows."""

    def step(i, carry):
        wanted = start + i * tile
        first = jnp.minimum(wanted, num_rows - tile)  # keep the slice inside the buffer
        row = first + jnp.arange(tile)
        return body(first, ((row >= wanted) & (row < stop))[:, None], carry)

    return lax.fori_loop(0, (stop - start + tile - 1) // tile, step, init)


def _zeros(shape, dtype, *like) -> jax.Array:
    return as_varying(jnp.zeros(shape, dtype), union_of_varying_axes(like))


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), group_sizes [G] -> [M, N]; zeros past the sum."""
    num_rows, out_dim = lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
    out = _zeros((num_rows, out_dim), lhs.dtype, lhs, rhs, group_sizes)
    large, small = _tile_rows(num_rows, rhs.shape[0], lhs.dtype)
    if not out.size:
        return out
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))

    def group_body(group, start, stop, out):
        weight = lax.dynamic_index_in_dim(rhs, group, keepdims=False)

        def product(first, size):
            rows = lax.dynamic_slice_in_dim(lhs, first, size)
            return lax.dot_general(rows, weight, contract, preferred_element_type=jnp.float32).astype(out.dtype)

        def large_tile(i, out):
            first = start + i * large
            return lax.dynamic_update_slice_in_dim(out, product(first, large), first, 0)

        def small_tile(first, mine, out):
            kept = lax.dynamic_slice_in_dim(out, first, small)
            return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, product(first, small), kept), first, 0)

        num_large = (stop - start) // large
        out = lax.fori_loop(0, num_large, large_tile, out)
        return _for_each_tile(start + num_large * large, stop, small, num_rows, small_tile, out)

    return _for_each_group(group_sizes, group_body, out)


def grouped_outer(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, dtype) -> jax.Array:
    """lhs [M, H], rhs [M, N], group_sizes [G] -> [G, H, N] in ``dtype``."""
    num_rows, num_groups = lhs.shape[0], group_sizes.shape[0]
    out = _zeros((num_groups, lhs.shape[1], rhs.shape[1]), dtype, lhs, rhs, group_sizes)
    # Every tile costs a pass over the group's sum: small ones save nothing.
    tile, _ = _tile_rows(num_rows, num_groups, lhs.dtype)
    if not out.size or not num_rows:
        return out

    def group_body(group, start, stop, out):
        def tile_body(first, mine, total):
            rows, cts = (
                jnp.where(mine, lax.dynamic_slice_in_dim(a, first, tile), jnp.zeros((), a.dtype)) for a in (lhs, rhs)
            )
            return total + lax.dot_general(rows, cts, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        total = _zeros(out.shape[1:], jnp.float32, lhs, rhs, group_sizes)
        total = _for_each_tile(start, stop, tile, num_rows, tile_body, total)
        return lax.dynamic_update_index_in_dim(out, total.astype(dtype), group, 0)

    return _for_each_group(group_sizes, group_body, out)


BACKEND = Backend(
    name="cpu",
    platforms=("cpu",),
    kernels={"grouped_matmul": grouped_matmul, "grouped_outer": grouped_outer},
)
