"""Number formats of quantised values: how an fp32 number becomes a code, and what it may lose on the way."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.errors import ShapeError

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 is the sign


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A grid of numbers. ``encode`` rounds to the nearest one, ties to the even code, and saturates.

    Attributes:
      dtype: the dtype of the stored values.
      largest: the largest finite magnitude. int8 has -128 too, which only saturation reaches.
      largest_exponent: floor(log2(largest)).
      roundoff: half the spacing of the grid, relative to the number; 0 for integers.
      half_step: half the spacing of the grid around zero.
    """

    dtype: str
    largest: float
    largest_exponent: int
    roundoff: float
    half_step: float

    columns_per_value = 1

    def values_size(self, hidden: int) -> int:
        """Stored values per ``hidden`` columns."""
        return hidden // self.columns_per_value

    def encode(self, z: jax.Array) -> jax.Array:
        """z [rows, H] f32 -> [rows, values_size(H)] of ``dtype``; NaN stays NaN where the format has one, else 0."""
        raise NotImplementedError

    def decode(self, values: jax.Array) -> jax.Array:
        """The inverse of ``encode`` on the grid: [rows, H] f32."""
        return values.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(Format):
    """Whole numbers in [-128, 127]."""

    def encode(self, z):
        whole = jnp.clip(lax.round(z, lax.RoundingMethod.TO_NEAREST_EVEN), -128.0, 127.0)
        return jnp.where(jnp.isnan(z), 0.0, whole).astype(jnp.int8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8(Format):
    """e4m3fn or e5m2."""

    def encode(self, z):
        beyond = jnp.abs(z) > self.largest  # not clip: compiled, it may drop NaN
        return jnp.where(beyond, jnp.copysign(self.largest, z), z).astype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float4(Format):
    """e2m1, two numbers per byte, the even column in the low half. Integer logic, so that no 4-bit type is needed."""

    columns_per_value = 2

    def values_size(self, hidden):
        if hidden % 2:
            raise ShapeError(f"hidden={hidden} is odd; two e2m1 values share a byte, so pad the rows to an even width")
        return super().values_size(hidden)

    def encode(self, z):
        magnitude, code = jnp.abs(z), jnp.zeros(z.shape, jnp.uint8)
        for lower, (low, high) in enumerate(itertools.pairwise(_E2M1)):
            middle = (low + high) / 2
            above = magnitude >= middle if lower % 2 else magnitude > middle  # a tie goes to the even code
            code += above.astype(jnp.uint8)
        code = jnp.where(jnp.isnan(z), jnp.uint8(0), code | (jnp.signbit(z).astype(jnp.uint8) << 3))
        pairs = code.reshape(z.shape[0], self.values_size(z.shape[1]), 2)
        return pairs[..., 0] | (pairs[..., 1] << 4)

    def decode(self, values):
        codes = jnp.stack([values & 0xF, values >> 4], axis=-1).reshape(values.shape[0], 2 * values.shape[1])
        grid = jnp.array(_E2M1 + tuple(-v for v in _E2M1), jnp.float32)
        return grid[codes.astype(jnp.int32)]


INT8 = Int8(dtype="int8", largest=127.0, largest_exponent=6, roundoff=0.0, half_step=0.5)
E4M3 = Float8(dtype="float8_e4m3fn", largest=448.0, largest_exponent=8, roundoff=2.0**-4, half_step=2.0**-10)
E5M2 = Float8(dtype="float8_e5m2", largest=57344.0, largest_exponent=15, roundoff=2.0**-3, half_step=2.0**-17)
E2M1 = Float4(dtype="uint8", largest=6.0, largest_exponent=2, roundoff=2.0**-2, half_step=0.25)
