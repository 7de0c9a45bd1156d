"""Quantisation of rows on their way out and back, all rows at once.

The same values as ``moe_jax.reference.quant``, which goes number by number, by another way: codes come from rounding to
a multiple of the spacing at a number's exponent, not from a search. fp32 subnormals count as zero except in "mx_*".
"""

import numpy as np

from moe_jax import errors

_F32 = np.float32
_TINY = _F32(2.0**-126)
# The exponent of the least normal number, mantissa bits, the last finite code.
_FORMATS = {"e4m3": (-6, 3, 0x7E), "e5m2": (-14, 2, 0x7B), "e2m1": (0, 1, 7)}
_LARGEST = {"int8": _F32(127), "e4m3": _F32(448), "e5m2": _F32(57344), "e2m1": _F32(6)}
_LARGEST_EXPONENT = {"e4m3": 8, "e5m2": 15, "e2m1": 2}
_NAN = {"e4m3": 0x7F, "e5m2": 0x7E, "e2m1": 0}
_BLOCKS = {"group128": 128, "mx": 32, "group8": 8}
_Y_DTYPES = {"int8": "int8", "float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2", "float4_e2m1fn": "fp4_e2m1"}
_MODES = {
    1: {"int8": "int8_static"},
    2: {"int8": "int8", "fp8_e4m3": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"},
    3: {"fp8_e4m3": "fp8_e4m3_group128", "fp8_e5m2": "fp8_e5m2_group128"},
    4: {"fp8_e4m3": "mx_e4m3", "fp8_e5m2": "mx_e5m2", "fp4_e2m1": "mx_e2m1"},
    5: {"fp8_e4m3": "mx_clip_e4m3", "fp8_e5m2": "mx_clip_e5m2"},
}
COMBINE_RECIPES = {0: None, 2: "int8_group8", 3: "mx_e5m2", 4: "mx_e4m3"}


def dispatch_recipe(quant_mode: int, y_dtype: str | None) -> str | None:
    """The recipe behind ``quant_mode`` and the dtype of expand_x; None for mode 0, int8 for ``y_dtype=None``.

    Raises:
      InvalidArgumentError: no product has that combination.

    >>> dispatch_recipe(3, "float8_e5m2")
    'fp8_e5m2_group128'
    """
    if quant_mode == 0 and y_dtype is None:
        return None
    kind = _Y_DTYPES.get("int8" if y_dtype is None else y_dtype)
    if kind not in _MODES.get(quant_mode, {}):
        raise errors.InvalidArgumentError(f"{quant_mode=} has no {y_dtype=}; the modes are {_MODES}")
    return _MODES[quant_mode][kind]


def quantize(name: str, x: np.ndarray, *, smooth: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(values, scale) of rows x [rows, H], as ``moe_jax.reference.quant.quantize`` has them; smooth f32 [rows, H].

    >>> quantize("int8", np.array([[127.0, -63.5, 2.5]], np.float32))
    (array([[127, -64,   2]], dtype=int8), array([[1.]], dtype=float32))
    """
    rows, hidden = x.shape
    target, block = _parse(name, hidden)
    y = x.astype(_F32)
    if not name.startswith("mx") or "clip" in name:
        y = _flush(y)
    if smooth is not None:
        y = _flush(y * _flush(smooth))
    y = np.pad(y, ((0, 0), (0, -hidden % block))).reshape(rows, -(-hidden // block), block)
    with np.errstate(all="ignore"):
        z, scale = _scaled(name, target, y, x.dtype)
        codes = _encode(target, z).reshape(rows, z.shape[1] * z.shape[2])[:, :hidden]
    if name.startswith("mx"):
        scale = np.pad(scale, ((0, 0), (0, scale.shape[1] % 2)))
    return (codes[:, 0::2] | codes[:, 1::2] << 4 if target == "e2m1" else codes), scale


def dequantize(name: str, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """values * scale, [rows, H] f32. The arguments are what ``quantize`` returned."""
    target, block = _parse(name, values.shape[1] * (2 if "e2m1" in name else 1))
    if target == "e2m1":
        values = np.stack([values & 0xF, values >> 4], axis=-1).reshape(len(values), 2 * values.shape[1])
    numbers = _decode(target, values)
    if name == "int8_static":
        return numbers.astype(_F32)
    scale = np.repeat(scale, block, axis=1)[:, : numbers.shape[1]]
    with np.errstate(all="ignore"):
        if name.startswith("mx"):
            product = np.where(scale == 255, np.nan, numbers * 2.0 ** (scale.astype(int) - 127)).astype(_F32)
        else:
            product = numbers.astype(_F32) * scale.astype(_F32)
        if name == "int8_group8":
            product = product.astype(scale.dtype).astype(_F32)  # the receiver's rounding
    return _flush(product)


def _parse(name, hidden):
    """The number format and the columns per scale of a recipe."""
    target = next((part for part in name.split("_") if part in _FORMATS), "int8")
    return target, next((_BLOCKS[part] for part in name.split("_") if part in _BLOCKS), max(hidden, 1))


def _scaled(name, target, y, dtype):
    """The numbers to encode, as y [rows, G, block] f32, and the scales [rows, G] as they travel."""
    if name == "int8_static":
        return y, np.zeros((len(y), 0), _F32)
    if name.startswith("mx"):
        return _microscaled(target, y, clip="clip" in name)
    largest, amax = _LARGEST[target], np.abs(y).max(axis=-1, keepdims=True)
    multiplier = largest / amax
    reciprocal = amax * (_F32(1.0) / largest)
    if name == "int8_group8":
        dead = reciprocal < _TINY
        z = np.where(dead, 0.0, (y / reciprocal).astype(np.float16).astype(_F32))
        return z, np.where(dead, _F32(0.0), reciprocal)[..., 0].astype(dtype)
    scale = reciprocal if name.endswith("group128") else _F32(1.0) / multiplier
    dead = scale < _TINY  # false for NaN
    return y * np.where(dead, _F32(0.0), multiplier), np.where(dead, _F32(0.0), scale)[..., 0]


def _microscaled(target, y, *, clip):
    if clip:
        v = np.maximum(np.abs(y).max(axis=-1, keepdims=True), _F32(1e-4)) * (_F32(1.0) / _LARGEST[target])
        bits = v.view(np.uint32).astype(np.int64)
        top = bits >> 23 & 0xFF
        s = top + ((bits & 0x7FFFFF) > 0)
    else:
        top = (y.view(np.uint32).astype(np.int64) >> 23 & 0xFF).max(axis=-1, keepdims=True)
        s = np.maximum(top - _LARGEST_EXPONENT[target], 0)
    z = np.where(top == 0, 0.0, y.astype(np.float64) * 2.0 ** (127.0 - s))
    return np.where(top == 255, np.nan, z), np.where(top == 255, 255, s)[..., 0].astype(np.uint8)


def _encode(target, z):
    """The codes of the nearest numbers, ties to the even code, beyond the ends the end."""
    if target == "int8":
        return np.where(np.isnan(z), 0, np.clip(np.rint(z), -128, 127)).astype(np.int8)
    least, mantissa_bits, last = _FORMATS[target]
    size = np.where(np.isnan(z), 0.0, np.minimum(np.abs(z.astype(np.float64)), float(_LARGEST[target])))
    exponent = np.frexp(np.maximum(size, 2.0**least))[1] - 1
    steps = np.rint(size * 2.0 ** (mantissa_bits - exponent))  # NumPy rounds ties to even
    code = np.minimum(((exponent - least) << mantissa_bits) + steps.astype(np.int64), last)
    code |= np.signbit(z).astype(np.int64) * (8 if target == "e2m1" else 128)
    return np.where(np.isnan(z), _NAN[target], code).astype(np.uint8)


def _decode(target, codes):
    if target == "int8":
        return codes.astype(np.float64)
    least, mantissa_bits, last = _FORMATS[target]
    half = 8 if target == "e2m1" else 128
    size = codes.astype(np.int64) & (half - 1)
    exponent, mantissa = size >> mantissa_bits, size & (2**mantissa_bits - 1)
    mantissa = mantissa + np.where(exponent > 0, 2**mantissa_bits, 0)
    number = mantissa * 2.0 ** (np.maximum(exponent, 1) - 1 + least - mantissa_bits)
    return np.where(size > last, np.nan, np.where(codes & half, -number, number))


def _flush(v):
    """fp32 subnormals become zeros of their sign."""
    return np.where(np.abs(v) < _TINY, np.copysign(_F32(0.0), v), v).astype(_F32)
