"""Residual and RMSNorm behind combine, token by token."""

import math

import numpy as np


def add_rms_norm(
    combined: np.ndarray, residual: np.ndarray, gamma: np.ndarray, *, eps: float = 1e-6
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``x = combined + residual``; ``rstd = 1 / sqrt(mean(x^2) + eps)``; ``y = x * rstd * gamma``, unrounded.

    Args:
      combined: [..., T, H], what ``combine`` gives.
      residual: [..., T, H].
      gamma: [H].
      eps: added to the mean square.

    Returns:
      (y [..., T, H], rstd [..., T], x [..., T, H]), float64.
    """
    x = np.asarray(combined, np.float64) + np.asarray(residual, np.float64)
    rstd, y = np.zeros(x.shape[:-1]), np.zeros(x.shape)
    for token in np.ndindex(x.shape[:-1]):
        rstd[token] = 1.0 / math.sqrt(sum(value * value for value in x[token]) / x.shape[-1] + eps)
        y[token] = x[token] * rstd[token] * gamma
    return y, rstd, x


def add_rms_norm_vjp(
    ct_y: np.ndarray,
    ct_rstd: np.ndarray,
    ct_x: np.ndarray,
    combined: np.ndarray,
    residual: np.ndarray,
    gamma: np.ndarray,
    *,
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """Cotangents of ``combined`` (and, being a sum, of ``residual``) [..., T, H] and of ``gamma`` [H].

    With ``r = rstd``: ``dr/dx_h = -r^3 x_h / H``, and ``y_h = x_h r gamma_h``.
    """
    _, rstd, x = add_rms_norm(combined, residual, gamma, eps=eps)
    d_x, d_gamma = np.array(ct_x, np.float64), np.zeros(x.shape[-1])
    for token in np.ndindex(x.shape[:-1]):
        r = rstd[token]
        d_gamma += ct_y[token] * x[token] * r
        d_r = ct_rstd[token] + sum(ct_y[token] * x[token] * gamma)
        d_x[token] += ct_y[token] * gamma * r - d_r * r**3 * x[token] / x.shape[-1]
    return d_x, d_gamma
