"""Expert FFNs and the grouped matrix product, with hand-derived gradients, in float64.

The weights of one expert are a dict: ``w_gate`` [H, F] (gated activations only), ``w_up`` [H, F], ``w_down`` [F, H] and
the optional biases ``b_gate`` [F], ``b_up`` [F] and ``b_down`` [H].
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_jax import errors
from moe_jax.parameters import rows_of
from moe_jax.reference import elementwise as ew

CLAMP = 7.0  # gpt-oss: the gate is limited from above, the up projection on both sides
SLOPE = 1.702  # gpt-oss: sigmoid(1.702 x) * x approximates gelu


def grouped_matmul(
    lhs: np.ndarray, rhs: np.ndarray, group_sizes: np.ndarray, *, transpose_rhs: bool = False
) -> np.ndarray:
    """out[i] = lhs[i] @ rhs[g] for the rows i of group g; groups stand one after the other.

    Rows past sum(group_sizes) are never read, and are zero in the result.

    Args:
      lhs: [M, H].
      rhs: [G, H, N], or [G, N, H] with ``transpose_rhs``.
      group_sizes: [G] int, sum at most M.
      transpose_rhs: swap the last two axes of ``rhs`` first.

    Returns:
      [M, N] f64.

    Raises:
      InvalidArgumentError: a group size is negative, or their sum exceeds M.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> lhs, rhs = np.array([[1.0], [2.0], [np.nan]]), np.array([[[10.0]], [[100.0]]])
    >>> reference.grouped_matmul(lhs, rhs, [1, 1]).ravel().tolist()
    [10.0, 200.0, 0.0]
    """
    rhs = _oriented(rhs, transpose_rhs)
    out = np.zeros((len(lhs), rhs.shape[2]))
    for g, rows in enumerate(_group_slices(group_sizes, len(lhs))):
        out[rows] = np.asarray(lhs[rows], np.float64) @ rhs[g]
    return out


def grouped_matmul_vjp(
    ct: np.ndarray, lhs: np.ndarray, rhs: np.ndarray, group_sizes: np.ndarray, *, transpose_rhs: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The cotangents of ``lhs`` and ``rhs`` in ``grouped_matmul``.

    Rows of ``ct`` and ``lhs`` past sum(group_sizes) are never read, so they may hold NaN.

    Args:
      ct: [M, N].
      lhs, rhs, group_sizes, transpose_rhs: as given to ``grouped_matmul``.

    Returns:
      ct_lhs [M, H] f64, zero past the sum; ct_rhs f64 in the layout of ``rhs``, zero for an empty group.
    """
    rhs = _oriented(rhs, transpose_rhs)
    ct_lhs, ct_rhs = np.zeros((len(lhs), rhs.shape[1])), np.zeros(rhs.shape)
    for g, rows in enumerate(_group_slices(group_sizes, len(lhs))):
        ct_lhs[rows] = np.asarray(ct[rows], np.float64) @ rhs[g].T
        ct_rhs[g] = np.asarray(lhs[rows], np.float64).T @ np.asarray(ct[rows], np.float64)
    return ct_lhs, _oriented(ct_rhs, transpose_rhs)


def expert_ffn(x: np.ndarray, weights: Mapping[str, np.ndarray], activation: Any) -> np.ndarray:
    """One expert: act(x @ w_gate + b_gate, x @ w_up + b_up) @ w_down + b_down.

    "silu", "gelu" (exact), "gelu_tanh", "relu" and "relu2" are functions of up, without a gate. "swiglu", "geglu",
    "geglu_tanh", "reglu" and "relu2_gated" are the same functions of gate, times up. "clamped_swiglu" (gpt-oss): with
    g = min(gate, 7) and u = clip(up, -7, 7), g * sigmoid(1.702 g) * (u + 1).

    Args:
      x: [n, H].
      weights: one expert's weights, see the module's text.
      activation: a name of ``moe_jax.moe_layer``, a ``ClampedSwiGLU``, or a NumPy function of (gate, up), or of (up)
        where the weights have no gate.

    Returns:
      [n, H] f64.

    Raises:
      InvalidArgumentError: ``activation`` is unknown, or there are gate weights that it does not use.
      MissingArgumentError: a weight that it needs is absent.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> weights = dict.fromkeys(("w_gate", "w_up", "w_down"), np.ones((1, 1)))
    >>> reference.expert_ffn(np.array([[20.0]]), weights, "clamped_swiglu").round(3).tolist()
    [[56.0]]
    """
    weights = _checked(weights, activation)
    gate, up = _projections(np.asarray(x, np.float64), weights)
    activate, *_ = _rule_of(activation, weights)
    return activate(gate, up) @ weights["w_down"] + weights.get("b_down", 0.0)


def expert_ffn_vjp(
    ct: np.ndarray, x: np.ndarray, weights: Mapping[str, np.ndarray], activation: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The cotangents of ``x`` and ``weights`` in ``expert_ffn``.

    The derivative of a clamp is 1 strictly inside its limits and 0 elsewhere, that of relu 0 at 0.

    Args:
      ct: [n, H].
      x, weights, activation: as given to ``expert_ffn``.

    Returns:
      ct_x [n, H] f64, and a dict of f64 cotangents with the keys of ``weights``.

    Raises:
      UnsupportedError: the activation is a function of the caller's own.
    """
    weights = _checked(weights, activation)
    ct, x = np.asarray(ct, np.float64), np.asarray(x, np.float64)
    gate, up = _projections(x, weights)
    activate, activate_vjp, _ = _rule_of(activation, weights)
    if activate_vjp is None:
        raise errors.UnsupportedError(
            f"activation={activation!r} is a function, and the oracle knows no derivative of it; take a name or a "
            "ClampedSwiGLU"
        )
    ct_gate, ct_up = activate_vjp(ct @ weights["w_down"].T, gate, up)
    ct_x = ct_up @ weights["w_up"].T
    cts = {"w_up": x.T @ ct_up, "b_up": ct_up.sum(0), "w_down": activate(gate, up).T @ ct, "b_down": ct.sum(0)}
    if gate is not None:
        ct_x += ct_gate @ weights["w_gate"].T
        cts |= {"w_gate": x.T @ ct_gate, "b_gate": ct_gate.sum(0)}
    return ct_x, {name: cts[name] for name in weights}


def _oriented(rhs: np.ndarray, transpose_rhs: bool) -> np.ndarray:
    rhs = np.asarray(rhs, np.float64)
    return rhs.swapaxes(1, 2) if transpose_rhs else rhs


def _group_slices(group_sizes: np.ndarray, num_rows: int) -> list[slice]:
    group_sizes = np.asarray(group_sizes, np.int64)
    if (group_sizes < 0).any() or group_sizes.sum() > num_rows:
        raise errors.InvalidArgumentError(
            f"group_sizes={group_sizes.tolist()} must be non-negative with a sum of at most {num_rows}, the rows of lhs"
        )
    ends = np.cumsum(group_sizes)
    return [slice(end - size, end) for end, size in zip(ends, group_sizes, strict=True)]


def _checked(weights: Mapping[str, np.ndarray], activation: Any) -> dict[str, np.ndarray]:
    """``weights`` in float64; raises unless they are exactly what ``activation`` uses."""
    facts = {"gated"} if _rule_of(activation, weights)[2] else set()
    rows = [row for row in rows_of("experts") if row.needs <= facts]
    known, needed = {row.role for row in rows}, {row.role for row in rows if not row.optional}
    if missing := sorted(needed - set(weights)):
        raise errors.MissingArgumentError(f"weights lacks {missing}; activation={activation!r} needs {sorted(needed)}")
    if unused := sorted(set(weights) - known):
        raise errors.InvalidArgumentError(f"weights has {unused}, which activation={activation!r} does not use")
    return {name: np.asarray(value, np.float64) for name, value in weights.items()}


def _projections(x: np.ndarray, weights: Mapping[str, np.ndarray]) -> tuple[np.ndarray | None, np.ndarray]:
    """The gate (None without one) and up projections [n, F]."""
    up = x @ weights["w_up"] + weights.get("b_up", 0.0)
    gate = x @ weights["w_gate"] + weights.get("b_gate", 0.0) if "w_gate" in weights else None
    return gate, up


# An activation is three things: its function of (gate, up), the cotangents of both, and whether it is gated. Where it
# is not, gate is None.
_Rule = tuple[Callable, Callable | None, bool]


def _plain(function: Callable, slope: Callable) -> _Rule:
    """function(up)."""
    return lambda _, up: function(up), lambda ct, _, up: (None, ct * slope(up)), False


def _gating(function: Callable, slope: Callable) -> _Rule:
    """function(gate) * up."""
    return (
        lambda gate, up: function(gate) * up,
        lambda ct, gate, up: (ct * up * slope(gate), ct * function(gate)),
        True,
    )


def _clamped_swiglu(limit: float, alpha: float, shift: float) -> _Rule:
    def activate(gate, up):
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return ew.silu(gate, alpha) * (up + shift)

    def cotangents(ct, gate, up):
        inside_gate, inside_up = gate < limit, np.abs(up) < limit
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        ct_gate = ct * (up + shift) * ew.silu_grad(gate, alpha)
        return ct_gate * inside_gate, ct * ew.silu(gate, alpha) * inside_up

    return activate, cotangents, True


_ACTIVATIONS: dict[str, _Rule] = {
    "swiglu": _gating(ew.silu, ew.silu_grad),
    "gelu": _plain(ew.gelu, ew.gelu_grad),
    "clamped_swiglu": _clamped_swiglu(CLAMP, SLOPE, 1.0),
    "silu": _plain(ew.silu, ew.silu_grad),
    "gelu_tanh": _plain(ew.gelu_tanh, ew.gelu_tanh_grad),
    "relu": _plain(ew.relu, ew.relu_grad),
    "relu2": _plain(ew.relu2, ew.relu2_grad),
    "geglu": _gating(ew.gelu, ew.gelu_grad),
    "geglu_tanh": _gating(ew.gelu_tanh, ew.gelu_tanh_grad),
    "reglu": _gating(ew.relu, ew.relu_grad),
    "relu2_gated": _gating(ew.relu2, ew.relu2_grad),
}


def _rule_of(activation: Any, weights: Mapping[str, np.ndarray]) -> _Rule:
    if all(hasattr(activation, name) for name in ("limit", "alpha", "shift")):  # a ClampedSwiGLU
        return _clamped_swiglu(activation.limit, activation.alpha, activation.shift)
    if callable(activation):
        if "w_gate" in weights:
            return activation, None, True
        return lambda _, up: activation(up), None, False
    errors.check_choice("activation", activation, _ACTIVATIONS)
    return _ACTIVATIONS[activation]
