"""Grouped products by tokamax, for users who name it. Tokamax takes the kernels for the devices of the process."""

import functools
import importlib

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from moe_jax.kernels import xla
from moe_jax.kernels.table import Backend


def _ragged_dot(lhs, rhs, group_sizes, *, dimensions):
    tokamax = importlib.import_module("tokamax")  # an optional package, which ``Backend.requires`` has asked for
    return tokamax.ragged_dot_general(
        lhs, rhs, group_sizes, ragged_dot_dimension_numbers=dimensions, preferred_element_type=jnp.float32
    )


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), group_sizes [G] -> [M, N]."""
    dimensions = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transpose_rhs else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    product = functools.partial(_ragged_dot, dimensions=dimensions)
    return xla.masked_matmul(product, lhs, rhs, group_sizes)


def grouped_outer(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, dtype: DTypeLike) -> jax.Array:
    """lhs [M, H], rhs [M, N], group_sizes [G] -> [G, H, N] in ``dtype``."""
    product = functools.partial(_ragged_dot, dimensions=xla.OUTER)
    return xla.masked_outer(product, lhs, rhs, group_sizes, dtype)


BACKEND = Backend(
    name="tokamax",  # no platform, so "auto" never takes it: on a device that it does not know, it falls back to XLA
    kernels={"grouped_matmul": grouped_matmul, "grouped_outer": grouped_outer},
    about="tokamax.ragged_dot_general",
    requires="tokamax",
    unpromised=("weights_of_others",),  # it may fall back to jax.lax.ragged_dot
)
