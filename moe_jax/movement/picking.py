"""What the routes share: gathers by maps in which -1 means "none", and pairs as token * C + c."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import comm
from moe_jax.derivatives import differentiated_as, take_rows

Array = jax.Array


class Moves(NamedTuple):
    """What a route makes the adjoint of collecting of."""

    send: Callable  # of ``linear``, in the window and order of the handle; likewise ``collect``
    collect: Callable
    maps: Any
    recipe: Any  # of rows on their way in the backward pass


def pick(rows: Array, index: Array, plan, *, absent: float | None = None) -> Array:
    """``rows[index]``. Where index is -1: ``absent`` if given, NaN (all ones) under ``plan.poison``, else anything."""
    if absent is None and plan.poison:
        absent = jnp.nan if jnp.issubdtype(rows.dtype, jnp.floating) else jnp.iinfo(rows.dtype).max
    return take_rows(rows, index, absent=absent)


def pick_pieces(rows: Array, index: Array, plan, num_pieces: int) -> tuple[Array, ...]:
    """As ``pick``, in as many pieces, see ``comm.cut_pieces``."""
    rows = comm.to_bits(rows) if num_pieces > 1 else rows
    return tuple(pick(rows, part, plan) for part in jnp.split(index, num_pieces))


def token_of(pair: Array, plan) -> Array:
    """The token of each pair, -1 for none."""
    return jnp.where(pair < 0, -1, pair // plan.num_copies)


def as_sent(rows: Array, recipe) -> Array:
    """Rows [n, H] as they travel: a message of codes and scales, or themselves."""
    return rows if recipe is None else recipe.pack(recipe.quantize(rows))


def as_received(message: Array, recipe, hidden: int) -> Array:
    """The inverse of ``as_sent`` but for what the recipe loses; fp32 where there is one."""
    return message if recipe is None else recipe.dequantize(recipe.unpack(message, hidden))


def as_delivered(rows: Array, recipe) -> Array:
    """Rows as the receiver sees them, in fp32 where there is a recipe, whose rounding counts as identity."""
    if recipe is None:
        return rows

    def encoded(rows):
        return as_received(as_sent(rows, recipe), recipe, rows.shape[1])

    return differentiated_as(lambda rows: rows.astype(jnp.float32), encoded, rows)


def copy_weights(combine_weights: Array, plan) -> Array:
    """[T, K] -> [T, num_copies]: a copy to a shared expert on a rank of its own has weight 1."""
    num_shared = plan.num_copies - plan.top_k
    return jnp.pad(combine_weights, ((0, 0), (0, num_shared)), constant_values=1.0) if num_shared else combine_weights


def sum_over_pairs(pair_rows: Array) -> Array:
    """[T, C, H] -> [T, H] fp32, one k after the other."""
    total = jnp.zeros_like(pair_rows[:, 0], jnp.float32)
    for k in range(pair_rows.shape[1]):
        total = total + pair_rows[:, k].astype(jnp.float32)
    return total
