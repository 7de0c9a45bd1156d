"""Grouped products by ``jax.lax.ragged_dot``: the semantics, and the native instruction where a platform has one."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jax.typing import DTypeLike

from moe_jax.kernels.table import Backend

# Contract the rows of both operands, group by group: [M, H], [M, N] -> [G, H, N].
OUTER = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def zero_past_groups(rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """``rows`` with zeros past ``sum(group_sizes)``. It selects and does not multiply, so that NaN goes as well."""
    written = jnp.arange(rows.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(written[:, None], rows, jnp.zeros((), rows.dtype))


@sequential_vmap
def _inner_product(lhs, rhs, group_sizes):
    """A ragged product. A batch is a loop over its members, since JAX can batch few forms of such products."""
    return lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32)


@sequential_vmap
def _outer_product(lhs, rhs, group_sizes):
    return lax.ragged_dot_general(lhs, rhs, group_sizes, OUTER, preferred_element_type=jnp.float32)


def masked_matmul(product: Callable, lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """``product(lhs, rhs, group_sizes)``, fp32 [M, N], cast to the dtype of ``lhs``; no NaN past the sum can spread."""
    return product(zero_past_groups(lhs, group_sizes), rhs, group_sizes).astype(lhs.dtype)


def masked_outer(
    product: Callable, lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """``product(lhs, rhs, group_sizes)``, fp32 [G, H, N], cast to ``dtype``; rows past the sum add nothing to it."""
    summed = product(zero_past_groups(lhs, group_sizes), zero_past_groups(rhs, group_sizes), group_sizes)
    empty = (group_sizes == 0)[:, None, None]  # some kernels leave an empty group's product unwritten
    return jnp.where(empty, jnp.zeros((), dtype), summed.astype(dtype))


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, transpose_rhs: bool) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), group_sizes [G] -> [M, N]."""
    return masked_matmul(_inner_product, lhs, jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs, group_sizes)


def grouped_outer(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, dtype: DTypeLike) -> jax.Array:
    """lhs [M, H], rhs [M, N], group_sizes [G] -> [G, H, N] in ``dtype``."""
    return masked_outer(_outer_product, lhs, rhs, group_sizes, dtype)


# What those kernels of other back ends compute that read and write slots, or make the activation too, in single steps.


def slot_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_rhs: bool,
    row_slot: jax.Array | None = None,
    into: int | None = None,
    add_to: jax.Array | None = None,
) -> jax.Array:
    """The kernel "slot_matmul" of ``Backend``; without ``row_slot``, "grouped_matmul" with ``add_to``."""
    if row_slot is not None and into is None:
        lhs = jnp.take(lhs, row_slot, axis=0, mode="clip")
    product = grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)
    if row_slot is not None and into is not None:
        is_row = jnp.arange(row_slot.shape[0]) < jnp.sum(group_sizes)
        slots = jnp.zeros_like(product, shape=(into, product.shape[1]))
        product = slots.at[jnp.where(is_row, row_slot, into)].set(product, mode="drop")
    return product if add_to is None else product + add_to


def slot_outer(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: DTypeLike,
    row_slot: jax.Array | None = None,
    slotted: str = "",
) -> jax.Array:
    """The kernel "slot_outer" of ``Backend``; without ``row_slot``, "grouped_outer"."""
    if row_slot is not None:
        lhs, rhs = (
            jnp.take(rows, row_slot, axis=0, mode="clip") if name == slotted else rows
            for name, rows in (("lhs", lhs), ("rhs", rhs))
        )
    return grouped_outer(lhs, rhs, group_sizes, dtype=dtype)


def gated_matmul(
    lhs: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    group_sizes: jax.Array,
    *,
    gating: Callable,
    keep: bool,
    gate_bias: jax.Array | None = None,
    up_bias: jax.Array | None = None,
    row_slot: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The kernel "gated_matmul" of ``Backend``, with each bias by itself."""
    rows = lhs if row_slot is None else jnp.take(lhs, row_slot, axis=0, mode="clip")
    products = []
    for rhs, bias in ((gate, gate_bias), (up, up_bias)):
        product = grouped_matmul(rows, rhs, group_sizes, transpose_rhs=False)
        if bias is not None:
            ones = jnp.ones_like(rows, shape=(rows.shape[0], 1))
            product = product + grouped_matmul(ones, bias[:, None], group_sizes, transpose_rhs=False)
        products.append(product)
    return (*products, gating(*products)) if keep else (gating(*products),)


BACKEND = Backend(
    name="xla",
    kernels={"grouped_matmul": grouped_matmul, "grouped_outer": grouped_outer},
    about="jax.lax.ragged_dot",
    unpromised=("weights_of_others",),  # where XLA has no grouped product, it multiplies all rows with all matrices
)
