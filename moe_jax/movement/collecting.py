"""Rows on their way back from the experts, differentiably: the adjoint of what ``sending`` does.

``collect_rows``: expert rows [M, H] -> what came back: [T, C, H] at the tokens, or fp32 sums [T, H] for transports
whose sums are made where the experts are. Windows add up; ``finish`` weights and sums what was collected.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.movement import exchange
from moe_jax.movement.routes import ROUTES
from moe_jax.special import special_term
from moe_jax.types import DispatchHandle, SpecialTerms

Array = jax.Array


def collect_rows(rows: Array, combine_weights: Array, handle: DispatchHandle) -> Array:
    """Expert rows of one window -> what ``finish`` takes; windows add up. Differentiable in both arrays.

    Weights are [T, C]; for "hierarchy" also [M], those that came with the rows.
    """
    plan = handle.plan
    rows, combine_weights = _compat.as_varying((rows, combine_weights), plan.exchange_axes)
    if not plan.num_pairs:
        pairs = jnp.zeros_like(combine_weights, dtype=plan.dtype)[..., None] * jnp.ones(plan.hidden, plan.dtype)
        return jnp.sum(pairs, axis=1, dtype=jnp.float32) if plan.sums_at_experts else pairs
    return _collect_rows(False, rows, combine_weights, handle)[0]


def collect_rows_timed(rows: Array, combine_weights: Array, handle: DispatchHandle) -> tuple[Array, Array]:
    """As ``collect_rows`` over an exchange of equal blocks, and [W] i32 microseconds waited for each rank."""
    operands = _compat.as_varying((rows, combine_weights), handle.plan.exchange_axes)
    return _collect_rows(True, *operands, handle)


def finish(collected: Array, combine_weights: Array, special: SpecialTerms | None, plan) -> Array:
    """The weighted sum over k, ascending, of rows and of what experts without rows add. -> [T, H] fp32."""
    with jax.named_scope("combine_sum"):
        summed = plan.sums_at_experts
        if summed and special is None:
            return collected
        total = collected if summed else jnp.zeros_like(collected[:, 0], jnp.float32)
        for k in range(plan.num_copies):
            terms = [] if summed else [collected[:, k].astype(jnp.float32)]
            terms += [] if special is None or k >= plan.top_k else [special_term(special, k, plan)]
            total = total + combine_weights[:, k, None] * sum(terms)  # at most one of the terms is not zero
        return total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect_rows(timed, rows, weights, handle):
    plan = handle.plan
    if timed:
        return exchange.collect_timed(rows, handle.maps, plan, recipe=plan.combine_recipe)
    route = ROUTES[type(handle.maps)]
    return route.collect(rows, weights, handle.maps, plan, recipe=plan.combine_recipe)[0], None


def _collect_forward(timed, rows, weights, handle):
    kept = rows if handle.plan.sums_at_experts else rows[:0]
    return _collect_rows(timed, rows, weights, handle), (kept, weights, handle)


def _collect_backward(timed, residuals, cts):
    rows, weights, handle = residuals
    plan = handle.plan
    route = ROUTES[type(handle.maps)]
    return *route.collect_adjoint(rows, weights, cts[0], handle.maps, plan, recipe=plan.backward_recipe), None


_collect_rows.defvjp(_collect_forward, _collect_backward)
