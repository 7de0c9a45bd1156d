"""Rows on their way back from the experts, differentiably: the adjoint of what ``sending`` does.

``collect_rows``: expert rows [M, H] -> what came back: [C, T, H] at the tokens, or fp32 sums [T, H] for transports
whose sums are made where the experts are. ``together`` puts windows together; ``finish`` weights and sums.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.derivatives import custom_gradient
from moe_jax.transports import all_to_all, linear
from moe_jax.transports.picking import rows_if
from moe_jax.transports.routes import ROUTES, RowOrder
from moe_jax.transports.weightless import special_term
from moe_jax.types import DispatchHandle, SpecialTerms

Array = jax.Array


def collect_rows(
    rows: Array, combine_weights: Array, handle: DispatchHandle, *, order: RowOrder | None = None
) -> Array:
    """Expert rows of one window -> what ``finish`` takes. Differentiable in both arrays.

    Weights are [T, C]; for "hierarchy" also [M], those that came with the rows. ``order``: as for ``send_rows``.
    """
    plan = handle.plan
    rows, combine_weights = _compat.as_varying((rows, combine_weights), plan.exchange_axes)
    if not plan.num_pairs:
        pairs = jnp.zeros_like(combine_weights, dtype=plan.dtype).T[..., None] * jnp.ones(plan.hidden, plan.dtype)
        return jnp.sum(pairs, axis=0, dtype=jnp.float32) if plan.sums_at_experts else pairs
    return _collect_rows(_How(timed=False, ordered=order is None), rows, combine_weights, handle)[0]


def collect_rows_timed(rows: Array, combine_weights: Array, handle: DispatchHandle) -> tuple[Array, Array]:
    """As ``collect_rows`` over an exchange of equal blocks, and [W] i32 microseconds waited for each rank."""
    operands = _compat.as_varying((rows, combine_weights), handle.plan.exchange_axes)
    return _collect_rows(_How(timed=True, ordered=True), *operands, handle)


def together(collected: Array, more: Array, handle: DispatchHandle) -> Array:
    """What was collected in other windows, and what came in that of ``handle``."""
    return ROUTES[type(handle.maps)].together(collected, more, handle.maps)


def finish(collected: Array, combine_weights: Array, travelled: Array, special: SpecialTerms | None, plan) -> Array:
    """The weighted sum over k, ascending, of rows and of what experts without rows add. -> [T, H] fp32.

    ``travelled``: [T, C] bool, the pairs that were collected in some window; others hold anything.
    """
    with jax.named_scope("combine_sum"):
        summed = plan.sums_at_experts
        if special is None:
            return collected if summed else _weighted_sum(collected, combine_weights, travelled)
        total = collected if summed else jnp.zeros_like(collected[0], jnp.float32)
        rows = [] if summed else jax.lax.split(collected, [1] * plan.num_copies, axis=0)
        for k in range(plan.num_copies):
            terms = [] if summed else [rows_if(travelled[:, k], rows[k][0])]
            terms += [] if k >= plan.top_k else [special_term(special, k, plan)]
            total = total + combine_weights[:, k, None] * sum(terms)  # at most one of the terms is not zero
        return total


@custom_gradient
def _weighted_sum(rows: Array, weights: Array, travelled: Array) -> Array:
    """``sum_c weights[t, c] * rows[c, t]`` of those that travelled, c ascending. [C, T, H], [T, C] -> [T, H] fp32."""
    total = jnp.zeros_like(rows[0], jnp.float32)
    for c in range(rows.shape[0]):
        # Rows are masked, not terms: a compiler that makes one operation of product and sum, which rounds once, must do
        # so in every program of the layer, or values would depend on how many rounds there are.
        total = total + weights[:, c, None] * rows_if(travelled[:, c], rows[c])
    return total


def _weighted_sum_backward(operands, ct):
    """JAX's own rule would pad and add a cotangent of all the rows for each c.

    ``d_row(c, t) = weights[t, c] * ct[t]`` and ``d_weights[t, c] = <row(c, t), ct[t]>``, where (t, c) travelled.
    """
    rows, weights, travelled = operands
    # One product for each c: of one over [C, T, H] the TPU compiler would write the weights down in that shape first.
    kept = jnp.where(travelled, weights, 0.0)
    d_rows = jnp.stack([(kept[:, c, None] * ct).astype(rows.dtype) for c in range(rows.shape[0])])
    # Rows are masked before the product: after it, the derivative in ct would still read those that are not there.
    dots = [jnp.sum(rows_if(travelled[:, c], rows[c]) * ct, axis=-1) for c in range(rows.shape[0])]
    return d_rows, jnp.stack(dots, axis=-1), None


_weighted_sum.defvjp(lambda *operands: (_weighted_sum(*operands), operands), _weighted_sum_backward)


class _How(NamedTuple):
    """What is static about collecting."""

    timed: bool
    ordered: bool


@functools.partial(custom_gradient, num_static=1)
def _collect_rows(how, rows, weights, handle):
    plan = handle.plan
    if how.timed:
        return all_to_all.collect_timed(rows, handle.maps, plan, recipe=plan.combine_recipe)
    route = ROUTES[type(handle.maps)]
    options = {} if how.ordered else {"ordered": False}
    return route.collect(rows, weights, handle.maps, plan, recipe=plan.combine_recipe, **options)[0], None


def _collect_forward(how, rows, weights, handle):
    kept = rows if handle.plan.sums_at_experts else rows[:0]
    return _collect_rows(how, rows, weights, handle), (kept, weights, handle)


def _collect_backward(how, residuals, cts):
    rows, weights, handle = residuals
    plan, maps = handle.plan, handle.maps
    moves = linear.moves(maps, plan, ordered=how.ordered, recipe=plan.backward_recipe)
    return *ROUTES[type(maps)].collect_adjoint(rows, weights, cts[0], plan, moves), None


_collect_rows.defvjp(_collect_forward, _collect_backward)
