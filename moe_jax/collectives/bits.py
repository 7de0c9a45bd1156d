"""Rows travel between ranks bit by bit.

XLA:CPU would widen 16-bit floats for a collective, and move twice the bytes: in programs for CPUs, and in no others,
they travel as integers. Nothing here has a derivative; what sends, collects or gathers has one of its own.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax.derivatives import poison_of

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

Array = jax.Array


def swap_bits(axes: tuple[str, ...], dtype: Any) -> Callable[[Array], Any]:
    """The exchange of blocks [W, ...] of ``dtype``: block j goes to rank j along ``axes``, block i came from rank i."""
    return _unwidened(functools.partial(lax.all_to_all, axis_name=axes, split_axis=0, concat_axis=0), dtype)


def gather_bits(axes: str | tuple[str, ...], dtype: Any, *, tiled: bool = False) -> Callable[[Array], Any]:
    """Rows [A, ...] of ``dtype`` of each rank along ``axes`` -> [W, A, ...], or [W * A, ...] if ``tiled``, by rank."""
    return _unwidened(functools.partial(lax.all_gather, axis_name=axes, tiled=tiled), dtype)


def unwritten(num_rows: int, like: Array, plan: "Plan") -> Array:
    """Rows [num_rows, ...] like ``like``, to be written before they are read. With ``plan.poison`` they are NaN.

    Zeros would cost a pass over a buffer in which an exchange overwrites all that is read later.
    """
    shape = (num_rows, *like.shape[1:])
    rows = jnp.full(shape, poison_of(like.dtype), like.dtype) if plan.poison else _compat.empty(shape, like.dtype)
    return _compat.as_varying(rows, _compat.varying_axes(like))


def _unwidened(move: Callable[[Array], Array], dtype: Any) -> Callable[[Array], Any]:
    """``move``, which changes no bit, for rows of ``dtype``; on CPUs for their bits, where XLA would widen the rows."""
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize != 2:
        return move

    def as_integers(rows):
        return lax.bitcast_convert_type(move(lax.bitcast_convert_type(rows, jnp.uint16)), rows.dtype)

    return functools.partial(lax.platform_dependent, cpu=as_integers, default=move)
