"""Feed-forward experts: many at once over grouped rows, and one for every token."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.kernels import grouped_matmul, grouped_matmuls
from moe_jax.parameters import rows_of

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


Biases = tuple[Array | None, ...]


def grouped_product(
    inputs: Array, weights: tuple[Array, ...], biases: Biases, *, group_sizes: Array, backend: str
) -> tuple[Array, ...]:
    """Rows [M, I] in consecutive groups through each weight [L, I, O], and bias [L, O], of their group -> [M, O] each.

    Rows past ``sum(group_sizes)`` influence nothing, forward or backward.
    """
    products = list(grouped_matmuls(inputs, weights, group_sizes, backend=backend))
    for place, bias in enumerate(biases):
        if bias is not None:
            # A bias is a grouped product too: its gradient sums the rows of a group and reads none past the sum.
            ones = _compat.as_varying(jnp.ones((inputs.shape[0], 1), inputs.dtype), _compat.varying_axes(inputs))
            products[place] = grouped_matmul(
                ones, bias[:, None, :], group_sizes, backend=backend, add_to=products[place]
            )
    return tuple(products)


def split_by_projection(experts: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """The weights and biases that ``project_in`` reads, and those that ``project_out`` reads."""
    inner, outer = (
        {row.role: experts[row.role] for row in rows_of("experts") if row.into == into and row.role in experts}
        for into in ("hidden", "output")
    )
    return inner, outer


def project_in(weights: dict[str, Array], rows: Array, product: Callable) -> tuple[Array | None, Array]:
    """(gate, up): rows through w_gate and w_up, with b_gate and b_up where there are any; gate None without w_gate.

    ``product``: (rows, weights, biases or None) -> rows for each weight, each through the weight of its expert.
    """
    gated = "w_gate" in weights
    projected = _through(weights, rows, ("gate", "up") if gated else ("up",), product)
    return projected if gated else (None, *projected)


def project_out(weights: dict[str, Array], hidden: Array, product: Callable) -> Array:
    """Hidden activations through w_down, with b_down if there is one; ``product`` as for ``project_in``."""
    return _through(weights, hidden, ("down",), product)[0]


def _through(weights: dict[str, Array], rows: Array, names: tuple[str, ...], product: Callable) -> tuple[Array, ...]:
    of_rows = tuple(weights[f"w_{name}"].astype(rows.dtype) for name in names)
    biases = tuple(weights.get(f"b_{name}") for name in names)
    return product(rows, of_rows, tuple(bias if bias is None else bias.astype(rows.dtype) for bias in biases))


def shared_ffn(weights: dict[str, Array], x: Array, *, activation: str) -> Array:
    """The shared expert: every token through one FFN.

    Args:
      weights: w_gate (if gated) and w_up [H, S], w_down [S, H]; what ``params`` calls shared_gate, and so on.
      x: [T, H].

    Returns:
      [T, H] fp32.
    """

    def project(inputs, name):
        return jnp.matmul(inputs, weights[name].astype(x.dtype), preferred_element_type=jnp.float32)

    with jax.named_scope("shared_expert"):
        gate = project(x, "w_gate").astype(x.dtype) if is_gated(activation) else None
        return project(activate(gate, project(x, "w_up").astype(x.dtype), activation), "w_down")
