"""Rows of floats on their way, unweighted: the linear maps that derivatives of sending and collecting consist of.

``send`` and ``collect`` are each other's adjoint. Both move rows as ``recipe`` rounds them, which counts as identity.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax.derivatives import custom_gradient
from moe_jax.quant.message import join_some, split_some
from moe_jax.transports import all_to_all
from moe_jax.transports.picking import Moves, as_received, as_sent, only_present
from moe_jax.transports.routes import ROUTES
from moe_jax.types import ExchangeMaps, GatherMaps, HierarchyMaps

Array = jax.Array
Maps = ExchangeMaps | GatherMaps | HierarchyMaps


def send(
    tokens: Array | None,
    pairs: Array | None,
    scalars: Array | None,
    maps: Maps,
    plan,
    *,
    ordered: bool,
    recipe,
) -> tuple[Array | None, Array | None]:
    """row(t, c) = tokens[t] or pairs[c, t], and scalars[c, t], in one message.

    Args:
      tokens, pairs: [T, F], or [C, T, F] for routes that sum at the tokens; not both.
      scalars: [C, T, G] f32.
      maps, plan: of the window.
      ordered, recipe: as for the routes.

    Returns:
      ([M, F] in the dtype given, fp32 with a recipe; [M, G]); None for what was not given. Rows that no pair comes to
      may hold anything.
    """
    return _send(plan, ordered, recipe, tokens, pairs, scalars, maps)


def collect(
    rows: Array | None, scalars: Array | None, maps: Maps, plan, *, ordered: bool, recipe
) -> tuple[Array | None, Array | None]:
    """Rows [M, F] and scalars [M, G] at their tokens: [C, T, F] and [C, T, G].

    Rows of pairs outside the window may hold anything. Routes that sum at the experts give sums of rows, fp32 [T, F].
    Rows that no pair comes to influence nothing. Otherwise as for ``send``; ``rows`` may be None for "hierarchy".
    """
    return _collect(plan, ordered, recipe, rows, scalars, maps)


def moves(maps: Maps, plan, *, ordered: bool = True, recipe=None) -> Moves:
    """What ``collect_adjoint`` of the route of ``maps`` takes; the arguments are those of ``send`` and ``collect``."""
    options = {"maps": maps, "plan": plan, "ordered": ordered, "recipe": recipe}
    return Moves(functools.partial(send, **options), functools.partial(collect, **options), maps, recipe)


@functools.partial(custom_gradient, num_static=3)
def _send(plan, ordered, recipe, tokens, pairs, scalars, maps):
    given = pairs if tokens is None else tokens
    if recipe is not None and tokens is not None:
        tokens = as_sent(tokens, recipe)
    elif recipe is not None:
        pairs = as_sent(jax.lax.collapse(pairs, 0, 2), recipe).reshape(*pairs.shape[:2], -1)
    per_pair, held = (None, None) if pairs is None and scalars is None else join_some([pairs, scalars])
    options = {} if ordered else {"ordered": False}
    rows, pair_rows, _ = ROUTES[type(maps)].scatter(tokens, per_pair, maps, plan, **options)
    pair_rows, row_scalars = (None, None) if held is None else split_some(pair_rows, held)
    rows = pair_rows if tokens is None else rows
    return as_received(rows, recipe, given.shape[-1]), row_scalars


def _send_forward(plan, ordered, recipe, tokens, pairs, scalars, maps):
    like = [None if part is None else part[:0] for part in (tokens, pairs)]
    return _send(plan, ordered, recipe, tokens, pairs, scalars, maps), (*like, maps)


def _send_backward(plan, ordered, recipe, residuals, cts):
    tokens, pairs, maps = residuals
    collected, d_scalars = _collect(plan, ordered, recipe, *cts, maps)
    if tokens is None:
        return None, only_present(collected.astype(pairs.dtype), all_to_all.present(maps)), d_scalars, None
    return ROUTES[type(maps)].total(collected, maps).astype(tokens.dtype), None, d_scalars, None


_send.defvjp(_send_forward, _send_backward)


@functools.partial(custom_gradient, num_static=3)
def _collect(plan, ordered, recipe, rows, scalars, maps):
    options = {"recipe": recipe, "scalars": scalars} | ({} if ordered else {"ordered": False})
    return ROUTES[type(maps)].collect(rows, None, maps, plan, **options)


def _collect_forward(plan, ordered, recipe, rows, scalars, maps):
    return _collect(plan, ordered, recipe, rows, scalars, maps), (None if rows is None else rows[:0], maps)


def _collect_backward(plan, ordered, recipe, residuals, cts):
    rows, maps = residuals
    ct, ct_scalars = cts
    if rows is None:
        # A token of no width carries the scalars.
        tokens = jnp.zeros_like(ct_scalars, shape=(ct_scalars.shape[1], 0))
        return None, _send(plan, ordered, None, tokens, None, ct_scalars, maps)[1], None
    ct = ct.astype(rows.dtype)  # as rows are rounded when they travel
    operands = (ct, None) if plan.sums_at_experts else (None, ct)
    d_rows, d_scalars = _send(plan, ordered, recipe, *operands, ct_scalars, maps)
    return d_rows.astype(rows.dtype), d_scalars, None


_collect.defvjp(_collect_forward, _collect_backward)
