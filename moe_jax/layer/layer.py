"""The differentiable MoE layer: route, send tokens through their experts in rounds, add the shared experts."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat, collectives
from moe_jax.activations import Choice, check_activation
from moe_jax.config import RouterConfig
from moe_jax.errors import (
    InvalidArgumentError,
    check_array,
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_mask,
    check_shape,
    check_type,
)
from moe_jax.layer.experts import shared_ffn
from moe_jax.layer.grouping import feed_forward
from moe_jax.layer.params import check_layer_plan, check_params, check_router, gathered
from moe_jax.layer.placement import BALANCES, check_shares, check_table, instances_of
from moe_jax.layer.rounds import routed_sum
from moe_jax.layer.router import check_sequences, choose_experts
from moe_jax.layer.weightless import Constants
from moe_jax.layout import count_each
from moe_jax.parameters import weights_of
from moe_jax.plan import Plan
from moe_jax.plan.checks import check_shared
from moe_jax.types import LayerStats, Routing

Array = jax.Array

_CONSTANTS = ("const_alpha1", "const_alpha2", "const_v")  # in the order of ``Constants``


def moe_layer(
    params: dict[str, Array],
    x: Array,
    plan: Plan,
    router: RouterConfig | None,
    *,
    activation: Choice = "swiglu",
    shared_activation: Choice | None = None,
    token_mask: Array | None = None,
    table: Array | None = None,
    balance: str = "rank",
    shares: Array | None = None,
    rank_table: Array | None = None,
    chunks: int = 1,
    routing: Routing | tuple[Array, Array] | None = None,
    router_x: Array | None = None,
    weigh_inputs: bool = False,
    return_routing: bool = False,
    sequence_length: int | None = None,
) -> tuple[Array, LayerStats]:
    """One Mixture-of-Experts layer. Call it per shard, inside ``shard_map`` with ``check_vma=True``.

    ``y[t] = sum_k w[t, k] * expert[id[t, k]](x[t]) + gate[t] * shared(x[t])``; the sum in fp32 over ascending k,
    rounded once. ``gate[t] = sigmoid(x[t] @ shared_router)`` in fp32 where there is such a parameter, else 1.
    With overflow="dropless" the result is exact at any skew: a round moves ``plan.pair_capacity`` rows per pair of
    ranks; what does not fit goes into further rounds, run in a loop that all ranks leave together, and recomputed in
    the backward pass, so that memory does not grow with the skew. Where one device holds all experts (ep = tp = 1)
    nothing is exchanged: T * K rows are gathered, multiplied and gathered back, in one round.

    Args:
      params: this shard's part, in any float dtype (cast to ``plan.dtype`` for the products, except the router):
        router [H, E'], optional router_bias [E']; selection_bias [E'] if ``router.selection_bias``, where E' is
        ``plan.num_ids``: routed, zero, copy and constant experts; optional expert_scale [E'], which multiplies the
        final weight of every choice of that expert;
        w_gate (if gated), w_up [E / ep, H, F / tp], w_down [E / ep, F / tp, H];
        optional b_gate, b_up [E / ep, F / tp], b_down [E / ep, H]; with shared experts: shared_gate (if gated),
        shared_up [H, S], shared_down [S, H] of any width S, optional shared_router [H, 1], replicated; with constant
        experts: const_alpha1, const_alpha2 and const_v [Cc, H], replicated.
      x: [T, H] in ``plan.dtype``.
      plan, router: static.
      activation: what an expert does between its projections. Gated: "swiglu" (silu(gate) * up), "geglu", "geglu_tanh",
        "reglu", "relu2_gated" (relu(gate)^2 * up), "clamped_swiglu" or a ``ClampedSwiGLU``. Without a gate: "silu",
        "gelu" (by erf), "gelu_tanh", "relu", "relu2". Or an elementwise function of (gate, up), or of (up) alone for
        experts without a gate: fp32 in, floats of the same shape out, differentiated by JAX. It is static, so give the
        same object each time, and what it reads beside its arguments must be constants. Rows past the last one may hold
        anything. Kernels fuse the names that they know; a function is an operation of its own.
      shared_activation: the same for the shared expert; None: as ``activation``.
      token_mask: [T] bool; false = padding: it goes nowhere, counts nowhere and its result is zero.
      table: [E_logical, F] i32, the instances of each logical expert, see ``update_expert``. Then the router scores
        logical experts (E' = E_logical plus the weightless ones), and ``plan.num_experts`` counts instances.
      balance: "rank", "token" or "load", how the instances of an expert share its tokens, see ``update_expert``; read
        with ``table`` only. With "load" each gets its share of every chunk on every device, and padding does not count.
      shares: [E_logical, F - 1] f32, of the instances in ``table``, with ``balance="load"`` only; None: equal ones.
      rank_table: [4 + 2 * ep] i32, who is alive, see ``dispatch``: tokens of removed ranks get nothing from routed
        experts. Without ``table`` the router must not choose the experts that are gone; choices that do are dropped.
      chunks: a divisor of T. The tokens pass in this many chunks, each with its share of ``plan.pair_capacity``, and
        no chunk waits for another: while one is multiplied, the next can travel. Values are those of chunks=1, except
        that overflow="drop" may drop other pairs. ``num_rounds`` is that of the chunk that needed most.
      routing: choices that were made outside, for hash layers, replayed routes and routers of your own: (expert_ids
        [T, K] i32, where -1, and any other id out of range, is a choice that goes nowhere and counts nowhere;
        combine_weights [T, K] float), or a ``Routing``, whose losses are then those of the result. Ids are what the
        router would choose: logical ones with ``table``; those of weightless experts follow the others. ``router`` may
        then be None, and the router's parameters may be left out; those that are there are not read.
      router_x: [T, H_r] in any float dtype, what the router sees where that is not what the experts see, such as a
        token before it is projected to H, or under another norm; params["router"] is then [H_r, E']. Not with
        ``routing``.
      weigh_inputs: whether the weight of a choice multiplies what its expert is given, instead of what the expert makes
        of that, as in Llama 4: ``expert[id[t, k]](w[t, k] * x[t])``, the product in fp32 and rounded to ``plan.dtype``.
        The weights then travel with the rows. What weightless experts add is weighted in either case.
      return_routing: whether ``stats.routing`` is (expert_ids, combine_weights), those of this device's tokens. The
        other stats are the same on all devices, so that ``out_specs`` have a ``LayerStats`` of specs, or a ``replace``.
      sequence_length: of the sequences that the tokens of a device are, see ``route``; not with ``routing``.

    Returns:
      y [T, H] in ``plan.dtype``, and LayerStats over all tokens of the mesh. Differentiable in x, ``router_x``, the
      weights of ``routing`` and every float parameter except ``selection_bias``. A tuple ``routing`` has no losses.
      Forward mode and derivatives of higher order need a plan with ``plan.max_rounds == 1``.

    Raises:
      InvalidArgumentError: lists everything that is wrong with ``params``; lists every way in which the router's groups
        do not fit the plan; an unknown activation, or a function that takes neither one array nor two; chunks that do
        not divide T.
      MissingArgumentError, ShapeError, DtypeError, MeshError: as for ``dispatch``; ``table`` is missing, or of another
        number of experts, where the router scores fewer experts than the plan has instances.
      UnexpectedArgumentError: ``shares`` where nobody reads them.
      UnsupportedError: the plan puts shared experts on ranks of their own; or somebody asks for a derivative that needs
        a plan of one round.
    """
    check_layer_plan(plan)
    if router is not None or routing is None:
        check_type("router", router, RouterConfig, "build one with moe_jax.RouterConfig(...), or pass routing=")
    check_activation(activation)
    check_shared(plan, None, shared_activation)
    check_choice("balance", balance, BALANCES)
    if table is not None:
        check_table(table)
    if shares is not None:
        check_shares(shares, table, balance)
    check_flag("weigh_inputs", weigh_inputs)
    check_flag("return_routing", return_routing)
    if sequence_length is not None:
        check_sequences_of(sequence_length, plan.tokens_per_rank, routing)
    check_chunks(chunks, plan)
    collectives.check_axes(plan, replicas=True)
    check_tokens(x, token_mask, plan)
    if router_x is not None:
        check_router_x(router_x, x.shape[:1], routing)
    choices = None if routing is None else choices_of(routing)
    if choices is not None:
        check_choices(*choices, (plan.tokens_per_rank, plan.top_k))
    check_params(
        params,
        plan,
        router,
        activation,
        shared_activation,
        on_device=True,
        table=table,
        routed=choices is not None,
        router_x=router_x,
    )
    if router is not None:
        check_router(router, plan, None if table is None else table.shape[0])
    y, stats = layer_of_shard(
        params,
        x,
        token_mask,
        table,
        shares,
        rank_table,
        choices,
        router_x,
        plan=plan,
        router=router,
        activation=activation,
        shared_activation=activation if shared_activation is None else shared_activation,
        balance=balance,
        chunks=chunks,
        weigh_inputs=weigh_inputs,
        return_routing=return_routing,
        sequence_length=sequence_length,
    )
    return y, with_losses(stats, routing) if isinstance(routing, Routing) else stats


def layer_of_shard(
    params: dict[str, Array],
    x: Array,
    token_mask: Array | None,
    table: Array | None,
    shares: Array | None,
    rank_table: Array | None,
    choices: tuple[Array, Array] | None,
    router_x: Array | None,
    *,
    plan: Plan,
    router: RouterConfig | None,
    activation: Choice,
    shared_activation: Choice,
    balance: str,
    chunks: int,
    weigh_inputs: bool,
    return_routing: bool,
    sequence_length: int | None,
) -> tuple[Array, LayerStats]:
    """``moe_layer`` of arguments that have been checked, there or by ``moe_on_mesh``. Arrays come first, options after.

    Between collectives every value is typed as varying over all axes of the plan. Results leave as the tokens came:
    over an axis of one device they vary only if an operand does, whatever the parameters do.
    """
    axes_of_tokens = _compat.union_of_varying_axes((x, token_mask, table, shares, rank_table, choices, router_x))
    # 1. Operands. Parameters are typed as varying over axes of size 1, or JAX would sum their gradients there.
    x, router_x = _compat.as_varying((x, router_x), plan.token_axes)
    params = _compat.as_varying_over_units(params, plan.token_axes)
    if token_mask is not None:  # padding may hold anything; from here on it is zero
        x = jnp.where(token_mask[:, None], x, jnp.zeros((), x.dtype))
        if router_x is not None:
            router_x = jnp.where(token_mask[:, None], router_x, jnp.zeros((), router_x.dtype))
    # 2. Every token chooses its experts, or has done so, and a table says which instances of them compute.
    if choices is None:
        assert router is not None  # as has been checked
        logits = router_logits(params, x if router_x is None else router_x)
        bias, scale = params.get("selection_bias"), params.get("expert_scale")
        routing = choose_experts(logits, router, plan.top_k, bias, scale, token_mask, plan.token_axes, sequence_length)
    else:
        routing = routing_of(choices, token_mask, table, plan)
    expert_ids = routing.expert_ids
    if table is not None:
        expert_ids = instances_on(expert_ids, table, plan, balance=balance, shares=shares, chunks=chunks)
    # 3. Tokens go to their experts and come back as weighted sums, in rounds.
    experts = gathered(weights_of("experts", params), plan)
    if "b_down" in experts:  # what the tp ranks make is summed, so only the first of them adds this bias
        experts["b_down"] = jnp.where(collectives.tp_rank(plan) == 0, experts["b_down"], 0.0)
    given = weights_of("constants", params)
    constants = Constants(*(given[name].astype(plan.dtype) if given else None for name in _CONSTANTS))
    experts, constants, weights = _compat.as_varying((experts, constants, routing.combine_weights), plan.token_axes)
    total, num_dropped, num_rounds = routed_sum(
        expert_ids,
        experts,
        constants,
        x,
        weights,
        plan,
        feed_forward(activation),
        rank_table=rank_table,
        chunks=chunks,
        weigh_inputs=weigh_inputs,
    )
    # 4. The shared expert adds its part where the token is.
    if plan.num_shared_experts:
        total = total + shared_ffn(weights_of("shared", params), x, activation=shared_activation)
    if token_mask is not None:
        total = jnp.where(token_mask[:, None], total, 0.0)
    stats = LayerStats(
        num_dropped=collectives.sum_over(num_dropped, plan.token_axes),
        num_rounds=collectives.max_over(num_rounds, plan.dp_axis),
        load=routing.load,
        losses=routing.losses,
        mean_score=routing.mean_score,
        routing=(routing.expert_ids, routing.combine_weights) if return_routing else None,
    )
    return _compat.drop_unit_axes((total.astype(plan.dtype), stats), axes_of_tokens)


def routing_of(choices: tuple[Array, Array], token_mask: Array | None, table: Array | None, plan: Plan) -> Routing:
    """Choices made outside as a router would have made them: padding has none, and what is none has no weight."""
    expert_ids, weights = _compat.as_varying(choices, plan.token_axes)
    if token_mask is not None:
        expert_ids = jnp.where(token_mask[:, None], expert_ids, -1)
    weights = jnp.where(expert_ids >= 0, weights.astype(jnp.float32), 0.0)
    num_ids = plan.num_ids + (0 if table is None else table.shape[0] - plan.num_experts)
    load = collectives.sum_over(count_each(expert_ids, num_ids), plan.token_axes)
    return Routing(expert_ids=expert_ids, combine_weights=weights, losses={}, load=load)


def instances_on(
    expert_ids: Array, table: Array, plan: Plan, *, balance: str, shares: Array | None, chunks: int
) -> Array:
    """Ids of logical experts -> ids of their instances; weightless experts are numbered behind either."""
    num_logical = table.shape[0]
    is_logical = expert_ids < num_logical
    logical_ids = jnp.where(is_logical, expert_ids, -1)
    rank = collectives.ep_rank(plan)
    if balance == "load":  # Every chunk of every device is split for itself, as if each were a rank.
        num_parts = plan.tp_size * chunks
        part = rank * num_parts + collectives.tp_rank(plan) * chunks + jnp.arange(chunks, dtype=jnp.int32)
        split = jax.vmap(lambda ids, part: instances_of(ids, table, part, plan.ep_size * num_parts, balance, shares))
        ids = split(logical_ids.reshape(chunks, -1, plan.top_k), part).reshape(expert_ids.shape)
    else:
        ids = instances_of(logical_ids, table, rank, plan.ep_size, balance)
    return jnp.where(is_logical, ids, expert_ids - num_logical + plan.num_experts)


def choices_of(routing: Routing | tuple[Array, Array]) -> tuple[Array, Array]:
    """The ids and weights of an argument ``routing``."""
    if isinstance(routing, Routing):
        return routing.expert_ids, routing.combine_weights
    if not isinstance(routing, tuple | list) or len(routing) != 2:
        raise InvalidArgumentError(
            f"routing is a {type(routing).__name__}; pass a tuple (expert_ids, combine_weights), or a moe_jax.Routing"
        )
    return routing[0], routing[1]


def with_losses(stats: LayerStats, routing: Routing) -> LayerStats:
    """``stats`` with what the maker of the choices says of them."""
    return dataclasses.replace(stats, losses=routing.losses, mean_score=routing.mean_score)


def check_sequences_of(sequence_length: int, num_tokens: int, routing: Any) -> None:
    """Raises unless a router of this layer sees ``num_tokens`` tokens as whole sequences."""
    if routing is not None:
        raise InvalidArgumentError(
            f"sequence_length={sequence_length} was given beside routing=, which has no scores; give it to the route "
            "that makes the choices"
        )
    check_sequences(sequence_length, num_tokens)


def check_router_x(router_x: Array, lead: tuple[int, ...], routing: Any) -> None:
    """Raises unless ``router_x`` is something that a router can see of tokens of the shape ``lead``."""
    check_array("router_x", router_x)
    check_shape("router_x", router_x, (*lead, *router_x.shape[-1:]), "[T, H_r], as many tokens as x")
    check_dtype("router_x", router_x, (jnp.floating,))
    if routing is not None:
        raise InvalidArgumentError("router_x was given beside routing=, which needs no router; leave one of them out")


def check_choices(expert_ids: Array, combine_weights: Array, shape: tuple[int, ...]) -> None:
    """Raises unless these are choices of ``shape``, [T, K] on a device, that somebody made outside."""
    check_shape("expert_ids", expert_ids, shape, "[T, K], fixed by the plan; -1 for a choice that is none")
    check_dtype("expert_ids", expert_ids, ("int32",), "cast it with .astype(jnp.int32)")
    check_shape("combine_weights", combine_weights, shape, "[T, K], as expert_ids")
    check_dtype("combine_weights", combine_weights, (jnp.floating,))


def check_tokens(x: Array, token_mask: Array | None, plan: Plan) -> None:
    """Raises unless ``x`` [T, H] and its mask are tokens of one device."""
    check_shape("x", x, (plan.tokens_per_rank, plan.hidden), "[T, H], fixed by the plan; pad and use token_mask")
    check_dtype("x", x, (plan.dtype,), "the plan's dtype: cast x, or make a plan with dtype=...")
    if token_mask is not None:
        check_mask("token_mask", token_mask, x.shape[:1], "[T]")


def check_chunks(chunks: int, plan: Plan) -> None:
    """Raises unless the tokens of a device can be cut into ``chunks`` equal parts."""
    check_count("chunks", chunks)
    if plan.tokens_per_rank % chunks:
        raise InvalidArgumentError(
            f"chunks={chunks} does not divide tokens_per_rank={plan.tokens_per_rank}; take a divisor, or pad the tokens"
        )


def router_logits(params: dict[str, Array], x: Array) -> Array:
    """fp32 logits [T, E] of x [T, H_r], at full precision: a choice must not depend on the back end's fast modes."""
    with jax.named_scope("router"):
        logits = jnp.matmul(
            x.astype(jnp.float32), params["router"].astype(jnp.float32), precision=lax.Precision.HIGHEST
        )
        bias = params.get("router_bias")
        return logits if bias is None else logits + bias.astype(jnp.float32)
