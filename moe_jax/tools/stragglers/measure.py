"""Takes the time of a layer's exchanges, step by step: the same load on every rank, so what is late is the machine."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import moe_jax as moe
from moe_jax import _compat
from moe_jax.config import Config
from moe_jax.errors import ConfigError
from moe_jax.layer.experts import activate, is_gated, project_in, project_out
from moe_jax.plan import Plan
from moe_jax.plan.transport_table import entered
from moe_jax.tools.stragglers.faults import Delays, LateBlocks, delayed

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What is timed: one layer of routed experts.

    Attributes:
      tokens: of each rank.
      hidden, ffn: widths of a token and of an expert.
      num_experts, top_k: experts, and how many of them a token goes to.
      activation: of the experts.
      dtype: of the rows.
      backend: as for ``make_plan``.
    """

    tokens: int
    hidden: int
    ffn: int
    num_experts: int
    top_k: int
    activation: str = "swiglu"
    dtype: str = "float32"
    backend: str = "auto"


def small_layer(num_ranks: int) -> Layer:
    """A layer that takes no time to speak of."""
    return Layer(tokens=2 * num_ranks, hidden=32, ffn=32, num_experts=num_ranks, top_k=1)


def layer_of(config: Config, path: str) -> Layer:
    """One layer of a configuration; of its shared experts, which never travel, nothing is timed.

    Raises:
      ConfigError: it has no [model], or a transport that has no exchange between pairs of ranks.
    """
    layer, model, train = config.moe, config.model, config.train
    if model is None:
        raise ConfigError(f"{path}: has no [model] section; stragglers needs model.hidden")
    if layer.transport not in ("auto", "padded", "ragged"):
        raise ConfigError(
            f"{path}: [moe]: transport={layer.transport!r} has no exchange between pairs of ranks that could be timed; "
            'set "padded", or leave it out'
        )
    return Layer(
        tokens=config.tokens_per_device(config.mesh.num_devices),
        hidden=model.hidden,
        ffn=layer.ffn,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        activation=layer.activation,
        dtype=train.dtype if train else "bfloat16",
        backend=layer.backend,
    )


def measure(mesh: Mesh, layer: Layer, delays: Delays, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs so many steps: all ranks begin together, dispatch, multiply by the experts, and combine.

    Args:
      mesh: its "ep" axis, or "node" and "ep", have all its devices.
      layer: what is timed. Every rank sends as many rows to each rank.
      delays: of a rehearsal; zeros for none.
      steps: S.

    Returns:
      ready, travel: [S, R, R] i32 microseconds, as ``moe_jax.find_stragglers`` takes them; of both exchanges together.

    Raises:
      InvalidArgumentError, MeshError: the layer does not fit the mesh.
    """
    axes = tuple(axis for axis in mesh.axis_names if axis != "tp")
    with contextlib.ExitStack() as stack:
        transport = "padded"
        if delays.travel.any():
            transport = LateBlocks.name
            stack.enter_context(entered(LateBlocks(delays.travel, axes)))
        plan = moe.make_plan(
            mesh,
            tokens_per_rank=layer.tokens,
            hidden=layer.hidden,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            dtype=layer.dtype,
            backend=layer.backend,
            transport=transport,
            overflow="drop",  # a round that holds the balanced load; nothing is dropped
            capacity_factor=1.0,
        )
        params, x = _make_data(mesh, axes, plan, layer)
        step = _make_step(mesh, axes, plan, layer, delays)
        waits = np.stack([np.asarray(step(params, x)) for _ in range(steps)])
    return waits[:, :, 0], waits[:, :, 1]


def _make_data(mesh: Mesh, axes: tuple[str, ...], plan: Plan, layer: Layer) -> tuple[dict[str, Array], Array]:
    """Weights and tokens, made where they lie."""
    experts, hidden, ffn = layer.num_experts, layer.hidden, layer.ffn
    shapes = {"w_up": (experts, hidden, ffn), "w_down": (experts, ffn, hidden)}
    if is_gated(layer.activation):
        shapes["w_gate"] = shapes["w_up"]

    def waves(shape: tuple[int, ...]) -> Array:
        return jnp.sin(lax.broadcasted_iota(jnp.float32, shape, len(shape) - 1)).astype(plan.dtype)

    def make() -> tuple[dict[str, Array], Array]:
        params = {name: waves(shape) for name, shape in shapes.items()}
        return params, waves((plan.ep_size * plan.tokens_per_rank, hidden))

    return jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec(axes)))()


def _make_step(mesh: Mesh, axes: tuple[str, ...], plan: Plan, layer: Layer, delays: Delays) -> Callable[..., Any]:
    """(params, x) -> [R, 2, R], the microseconds of all ranks, on every process."""
    ranks, local = plan.ep_size, plan.num_local_experts
    choice = np.arange(plan.num_pairs).reshape(plan.tokens_per_rank, plan.top_k)
    expert_ids = (choice % ranks * local + choice // ranks % local).astype(np.int32)
    weights = np.full(choice.shape, 1 / plan.top_k, np.float32)
    none = np.zeros((2, ranks), np.int32)

    def shard(params: dict[str, Array], x: Array) -> Array:
        x = moe.barrier(x, axes)
        if delays.compute.any():
            x = delayed(x, jnp.asarray(delays.compute, jnp.float32)[lax.axis_index(axes)])
        sent = moe.dispatch(x, jnp.asarray(expert_ids), plan, performance_info=jnp.asarray(none))
        inner = project_in(params, sent.x, sent.group_sizes, plan.kernels)
        rows = project_out(params, activate(*inner, layer.activation), sent.group_sizes, plan.kernels)
        _, waited = moe.combine(rows, jnp.asarray(weights), sent.handle, performance_info=sent.performance_info)
        return waited[None]

    spec = PartitionSpec(axes)
    step = _compat.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=PartitionSpec((*axes, "tp")))
    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
