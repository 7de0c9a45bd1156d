"""Grouped products as Pallas Triton kernels, for NVIDIA's GPUs from Ampere on.

A program of the kernel makes one tile of the result. The tiles of a group begin at its first row, so a group of s rows
has ceil(s / tile) of them, and there are at most ceil(M / tile) + G - 1 in all: that many programs start for each block
of columns. Each program finds its tile in ``group_sizes`` itself; where there is no tile left for it, it does nothing.
What lies outside a group or an array is masked when it is loaded, so that it is never multiplied, and no operand has to
be padded or copied.

Sums are fp32, and so are the products of fp32 operands, unless another precision is asked for.

JAX 0.12 warns that Pallas will do without Triton some day.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_jax.hlo.cost import declare_flops
from moe_jax.kernels.kernel_call import result_type

_LEAST = 16  # rows, columns and steps of the smallest tile that tensor cores multiply
_STRIPE = 8  # so many row tiles meet a block of columns before the next block, and all of them stay in the L2 cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut. All sizes are powers of two, as Triton wants them.

    Attributes:
      rows, columns: the extents of a tile of the result.
      steps: how much of the contracted axis is taken at a time.
      stages: how many such steps are in shared memory at once. The largest tiles take 3 * 64 * (128 + 128) * 2 bytes =
        96 KiB of it. A block may have 163 KiB on an A100, 227 on an H100 or a B200, and 99 on a consumer's Ampere or
        Ada.
    """

    rows: int
    columns: int
    steps: int
    stages: int = 3

    @property
    def warps(self) -> int:
        """How many warps of 32 threads make a tile. Of four, a thread would keep 128 sums of the largest: too many."""
        return 8 if self.rows * self.columns > 64 * 128 else 4


def tiles_of_matmul(num_rows: int, num_groups: int, contracted: int, columns: int, itemsize: int) -> Tiles:
    """The tiles of ``grouped_matmul``, where the rows of the result are in groups."""
    tile, steps = _largest(itemsize)
    return Tiles(
        rows=_part_of_group(num_rows, num_groups, tile),
        columns=_at_most(tile, columns),
        steps=_at_most(steps, contracted),
    )


def tiles_of_outer(num_rows: int, num_groups: int, height: int, width: int, itemsize: int) -> Tiles:
    """The tiles of ``grouped_outer``, where the contracted axis is in groups."""
    tile, steps = _largest(itemsize)
    return Tiles(
        rows=_at_most(tile, height), columns=_at_most(tile, width), steps=_part_of_group(num_rows, num_groups, steps)
    )


def _largest(itemsize: int) -> tuple[int, int]:
    """The largest side of a tile, and the largest step. They are smaller for fp32, whose operands fill registers."""
    return (128, 64) if itemsize == 2 else (64, 16)


def _part_of_group(num_rows: int, num_groups: int, most: int) -> int:
    """At most a quarter of a group's rows: its last tile is half empty on average, which then costs an eighth."""
    quarter = num_rows // (4 * num_groups)
    return min(max(1 << quarter.bit_length() >> 1, _LEAST), most)


def _at_most(most: int, extent: int) -> int:
    """The smallest power of two that covers the extent, but at least ``_LEAST`` and at most ``most``."""
    return min(max(1 << (extent - 1).bit_length(), _LEAST), most)


def max_tiles(num_rows: int, num_groups: int, tile: int) -> int:
    """How many tiles of rows there can be, whatever the group sizes."""
    return min(math.ceil(num_rows / tile) + num_groups - 1, num_rows)


def num_multiplied(num_rows: int, num_groups: int, tile: int) -> int:
    """How many rows are multiplied if all rows are in groups, and the last tile of each group is half empty."""
    return min(num_rows + num_groups * tile // 2, max_tiles(num_rows, num_groups, tile) * tile)


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
    out = result_type((num_rows, columns), lhs.dtype, lhs)
    if not num_rows * columns * contracted:
        return jnp.zeros(out.shape, out.dtype) if add_to is None else add_to
    tiles = tiles_of_matmul(num_rows, num_groups, contracted, columns, lhs.dtype.itemsize)
    row_tiles, column_tiles = max_tiles(num_rows, num_groups, tiles.rows), math.ceil(columns / tiles.columns)

    def grouped_matmul_kernel(lhs_ref, rhs_ref, sizes_ref, *refs):
        *start_refs, out_ref = refs
        place, column_block = _swizzled(pl.program_id(0), row_tiles, column_tiles)
        group, first, end, is_there = _find_tile(_load_sizes(sizes_ref, num_groups), tiles.rows, place)

        @pl.when(is_there)
        def _():
            rows, row_mask = pl.ds(first, tiles.rows), first + _arange(tiles.rows) < end
            wanted, column_mask = _block(column_block, tiles.columns, columns)

            def step(number, total):
                inner, inner_mask = _block(number, tiles.steps, contracted)
                left = _load(lhs_ref.at[rows, inner], row_mask, inner_mask)
                if transpose_rhs:
                    right = _load(rhs_ref.at[group, wanted, inner], column_mask, inner_mask)
                else:
                    right = _load(rhs_ref.at[group, inner, wanted], inner_mask, column_mask)
                return total + _dot(left, right, (1, 1 if transpose_rhs else 0), precision)

            total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
            for ref in start_refs:
                total += _load(ref.at[rows, wanted], row_mask, column_mask)
            total = lax.fori_loop(_i32(0), _i32(math.ceil(contracted / tiles.steps)), step, total)
            _store(out_ref.at[rows, wanted], total, row_mask, column_mask)

    operands = (lhs, rhs, group_sizes, *(() if add_to is None else (add_to,)))
    # A program reads a tile of add_to and writes the same tile of the result, so both may lie in one place.
    call = _kernel(
        grouped_matmul_kernel,
        "grouped_matmul",
        out,
        row_tiles * column_tiles,
        tiles,
        interpret,
        input_output_aliases={} if add_to is None else {3: 0},
    )
    with declare_flops(2 * num_multiplied(num_rows, num_groups, tiles.rows) * contracted * columns):
        return call(*operands)


def grouped_outer(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: Any,
    precision: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """lhs [M, H], rhs [M, N], group_sizes [G] -> [G, H, N] in ``dtype``; ``precision``, ``interpret`` as above.

    A program goes through all rows of its group, so there are no partial sums, and the result is always the same.
    """
    (num_rows, height), width, num_groups = lhs.shape, rhs.shape[1], group_sizes.shape[0]
    out = result_type((num_groups, height, width), dtype, lhs)
    if not num_rows * height * width:
        return jnp.zeros(out.shape, out.dtype)
    tiles = tiles_of_outer(num_rows, num_groups, height, width, lhs.dtype.itemsize)
    row_tiles, column_tiles = math.ceil(height / tiles.rows), math.ceil(width / tiles.columns)
    of_group = row_tiles * column_tiles

    def grouped_outer_kernel(lhs_ref, rhs_ref, sizes_ref, out_ref):
        group = lax.div(pl.program_id(0), _i32(of_group))
        row_block, column_block = _swizzled(lax.rem(pl.program_id(0), _i32(of_group)), row_tiles, column_tiles)
        sizes = _load_sizes(sizes_ref, num_groups)
        first, size = _sum(jnp.where(_arange(sizes.size) < group, sizes, 0)), _pick(sizes, group)
        rows, row_mask = _block(row_block, tiles.rows, height)
        columns, column_mask = _block(column_block, tiles.columns, width)

        def step(number, total):
            at = first + number * tiles.steps
            inner, inner_mask = pl.ds(at, tiles.steps), at + _arange(tiles.steps) < first + size
            left = _load(lhs_ref.at[inner, rows], inner_mask, row_mask)
            right = _load(rhs_ref.at[inner, columns], inner_mask, column_mask)
            return total + _dot(left, right, (0, 0), precision)

        total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        total = lax.fori_loop(_i32(0), _ceil_div(size, tiles.steps), step, total)
        _store(out_ref.at[group, rows, columns], total, row_mask, column_mask)

    call = _kernel(grouped_outer_kernel, "grouped_outer", out, num_groups * of_group, tiles, interpret)
    with declare_flops(2 * num_multiplied(num_rows, num_groups, tiles.steps) * height * width):
        return call(lhs, rhs, group_sizes)


def _kernel(kernel: Callable, name: str, out: Any, grid: int, tiles: Tiles, interpret: bool, **more: Any) -> Callable:
    """The call of a kernel whose operands lie in memory as a whole: each program reads and writes parts of them."""
    params = plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages)
    return pl.pallas_call(
        kernel, out_shape=out, grid=(grid,), compiler_params=params, name=name, interpret=interpret, **more
    )


def _swizzled(number: jax.Array, row_tiles: int, column_tiles: int) -> tuple[jax.Array, jax.Array]:
    """The (row tile, column tile) of a program.

    Programs go down a stripe of ``_STRIPE`` row tiles, then down its next column of tiles, and after the last column to
    the next stripe.
    """
    stripe = _i32(_STRIPE * column_tiles)
    first = lax.div(number, stripe) * _STRIPE
    height = jnp.minimum(row_tiles - first, _STRIPE)
    inside = lax.rem(number, stripe)
    return first + lax.rem(inside, height), lax.div(inside, height)


def _load_sizes(sizes_ref, num_groups: int) -> jax.Array:
    """The sizes of all groups, and zeros up to a power of two."""
    places = _arange(1 << (num_groups - 1).bit_length())
    return plgpu.load(sizes_ref.at[places], mask=places < num_groups, other=0)


def _find_tile(sizes: jax.Array, tile: int, place: jax.Array) -> tuple[jax.Array, ...]:
    """The tile at ``place``, in the order of groups: (group, its first row, the end of the group, whether it exists).

    1. Count each group's tiles, and the tiles and rows up to its end.
    2. The group at ``place`` comes after all groups whose tiles end at or before it.
    3. The tile is as far behind its group's first row as ``place`` is behind its group's first tile.
    """
    tiles = _ceil_div(sizes, tile)
    tile_ends, row_ends = (jnp.cumsum(counts, dtype=jnp.int32) for counts in (tiles, sizes))
    group = _sum((tile_ends <= place).astype(jnp.int32))
    first = _pick(row_ends - sizes + (place - (tile_ends - tiles)) * tile, group)
    return group, first, _pick(row_ends, group), place < _sum(tiles)


def _ceil_div(numbers: jax.Array, by: int) -> jax.Array:
    return lax.div(numbers + (by - 1), jnp.full_like(numbers, by))


def _i32(number: int) -> np.int32:
    """A constant of a kernel. JAX would give a plain number 64 bits where it is told to have integers so wide."""
    return np.int32(number)


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[index], which Triton lacks."""
    return _sum(jnp.where(_arange(values.size) == index, values, 0))


def _sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, dtype=jnp.int32)


def _arange(length: int) -> jax.Array:
    return jnp.arange(length, dtype=jnp.int32)


def _block(number: jax.Array, size: int, extent: int) -> tuple[Any, jax.Array | None]:
    """Where block ``number`` lies along an axis, and which of its places are inside; None if all of every block are."""
    inside = None if extent % size == 0 else number * size + _arange(size) < extent
    return pl.ds(number * size, size), inside


def _load(at, rows: jax.Array | None, columns: jax.Array | None) -> jax.Array:
    """A block of an array. Where a mask is false nothing is read, and the block holds zeros."""
    mask = _mask(rows, columns)
    return plgpu.load(at) if mask is None else plgpu.load(at, mask=mask, other=0)


def _store(at, block: jax.Array, rows: jax.Array | None, columns: jax.Array | None) -> None:
    plgpu.store(at, block.astype(at.dtype), mask=_mask(rows, columns))


def _mask(rows: jax.Array | None, columns: jax.Array | None) -> jax.Array | None:
    if rows is None:
        return None if columns is None else columns[None, :]
    return rows[:, None] if columns is None else rows[:, None] & columns[None, :]


def _dot(left: jax.Array, right: jax.Array, contracted: tuple[int, int], precision: str | None) -> jax.Array:
    """Contracts axis ``contracted[0]`` of ``left`` with axis ``contracted[1]`` of ``right``; the result is fp32."""
    exactness = lax.Precision.HIGHEST if precision is None else precision
    if left.dtype != jnp.float32:
        exactness = lax.Precision.DEFAULT  # fp32 holds the product of two 16-bit factors
    left_axis, right_axis = contracted
    return lax.dot_general(
        left,
        right,
        (((left_axis,), (right_axis,)), ((), ())),
        precision=exactness,
        preferred_element_type=jnp.float32,
    )
