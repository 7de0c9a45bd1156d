"""Which kinds of scaled numbers the fused pair multiplies, and how they must be laid out.

All of it is read off shapes and dtypes, so it is known before the program is traced.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import (
    DtypeError,
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    check_array,
    check_choice,
    check_shape,
)
from moe_jax.kernels import FLOAT_DTYPES

Array = jax.Array

FORMATS = {
    "int8": "int8",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "uint8": "e2m1",  # two per byte
    "float4_e2m1fn": "e2m1",
}
_EIGHT_BITS = {("int8", "int8")} | {(a, b) for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")}
_PAIRS = {  # the pairs of formats (rows, weights), by whether they are microscaled
    False: _EIGHT_BITS,
    True: _EIGHT_BITS - {("int8", "int8")} | {("e2m1", "e2m1")},
}
_RULE = (
    "take int8 with int8 or fp8 with fp8 under float32 scales [1], or fp8 with fp8 or e2m1 with e2m1 (two per uint8 "
    "byte, or float4_e2m1fn) under E8M0 scales (uint8 or float8_e8m0fnu), one per 32 numbers"
)
_LONGEST_INT8 = 2**17 - 1  # the sum of so many products, each up to 2^14, surely fits an int32


class Scheme(NamedTuple):
    """How a pair of operands is scaled; hashable.

    Attributes:
      microscaled: whether 32 numbers along the contracted axis share a power of two; if not, one fp32 scale serves a
        whole operand.
      x_format, weight_format: the number formats of rows and weights, as ``FORMATS`` names them.
      hidden: how many numbers a row has.
    """

    microscaled: bool
    x_format: str
    weight_format: str
    hidden: int


class Operands(NamedTuple):
    """A pair of operands whose scales were given and fit.

    Attributes:
      scheme: how they are scaled.
      x, weight: the numbers, stored as ``FORMATS`` says.
      x_scale, weight_scale: their scales, fp32 or bytes of E8M0.
    """

    scheme: Scheme
    x: Array
    weight: Array
    x_scale: Array
    weight_scale: Array


def read_operands(
    part: str,
    x: Array,
    weight: Array,
    x_scale: Array | None,
    weight_scale: Array | None,
    transpose: bool,
) -> Operands | None:
    """``{part}_x`` [rows, H] and ``{part}_weight`` [..., H, N] or [..., N, H] with scales; None where none are given.

    The numbers of dimensions of ``x`` and ``weight`` have been checked.

    Raises:
      MissingArgumentError, DtypeError, ShapeError: the scales or the numbers are not what some scheme takes.
    """
    # 1. Both scales are given, or neither is.
    if x_scale is None and weight_scale is None:
        return None
    if x_scale is None or weight_scale is None:
        missing = "x" if x_scale is None else "weight"
        raise MissingArgumentError(
            f"{part}_{missing}_scale is None, but the other scale was given; pass both or neither"
        )
    scales = {f"{part}_x_scale": x_scale, f"{part}_weight_scale": weight_scale}
    for name, scale in scales.items():
        check_array(name, scale)
    # 2. The dtypes of scales say whether blocks share them, and those of numbers must fit that.
    microscaled = _is_microscaled(scales)
    x_format, weight_format = (FORMATS.get(str(array.dtype), "") for array in (x, weight))
    if (x_format, weight_format) not in _PAIRS[microscaled]:
        raise DtypeError(
            f"{part}_x is {x.dtype} and {part}_weight {weight.dtype}, with {x_scale.dtype} scales; that is no scheme: "
            f"{_RULE}"
        )
    # 3. Shapes are compared in numbers, since a byte may hold two.
    rows, weights = logical_shape(x), logical_shape(weight)
    axis = -1 if transpose else -2
    if rows[1] != weights[axis]:
        raise ShapeError(
            f"{part}_x holds rows of {rows[1]} numbers and {part}_weight {weight.shape} contracts {weights[axis]}; "
            f"they must agree: set transpose_{part}_weight to match how the weights are stored"
        )
    scheme = Scheme(microscaled=microscaled, x_format=x_format, weight_format=weight_format, hidden=rows[1])
    _check_width(part, scheme)
    _check_scale_shapes(scheme, rows, weights, scales, transpose)
    return Operands(scheme, x, weight, x_scale, weight_scale)


def check_same_kind(grouped: Operands | None, dense: Operands | None) -> None:
    """Raises unless the dense part has scales of the same kind as the grouped part."""
    kinds = [None if operands is None else operands.scheme.microscaled for operands in (grouped, dense)]
    if kinds[0] == kinds[1]:
        return
    words = {None: "without scales", True: "with E8M0 scales", False: "with float32 scales"}
    remedy = "pass scales of the same kind for both, or none"
    if kinds[1] is None:
        raise MissingArgumentError(f"mm_x comes without scales and gmm_x {words[kinds[0]]}; {remedy}")
    raise InvalidArgumentError(f"mm_x comes {words[kinds[1]]} and gmm_x {words[kinds[0]]}; {remedy}")


def read_out_dtype(scaled: Operands | None, out_dtype: Any, x_dtype: Any) -> jnp.dtype:
    """The dtype of the products: the caller's with scales, and ``x_dtype`` without."""
    if scaled is None:
        if out_dtype is not None:
            raise InvalidArgumentError(f"out_dtype={out_dtype!r} needs scales; without, results are like gmm_x")
        return jnp.dtype(x_dtype)
    if out_dtype is None:
        raise MissingArgumentError(f"out_dtype is None; scaled numbers need one of {', '.join(FLOAT_DTYPES)}")
    try:
        name = jnp.dtype(out_dtype).name
    except TypeError:
        name = out_dtype
    check_choice("out_dtype", name, FLOAT_DTYPES)
    return jnp.dtype(name)


def logical_shape(array: Array) -> tuple[int, ...]:
    """The shape in numbers: a byte of e2m1 holds two, side by side along the last axis."""
    packed = str(array.dtype) == "uint8"
    return (*array.shape[:-1], array.shape[-1] * (2 if packed else 1))


def _is_microscaled(scales) -> bool:
    kinds = []
    for name, scale in scales.items():
        dtype = str(scale.dtype)
        if dtype not in ("float32", "uint8", "float8_e8m0fnu"):
            raise DtypeError(f"{name} has dtype {dtype}; expected float32, or E8M0 bytes in uint8 or float8_e8m0fnu")
        kinds.append(dtype != "float32")
    if kinds[0] != kinds[1]:
        (first, a), (second, b) = scales.items()
        raise DtypeError(f"{first} has dtype {a.dtype} and {second} {b.dtype}; both must be float32, or both E8M0")
    return kinds[0]


def _check_width(part, scheme):
    if scheme.x_format == "e2m1" and scheme.hidden % 2:
        raise ShapeError(f"{part}_x has {scheme.hidden} columns; e2m1 rows travel two per byte: pad to an even width")
    if scheme.x_format == "int8" and scheme.hidden > _LONGEST_INT8:
        raise ShapeError(
            f"{part}_x has {scheme.hidden} columns; sums of more than {_LONGEST_INT8} products of int8 may overflow "
            "int32: split the contracted axis"
        )


def _check_scale_shapes(scheme, rows, weights, scales, transpose):
    (x_name, x_scale), (weight_name, weight_scale) = scales.items()
    if not scheme.microscaled:
        check_shape(x_name, x_scale, (1,), "[1]: float32 scales serve a whole operand")
        check_shape(weight_name, weight_scale, (1,), "[1]: float32 scales serve a whole operand")
        return
    pairs = -(-scheme.hidden // 64)
    check_shape(x_name, x_scale, (rows[0], pairs, 2), "[rows, ceil(H / 64), 2]")
    lead, layout = weights[:-2], "e, " if len(weights) == 3 else ""
    if transpose:
        check_shape(weight_name, weight_scale, (*lead, weights[-2], pairs, 2), f"[{layout}N, ceil(H / 64), 2]")
    else:
        check_shape(weight_name, weight_scale, (*lead, pairs, weights[-1], 2), f"[{layout}ceil(H / 64), N, 2]")
