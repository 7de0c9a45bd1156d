"""Tensors that files keep quantised, and what they stand for: two forms that released models with experts have.

- "fp8" (DeepSeek-V3, Kimi K2, MiniMax-M2, Qwen3-FP8 and others): X in e4m3, and X_scale_inv with a factor for every
  block of ``weight_block_size``, [128, 128] mostly, of its last two axes; ``x = code * factor``.
- "mxfp4" (gpt-oss): X_blocks [..., R, G, 16] u8 and X_scales [..., R, G] u8 in place of X [..., 32 G, R]. A byte has
  two numbers in e2m1, the first one in its low half, and each 32 numbers share a power of two, ``2 ** (scale - 127)``.

Both are read as bf16, as transformers reads them for itself.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from moe_jax.errors import CheckpointError

READ_AS = "BF16"  # as safetensors names it
_FACTORS = ("F32", "BF16", "F16")  # of blocks in fp8; the bytes of other dtypes are not the factors themselves
# By code; the other eight are the same with a minus.
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_E2M1 = np.concatenate([_E2M1, -_E2M1])

Index = tuple[slice, ...]


class Stored(Protocol):
    """What holds the tensors as the files have them."""

    def stored(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape of a tensor, and its dtype as safetensors names it."""
        ...

    def part(self, name: str, index: Index) -> np.ndarray:
        """A part of a tensor; numbers of 8 bits as u8."""
        ...


class Quantised(Protocol):
    """A tensor that others stand for."""

    def shape(self, files: Stored) -> tuple[int, ...]:
        """Its own shape.

        Raises:
          CheckpointError: what stands for it has another dtype, or shapes that do not fit each other.
        """
        ...

    def read(self, files: Stored, index: Index) -> np.ndarray:
        """A part of it in bf16, for which no other numbers are read but those that share a factor with it."""
        ...


@dataclasses.dataclass(frozen=True)
class Blocks8:
    """e4m3, with a factor for each block of the last two axes.

    Attributes:
      codes, factors: the names of two tensors in the files.
      block: the extents of a block.
    """

    codes: str
    factors: str
    block: tuple[int, int]

    def shape(self, files: Stored) -> tuple[int, ...]:
        (shape, dtype), (found, kind) = files.stored(self.codes), files.stored(self.factors)
        expected = (*shape[:-2], *(-(-extent // size) for extent, size in zip(shape[-2:], self.block, strict=True)))
        if dtype != "F8_E4M3" or len(shape) < 2 or found != expected or kind not in _FACTORS:
            raise CheckpointError(
                f"{self.codes!r} is {dtype} {shape}, and {self.factors!r} is {kind} {found}; expected F8_E4M3, and a "
                f"factor ({', '.join(_FACTORS)}) for each block of {list(self.block)}, {expected}; fetch them again, "
                "or read a copy in bf16"
            )
        return shape

    def read(self, files: Stored, index: Index) -> np.ndarray:
        # 1. The codes, and the factors of all blocks that they lie in.
        codes = files.part(self.codes, index).view(jnp.float8_e4m3fn).astype(np.float32)
        blocks = tuple(
            slice(each.start // size, -(-each.stop // size)) for each, size in zip(index[-2:], self.block, strict=True)
        )
        factors = files.part(self.factors, (*index[:-2], *blocks)).astype(np.float32)
        # 2. Which of those blocks each row and each column lies in.
        rows, columns = (
            np.arange(each.start, each.stop) // size - cut.start
            for each, size, cut in zip(index[-2:], self.block, blocks, strict=True)
        )
        return (codes * factors[..., rows[:, None], columns]).astype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Microscaled4:
    """e2m1, 32 along the last axis but one with a power of two; the files have the last two axes in the other order.

    Attributes:
      codes, exponents: the names of two tensors in the files, two codes to a byte, and an exponent for each 32 of them.
    """

    codes: str
    exponents: str

    def shape(self, files: Stored) -> tuple[int, ...]:
        (shape, dtype), exponents = files.stored(self.codes), files.stored(self.exponents)
        if dtype != "U8" or len(shape) < 3 or exponents != (shape[:-1], "U8"):
            raise CheckpointError(
                f"{self.codes!r} is {dtype} {shape}, and {self.exponents!r} is {exponents[1]} {exponents[0]}; expected "
                "U8 [..., R, G, 16], and an exponent for each group, U8 [..., R, G]; fetch the files again"
            )
        *lead, rows, groups, width = shape
        return (*lead, groups * width * 2, rows)

    def read(self, files: Stored, index: Index) -> np.ndarray:
        *lead, columns, rows = index
        size = 2 * files.stored(self.codes)[0][-1]
        # 1. The groups that the columns lie in: codes [..., R, G, 16] and exponents [..., R, G].
        groups = slice(columns.start // size, -(-columns.stop // size))
        codes = files.part(self.codes, (*lead, rows, groups, slice(None)))
        exponents = files.part(self.exponents, (*lead, rows, groups)).astype(np.int32) - 127
        # 2. Two numbers of each byte, side by side: [..., R, G, 32], and in a line: [..., R, 32 G].
        numbers = np.ldexp(_E2M1[np.stack([codes & 15, codes >> 4], -1)], exponents[..., None, None])
        numbers = numbers.reshape(*numbers.shape[:-3], math.prod(numbers.shape[-3:]))
        # 3. The columns that were asked for, before the rows.
        start = groups.start * size
        wanted = numbers[..., columns.start - start : columns.stop - start]
        return np.swapaxes(wanted, -1, -2).astype(jnp.bfloat16)


def find_quantised(names: Iterable[str], said: Mapping[str, Any]) -> dict[str, tuple[Quantised, tuple[str, ...]]]:
    """Each tensor that others stand for, by its name, and which those are.

    ``said``: what config.json says under "quantization_config"; {} where it says nothing. What has another form is not
    found, and is refused as tensors that have no place.
    """
    known, method, block = set(names), said.get("quant_method"), said.get("weight_block_size")
    found: dict[str, tuple[Quantised, tuple[str, ...]]] = {}
    if method == "fp8" and block and len(block) == 2:
        for factors in (name for name in known if name.endswith("_scale_inv")):
            name = factors.removesuffix("_scale_inv")
            if name in known:
                found[name] = Blocks8(name, factors, (int(block[0]), int(block[1]))), (name, factors)
    if method == "mxfp4":
        for codes in (name for name in known if name.endswith("_blocks")):
            name = codes.removesuffix("_blocks")
            if (exponents := f"{name}_scales") in known:
                found[name] = Microscaled4(codes, exponents), (codes, exponents)
    return found
