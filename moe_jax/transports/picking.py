"""What the routes share: gathers by maps in which -1 means "none", and pairs as token * C + c.

What belongs to pairs and has a width is ordered by copy, then token, [C, T, ...]: for sums over the copies of a token
it is C arrays in their natural layout, where [T, C, ...] would leave most of a TPU's tiles empty.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import collectives
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
        absent = collectives.poison_of(rows.dtype)
    return take_rows(rows, index, absent=absent)


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


def place_of(pair: Array, plan) -> Array:
    """Where each pair lies in [C * T], -1 for none."""
    return jnp.where(pair < 0, -1, pair % plan.num_copies * plan.tokens_per_rank + pair // plan.num_copies)


def by_token(pairs: Array) -> Array:
    """[C, T, G] -> [T, C * G]."""
    return jax.lax.collapse(jnp.swapaxes(pairs, 0, 1), 1)


def only_present(pair_rows: Array, present: Array) -> Array:
    """[C, T, H] with zeros for the pairs that are not ``present`` [T, C]."""
    return jnp.where(present.T[..., None], pair_rows, jnp.zeros((), pair_rows.dtype))


def sum_over_pairs(pair_rows: Array, present: Array) -> Array:
    """[C, T, H] -> [T, H] fp32, one k after the other, of the pairs that are ``present`` [T, C]."""
    total = jnp.zeros_like(pair_rows[0], jnp.float32)
    for k in range(pair_rows.shape[0]):
        total = total + rows_if(present[:, k], pair_rows[k])
    return total


def rows_if(present: Array, rows: Array) -> Array:
    """[T, H] in fp32, with zeros for the rows that are not ``present`` [T], which may hold anything."""
    return jnp.where(present[:, None], rows.astype(jnp.float32), 0.0)
