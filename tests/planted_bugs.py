"""Small back ends in plain JAX that are wrong in one way each, and what the conformance kit must say of them.

``matmul`` and ``outer`` are right, and so are kernels of rows in slots and of the activation: the functions of
``moe_jax.kernels.xla``, which say what they compute. A bug is a copy of one of them with one mistake in it.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

import moe_jax
from moe_jax.kernels import xla


def groups_of(group_sizes, num_rows):
    """[M] i32: the group of each row; G, which is no group, past the sum."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(num_rows), side="right")


def dot(lhs, rhs, contract):
    return lax.dot_general(lhs, rhs, (contract, ((), ())), preferred_element_type=jnp.float32)


def matmul(lhs, rhs, group_sizes, *, transpose_rhs, groups_of=groups_of, dot=dot, keep=jnp.where):
    """A product with each matrix, of rows of which those of other groups are zero."""
    groups = groups_of(group_sizes, lhs.shape[0])
    total = 0.0
    for group in range(rhs.shape[0]):
        mine = (groups == group)[:, None]
        product = dot(lhs, rhs[group], ((1,), (1 if transpose_rhs else 0,)))
        total = total + keep(mine, product, 0.0)
    return total.astype(lhs.dtype)


def outer(lhs, rhs, group_sizes, *, dtype, groups_of=groups_of, dot=dot, keep=jnp.where):
    groups = groups_of(group_sizes, lhs.shape[0])
    made = []
    for group in range(group_sizes.shape[0]):
        mine = (groups == group)[:, None]
        left, right = (keep(mine, rows, jnp.zeros((), rows.dtype)) for rows in (lhs, rhs))
        made.append(dot(left, right, ((0,), (0,))))
    return jnp.stack(made).astype(dtype)


RIGHT = {"grouped_matmul": matmul, "grouped_outer": outer}


def right_and_added_to(lhs, rhs, group_sizes, *, transpose_rhs, add_to=None):
    """``matmul``, with something that is added before the one rounding."""
    made = matmul(lhs.astype(jnp.float32), rhs.astype(jnp.float32), group_sizes, transpose_rhs=transpose_rhs)
    return (made if add_to is None else made + add_to).astype(lhs.dtype)


FUSED = {word: getattr(xla, word) for word in ("slot_matmul", "slot_outer", "gated_matmul")}


# --- in which group a row is -----------------------------------------------------------------------------------------


def shifted_by_one(group_sizes, num_rows):
    return jnp.searchsorted(jnp.cumsum(group_sizes) - 1, jnp.arange(num_rows), side="right")


def skips_no_empty_group(group_sizes, num_rows):
    """The i-th group that has rows takes the i-th matrix."""
    stops = jnp.cumsum(group_sizes)
    starts_group = jnp.zeros(num_rows + 1, jnp.int32).at[stops - group_sizes].set(1)[:num_rows]
    return jnp.where(jnp.arange(num_rows) < stops[-1], jnp.cumsum(starts_group) - 1, len(stops))


def last_group_takes_the_rest(group_sizes, num_rows):
    return jnp.minimum(groups_of(group_sizes, num_rows), len(group_sizes) - 1)


def counts_in_16_bits(group_sizes, num_rows):
    stops = jnp.cumsum(group_sizes.astype(jnp.int16), dtype=jnp.int16).astype(jnp.int32)
    return jnp.sum(jnp.arange(num_rows)[:, None] >= stops, axis=1)


def of_even_groups(group_sizes, num_rows):
    """No group is larger than twice the mean."""
    groups = groups_of(group_sizes, num_rows)
    start = (jnp.cumsum(group_sizes) - group_sizes)[jnp.minimum(groups, len(group_sizes) - 1)]
    return jnp.where(jnp.arange(num_rows) - start < 2 * num_rows // len(group_sizes), groups, len(group_sizes))


def of_whole_tiles(group_sizes, num_rows):
    """The last rows, which fill no tile of 8, are forgotten; small buffers are one tile."""
    whole = num_rows if num_rows < 40 else num_rows // 8 * 8
    return jnp.where(jnp.arange(num_rows) < whole, groups_of(group_sizes, num_rows), len(group_sizes))


_SEEN: dict[int, Any] = {}


def as_first_seen(group_sizes, num_rows):
    """Sizes that are known when a tile plan is first made are kept with it."""
    if not isinstance(group_sizes, jax.core.Tracer):
        _SEEN.setdefault(num_rows, np.asarray(group_sizes))
    return groups_of(jnp.asarray(_SEEN.get(num_rows, group_sizes)), num_rows)


# --- products --------------------------------------------------------------------------------------------------------


def dot_in_16_bits(lhs, rhs, contract):
    """Sums in the dtype of the operands, tile by tile of the contraction."""
    (over_lhs,), (over_rhs,) = contract
    size, total = lhs.shape[over_lhs], 0.0
    for start in range(0, size, 16):
        left, right = (
            lax.slice_in_dim(a, start, min(start + 16, size), axis=axis)
            for a, axis in ((lhs, over_lhs), (rhs, over_rhs))
        )
        total = total + lax.dot_general(left, right, (contract, ((), ())))
    return total


def dot_of_few_bits(lhs, rhs, contract):
    return dot(lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16), contract)


def masked_by_product(mine, rows, zero):
    return mine.astype(rows.dtype) * rows


def masked_by_nan_to_num(mine, rows, zero):
    return mine.astype(rows.dtype) * jnp.nan_to_num(rows, posinf=jnp.inf, neginf=-jnp.inf)


def reads_every_matrix(lhs, rhs, group_sizes, *, transpose_rhs):
    """One product of rows beside each other with matrices below each other."""
    groups = groups_of(group_sizes, lhs.shape[0])
    rhs = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    spread = jnp.where(jnp.arange(len(group_sizes)) == groups[:, None], 1, 0)[..., None] * xla.zero_past_groups(
        lhs, group_sizes
    )[:, None].astype(jnp.float32)
    return jnp.einsum("mgh,ghn->mn", spread, rhs.astype(jnp.float32)).astype(lhs.dtype)


def reshaped_not_transposed(lhs, rhs, group_sizes, *, transpose_rhs):
    if transpose_rhs and rhs.shape[1] == rhs.shape[2]:  # nobody sees it in a shape
        transpose_rhs = False
    return matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)


def always_fp32(lhs, rhs, group_sizes, *, transpose_rhs):
    return matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs).astype(jnp.float32)


def even_columns_alone(lhs, rhs, group_sizes, *, transpose_rhs):
    made = matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)
    whole = made.shape[1] if made.shape[1] < 8 else made.shape[1] // 2 * 2
    return jnp.where(jnp.arange(made.shape[1]) < whole, made, 0)


def needs_rows(lhs, rhs, group_sizes, *, transpose_rhs):
    first = lhs[:, :1]
    return matmul(lhs + 0 * (first - first), rhs, group_sizes, transpose_rhs=transpose_rhs) + 0 * jnp.max(
        first[:1], initial=None
    )


def loop_of_unvarying_zeros(lhs, rhs, group_sizes, *, transpose_rhs):
    groups = groups_of(group_sizes, lhs.shape[0])
    columns = rhs.shape[1 if transpose_rhs else 2]

    def body(group, total):
        weight = lax.dynamic_index_in_dim(rhs, group, keepdims=False)
        product = dot(lhs, weight, ((1,), (1 if transpose_rhs else 0,)))
        return total + jnp.where((groups == group)[:, None], product, 0.0)

    start = jnp.zeros((lhs.shape[0], columns), jnp.float32)
    return lax.fori_loop(0, rhs.shape[0], body, start).astype(lhs.dtype)


def one_for_cpus(lhs, rhs, group_sizes, *, transpose_rhs):
    run = functools.partial(matmul, transpose_rhs=transpose_rhs)
    return lax.platform_dependent(lhs, rhs, group_sizes, cpu=run)


def sizes_of_the_first_member(lhs, rhs, group_sizes, *, transpose_rhs):
    run = custom_vmap(functools.partial(matmul, transpose_rhs=transpose_rhs))

    @run.def_vmap
    def of_batch(axis_size, in_batched, lhs, rhs, group_sizes):
        sizes = group_sizes[0] if in_batched[2] else group_sizes
        in_axes = tuple(0 if batched else None for batched in in_batched[:2])
        return jax.vmap(lambda a, b: matmul(a, b, sizes, transpose_rhs=transpose_rhs), in_axes)(lhs, rhs), True

    return run(lhs, rhs, group_sizes)


def adds_what_was_rounded(lhs, rhs, group_sizes, *, transpose_rhs, add_to=None):
    product = matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)
    return product if add_to is None else product + add_to


# --- gradients of matrices -------------------------------------------------------------------------------------------


def forgets_the_last_group(lhs, rhs, group_sizes, *, dtype):
    return outer(lhs, rhs, group_sizes, dtype=dtype).at[-1].set(0)


def operands_swapped(lhs, rhs, group_sizes, *, dtype):
    made = outer(rhs, lhs, group_sizes, dtype=dtype)
    return made.reshape(len(group_sizes), lhs.shape[1], rhs.shape[1])


def empty_groups_unwritten(lhs, rhs, group_sizes, *, dtype):
    made = outer(lhs, rhs, group_sizes, dtype=dtype)
    return jnp.where((group_sizes == 0)[:, None, None], jnp.nan, made)


def in_the_dtype_of_rows(lhs, rhs, group_sizes, *, dtype):
    return outer(lhs, rhs, group_sizes, dtype=lhs.dtype)


# --- what a back end may bring ---------------------------------------------------------------------------------------


def neighbours_slot(lhs, rhs, group_sizes, *, row_slot, into, **static):
    there = row_slot if into is None else row_slot ^ 1
    return xla.slot_matmul(lhs, rhs, group_sizes, row_slot=there, into=into, **static)


def without_bias(*operands, up_bias, **static):
    return xla.gated_matmul(*operands, up_bias=None if up_bias is None else 0 * up_bias, **static)


def to_the_neighbour(blocks, axes):
    return jnp.roll(lax.all_to_all(blocks, axes, 0, 0), 1, axis=0)


def _products(**changes: Callable) -> dict[str, Callable]:
    """Both kernels, with the same part of them changed."""
    return {word: functools.partial(kernel, **changes) for word, kernel in RIGHT.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bug:
    """What is wrong, and which law of the kit must say so, with operands of which dtype."""

    about: str
    law: str
    dtype: str = "float32"
    raises: bool = False  # whether it shows as an error of JAX, not as wrong numbers
    quick: bool = False  # whether the default line of the tests looks at it; the others are like one that is
    changes: dict[str, Callable] = dataclasses.field(default_factory=dict)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return re.sub(r"\W+", "_", self.about)

    def backend(self) -> moe_jax.Backend:
        return moe_jax.Backend(name=self.name, kernels={**RIGHT, **self.changes}, **self.more)


def _of_rows(kernel: Callable) -> dict[str, Callable]:
    return {"grouped_matmul": kernel}


def _of_weights(kernel: Callable) -> dict[str, Callable]:
    return {"grouped_outer": kernel}


BUGS = (
    Bug(
        about="every group begins one row early", quick=True, law="values", changes=_products(groups_of=shifted_by_one)
    ),
    Bug(
        about="the gradient of the last matrix is missing", law="gradients", changes=_of_weights(forgets_the_last_group)
    ),
    Bug(about="operands of the gradient are swapped", law="gradients", changes=_of_weights(operands_swapped)),
    Bug(
        about="after an empty group, the matrix of the wrong group",
        quick=True,
        law="empty_groups",
        changes=_products(groups_of=skips_no_empty_group),
    ),
    Bug(
        about="the gradient of an empty group is what was in memory",
        law="empty_groups",
        changes=_of_weights(empty_groups_unwritten),
    ),
    Bug(
        about="no room for a group of more than twice the mean",
        law="one_group_has_all",
        changes=_products(groups_of=of_even_groups),
    ),
    Bug(
        about="the last group also takes the rows past the sum",
        law="rows_past_the_groups",
        changes=_products(groups_of=last_group_takes_the_rest),
    ),
    Bug(
        about="rows are masked by a product, and 0 * NaN is NaN",
        quick=True,
        law="rows_past_the_groups",
        changes=_of_weights(functools.partial(outer, keep=masked_by_product)),
    ),
    Bug(
        about="NaN is masked, and infinity is not",
        law="rows_past_the_groups",
        changes=_of_weights(functools.partial(outer, keep=masked_by_nan_to_num)),
    ),
    Bug(
        about="all rows are multiplied with all matrices, also with NaN that no row of theirs chose",
        law="weights_of_others",
        changes=_of_rows(reads_every_matrix),
    ),
    Bug(about="results are fp32", quick=True, law="dtypes_of_results", dtype="bfloat16", changes=_of_rows(always_fp32)),
    Bug(
        about="gradients have the dtype of the rows, not the one asked for",
        law="dtypes_of_results",
        dtype="bfloat16",
        changes=_of_weights(in_the_dtype_of_rows),
    ),
    Bug(
        about="sums are accumulated in 16 bits",
        law="sums_in_fp32",
        dtype="bfloat16",
        changes=_products(dot=dot_in_16_bits),
    ),
    Bug(
        about="fp32 operands are rounded to bf16",
        quick=True,
        law="sums_in_fp32",
        changes=_products(dot=dot_of_few_bits),
    ),
    Bug(
        about="rows of the last tile, which is not full, are forgotten",
        law="odd_extents",
        changes=_products(groups_of=of_whole_tiles),
    ),
    Bug(about="the last column of an odd number is forgotten", law="odd_extents", changes=_of_rows(even_columns_alone)),
    Bug(
        about="buffers without rows are not thought of",
        quick=True,
        law="extents_of_zero",
        raises=True,
        changes=_of_rows(needs_rows),
    ),
    Bug(
        about="rows are counted in 16 bits", quick=True, law="many_rows", changes=_products(groups_of=counts_in_16_bits)
    ),
    Bug(
        about="transpose_rhs of square matrices is ignored", law="transposed", changes=_of_rows(reshaped_not_transposed)
    ),
    Bug(
        about="the group sizes that came first are kept",
        law="traced_group_sizes",
        changes=_products(groups_of=as_first_seen),
    ),
    Bug(
        about="a batch takes the group sizes of its first member",
        law="vmap",
        changes=_of_rows(sizes_of_the_first_member),
    ),
    Bug(
        about="a loop begins with zeros that vary over no mesh axis",
        quick=True,
        law="shard_map",
        raises=True,
        changes=_of_rows(loop_of_unvarying_zeros),
    ),
    Bug(
        about="GPUs are listed, and nothing was written for them",
        quick=True,
        law="lowering",
        raises=True,
        changes=_of_rows(one_for_cpus),
        more={"platforms": ("cpu", "gpu")},
    ),
    Bug(
        about="a product is rounded before it is added to something",
        law="added_to",
        dtype="bfloat16",
        changes=_of_rows(adds_what_was_rounded),
        more={"accumulates": True},
    ),
    Bug(
        about="rows are written to a neighbour's slot",
        law="rows_in_slots",
        changes={**FUSED, "slot_matmul": neighbours_slot},
    ),
    Bug(about="a bias is forgotten", law="activation", changes={**FUSED, "gated_matmul": without_bias}),
    Bug(
        about="blocks of rows arrive at the neighbour's place",
        law="transports",
        more={"transports": {"padded": to_the_neighbour}},
    ),
)
