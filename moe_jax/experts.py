"""Feed-forward experts: many at once over grouped rows, and one for every token."""

import math

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
        return (0.5 * wide * (1.0 + jax.lax.erf(wide / math.sqrt(2.0)))).astype(up.dtype)
    gate = gate.astype(jnp.float32)
    if activation == "swiglu":
        return (gate * jax.nn.sigmoid(gate) * wide).astype(up.dtype)
    gate, wide = jnp.minimum(gate, _LIMIT), jnp.clip(wide, -_LIMIT, _LIMIT)
    return (gate * jax.nn.sigmoid(_ALPHA * gate) * (wide + 1.0)).astype(up.dtype)


def grouped_ffn(
    weights: dict[str, Array], rows: Array, group_sizes: Array, *, activation: str, backend: str, adds_bias: Array
) -> Array:
    """Each row through the expert of its group.

    Args:
      weights: w_gate (if gated) and w_up [L, H, F], w_down [L, F, H]; optional b_gate, b_up [L, F], b_down [L, H].
      rows: [M, H]; those past ``sum(group_sizes)`` influence nothing.
      group_sizes: [L] i32.
      activation, backend: static.
      adds_bias: bool scalar; whether this rank adds b_down. One tp rank must, as their results are summed.

    Returns:
      [M, H] in ``rows.dtype``.
    """

    def project(inputs, name):
        product = grouped_matmul(inputs, weights[f"w_{name}"].astype(rows.dtype), group_sizes, backend=backend)
        bias = weights.get(f"b_{name}")
        if bias is None:
            return product
        bias = bias.astype(rows.dtype)
        if name == "down":
            bias = jnp.where(adds_bias, bias, jnp.zeros((), bias.dtype))
        # A bias per group is a grouped product too: its gradient sums a group's rows and reads none past the sum.
        ones = _compat.as_varying(jnp.ones((rows.shape[0], 1), rows.dtype), _compat.varying_axes(rows))
        return product + grouped_matmul(ones, bias[:, None, :], group_sizes, backend=backend)

    with jax.named_scope("experts"):
        gate = project(rows, "gate") if is_gated(activation) else None
        return project(activate(gate, project(rows, "up"), activation), "down")


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
