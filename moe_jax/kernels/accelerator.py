"""Grouped products for GPU and TPU: tokamax where it is installed, XLA's native ragged_dot otherwise."""

import importlib.util

import jax
import jax.numpy as jnp

from moe_jax.kernels import xla
from moe_jax.kernels.table import Backend


def tokamax_is_installed() -> bool:
    """Whether tokamax (its grouped kernels are the fastest at hand) can be imported."""
    return importlib.util.find_spec("tokamax") is not None


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), group_sizes [G] -> [M, N]; zeros past the sum."""
    if not tokamax_is_installed():
        return xla.grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)
    import tokamax

    rhs = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    lhs = xla.zero_past_groups(lhs, group_sizes)
    product = tokamax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32)
    return xla.zero_past_groups(product.astype(lhs.dtype), group_sizes)


_KERNELS = {"grouped_matmul": grouped_matmul, "grouped_outer": xla.grouped_outer}
GPU = Backend(name="gpu", platforms=("gpu",), kernels=_KERNELS)
TPU = Backend(name="tpu", platforms=("tpu",), kernels=_KERNELS)
