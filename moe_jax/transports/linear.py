"""The linear maps that the derivatives of sending and collecting are made of. They move rows of floats, unweighted.

``send`` and ``collect`` are each other's adjoint, and the rules of ``send_rows`` and ``collect_rows`` are made of them.
They move rows as a ``recipe`` rounds them, which counts as identity. Static arguments come first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.derivatives import custom_gradient
from moe_jax.plan import Plan
from moe_jax.quant.base import Recipe
from moe_jax.quant.message import join_some, split_some
from moe_jax.transports.base import Transport, as_received, as_sent, only_present

Array = jax.Array


@functools.partial(custom_gradient, num_static=4)
def send(
    transport: Transport,
    plan: Plan,
    ordered: bool,
    recipe: Recipe | None,
    tokens: Any,
    pairs: Any,
    scalars: Array | None,
    maps: Any,
) -> tuple[Array | None, Array | None]:
    """row(t, c) = tokens[t] or pairs[c, t], and scalars[c, t], in one message.

    Args:
      transport, plan: static.
      ordered: as for ``Transport.send``.
      recipe: of rows on their way; None: they travel as they are.
      tokens, pairs: [T, F], or [C, T, F] for a ``pairwise`` transport; not both.
      scalars: [C, T, G] f32, or None.
      maps: of the round.

    Returns:
      ([M, F] in the dtype given, fp32 with a recipe; [M, G]); None for what was not given. Rows that no pair comes to
      may hold anything.
    """
    given = pairs if tokens is None else tokens
    if recipe is not None and tokens is not None:
        tokens = as_sent(tokens, recipe)
    elif recipe is not None:
        pairs = as_sent(jax.lax.collapse(pairs, 0, 2), recipe).reshape(*pairs.shape[:2], -1)
    per_pair, held = join_some([pairs, scalars])
    rows, pair_rows, _ = transport.send(tokens, per_pair, maps, plan, ordered=ordered)
    pair_rows, row_scalars = split_some(pair_rows, held)
    message: Any = pair_rows if tokens is None else rows
    return as_received(message, recipe, given.shape[-1]), row_scalars


def _send_forward(transport, plan: Plan, ordered, recipe, tokens, pairs, scalars, maps):
    like = [None if part is None else part[:0] for part in (tokens, pairs)]
    return send(transport, plan, ordered, recipe, tokens, pairs, scalars, maps), (*like, maps)


def _send_backward(transport, plan: Plan, ordered, recipe, residuals, cts):
    # d_tokens[t] = sum over the pairs c of t in the round of ct_row(t, c)    # [T, F] from [M, F]
    # d_pairs[c, t] = ct_row(t, c)    # [C, T, F], zero for pairs of other rounds; d_scalars likewise, [C, T, G]
    tokens, pairs, maps = residuals
    collected, d_scalars = collect(transport, plan, ordered, recipe, *cts, maps)
    if tokens is None:
        return None, only_present(collected.astype(pairs.dtype), transport.present(maps, plan)), d_scalars, None
    return transport.total(collected, maps).astype(tokens.dtype), None, d_scalars, None


send.defvjp(_send_forward, _send_backward)


@functools.partial(custom_gradient, num_static=4)
def collect(
    transport: Transport,
    plan: Plan,
    ordered: bool,
    recipe: Recipe | None,
    rows: Array | None,
    scalars: Array | None,
    maps: Any,
) -> tuple[Array | None, Array | None]:
    """Rows [M, F] and scalars [M, G] at their tokens: [C, T, F] and [C, T, G].

    Rows of pairs of other rounds may hold anything. A transport that is not ``pairwise`` gives sums of rows, fp32
    [T, F]. Rows that no pair comes to influence nothing. Otherwise as for ``send``; ``rows`` may be None for such a
    transport.
    """
    rows, scalars, _ = transport.collect(rows, None, scalars, maps, plan, ordered=ordered, recipe=recipe)
    return rows, scalars


def _collect_forward(transport, plan: Plan, ordered, recipe, rows, scalars, maps):
    found = collect(transport, plan, ordered, recipe, rows, scalars, maps)
    return found, (None if rows is None else rows[:0], maps)


def _collect_backward(transport, plan: Plan, ordered, recipe, residuals, cts):
    # d_row(t, c) = ct[c, t], or ct[t] of sums    # [M, F]
    # d_scalars of the row of (t, c) = ct_scalars[c, t]    # [M, G]
    rows, maps = residuals
    ct, ct_scalars = cts
    if rows is None:
        # Tokens of width zero are sent, since scalars travel beside tokens.
        tokens = jnp.zeros_like(ct_scalars, shape=(ct_scalars.shape[1], 0))
        return None, send(transport, plan, ordered, None, tokens, None, ct_scalars, maps)[1], None
    ct = ct.astype(rows.dtype)  # as rows are rounded when they travel
    tokens, pairs = (None, ct) if transport.pairwise else (ct, None)
    d_rows, d_scalars = send(transport, plan, ordered, recipe, tokens, pairs, ct_scalars, maps)
    return d_rows.astype(rows.dtype), d_scalars, None


collect.defvjp(_collect_forward, _collect_backward)
