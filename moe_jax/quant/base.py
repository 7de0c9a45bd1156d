"""What all recipes share: rows become values and scales, these become one message of bytes per row, and back again."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax.errors import (
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    check_array,
    check_count,
    check_dtype,
    check_rank,
    check_shape,
)
from moe_jax.quant.formats import Format
from moe_jax.quant.message import Part, join, split

TINY = 2.0**-126  # the smallest normal fp32 number
FLOOR = 2.0**-110  # more than largest * TINY for any format: the most that is lost where subnormals count as zero
_FP32_SLACK = 2.0**-21  # the relative error of a handful of fp32 roundings


@_compat.exportable
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QTensor:
    """Rows of numbers: values times scale, each scale serving a block of consecutive columns.

    Attributes:
      values: [rows, V] of the recipe's ``values_dtype``.
      scale: [rows, S] of the recipe's ``scale_dtype``; S = 0 where no scale travels.
    """

    values: jax.Array
    scale: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How rows [rows, H] of one dtype travel. Static and hashable; get one by name from ``recipe``.

    Attributes:
      name: the name by which ``recipe`` returns it.
      dtype: the dtype of the rows, "float32", "bfloat16" or "float16".
      format: the grid of numbers that codes stand for.
      block: how many columns share a scale; None: the whole row does.
    """

    name: str
    dtype: str
    format: Format
    block: int | None = None

    scale_dtype = "float32"
    takes_smooth = True
    needs_smooth = False

    @property
    def values_dtype(self) -> str:
        """The dtype of ``QTensor.values``."""
        return self.format.dtype

    def values_shape(self, hidden: int) -> tuple[int]:
        """The shape of one row of ``QTensor.values``."""
        check_count("hidden", hidden)
        return (self.format.values_size(hidden),)

    def scale_shape(self, hidden: int) -> tuple[int]:
        """The shape of one row of ``QTensor.scale``."""
        check_count("hidden", hidden)
        return (-(-hidden // (self.block or hidden)),)

    def row_bytes(self, hidden: int) -> int:
        """The length of one packed row."""
        return sum(part.num_bytes for part in self._parts(hidden))

    def quantize(self, x: jax.Array, *, smooth: jax.Array | None = None) -> QTensor:
        """Quantises ``y = fp32(x) * smooth`` as the docstring of the recipe's class says.

        Args:
          x: [rows, H] of ``dtype``.
          smooth: f32, a scalar, [1], [H], [rows, 1] or [rows, H]; None = 1.

        Raises:
          ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError: an argument breaks a rule above, or
            ``smooth`` is given to a recipe that takes none, or missing where one is needed.
        """
        check_rank("x", x, 2, "[rows, H]")
        check_dtype("x", x, (self.dtype,), f"this recipe {self.name!r} was made for rows of that dtype")
        self.values_shape(x.shape[1])  # raises for a width that the format cannot store
        self._check_smooth(x, smooth)
        with jax.named_scope(f"quantize_{self.name}"):
            z, scale = self._scale(to_blocks(self._smoothed(x, smooth), self.block))
            values = self.format.encode(from_blocks(z, x.shape[1]))
            return QTensor(values=values, scale=lax.optimization_barrier(scale))

    def dequantize(self, q: QTensor) -> jax.Array:
        """``values * scale``, [rows, H] f32. It is near ``fp32(x) * smooth``; ``smooth`` is not divided out again."""
        with jax.named_scope(f"dequantize_{self.name}"):
            decoded = self.format.decode(q.values)
            blocks = self._unscale(to_blocks(decoded, self.block), self._block_scale(q.scale, decoded.shape[1]))
            return flush(from_blocks(blocks, decoded.shape[1]))

    def error_bound(self, q: QTensor) -> jax.Array:
        """An upper bound of ``|fp32(x) * smooth - dequantize(q)|`` for each element, [rows, H] f32.

        The bound is ``scale * max(roundoff * |value|, half_step)``, and more where the value saturated. A few fp32
        roundings are added, and 2^-110 for numbers that count as zero, which is enough for |smooth| up to 2^15. Where
        ``dequantize(q)`` is not finite there is no bound: inf. With "int8_static" a NaN cannot be told from a 0.
        """
        decoded = self.format.decode(q.values)
        size = jnp.abs(to_blocks(decoded, self.block))
        factor = self._factor(self._block_scale(q.scale, decoded.shape[1]))
        loss = jnp.maximum(self.format.roundoff * size, self.format.half_step)
        loss = jnp.where(size >= self.format.largest, jnp.maximum(loss, self._saturation_loss()), loss)
        bound = from_blocks(factor * (loss + _FP32_SLACK * size) + FLOOR, decoded.shape[1])
        return jnp.where(jnp.isfinite(self.dequantize(q)), bound, jnp.inf)

    def pack(self, q: QTensor) -> jax.Array:
        """One message per row, [rows, row_bytes] u8: the bytes of the values, then those of the scales."""
        return join([q.values, q.scale])[0]

    def unpack(self, rows: jax.Array, hidden: int) -> QTensor:
        """The inverse of ``pack``, bit by bit, for rows of ``hidden`` columns."""
        check_rank("rows", rows, 2, "[rows, row_bytes]")
        check_dtype("rows", rows, ("uint8",))
        check_shape("rows", rows, (rows.shape[0], self.row_bytes(hidden)), f"[rows, row_bytes({hidden})]")
        values, scale = split(rows, self._parts(hidden))
        return QTensor(values=values, scale=scale)

    def _parts(self, hidden):
        values, scale = self.values_shape(hidden)[0], self.scale_shape(hidden)[0]
        return Part(values, str(self.values_dtype)), Part(scale, str(self.scale_dtype))

    def _check_smooth(self, x, smooth):
        if smooth is None:
            if self.needs_smooth:
                raise MissingArgumentError(f"smooth is missing: {self.name!r} multiplies by a scale that you choose")
            return
        if not self.takes_smooth:
            raise InvalidArgumentError(f"smooth was given, but {self.name!r} takes none; leave it out")
        check_array("smooth", smooth)
        rows, hidden = x.shape
        legal = [(), (1,), (hidden,), (rows, 1), (rows, hidden)]
        if smooth.shape not in legal:
            raise ShapeError(f"smooth has shape {smooth.shape}; expected one of {legal} for x of shape {x.shape}")
        check_dtype("smooth", smooth, ("float32",), "cast it with .astype(jnp.float32)")

    def _smoothed(self, x, smooth):
        y = flush(x.astype(jnp.float32))
        return y if smooth is None else flush(y * flush(smooth))

    def _scale(self, y):
        """y [rows, G, block] f32 -> (the numbers to encode [rows, G, block], the scales as they travel)."""
        raise NotImplementedError

    def _block_scale(self, scale, hidden):
        """The scales of the blocks that have columns, [rows, G, 1]."""
        return scale[:, : -(-hidden // (self.block or hidden)), None]

    def _factor(self, scale):
        return scale.astype(jnp.float32)

    def _unscale(self, decoded, scale):
        return decoded * self._factor(scale)

    def _saturation_loss(self):
        return 0.0


def flush(x: jax.Array) -> jax.Array:
    """fp32 ``x`` with subnormals replaced by zeros of their sign, as on devices that flush subnormals."""
    return jnp.where(jnp.abs(x) < TINY, jnp.copysign(0.0, x), x)


def to_blocks(x: jax.Array, block: int | None) -> jax.Array:
    """[rows, H] -> [rows, G, block]; a short last block is filled up with zeros."""
    rows, hidden = x.shape
    block = block or hidden
    return jnp.pad(x, ((0, 0), (0, -hidden % block))).reshape(rows, -(-hidden // block), block)


def from_blocks(x: jax.Array, hidden: int) -> jax.Array:
    """The inverse of ``to_blocks``: [rows, G, block] -> [rows, hidden]."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2])[:, :hidden]
