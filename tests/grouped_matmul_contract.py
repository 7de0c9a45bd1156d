"""The contract of a grouped product, for any back end: operands, one program, and the check against the oracle."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

import moe_jax
from moe_jax import reference

M, H, N, G = 37, 6, 5, 5  # no multiple of any tile
GROUPS = {
    "full": [10, 7, 8, 5, 7],
    "empty_first": [0, 0, 12, 5, 20],
    "empty_middle": [16, 0, 0, 16, 5],
    "empty_last": [17, 15, 5, 0, 0],
    "all_empty": [0, 0, 0, 0, 0],
    "one_giant": [0, 0, 37, 0, 0],
    "giant_last": [0, 0, 0, 0, 37],
    "ones": [1, 1, 1, 1, 1],
    "slack": [3, 16, 1, 0, 4],
    "slack_after_empty": [0, 0, 0, 33, 0],
}


@functools.cache
def program(backend, transpose_rhs):
    """(lhs, rhs, group_sizes, ct) -> (out, d_lhs, d_rhs)."""

    def run(lhs, rhs, group_sizes, ct):
        def product(lhs, rhs):
            return moe_jax.grouped_matmul(lhs, rhs, group_sizes, backend=backend, transpose_rhs=transpose_rhs)

        out, pullback = jax.vjp(product, lhs, rhs)
        return out, *pullback(ct)

    return jax.jit(run)


def operands(seed, group_sizes, dtype, transpose_rhs, shape=(M, H, N)):
    """Integers in -4..4; rows past the groups are NaN in ``lhs`` and in the cotangent."""
    num_rows, contracted, out_dim = shape
    rng = np.random.default_rng(seed)
    lhs, ct = (rng.integers(-4, 5, (num_rows, d)).astype(dtype) for d in (contracted, out_dim))
    lhs[sum(group_sizes) :], ct[sum(group_sizes) :] = np.nan, np.nan
    rhs = rng.integers(-4, 5, (len(group_sizes), contracted, out_dim)).astype(dtype)
    rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    return lhs, rhs, np.array(group_sizes, np.int32), ct


def check(backend, lhs, rhs, group_sizes, ct, transpose_rhs):
    results = program(backend, transpose_rhs)(lhs, rhs, group_sizes, ct)
    expected = (
        reference.grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs),
        *reference.grouped_matmul_vjp(ct, lhs, rhs, group_sizes, transpose_rhs=transpose_rhs),
    )
    expected = [e.astype(lhs.dtype) for e in expected]
    chex.assert_trees_all_equal_shapes_and_dtypes(list(results), expected)
    total = int(np.sum(group_sizes))
    for actual, wanted, stop in zip(results, expected, (total, total, None), strict=True):
        np.testing.assert_array_equal(np.asarray(actual)[:stop], wanted[:stop])


def lowered_text(backend, platform, dtype=jnp.float32):
    case = operands(0, GROUPS["full"], dtype, False)
    return program(backend, False).trace(*case).lower(lowering_platforms=(platform,)).as_text()


# (rows M, hidden H, ffn F, groups G) on one device
WORKLOADS = {
    "A": (4096, 1024, 1024, 4),
    "B": (16384, 2048, 768, 16),
    "C": (8192, 7168, 2048, 8),
    "64 experts": (16384, 2048, 768, 64),
}
