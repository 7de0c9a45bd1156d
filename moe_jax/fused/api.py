"""The public fused pair: checks, the route, and the independent dense product beside it."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax import _compat
from moe_jax.errors import (
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    check_choice,
    check_count,
    check_dtype,
    check_flag,
    check_rank,
    check_shape,
)
from moe_jax.fused.counts import Counts, most_rows_per_chunk, read_counts
from moe_jax.fused.exchange import Extents, compute_then_send, make_route, send_then_compute
from moe_jax.kernels import FLOAT_DTYPES, backend_names

Array = jax.Array
CountList = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Array


def grouped_matmul_all_to_allv(
    gmm_x: Array,
    gmm_weight: Array,
    send_counts: CountList,
    recv_counts: CountList,
    axis_name: str | tuple[str, ...],
    *,
    mm_x: Array | None = None,
    mm_weight: Array | None = None,
    transpose_gmm_weight: bool = False,
    transpose_mm_weight: bool = False,
    recv_capacity: int | None = None,
    chunks: int = 1,
    backend: str = "auto",
) -> tuple[Array, Array | None]:
    """Multiplies each row with the weights of its expert, then sends it to its rank: the way out of the experts.

    ``y = all_to_allv(unpermute(gmm_x[expert l] @ gmm_weight[l]))`` and, independent of it, ``mm_y = mm_x @ mm_weight``.
    Accumulated in fp32, rounded once to the dtype of ``gmm_x``, before rows travel.

    Rows of ``gmm_x`` stand by (local expert, destination rank), those of ``y`` by (source rank, that rank's expert);
    order inside a block is kept. Rows of ``gmm_x`` past ``sum(send_counts)`` may hold anything, NaN included: they
    influence nothing, and their gradient is zero. Rows of ``y`` past ``sum(recv_counts)`` are zero.

    R ranks, e local experts. Both count lists have index peer * e + local expert. They must agree: what rank b has in
    ``recv_counts`` at a * e + l is what rank a has in ``send_counts`` at b * e + l. Static lists (Python integers or a
    NumPy array) are checked for this; a flat list is the same on all ranks, a table [R, R * e] has a row for each.
    Traced arrays hold this rank's counts and are taken on trust: where they disagree, nothing is defined.

    ``all_to_allv_grouped_matmul`` with the two lists swapped puts rows back into the order of ``gmm_x``, and is the
    adjoint. Differentiable in ``gmm_x``, ``gmm_weight``, ``mm_x`` and ``mm_weight``.

    Args:
      gmm_x: [A, H1] fp32, bf16 or fp16.
      gmm_weight: [e, H1, N1], or [e, N1, H1] if ``transpose_gmm_weight``; the dtype of ``gmm_x``.
      send_counts: [R * e] rows of my expert l for rank p; their sum is at most A.
      recv_counts: [R * e] rows that come from expert l of rank p.
      axis_name: one mesh axis, or several that are flattened in that order.
      mm_x, mm_weight: [BS, H2] and [H2, N2], or [N2, H2] if ``transpose_mm_weight``; both or neither.
      recv_capacity: rows of ``y``. None: static counts take the most that any rank receives, traced ones R * A, which
        always suffices. If traced counts exceed a smaller one, the rows that come last in (source rank, expert) order,
        ``max(0, sum(recv_counts) - recv_capacity)`` of them, are not sent, and their gradient is zero.
      chunks: a divisor of R. The exchange is cut into this many, each with R / chunks peers, and no product waits for
        the transfer of another chunk, so that they can overlap. The same bits for every value; each chunk has buffers
        of its own.
      backend: of the grouped product, see ``grouped_matmul``.

    Returns:
      y [recv_capacity, N1], varying over ``axis_name``, and mm_y [BS, N2], or None without ``mm_x``.

    Raises:
      MissingArgumentError, ShapeError, DtypeError, InvalidArgumentError: an argument breaks a rule above.
      MeshError: ``axis_name`` is not bound here; call this inside ``shard_map``.

    >>> def shard(rows, weight):  # rank 0 keeps a row and sends two; rank 1 sends one
    ...     return grouped_matmul_all_to_allv(rows, weight, [[1, 2], [1, 0]], [[1, 1], [2, 0]], "ep")[0]
    >>> rows, weight = jnp.array([[1.0], [2], [3], [4], [0], [0]]), jnp.array([[[10.0]], [[100.0]]])
    >>> shard_map(shard, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))(rows, weight).ravel()
    Array([ 10., 400.,  20.,  30.], dtype=float32)

    Source: aclnnGroupedMatMulAlltoAllv.
    """
    axes, num_ranks, counts = _check(
        gmm_x, gmm_weight, send_counts, recv_counts, axis_name, transpose_gmm_weight, recv_capacity, chunks, backend
    )
    mm_y = _dense(mm_x, mm_weight, transpose_mm_weight, gmm_x.dtype)
    extents = Extents(
        axes=axes,
        num_ranks=num_ranks,
        backend=backend,
        transpose=bool(transpose_gmm_weight),
        chunks=int(chunks),
        token_rows=counts.recv_capacity,
        expert_rows=gmm_x.shape[0],
        wire_rows=most_rows_per_chunk(counts.tables[0], chunks) if counts.tables else gmm_x.shape[0],
    )
    rows, weight, counts = _as_varying(gmm_x, gmm_weight, counts, axes)
    route = make_route(extents, counts.send, counts.recv, token_limit=counts.may_overflow, expert_limit=False)
    with jax.named_scope("grouped_matmul_all_to_allv"):
        return compute_then_send(extents, rows, weight, route), mm_y


def all_to_allv_grouped_matmul(
    gmm_x: Array,
    gmm_weight: Array,
    send_counts: CountList,
    recv_counts: CountList,
    axis_name: str | tuple[str, ...],
    *,
    mm_x: Array | None = None,
    mm_weight: Array | None = None,
    transpose_gmm_weight: bool = False,
    transpose_mm_weight: bool = False,
    recv_capacity: int | None = None,
    chunks: int = 1,
    backend: str = "auto",
) -> tuple[Array, Array | None, Array]:
    """Sends each row to the rank of its expert, then multiplies it there: the way into the experts.

    ``permuted = permute(all_to_allv(gmm_x))``, ``gmm_y[expert l] = permuted[expert l] @ gmm_weight[l]`` and,
    independent of them, ``mm_y = mm_x @ mm_weight``. Accumulated in fp32, rounded once to the dtype of ``gmm_x``.

    Rows of ``gmm_x`` stand by (destination rank, that rank's expert), those of ``gmm_y`` and ``permuted`` by (local
    expert, source rank); order inside a block is kept. Rows past the sums of the counts, what happens where counts
    disagree, and gradients: as for ``grouped_matmul_all_to_allv``, which is the way back.

    Args:
      gmm_x: [BSK, H1] fp32, bf16 or fp16.
      gmm_weight: [e, H1, N1], or [e, N1, H1] if ``transpose_gmm_weight``; the dtype of ``gmm_x``.
      send_counts: [R * e] rows for expert l of rank p; their sum is at most BSK.
      recv_counts: [R * e] rows that come from rank p for my expert l.
      axis_name, mm_x, mm_weight, transpose_mm_weight, chunks, backend: as for ``grouped_matmul_all_to_allv``.
      recv_capacity: likewise, rows of ``gmm_y`` and ``permuted``; without it, traced counts take R * BSK.

    Returns:
      gmm_y [recv_capacity, N1], mm_y [BS, N2] or None, and permuted [recv_capacity, H1].

    Raises:
      MissingArgumentError, ShapeError, DtypeError, InvalidArgumentError, MeshError: likewise.

    >>> def shard(rows, weight):  # the way back of the example there
    ...     return all_to_allv_grouped_matmul(rows, weight, [[1, 1], [2, 0]], [[1, 2], [1, 0]], "ep")[0]
    >>> rows, weight = jnp.array([[10.0], [400], [20], [30]]), jnp.array([[[0.1]], [[0.01]]])
    >>> shard_map(shard, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))(rows, weight).ravel()
    Array([1., 2., 3., 4., 0., 0.], dtype=float32)

    Source: aclnnAlltoAllvGroupedMatMul.
    """
    axes, num_ranks, counts = _check(
        gmm_x, gmm_weight, send_counts, recv_counts, axis_name, transpose_gmm_weight, recv_capacity, chunks, backend
    )
    mm_y = _dense(mm_x, mm_weight, transpose_mm_weight, gmm_x.dtype)
    extents = Extents(
        axes=axes,
        num_ranks=num_ranks,
        backend=backend,
        transpose=bool(transpose_gmm_weight),
        chunks=int(chunks),
        token_rows=gmm_x.shape[0],
        expert_rows=counts.recv_capacity,
        wire_rows=most_rows_per_chunk(counts.tables[1], chunks) if counts.tables else counts.recv_capacity,
    )
    rows, weight, counts = _as_varying(gmm_x, gmm_weight, counts, axes)
    route = make_route(extents, counts.recv, counts.send, token_limit=False, expert_limit=counts.may_overflow)
    with jax.named_scope("all_to_allv_grouped_matmul"):
        gmm_y, permuted = send_then_compute(extents, rows, weight, route)
    return gmm_y, mm_y, permuted


def _check(x, weight, send_counts, recv_counts, axis_name, transpose, recv_capacity, chunks, backend):
    """Raises on what is wrong with the grouped part; returns (axes, number of ranks, counts)."""
    axes = _compat.bound_axes(axis_name)
    num_ranks = math.prod(_compat.bound_axis_size(axis) for axis in axes)
    check_flag("transpose_gmm_weight", transpose)
    check_choice("backend", backend, ["auto", *backend_names()])
    check_count("chunks", chunks)
    if num_ranks % chunks:
        divisors = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
        raise InvalidArgumentError(
            f"chunks={chunks} does not divide the {num_ranks} ranks of {'*'.join(axes)}; choose one of {divisors}"
        )
    layout = "[e, N1, H1]" if transpose else "[e, H1, N1]"
    check_rank("gmm_x", x, 2, "[rows, H1]")
    check_rank("gmm_weight", weight, 3, layout)
    check_dtype("gmm_x", x, FLOAT_DTYPES)
    check_dtype("gmm_weight", weight, (x.dtype,), "the dtype of gmm_x: cast one of them")
    if not weight.shape[0]:
        raise ShapeError(f"gmm_weight has shape {weight.shape}; expected {layout} with at least one local expert")
    contracted = weight.shape[2 if transpose else 1]
    if x.shape[1] != contracted:
        raise ShapeError(
            f"gmm_x has shape {x.shape} and gmm_weight {weight.shape}; H1 is {x.shape[1]} in one and {contracted} in "
            f"the other, read as {layout}: set transpose_gmm_weight to match how the weights are stored"
        )
    counts = read_counts(
        send_counts,
        recv_counts,
        axes=axes,
        num_ranks=num_ranks,
        num_local=weight.shape[0],
        num_rows=x.shape[0],
        recv_capacity=recv_capacity,
    )
    return axes, num_ranks, counts


def _as_varying(rows: Array, weight: Array, counts: Counts, axes: tuple[str, ...]):
    """Replicated operands become varying outside the custom rules, so that JAX itself sums their cotangents."""
    operands = (jnp.asarray(rows), jnp.asarray(weight), counts.send, counts.recv)
    varying = {*axes, *_compat.union_of_varying_axes(operands)}
    rows, weight, send, recv = _compat.as_varying(operands, sorted(varying))
    return rows, weight, counts._replace(send=send, recv=recv)


def _dense(x: Array | None, weight: Array | None, transpose: bool, dtype) -> Array | None:
    """The product beside the exchange; None where there is nothing to multiply."""
    check_flag("transpose_mm_weight", transpose)
    if (x is None) != (weight is None):
        missing, given = ("mm_x", "mm_weight") if x is None else ("mm_weight", "mm_x")
        raise MissingArgumentError(f"{missing} is None, but {given} was given; pass both or neither")
    if x is None:
        if transpose:
            raise InvalidArgumentError("transpose_mm_weight=True needs mm_x and mm_weight; pass them or set it False")
        return None
    check_rank("mm_x", x, 2, "[BS, H2]")
    check_rank("mm_weight", weight, 2, "[N2, H2]" if transpose else "[H2, N2]")
    check_dtype("mm_x", x, (dtype,), "the dtype of gmm_x: cast one of them")
    check_dtype("mm_weight", weight, (dtype,), "the dtype of gmm_x: cast one of them")
    axis = 1 if transpose else 0
    check_shape("mm_x", x, (x.shape[0], weight.shape[axis]), f"[BS, H2], H2 as in mm_weight {tuple(weight.shape)}")
    with jax.named_scope("dense"):
        product = lax.dot_general(x, weight, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    return product.astype(dtype)
