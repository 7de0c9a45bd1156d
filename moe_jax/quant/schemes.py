"""The recipes: how the scale of a block follows from the numbers in it, and the names of the recipes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax import _compat
from moe_jax.errors import check_choice, check_count
from moe_jax.quant.base import FLOOR, TINY, Recipe, from_blocks, to_blocks
from moe_jax.quant.formats import E2M1, E4M3, E5M2, INT8

_LEAST_AMAX = np.float32(1e-4)  # ``MicroscaledClip`` takes the largest magnitude of a block to be at least this


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Static(Recipe):
    """``q = saturate(rint(y))`` with ``y = fp32(x) * smooth``: the caller chooses the scale, and none travels.

    Ties go to the even code; NaN becomes 0. ``dequantize`` returns about y, and the receiver, which knows the scale,
    divides by it. Inside [-127, 127] the error of y is at most half a unit. Outside, values saturate, and there is no
    bound.
    """

    needs_smooth = True

    def scale_shape(self, hidden):
        check_count("hidden", hidden)
        return (0,)

    def _scale(self, y):
        return y, jnp.zeros((y.shape[0], 0), jnp.float32)

    def _block_scale(self, scale, hidden):
        return jnp.ones((scale.shape[0], 1, 1), jnp.float32)

    def _saturation_loss(self):
        return jnp.inf


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class PerToken(Recipe):
    """``m = largest / amax|y|``, ``q = round(y * m)``, ``scale = 1 / m``: one scale per row, each step in fp32.

    The scale is the reciprocal of m, not amax / largest. Ties go to the even code. A row of zeros, or one whose scale
    would be subnormal, becomes zeros with scale 0. A row with NaN or inf comes back as NaN in every column. The error
    is at most scale / 2 for int8. For fp8 it is the relative roundoff of the format (1/16 for e4m3, 1/8 for e5m2) times
    the number, or scale * half_step if that is more.
    """

    def _scale(self, y):
        amax = _amax(y)
        # Without the barrier XLA rewrites 1 / (c / amax) to amax / c, which rounds differently.
        multiplier = lax.optimization_barrier(self.format.largest / amax)
        return _apply(y, multiplier, 1.0 / multiplier)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class PerGroup(Recipe):
    """``m_g = largest / amax_g``, ``q = round(y * m_g)``, ``scale_g = amax_g * fp32(1 / largest)`` by column groups.

    The last group may be short. Rounding, zeros, NaN and the error are those of ``PerToken``, group by group.
    """

    def _scale(self, y):
        amax = _amax(y)
        multiplier = lax.optimization_barrier(self.format.largest / amax)
        return _apply(y, multiplier, amax * _reciprocal(self.format.largest))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Microscaled(Recipe):
    """OCP microscaling: blocks of 32 columns share a power of two, ``q = round(x * 2^(127-s))``, s a byte (E8M0).

    ``s = max(e - largest_exponent, 0)``, where e is the largest biased fp32 exponent of the block. This is the *floor*
    rule: a number may exceed the largest one of the format, and then it saturates. The product is exact, and ties go to
    the even code. A block of zeros and subnormals becomes zeros with s = 0. A block with NaN or inf gets s = 255, and
    comes back as NaN. The bytes of the scales are padded with 0 to an even number. The error is the relative roundoff
    of the format times the number, or 2^(s-127) * half_step if that is more; for numbers that saturate it is at most
    2^(s-127) * (2^(largest_exponent + 1) - largest).
    """

    scale_dtype = "uint8"
    takes_smooth = False

    def scale_shape(self, hidden):
        blocks = super().scale_shape(hidden)[0]
        return (blocks + blocks % 2,)

    def _smoothed(self, x, smooth):
        if x.dtype == jnp.bfloat16:  # widened by its bits, since a conversion of floats may flush subnormals
            bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
            return lax.bitcast_convert_type(bits, jnp.float32)
        return x.astype(jnp.float32)  # a subnormal fp16 number is a normal fp32 one

    def _scale(self, y):
        exponent, mantissa = _exponent_and_mantissa(y)
        block_exponent = jnp.max(exponent, axis=-1, keepdims=True)
        s = jnp.maximum(block_exponent - self.format.largest_exponent, 0)
        normal = y * _power_of_two(127 - s)
        # An fp32 subnormal is mantissa * 2^-149; from s = 127 on it rounds to zero in any case.
        below = jnp.copysign(mantissa.astype(jnp.float32) * 2.0**-22 * _power_of_two(-jnp.minimum(s, 126)), y)
        z = jnp.where(exponent == 0, below, normal)
        z = jnp.where(block_exponent == 0, 0.0, z)
        return self._finish(z, s, block_exponent == 255)

    def _finish(self, z, s, broken):
        z, s = jnp.where(broken, jnp.nan, z), jnp.where(broken, 255, s)[..., 0].astype(jnp.uint8)
        return z, jnp.pad(s, ((0, 0), (0, s.shape[1] % 2)))

    def _factor(self, scale):
        """2^(s-127), but 2^-126 for s = 0, since 2^-127 is subnormal."""
        s = scale.astype(jnp.int32)
        return jnp.where(s == 255, jnp.nan, _power_of_two(jnp.clip(s, 1, 254) - 127))

    def _unscale(self, decoded, scale):
        return decoded * jnp.where(scale == 0, 0.5, 1.0) * self._factor(scale)  # 2^-127 itself is subnormal

    def _saturation_loss(self):
        return 2.0 ** (self.format.largest_exponent + 1) - self.format.largest


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroscaledClip(Microscaled):
    """``Microscaled`` with a scale that leaves room: ``2^(s-127)`` is the power of two at or above amax / largest.

    ``v = max(amax, 1e-4) * fp32(1 / largest)`` in fp32; s is the biased exponent of v, plus 1 if v is not a power of
    two. So a block of zeros has the same scale as a block with amax = 1e-4. A block with NaN or inf has s = 255.
    Nothing saturates by more than a rounding. The error is the relative roundoff of the format times the number, or
    2^(s-127) * half_step if that is more.
    """

    def _scale(self, y):
        amax = _amax(y)
        amax = jnp.where(amax < _LEAST_AMAX, _LEAST_AMAX, amax)  # unlike maximum, keeps NaN on every back end
        exponent, mantissa = _exponent_and_mantissa(amax * _reciprocal(self.format.largest))
        s = exponent + (mantissa > 0)  # v is normal: amax is at least 1e-4
        broken = exponent == 255
        return self._finish(y * _power_of_two(127 - jnp.where(broken, 127, s)), s, broken)

    def _saturation_loss(self):
        return 0.0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedScale(Recipe):
    """``s = amax * fp32(1/127)``, ``q = rint(fp16(x / s))`` by groups of columns; what travels is ``dtype(s)``.

    Numbers are divided by s as it is before it is rounded to ``dtype``. The quotient is rounded to fp16 and then to an
    integer, both with ties to even. The receiver gets ``dtype(q * fp32(dtype(s)))``. A group of zeros, or one whose s
    is subnormal in fp32, becomes zeros. A group with NaN or inf comes back as NaN. In fp16, numbers near the largest
    one may come back as inf. The error is at most scale * (1/2 + 1/32), plus the roundings of scale and value to the
    dtype of the rows, each of which is at most |value| * roundoff(dtype).
    """

    takes_smooth = False

    @property
    def scale_dtype(self):
        return self.dtype

    def _scale(self, y):
        amax = _amax(y)
        scale = lax.optimization_barrier(amax * _reciprocal(127.0))
        dead = scale < TINY
        quotient = jnp.where(dead, 0.0, y / jnp.where(dead, 1.0, scale))
        half = lax.reduce_precision(quotient, exponent_bits=5, mantissa_bits=10)
        return half, jnp.where(dead, 0.0, scale)[..., 0].astype(self.dtype)

    def _unscale(self, decoded, scale):
        # The barrier keeps XLA from dropping the narrow type between two wide ones.
        narrow = lax.optimization_barrier((decoded * scale.astype(jnp.float32)).astype(self.dtype))
        return narrow.astype(jnp.float32)

    def error_bound(self, q):
        size, scale = (
            jnp.abs(to_blocks(self.format.decode(q.values), self.block)),
            q.scale.astype(jnp.float32)[..., None],
        )
        roundoff = float(jnp.finfo(self.dtype).eps) / 2
        floor = 2.0**-25 if self.dtype == "float16" else FLOOR  # half of the smallest fp16 number above 0
        unrounded = scale * (1 + 2 * roundoff) + floor  # the scale before it was rounded is at most this
        bound = unrounded * (0.5 + 2.0**-5 + 2.0**-14) + size * (unrounded - scale) + size * scale * roundoff + floor
        return jnp.where(jnp.isfinite(self.dequantize(q)), from_blocks(bound, q.values.shape[1]), jnp.inf)


_RECIPES: dict[str, Callable[..., Recipe]] = {
    "int8_static": lambda **kw: Static(format=INT8, **kw),
    "int8": lambda **kw: PerToken(format=INT8, **kw),
    "fp8_e4m3": lambda **kw: PerToken(format=E4M3, **kw),
    "fp8_e5m2": lambda **kw: PerToken(format=E5M2, **kw),
    "fp8_e4m3_group128": lambda **kw: PerGroup(format=E4M3, block=128, **kw),
    "fp8_e5m2_group128": lambda **kw: PerGroup(format=E5M2, block=128, **kw),
    "mx_e4m3": lambda **kw: Microscaled(format=E4M3, block=32, **kw),
    "mx_e5m2": lambda **kw: Microscaled(format=E5M2, block=32, **kw),
    "mx_e2m1": lambda **kw: Microscaled(format=E2M1, block=32, **kw),
    "mx_clip_e4m3": lambda **kw: MicroscaledClip(format=E4M3, block=32, **kw),
    "mx_clip_e5m2": lambda **kw: MicroscaledClip(format=E5M2, block=32, **kw),
    "int8_group8": lambda **kw: RoundedScale(format=INT8, block=8, **kw),
}
NAMES = ("none", *_RECIPES)
DTYPES = ("float32", "bfloat16", "float16")
for _scheme in (Static, PerToken, PerGroup, Microscaled, MicroscaledClip, RoundedScale):
    _compat.exportable(_scheme, to_json=lambda r: [r.name, r.dtype], from_json=lambda words: named_recipe(*words))


def recipe(name: str, dtype: str) -> Recipe | None:
    """The recipe called ``name`` for rows of ``dtype``; None for "none", which leaves rows as they are.

    | name                               | values          | one scale per        | scheme              |
    |------------------------------------|-----------------|----------------------|---------------------|
    | int8_static                        | int8            | none travels         | ``Static``          |
    | int8, fp8_e4m3, fp8_e5m2           | int8, fp8       | row: f32             | ``PerToken``        |
    | fp8_e4m3_group128, fp8_e5m2_...    | fp8             | 128 columns: f32     | ``PerGroup``        |
    | mx_e4m3, mx_e5m2, mx_e2m1          | fp8, fp4 pairs  | 32 columns: u8       | ``Microscaled``     |
    | mx_clip_e4m3, mx_clip_e5m2         | fp8             | 32 columns: u8       | ``MicroscaledClip`` |
    | int8_group8                        | int8            | 8 columns: ``dtype`` | ``RoundedScale``    |

    Args:
      name: one of ``NAMES``.
      dtype: "float32", "bfloat16" or "float16".

    Raises:
      InvalidArgumentError: the name or the dtype is unknown.

    >>> from moe_jax import quant
    >>> quant.recipe("int8", "bfloat16").row_bytes(7168)
    7172
    """
    check_choice("name", name, NAMES)
    if name != "none":
        return named_recipe(name, dtype)
    check_choice("dtype", dtype, DTYPES)
    return None


def named_recipe(name: str, dtype: str) -> Recipe:
    """``recipe`` for a name that is not "none"."""
    check_choice("name", name, tuple(_RECIPES))
    check_choice("dtype", dtype, DTYPES)
    return _RECIPES[name](name=name, dtype=dtype)


def _amax(y):
    """max |y| of every block, [rows, G, 1]; NaN for a block that holds a NaN.

    The maximum is taken over the bits as integers. They order non-negative floats and put NaN above all others, while a
    compiled maximum of floats may drop NaN.
    """
    magnitude = lax.bitcast_convert_type(y, jnp.int32) & 0x7FFFFFFF
    return lax.bitcast_convert_type(jnp.max(magnitude, axis=-1, keepdims=True), jnp.float32)


def _apply(y, multiplier, scale):
    """The numbers to encode and the scales; a block whose scale would be subnormal becomes zeros with scale 0."""
    dead = scale < TINY  # false for NaN: such a block keeps its NaN
    return y * jnp.where(dead, 0.0, multiplier), jnp.where(dead, 0.0, scale)[..., 0]


def _reciprocal(largest):
    return np.float32(1.0) / np.float32(largest)


def _exponent_and_mantissa(x):
    """The biased exponent and the mantissa field of fp32 numbers, both i32."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return (bits >> 23) & 0xFF, bits & 0x7FFFFF


def _power_of_two(exponent):
    """2^exponent for i32 in [-126, 127]. It is made of bits, so that it is exact on every device."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
