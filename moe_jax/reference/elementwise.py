"""Elementwise functions of the oracle and their derivatives, in float64 and without overflow."""

import math

import numpy as np

_SQRT_2_PI = math.sqrt(2.0 / math.pi)
_erf = np.vectorize(math.erf, otypes=[np.float64])  # NumPy has no erf of its own


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), elementwise; float64 in, float64 out."""
    return np.exp(-np.logaddexp(0.0, -x))


def sigmoid_grad(x: np.ndarray) -> np.ndarray:
    """The derivative of ``sigmoid``, as sigmoid(x) * sigmoid(-x): it stays accurate where 1 - sigmoid(x) is tiny."""
    return sigmoid(x) * sigmoid(-x)


def silu(x: np.ndarray, slope: float = 1.0) -> np.ndarray:
    """x * sigmoid(slope * x), elementwise; ``slope=1.702`` is the sigmoid approximation of gelu."""
    return x * sigmoid(slope * x)


def silu_grad(x: np.ndarray, slope: float = 1.0) -> np.ndarray:
    """The derivative of ``silu``."""
    return sigmoid(slope * x) + slope * x * sigmoid_grad(slope * x)


def gelu(x: np.ndarray) -> np.ndarray:
    """x * Phi(x) with Phi the exact normal distribution function (erf, not the tanh approximation)."""
    return x * _normal_cdf(x)


def gelu_grad(x: np.ndarray) -> np.ndarray:
    """The derivative of ``gelu``: Phi(x) + x * phi(x)."""
    return _normal_cdf(x) + x * np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """The approximation of ``gelu``: x / 2 * (1 + tanh(c * (x + 0.044715 x^3))) with c = sqrt(2 / pi)."""
    return 0.5 * x * (1.0 + np.tanh(_SQRT_2_PI * (x + 0.044715 * x**3)))


def gelu_tanh_grad(x: np.ndarray) -> np.ndarray:
    """The derivative of ``gelu_tanh``: (1 + t) / 2 + x / 2 * (1 - t^2) * c * (1 + 3 * 0.044715 x^2)."""
    t = np.tanh(_SQRT_2_PI * (x + 0.044715 * x**3))
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * _SQRT_2_PI * (1.0 + 3 * 0.044715 * x * x)


def relu(x: np.ndarray) -> np.ndarray:
    """The positive part of x."""
    return np.maximum(x, 0.0)


def relu_grad(x: np.ndarray) -> np.ndarray:
    """The derivative of ``relu``, 0 at 0."""
    return (x > 0).astype(np.float64)


def relu2(x: np.ndarray) -> np.ndarray:
    """The square of ``relu``."""
    return relu(x) ** 2


def relu2_grad(x: np.ndarray) -> np.ndarray:
    """The derivative of ``relu2``."""
    return 2.0 * relu(x)


def sqrt_softplus(x: np.ndarray) -> np.ndarray:
    """sqrt(log(1 + exp(x))), elementwise. Where x is below -40 it equals exp(x / 2) to the last bit."""
    return np.where(x < -40.0, np.exp(0.5 * np.minimum(x, -40.0)), np.sqrt(np.logaddexp(0.0, x)))


def sqrt_softplus_grad(x: np.ndarray) -> np.ndarray:
    """The derivative of ``sqrt_softplus``: sigmoid(x) / (2 * sqrt_softplus(x)), and sqrt_softplus(x) / 2 below -40."""
    root = sqrt_softplus(np.maximum(x, -40.0))
    return np.where(x < -40.0, 0.5 * sqrt_softplus(x), 0.5 * sigmoid(x) / root)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over a vector ``x`` [E]."""
    shifted = np.exp(x - x.max())
    return shifted / shifted.sum()


def softmax_vjp(ct: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The cotangent of the vector ``x`` [E] of ``softmax``: p * (ct - <ct, p>)."""
    p = softmax(x)
    return p * (ct - ct @ p)


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))
