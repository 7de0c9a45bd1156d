"""Grouped products by the Mosaic kernels that JAX brings for Hopper and Blackwell, where they fit; else by Triton.

These kernels fit 16-bit rows whose extents are multiples of their tiles, in groups that are large enough. They go
through as many tiles as there could be, ceil(M / tile) + G - 1, and multiply all of them, so that rows past the sum of
the groups cost as much as others. They are taken where the G - 1 additional tiles are at most an eighth of all.

They need rows in order, and compute no activation. Where copying the rows and a separate activation would take longer
than these kernels save, a back end takes Triton's kernels alone, which need neither; see ``Backend.fuses``.

What the kernels ask of their operands, and what they leave undone, was read in their source. They cannot be
interpreted, so the test of these calls puts functions in their place that leave the same things undone. The kernels
were compiled for these GPUs, and never run.

Gradients of weights are left to Triton. JAX's kernel for them on Hopper multiplies rows that are not in a group by
zero, so both operands would have to be zeroed past the sum before. That would write 92 MB for 16384 rows of 2048 and of
768 columns, which takes about as long as it would save, and a NaN in one group would still reach the next group.
"""

import importlib
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import jax
from jax.sharding import ManualAxisType

from moe_jax.hardware import GPUS, MACHINES
from moe_jax.hlo.cost import declare_flops
from moe_jax.kernels import triton

_STEPS = 64  # columns of the contracted axis in one step: 128 bytes, a swizzled row of shared memory
_STAGES = 4  # how many such steps are in shared memory at once, at most 32 KiB each
# Flops of 16-bit numbers at peak in the time of a byte to or from memory: 989 / 3.35 on an H100, 2250 / 8 on a B200.
_FLOPS_PER_BYTE = 290
# What JAX's kernels save, as a share of the time at peak, if they reach 0.7 of the peak and Triton's 0.6. Nobody has
# measured it.
_GAIN = 0.2
_MOST_GROUPS = 128  # with more these kernels are not taken: they unroll their search for the group of a tile


def hopper_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    add_to: jax.Array | None = None,
    *,
    transpose_rhs: bool,
    precision: str | None,
    interpret: bool = False,
) -> jax.Array:
    """As ``triton.grouped_matmul``, which is called for ``add_to`` and wherever this kernel does not fit."""
    (num_rows, contracted), num_groups = lhs.shape, rhs.shape[0]
    columns = rhs.shape[1 if transpose_rhs else 2]
    tile, width = _row_tile(num_rows, num_groups, (128, 64)), _divisor(columns, (128, 64))
    fits = _fits_hopper(num_rows, num_groups, contracted, columns) and _are_narrow(lhs, rhs)
    if interpret or add_to is not None or tile is None or width is None or not fits:
        return triton.grouped_matmul(
            lhs, rhs, group_sizes, add_to, transpose_rhs=transpose_rhs, precision=precision, interpret=interpret
        )
    product = find_kernel("ragged_dot_mgpu", "ragged_dot", GPUS["h100"].core_count)
    with declare_flops(2 * triton.max_tiles(num_rows, num_groups, tile) * tile * contracted * columns):
        return product(
            lhs,
            rhs,
            group_sizes=group_sizes,
            block_m=tile,
            block_n=width,
            block_k=_STEPS,
            max_concurrent_steps=_STAGES,
            grid_block_n=_divisor(columns // width, (8, 4, 2, 1)),
            transpose_rhs=transpose_rhs,
        )


def blackwell_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    add_to: jax.Array | None = None,
    *,
    transpose_rhs: bool,
    precision: str | None,
    interpret: bool = False,
) -> jax.Array:
    """As ``triton.grouped_matmul``, which is called where this kernel does not fit: it neither adds nor transposes."""
    (num_rows, contracted), num_groups, columns = lhs.shape, rhs.shape[0], rhs.shape[2]
    tile = 256  # the rows of two cores together; JAX's code for one core alone cannot be traced
    fits = _fits_blackwell(num_rows, num_groups, contracted, columns) and _are_narrow(lhs, rhs)
    if interpret or add_to is not None or transpose_rhs or not fits:
        return triton.grouped_matmul(
            lhs, rhs, group_sizes, add_to, transpose_rhs=transpose_rhs, precision=precision, interpret=interpret
        )
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.blackwell_ragged_dot_mgpu")
    product = find_kernel("blackwell_ragged_dot_mgpu", "ragged_dot_kernel", GPUS["b200"].core_count)
    config = module.TuningConfig(
        tile_m=tile // 2,
        tile_n=tile // 2,
        tile_k=_STEPS,
        max_concurrent_steps=_STAGES,
        collective=True,
        grid_tile_width=_divisor(columns // tile, (8, 4, 2, 1)),
        grid_minor_dim=module.blackwell_matmul_mgpu.MatmulDimension.N,
    )
    with declare_flops(2 * triton.max_tiles(num_rows, num_groups, tile) * tile * contracted * columns):
        return product(lhs, rhs, group_sizes, config)


def hopper_fuses(num_rows: int, num_groups: int, hidden: int, ffn: int, itemsize: int) -> bool:
    """``Backend.fuses`` for Hopper: whether Triton's kernels alone, without copies, should be faster."""
    return _fuses("h100", _fits_hopper, num_rows, num_groups, hidden, ffn, itemsize)


def blackwell_fuses(num_rows: int, num_groups: int, hidden: int, ffn: int, itemsize: int) -> bool:
    """``Backend.fuses`` for Blackwell, as for Hopper."""
    return _fuses("b200", _fits_blackwell, num_rows, num_groups, hidden, ffn, itemsize)


def _fuses(machine: str, fits: Callable, num_rows: int, num_groups: int, hidden: int, ffn: int, itemsize: int) -> bool:
    """Compares the seconds that a row costs the experts either way.

    JAX's kernels need rows in order, and compute no activation: a row is copied before and after, and the activation
    reads two rows of the inner width and writes one. What the kernels save is a share of the time of the products.
    """
    if itemsize != 2 or not all(fits(num_rows, num_groups, *pair) for pair in ((hidden, ffn), (ffn, hidden))):
        return True
    rates = MACHINES[machine]
    copies = itemsize * (4 * hidden + 3 * ffn) / rates.memory_bandwidth
    products = 3 * 2 * hidden * ffn / rates.flops16
    return copies >= products * _GAIN


def _fits_hopper(num_rows: int, num_groups: int, contracted: int, columns: int) -> bool:
    fits = contracted % _STEPS == 0 and contracted > _STEPS and _divisor(columns, (128, 64)) is not None
    return fits and _row_tile(num_rows, num_groups, (128, 64)) is not None


def _fits_blackwell(num_rows: int, num_groups: int, contracted: int, columns: int) -> bool:
    tile = 256
    fits = num_rows % tile == columns % tile == contracted % _STEPS == 0 and columns > 0 and contracted > 0
    return fits and _row_tile(num_rows, num_groups, (tile,)) is not None


def _are_narrow(*operands: jax.Array) -> bool:
    return all(operand.dtype.itemsize == 2 and operand.dtype == operands[0].dtype for operand in operands)


def _row_tile(num_rows: int, num_groups: int, sizes: tuple[int, ...]) -> int | None:
    """The first of ``sizes`` for which G - 1 more tiles have at most an eighth of the rows; None if there is none."""
    return next((t for t in sizes if 8 * t * (num_groups - 1) <= num_rows >= t and num_groups <= _MOST_GROUPS), None)


def _divisor(extent: int, sizes: tuple[int, ...]) -> int | None:
    return next((size for size in sizes if extent and extent % size == 0), None)


def find_kernel(module: str, function: str, core_count: int) -> Callable:
    """JAX's function, with ``_JaxOfTarget`` in place of the module ``jax``. Without that, two things would be wrong.

    The function asks the first device of this process how many cores it has, but the program may be meant for another
    device. And its result is typed without mesh axes, which a ``shard_map`` that checks them refuses.
    """
    found = getattr(importlib.import_module(f"jax.experimental.pallas.ops.gpu.{module}"), function)
    names = {**found.__globals__, "jax": _JaxOfTarget(core_count)}
    changed = FunctionType(found.__code__, names, found.__name__, found.__defaults__, found.__closure__)
    changed.__kwdefaults__ = found.__kwdefaults__
    return changed


class _JaxOfTarget:
    """The module ``jax``, except that its devices have the cores of the target, and its results name no mesh axes."""

    def __init__(self, core_count: int):
        self._core_count = getattr(jax.devices()[0], "core_count", None) or core_count

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    def devices(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(core_count=self._core_count)]

    local_devices = devices

    @staticmethod
    def ShapeDtypeStruct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType())
