"""Wire quantisation, block by block and number by number.

Values are int8 codes, the bytes of fp8 codes, or bytes that hold two e2m1 codes (the even column in the low nibble).
A format is built from its definition, as the list of the magnitudes of all its codes, and encoding is a search for the
nearest. fp32 arithmetic is NumPy's, one rounding per operation; fp32 subnormals count as zero except inside "mx_*".

Sources: the quantisation of moe_distribute_dispatch and moe_distribute_combine; OCP Microscaling Formats, version 1.0.
"""

import numpy as np

from moe_jax import errors

_F32 = np.float32
_TINY = 2.0**-126


def _floating_grid(exponent_bits: int, mantissa_bits: int, num_codes: int) -> np.ndarray:
    """Magnitudes of the codes 0 .. num_codes - 1 of a sign-exponent-mantissa format."""
    bias, grid = 2 ** (exponent_bits - 1) - 1, []
    for code in range(num_codes):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        whole = mantissa + (2**mantissa_bits if exponent else 0)
        grid.append(whole * 2.0 ** (max(exponent, 1) - bias - mantissa_bits))
    return np.array(grid)


_GRIDS = {
    "e4m3": _floating_grid(4, 3, 0x7F),  # 0x7F is NaN
    "e5m2": _floating_grid(5, 2, 0x7C),  # 0x7C is inf
    "e2m1": _floating_grid(2, 1, 8),
}
_BLOCKS = {"group128": 128, "mx": 32, "group8": 8}


def quantize(name: str, x: np.ndarray, *, smooth: np.ndarray | float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Quantises rows: returns their values and their scales.

    Args:
      name: a name of ``moe_jax.quant.NAMES`` other than "none".
      x: [rows, H] float32, bfloat16 or float16.
      smooth: f32 that broadcasts to x; None = 1.

    Returns:
      (values, scale): values [rows, H] i8 or u8, or [rows, H / 2] u8 for e2m1; scale [rows, S] f32, u8 ("mx_*") or
      like x ("int8_group8"); S = 0 for "int8_static".

    >>> import numpy as np
    >>> from moe_jax.reference.quant import quantize
    >>> quantize("int8", np.array([[127.0, -63.5, 2.5]], np.float32))
    (array([[127, -64,   2]], dtype=int8), array([[1.]], dtype=float32))
    """
    target, block = _parse(name, x.shape[1])
    factors = np.broadcast_to(_F32(1.0) if smooth is None else smooth, x.shape)
    values, scales = [], []
    with np.errstate(all="ignore"):
        for row, factor in zip(x, factors, strict=True):
            starts = range(0, len(row), block)
            parts = [_quantize_block(name, target, row[i : i + block], factor[i : i + block]) for i in starts]
            values.append([code for codes, _ in parts for code in codes])
            scales.append([scale for _, scale in parts if scale is not None])
    return _stored(name, target, values), _scales(name, x, scales)


def dequantize(name: str, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """values * scale, [rows, H] f32: about ``x * smooth``. The arguments are what ``quantize`` returned."""
    target = _parse(name, 1)[0]
    if target == "e2m1":
        values = np.stack([values & 0xF, values >> 4], axis=-1).reshape(len(values), -1)
    block = _parse(name, values.shape[1])[1]
    result = np.zeros(values.shape, np.float32)
    with np.errstate(all="ignore"):
        for t, h in np.ndindex(*values.shape):
            value = number(target, int(values[t, h]))
            result[t, h] = _flush(_undo(name, value, scale[t, h // block] if scale.shape[1] else None))
    return result


def _parse(name: str, hidden: int) -> tuple[str, int]:
    """The number format and the columns per scale of a recipe."""
    target = next((part for part in name.split("_") if part in _GRIDS), "int8")
    block = next((_BLOCKS[part] for part in name.split("_") if part in _BLOCKS), hidden)
    return target, block


def _largest(target: str) -> float:
    return 127.0 if target == "int8" else float(_GRIDS[target][-1])


def _quantize_block(name, target, x, smooth):
    """The codes of one block, and its scale, which is None where no scale travels."""
    if name.startswith("mx_clip"):
        return _microscale_clip(target, x)
    if name.startswith("mx"):
        return _microscale(target, x)
    y = [_flush(_flush(_F32(v)) * _flush(_F32(s))) for v, s in zip(x, smooth, strict=True)]
    if name == "int8_static":
        return [_encode(target, v) for v in y], None
    amax, largest = np.max(np.abs(y)), _F32(_largest(target))
    if name == "int8_group8":
        scale = amax * (_F32(1.0) / largest)
        if scale < _TINY:
            return [0] * len(y), x.dtype.type(0.0)
        return [_encode(target, _F32(np.float16(v / scale))) for v in y], scale.astype(x.dtype)
    multiplier = largest / amax
    scale = amax * (_F32(1.0) / largest) if name.endswith("group128") else _F32(1.0) / multiplier
    if scale < _TINY:
        multiplier, scale = _F32(0.0), _F32(0.0)
    return [_encode(target, v * multiplier) for v in y], scale


def _microscale(target, x):
    """The codes and the scale of a block by the floor rule. Exponents are read off bits; float64 products are exact."""
    exponents = [int(np.float32(v).view(np.uint32)) >> 23 & 0xFF for v in x]
    top = max(exponents)
    if top == 255:
        return [_encode(target, np.nan)] * len(x), 255
    if top == 0:
        return [0] * len(x), 0
    s = max(top - int(np.log2(_largest(target))), 0)
    return [_encode(target, float(v) * 2.0 ** (127 - s)) for v in x], s


def _microscale_clip(target, x):
    """The codes and the scale of one block by the rule that rounds the exponent of amax / largest up."""
    amax = np.max(np.abs(x.astype(np.float32)))
    if not np.isfinite(amax):
        return [_encode(target, np.nan)] * len(x), 255
    v = max(amax, _F32(1e-4)) * (_F32(1.0) / _F32(_largest(target)))
    mantissa, exponent = np.frexp(v)  # v = mantissa * 2^exponent with mantissa in [1/2, 1)
    s = int(exponent) - 1 + 127 + (mantissa > 0.5)
    return [_encode(target, float(_flush(_F32(v))) * 2.0 ** (127 - s)) for v in x], s


def _encode(target: str, z: float | np.floating) -> int:
    """The code of the number nearest to ``z``. Ties go to the even code, and numbers beyond the grid to its end."""
    z = float(z)
    if target == "int8":
        return 0 if np.isnan(z) else int(np.clip(np.rint(z), -128, 127))
    if np.isnan(z):
        return {"e4m3": 0x7F, "e5m2": 0x7E, "e2m1": 0}[target]
    grid, sign = _GRIDS[target], int(np.signbit(z)) * (8 if target == "e2m1" else 128)
    z = min(abs(z), grid[-1])
    above = int(np.searchsorted(grid, z))
    if grid[above] == z:
        return sign | above
    middle = (grid[above - 1] + grid[above]) / 2
    up = z > middle or (z == middle and above % 2 == 0)
    return sign | (above if up else above - 1)


def number(target: str, code: int) -> float:
    """What a code of "int8", "e4m3", "e5m2" or "e2m1" stands for."""
    if target == "int8":
        return float(code)
    half = 8 if target == "e2m1" else 128
    grid, sign = _GRIDS[target], -1.0 if code & half else 1.0
    magnitude = code & (half - 1)
    return sign * grid[magnitude] if magnitude < len(grid) else np.nan


def _undo(name, value, scale):
    if scale is None:
        return _F32(value)
    if name.startswith("mx"):
        return _F32(np.nan) if scale == 255 else _F32(value * 2.0 ** (int(scale) - 127))
    product = _F32(value) * _F32(scale)
    return _F32(product.astype(scale.dtype)) if name == "int8_group8" else product


def _flush(v):
    """fp32 subnormals become zeros of their sign."""
    return np.copysign(_F32(0.0), v) if abs(v) < _TINY else v


def _stored(name, target, values):
    codes = np.array(values, np.int8 if target == "int8" else np.uint8)
    if target != "e2m1":
        return codes
    if codes.shape[1] % 2:
        raise errors.ShapeError(f"x has {codes.shape[1]} columns, but {name!r} stores two values per byte: pad it")
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _scales(name, x, scales):
    if name.startswith("mx"):
        scales = [row + [0] * (len(row) % 2) for row in scales]
        return np.array(scales, np.uint8)
    return np.array(scales, x.dtype if name == "int8_group8" else np.float32).reshape(len(x), -1 if len(x) else 0)
