"""The laws of what runs on one device: grouped products, and the recipes of the quantised wire."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import quant, reference
from moe_jax.kernels import grouped_matmul
from moe_jax.verify.cases import deviation, integers


def grouped_matmul_deviations(backend: str) -> list[float]:
    rng, found = np.random.default_rng(1), []
    for sizes in ([5, 0, 9, 2], [0, 0, 0, 0], [0, 20, 0, 0], [1, 1, 1, 17]):
        lhs, rhs, ct = integers(rng, 20, 8), integers(rng, 4, 8, 6), integers(rng, 20, 6)
        total, sizes = sum(sizes), np.array(sizes, np.int32)
        lhs[total:] = np.nan
        ct[total:] = np.nan
        product, pull = jax.vjp(lambda a, b, s=sizes: grouped_matmul(a, b, jnp.asarray(s), backend=backend), lhs, rhs)
        d_lhs, d_rhs = pull(jnp.asarray(ct))
        want_lhs, want_rhs = reference.grouped_matmul_vjp(ct, lhs, rhs, sizes)
        expected = reference.grouped_matmul(lhs, rhs, sizes)
        pairs = ((product[:total], expected[:total]), (d_lhs[:total], want_lhs[:total]), (d_rhs, want_rhs))
        found.append(max(deviation(*pair) for pair in pairs))
    return found


def recipe_deviations(name: str) -> list[float]:
    """Of codes, scales and dequantised rows under one recipe, for rows of every dtype, magnitudes mixed; bit by bit."""
    rng, found = np.random.default_rng(5), []
    for dtype in ("float32", "bfloat16", "float16"):
        chosen = quant.recipe(name, dtype)
        rows = rng.normal(size=(6, 72)) * 2.0 ** rng.integers(-12, 8, (6, 1))
        rows[3] = 0
        x = np.asarray(jnp.asarray(rows, dtype))
        smooth = np.asarray(rng.uniform(0.5, 2, 72), np.float32) if chosen.takes_smooth else None
        got = jax.jit(functools.partial(_there_and_back, chosen))(x, smooth)
        values, scale = reference.quant.quantize(name, x, smooth=smooth)
        want = (values, scale, reference.quant.dequantize(name, values, scale))
        pairs = zip((np.asarray(a) for a in got), want, strict=True)
        found.append(float(sum(a.tobytes() != np.asarray(b).tobytes() for a, b in pairs)))
    return found


def _there_and_back(recipe, x, smooth):
    q = recipe.quantize(x, smooth=smooth)
    return q.values, q.scale, recipe.dequantize(recipe.unpack(recipe.pack(q), x.shape[1]))
