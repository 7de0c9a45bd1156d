"""The Pallas kernels of the TPU back end: a grid over tiles of columns, visits of row tiles, tiles of the contraction.

Rows lie group after group, so a tile of rows can belong to several groups. A *visit* is one tile for one group: the
body of the kernel multiplies the rows of that group which lie in that tile. It takes them in steps that start at any
multiple of 16. No other rows are multiplied, except for those by which the first and the last step are longer than the
group. Such rows may hold garbage, NaN included: they are masked where results are stored, and before a sum over rows.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from moe_jax.kernels.kernel_call import result_type

if TYPE_CHECKING:
    from moe_jax.kernels.tpu import Tiles, Visits

PACKED_ROWS = 16  # rows of 16-bit numbers that share a register: steps start at multiples of it
SIZES = 4  # a step may be one to four quarters of a whole step
_VMEM_BYTES = 64 << 20  # a kernel may ask for so much of the 128 MiB that there are


def multiply_rows(
    lhs: jax.Array,
    rhs: jax.Array,
    visits: "Visits",
    add_to: jax.Array | None,
    *,
    tiles: "Tiles",
    transpose_rhs: bool,
    out_dtype: DTypeLike,
    cost: pl.CostEstimate,
    precision: lax.Precision,
    interpret: bool,
) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), add_to [M, N] or None -> [M, N] in ``out_dtype``."""
    num_rows, contracted = lhs.shape
    columns = rhs.shape[1 if transpose_rhs else 2]
    num_k = pl.cdiv(contracted, tiles.contracted)

    def rhs_block(n, visit, k, bounds, groups, row_tiles):
        return (groups[visit], n, k) if transpose_rhs else (groups[visit], k, n)

    rhs_shape = (tiles.columns, tiles.contracted) if transpose_rhs else (tiles.contracted, tiles.columns)
    rows_spec = pl.BlockSpec((tiles.rows, tiles.columns), lambda n, visit, k, _, __, row_tiles: (row_tiles[visit], n))
    added = [] if add_to is None else [add_to]
    kernel = functools.partial(
        _rows_kernel, tiles=tiles, rest=contracted % tiles.contracted, transpose_rhs=transpose_rhs, precision=precision
    )
    return pl.pallas_call(
        kernel if added else functools.partial(_without_add_to, kernel),
        out_shape=result_type((num_rows, columns), out_dtype, lhs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(columns, tiles.columns), visits.num_visits, num_k),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.contracted), lambda n, visit, k, _, __, tiles: (tiles[visit], k)),
                pl.BlockSpec((None, *rhs_shape), rhs_block),
                *[rows_spec for _ in added],
            ],
            out_specs=rows_spec,
            scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)] if num_k > 1 else [],
        ),
        # Each block of add_to is read before the block of the result that takes its place is written.
        input_output_aliases={5: 0} if added else {},
        compiler_params=_params("parallel", "arbitrary", "arbitrary"),
        cost_estimate=cost,
        interpret=interpret,
        name="grouped_matmul",
    )(visits.bounds, visits.groups, visits.row_tiles, lhs, rhs, *added)


def _without_add_to(kernel, bounds, groups, row_tiles, lhs, rhs, out, *scratch):
    kernel(bounds, groups, row_tiles, lhs, rhs, None, out, *scratch)


def _rows_kernel(
    bounds, groups, row_tiles, lhs, rhs, add_to, out, *scratch, tiles, rest, transpose_rhs, precision
):  # fmt: skip
    visit, k, last_k = pl.program_id(1), pl.program_id(2), pl.num_programs(2) - 1
    axis = 1 if transpose_rhs else 0

    def within(block, axis):
        """Puts zeros past the end of the contraction, where the last block hangs over the end of its operand."""
        if not rest:
            return block
        inside = lax.broadcasted_iota(jnp.int32, block.shape, axis) < jnp.where(k == last_k, rest, block.shape[axis])
        return _select(inside, block, 0)

    def multiply(where, mine):
        total = lax.dot_general(
            within(lhs[where, :], 1),
            within(rhs[...], axis),
            (((1,), (axis,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        if not scratch:
            store(where, mine, total)
            return
        (sums,) = scratch
        before = sums[where, :]
        total = jnp.where(mine, total + jnp.where(k == 0, 0.0, before), before)
        sums[where, :] = total
        pl.when(k == last_k)(lambda: store(where, mine, total))

    def store(where, mine, total):
        if add_to is not None:
            total += add_to[where, :].astype(jnp.float32)
        out[where, :] = _select(mine, total, out[where, :]).astype(out.dtype)

    _for_rows(*_rows_of_group(bounds, groups, row_tiles, visit, tiles), tiles, multiply)


def sum_outer(
    lhs: jax.Array,
    rhs: jax.Array,
    visits: "Visits",
    *,
    tiles: "Tiles",
    out_dtype: DTypeLike,
    cost: pl.CostEstimate,
    precision: lax.Precision,
    interpret: bool,
) -> jax.Array:
    """lhs [M, H], rhs [M, N] -> [G, H, N] in ``out_dtype``; ``visits`` has at least one visit of every group."""
    num_groups, contracted, columns = visits.bounds.shape[0] - 1, lhs.shape[1], rhs.shape[1]

    # The grid goes over tiles of columns, tiles of the other axis, and visits: rows of a visit are its tile of rows.
    def block(width, place):
        return pl.BlockSpec((tiles.rows, width), lambda *at: (at[-1][at[2]], at[place]))

    out_spec = pl.BlockSpec(
        (None, tiles.contracted, tiles.columns), lambda n, k, visit, _, groups, __: (groups[visit], k, n)
    )
    return pl.pallas_call(
        functools.partial(_outer_kernel, tiles=tiles, precision=precision),
        out_shape=result_type((num_groups, contracted, columns), out_dtype, lhs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(columns, tiles.columns), pl.cdiv(contracted, tiles.contracted), visits.num_visits),
            in_specs=[block(tiles.contracted, 1), block(tiles.columns, 0)],
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM((tiles.contracted, tiles.columns), jnp.float32)],
        ),
        compiler_params=_params("parallel", "parallel", "arbitrary"),
        cost_estimate=cost,
        interpret=interpret,
        name="grouped_outer",
    )(visits.bounds, visits.groups, visits.row_tiles, lhs, rhs)


def _outer_kernel(bounds, groups, row_tiles, lhs, rhs, out, sums, *, tiles, precision):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1

    # The visits of a group follow each other. The first one clears the sums, and the last one writes them out.
    @pl.when((visit == 0) | (groups[jnp.maximum(visit - 1, 0)] != groups[visit]))
    def _start():
        sums[...] = jnp.zeros_like(sums)

    def multiply(where, mine):
        left, right = _select(mine, lhs[where, :], 0), _select(mine, rhs[where, :], 0)
        by_row = (((0,), (0,)), ((), ()))
        sums[...] += lax.dot_general(left, right, by_row, precision=precision, preferred_element_type=jnp.float32)

    _for_rows(*_rows_of_group(bounds, groups, row_tiles, visit, tiles), tiles, multiply)

    @pl.when((visit == last) | (groups[jnp.minimum(visit + 1, last)] != groups[visit]))
    def _store():
        out[...] = sums[...].astype(out.dtype)


def _params(*semantics: Literal["parallel", "arbitrary"]) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_VMEM_BYTES)


def _select(mask, chosen, other):
    """``jnp.where`` in the dtype of ``chosen``. It goes by way of fp32: not every TPU can select 16-bit numbers."""
    wide = [part.astype(jnp.float32) if isinstance(part, jax.Array) else jnp.float32(part) for part in (chosen, other)]
    return jnp.where(mask, *wide).astype(chosen.dtype)


def _rows_of_group(bounds, groups, row_tiles, visit, tiles):
    """The first row of the visit's group and the one after its last, counted from the start of the visit's tile."""
    group, first = groups[visit], row_tiles[visit] * tiles.rows
    low, high = bounds[group] - first, bounds[group + 1] - first
    return jnp.maximum(low, 0), jnp.minimum(high, tiles.rows)


def _for_rows(low, high, tiles, multiply: Callable) -> None:
    """Calls ``multiply(where, mine [size, 1])`` for slices that cover the rows [low, high) of a tile, each row once.

    1. The first step starts at ``low``, rounded down to where steps may start. The others follow without gaps.
    2. The last step has the smallest of four sizes that suffices.
    3. If it would reach past the tile, it is shifted back over rows that an earlier step has taken.
    4. ``mine`` marks the rows of a step that are in [low, high) and that no earlier step has taken.
    """
    # This is lax.div and not //: for a floor division Pallas asks which device is here, and that need not be a TPU.
    start = lax.div(low, PACKED_ROWS) * PACKED_ROWS
    part = tiles.step // SIZES

    def step(i, _):
        wanted = start + i * tiles.step
        left = high - wanted

        def of_size(size):
            at = pl.multiple_of(jnp.minimum(wanted, tiles.rows - size), PACKED_ROWS)
            row = at + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
            multiply(pl.ds(at, size), (row >= jnp.maximum(low, wanted)) & (row < high))

        for size in range(part, tiles.step + 1, part):
            fits = left > size - part if size == tiles.step else (left > size - part) & (left <= size)
            pl.when(fits)(functools.partial(of_size, size))

    lax.fori_loop(0, lax.div(jnp.maximum(high - start, 0) + tiles.step - 1, tiles.step), step, None)
