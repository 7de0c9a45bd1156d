"""Grouped products as Pallas Triton kernels, for NVIDIA's GPUs from Ampere on.

A program of the kernel makes one tile of the result. The tiles of a group begin at its first row, so a group of s rows
has ceil(s / tile) of them, and there are at most ceil(M / tile) + G - 1 in all: that many programs start for each block
of columns. Each program finds its tile in ``group_sizes`` itself; where there is no tile left for it, it does nothing.
What lies outside a group or an array is masked when it is loaded, so that it is never multiplied, and no operand has to
be padded or copied. Rows may also lie in slots, in any order: a program then reads them, or writes them, by an index.

Sums are fp32, and so are the products of fp32 operands, unless another precision is asked for.

JAX 0.12 warns that Pallas will drop Triton some day.
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

_LEAST = 16  # the least rows, columns and steps of a tile that tensor cores multiply
_STRIPE = 8  # so many row tiles are multiplied with a block of columns before the next block, and stay in the L2 cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut. All sizes are powers of two, as Triton wants them.

    Attributes:
      rows, columns: the extents of a tile of the result.
      steps: how much of the contracted axis is taken at a time.
      products: how many products of the same rows are made at once, each with a tile of ``columns`` columns.
      stages: how many such steps are in shared memory at once. The largest tiles take 3 * 64 * (128 + 128) * 2 bytes =
        96 KiB of it. A block may have 163 KiB on an A100, 227 on an H100 or a B200, and 99 on a consumer's Ampere or
        Ada.
    """

    rows: int
    columns: int
    steps: int
    products: int = 1
    stages: int = 3

    @property
    def warps(self) -> int:
        """How many warps of 32 threads make a tile. With only four, a thread would keep 128 sums of a large one."""
        return 8 if self.rows * self.columns * self.products > 64 * 128 else 4


def tiles_of_matmul(
    num_rows: int, num_groups: int, contracted: int, columns: int, itemsize: int, products: int = 1
) -> Tiles:
    """The tiles of ``grouped_matmul`` and of ``gated_matmul``, where the rows of the result are in groups."""
    tile, steps = _largest(itemsize)
    return Tiles(
        rows=_part_of_group(num_rows, num_groups, tile),
        columns=_at_most(tile // products, columns),
        steps=_at_most(steps, contracted),
        products=products,
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
    """At most a quarter of a group's rows. Its last tile is half empty on average, which then costs an eighth."""
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
    row_slot: jax.Array | None = None,
    *,
    transpose_rhs: bool,
    into: int | None = None,
    precision: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), group_sizes [G] -> [M, N], plus ``add_to`` [M, N].

    Rows past the sum are not written. With ``row_slot`` [M] the rows on one side lie in slots: those of ``lhs`` [A, H];
    or, with ``into`` = A, those of the result [A, N], and of ``add_to``. Slots that belong to no row are neither read
    nor written. ``precision`` is that of products of fp32 operands, as for ``jax.lax.dot_general``; None stands for
    full fp32. ``interpret`` runs the kernel as a JAX function, on any platform.
    """
    columns = rhs.shape[1 if transpose_rhs else 2]
    out_rows = (lhs if row_slot is None else row_slot).shape[0] if into is None else into
    return _products_of_rows(
        "grouped_matmul",
        lhs,
        (rhs,),
        (),
        group_sizes,
        add_to,
        row_slot,
        out=(result_type((out_rows, columns), lhs.dtype, lhs),),
        finish=lambda total: (total,),
        transpose_rhs=transpose_rhs,
        reads_slots=row_slot is not None and into is None,
        precision=precision,
        interpret=interpret,
    )[0]


def gated_matmul(
    lhs: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    group_sizes: jax.Array,
    gate_bias: jax.Array | None = None,
    up_bias: jax.Array | None = None,
    row_slot: jax.Array | None = None,
    *,
    gating: Callable[[jax.Array, jax.Array], jax.Array],
    keep: bool,
    precision: str | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """``gating(lhs @ gate + gate_bias, lhs @ up + up_bias)``, group by group, in one kernel.

    Args:
      lhs: [M, H]; with ``row_slot`` [M] its rows lie in slots [A, H].
      gate, up: [G, H, N].
      group_sizes: [G]; rows past the sum are not written.
      gate_bias, up_bias: [G, N] each, or None for both.
      gating: maps both products, rounded to the dtype of ``lhs``, to the result, entry by entry.
      keep: whether the two products are written as well; then they come first.
      precision, interpret: as for ``grouped_matmul``.

    Returns:
      A tuple of one array [M, N], or of three.
    """
    num_rows = (lhs if row_slot is None else row_slot).shape[0]

    def finish(*totals):
        products = tuple(total.astype(lhs.dtype) for total in totals)
        return (*products, gating(*products)) if keep else (gating(*products),)

    return _products_of_rows(
        "gated_matmul",
        lhs,
        (gate, up),
        () if gate_bias is None or up_bias is None else (gate_bias, up_bias),
        group_sizes,
        None,
        row_slot,
        out=(result_type((num_rows, up.shape[2]), lhs.dtype, lhs),) * (3 if keep else 1),
        finish=finish,
        transpose_rhs=False,
        reads_slots=row_slot is not None,
        precision=precision,
        interpret=interpret,
    )


def _products_of_rows(
    name: str,
    lhs: jax.Array,
    matrices: tuple[jax.Array, ...],
    biases: tuple[jax.Array, ...],
    group_sizes: jax.Array,
    add_to: jax.Array | None,
    row_slot: jax.Array | None,
    *,
    out: tuple[jax.ShapeDtypeStruct, ...],
    finish: Callable[..., tuple[jax.Array, ...]],
    transpose_rhs: bool,
    reads_slots: bool,
    precision: str | None,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """One kernel that multiplies the same rows with each of several matrices, and computes results from the products.

    ``out`` has the types of the results. ``finish`` makes a tile of each result from the fp32 tiles of the products,
    which have biases and ``add_to`` added. ``reads_slots`` says that the rows of ``lhs`` lie in slots, and not those of
    the results.
    """
    num_rows = (lhs if row_slot is None else row_slot).shape[0]
    contracted, num_groups = lhs.shape[1], group_sizes.shape[0]
    columns = out[0].shape[1]
    if not num_rows * columns:
        return tuple(jnp.zeros(of.shape, of.dtype) for of in out) if add_to is None else (add_to,)
    if not contracted:  # an empty sum is zero, plus what is added to it
        contracted, lhs = 1, jnp.zeros((lhs.shape[0], 1), lhs.dtype)
        matrices = tuple(
            jnp.zeros((num_groups, *((columns, 1) if transpose_rhs else (1, columns))), lhs.dtype) for _ in matrices
        )
    tiles = tiles_of_matmul(num_rows, num_groups, contracted, columns, lhs.dtype.itemsize, len(matrices))
    row_tiles, column_tiles = max_tiles(num_rows, num_groups, tiles.rows), math.ceil(columns / tiles.columns)
    num_slots = lhs.shape[0] if reads_slots else out[0].shape[0]

    def kernel(*refs):
        refs = iter(refs)
        lhs_ref, sizes_ref = next(refs), next(refs)
        rhs_refs, bias_refs = [next(refs) for _ in matrices], [next(refs) for _ in biases]
        slots_ref = None if row_slot is None else next(refs)
        start_ref = None if add_to is None else next(refs)
        out_refs = list(refs)
        place, column_block = _swizzled(pl.program_id(0), row_tiles, column_tiles)
        group, first, end, is_there = _find_tile(_load_sizes(sizes_ref, num_groups), tiles.rows, place)

        @pl.when(is_there)
        def _():
            rows, row_mask = pl.ds(first, tiles.rows), first + _arange(tiles.rows) < end
            read_from = write_to = rows
            if slots_ref is not None:
                # Writes behind the last slot are masked on a GPU, and dropped by the interpreter.
                slots = plgpu.load(slots_ref.at[rows], mask=row_mask, other=num_slots)
                read_from, write_to = (slots, rows) if reads_slots else (rows, slots)
            wanted, column_mask = _block(column_block, tiles.columns, columns)

            def step(number, totals):
                inner, inner_mask = _block(number, tiles.steps, contracted)
                left = _load(_at(lhs_ref, read_from, inner), row_mask, inner_mask)
                found = []
                for ref, total in zip(rhs_refs, totals, strict=True):
                    if transpose_rhs:
                        right = _load(ref.at[group, wanted, inner], column_mask, inner_mask)
                    else:
                        right = _load(ref.at[group, inner, wanted], inner_mask, column_mask)
                    found.append(total + _dot(left, right, (1, 1 if transpose_rhs else 0), precision))
                return tuple(found)

            totals = (jnp.zeros((tiles.rows, tiles.columns), jnp.float32),) * len(matrices)
            if start_ref is not None:
                totals = (totals[0] + _load(_at(start_ref, write_to, wanted), row_mask, column_mask),)
            totals = lax.fori_loop(_i32(0), _i32(math.ceil(contracted / tiles.steps)), step, totals)
            if bias_refs:
                totals = tuple(
                    total + _load(ref.at[pl.ds(group, 1), wanted], None, column_mask)
                    for ref, total in zip(bias_refs, totals, strict=True)
                )
            for ref, result in zip(out_refs, finish(*totals), strict=True):
                _store(_at(ref, write_to, wanted), result, row_mask, column_mask)

    optional = [operand for operand in (row_slot, add_to) if operand is not None]
    operands = (lhs, group_sizes, *matrices, *biases, *optional)
    # A program reads a tile of add_to and writes the same tile of the result, so both may share one buffer.
    call = _kernel(
        kernel,
        name,
        out,
        row_tiles * column_tiles,
        tiles,
        interpret,
        input_output_aliases={} if add_to is None else {len(operands) - 1: 0},
    )
    with declare_flops(2 * num_multiplied(num_rows, num_groups, tiles.rows) * contracted * columns * len(matrices)):
        return tuple(call(*operands))


def grouped_outer(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    row_slot: jax.Array | None = None,
    *,
    dtype: Any,
    slotted: str = "",
    precision: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """lhs [M, H], rhs [M, N], group_sizes [G] -> [G, H, N] in ``dtype``; ``precision``, ``interpret`` as above.

    With ``row_slot`` [M] the rows of one operand lie in slots [A, ...]; ``slotted`` says of which: "lhs" or "rhs".
    A program goes through all rows of its group, so there are no partial sums, and the result is always the same.
    """
    num_rows = (lhs if row_slot is None else row_slot).shape[0]
    height, width, num_groups = lhs.shape[1], rhs.shape[1], group_sizes.shape[0]
    num_slots = (lhs if slotted == "lhs" else rhs).shape[0]
    out = result_type((num_groups, height, width), dtype, lhs)
    if not num_rows * height * width:
        return jnp.zeros(out.shape, out.dtype)
    tiles = tiles_of_outer(num_rows, num_groups, height, width, lhs.dtype.itemsize)
    row_tiles, column_tiles = math.ceil(height / tiles.rows), math.ceil(width / tiles.columns)
    of_group = row_tiles * column_tiles

    def grouped_outer_kernel(lhs_ref, rhs_ref, sizes_ref, *refs):
        *slot_refs, out_ref = refs
        # 1. Which group this program is for, and which block of its matrix it makes.
        group = lax.div(pl.program_id(0), _i32(of_group))
        row_block, column_block = _swizzled(lax.rem(pl.program_id(0), _i32(of_group)), row_tiles, column_tiles)
        # 2. Where the rows of the group are.
        sizes = _load_sizes(sizes_ref, num_groups)
        first, size = _sum(jnp.where(_arange(sizes.size) < group, sizes, 0)), _pick(sizes, group)
        rows, row_mask = _block(row_block, tiles.rows, height)
        columns, column_mask = _block(column_block, tiles.columns, width)

        def step(number, total):
            at = first + number * tiles.steps
            inner, inner_mask = pl.ds(at, tiles.steps), at + _arange(tiles.steps) < first + size
            left_from = right_from = inner
            for ref in slot_refs:
                slots = plgpu.load(ref.at[inner], mask=inner_mask, other=num_slots)
                left_from, right_from = (slots, inner) if slotted == "lhs" else (inner, slots)
            left = _load(_at(lhs_ref, left_from, rows), inner_mask, row_mask)
            right = _load(_at(rhs_ref, right_from, columns), inner_mask, column_mask)
            return total + _dot(left, right, (0, 0), precision)

        # 3. The sum over the rows of the group, step by step.
        total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        total = lax.fori_loop(_i32(0), _ceil_div(size, tiles.steps), step, total)
        _store(out_ref.at[group, rows, columns], total, row_mask, column_mask)

    call = _kernel(grouped_outer_kernel, "grouped_outer", out, num_groups * of_group, tiles, interpret)
    with declare_flops(2 * num_multiplied(num_rows, num_groups, tiles.steps) * height * width):
        return call(lhs, rhs, group_sizes, *(() if row_slot is None else (row_slot,)))


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
    """A constant of a kernel in 32 bits. A plain number would have 64 where JAX is told to use them."""
    return np.int32(number)


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """``values[index]``: Triton has no indexing."""
    return _sum(jnp.where(_arange(values.size) == index, values, 0))


def _sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, dtype=jnp.int32)


def _arange(length: int) -> jax.Array:
    return jnp.arange(length, dtype=jnp.int32)


def _block(number: jax.Array, size: int, extent: int) -> tuple[Any, jax.Array | None]:
    """Where block ``number`` lies along an axis, and which of its places are inside it; None if blocks fit the axis."""
    inside = None if extent % size == 0 else number * size + _arange(size) < extent
    return pl.ds(number * size, size), inside


def _at(ref, rows: Any, columns: Any) -> Any:
    """A block of a matrix: consecutive columns of rows that are consecutive too, or that an array lists."""
    if isinstance(rows, pl.Slice):
        return ref.at[rows, columns]
    return ref.at[rows[:, None], (columns.start + _arange(columns.size))[None, :]]


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
