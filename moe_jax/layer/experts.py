"""Feed-forward experts: many at once over grouped rows, and one for every token."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.activations import Choice, activation_of
from moe_jax.errors import check_dtype, check_shape
from moe_jax.kernels import gated_matmul, grouped_matmuls
from moe_jax.parameters import rows_of

Array = jax.Array


def is_gated(activation: Choice) -> bool:
    """Whether the activation multiplies two projections, so that experts have a ``w_gate``."""
    return activation_of(activation).gated


def activate(gate: Array | None, up: Array, activation: Choice) -> Array:
    """The hidden activation of an expert, computed in fp32 and rounded to the dtype of ``up``.

    ``gate`` is None where the activation takes ``up`` alone. Rows that hold anything give anything, in themselves only,
    since activations are elementwise.

    Raises:
      ShapeError, DtypeError: a function of a user's own makes no floats of the shape of ``up``.
    """
    function = activation_of(activation).function
    made = function(*(array.astype(jnp.float32) for array in (gate, up) if array is not None))
    if not isinstance(activation, str):
        check_shape("what activation returned", made, up.shape, "the shape of up", "an activation is elementwise")
        check_dtype("what activation returned", made, (jnp.floating,))
    return made.astype(up.dtype)


def split_by_projection(experts: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """The weights and biases that ``project_in`` reads, and those that ``project_out`` reads."""
    inner, outer = (
        {row.role: experts[row.role] for row in rows_of("experts") if row.into == into and row.role in experts}
        for into in ("hidden", "output")
    )
    return inner, outer


def project_in(
    experts: dict[str, Array],
    rows: Array,
    group_sizes: Array,
    kernels: tuple[str, ...],
    row_slot: Array | None = None,
) -> tuple[Array | None, Array]:
    """(gate, up), [M, F] each: rows through w_gate and w_up of their experts, plus b_gate and b_up where there are any.

    Args:
      experts: w_gate (if gated) and w_up [L, H, F], optional b_gate and b_up [L, F], of any float dtype.
      rows: [M, H], those of the first expert first. Rows at or past ``sum(group_sizes)`` influence nothing, forward or
        backward.
      group_sizes: [L] i32, rows of each expert.
      kernels: those of the plan.
      row_slot: [M] i32: ``rows`` lie in slots [A, H], each in its own, for kernels that can read them there; None: they
        lie in order.

    Returns:
      Both in the dtype of ``rows``; gate is None without w_gate.
    """
    weights, biases = _parameters(experts, ("gate", "up"), rows)
    projected = grouped_matmuls(kernels, None, rows, weights, biases, group_sizes, row_slot)
    return projected if "w_gate" in experts else (None, *projected)


def project_in_and_activate(
    experts: dict[str, Array],
    rows: Array,
    group_sizes: Array,
    kernels: tuple[str, ...],
    row_slot: Array | None,
    *,
    activation: Choice,
    keep: bool,
    fused: bool,
) -> tuple[tuple[Array | None, Array] | None, Array]:
    """What ``project_in`` gives, if ``keep``, and ``activate`` of it.

    ``fused``: whether the back end shall make both in one kernel, for an activation that is ``fusible``.
    """
    if not fused:
        inner = project_in(experts, rows, group_sizes, kernels, row_slot)
        return (inner if keep else None), activate(*inner, activation)
    weights, biases = _parameters(experts, ("gate", "up"), rows)
    *inner, hidden = gated_matmul(kernels, _gating(activation), keep, rows, weights, biases, group_sizes, row_slot)
    return ((inner[0], inner[1]) if keep else None), hidden


@functools.cache
def _gating(activation: Choice) -> Callable[[Array, Array], Array]:
    """``activate`` as a function of arrays alone: one object for each name, so that JAX finds programs again."""
    return lambda gate, up: activate(gate, up, activation)


def project_out(
    experts: dict[str, Array],
    hidden: Array,
    group_sizes: Array,
    kernels: tuple[str, ...],
    row_slot: Array | None = None,
    num_slots: int | None = None,
) -> Array:
    """[M, F] -> [M, H]: inner activations through w_down of their experts, plus b_down if there is one.

    ``experts``: w_down [L, F, H] and optional b_down [L, H]; ``row_slot``: the result is [num_slots, H], each row in
    its slot, by kernels that can write them there; the other arguments are those of ``project_in``.
    """
    weights, biases = _parameters(experts, ("down",), hidden)
    into = None if row_slot is None else num_slots
    return grouped_matmuls(kernels, into, hidden, weights, biases, group_sizes, row_slot)[0]


def _parameters(
    experts: dict[str, Array], projections: tuple[str, ...], like: Array
) -> tuple[tuple[Array, ...], tuple[Array | None, ...]]:
    """(weights, biases) of those projections that the experts have, in the dtype of ``like``; None for no bias."""
    names = [name for name in projections if f"w_{name}" in experts]
    biases = [experts.get(f"b_{name}") for name in names]
    return (
        tuple(experts[f"w_{name}"].astype(like.dtype) for name in names),
        tuple(None if bias is None else bias.astype(like.dtype) for bias in biases),
    )


def shared_ffn(weights: dict[str, Array], x: Array, *, activation: Choice) -> Array:
    """The shared expert: every token through one FFN.

    Args:
      weights: w_gate (if gated) and w_up [H, S], w_down [S, H]; what ``params`` calls shared_gate, and so on; optional
        shared_router [H, 1], whose product with a token, through a sigmoid in fp32, multiplies what the token gets.
      x: [T, H].
      activation: that of the shared expert.

    Returns:
      [T, H] fp32.
    """

    def project(inputs, name):
        return jnp.matmul(inputs, weights[name].astype(x.dtype), preferred_element_type=jnp.float32)

    with jax.named_scope("shared_expert"):
        gate = project(x, "w_gate").astype(x.dtype) if is_gated(activation) else None
        made = project(activate(gate, project(x, "w_up").astype(x.dtype), activation), "w_down")
        if "shared_router" not in weights:
            return made
        wide, router = x.astype(jnp.float32), weights["shared_router"].astype(jnp.float32)
        return made * jax.nn.sigmoid(jnp.matmul(wide, router, precision=jax.lax.Precision.HIGHEST))
