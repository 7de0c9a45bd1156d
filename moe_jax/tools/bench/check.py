"""All programs of a workload have to agree before they are timed: a wrong result gets no time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import reference
from moe_jax.config import RouterConfig
from moe_jax.parameters import weights_of
from moe_jax.tools.bench.programs import LAYER, LIMIT, MINIMAL, ONE_HOT, Program, Setting

SPOT_TOKENS = 4

# The largest deviation that passes, relative to the largest entry of an array. In fp32, sums of some thousand terms are
# taken in different orders. In bf16, a handful of roundings of 2^-8 follow each other. Quantised rows are off by a unit
# of the format on the way out, and by another on the way back.
TOLERANCES = {"float32": 1e-4, "bfloat16": 4e-2}
WIRE_TOLERANCES = {"int8": 4e-2, "e4m3": 2e-1, "e5m2": 4e-1, "e2m1": 8e-1}


class WrongResult(Exception):
    """A program computed something else than it should; its text says which, where and by how much."""


def tolerance(dtype: str, quant: str) -> float:
    """How far two programs may be apart when one of them sends rows as ``quant``."""
    wire = [limit for name, limit in WIRE_TOLERANCES.items() if name in quant]
    return max([TOLERANCES[dtype], *wire])


def check_layer(setting: Setting, results: Any) -> None:
    """Compares the layer's forward pass with the float64 oracle on a few tokens, and its routes with the workload's.

    Args:
      setting: the layer's.
      results: (y, LayerStats).

    Raises:
      WrongResult: they differ, or something was dropped.
    """
    y, stats = results
    data, plan = setting.data, setting.plan
    wanted = np.bincount(data.ids.ravel(), minlength=plan.num_experts)
    if int(stats.num_dropped) or not np.array_equal(stats.load, wanted):
        raise WrongResult(
            f"the layer dropped {int(stats.num_dropped)} pairs and its loads are "
            f"{'' if np.array_equal(stats.load, wanted) else 'not '}those of the workload"
        )
    spots = np.linspace(0, len(data.ids) - 1, min(SPOT_TOKENS, len(data.ids))).astype(int)
    used = np.unique(data.ids[spots])
    params = {name: _experts(value, used) for name, value in data.params.items() if name != "router"}
    params["router"] = np.asarray(data.params["router"], np.float64)[:, used]
    options = {"top_k": plan.top_k, "activation": setting.workload.activation}
    # Weights are a softmax over the chosen experts, so experts that none of these tokens chose may be left out.
    expected, _ = reference.moe_layer(params, _wide(data.x[spots]), RouterConfig(), **options)
    _compare("the layer", "the float64 oracle", "y", y[spots], expected, tolerance(plan.dtype, plan.quant))


def check_limit(setting: Setting, y: jax.Array) -> None:
    """Compares one row of each of two experts of the dense limit with the oracle.

    With tp > 1 rows are partial sums, and nothing is compared.

    Raises:
      WrongResult: they differ.
    """
    data, plan = setting.data, setting.plan
    if plan.tp_size > 1:
        return
    device = y.shape[0] - 1
    first = device % plan.ep_size * plan.num_local_experts
    for local in {0, plan.num_local_experts - 1}:
        weights = {role: _wide(value[first + local]) for role, value in weights_of("experts", data.params).items()}
        row = _wide(data.rows[device, local, :1])
        expected = reference.expert_ffn(row, weights, setting.workload.activation)
        got = y[device, local, :1]
        _compare("the dense limit", "the float64 oracle", "y", got, expected, TOLERANCES[plan.dtype])


def check_agreement(setting: Setting, program: Program, layer: Any, results: Any) -> str | None:
    """Compares a contender's results with the layer's; all gradients too where both have them.

    Returns:
      None, or why they were not compared: a layer of fixed capacity dropped pairs, so it computes something else.

    Raises:
      WrongResult: they differ.
    """
    assert program.name not in (LAYER, LIMIT)
    forward = program.phase == "forward"
    (y, aux), (want_y, _) = (results, layer) if forward else (results[0], layer[0])
    if program.name in (ONE_HOT, MINIMAL) and int(aux):
        return f"{int(aux)} of {data_size(setting)} pairs dropped"
    limit = tolerance(setting.plan.dtype, setting.plan.quant)
    pairs = {"y": (y, want_y)}
    if not forward:
        (params, x), (want_params, want_x) = results[1], layer[1]
        pairs["the gradient of x"] = (x, want_x)
        pairs |= {f"the gradient of {name}": (params[name], want_params[name]) for name in params}
    for what, (got, want) in pairs.items():
        _compare(program.name, "the layer", what, got, want, limit)
    return None


def data_size(setting: Setting) -> int:
    """The number of pairs of the whole mesh."""
    return setting.data.ids.size


@jax.jit
def _deviation(got: jax.Array, want: jax.Array) -> jax.Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.max(jnp.abs(got - want)) / jnp.maximum(jnp.max(jnp.abs(want)), 1e-30)


def _compare(name: str, other: str, what: str, got: Any, want: Any, limit: float) -> None:
    found = float(_deviation(got, jnp.asarray(want)))
    if not found <= limit:  # false for NaN
        raise WrongResult(f"{name} and {other} differ in {what} by {found:.1e} of its largest entry, limit {limit:.0e}")


def _experts(weights: jax.Array, used: np.ndarray) -> np.ndarray:
    return np.stack([_wide(weights[e]) for e in used])


def _wide(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)
