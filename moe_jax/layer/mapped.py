"""Experts of your own in the rounds of the layer: any differentiable function of rows and group sizes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import jaxpr_as_fun

from moe_jax import _compat, collectives
from moe_jax.derivatives import without_float0
from moe_jax.errors import InvalidArgumentError, ShapeError, UnsupportedError, check_choice, check_dtype
from moe_jax.layer.grouping import ExpertKind, rows_of_slots, slots_of_rows
from moe_jax.layer.layer import check_choices, check_chunks, check_tokens, instances_on, routing_of
from moe_jax.layer.params import check_layer_plan
from moe_jax.layer.placement import BALANCES, check_shares, check_table
from moe_jax.layer.rounds import routed_sum
from moe_jax.layer.weightless import Constants
from moe_jax.plan import Plan
from moe_jax.transports import InboxOrder
from moe_jax.types import LayerStats

Array = jax.Array


def map_experts(
    fn: Callable[[Any, Array, Array], Array],
    params: Any,
    x: Array,
    expert_ids: Array,
    combine_weights: Array,
    plan: Plan,
    *,
    token_mask: Array | None = None,
    table: Array | None = None,
    balance: str = "rank",
    shares: Array | None = None,
    rank_table: Array | None = None,
    chunks: int = 1,
) -> tuple[Array, LayerStats]:
    """The rounds of ``moe_layer`` around experts of your own. Call it per shard, inside ``shard_map``.

    ``y[t] = sum_k combine_weights[t, k] * expert[expert_ids[t, k]](x[t])``, in fp32 over ascending k, rounded once,
    where the experts are what ``fn`` makes of rows. With overflow="dropless" the result is exact at any skew, in
    bounded memory: rows come in rounds, and ``fn`` is called in each of them.

    Args:
      fn: (params, rows [M, H] in ``plan.dtype``, group_sizes [L] i32) -> [M, H'] floats. Rows lie expert after expert,
        ``group_sizes`` of them for each of the L experts of this rank; those past their sum are zeros, and what ``fn``
        makes of them counts nowhere. A row's result must depend on that row and on its expert only. With tp > 1 every
        tp rank gets the same rows, and their results are added. ``fn`` is static: traced values that it reads must come
        as ``params``, since it can be called again in the backward pass. ``moe_jax.grouped_matmul`` multiplies such
        rows.
      params: any pytree of this shard's arrays. Integers and codes have no gradient.
      x: [T, H] in ``plan.dtype``.
      expert_ids: [T, K] i32; -1 for none. Ids of zero and copy experts follow those of the plan's experts, or, with
        ``table``, of the logical ones.
      combine_weights: [T, K] f32; those of choices that are none may be anything.
      plan: static, without constant experts and without shared experts on ranks of their own.
      token_mask: [T] bool; false = padding, which goes nowhere and whose result is zero.
      table, balance, shares: the instances of each logical expert, and how they share its tokens, as for ``moe_layer``:
        ``expert_ids`` and ``stats.load`` are then those of logical experts, and the plan and ``fn`` count instances.
      rank_table, chunks: as for ``moe_layer``.

    Returns:
      y [T, H'] in ``plan.dtype``, and LayerStats over all tokens of the mesh, without losses. Differentiable in
      ``params``, ``x`` and ``combine_weights``; forward mode and derivatives of higher order need a plan with
      ``plan.max_rounds == 1``.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, UnexpectedArgumentError, MeshError: an argument, or what ``fn``
        makes or reads, is not as above.
      UnsupportedError: the plan has experts that this function does not serve.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> from jax.sharding import PartitionSpec as P
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> mesh = moe.make_mesh(ep=2)
    >>> plan = moe.make_plan(mesh, tokens_per_rank=2, hidden=4, num_experts=4, top_k=1, dtype="float32")
    >>> def experts(weights, rows, group_sizes):
    ...     return jnp.tanh(moe.grouped_matmul(rows, weights, group_sizes))
    >>> def layer(weights, x, ids):
    ...     return moe.map_experts(experts, weights, x, ids, jnp.ones((2, 1)), plan)[0]
    >>> mapped = jax.jit(jax.shard_map(layer, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    >>> mapped(jnp.ones((4, 4, 3)), jnp.ones((4, 4)), jnp.array([[3], [0], [1], [2]])).shape
    (4, 3)
    """
    check_layer_plan(plan)
    if plan.num_const_experts:
        raise UnsupportedError(
            f"plan.num_const_experts={plan.num_const_experts}: constant experts have parameters, which map_experts "
            "does not take; use moe_layer, or add what they give outside"
        )
    if not callable(fn):
        raise InvalidArgumentError(f"fn={fn!r} must be a function of (params, rows, group_sizes)")
    check_chunks(chunks, plan)
    collectives.check_axes(plan, replicas=True)
    check_tokens(x, token_mask, plan)
    check_choices(expert_ids, combine_weights, (plan.tokens_per_rank, plan.top_k))
    check_choice("balance", balance, BALANCES)
    if table is not None:
        check_table(table)
    if shares is not None:
        check_shares(shares, table, balance)
    given = (x, expert_ids, combine_weights, token_mask, table, shares, rank_table)
    axes_of_tokens = _compat.union_of_varying_axes(given)
    # 1. Padding goes nowhere, and may hold anything. A table says which instances compute.
    if token_mask is not None:
        x = jnp.where(token_mask[:, None], x, jnp.zeros((), x.dtype))
    routing = routing_of((expert_ids, combine_weights), token_mask, table, plan)
    expert_ids = routing.expert_ids
    if table is not None:
        expert_ids = instances_on(expert_ids, table, plan, balance=balance, shares=shares, chunks=chunks)
    # 2. Tokens go to their experts and come back as weighted sums, in rounds.
    operands = _compat.as_varying((expert_ids, params, x, routing.combine_weights), plan.token_axes)
    expert_ids, params, x, weights = operands
    kind, no_constants = mapped(fn), Constants(None, None, None)
    total, num_dropped, num_rounds = routed_sum(
        expert_ids, params, no_constants, x, weights, plan, kind, rank_table=rank_table, chunks=chunks
    )
    if not plan.num_pairs:  # no device has a token, so nobody has asked the experts how wide their rows are
        width = _made(plan, fn, params, x, jnp.zeros(plan.num_local_experts, jnp.int32)).shape[1]
        total = jnp.zeros_like(total, shape=(plan.tokens_per_rank, width))
    if token_mask is not None:
        total = jnp.where(token_mask[:, None], total, 0.0)
    stats = LayerStats(
        num_dropped=collectives.sum_over(num_dropped, plan.token_axes),
        num_rounds=collectives.max_over(num_rounds, plan.dp_axis),
        load=routing.load,
        losses={},
    )
    return _compat.drop_unit_axes((total.astype(plan.dtype), stats), axes_of_tokens)


def mapped(fn: Callable[[Any, Array, Array], Array]) -> ExpertKind:
    """The experts that ``fn`` of ``map_experts`` computes."""
    return ExpertKind(_mapped_slots, _mapped_slots, _add_mapped_gradients, fn)


def _mapped_slots(plan: Plan, fn: Callable, params: Any, arrived: Array, order: InboxOrder | None, group_sizes: Array):
    """[A, H] -> [A, H'], what ``fn`` makes of each row, in the slot that the row came in."""
    with jax.named_scope("experts"):
        rows = rows_of_slots(arrived, order, plan)
        # Rows past the last one hold anything, NaN too. A function of the user's may sum over them in its gradient, so
        # they are zeros for it, and so are the cotangents of what it makes of them.
        written = (jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None]
        made = _made(plan, fn, params, jnp.where(written, rows, jnp.zeros((), rows.dtype)), group_sizes)
        return slots_of_rows(jnp.where(written, made, jnp.zeros((), made.dtype)).astype(plan.dtype), order, plan)


def _made(plan: Plan, fn: Callable, params: Any, rows: Array, group_sizes: Array) -> Array:
    """[M, H] -> [M, H'], what ``fn`` makes of rows; raises where it makes something else, or reads what it may not."""

    def checked(params, rows, group_sizes):
        made = fn(params, rows, group_sizes)
        shape = getattr(made, "shape", None)
        if shape is None or len(shape) != 2 or shape[0] != rows.shape[0]:
            raise ShapeError(
                f"fn returned {type(made).__name__ if shape is None else f'an array of shape {shape}'}; it must return "
                f"[M, H'] with M={rows.shape[0]}, a row for each row that it was given"
            )
        check_dtype("what fn returned", made, (jnp.floating,))
        if plan.num_copy_experts and shape[1] != plan.hidden:
            raise ShapeError(
                f"fn returned rows of width {shape[1]}, and plan.num_copy_experts={plan.num_copy_experts} experts add "
                f"tokens of width {plan.hidden}; return rows of that width"
            )
        return made

    program = jax.make_jaxpr(checked)(params, rows, group_sizes)
    # Constants of the program that are traced are values from outside. Whether they could be read, and differentiated,
    # would depend on the number of rounds, so they never can.
    if traced := [jax.typeof(value).str_short() for value in program.consts if isinstance(value, Tracer)]:
        raise InvalidArgumentError(
            f"fn={getattr(fn, '__name__', fn)!r} reads traced values that are not its arguments: {', '.join(traced)}; "
            "make them part of params, which fn is given, or compute them inside fn"
        )
    return jaxpr_as_fun(program)(*jax.tree.leaves((params, rows, group_sizes)))[0]


def _add_mapped_gradients(plan: Plan, fn, grads, params, arrived, ct, order, group_sizes):
    """``add_overflow_gradients`` of an ``ExpertKind``."""

    # d_params, d_arrived: the adjoint of ``_mapped_slots``, from ct    # [A, H] from [A, H']
    def through(params, arrived):
        return _mapped_slots(plan, fn, params, arrived, order, group_sizes)

    more, d_arrived = jax.vjp(through, params, arrived)[1](ct)
    return jax.tree.map(jnp.add, grads, without_float0(more)), d_arrived
