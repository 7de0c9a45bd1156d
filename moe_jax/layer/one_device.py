"""The routed sum of a device that holds all experts: nothing is exchanged, so there is no capacity and no round.

The T * K pairs of the device are sorted by expert; a gather makes their rows, the experts multiply them, and gathers
bring them back into the sum over k. Each row belongs to one pair, so the adjoint of every gather is a gather too.

Rows come back as K arrays [T, H], which a compiler can read inside the sum, instead of one that it would have to write.
What nobody may read is not masked before somebody would: rows past the last one hold anything, and so does a pair that
has no row, until the sum over k.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import layout
from moe_jax.derivatives import custom_gradient, take_rows
from moe_jax.layer.grouping import ExpertKind
from moe_jax.layer.weightless import Constants, weightless_term, weightless_terms
from moe_jax.plan import Plan
from moe_jax.transports.base import as_delivered, rows_if, token_of

Array = jax.Array


class _Places(NamedTuple):
    """Which row belongs to which pair; -1 marks "none"."""

    row_pair: Array  # [M] the pair of each row, as token * K + k; rows past the last one have any pair, or none
    pair_row: Array  # [T, K] the row of each pair


def local_sum(
    expert_ids: Array,
    experts: Any,
    constants: Constants,
    x: Array,
    weights: Array,
    plan: Plan,
    kind: ExpertKind,
    *,
    weigh_inputs: bool = False,
) -> tuple[Array, Array]:
    """What routed and weightless experts add for each token, where ``plan.exchanges`` is false.

    With overflow="drop" the first ``plan.pair_capacity`` rows in the order of the experts are kept. Recipes round rows
    and cotangents as if they travelled, so that values do not depend on the mesh.

    Args:
      expert_ids, weights: [T, K] i32 and f32. An id that is none of the plan's adds nothing.
      experts: the parameters of ``kind``; constants: in ``plan.dtype``.
      x: [T, H] in ``plan.dtype``.
      plan, kind: static.
      weigh_inputs: as for ``routed_sum``.

    Returns:
      ([T, H] fp32, or [T, H'] if the experts make rows of another width; i32 pairs that were dropped). Differentiable
      in every float array, in both modes, to any order.
    """
    with jax.named_scope("layout"):
        is_routed = (expert_ids >= 0) & (expert_ids < plan.num_experts)
        pairs = layout.sort_pairs(jnp.where(is_routed, expert_ids, -1).ravel(), plan.num_experts)
        num_rows = plan.pair_capacity if plan.overflow == "drop" else plan.num_pairs
        group_sizes = pairs.counts
        if num_rows < plan.num_pairs:
            _, group_sizes = layout.clip_to_stretch(pairs.counts, 0, num_rows)
        num_kept = jnp.sum(group_sizes, dtype=jnp.int32)
        places = _places(pairs, num_kept, num_rows, plan)
    added = weightless_terms(expert_ids, x, constants, plan)
    with jax.named_scope("permute"):
        rows = _spread(plan, as_delivered(x, plan.dispatch_recipe).astype(plan.dtype), places)
        if weigh_inputs:
            rows = weighed(rows, _rows_of_pairs(plan, weights, places))
            weights = jnp.where(is_routed, 1.0, weights)
    made = kind.slots(plan, kind.what, experts, rows, None, group_sizes)
    with jax.named_scope("combine_sum"):
        total = _weighted_sum(plan, as_delivered(made, plan.combine_recipe), weights, added, places)
    return total, jnp.sum(pairs.counts - group_sizes, dtype=jnp.int32)


def weighed(rows: Array, weights: Array) -> Array:
    """Rows [M, H], each times its weight [M] in fp32, rounded once."""
    return (weights[:, None] * rows.astype(jnp.float32)).astype(rows.dtype)


def _places(pairs: layout.PairOrder, num_kept: Array, num_rows: int, plan: Plan) -> _Places:
    """Which row belongs to which pair. ``num_kept`` pairs have a row: the first ones in their order."""
    row_pair = pairs.order[:num_rows]
    if plan.poison:  # else the other rows are those of pairs that go nowhere
        row_pair = jnp.where(jnp.arange(num_rows) < num_kept, row_pair, -1)
    pair_row = jnp.where(pairs.position < num_kept, pairs.position, -1)
    return _Places(row_pair, pair_row.reshape(plan.tokens_per_rank, plan.top_k))


@functools.partial(custom_gradient, num_static=1)
def _weighted_sum(plan: Plan, rows, weights, added, places):
    """``sum_k weights[t, k] * (row of (t, k) + what a weightless expert adds)``, k ascending. -> [T, H] fp32."""
    terms = _present(_collect(plan, rows, places), places)
    if added is not None:  # at most one of the two is not zero
        terms = [term + weightless_term(added, k, plan) for k, term in enumerate(terms)]
    return sum(weights[:, k, None] * term for k, term in enumerate(terms))


def _weighted_sum_backward(plan: Plan, residuals, ct):
    # d_row(t, k) = weights[t, k] * ct[t]                                  # [M, H], and rounded as if it travelled
    # d_weights[t, k] = <row(t, k) + what a weightless expert adds, ct[t]>    # [T, K]
    rows, weights, added, places = residuals
    ct_rows = _spread(plan, ct.astype(plan.dtype), places).astype(jnp.float32)
    d_rows = (_rows_of_pairs(plan, weights, places)[:, None] * ct_rows).astype(plan.dtype)
    d_rows = as_delivered(d_rows, plan.backward_recipe).astype(rows.dtype)
    d_weights = _pairs_of_rows(plan, jnp.sum(rows.astype(jnp.float32) * ct_rows, axis=1), places)
    if added is None:
        return d_rows, d_weights, None, None

    def weightless_sum(weights, added):
        return sum(weights[:, k, None] * weightless_term(added, k, plan) for k in range(plan.top_k))

    more_weights, d_added = jax.vjp(weightless_sum, weights, added)[1](ct)
    return d_rows, d_weights + more_weights, d_added, None


_weighted_sum.defvjp(lambda plan, *operands: (_weighted_sum(plan, *operands), operands), _weighted_sum_backward)


@functools.partial(custom_gradient, num_static=1)
def _spread(plan: Plan, x, places):
    """Takes tokens [T, H] to the rows of all their pairs, [M, H]."""
    return take_rows(x, token_of(places.row_pair, plan.top_k), poison=plan.poison)


def _spread_backward(plan: Plan, places, ct):
    # d_x[t] = sum_k ct[row of (t, k)]    # [T, H], in fp32 over ascending k
    collected = _collect(plan, as_delivered(ct, plan.backward_recipe), places)
    total: Any = sum(_present(collected, places))
    return total.astype(plan.dtype), None


_spread.defvjp(lambda plan, x, places: (_spread(plan, x, places), places), _spread_backward)


@functools.partial(custom_gradient, num_static=1)
def _collect(plan: Plan, rows, places):
    """Takes rows [M, H] to their pairs: K arrays [T, H], with anything at a pair that has no row."""
    return tuple(take_rows(rows, places.pair_row[:, k], poison=plan.poison) for k in range(plan.top_k))


def _collect_backward(plan: Plan, places, cts):
    # d_rows[m] = ct_k[t], where row m is that of pair (t, k)    # [M, H] from K arrays [T, H]
    return _rows_of_pairs(plan, jnp.stack(cts, axis=1), places), None


_collect.defvjp(lambda plan, rows, places: (_collect(plan, rows, places), places), _collect_backward)


@functools.partial(custom_gradient, num_static=1)
def _rows_of_pairs(plan: Plan, pairs, places):
    """Takes what belongs to pairs, [T, K, ...], to their rows, [M, ...]."""
    return take_rows(jax.lax.collapse(pairs, 0, 2), places.row_pair, poison=plan.poison)


@functools.partial(custom_gradient, num_static=1)
def _pairs_of_rows(plan: Plan, rows, places):
    """The adjoint: takes what belongs to rows, [M, ...], to their pairs, [T, K, ...]; zeros where there is no row."""
    return take_rows(rows, places.pair_row, absent=0)


# d_pairs[t, k] = ct[row of (t, k)], zero where there is no row    # [T, K, ...] from [M, ...]
_rows_of_pairs.defvjp(
    lambda plan, pairs, places: (_rows_of_pairs(plan, pairs, places), places),
    lambda plan, places, ct: (_pairs_of_rows(plan, ct, places), None),
)
# d_rows[m] = ct[t, k], where row m is that of pair (t, k)    # [M, ...] from [T, K, ...]
_pairs_of_rows.defvjp(
    lambda plan, rows, places: (_pairs_of_rows(plan, rows, places), places),
    lambda plan, places, ct: (_rows_of_pairs(plan, ct, places), None),
)


def _present(collected: tuple[Array, ...], places: _Places) -> list[Array]:
    """What ``_collect`` gave, in fp32, with zeros where a pair has no row."""
    there = places.pair_row >= 0
    return [rows_if(there[:, k], rows) for k, rows in enumerate(collected)]
