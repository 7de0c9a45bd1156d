"""A back end of your own: two kernels, an entry in the table, and the conformance kit that proves them.

It needs pytest. Run: python examples/a_back_end_of_your_own.py
"""

import sys

import jax
import jax.numpy as jnp
import pytest

import moe_jax as moe
import moe_jax.testing

moe.emulate_devices(4)  # leave this out where there are accelerators


def group_of_rows(group_sizes, num_rows):
    """[M]: the group of each row; G, which is none, past the last one."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(num_rows), side="right")


def grouped_matmul(lhs, rhs, group_sizes, *, transpose_rhs):
    """Every row fetches the matrix of its group: simple, right, and a waste of memory."""
    matrices = jnp.take(rhs, group_of_rows(group_sizes, len(lhs)), axis=0, mode="clip")
    spec = "mh,mnh->mn" if transpose_rhs else "mh,mhn->mn"
    return jnp.einsum(spec, lhs, matrices, preferred_element_type=jnp.float32).astype(lhs.dtype)


def grouped_outer(lhs, rhs, group_sizes, *, dtype):
    """The gradient of the matrices. What lies past the last group may be NaN, so it is selected away."""
    groups = group_of_rows(group_sizes, len(lhs))
    there = (groups < len(group_sizes))[:, None]
    left, right = (jnp.where(there, rows.astype(jnp.float32), 0.0) for rows in (lhs, rhs))
    each = left[:, :, None] * right[:, None, :]
    return jax.ops.segment_sum(each, groups, num_segments=len(group_sizes)).astype(dtype)


KERNELS = {"grouped_matmul": grouped_matmul, "grouped_outer": grouped_outer}
BACKEND = moe.Backend(name="gather", kernels=KERNELS, about="a matrix for each row")
moe.register_backend(BACKEND, replace=True)  # pytest imports this file once more

# A package offers it in its pyproject.toml instead, and nobody loads it before somebody names it:
#
#   [project.entry-points."moe_jax.backends"]
#   gather = "my_package.kernels:BACKEND"


class TestGather(moe_jax.testing.BackendConformance):
    """Every law of a back end, as tests; in a package this class stands in a file of tests/."""

    backend = "gather"
    dtypes = ("bfloat16",)
    platforms = ("cpu", "cuda", "tpu")  # lowered for all of them, on any machine


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", "-p", "no:cacheprovider"]))
