"""Rows travel between ranks bit by bit.

XLA:CPU would widen 16-bit floats for a collective, and move twice the bytes. So in programs for CPUs, and only in
those, they travel as integers.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax.derivatives import custom_gradient, poison_of

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

Array = jax.Array


def swap_bits(axes: tuple[str, ...], blocks: Array) -> Array:
    """``swap_blocks`` without a derivative, for functions that have a derivative of their own."""
    swap = functools.partial(lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0)
    return lax.platform_dependent(blocks, cpu=_as_integers(swap), default=swap) if _is_widened(blocks) else swap(blocks)


@functools.partial(custom_gradient, num_static=1)
def swap_blocks(axes: tuple[str, ...], blocks: Array) -> Array:
    """[W, ...]: block j goes to rank j along ``axes``; block i of the result came from rank i."""
    return swap_bits(axes, blocks)


# d_blocks[j] = ct[j], sent back by the rank that block j went to    # [W, ...]: the exchange is its own adjoint
swap_blocks.defvjp(lambda axes, blocks: (swap_blocks(axes, blocks), None), lambda axes, _, ct: (swap_blocks(axes, ct),))


@functools.partial(custom_gradient, num_static=2)
def gather_rows(axes: str | tuple[str, ...], tiled: bool, rows: Array) -> Array:
    """[A, ...] of each rank along ``axes`` -> [W, A, ...], or [W * A, ...] if ``tiled``, in rank order."""
    gather = functools.partial(lax.all_gather, axis_name=axes, tiled=tiled)
    return lax.platform_dependent(rows, cpu=_as_integers(gather), default=gather) if _is_widened(rows) else gather(rows)


# d_rows = sum over all ranks of their ct for this rank's rows    # [A, ...] from [W, A, ...]
gather_rows.defvjp(
    lambda axes, tiled, rows: (gather_rows(axes, tiled, rows), None),
    lambda axes, tiled, _, ct: (lax.psum_scatter(ct, axes, tiled=tiled),),
)


def unwritten(num_rows: int, like: Array, plan: "Plan") -> Array:
    """Rows [num_rows, ...] like ``like``, to be written before they are read. With ``plan.poison`` they are NaN.

    Zeros would cost a pass over a buffer in which an exchange overwrites all that is read later.
    """
    shape = (num_rows, *like.shape[1:])
    rows = jnp.full(shape, poison_of(like.dtype), like.dtype) if plan.poison else _compat.empty(shape, like.dtype)
    return _compat.as_varying(rows, _compat.varying_axes(like))


def _is_widened(rows: Array) -> bool:
    """Whether XLA:CPU would move arrays of this dtype as fp32."""
    return jnp.issubdtype(rows.dtype, jnp.floating) and rows.dtype.itemsize == 2


def _as_integers(move: Callable) -> Callable:
    """``move``, which changes no bit, applied to the bits of 16-bit floats."""

    def moved(rows):
        return lax.bitcast_convert_type(move(lax.bitcast_convert_type(rows, jnp.uint16)), rows.dtype)

    return moved
