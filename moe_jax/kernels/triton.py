"""Grouped products as Pallas Triton kernels, for NVIDIA GPUs from Ampere on.

A program makes one tile of the result: rows of one group against some columns. Tiles begin at a group's first row, so
a group of s rows has ceil(s / tile) of them, and all groups together at most ceil(M / tile) + G - 1. That is the grid.
Which tile a program has follows from ``group_sizes``, which it reads itself; where no tile is left it does nothing.
Whatever is outside a group or an array is masked when it is loaded, so it is never multiplied.

Sums are fp32, and so are the products of fp32 operands, unless a precision is asked for.

JAX 0.12 warns that Pallas Triton will be removed some day; XLA keeps Triton itself, by which it makes its own kernels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_jax import _compat
from moe_jax.hlo_cost import declare_flops

_STRIPE = 8  # row tiles that meet one block of columns one after the other, so that both stay in the L2 cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut.

    Attributes:
      rows, columns: of a tile of the result.
      steps: of the contracted axis at a time.
      warps: of 32 threads that work on a tile.
      stages: steps that are in shared memory at once: stages * steps * (rows + columns) * itemsize bytes, at most
        96 KiB. A consumer GPU of Ampere's lets a block have 99 KiB, an A100 163, an H100 and a B200 227.
    """

    rows: int
    columns: int
    steps: int
    warps: int
    stages: int = 3


def tiles_of_matmul(num_rows: int, num_groups: int, contracted: int, columns: int, itemsize: int) -> Tiles:
    """Tiles of ``grouped_matmul``: rows are in groups."""
    most, steps = _LARGEST[itemsize]
    rows, columns = _part_of_group(num_rows, num_groups, most), min(_power_of_2_from(columns), most)
    return Tiles(rows=rows, columns=columns, steps=min(_power_of_2_from(contracted), steps), warps=_warps(rows, columns))


def tiles_of_outer(num_rows: int, num_groups: int, rows: int, columns: int, itemsize: int) -> Tiles:
    """Tiles of ``grouped_outer``: the contracted axis is in groups."""
    most, steps = _LARGEST[itemsize]
    rows, columns = (min(_power_of_2_from(extent), most) for extent in (rows, columns))
    return Tiles(rows=rows, columns=columns, steps=_part_of_group(num_rows, num_groups, steps), warps=_warps(rows, columns))


_LARGEST = {2: (128, 64), 4: (64, 16)}  # by bytes of an element: tiles of 128 x 128 in steps of 64; of fp32 64 x 64 in 16


def _part_of_group(num_rows: int, num_groups: int, most: int) -> int:
    """At most a quarter of a group's rows, since its last tile is half empty on average: that costs an eighth, or less.
    But 16 at least, which is what tensor cores multiply."""
    return min(max(_power_of_2(num_rows // (4 * num_groups)), 16), most)


def _warps(rows: int, columns: int) -> int:
    """Twice as many for the largest tile, whose sums would fill half of a thread's registers otherwise."""
    return 8 if rows * columns > 64 * 128 else 4


def _power_of_2(number: int) -> int:
    """The largest power of two up to ``number``; 1 at least."""
    return 1 << max(number, 1).bit_length() - 1


def _power_of_2_from(number: int) -> int:
    """The smallest power of two from ``number`` on, and from 16 on, the least that tensor cores multiply."""
    return 1 << max(number - 1, 15).bit_length()


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    add_to: jax.Array | None = None,
    *,
    transpose_rhs: bool,
    precision: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), group_sizes [G] -> [M, N], plus ``add_to`` [M, N].

    Rows past the sum are not written. ``precision``: of fp32 operands, as for ``jax.lax.dot_general``; None: fp32.
    ``interpret``: runs the kernel as a JAX function, on any platform.
    """
    (num_rows, contracted), num_groups = lhs.shape, rhs.shape[0]
    columns = rhs.shape[1 if transpose_rhs else 2]
    out = _compat.struct_of((num_rows, columns), lhs.dtype, (lhs, rhs, group_sizes))
    if not num_rows * columns * contracted:
        return jnp.zeros(out.shape, out.dtype) if add_to is None else add_to
    tiles = tiles_of_matmul(num_rows, num_groups, contracted, columns, lhs.dtype.itemsize)
    row_tiles, column_tiles = max_tiles(num_rows, num_groups, tiles.rows), math.ceil(columns / tiles.columns)

    def grouped_matmul_kernel(lhs_ref, rhs_ref, sizes_ref, *add_to_and_out):
        place, block = _swizzled(pl.program_id(0), row_tiles, column_tiles)
        sizes = _load_sizes(sizes_ref, num_groups)
        group, first, end, is_there = _find_tile(sizes, tiles.rows, place)

        @pl.when(is_there)
        def _():
            rows = pl.ds(first, tiles.rows)
            row_mask = first + _arange(tiles.rows) < end
            wanted, column_mask = _block(block, tiles.columns, columns)

            def step(number, total):
                inner, inner_mask = _block(number, tiles.steps, contracted)
                left = _load(lhs_ref.at[rows, inner], row_mask, inner_mask)
                if transpose_rhs:
                    return total + _dot(left, _load(rhs_ref.at[group, wanted, inner], column_mask, inner_mask), (1, 1), precision)
                return total + _dot(left, _load(rhs_ref.at[group, inner, wanted], inner_mask, column_mask), (1, 0), precision)

            *start_ref, out_ref = add_to_and_out
            total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
            for ref in start_ref:
                total += _load(ref.at[rows, wanted], row_mask, column_mask)
            total = lax.fori_loop(0, math.ceil(contracted / tiles.steps), step, total)
            _store(out_ref.at[rows, wanted], total, row_mask, column_mask)

    operands = (lhs, rhs, group_sizes) if add_to is None else (lhs, rhs, group_sizes, add_to)
    grid, aliases = row_tiles * column_tiles, {} if add_to is None else {3: 0}
    call = _kernel(grouped_matmul_kernel, "grouped_matmul", out, grid, tiles, interpret, input_output_aliases=aliases)
    with declare_flops(2 * num_multiplied(num_rows, num_groups, tiles.rows) * contracted * columns):
        return call(*operands)


def grouped_outer(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: jnp.dtype,
    precision: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """lhs [M, H], rhs [M, N], group_sizes [G] -> [G, H, N] in ``dtype``; ``precision``, ``interpret`` as above.

    A program goes through all rows of its group, so no partial sums are kept, and the result is always the same.
    """
    (num_rows, height), width, num_groups = lhs.shape, rhs.shape[1], group_sizes.shape[0]
    out = _compat.struct_of((num_groups, height, width), dtype, (lhs, rhs, group_sizes))
    if not num_rows * height * width:
        return jnp.zeros(out.shape, out.dtype)
    tiles = tiles_of_outer(num_rows, num_groups, height, width, lhs.dtype.itemsize)
    row_tiles, column_tiles = math.ceil(height / tiles.rows), math.ceil(width / tiles.columns)

    def grouped_outer_kernel(lhs_ref, rhs_ref, sizes_ref, out_ref):
        group = lax.div(pl.program_id(0), row_tiles * column_tiles)
        row_block, column_block = _swizzled(lax.rem(pl.program_id(0), row_tiles * column_tiles), row_tiles, column_tiles)
        sizes = _load_sizes(sizes_ref, num_groups)
        first, size = _sum(jnp.where(_arange(sizes.size) < group, sizes, 0)), _pick(sizes, group)
        rows, row_mask = _block(row_block, tiles.rows, height)
        columns, column_mask = _block(column_block, tiles.columns, width)

        def step(number, total):
            at = first + number * tiles.steps
            inner, inner_mask = pl.ds(at, tiles.steps), at + _arange(tiles.steps) < first + size
            left = _load(lhs_ref.at[inner, rows], inner_mask, row_mask)
            return total + _dot(left, _load(rhs_ref.at[inner, columns], inner_mask, column_mask), (0, 0), precision)

        total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        total = lax.fori_loop(0, lax.div(size + tiles.steps - 1, tiles.steps), step, total)
        _store(out_ref.at[group, rows, columns], total, row_mask, column_mask)

    grid = num_groups * row_tiles * column_tiles
    call = _kernel(grouped_outer_kernel, "grouped_outer", out, grid, tiles, interpret)
    with declare_flops(2 * num_multiplied(num_rows, num_groups, tiles.steps) * height * width):
        return call(lhs, rhs, group_sizes)


def max_tiles(num_rows: int, num_groups: int, tile: int) -> int:
    """How many tiles of rows there can be, whatever the group sizes."""
    return min(math.ceil(num_rows / tile) + num_groups - 1, num_rows)


def num_multiplied(num_rows: int, num_groups: int, tile: int) -> int:
    """How many rows are multiplied if all are in a group: each group's last tile is half empty on average."""
    return min(num_rows + num_groups * (tile - 1) // 2, max_tiles(num_rows, num_groups, tile) * tile)


def _kernel(kernel: Callable, name: str, out: jax.ShapeDtypeStruct, grid: int, tiles: Tiles, interpret: bool, **more):
    """Operands whole in memory -> ``out``; each program of ``kernel`` reads and writes what it wants of them."""
    params = plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
    return pl.pallas_call(
        kernel, out_shape=out, grid=(grid,), compiler_params=params, name=name, interpret=interpret, **more
    )


def _swizzled(number: jax.Array, row_tiles: int, column_tiles: int) -> tuple[jax.Array, jax.Array]:
    """The (row tile, column tile) of a program: down a stripe of rows, then the next columns, then the next stripe."""
    stripe = _STRIPE * column_tiles
    first = lax.div(number, stripe) * _STRIPE
    height = jnp.minimum(row_tiles - first, _STRIPE)
    inside = lax.rem(number, stripe)
    return first + lax.rem(inside, height), lax.div(inside, height)


def _load_sizes(sizes_ref, num_groups: int) -> jax.Array:
    """The sizes of all groups, and zeros up to a power of two, the only lengths that Triton has."""
    length = 1 << (num_groups - 1).bit_length()
    return plgpu.load(sizes_ref.at[pl.ds(0, length)], mask=_arange(length) < num_groups, other=0)


def _find_tile(sizes: jax.Array, tile: int, place: jax.Array) -> tuple[jax.Array, ...]:
    """The tile of rows at ``place``, in the order of groups: (group, first row, end of the group, whether it exists).

    1. Count each group's tiles, and the tiles and rows up to its end.
    2. The group at ``place`` comes after all groups whose tiles end at or before it.
    3. Its first row is as many tiles behind the group's first one as ``place`` is behind the group's first tile.
    """
    tiles = lax.div(sizes + tile - 1, tile)
    tile_ends, row_ends = (jnp.cumsum(counts, dtype=jnp.int32) for counts in (tiles, sizes))
    group = _sum((tile_ends <= place).astype(jnp.int32))
    first = _pick(row_ends - sizes + (place - tile_ends + tiles) * tile, group)
    return group, first, _pick(row_ends, group), place < _sum(tiles)


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[index], which Triton lacks."""
    return _sum(jnp.where(_arange(values.size) == index, values, 0))


def _sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, dtype=jnp.int32)


def _arange(length: int) -> jax.Array:
    return jnp.arange(length, dtype=jnp.int32)


def _block(number: jax.Array, size: int, extent: int) -> tuple[Any, jax.Array | None]:
    """Where block ``number`` lies along an axis, and what of it is inside; None: all of every block."""
    inside = None if extent % size == 0 else number * size + _arange(size) < extent
    return pl.ds(number * size, size), inside


def _mask(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    if rows is None or columns is None:
        return columns[None] if rows is None and columns is not None else None if rows is None else rows[:, None]
    return rows[:, None] & columns[None]


def _load(at, rows: jax.Array | None, columns: jax.Array | None) -> jax.Array:
    """A block, with zeros where a mask is false: nothing is read there."""
    mask = _mask(rows, columns)
    return plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0)


def _store(at, block: jax.Array, rows: jax.Array | None, columns: jax.Array | None) -> None:
    plgpu.store(at, block.astype(at.dtype), mask=_mask(rows, columns))


def _dot(left: jax.Array, right: jax.Array, contracted: tuple[int, int], precision: str | None) -> jax.Array:
    """Contracts one axis of each, in fp32."""
    if left.dtype != jnp.float32:
        precision = lax.Precision.DEFAULT  # two narrow factors are exact in fp32
    return lax.dot_general(
        left,
        right,
        (tuple((axis,) for axis in contracted), ((), ())),
        precision=lax.Precision.HIGHEST if precision is None else precision,
        preferred_element_type=jnp.float32,
    )
