"""Rounds of exchange, experts and exchange back, as many as the skew needs.

The first round stands in the program as it is, and keeps what its backward pass needs. The others are a loop that keeps
nothing and runs again in the backward pass, so that memory does not grow with the skew.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax.derivatives import custom_gradient, first_order_only, without_float0
from moe_jax.layer.combine import finish
from moe_jax.layer.grouping import ExpertKind
from moe_jax.layer.one_device import local_sum, weighed
from moe_jax.layer.weightless import Constants, weightless_terms
from moe_jax.plan import Plan
from moe_jax.transports import collect_rows, dequantized, send_rows, transport_of
from moe_jax.transports.manifest import Manifest, count_pairs, count_rounds, open_round, read_table

Array = jax.Array


def routed_sum(
    expert_ids: Array,
    experts: Any,
    constants: Constants,
    x: Array,
    weights: Array,
    plan: Plan,
    kind: ExpertKind,
    *,
    rank_table: Array | None,
    chunks: int,
    weigh_inputs: bool = False,
) -> tuple[Array, Array, Array]:
    """What routed and weightless experts add for each token.

    Args:
      expert_ids, weights: [T, K] i32 and f32.
      experts: the parameters of ``kind``; constants: in ``plan.dtype``.
      x: [T, H] in ``plan.dtype``.
      plan, kind: static.
      rank_table: as for ``dispatch``, but that ids of weightless experts follow those of all routed experts of the
        plan, whoever is left. The table of a single rank can only say that this rank is there.
      chunks: a divisor of T; each chunk of the tokens passes by itself, with its share of ``plan.pair_capacity``.
      weigh_inputs: whether the weight of a pair multiplies the row that its expert gets, instead of what that makes of
        it. A pair of a weightless expert has no row: what it adds is weighted in either case.

    Returns:
      ([T, H] fp32, i32 pairs of this device that were dropped, i32 rounds of the chunk that took most).
    """
    if not plan.num_pairs:  # no device has a token, so nothing moves
        return jnp.zeros_like(weights, shape=(0, plan.hidden)), jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)
    tokens = plan.tokens_per_rank // chunks
    chunk_plan = plan
    if chunks > 1:
        chunk_plan = dataclasses.replace(plan, tokens_per_rank=tokens, pair_capacity=-(-plan.pair_capacity // chunks))
    if rank_table is not None:
        # In the layer ids of weightless experts follow those of all routed experts, and for ``count_pairs`` those of
        # the routed experts that are left. Routed experts that are gone are no choice.
        left = read_table(rank_table, plan).num_experts
        is_gone = (expert_ids >= left) & (expert_ids < plan.num_experts)
        moved = jnp.where(expert_ids < left, expert_ids, expert_ids - (plan.num_experts - left))
        expert_ids = jnp.where(is_gone, -1, moved)
    found = []
    for start in range(0, plan.tokens_per_rank, tokens):
        ids_here, x_here, weights_here = (a[start : start + tokens] for a in (expert_ids, x, weights))
        if not plan.exchanges:
            operands = (ids_here, experts, constants, x_here, weights_here)
            summed = local_sum(*operands, chunk_plan, kind, weigh_inputs=weigh_inputs)
            found.append((*summed, jnp.ones((), jnp.int32)))
            continue
        transport = transport_of(chunk_plan)
        manifest = count_pairs(transport, ids_here, chunk_plan, rank_table=rank_table)
        num_rounds = count_rounds(transport, manifest, chunk_plan)
        manifest = _compat.as_varying(manifest, plan.token_axes)
        terms = weightless_terms(manifest.expert_ids, x_here, constants, chunk_plan)
        terms = _compat.as_varying(terms, plan.token_axes)
        row_weights = None
        if weigh_inputs:
            row_weights, weights_here = weights_here, jnp.where(manifest.travels, 1.0, weights_here)
        operands = (experts, x_here, row_weights, weights_here)
        total = _routed_sum(chunk_plan, kind, *operands, terms, manifest, num_rounds)
        found.append((total, manifest.stats.num_dropped[0], num_rounds))
    totals, dropped, rounds = zip(*found, strict=True)
    return jnp.concatenate(totals), functools.reduce(jnp.add, dropped), functools.reduce(jnp.maximum, rounds)


def _round(
    through: Callable,
    plan: Plan,
    kind: ExpertKind,
    index,
    experts,
    x,
    row_weights,
    weights,
    manifest: Manifest,
    earlier=None,
) -> Array:
    """Round ``index``: sends its pairs to the experts, and collects what they make.

    ``row_weights`` [T, K] multiply the rows that experts get, where they are not None, and ``weights`` [T, K] what the
    experts make of them. ``earlier`` is what the rounds before collected, and the result includes it; None in the first
    round. ``through`` is ``kind.slots``, or ``kind.overflow_slots`` in a round that keeps no residuals.
    """
    transport = transport_of(plan)
    # 1. Which pairs travel in this round, and where their rows lie.
    handle = open_round(transport, manifest, index * plan.pair_capacity, plan.pair_capacity, plan)
    # 2. Token rows [T, H] to inbox slots [A, H]. They stay there: the experts pick them out in their order.
    sent = send_rows(transport, plan.dispatch_recipe, ordered=False, x=x, handle=handle, weights=row_weights)
    arrived = dequantized(sent.rows, plan)
    if sent.weights is not None:
        arrived = weighed(arrived, sent.weights)
    # 3. Through the experts, into the same slots.
    made = through(plan, kind.what, experts, arrived, transport.inbox_order(handle.maps), handle.group_sizes)
    # 4. Back to the tokens.
    collected, _ = collect_rows(transport, ordered=False, rows=made, weights=weights, handle=handle)
    return collected if earlier is None else transport.together(earlier, collected, handle.maps)


def _add_overflow_round(
    plan: Plan, kind: ExpertKind, index, grads, ct, manifest: Manifest, experts, x, row_weights, weights
):
    """Computes an overflow round again, and adds its gradients to ``grads``, those of the arrays behind ``ct``.

    ``ct`` is that of what all rounds collected. Steps 1 to 3 are those of ``_round``.
    """
    # d_made, d_weights: the adjoint of collecting, from ct    # [A, H] and [T, C] from [C, T, H], or [T, H] of sums
    # d_experts, d_arrived: through the experts, from d_made   # see ``grouping``; [A, H]
    # d_x, d_row_weights: the adjoint of sending, from d_arrived    # [T, H] and [T, K] from [A, H]
    d_experts, d_x, d_row_weights, d_weights = grads
    transport = transport_of(plan)
    # 1. Which pairs travel in this round, and where their rows lie.
    handle = open_round(transport, manifest, index * plan.pair_capacity, plan.pair_capacity, plan)
    order = transport.inbox_order(handle.maps)

    def sent(x, row_weights):
        sent = send_rows(transport, plan.dispatch_recipe, ordered=False, x=x, handle=handle, weights=row_weights)
        rows = dequantized(sent.rows, plan)
        return rows if sent.weights is None else weighed(rows, sent.weights)

    def returned(made, weights):
        return collect_rows(transport, ordered=False, rows=made, weights=weights, handle=handle)[0]

    # 2. Token rows to inbox slots.
    arrived, pull_sent = jax.vjp(sent, x, row_weights)
    # 3. Through the experts. Where sums are made at the tokens, the adjoint of collecting does not read what the
    #    experts made, and the compiler leaves this step out.
    made = kind.overflow_slots(plan, kind.what, experts, arrived, order, handle.group_sizes)
    # 4. Back through collecting, through the experts and through sending.
    d_made, more_weights = jax.vjp(returned, made, weights)[1](ct)
    d_experts, d_arrived = kind.add_overflow_gradients(
        plan, kind.what, d_experts, experts, arrived, d_made, order, handle.group_sizes
    )
    d_tokens = jax.tree.map(jnp.add, (d_x, d_row_weights), pull_sent(d_arrived))
    return d_experts, *d_tokens, d_weights + more_weights


# What a loop of unknown length says where somebody asks for a derivative that it has not.
_FIRST_ORDER = (
    "forward mode and second derivatives of the layer are there for plans of one round, and this one may need "
    "max_rounds={0.max_rounds}: make it with capacity_factor={0.ep_size}, which holds any skew in one "
    "round; or use first derivatives in reverse mode (jax.grad, jax.vjp) and differences of them"
)


@functools.partial(custom_gradient, num_static=2)
def _routed_sum(plan: Plan, kind, experts, x, row_weights, weights, terms, manifest, num_rounds):
    """[T, H] fp32. The first round is inline and keeps its residuals; the others are a loop that keeps none."""
    collected = _round(kind.slots, plan, kind, 0, experts, x, row_weights, weights, manifest)
    collected = _overflow_rounds(plan, kind, collected, num_rounds, manifest, experts, x, row_weights, weights)
    return finish(transport_of(plan), collected, weights, manifest.travels, terms, plan)


def _overflow_rounds(plan: Plan, kind, collected, num_rounds, *operands):
    """Adds what the further rounds collect to what the first one ``collected``."""

    def overflow(collected, num_rounds, manifest, experts, x, row_weights, weights):
        def turn(state):
            index, collected = state
            late_experts, late_x = _compat.late(index, (experts, x))
            operands = (late_experts, late_x, row_weights, weights)
            return index + 1, _round(kind.overflow_slots, plan, kind, index, *operands, manifest, collected)

        return lax.while_loop(lambda state: state[0] < num_rounds, turn, (jnp.ones_like(num_rounds), collected))[1]

    if plan.max_rounds == 1:
        return collected
    return first_order_only(overflow, _FIRST_ORDER.format(plan))(collected, num_rounds, *operands)


def _routed_forward(plan: Plan, kind, experts, x, row_weights, weights, terms, manifest, num_rounds):
    first = functools.partial(_round, kind.slots, plan, kind, 0, manifest=manifest)
    operands = (experts, x, row_weights, weights)
    collected, pull_first = jax.vjp(first, *operands)
    collected = _overflow_rounds(plan, kind, collected, num_rounds, manifest, *operands)
    total = finish(transport_of(plan), collected, weights, manifest.travels, terms, plan)
    return total, (pull_first, collected, operands, terms, manifest, num_rounds)


def _routed_backward(plan: Plan, kind, residuals, ct):
    # d_collected, d_weights, d_terms: through the sum at the tokens, from ct [T, H]
    # d_experts, d_x, d_row_weights, d_weights: summed over the rounds, each computed again but for the first
    pull_first, collected, operands, terms, manifest, num_rounds = residuals
    weights = operands[-1]

    def finished(collected, weights, terms):
        return finish(transport_of(plan), collected, weights, manifest.travels, terms, plan)

    pull_finish = jax.vjp(finished, collected, weights, terms)[1]
    d_collected, d_weights, d_terms = pull_finish(ct)
    grads = without_float0(pull_first(d_collected))

    def overflow(grads, num_rounds, manifest, pull_finish, *read):
        def turn(state):
            index, grads = state
            ct, *operands = _compat.late(index, read)
            d_collected = pull_finish(ct)[0]
            return index + 1, _add_overflow_round(plan, kind, index, grads, d_collected, manifest, *operands)

        return lax.while_loop(lambda state: state[0] < num_rounds, turn, (jnp.ones_like(num_rounds), grads))[1]

    if plan.max_rounds > 1:
        overflow = first_order_only(overflow, _FIRST_ORDER.format(plan))
        grads = overflow(grads, num_rounds, manifest, pull_finish, ct, *operands)
    *d_sent, d_sent_weights = grads
    return *d_sent, d_weights + d_sent_weights, d_terms, None, None


_routed_sum.defvjp(_routed_forward, _routed_backward)
