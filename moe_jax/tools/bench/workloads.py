"""The workloads: sizes, and data whose routes are exactly those that the name of the workload promises.

Routes are steered through x: a token carries a bump for each expert that it wants, and the router reads the bumps off.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from moe_jax.config import Config
from moe_jax.errors import ConfigError
from moe_jax.layer.params import param_spec
from moe_jax.plan import Plan

ZIPF = 1.2
_NOISE, _CUT = 0.3, 2.5  # entries of x are normally distributed with this sigma, and cut off at 2.5 sigma = 0.75
_BUMP = 3.0  # the bump of the first choice; that of the last is 2.5, well above 0.75 + 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One layer and the routes of its tokens.

    Attributes:
      name: what the tables call it.
      tokens: tokens per device.
      hidden, ffn: the widths of a token and of an expert.
      num_experts, top_k: routed experts, and how many of them a token goes to.
      pattern: how routes are spread: "balanced", "zipf" or "one rank"; see ``expert_ids``.
      activation: of the experts.
      options: more arguments of ``make_plan``, as pairs of a name and a value.
    """

    name: str
    tokens: int
    hidden: int
    ffn: int
    num_experts: int
    top_k: int
    pattern: str = "balanced"
    activation: str = "swiglu"
    options: tuple[tuple[str, Any], ...] = ()


def _workload(
    name: str, tokens: int, hidden: int, ffn: int, num_experts: int, top_k: int, pattern: str = "balanced"
) -> Workload:
    return Workload(
        name=name, tokens=tokens, hidden=hidden, ffn=ffn, num_experts=num_experts, top_k=top_k, pattern=pattern
    )


WORKLOADS = {
    w.name: w
    for w in (
        _workload("W1", 512, 512, 1024, 16, 2),
        _workload("W2", 1024, 1024, 1024, 32, 4),
        _workload("W3", 256, 1024, 256, 128, 8),
        _workload("W4", 4, 1024, 256, 128, 8),
        _workload("W5", 1024, 1024, 1024, 32, 4, pattern="zipf"),
        _workload("W6", 1024, 1024, 1024, 32, 4, pattern="one rank"),
    )
}


def of_config(config: Config, path: str) -> Workload:
    """The workload of a configuration: one layer, routed experts only, balanced routes.

    [moe] gives everything but the weights of the losses, [model] the hidden size, [train] the tokens per device.

    Raises:
      ConfigError: it has no [model], or what no baseline has: shared experts, scales, weights on the input side.
    """
    moe, model = config.moe, config.model
    if model is None:
        raise ConfigError(f"{path}: has no [model] section; bench needs model.hidden")
    if moe.num_shared_experts:
        raise ConfigError(
            f"{path}: [moe]: num_shared_experts={moe.num_shared_experts}, and bench times routed experts only; set it 0"
        )
    if moe.num_ids > moe.num_experts:
        raise ConfigError(
            f"{path}: [moe]: num_zero_experts={moe.num_zero_experts} and num_copy_experts={moe.num_copy_experts}, and "
            "bench times routed experts only; set both 0"
        )
    if moe.expert_scale or moe.weigh_inputs:
        raise ConfigError(f"{path}: [moe]: expert_scale and weigh_inputs are nothing that bench times; leave them out")
    if config.balance is not None:
        raise ConfigError(f"{path}: [balance] is nothing that bench times; leave it out")
    names = ("transport", "overflow", "capacity_factor", "backend")
    return Workload(
        name="config",
        tokens=config.tokens_per_device(config.mesh.num_devices),
        hidden=model.hidden,
        ffn=moe.ffn,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        activation=moe.activation,
        options=tuple((name, getattr(moe, name)) for name in names),
    )


def check_steerable(workload: Workload) -> None:
    """Raises ConfigError if there are more experts than entries of a token: then routes cannot be steered."""
    if workload.num_experts > workload.hidden:
        raise ConfigError(
            f"{workload.name}: moe.num_experts={workload.num_experts} exceeds model.hidden={workload.hidden}, and "
            "bench steers each expert through an entry of x; use a larger hidden size"
        )


def expert_ids(workload: Workload, num_tokens: int, ep_size: int) -> np.ndarray:
    """[num_tokens, K] i32 in the order of the devices, distinct in a row, the same at every call.

    "balanced": choice number j of all choices goes to rank j mod W, and there to expert (j // W) mod L. So every W
    consecutive choices of a device reach all ranks, and every E choices reach all experts. "zipf": K draws without
    replacement, expert e with weight (e + 1)^-1.2. "one rank": evenly over the experts of rank 0, or over as many ranks
    as hold K experts.
    """
    experts, top_k = workload.num_experts, workload.top_k
    local = experts // ep_size
    choice = np.arange(num_tokens * top_k).reshape(num_tokens, top_k)
    if workload.pattern == "balanced":
        ids = choice % ep_size * local + choice // ep_size % local
    elif workload.pattern == "one rank":
        ids = choice % max(local, top_k)
    else:
        rng = np.random.default_rng(0)
        keys = -ZIPF * np.log(np.arange(1, experts + 1)) + rng.gumbel(size=(num_tokens, experts))
        ids = np.argsort(-keys, axis=1)[:, :top_k]
    return ids.astype(np.int32)


def rows_that_leave(ids: np.ndarray, plan: Plan) -> float:
    """How many pairs a device sends to another expert-parallel rank, on average over the devices."""
    homes = np.arange(len(ids)) // plan.tokens_per_rank  # the device of each token, tp innermost
    ranks = homes // plan.tp_size % plan.ep_size
    leaving = ids // (plan.num_experts // plan.ep_size) != ranks[:, None]
    return float(leaving.sum()) * plan.tokens_per_rank / len(ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What all programs of a workload are run on.

    Attributes:
      ids: [N, K], the routes.
      params: the parameters of the layer.
      x: [N, H], the tokens.
      ct: [N, H], the cotangent of y.
      rows: [D, L, R, H], what the dense limit multiplies: R rows of each expert.
      ct_rows: [D, L, R, H], the cotangent of their products.
    """

    ids: np.ndarray
    params: dict[str, jax.Array]
    x: jax.Array
    ct: jax.Array
    rows: jax.Array
    ct_rows: jax.Array


def make_data(workload: Workload, plan: Plan, mesh: Mesh, init: Callable) -> Data:
    """Data for ``workload``, placed on ``mesh``; ``init`` is the layer's."""
    hidden, experts = plan.hidden, plan.num_experts
    rng, num_tokens = np.random.default_rng(1), plan.tokens_per_rank * mesh.size
    ids = expert_ids(workload, num_tokens, plan.ep_size)
    x = _NOISE * np.clip(rng.normal(size=(num_tokens, hidden)), -_CUT, _CUT)
    bumps = _BUMP - 0.5 * np.arange(plan.top_k) / plan.top_k
    np.put_along_axis(x, ids, np.take_along_axis(x, ids, 1) * 0.1 + bumps, 1)
    group = plan.tokens_per_rank * plan.ep_size * plan.tp_size
    shape = (mesh.size, plan.num_local_experts, -(-group * plan.top_k // experts), hidden)

    def placed(array: np.ndarray, name: str | None = None, dtype: DTypeLike = plan.dtype) -> jax.Array:
        spec = PartitionSpec(plan.token_axes) if name is None else param_spec(name, plan)
        return jax.device_put(np.asarray(array, jnp.dtype(dtype)), NamedSharding(mesh, spec))

    params = {name: value.astype(plan.dtype) for name, value in init(jax.random.key(0)).items()}
    params["router"] = placed(1.5 * np.eye(hidden, experts), "router", np.float32)
    return Data(
        ids=ids,
        params=params,
        x=placed(x),
        ct=placed(rng.normal(size=x.shape)),
        rows=placed(_NOISE * rng.normal(size=shape)),
        ct_rows=placed(rng.normal(size=shape)),
    )
