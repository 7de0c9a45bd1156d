"""One message for each row: arrays of any dtypes side by side as bytes, so that they travel in one collective."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Part(NamedTuple):
    """The part of each row of a message that one array makes.

    Attributes:
      width: how many numbers it has.
      dtype: the dtype of these numbers.
    """

    width: int
    dtype: str

    @property
    def num_bytes(self) -> int:
        """How many bytes of a row it takes."""
        return -(-self.width // 2) if _is_nibble(self.dtype) else self.width * jnp.dtype(self.dtype).itemsize


_ALONE = Part(-1, "")  # marks the only array of a message, which travels as it is


def join(arrays: Sequence[Array]) -> tuple[Array, tuple[Part, ...]]:
    """Arrays [..., n_i] -> (one message [..., bytes] u8, the ``Part`` of each array). No bit changes on the way."""
    parts = tuple(Part(array.shape[-1], str(array.dtype)) for array in arrays)
    return jnp.concatenate([_to_bytes(array) for array in arrays], axis=-1), parts


def split(message: Array, parts: Sequence[Part]) -> list[Array]:
    """The arrays of a message: the inverse of ``join``."""
    arrays, start = [], 0
    for part in parts:
        arrays.append(_from_bytes(message[..., start : start + part.num_bytes], part.dtype, part.width))
        start += part.num_bytes
    return arrays


def join_some(arrays: Sequence[Array | None]) -> tuple[Any, tuple[Part | None, ...]]:
    """``join`` of those arrays that are not None. A single array is the message itself, in its own dtype.

    Where there is no array, the message is None.
    """
    present = [array for array in arrays if array is not None]
    if not present:
        return None, (None,) * len(arrays)
    message, parts = join(present) if len(present) > 1 else (present[0], [None])
    parts = iter(parts)
    return message, tuple(None if array is None else (next(parts) or _ALONE) for array in arrays)


def split_some(message: Any, parts: Sequence[Part | None]) -> list[Any]:
    """The inverse of ``join_some``."""
    if message is None:
        return [None] * len(parts)
    if _ALONE in parts:
        return [None if part is None else message for part in parts]
    arrays = iter(split(message, [part for part in parts if part is not None]))
    return [None if part is None else next(arrays) for part in parts]


def _is_nibble(dtype) -> bool:
    return jnp.dtype(dtype).name in ("float4_e2m1fn", "int4", "uint4")


def _to_bytes(array: Array) -> Array:
    if _is_nibble(array.dtype):  # two numbers share a byte, the even column in the low half
        codes = lax.bitcast_convert_type(array, jnp.uint4).astype(jnp.uint8)
        codes = jnp.concatenate([codes, codes[..., : codes.shape[-1] % 2]], axis=-1)
        return codes[..., ::2] | codes[..., 1::2] << 4
    parts = lax.bitcast_convert_type(array, jnp.uint8)
    return parts.reshape(*array.shape[:-1], array.shape[-1] * array.dtype.itemsize)


def _from_bytes(message: Array, dtype: str, width: int) -> Array:
    if _is_nibble(dtype):
        codes = jnp.stack([message & 0xF, message >> 4], axis=-1).reshape(*message.shape[:-1], -1)[..., :width]
        return lax.bitcast_convert_type(codes.astype(jnp.uint4), dtype)
    size = jnp.dtype(dtype).itemsize
    parts = message.reshape(*message.shape[:-1], message.shape[-1] // size, size)
    return lax.bitcast_convert_type(parts if size > 1 else parts[..., 0], dtype)
