"""The routed sum of a device that holds all experts: nothing is exchanged, so there is no capacity and no round.

The T * K pairs of the device are sorted by expert; a gather makes their rows, the experts multiply them, and a gather
brings them back to the tokens. Each row belongs to one pair, so the adjoint of every gather of rows is a gather too.

What lies at the pairs is [K, T, H], so that a token's rows are whole tiles apart. What nobody may read is not masked
before somebody would: rows past the last one hold anything, and so does a pair that has no row, until the sum over k.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import layout
from moe_jax.derivatives import custom_gradient
from moe_jax.expert_slots import expert_slots
from moe_jax.movement import (
    as_delivered,
    only_present,
    pick,
    place_of,
    sum_at_tokens,
    sum_over_pairs,
    token_of,
)
from moe_jax.plan import Plan
from moe_jax.special import special_terms

Array = jax.Array


class _Places(NamedTuple):
    """Which row belongs to which pair; -1 marks "none"."""

    row_token: Array  # [M] the token of each row; rows past the last one have any token, or none
    row_pair: Array  # [M] its pair, as k * T + token
    pair_row: Array  # [T, K] the row of each pair


def local_sum(
    expert_ids: Array,
    experts: dict[str, Array],
    constants: dict[str, Array | None],
    x: Array,
    weights: Array,
    plan: Plan,
    *,
    activation: str,
) -> tuple[Array, Array]:
    """What routed and special experts add for each token, where ``plan.exchanges`` is false.

    With overflow="drop" the first ``plan.pair_capacity`` rows in the order of the experts are kept. Recipes round rows
    and cotangents as if they travelled, so that values do not depend on the mesh.

    Args:
      expert_ids, weights: [T, K] i32 and f32. An id that is none of the plan's adds nothing.
      experts: as for ``expert_slots``; constants: of ``special_terms``.
      x: [T, H] in ``plan.dtype``.
      plan, activation: static.

    Returns:
      ([T, H] fp32, i32 pairs that were dropped). Differentiable in every float array, in both modes, to any order.
    """
    if not plan.num_pairs:
        return jnp.zeros_like(weights, shape=(0, plan.hidden)), jnp.zeros_like(expert_ids, shape=())
    with jax.named_scope("layout"):
        is_routed = (expert_ids >= 0) & (expert_ids < plan.num_experts)
        pairs = layout.sort_pairs(jnp.where(is_routed, expert_ids, -1).ravel(), plan.num_experts)
        num_rows = plan.pair_capacity if plan.overflow == "drop" else plan.num_pairs
        group_sizes = pairs.counts
        if num_rows < plan.num_pairs:
            _, group_sizes = layout.clip_to_window(pairs.counts, 0, num_rows)
        num_kept = jnp.sum(group_sizes, dtype=jnp.int32)
        places = _places(pairs, num_kept, num_rows, plan)
    needed = x if plan.num_copy_experts + plan.num_const_experts else None
    special = special_terms(expert_ids, plan, x=needed, **constants)
    with jax.named_scope("permute"):
        rows = _spread(plan, as_delivered(x, plan.dispatch_recipe).astype(plan.dtype), places)
    made = expert_slots(experts, rows, None, group_sizes, plan, activation=activation)
    with jax.named_scope("unpermute"):
        collected = _collect(plan, as_delivered(made, plan.combine_recipe), places)
    return sum_at_tokens(collected, weights, places.pair_row >= 0, special, plan), jnp.sum(pairs.counts - group_sizes, dtype=jnp.int32)


def _places(pairs: layout.PairOrder, num_kept: Array, num_rows: int, plan: Plan) -> _Places:
    """``num_kept``: pairs that have a row, the first in their order."""
    pair = pairs.order[:num_rows]
    if plan.poison:  # else the other rows are those of pairs that go nowhere
        pair = jnp.where(jnp.arange(num_rows) < num_kept, pair, -1)
    pair_row = jnp.where(pairs.position < num_kept, pairs.position, -1)
    return _Places(token_of(pair, plan), place_of(pair, plan), pair_row.reshape(plan.tokens_per_rank, plan.top_k))


@functools.partial(custom_gradient, num_static=1)
def _spread(plan, x, places):
    """Tokens [T, H] at the rows of all their pairs, [M, H]."""
    return pick(x, places.row_token, plan)


def _spread_backward(plan, places, ct):
    # d_x[t] = sum_k ct[row of (t, k)]    # [T, H], in fp32 over ascending k
    collected = _collect(plan, as_delivered(ct, plan.backward_recipe), places)
    return sum_over_pairs(collected, places.pair_row >= 0).astype(plan.dtype), None


_spread.defvjp(lambda plan, x, places: (_spread(plan, x, places), places), _spread_backward)


@functools.partial(custom_gradient, num_static=1)
def _collect(plan, rows, places):
    """Rows [M, H] at their pairs, [K, T, H]; anything at a pair that has none."""
    return pick(rows, places.pair_row.T, plan)


def _collect_backward(plan, residuals, ct):
    # d_rows[row of (t, k)] = ct[k, t]    # [M, H], rounded as rows are when they travel
    rows, places = residuals
    ct = as_delivered(jax.lax.collapse(ct, 0, 2).astype(plan.dtype), plan.backward_recipe)
    return _arrange(plan, ct.astype(rows.dtype), places), None


_collect.defvjp(lambda plan, rows, places: (_collect(plan, rows, places), (rows[:0], places)), _collect_backward)


@functools.partial(custom_gradient, num_static=1)
def _arrange(plan, pairs, places):
    """Pairs [K * T, H] at their rows, [M, H]."""
    return pick(pairs, places.row_pair, plan)


def _arrange_backward(plan, places, ct):
    # d_pairs[k, t] = ct[row of (t, k)], zero where there is none    # [K * T, H]
    collected = _collect(plan, ct, places)
    return jax.lax.collapse(only_present(collected, places.pair_row >= 0), 0, 2), None


_arrange.defvjp(lambda plan, pairs, places: (_arrange(plan, pairs, places), places), _arrange_backward)
