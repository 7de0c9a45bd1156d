"""Derivatives of every mode against differences of a float64 formula, which are exact for small polynomials."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

MODES = ("grad.v", "jvp", "u.H.v by grad of grad", "u.H.v by jvp of grad", "u.H.v by jvp of jvp")


def every_mode(loss, modes):
    """(params, u, v) -> the derivatives along v, and along u and v, that ``modes`` names."""

    def dot(a, b):
        return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    def run(params, u, v):
        grad = jax.grad(loss)
        forward = functools.partial(jax.jvp, loss)
        found = {
            "grad.v": lambda: dot(grad(params), v),
            "jvp": lambda: forward((params,), (v,))[1],
            "u.H.v by grad of grad": lambda: dot(u, jax.grad(lambda params: dot(grad(params), v))(params)),
            "u.H.v by jvp of grad": lambda: dot(u, jax.jvp(grad, (params,), (v,))[1]),
            "u.H.v by jvp of jvp": lambda: jax.jvp(lambda params: forward((params,), (v,))[1], (params,), (u,))[1],
        }
        return {mode: found[mode]() for mode in modes}

    return jax.jit(run)


def differences(oracle, params, u, v, step=1.0):
    """What ``every_mode`` finds; exact for an ``oracle`` that is a polynomial of degree 3 at most. float64."""

    def at(a, b):
        wide = jax.tree.map(lambda p, x, y: np.asarray(p, np.float64) + step * (a * x + b * y), params, u, v)
        return oracle(wide)

    first = (8 * (at(0, 1) - at(0, -1)) - (at(0, 2) - at(0, -2))) / (12 * step)
    second = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / (4 * step**2)
    return dict(zip(MODES, (first, first, second, second, second), strict=True))


def holds(loss, oracle, params, rng, modes=MODES[:-1], *, step=1.0, tolerance=0.0):
    """Equality of ``every_mode`` and ``differences`` at whole numbers, exact by default; neither derivative is zero."""
    u, v = (jax.tree.map(lambda p: rng.integers(-2, 3, p.shape).astype(np.float32), params) for _ in range(2))
    want, got = differences(oracle, params, u, v, step), every_mode(loss, modes)(params, u, v)
    assert want["jvp"] and want["u.H.v by jvp of jvp"], "draw other numbers"
    for mode in modes:
        assert abs(float(got[mode]) - want[mode]) <= tolerance * abs(want[mode]), mode
