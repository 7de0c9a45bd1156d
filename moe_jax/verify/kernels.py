"""The laws of what runs on one device: grouped products, and the recipes of the quantised wire."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import reference
from moe_jax.kernels import grouped_matmul
from moe_jax.quant.schemes import named_recipe
from moe_jax.verify.cases import deviation, integers


def grouped_matmul_deviations(
    backend: str, dtype: str = "float32", extents: tuple[int, int, int] = (20, 8, 6)
) -> list[float]:
    """The deviations of a product in 4 groups of rows, and of both gradients, from the exact result rounded once.

    Args:
      backend: its name in the table, or "auto".
      dtype: the dtype of rows and matrices, to which the exact result is rounded.
      extents: (M, H, N) for M rows of H columns, and N columns of the result. Sums of H or M products of small integers
        must be exact in fp32, which they are if H and M are below a million.

    Returns:
      The largest deviation for each way in which M rows fall into groups: some empty, all empty, one with everything,
      single rows. Rows past the groups are NaN.
    """
    rows, hidden, columns = extents
    rng, found = np.random.default_rng(1), []
    program = jax.jit(functools.partial(_product_and_gradients, backend))
    uneven = [rows // 4, 0, rows // 2 - 1, rows // 10]
    for group_sizes in (uneven, [0, 0, 0, 0], [0, rows, 0, 0], [1, 1, 1, rows - 3]):
        lhs, rhs, ct = integers(rng, rows, hidden), integers(rng, 4, hidden, columns), integers(rng, rows, columns)
        total, sizes = sum(group_sizes), np.array(group_sizes, np.int32)
        lhs[total:] = np.nan
        ct[total:] = np.nan
        product, d_lhs, d_rhs = program(*(jnp.asarray(a, dtype) for a in (lhs, rhs, ct)), sizes)
        want_lhs, want_rhs = reference.grouped_matmul_vjp(ct, lhs, rhs, sizes)
        expected = reference.grouped_matmul(lhs, rhs, sizes)
        pairs = ((product[:total], expected[:total]), (d_lhs[:total], want_lhs[:total]), (d_rhs, want_rhs))
        found.append(max(deviation(got, np.asarray(want, got.dtype)) for got, want in pairs))
    return found


def _product_and_gradients(backend, lhs, rhs, ct, sizes):
    product, pull = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes, backend=backend), lhs, rhs)
    return product, *pull(ct)


def recipe_deviations(name: str) -> list[float]:
    """How many of a recipe's codes, scales and dequantised rows differ from the oracle in a bit, for every dtype."""
    rng, found = np.random.default_rng(5), []
    for dtype in ("float32", "bfloat16", "float16"):
        chosen = named_recipe(name, dtype)
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
