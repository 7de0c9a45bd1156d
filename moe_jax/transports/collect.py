"""Rows on their way back from the experts, differentiably: the adjoint of what ``send`` does."""

import dataclasses
import functools
from typing import Any

import jax

from moe_jax.derivatives import custom_gradient
from moe_jax.transports.base import Transport
from moe_jax.types import DispatchHandle

Array = jax.Array


@functools.partial(custom_gradient, num_static=2)
def collect_rows(
    transport: Transport, ordered: bool, rows: Array, weights: Array, handle: DispatchHandle
) -> tuple[Array, Any]:
    """Expert rows [M, H] of one round -> what ``Transport.finish`` takes, and the note of the exchange.

    What comes back is [C, T, H] at the tokens, or fp32 sums [T, H] of a transport that is not pairwise. Differentiable
    in rows and weights. Weights are [T, C]; if the transport ``takes_row_weights``, also [M], those that came with the
    rows. ``ordered``: as for ``send_rows``.
    """
    plan, recipe = handle.plan, handle.plan.combine_recipe
    collected, _, note = transport.collect(rows, weights, None, handle.maps, plan, ordered=ordered, recipe=recipe)
    assert collected is not None, "rows were given"
    return collected, note


def _collect_forward(transport, ordered, rows, weights, handle):
    # A pairwise transport does not read the weights here, so their cotangent needs no rows.
    kept = rows[:0] if transport.pairwise else rows
    plain = dataclasses.replace(handle, maps=transport.plain(handle.maps))  # nobody times the exchange of cotangents
    return collect_rows(transport, ordered, rows, weights, handle), (kept, weights, plain)


def _collect_backward(transport, ordered, residuals, cts):
    # d_rows [M, H] and d_weights [T, C], or [M], from ct [C, T, H], or [T, H] of sums: the formulas stand in
    # ``collect_adjoint`` of each transport, since each reads weights and rows at another place.
    rows, weights, handle = residuals
    d_rows, d_weights = transport.collect_adjoint(rows, weights, cts[0], handle.maps, handle.plan, ordered=ordered)
    return d_rows, d_weights, None


collect_rows.defvjp(_collect_forward, _collect_backward)
