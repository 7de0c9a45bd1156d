"""Products of scaled numbers: what travels for a row, how weights are prepared, and one multiplication.

Every 8-bit and 4-bit number here, times a power of two, is exact in bf16. Products of fp32 operands are therefore exact
even where a device multiplies these at a lower precision, and so are int8 sums: integers up to 2^24 are exact in fp32.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat, quant
from moe_jax.errors import UnsupportedError
from moe_jax.fused.exchange import Extents
from moe_jax.fused.scheme import Operands, Scheme, logical_shape
from moe_jax.kernels.table import call_kernel
from moe_jax.quant.message import Part, join, split
from moe_jax.quant.schemes import named_recipe

Array = jax.Array
_EXACT_COLUMNS = 1024  # a sum of so many products of two int8 numbers is at most 2^24


class Weights(NamedTuple):
    """Matrices that are ready to be multiplied.

    Attributes:
      values: fp32 or bf16. Microscaled matrices are [e, N, H], and their scales are multiplied in. Others have the
        layout in which they are stored.
      scale: [1] f32, by which the products have yet to be multiplied; None for microscaled matrices.
    """

    values: Array
    scale: Array | None


class Scaled(NamedTuple):
    """The grouped part with scales, in the form that the exchange takes.

    Attributes:
      rows: [rows, bytes] u8, the numbers and the scales of each row side by side.
      weight: the matrices.
      multiply: (extents, rows, weight, group_sizes) -> the product of such rows.
      unpack: such rows -> their numbers, in the dtype in which the caller gave them.
    """

    rows: Array
    weight: Weights
    multiply: Callable[[Extents, Array, Weights, Array], Array]
    unpack: Callable[[Array], Array]


def scaled_operands(operands: Operands, *, transpose: bool, out_dtype: jnp.dtype) -> Scaled:
    """The grouped part in the form in which it travels and is multiplied. Weights have a leading axis [e]."""
    scheme, *arrays = operands
    x, weight, x_scale, weight_scale = _without_derivative(tuple(arrays))
    rows, parts = join(_values_and_scales(x, x_scale))
    return Scaled(
        rows=rows,
        weight=_prepare(scheme, weight, weight_scale, transpose, out_dtype),
        multiply=functools.partial(_multiply_groups, scheme, parts, transpose or scheme.microscaled, out_dtype),
        unpack=functools.partial(_unpack, parts, x.dtype),
    )


def scaled_dense(operands: Operands, *, transpose: bool, out_dtype: jnp.dtype) -> Array:
    """The product beside the exchange: [BS, H] and [H, N] or [N, H], with their scales -> [BS, N]."""
    scheme, *arrays = operands
    x, weight, x_scale, weight_scale = _without_derivative(tuple(arrays))
    values, scale = _values_and_scales(x, x_scale)
    stacked = weight_scale[None] if scheme.microscaled else weight_scale
    ready = _prepare(scheme, weight[None], stacked, transpose, out_dtype)
    axis = 1 if transpose or scheme.microscaled else 0

    def dot(lhs, rhs):
        return lax.dot_general(lhs, rhs[0], (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)

    with jax.named_scope("dense"):
        return _multiply(scheme, values, scale, ready, dot, axis + 1, out_dtype)


@jax.custom_jvp
def _without_derivative(operands):
    return operands


@_without_derivative.defjvp
def _refuse(primals, tangents):
    raise UnsupportedError(
        "scaled operands have no derivative here: numbers are codes, and their scales belong to them; differentiate "
        "the same call on floats, or put jax.lax.stop_gradient around the operands and their scales"
    )


def _values_and_scales(x, x_scale):
    """The two arrays that travel: the numbers [rows, V] (e2m1 as bytes) and the scales [rows, S] (E8M0 as bytes)."""
    values = _as_bytes(x)
    if x_scale.ndim == 3:
        scale = _e8m0_bytes(x_scale).reshape(x.shape[0], 2 * x_scale.shape[1])
    else:
        scale = jnp.broadcast_to(x_scale, (x.shape[0], 1))  # each row carries the scale of the rank that it is from
    return _compat.as_varying((values, scale), _compat.union_of_varying_axes((values, scale)))


def _unpack(parts: tuple[Part, ...], dtype, rows: Array) -> Array:
    values = split(rows, parts)[0]
    if values.dtype == dtype:
        return values
    pairs = lax.bitcast_convert_type(values, dtype)  # two e2m1 numbers from each byte
    return pairs.reshape(values.shape[0], 2 * values.shape[1])


def _prepare(scheme: Scheme, weight, weight_scale, transpose, out_dtype) -> Weights:
    if not scheme.microscaled:
        return Weights(values=weight.astype(jnp.float32), scale=weight_scale)
    stored = _as_bytes(weight) if transpose else _swap_columns(weight)  # [e, N, V]
    scale = _e8m0_bytes(weight_scale)
    scale = scale if transpose else jnp.swapaxes(scale, 1, 2)  # [e, N, pairs, 2]
    num_experts, num_columns, width = stored.shape
    flat = num_experts * num_columns
    scale = scale.reshape(flat, 2 * scale.shape[2])
    values = _dequantize(scheme.weight_format, stored.reshape(flat, width), scale)
    values = values.reshape(num_experts, num_columns, scheme.hidden)
    # The kernels round a product to the dtype of its operands. So where the result is bf16, bf16 operands suffice,
    # which take half the memory.
    return Weights(values=values.astype(jnp.bfloat16 if out_dtype == jnp.bfloat16 else jnp.float32), scale=None)


def _multiply_groups(scheme, parts, transposed, out_dtype, extents, rows, weight, group_sizes):
    values, scale = split(rows, parts)  # the scales of microscaled weights are in the weights already

    def dot(lhs, rhs):
        operands = lhs, rhs, group_sizes
        return call_kernel("grouped_matmul", extents.backend, *operands, transpose_rhs=transposed)

    return _multiply(scheme, values, scale, weight, dot, 2 if transposed else 1, out_dtype)


def _multiply(scheme, values, scale, weight, dot, axis, out_dtype):
    """The product of rows and weights in ``out_dtype``.

    Args:
      scheme: how both are scaled.
      values, scale: [rows, V] and [rows, S], the numbers of the rows and their scales.
      weight: the matrices.
      dot: multiplies rows [rows, H] with matrices like ``weight.values``.
      axis: the contracted axis of ``weight.values``.
      out_dtype: of the result.
    """
    if scheme.microscaled:
        lhs = _dequantize(scheme.x_format, values, scale).astype(weight.values.dtype)
        return dot(lhs, weight.values).astype(out_dtype)
    lhs = values.astype(jnp.float32)
    if scheme.x_format == "int8" and scheme.hidden > _EXACT_COLUMNS:
        total = _whole_numbers(lhs, weight.values, dot, axis)
    else:
        total = dot(lhs, weight.values)
    return (total * scale * weight.scale).astype(out_dtype)


def _whole_numbers(lhs, rhs, dot, axis):
    """A product of whole numbers, exact until it is fp32: sums over few columns are exact, and are added as int32."""
    starts = range(0, lhs.shape[1], _EXACT_COLUMNS)
    stops = [min(start + _EXACT_COLUMNS, lhs.shape[1]) for start in starts]
    parts = [
        dot(lhs[:, start:stop], lax.slice_in_dim(rhs, start, stop, axis=axis)).astype(jnp.int32)
        for start, stop in zip(starts, stops, strict=True)
    ]
    return functools.reduce(jnp.add, parts).astype(jnp.float32)


def _dequantize(number_format, values, scale):
    """[rows, V] numbers and [rows, S] bytes of E8M0, one per 32 -> [rows, H] f32."""
    return named_recipe(f"mx_{number_format}", "float32").dequantize(quant.QTensor(values=values, scale=scale))


def _as_bytes(array):
    """Unpacked e2m1 numbers, two per byte along the last axis; anything else as it is."""
    array = jnp.asarray(array)
    if str(array.dtype) != "float4_e2m1fn":
        return array
    return lax.bitcast_convert_type(array.reshape(*array.shape[:-1], array.shape[-1] // 2, 2), jnp.uint8)


def _e8m0_bytes(scale):
    scale = jnp.asarray(scale)
    return scale if scale.dtype == jnp.uint8 else lax.bitcast_convert_type(scale, jnp.uint8)


def _swap_columns(weight):
    """[e, H, N] -> [e, N, H], where e2m1 bytes hold two numbers along the last axis, before and after."""
    weight = jnp.asarray(weight)
    if weight.dtype != jnp.uint8:
        return _as_bytes(jnp.swapaxes(weight, 1, 2))
    codes = jnp.stack([weight & 0xF, weight >> 4], axis=-1).reshape(logical_shape(weight))
    codes = jnp.swapaxes(codes, 1, 2)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)
