"""Feed-forward experts: many at once over grouped rows, and one for every token."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.kernels import grouped_matmul

Array = jax.Array

_LIMIT, _ALPHA = 7.0, 1.702  # of the clamped SwiGLU (gpt-oss)


def is_gated(activation: str) -> bool:
    """Whether the activation multiplies two projections, so that experts have a ``w_gate``."""
    return activation != "gelu"


def activate(gate: Array | None, up: Array, activation: str) -> Array:
    """The hidden activation of an expert, in fp32, rounded to the dtype of ``up``.

    "swiglu": silu(gate) * up. "gelu": the exact (erf) GELU of up; gate is None. "clamped_swiglu" (gpt-oss): with
    g = min(gate, 7) and u = clip(up, -7, 7): g * sigmoid(1.702 g) * (u + 1).
    """
    wide = up.astype(jnp.float32)
    if activation == "gelu":
        return (0.5 * wide * (1.0 + _compat.erf(wide / math.sqrt(2.0)))).astype(up.dtype)
    gate = gate.astype(jnp.float32)
    if activation == "swiglu":
        return (gate * jax.nn.sigmoid(gate) * wide).astype(up.dtype)
    gate, wide = jnp.minimum(gate, _LIMIT), jnp.clip(wide, -_LIMIT, _LIMIT)
    return (gate * jax.nn.sigmoid(_ALPHA * gate) * (wide + 1.0)).astype(up.dtype)


def grouped_product(inputs: Array, weight: Array, bias: Array | None, *, group_sizes: Array, backend: str) -> Array:
    """Rows [M, I] in consecutive groups through the weight [L, I, O], and bias [L, O], of their group -> [M, O].

    Rows past ``sum(group_sizes)`` influence nothing, forward or backward.
    """
    product = grouped_matmul(inputs, weight, group_sizes, backend=backend)
    if bias is None:
        return product
    # A bias per group is a grouped product too: its gradient sums a group's rows and reads none past the sum.
    ones = _compat.as_varying(jnp.ones((inputs.shape[0], 1), inputs.dtype), _compat.varying_axes(inputs))
    return product + grouped_matmul(ones, bias[:, None, :], group_sizes, backend=backend)


def batched_product(inputs: Array, weight: Array, bias: Array | None) -> Array:
    """As many rows in each group, [L, S, I], through the weight [L, I, O], and bias [L, O], of it -> [L, S, O].

    Sums are fp32, rounded once.
    """
    product = jnp.einsum("lsi,lio->lso", inputs, weight, preferred_element_type=jnp.float32).astype(inputs.dtype)
    return product if bias is None else product + bias[:, None, :]


def project_in(weights: dict[str, Array], rows: Array, product: Callable) -> tuple[Array | None, Array]:
    """(gate, up): rows through w_gate and w_up, with b_gate and b_up where there are any; gate None without w_gate.

    ``product``: (rows, weight, bias or None) -> rows, each through the weight of its expert.
    """
    projected = (_through(weights, rows, name, product) if f"w_{name}" in weights else None for name in ("gate", "up"))
    return tuple(projected)


def project_out(weights: dict[str, Array], hidden: Array, product: Callable) -> Array:
    """Hidden activations through w_down, with b_down if there is one; ``product`` as for ``project_in``."""
    return _through(weights, hidden, "down", product)


def _through(weights: dict[str, Array], rows: Array, name: str, product: Callable) -> Array:
    bias = weights.get(f"b_{name}")
    return product(rows, weights[f"w_{name}"].astype(rows.dtype), None if bias is None else bias.astype(rows.dtype))


def shared_ffn(weights: dict[str, Array], x: Array, *, activation: str) -> Array:
    """The shared expert: every token through one FFN.

    Args:
      weights: shared_gate (if gated) and shared_up [H, S], shared_down [S, H].
      x: [T, H].

    Returns:
      [T, H] fp32.
    """

    def project(inputs, name):
        return jnp.matmul(inputs, weights[f"shared_{name}"].astype(x.dtype), preferred_element_type=jnp.float32)

    with jax.named_scope("shared_expert"):
        gate = project(x, "gate").astype(x.dtype) if is_gated(activation) else None
        return project(activate(gate, project(x, "up").astype(x.dtype), activation), "down")
