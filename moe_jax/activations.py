"""The one table of what experts do between their projections, by name, and the rules for functions of a user's own."""

import inspect
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.errors import InvalidArgumentError, check_choice, raise_all

Array = jax.Array


class Activation(NamedTuple):
    """One row of the table.

    Attributes:
      function: (gate, up) -> hidden if gated, else (up) -> hidden, elementwise; fp32 to fp32.
      gated: whether experts have a second projection, the gate.
      fusible: whether the kernels of GPUs can compute it in the same kernel as the projections. They can where it is
        gated and consists of functions that Triton has.
    """

    function: Callable[..., Array]
    gated: bool
    fusible: bool = False


@_compat.exportable_static
@dataclass(frozen=True)
class ClampedSwiGLU:
    """SwiGLU with limits: with g = min(gate, limit), u = clip(up, -limit, limit): g * sigmoid(alpha * g) * (u + shift).

    The values of gpt-oss are the defaults, which the name "clamped_swiglu" has too. Without gpt-oss' peculiarities,
    ``ClampedSwiGLU(limit, alpha=1.0, shift=0.0)`` is silu(g) * u.

    Attributes:
      limit: greater than 0, and it may be infinite.
      alpha: the factor in the sigmoid.
      shift: what is added to u.

    Raises:
      InvalidArgumentError: ``limit`` is not above 0, or an attribute is not a number.

    >>> import jax.numpy as jnp, moe_jax as moe
    >>> float(moe.ClampedSwiGLU(limit=2.0, alpha=0.0, shift=0.0)(jnp.float32(8.0), jnp.float32(-3.0)))  # 2 * 0.5 * -2
    -2.0
    """

    limit: float = 7.0
    alpha: float = 1.702
    shift: float = 1.0

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        found = [
            f"{name}={value!r} must be a number, and not NaN"
            for name, value in values.items()
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value)
        ]
        if not found and self.limit <= 0:
            found = [f"limit={self.limit} must be greater than 0; math.inf for none"]
        raise_all(found, "ClampedSwiGLU")

    def __call__(self, gate: Array, up: Array) -> Array:
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + self.shift)


def _silu(up: Array) -> Array:
    return up * jax.nn.sigmoid(up)


def _gelu(up: Array) -> Array:
    return 0.5 * up * (1.0 + _compat.erf(up / math.sqrt(2.0)))


def _gelu_tanh(up: Array) -> Array:
    # (1 + tanh(z)) / 2 = sigmoid(2 z), which does not cancel where z is far below zero.
    return up * jax.nn.sigmoid(math.sqrt(8.0 / math.pi) * (up + 0.044715 * up * up * up))


def _relu2(up: Array) -> Array:
    return jnp.square(jax.nn.relu(up))


TABLE = {
    "swiglu": Activation(lambda gate, up: gate * jax.nn.sigmoid(gate) * up, gated=True, fusible=True),
    "gelu": Activation(_gelu, gated=False),
    "clamped_swiglu": Activation(ClampedSwiGLU(), gated=True, fusible=True),
    "silu": Activation(_silu, gated=False),
    "gelu_tanh": Activation(_gelu_tanh, gated=False),
    "relu": Activation(jax.nn.relu, gated=False),
    "relu2": Activation(_relu2, gated=False),
    "geglu": Activation(lambda gate, up: _gelu(gate) * up, gated=True),
    "geglu_tanh": Activation(lambda gate, up: _gelu_tanh(gate) * up, gated=True),
    "reglu": Activation(lambda gate, up: jax.nn.relu(gate) * up, gated=True),
    "relu2_gated": Activation(lambda gate, up: _relu2(gate) * up, gated=True),
}

Choice = str | Callable[..., Array]  # a name in ``TABLE``, a ClampedSwiGLU, or a function


def activation_of(activation: Choice) -> Activation:
    """The row of the table for an ``activation`` that ``check_activation`` has let pass; for a function a new row."""
    if isinstance(activation, str):
        return TABLE[activation]
    return Activation(activation, _num_inputs(activation) == 2, fusible=isinstance(activation, ClampedSwiGLU))


def check_activation(activation: Choice, name: str = "activation") -> None:
    """Raises unless the argument ``name`` is a name in the table, or a hashable function of one or two arrays."""
    if not callable(activation):
        check_choice(name, activation, TABLE)
        return
    try:
        hash(activation)
    except TypeError:
        raise InvalidArgumentError(
            f"{name}={activation!r} must be hashable, since it is static; pass a function, or freeze the dataclass"
        ) from None
    num_inputs = _num_inputs(activation)
    if num_inputs not in (1, 2):
        takes = "has no signature" if num_inputs is None else f"takes {num_inputs} arrays"
        raise InvalidArgumentError(
            f"{name}={activation!r} {takes}; it must be a function of (gate, up), or of (up) alone for experts "
            "without a gate, whose other parameters have defaults; wrap it in a lambda"
        )


def _num_inputs(function: Callable) -> int | None:
    """How many arguments without a default the function has; None if that cannot be told, or one goes by name only."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    needed = [parameter for parameter in parameters if parameter.default is parameter.empty]
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(needed) if all(parameter.kind in by_place for parameter in needed) else None
