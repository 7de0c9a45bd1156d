"""What the layer is compared with: dense limit, minimal layer, one-hot capacity layer, all experts for every token.

Each is written for the mesh of the layer's plan and takes the layer's own parameters, ``router`` [H, E], ``w_gate`` (if
gated), ``w_up`` [E, H, F], ``w_down`` [E, F, H], placed as the layer wants them.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from moe_jax import _compat, collectives
from moe_jax.activations import Choice
from moe_jax.config import RouterConfig
from moe_jax.derivatives import custom_gradient
from moe_jax.kernels import grouped_matmul
from moe_jax.layer.experts import activate, is_gated
from moe_jax.layer.layer import router_logits
from moe_jax.layer.params import param_spec
from moe_jax.layer.router import route
from moe_jax.parameters import weights_of
from moe_jax.plan import Plan

Array = jax.Array
CAPACITY_FACTOR = 2.0  # capacity of the one-hot layer, over the balanced load of an expert


@functools.partial(custom_gradient, num_static=1)
def _exchange(plan: Plan, rows: Array) -> Array:
    """[W * C, H]: block j of C slots goes to rank j; block i of the result came from rank i."""
    return collectives.Blocks().move(rows, len(rows), plan.ep_axis, plan)[0]


# d_rows = ct, every block back at its rank    # [W * C, H]: the exchange is its own adjoint
_exchange.defvjp(lambda plan, rows: (_exchange(plan, rows), None), lambda plan, _, ct: (_exchange(plan, ct),))


def batched_ffn(params: dict[str, Array], rows: Array, activation: Choice) -> Array:
    """[L, R, H] rows of each expert -> [L, R, H], batched products with fp32 sums."""

    def project(inputs, name):
        weight = params[f"w_{name}"].astype(inputs.dtype)
        product = jnp.einsum("lrh,lhf->lrf", inputs, weight, preferred_element_type=jnp.float32)
        return product.astype(inputs.dtype)

    gate = project(rows, "gate") if is_gated(activation) else None
    return project(activate(gate, project(rows, "up"), activation), "down")


def dense_limit(mesh: Mesh, plan: Plan, activation: Choice) -> tuple[Callable, Callable]:
    """The products of a balanced layer and nothing else: no routing, no gather of rows, no communication.

    Returns:
      forward: (params, rows [D, L, R, H]) -> [D, L, R, H], for D devices; partial sums with tp.
      backward: (params, rows, cotangent like rows) -> forward's result, and what each device adds to the gradients:
        {w_...: [D, L, ...]} and rows [D, L, R, H].
    """

    def own(params, rows):
        return _compat.as_varying(weights_of("experts", params), plan.token_axes), rows[0]

    def forward(params, rows):
        return batched_ffn(*own(params, rows), activation)[None]

    def backward(params, rows, ct):
        y, pull = jax.vjp(lambda weights, rows: batched_ffn(weights, rows, activation), *own(params, rows))
        return jax.tree.map(lambda a: a[None], (y, pull(ct[0])))

    return _mapped(mesh, plan, forward), _mapped(mesh, plan, backward)


def minimal_layer(mesh: Mesh, plan: Plan, activation: Choice) -> Callable:
    """What a person would write by hand: sort, exchange, grouped products, exchange, sum, and JAX's own derivatives.

    Blocks and kernels are those of the plan; a pair of ranks moves at most ``plan.pair_capacity`` rows, and what does
    not fit is dropped. The layer's program, and the time to compile it, are compared with those of this layer.

    Returns:
      (params, x [N, H]) -> (y [N, H], number of dropped pairs over the mesh).
    """
    local, capacity, hidden, backend = plan.num_local_experts, plan.pair_capacity, plan.hidden, plan.backend

    def shard(params, x):
        routing = route(router_logits(params, x), RouterConfig(), top_k=plan.top_k)
        # 1. Pairs by expert, and so by rank; where each lies in the block for its rank.
        expert = routing.expert_ids.reshape(-1)
        order = jnp.argsort(expert, stable=True)
        counts = jnp.bincount(expert, length=plan.num_experts).reshape(plan.ep_size, local)
        rank, totals = expert[order] // local, counts.sum(1)
        place = jnp.arange(expert.size) - (jnp.cumsum(totals) - totals)[rank]
        fits = place < capacity
        slot = jnp.where(fits, rank * capacity + place, plan.ep_size * capacity)
        # 2. Exchange. An expert of -1 marks a slot that no row came in.
        blocks = jnp.zeros((plan.ep_size * capacity, hidden), x.dtype).at[slot].set(x[order // plan.top_k], mode="drop")
        marks = jnp.full((len(blocks), 1), -1).at[slot, 0].set(expert[order] % local, mode="drop")
        arrived, marks = (collectives.gather_tp(plan, _exchange(plan, a)) for a in (blocks, marks))
        # 3. Rows by expert, through it, and back.
        marks = jnp.where(marks < 0, local, marks).reshape(-1)
        by_expert = jnp.argsort(marks, stable=True)
        sizes = jnp.bincount(marks, length=local).astype(jnp.int32)

        def project(rows, name):
            return grouped_matmul(rows, params[f"w_{name}"].astype(x.dtype), sizes, backend=backend)

        rows = arrived[by_expert]
        gate = project(rows, "gate") if is_gated(activation) else None
        made = project(activate(gate, project(rows, "up"), activation), "down")
        there = jnp.arange(len(made)) < sizes.sum()
        made = jnp.where(there[:, None], made, jnp.zeros((), made.dtype))[jnp.argsort(by_expert)]
        # 4. Exchange back, and the weighted sum.
        returned = _exchange(plan, collectives.reduce_scatter_tp(plan, made))
        weights = jnp.where(fits, routing.combine_weights.reshape(-1)[order], 0.0)[:, None]
        terms = weights * returned[jnp.where(fits, slot, 0)].astype(jnp.float32)
        y = jnp.zeros((len(x), hidden), jnp.float32).at[order // plan.top_k].add(terms)
        return y.astype(x.dtype), collectives.sum_over(jnp.sum(~fits).astype(jnp.int32), plan.token_axes)

    return _mapped_layer(mesh, plan, shard)


def one_hot_layer(mesh: Mesh, plan: Plan, activation: Choice) -> Callable:
    """The capacity layer of GShard: dispatch and combine are products with one-hot tensors [T, E, C].

    A device sends each expert at most C = ceil(2 * T * K / E) pairs, first choices before second ones; what does not
    fit is dropped. (arXiv 2006.16668, algorithm 1; its groups are our devices.)

    Returns:
      (params, x [N, H]) -> (y [N, H], number of dropped pairs over the mesh).
    """
    capacity = math.ceil(CAPACITY_FACTOR * plan.tokens_per_rank * plan.top_k / plan.num_experts)
    local, hidden = plan.num_local_experts, plan.hidden

    def shard(params, x):
        dispatched, combined = _one_hot(params, x, plan, capacity)
        sent = jnp.einsum("tec,th->ech", dispatched, x)  # [E, C, H], experts of rank 0 first
        arrived = collectives.gather_tp(plan, _exchange(plan, sent.reshape(-1, hidden)))
        rows = arrived.reshape(-1, local, capacity, hidden).swapaxes(0, 1).reshape(local, -1, hidden)
        rows = batched_ffn(params, rows, activation)
        rows = rows.reshape(local, -1, capacity, hidden).swapaxes(0, 1).reshape(-1, hidden)
        returned = _exchange(plan, collectives.reduce_scatter_tp(plan, rows))
        y = jnp.einsum("tec,ech->th", combined, returned.reshape(sent.shape), preferred_element_type=jnp.float32)
        wanted = x.shape[0] * plan.top_k
        dropped = wanted - jnp.sum(dispatched, dtype=jnp.float32).astype(jnp.int32)
        return y.astype(x.dtype), collectives.sum_over(dropped, plan.token_axes)

    return _mapped_layer(mesh, plan, shard)


def _one_hot(params: dict[str, Array], x: Array, plan: Plan, capacity: int) -> tuple[Array, Array]:
    """Two arrays [T, E, C] in the dtype of x: 1 where a pair has a place, and the weight of the pair there."""
    routing = route(router_logits(params, x), RouterConfig(), top_k=plan.top_k)
    chosen = jax.nn.one_hot(routing.expert_ids.T, plan.num_experts, dtype=jnp.int32)  # [K, T, E]
    flat = chosen.reshape(-1, plan.num_experts)
    place = jnp.sum((jnp.cumsum(flat, 0) - 1) * flat, -1).reshape(chosen.shape[:2])
    places = jax.nn.one_hot(place, capacity, dtype=x.dtype)  # [K, T, C]; zero past the capacity
    chosen = chosen.astype(x.dtype)
    dispatched = jnp.einsum("kte,ktc->tec", chosen, places)
    weights = routing.combine_weights.T[..., None].astype(x.dtype)
    return dispatched, jnp.einsum("kte,ktc->tec", chosen * weights, places)


def all_experts_layer(mesh: Mesh, plan: Plan, activation: Choice) -> Callable:
    """Every token through every expert, weighted with zero where it was not chosen.

    Returns:
      (params, x [N, H]) -> (y [N, H], 0: nothing can be dropped).
    """
    local = plan.num_local_experts

    def shard(params, x):
        routing = route(router_logits(params, x), RouterConfig(), top_k=plan.top_k)
        chosen = jax.nn.one_hot(routing.expert_ids, plan.num_experts, dtype=jnp.float32)
        weights = jnp.einsum("tke,tk->te", chosen, routing.combine_weights)
        everyone = collectives.gather_tokens(plan, x)  # [D, T, H]
        weights = collectives.gather_tokens(plan, weights).reshape(-1, plan.num_experts)
        mine = jax.lax.dynamic_slice_in_dim(weights, collectives.ep_rank(plan) * local, local, 1)
        tokens = everyone.reshape(-1, plan.hidden)

        def project(name):
            weight = params[f"w_{name}"].astype(x.dtype)
            product = jnp.einsum("nh,lhf->lnf", tokens, weight, preferred_element_type=jnp.float32)
            return product.astype(x.dtype)

        inner = activate(project("gate") if is_gated(activation) else None, project("up"), activation)
        inner = (inner * mine.T[..., None]).astype(x.dtype)
        down = params["w_down"].astype(x.dtype)
        total = jnp.einsum("lnf,lfh->nh", inner, down, preferred_element_type=jnp.float32)
        y = collectives.reduce_scatter_tokens(plan, total.reshape(everyone.shape))
        return y.astype(x.dtype), collectives.sum_over(
            _compat.as_varying(jnp.int32(0), plan.token_axes), plan.token_axes
        )

    return _mapped_layer(mesh, plan, shard)


def _mapped(mesh: Mesh, plan: Plan, shard: Callable) -> Callable:
    """``shard`` over (params, arrays split over the devices)."""

    def apply(params, *arrays):
        specs = {name: param_spec(name, plan) for name in params}
        spread = PartitionSpec(plan.token_axes)
        in_specs = (specs, *(spread for _ in arrays))
        return _compat.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=spread)(params, *arrays)

    return apply


def _mapped_layer(mesh: Mesh, plan: Plan, shard: Callable) -> Callable:
    def widened(params, x):
        return shard(_compat.as_varying(params, plan.token_axes), x)

    def apply(params, x):
        specs = {name: param_spec(name, plan) for name in params}
        spread = PartitionSpec(plan.token_axes)
        mapped = _compat.shard_map(widened, mesh=mesh, in_specs=(specs, spread), out_specs=(spread, PartitionSpec()))
        return mapped(params, x)

    return apply
