"""Rows between ranks, as they are.

XLA:CPU would widen 16-bit floats for a collective, and move twice the bytes: in programs for CPUs, and in no others,
they travel as integers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax.derivatives import custom_gradient

Array = jax.Array


def swap_blocks(blocks: Array, axes: tuple[str, ...]) -> Array:
    """[W, ...]: block j goes to rank j along ``axes``; block i of the result came from rank i."""
    return _swap(axes, blocks)


@functools.partial(custom_gradient, num_static=1)
def _swap(axes, blocks):
    return _moved(lambda rows: lax.all_to_all(rows, axes, 0, 0), blocks)


_swap.defvjp(lambda axes, blocks: (_swap(axes, blocks), None), lambda axes, _, ct: (_swap(axes, ct),))


def gather_rows(rows: Array, axes: str | tuple[str, ...], tiled: bool) -> Array:
    """[A, ...] of each rank along ``axes`` -> [W, A, ...], or [W * A, ...] if ``tiled``, in rank order."""
    return _gather(axes, tiled, rows)


@functools.partial(custom_gradient, num_static=2)
def _gather(axes, tiled, rows):
    return _moved(lambda rows: lax.all_gather(rows, axes, tiled=tiled), rows)


_gather.defvjp(
    lambda axes, tiled, rows: (_gather(axes, tiled, rows), None),
    lambda axes, tiled, _, ct: (lax.psum_scatter(ct, axes, tiled=tiled),),
)


def unwritten(num_rows: int, like: Array, plan) -> Array:
    """[num_rows, ...] rows as ``like`` that nobody may read before somebody writes them: NaN under ``plan.poison``.

    Zeros would cost a pass over the buffer of an exchange, which overwrites all that is read.
    """
    shape = (num_rows, *like.shape[1:])
    rows = jnp.full(shape, poison_of(like.dtype), like.dtype) if plan.poison else lax.empty(shape, like.dtype)
    return _compat.as_varying(rows, _compat.varying_axes(like))


def poison_of(dtype) -> float | int:
    """What stands where nobody may read under ``plan.poison``: NaN, or the largest integer."""
    return jnp.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


def _moved(move: Callable, rows: Array) -> Array:
    """``move(rows)``, which changes no bit; the platform that the program is lowered for decides how."""

    def as_integers(rows):
        return lax.bitcast_convert_type(move(lax.bitcast_convert_type(rows, jnp.uint16)), rows.dtype)

    narrow = jnp.issubdtype(rows.dtype, jnp.floating) and rows.dtype.itemsize == 2
    return lax.platform_dependent(rows, cpu=as_integers, default=move) if narrow else move(rows)
