"""The public fused pair: checks, the route, and the call of the exchange."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from moe_jax import _compat
from moe_jax.errors import (
    InvalidArgumentError,
    ShapeError,
    check_count,
    check_dtype,
    check_flag,
    check_rank,
)
from moe_jax.fused.counts import Counts, most_rows_per_chunk, read_counts
from moe_jax.fused.dense import dense
from moe_jax.fused.exchange import (
    Extents,
    compute_then_send,
    compute_then_send_by,
    make_route,
    send_then_compute,
    send_then_compute_by,
)
from moe_jax.fused.scaled import Scaled, scaled_operands
from moe_jax.fused.scheme import Operands, read_operands, read_out_dtype
from moe_jax.kernels import FLOAT_DTYPES, check_backend

Array = jax.Array
CountList = Sequence[int] | Sequence[Sequence[int]] | np.ndarray | Array


@_compat.vary_as_operands()
def grouped_matmul_all_to_allv(
    gmm_x: Array,
    gmm_weight: Array,
    send_counts: CountList,
    recv_counts: CountList,
    axis_name: str | tuple[str, ...],
    *,
    mm_x: Array | None = None,
    mm_weight: Array | None = None,
    gmm_x_scale: Array | None = None,
    gmm_weight_scale: Array | None = None,
    mm_x_scale: Array | None = None,
    mm_weight_scale: Array | None = None,
    out_dtype: DTypeLike | None = None,
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

    There are R ranks with e local experts each. Both count lists have index peer * e + local expert. They must agree:
    what rank b has in ``recv_counts`` at a * e + l is what rank a has in ``send_counts`` at b * e + l. Static lists
    (Python integers or a NumPy array) are checked for this; a flat list is the same on all ranks, a table [R, R * e]
    has a row for each. Traced arrays hold this rank's counts and are not checked: where they disagree, the result is
    undefined.

    ``all_to_allv_grouped_matmul`` with the two lists swapped puts rows back into the order of ``gmm_x``, and is the
    adjoint. Differentiable in ``gmm_x``, ``gmm_weight``, ``mm_x`` and ``mm_weight``, in both modes and to any order.

    *Scaled numbers.* With scales the operands are codes, and products are fp32 rounded once to ``out_dtype``:

    - per tensor: int8 with int8, or fp8 with fp8 (e4m3fn and e5m2 in any mix), and scales f32 [1]. Rows have the scale
      of the rank that they come from. ``(x @ w) * x_scale * weight_scale``; sums of int8 are exact.
    - microscaled: fp8 with fp8, or e2m1 with e2m1, and E8M0 bytes (uint8 or float8_e8m0fnu), one for 32 numbers along
      H1, by pairs: rows [A, ceil(H1 / 64), 2], weights [e, ceil(H1 / 64), N1, 2], transposed [e, N1, ceil(H1 / 64), 2].
      Byte b is 2^(b - 127), 255 is NaN. Numbers are multiplied by their scales first, where fp32 subnormals count as
      zero. e2m1 is float4_e2m1fn, or uint8 with two numbers side by side along the last axis, the first of them in the
      low bits.

    ``q = moe_jax.quant.recipe("mx_e4m3", "bfloat16").quantize(rows)`` has such numbers in ``q.values`` and scales in
    ``q.scale.reshape(len(rows), -1, 2)``; for weights let ``rows`` be [e * N1, H1], transposed matrices. The dense part
    takes scales of the same kind. Scaled operands have no derivative, and asking for one is refused. (Integer codes
    that were rounded from floats raise nothing: in JAX a conversion to integers has derivative zero.)

    Args:
      gmm_x: [A, H1] fp32, bf16 or fp16; with scales as above, where H1 counts numbers and not bytes.
      gmm_weight: [e, H1, N1], or [e, N1, H1] if ``transpose_gmm_weight``; the dtype of ``gmm_x``.
      send_counts: [R * e] rows of my expert l for rank p; their sum is at most A.
      recv_counts: [R * e] rows that come from expert l of rank p.
      axis_name: one mesh axis, or several that are flattened in that order.
      mm_x, mm_weight: [BS, H2] and [H2, N2], or [N2, H2] if ``transpose_mm_weight``; both or neither.
      gmm_x_scale, gmm_weight_scale: see above; None = the operands are floats.
      mm_x_scale, mm_weight_scale: likewise, without e: [ceil(H2 / 64), N2, 2] or [N2, ceil(H2 / 64), 2] for weights.
      out_dtype: float32, bfloat16 or float16, of both products; with scales only, and then required.
      recv_capacity: rows of ``y``. None: the most that any rank receives where counts are static, and R * A, which
        always suffices, where they are traced. If traced counts exceed a smaller capacity, the rows that come last in
        (source rank, expert) order, ``max(0, sum(recv_counts) - recv_capacity)`` of them, are not sent, and their
        gradient is zero.
      chunks: a divisor of R. The exchange is cut into this many, each with R / chunks peers, and no product waits for
        the transfer of another chunk, so that they can overlap. The same bits for every value; each chunk has buffers
        of its own.
      backend: of the grouped product, see ``grouped_matmul``.

    Returns:
      y [recv_capacity, N1], varying over ``axis_name``, and mm_y [BS, N2], or None without ``mm_x``.

    Raises:
      MissingArgumentError, ShapeError, DtypeError, InvalidArgumentError: an argument breaks a rule above.
      MeshError: ``axis_name`` is not bound here; call this inside ``shard_map``.
      UnsupportedError: a derivative in scaled operands is asked for.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> from jax.sharding import PartitionSpec as P
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> def shard(rows, weight):  # rank 0 keeps a row and sends two; rank 1 sends one
    ...     return moe.grouped_matmul_all_to_allv(rows, weight, [[1, 2], [1, 0]], [[1, 1], [2, 0]], "ep")[0]
    >>> run = jax.jit(jax.shard_map(shard, mesh=moe.make_mesh(ep=2), in_specs=P("ep"), out_specs=P("ep")))
    >>> rows, weight = jnp.array([[1.0], [2], [3], [4], [0], [0]]), jnp.array([[[10.0]], [[100.0]]])
    >>> run(rows, weight).ravel()
    Array([ 10., 400.,  20.,  30.], dtype=float32)

    Source: aclnnGroupedMatMulAlltoAllv and aclnnQuantGroupedMatMulAlltoAllv, whose hif8 has no dtype in JAX.
    """
    call = _check(
        gmm_x, gmm_weight, gmm_x_scale, gmm_weight_scale, out_dtype, send_counts, recv_counts, axis_name,
        transpose_gmm_weight, recv_capacity, chunks, backend,
    )  # fmt: skip
    mm_y = dense(
        mm_x, mm_weight, mm_x_scale, mm_weight_scale, transpose=transpose_mm_weight,
        grouped=call.scaled, grouped_dtype=gmm_x.dtype, out_dtype=call.out_dtype,
    )  # fmt: skip
    counts = call.counts
    extents = Extents(
        axes=call.axes,
        num_ranks=call.num_ranks,
        backend=backend,
        transpose=bool(transpose_gmm_weight),
        chunks=int(chunks),
        token_rows=counts.recv_capacity,
        expert_rows=gmm_x.shape[0],
        wire_rows=most_rows_per_chunk(counts.tables[0], chunks) if counts.tables else gmm_x.shape[0],
    )
    scaled = _scaled(call, transpose=extents.transpose)
    rows, weight = (gmm_x, gmm_weight) if scaled is None else (scaled.rows, scaled.weight)
    rows, weight, counts = _as_varying(rows, weight, counts, call.axes)
    route = make_route(extents, counts.send, counts.recv, token_limit=counts.may_overflow, expert_limit=False)
    with jax.named_scope("grouped_matmul_all_to_allv"):
        if scaled is not None:
            return compute_then_send_by(scaled.multiply, extents, rows, weight, route), mm_y
        return compute_then_send(extents, rows, weight, route, None), mm_y


@_compat.vary_as_operands()
def all_to_allv_grouped_matmul(
    gmm_x: Array,
    gmm_weight: Array,
    send_counts: CountList,
    recv_counts: CountList,
    axis_name: str | tuple[str, ...],
    *,
    mm_x: Array | None = None,
    mm_weight: Array | None = None,
    gmm_x_scale: Array | None = None,
    gmm_weight_scale: Array | None = None,
    mm_x_scale: Array | None = None,
    mm_weight_scale: Array | None = None,
    out_dtype: DTypeLike | None = None,
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
    disagree, gradients, and scaled numbers: as for ``grouped_matmul_all_to_allv``, which is the way back. Scales of
    rows travel with these, in the same message; ``permuted`` then holds codes, like ``gmm_x``, without scales.

    Args:
      gmm_x: [BSK, H1] fp32, bf16 or fp16.
      gmm_weight: [e, H1, N1], or [e, N1, H1] if ``transpose_gmm_weight``; the dtype of ``gmm_x``.
      send_counts: [R * e] rows for expert l of rank p; their sum is at most BSK.
      recv_counts: [R * e] rows that come from rank p for my expert l.
      axis_name, mm_x, mm_weight, transpose_mm_weight, scales, out_dtype, chunks, backend: as for
        ``grouped_matmul_all_to_allv``.
      recv_capacity: likewise, rows of ``gmm_y`` and ``permuted``; without it, traced counts take R * BSK.

    Returns:
      gmm_y [recv_capacity, N1], mm_y [BS, N2] or None, and permuted [recv_capacity, H1].

    Raises:
      MissingArgumentError, ShapeError, DtypeError, InvalidArgumentError, MeshError, UnsupportedError: likewise.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> from jax.sharding import PartitionSpec as P
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> def shard(rows, weight):  # the way back of the example there
    ...     return moe.all_to_allv_grouped_matmul(rows, weight, [[1, 1], [2, 0]], [[1, 2], [1, 0]], "ep")[0]
    >>> run = jax.jit(jax.shard_map(shard, mesh=moe.make_mesh(ep=2), in_specs=P("ep"), out_specs=P("ep")))
    >>> rows, weight = jnp.array([[10.0], [400], [20], [30]]), jnp.array([[[0.1]], [[0.01]]])
    >>> run(rows, weight).ravel()
    Array([1., 2., 3., 4., 0., 0.], dtype=float32)

    Source: aclnnAlltoAllvGroupedMatMul and aclnnAlltoAllvQuantGroupedMatMul.
    """
    call = _check(
        gmm_x, gmm_weight, gmm_x_scale, gmm_weight_scale, out_dtype, send_counts, recv_counts, axis_name,
        transpose_gmm_weight, recv_capacity, chunks, backend,
    )  # fmt: skip
    mm_y = dense(
        mm_x, mm_weight, mm_x_scale, mm_weight_scale, transpose=transpose_mm_weight,
        grouped=call.scaled, grouped_dtype=gmm_x.dtype, out_dtype=call.out_dtype,
    )  # fmt: skip
    counts = call.counts
    extents = Extents(
        axes=call.axes,
        num_ranks=call.num_ranks,
        backend=backend,
        transpose=bool(transpose_gmm_weight),
        chunks=int(chunks),
        token_rows=gmm_x.shape[0],
        expert_rows=counts.recv_capacity,
        wire_rows=most_rows_per_chunk(counts.tables[1], chunks) if counts.tables else counts.recv_capacity,
    )
    scaled = _scaled(call, transpose=extents.transpose)
    rows, weight = (gmm_x, gmm_weight) if scaled is None else (scaled.rows, scaled.weight)
    rows, weight, counts = _as_varying(rows, weight, counts, call.axes)
    route = make_route(extents, counts.recv, counts.send, token_limit=False, expert_limit=counts.may_overflow)
    with jax.named_scope("all_to_allv_grouped_matmul"):
        if scaled is not None:
            gmm_y, permuted = send_then_compute_by(scaled.multiply, extents, rows, weight, route)
            return gmm_y, mm_y, scaled.unpack(permuted)
        gmm_y, permuted = send_then_compute(extents, rows, weight, route)
    return gmm_y, mm_y, permuted


class _Call(NamedTuple):
    """The arguments of the grouped part, checked and read.

    Attributes:
      axes: the mesh axes of the exchange.
      num_ranks: R, how many ranks exchange.
      counts: what this rank sends and receives.
      scaled: the operands, where they have scales; None where they are floats.
      out_dtype: the dtype of the results.
    """

    axes: tuple[str, ...]
    num_ranks: int
    counts: Counts
    scaled: Operands | None
    out_dtype: jnp.dtype


def _check(
    x, weight, x_scale, weight_scale, out_dtype, send_counts, recv_counts, axis_name, transpose, recv_capacity, chunks,
    backend,
) -> _Call:  # fmt: skip
    """Checks the grouped part, and reads its arguments."""
    axes = _compat.bound_axes(axis_name)
    num_ranks = _compat.group_size(axes)
    check_flag("transpose_gmm_weight", transpose)
    check_backend(backend)
    check_count("chunks", chunks)
    if num_ranks % chunks:
        divisors = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
        raise InvalidArgumentError(
            f"chunks={chunks} does not divide the {num_ranks} ranks of {'*'.join(axes)}; choose one of {divisors}"
        )
    layout = "[e, N1, H1]" if transpose else "[e, H1, N1]"
    check_rank("gmm_x", x, 2, "[rows, H1]")
    check_rank("gmm_weight", weight, 3, layout)
    if not weight.shape[0]:
        raise ShapeError(f"gmm_weight has shape {weight.shape}; expected {layout} with at least one local expert")
    scaled = read_operands("gmm", x, weight, x_scale, weight_scale, transpose)
    if scaled is None:
        _check_floats(x, weight, transpose, layout)
    call_dtype = read_out_dtype(scaled, out_dtype, x.dtype)
    counts = read_counts(
        send_counts,
        recv_counts,
        axes=axes,
        num_ranks=num_ranks,
        num_local=weight.shape[0],
        num_rows=x.shape[0],
        recv_capacity=recv_capacity,
    )
    return _Call(axes, num_ranks, counts, scaled, call_dtype)


def _check_floats(x, weight, transpose, layout):
    check_dtype("gmm_x", x, FLOAT_DTYPES, "other numbers need gmm_x_scale and gmm_weight_scale")
    check_dtype("gmm_weight", weight, (x.dtype,), "the dtype of gmm_x: cast one of them")
    contracted = weight.shape[2 if transpose else 1]
    if x.shape[1] != contracted:
        raise ShapeError(
            f"gmm_x has shape {x.shape} and gmm_weight {weight.shape}; H1 is {x.shape[1]} in one and {contracted} in "
            f"the other, read as {layout}: set transpose_gmm_weight to match how the weights are stored"
        )


def _scaled(call: _Call, *, transpose: bool) -> Scaled | None:
    """The grouped part as it travels and is multiplied if its operands have scales; None if they are floats."""
    if call.scaled is None:
        return None
    return scaled_operands(call.scaled, transpose=transpose, out_dtype=call.out_dtype)


def _as_varying(rows, weight, counts: Counts, axes: tuple[str, ...]):
    operands = (*jax.tree.map(jnp.asarray, (rows, weight)), counts.send, counts.recv)
    varying = {*axes, *_compat.union_of_varying_axes(operands)}
    rows, weight, send, recv = _compat.as_varying(operands, sorted(varying))
    return rows, weight, counts._replace(send=send, recv=recv)
