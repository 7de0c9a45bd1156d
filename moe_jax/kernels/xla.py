"""Grouped products by ``jax.lax.ragged_dot``: the semantics, and the native instruction where a platform has one."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from moe_jax.kernels.table import Backend

# Contract the rows of both operands, group by group: [M, H], [M, N] -> [G, H, N].
_OUTER = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def zero_past_groups(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """``rows`` with everything past ``sum(group_sizes)`` zeroed: a select, so NaN there is gone too."""
    written = jnp.arange(rows.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(written[:, None], rows, jnp.zeros((), rows.dtype))


@sequential_vmap
def _inner_product(lhs, rhs, group_sizes):
    """JAX batches few forms of a ragged product, so a batch is a loop over its members."""
    return lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32)


@sequential_vmap
def _outer_product(lhs, rhs, group_sizes):
    return lax.ragged_dot_general(lhs, rhs, group_sizes, _OUTER, preferred_element_type=jnp.float32)


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), group_sizes [G] -> [M, N]; zeros past the sum."""
    rhs = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    lhs = zero_past_groups(lhs, group_sizes)
    product = _inner_product(lhs, rhs, group_sizes)
    return zero_past_groups(product.astype(lhs.dtype), group_sizes)  # undefined there on some platforms


def grouped_outer(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, dtype) -> jax.Array:
    """lhs [M, H], rhs [M, N], group_sizes [G] -> [G, H, N] in ``dtype``."""
    lhs, rhs = zero_past_groups(lhs, group_sizes), zero_past_groups(rhs, group_sizes)
    product = _outer_product(lhs, rhs, group_sizes)
    empty = (group_sizes == 0)[:, None, None]  # some kernels leave an empty group's product unwritten
    return jnp.where(empty, jnp.zeros((), dtype), product.astype(dtype))


BACKEND = Backend(name="xla", kernels={"grouped_matmul": grouped_matmul, "grouped_outer": grouped_outer})
