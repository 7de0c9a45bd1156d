"""From what arrived to what goes back: rows are picked out of inbox slots, multiplied, and put into slots again.

Nothing here communicates. Rows lie expert after expert. The backward pass keeps the rows and the inputs of the
activation, and computes the activation again.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax.activations import Choice, activation_of
from moe_jax.derivatives import custom_gradient, take_rows
from moe_jax.kernels import fused_kernels
from moe_jax.layer.experts import activate, project_in, project_in_and_activate, project_out, split_by_projection
from moe_jax.plan import Plan
from moe_jax.transports import InboxOrder

Array = jax.Array


@functools.partial(custom_gradient, num_static=2)
def expert_slots(
    plan: Plan,
    activation: Choice,
    experts: dict[str, Array],
    arrived: Array,
    order: InboxOrder | None,
    group_sizes: Array,
) -> Array:
    """What the experts make of the rows that arrived, each in the slot that its row came in.

    Args:
      plan, activation: static.
      experts: w_gate (if gated) and w_up [L, H, F], w_down [L, F, H]; optional b_gate, b_up [L, F], b_down [L, H].
      arrived: [A, H]; slots that no row came in influence nothing.
      order: of the rows; None: they lie in order already, expert by expert from the first slot on.
      group_sizes: [L] i32, rows of each expert.

    Returns:
      [A, H] in the dtype of ``arrived``. Differentiable in ``experts`` and ``arrived``.
    """
    return _forward(plan, activation, experts, arrived, order, group_sizes, keep=False)[0]


class _Way(NamedTuple):
    """What the kernels of the plan do by themselves.

    Attributes:
      copies: the order that rows are copied into before the products, and out of after them; None: they are not.
      row_slot: [M] i32, the slot of each row, for kernels that read and write rows in slots; None: they do not.
      activates: whether one kernel makes the inner projections and the activation.
    """

    copies: InboxOrder | None
    row_slot: Array | None
    activates: bool


def _way(plan: Plan, activation: Choice, experts: dict[str, Array], slots: Array, order: InboxOrder | None) -> _Way:
    """The way that the kernels of the plan allow; ``slots``: [A, H], what arrived, or its cotangent."""
    num_rows = slots.shape[0] if order is None else order.row_inbox.shape[0]
    (num_groups, hidden, ffn), itemsize = experts["w_up"].shape, slots.dtype.itemsize
    fused = fused_kernels(plan.kernels, num_rows, num_groups, hidden, ffn, itemsize)
    activates = "gated_matmul" in fused and activation_of(activation).fusible
    if order is None or not {"slot_matmul", "slot_outer"} <= set(fused):
        return _Way(order, None, activates)
    return _Way(None, order.row_inbox, activates)


def _forward(plan: Plan, activation, experts, arrived, order, group_sizes, keep=True):
    with jax.named_scope("experts"):
        way = _way(plan, activation, experts, arrived, order)
        rows = rows_of_slots(arrived, way.copies, plan)
        inner, hidden = project_in_and_activate(
            experts,
            rows,
            group_sizes,
            plan.kernels,
            way.row_slot,
            activation=activation,
            keep=keep,
            fused=way.activates,
        )
        made = project_out(experts, hidden, group_sizes, plan.kernels, way.row_slot, arrived.shape[0])
        return slots_of_rows(made, way.copies, plan), (experts, rows, inner, order, group_sizes)


def _backward(plan: Plan, activation, residuals, ct):
    # With the rows of each expert l: inner = rows @ w_in[l], hidden = activation(inner), made = hidden @ w_out[l], with
    # biases added. w_in is w_up, and w_gate beside it if gated; w_out is w_down. Where kernels read and write slots,
    # rows, made, ct and d_rows lie in slots. From ct [M, H], picked out of slots:
    # d_w_out[l] = hidden^T @ ct         # [F, H], over the rows of l; d_b_down[l] is the sum of ct
    # d_hidden = ct @ w_out[l]^T         # [M, F]
    # d_inner = activation'(inner)^T d_hidden    # [M, F] for each projection
    # d_w_in[l] = rows^T @ d_inner       # [H, F], over the rows of l; the biases are sums of d_inner
    # d_rows = d_inner @ w_in[l]^T       # [M, H], summed over the projections, and put into slots [A, H]
    experts, rows, inner, order, group_sizes = residuals
    of_inner, of_out = split_by_projection(experts)
    with jax.named_scope("experts"):
        way = _way(plan, activation, experts, ct, order)
        hidden, pull_hidden = jax.vjp(lambda inner: activate(inner[0], inner[1], activation), inner)
        pull_out = jax.vjp(
            lambda weights, hidden: project_out(weights, hidden, group_sizes, plan.kernels, way.row_slot, ct.shape[0]),
            of_out,
            hidden,
        )[1]
        d_of_out, d_hidden = pull_out(rows_of_slots(ct, way.copies, plan))
        (d_inner,) = pull_hidden(d_hidden)
        pull_in = jax.vjp(
            lambda weights, rows: project_in(weights, rows, group_sizes, plan.kernels, way.row_slot), of_inner, rows
        )[1]
        d_of_inner, d_rows = pull_in(d_inner)
        return {**d_of_out, **d_of_inner}, slots_of_rows(d_rows, way.copies, plan), None, None


expert_slots.defvjp(_forward, _backward)


def overflow_slots(
    plan: Plan,
    activation: Choice,
    experts: dict[str, Array],
    arrived: Array,
    order: InboxOrder | None,
    group_sizes: Array,
) -> Array:
    """What ``expert_slots`` gives, without a derivative, and ``arrived`` itself where no row came."""

    def run(arrived, experts):
        return _forward(plan, activation, experts, arrived, order, group_sizes, keep=False)[0]

    return _if_any(group_sizes, run, arrived, experts)


def add_overflow_gradients(
    plan: Plan,
    activation: Choice,
    grads: dict[str, Array],
    experts: dict[str, Array],
    arrived: Array,
    ct: Array,
    order: InboxOrder | None,
    group_sizes: Array,
) -> tuple[dict[str, Array], Array]:
    """``grads`` of the experts plus those of ``overflow_slots``, and the cotangent of ``arrived``.

    ``ct`` [A, H] is that of the result of ``overflow_slots``, [A, H]. Where no row came, the results are ``grads`` and
    ``ct`` themselves. Nothing was kept of the forward pass, so the inner activations are computed again.
    """

    def run(carry, read):
        (grads, ct), (experts, arrived) = carry, read
        way = _way(plan, activation, experts, arrived, order)
        rows = rows_of_slots(arrived, way.copies, plan)
        with jax.named_scope("experts"):
            inner = project_in(experts, rows, group_sizes, plan.kernels, way.row_slot)
        residuals = experts, rows, inner, order, group_sizes
        more, d_arrived, *_ = _backward(plan, activation, residuals, ct)
        return jax.tree.map(jnp.add, grads, more), d_arrived

    return _if_any(group_sizes, run, (grads, ct), (experts, arrived))


def _if_any(group_sizes: Array, run: Callable, init: Any, read: Any) -> Any:
    """``run(init, read)`` where there are rows, else ``init``.

    A loop of one turn or none: it works in place, where a conditional would copy what it lets pass.
    """
    with jax.named_scope("experts"):
        init, read = _compat.as_varying((init, read), _compat.union_of_varying_axes((init, read, group_sizes)))
        turns = jnp.any(group_sizes > 0).astype(jnp.int32)
        return lax.fori_loop(0, turns, lambda turn, carry: run(carry, _compat.late(turn, read)), init)


@dataclasses.dataclass(frozen=True)
class ExpertKind:
    """What a round does with the rows that arrived. Static; two kinds are equal if their parts are.

    Attributes:
      slots: (plan, what, params, arrived [A, H], order, group_sizes) -> [A, H'], what the experts make of the rows,
        each in the slot that its row came in. Differentiable in params and arrived.
      overflow_slots: the same without a derivative, for rounds that keep nothing.
      add_overflow_gradients: (plan, what, grads, params, arrived, ct [A, H'], order, group_sizes) -> (``grads`` plus
        those of params, d_arrived [A, H]), which computes the experts again.
      what: says to all three which experts of this kind they are.
    """

    slots: Callable
    overflow_slots: Callable
    add_overflow_gradients: Callable
    what: Any


# The feed-forward experts of the layer, whose parameters are those of ``expert_slots``; takes their activation.
feed_forward = functools.partial(ExpertKind, expert_slots, overflow_slots, add_overflow_gradients)


def rows_of_slots(slots: Array, order: InboxOrder | None, plan: Plan) -> Array:
    """[A, H] -> [M, H], the rows in the order of the experts. Past the last one they may hold anything."""
    return slots if order is None else take_rows(slots, order.row_inbox, poison=plan.poison)


def slots_of_rows(rows: Array, order: InboxOrder | None, plan: Plan) -> Array:
    """[M, H] -> [A, H], each row in its slot. Slots that no row came in may hold anything."""
    return rows if order is None else take_rows(rows, order.inbox_row, poison=plan.poison)
