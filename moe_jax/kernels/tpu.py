"""Grouped products for TPUs: Pallas kernels that multiply the rows of each group and no others.

This file has what XLA computes around the kernels: how large tiles are, and which tile of rows a kernel visits for
which group. The kernels themselves are in ``tpu_kernels``.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.typing import DTypeLike

from moe_jax import _compat
from moe_jax.kernels.kernel_call import kernel_call
from moe_jax.kernels.table import Backend

_BLOCK_BYTES = 28 << 20  # fast memory for the sums and for the blocks of a kernel, each of which is there twice
# Elements of a block. With more of them Mosaic would take long, since it spells out every register.
_MOST_WEIGHTS, _MOST_SUMS = 2 << 20, 1 << 20
_LANES = 128
# The values of default_matmul_precision that take more than one pass.
_EXACT = ("high", "highest", "bfloat16_3x", "tensorfloat32", "float32")


class Tiles(NamedTuple):
    """Extents of the blocks that a kernel works on.

    Attributes:
      rows: how many rows a tile has, a multiple of ``step``.
      step: how many rows are multiplied at once.
      contracted: how much of the contracted axis a block has.
      columns: how many columns of the result a block has.
    """

    rows: int
    step: int
    contracted: int
    columns: int


class Visits(NamedTuple):
    """Which tile of rows is visited for which group, group after group, tile after tile. All are i32.

    Attributes:
      bounds: [G + 1] the first row of each group; the last entry is the number of all rows that are in groups.
      groups: [V] the group of each visit.
      row_tiles: [V] the tile of rows of each visit.
      num_visits: a scalar, how many visits there are, at least 1; entries of ``groups`` and ``row_tiles`` from there on
        are not read.
    """

    bounds: jax.Array
    groups: jax.Array
    row_tiles: jax.Array
    num_visits: jax.Array


def plan_visits(group_sizes: jax.Array, num_rows: int, tile_rows: int, *, every_group: bool) -> Visits:
    """The visits of tiles of ``tile_rows`` rows.

    A group without rows is visited once if ``every_group`` is set, and never otherwise. The tables are running sums
    that compare all entries with all others, which takes a TPU few and short steps.
    """
    num_groups, num_tiles = group_sizes.shape[0], -(-num_rows // tile_rows)
    group = jnp.arange(num_groups, dtype=jnp.int32)
    before = group < jnp.arange(num_groups + 1, dtype=jnp.int32)[:, None]  # [G + 1, G]

    def exclusive(counts):
        return jnp.sum(jnp.where(before, counts, 0), axis=1, dtype=jnp.int32)

    # 1. Rows of a group, and the tiles that hold some of them.
    bounds = exclusive(group_sizes)
    first = jnp.minimum(bounds[:-1] // tile_rows, num_tiles - 1)
    tiles = jnp.where(group_sizes > 0, (bounds[1:] - 1) // tile_rows - first + 1, int(every_group))
    # 2. Visits of a group follow each other; neighbouring groups may share a tile, so there are up to G - 1 more.
    starts = exclusive(tiles)
    visit = jnp.arange(num_tiles + num_groups - 1 + every_group, dtype=jnp.int32)[:, None]
    mine = (visit >= starts[:-1]) & (visit < starts[1:])  # [V, G]
    groups = jnp.sum(jnp.where(mine, group, 0), axis=1, dtype=jnp.int32)
    row_tiles = jnp.sum(jnp.where(mine, first - starts[:-1] + visit, 0), axis=1, dtype=jnp.int32)
    return Visits(bounds, groups, row_tiles, jnp.maximum(starts[-1], 1))


def row_tiles(num_rows: int, num_groups: int) -> tuple[int, int]:
    """(rows of a tile, rows of a step). The last step is rounded up to quarters of a step.

    The matrix unit of most TPUs takes as long for fewer than 128 rows as for 128.
    """
    average = num_rows // num_groups
    step = 128 if average >= 128 else 64
    rows = 512 if average >= 512 else 1024
    return min(rows, -(-num_rows // step) * step), step


def _widths(extent: int) -> list[int]:
    """The block widths to choose from: multiples of the lanes that cut the lanes of the extent into equal parts."""
    lanes = -(-extent // _LANES)
    return [min(n * _LANES, extent) for n in range(1, lanes + 1) if lanes % n == 0]


def _best(contracted: int, columns: int, cores: int, size_of: Callable, traffic_of: Callable) -> tuple[int, int]:
    """The block widths (along the contraction, along the columns) that move the least data among those that fit.

    Cores share the tiles of columns. So only widths are taken that give each core as many tiles as the others, if there
    are such widths; if not, the narrowest width is taken, which gives the cores many tiles to share.
    """
    widths = _widths(columns)
    shared = [n for n in widths if -(-columns // n) % cores == 0] or widths[:1]
    pairs = [(k, n) for k in _widths(contracted) for n in shared]
    fitting = [pair for pair in pairs if size_of(*pair) <= _BLOCK_BYTES] or [min(pairs)]
    return min(fitting, key=lambda pair: (traffic_of(*pair), -pair[0] * pair[1]))


def matmul_tiles(num_rows: int, num_groups: int, contracted: int, columns: int, itemsize: int, cores: int) -> Tiles:
    """The tiles of a product of rows [M, H] with matrices [G, H, N].

    If one block holds the whole contraction, the weights of a group are fetched once for each tile of columns; if not,
    they are fetched at every visit. Rows are fetched once for each tile of columns.
    """
    rows, step = row_tiles(num_rows, num_groups)
    visits = -(-num_rows // rows) + num_groups - 1

    def size(k, n):
        if k * n > _MOST_WEIGHTS:
            return math.inf
        sums = 4 * rows * n * (k < contracted) + 4 * step * n
        return 2 * itemsize * (rows * k + k * n + 2 * rows * n) + sums

    def traffic(k, n):
        fetched = num_groups if k == contracted else visits
        return num_rows * contracted * -(-columns // n) + fetched * contracted * columns

    return Tiles(rows, step, *_best(contracted, columns, cores, size, traffic))


def outer_tiles(num_rows: int, num_groups: int, contracted: int, columns: int, itemsize: int, cores: int) -> Tiles:
    """The tiles of the sums of products of rows [M, H] and rows [M, N].

    Rows of either operand are fetched once for each tile of the other operand's columns.
    """
    rows, step = row_tiles(num_rows, num_groups)

    def size(k, n):
        if k * n > _MOST_SUMS:
            return math.inf
        return 2 * itemsize * (rows * (k + n) + k * n) + 2 * 4 * k * n

    def traffic(k, n):
        return num_rows * (contracted * -(-columns // n) + columns * -(-contracted // k))

    return Tiles(rows, step, *_best(contracted, columns, cores, size, traffic))


def multiplied_rows(num_rows: int, num_groups: int, tiles: Tiles) -> int:
    """How many rows the matrix unit multiplies for ``num_rows`` rows, averaged over the places where groups begin.

    A group that begins inside a tile is multiplied from the multiple of 16 before its first row, which is 7.5 rows
    early on average. Its last step is rounded up to a quarter of a whole step. And where a group goes on from its first
    tile to the next, 16 rows are multiplied in vain half of the time.
    """
    crossing = min(num_groups, -(-num_rows // tiles.rows))
    return num_rows + num_groups * (8 + tiles.step // 8) + crossing * 8


def _cost(rows: int, contracted: int, columns: int, bytes_accessed: int):
    from jax.experimental import pallas as pl

    return pl.CostEstimate(flops=2 * rows * contracted * columns, bytes_accessed=bytes_accessed, transcendentals=0)


def _wide(array):
    return array.astype(jnp.float32) if array is not None and array.dtype == jnp.float16 else array


def _precision(dtype):
    """How precisely operands are multiplied.

    fp32 operands are multiplied as everywhere in JAX: in one bf16 pass, unless ``jax.default_matmul_precision`` says
    otherwise. Operands that were fp16 before they were widened are multiplied exactly, since they have more bits than
    bf16.
    """
    asked = _compat.config_value("jax_default_matmul_precision")
    exact = dtype == jnp.float16 or (dtype == jnp.float32 and asked in _EXACT)
    return lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_rhs: bool,
    add_to: jax.Array | None = None,
    cores: int = 2,
) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), group_sizes [G] -> [M, N], plus ``add_to`` [M, N].

    ``cores``: how many cores a device has. TPUs have no fp16: such operands are widened to fp32 before the kernel, and
    its fp32 result is rounded.
    """
    columns = rhs.shape[1 if transpose_rhs else 2]
    if not (lhs.size and columns):
        zeros = jnp.zeros_like(lhs, shape=(lhs.shape[0], columns))
        return zeros if add_to is None else add_to
    run = _multiply_rows(transpose_rhs, _precision(lhs.dtype), cores)
    out = run(_wide(lhs), _wide(rhs), group_sizes, *([] if add_to is None else [_wide(add_to)]))
    return out.astype(lhs.dtype)


@functools.cache
def _multiply_rows(transpose_rhs, precision, cores):
    @sequential_vmap
    def run(lhs, rhs, group_sizes, *added):
        (num_rows, contracted), num_groups = lhs.shape, rhs.shape[0]
        columns, itemsize = rhs.shape[1 if transpose_rhs else 2], lhs.dtype.itemsize
        tiles = matmul_tiles(num_rows, num_groups, contracted, columns, itemsize, cores)
        visits = plan_visits(group_sizes, num_rows, tiles.rows, every_group=False)

        def call(bounds, groups, row_tiles, count, lhs, rhs, *added, interpret):
            from moe_jax.kernels.tpu_kernels import multiply_rows

            multiplied = multiplied_rows(num_rows, num_groups, tiles)
            touched = (num_rows * (contracted * -(-columns // tiles.columns) + columns) + rhs.size) * itemsize
            return multiply_rows(
                lhs,
                rhs,
                Visits(bounds, groups, row_tiles, count),
                *(added or [None]),
                tiles=tiles,
                transpose_rhs=transpose_rhs,
                out_dtype=lhs.dtype,
                cost=_cost(multiplied, contracted, columns, touched),
                precision=precision,
                interpret=interpret,
            )

        return kernel_call(
            call, *visits, lhs, rhs, *added, shape=(num_rows, columns), dtype=lhs.dtype, platforms=("tpu",)
        )

    return run


def grouped_outer(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, dtype: DTypeLike, cores: int = 2
) -> jax.Array:
    """lhs [M, H], rhs [M, N], group_sizes [G] -> [G, H, N] in ``dtype``; fp16, ``cores`` as in ``grouped_matmul``."""
    shape = (group_sizes.shape[0], lhs.shape[1], rhs.shape[1])
    if not (lhs.size and rhs.size):
        return jnp.zeros_like(lhs, shape=shape, dtype=dtype)
    out_dtype = jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)
    run = _sum_outer(out_dtype, _precision(lhs.dtype), cores)
    return run(_wide(lhs), _wide(rhs), group_sizes).astype(dtype)


@functools.cache
def _sum_outer(out_dtype, precision, cores):
    @sequential_vmap
    def run(lhs, rhs, group_sizes):
        num_rows, contracted, columns, num_groups = *lhs.shape, rhs.shape[1], group_sizes.shape[0]
        tiles = outer_tiles(num_rows, num_groups, contracted, columns, lhs.dtype.itemsize, cores)
        visits = plan_visits(group_sizes, num_rows, tiles.rows, every_group=True)

        def call(bounds, groups, row_tiles, count, lhs, rhs, *, interpret):
            from moe_jax.kernels.tpu_kernels import sum_outer

            multiplied = multiplied_rows(num_rows, num_groups, tiles)
            read = num_rows * (contracted * -(-columns // tiles.columns) + columns * -(-contracted // tiles.contracted))
            touched = read * lhs.dtype.itemsize + num_groups * contracted * columns * out_dtype.itemsize
            return sum_outer(
                lhs,
                rhs,
                Visits(bounds, groups, row_tiles, count),
                tiles=tiles,
                out_dtype=out_dtype,
                cost=_cost(multiplied, contracted, columns, touched),
                precision=precision,
                interpret=interpret,
            )

        shape = (num_groups, contracted, columns)
        return kernel_call(call, *visits, lhs, rhs, shape=shape, dtype=out_dtype, platforms=("tpu",))

    return run


BACKEND = Backend(
    name="tpu",
    platforms=("tpu",),
    kernels={"grouped_matmul": grouped_matmul, "grouped_outer": grouped_outer},
    accumulates=True,
    about="Pallas kernels over tiles of rows, columns in an even number of tiles for the two cores of v4 and v5p",
)
LITE = Backend(
    name="tpu_lite",
    platforms=("tpu",),
    device_kinds=("TPU* lite", "TPU v5e", "TPU v6e", "TPU7*"),  # a device of JAX is one core of a TPU 7x
    kernels={name: functools.partial(kernel, cores=1) for name, kernel in BACKEND.kernels.items()},
    accumulates=True,
    about="Pallas kernels over tiles of rows, columns in as few tiles as fit, for one core",
)
