"""The grouped product fused with an all-to-all of unequal blocks, row by row, with every rank visible.

There are R ranks with e experts each. Count lists are [R][R * e]: entry r is the list of rank r, with an entry for each
(peer, local expert). Arrays are given per rank, and so are results, which hold the rows that arrive and no padding.

Operands may be scaled numbers; ``dequantize`` says which. Products are in f64 and stay there.
"""

from collections.abc import Sequence

import numpy as np

from moe_jax import errors
from moe_jax.reference.quant import number

PerRank = Sequence[np.ndarray]
Origins = list[list[tuple[int, int, int]]]  # per receiving rank and row: (source rank, row there, local expert)
_FORMATS = {"int8": "int8", "float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


def grouped_matmul_all_to_allv(
    gmm_x: PerRank,
    gmm_weight: PerRank,
    send_counts: np.ndarray,
    recv_counts: np.ndarray,
    *,
    mm_x: PerRank | None = None,
    mm_weight: PerRank | None = None,
    gmm_x_scale: PerRank | None = None,
    gmm_weight_scale: PerRank | None = None,
    mm_x_scale: PerRank | None = None,
    mm_weight_scale: PerRank | None = None,
    transpose_gmm_weight: bool = False,
    transpose_mm_weight: bool = False,
    recv_capacity: int | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Multiplies every row by the weights of its expert, then sends it to its rank.

    Args:
      gmm_x: [R] of [A, H1], rows by (local expert, destination rank); rows past the counts are not read.
      gmm_weight: [R] of [e, H1, N1], or [e, N1, H1] with ``transpose_gmm_weight``.
      send_counts: rows of my expert l for rank p.
      recv_counts: rows that come from expert l of rank p.
      mm_x, mm_weight: [R] of [BS, H2] and [H2, N2], or [N2, H2] with ``transpose_mm_weight``; both or neither.
      gmm_x_scale, gmm_weight_scale, mm_x_scale, mm_weight_scale: [R] of what ``dequantize`` takes; None = no scales.
      recv_capacity: only this many rows come to a rank, the first ones by (source rank, expert); None = all.

    Returns:
      y: [R] of [n, N1] f64, rows by (source rank, its expert); mm_y: [R] of [BS, N2] f64 or None.

    Raises:
      InvalidArgumentError: the lists disagree.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> x, weight = np.array([[[1.0], [2.0]], [[3.0], [4.0]]]), np.array([[[[10.0]]], [[[100.0]]]])
    >>> y, _ = reference.grouped_matmul_all_to_allv(x, weight, [[1, 1], [2, 0]], [[1, 2], [1, 0]])
    >>> [rows.ravel().tolist() for rows in y]
    [[10.0, 300.0, 400.0], [20.0]]
    """
    gmm_x = _numbers(gmm_x, gmm_x_scale, True)
    gmm_weight = _numbers(gmm_weight, gmm_weight_scale, transpose_gmm_weight)
    origins = _outward(send_counts, recv_counts, len(gmm_weight[0]), recv_capacity)
    y = []
    for arrived in origins:
        products = [
            np.asarray(gmm_x[a][i], np.float64) @ _matrix(gmm_weight[a][e], transpose_gmm_weight) for a, i, e in arrived
        ]
        y.append(np.array(products).reshape(len(arrived), gmm_weight[0].shape[1 if transpose_gmm_weight else 2]))
    return y, _dense(mm_x, mm_weight, mm_x_scale, mm_weight_scale, transpose_mm_weight)


def grouped_matmul_all_to_allv_vjp(
    ct: PerRank,
    gmm_x: PerRank,
    gmm_weight: PerRank,
    send_counts: np.ndarray,
    recv_counts: np.ndarray,
    *,
    transpose_gmm_weight: bool = False,
    recv_capacity: int | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The cotangents of ``gmm_x`` (zero for rows that do not travel) and ``gmm_weight``, in f64 and their own shapes.

    Args:
      ct: [R] of [n, N1] or longer; rows past the true number are not read.
    """
    ct_x, ct_weight = _zeros_like(gmm_x), _zeros_like(gmm_weight)
    for b, arrived in enumerate(_outward(send_counts, recv_counts, len(gmm_weight[0]), recv_capacity)):
        for row, (a, i, e) in enumerate(arrived):
            ct_row, x_row = np.asarray(ct[b][row], np.float64), np.asarray(gmm_x[a][i], np.float64)
            ct_x[a][i] = ct_row @ _matrix(gmm_weight[a][e], transpose_gmm_weight).T
            ct_weight[a][e] += np.outer(ct_row, x_row) if transpose_gmm_weight else np.outer(x_row, ct_row)
    return ct_x, ct_weight


def all_to_allv_grouped_matmul(
    gmm_x: PerRank,
    gmm_weight: PerRank,
    send_counts: np.ndarray,
    recv_counts: np.ndarray,
    *,
    mm_x: PerRank | None = None,
    mm_weight: PerRank | None = None,
    gmm_x_scale: PerRank | None = None,
    gmm_weight_scale: PerRank | None = None,
    mm_x_scale: PerRank | None = None,
    mm_weight_scale: PerRank | None = None,
    transpose_gmm_weight: bool = False,
    transpose_mm_weight: bool = False,
    recv_capacity: int | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray] | None, list[np.ndarray]]:
    """Sends every row to the rank of its expert, then multiplies it by the weights there.

    Args:
      gmm_x: [R] of [BSK, H1], rows by (destination rank, its expert); rows past the counts are not read.
      send_counts: rows for expert l of rank p.
      recv_counts: rows from rank p for my expert l.
      gmm_weight, mm_x, mm_weight, scales, recv_capacity: as for ``grouped_matmul_all_to_allv``.

    Returns:
      gmm_y: [R] of [n, N1] f64, rows by (local expert, source rank); mm_y: as there, or None; permuted: [R] of [n, H1],
      the rows that were multiplied, or with scales their codes as they were given.

    Raises:
      InvalidArgumentError: the lists disagree.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> x, weight = np.array([[[1.0], [2.0]], [[3.0], [4.0]]]), np.array([[[[10.0]]], [[[100.0]]]])
    >>> y, _, permuted = reference.all_to_allv_grouped_matmul(x, weight, [[1, 1], [2, 0]], [[1, 2], [1, 0]])
    >>> [rows.ravel().tolist() for rows in y], permuted[0].ravel().tolist()
    ([[10.0, 30.0, 40.0], [200.0]], [1.0, 3.0, 4.0])
    """
    codes, gmm_x = gmm_x, _numbers(gmm_x, gmm_x_scale, True)
    gmm_weight = _numbers(gmm_weight, gmm_weight_scale, transpose_gmm_weight)
    y, permuted = [], []
    for b, arrived in enumerate(_inward(send_counts, recv_counts, len(gmm_weight[0]), recv_capacity)):
        products = [
            np.asarray(gmm_x[a][i], np.float64) @ _matrix(gmm_weight[b][e], transpose_gmm_weight) for a, i, e in arrived
        ]
        kept = np.asarray(codes[0]).dtype if gmm_x_scale is not None else np.float64
        rows = np.array([np.asarray(codes[a][i], kept) for a, i, _ in arrived], kept)
        permuted.append(rows.reshape(len(arrived), codes[0].shape[1]))
        y.append(np.array(products).reshape(len(arrived), gmm_weight[0].shape[1 if transpose_gmm_weight else 2]))
    return y, _dense(mm_x, mm_weight, mm_x_scale, mm_weight_scale, transpose_mm_weight), permuted


def all_to_allv_grouped_matmul_vjp(
    ct: PerRank,
    ct_permuted: PerRank,
    gmm_x: PerRank,
    gmm_weight: PerRank,
    send_counts: np.ndarray,
    recv_counts: np.ndarray,
    *,
    transpose_gmm_weight: bool = False,
    recv_capacity: int | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The cotangents of ``gmm_x`` (zero for rows that do not travel) and ``gmm_weight``, in f64 and their own shapes.

    Args:
      ct, ct_permuted: of gmm_y and permuted; rows past the true number are not read.
    """
    ct_x, ct_weight = _zeros_like(gmm_x), _zeros_like(gmm_weight)
    for b, arrived in enumerate(_inward(send_counts, recv_counts, len(gmm_weight[0]), recv_capacity)):
        for row, (a, i, e) in enumerate(arrived):
            ct_row, x_row = np.asarray(ct[b][row], np.float64), np.asarray(gmm_x[a][i], np.float64)
            ct_x[a][i] = ct_row @ _matrix(gmm_weight[b][e], transpose_gmm_weight).T + ct_permuted[b][row]
            ct_weight[b][e] += np.outer(ct_row, x_row) if transpose_gmm_weight else np.outer(x_row, ct_row)
    return ct_x, ct_weight


def _outward(send_counts, recv_counts, num_local: int, capacity: int | None) -> Origins:
    """The origins of the rows that reach each rank from the experts, in the order (source rank, its expert)."""
    send = _tables(send_counts, recv_counts, num_local)
    num_ranks = len(send)
    origins = []
    for b in range(num_ranks):
        arrived = []
        for a in range(num_ranks):
            for e in range(num_local):
                start = send[a, :, :e].sum() + send[a, :b, e].sum()  # rows at a stand by (expert, destination)
                arrived += [(a, int(start) + i, e) for i in range(send[a, b, e])]
        origins.append(arrived[:capacity])
    return origins


def _inward(send_counts, recv_counts, num_local: int, capacity: int | None) -> Origins:
    """The origins of the rows that reach each rank's experts, in the order (local expert, source rank)."""
    send = _tables(send_counts, recv_counts, num_local)
    num_ranks = len(send)
    origins = []
    for b in range(num_ranks):
        arrived = []
        for a in range(num_ranks):
            for e in range(num_local):
                start = send[a, :b].sum() + send[a, b, :e].sum()  # rows at a stand by (destination, its expert)
                arrived += [(a, int(start) + i, e) for i in range(send[a, b, e])]
        origins.append(sorted(arrived[:capacity], key=lambda row: row[2]))  # stable: sources stay ascending
    return origins


def _tables(send_counts, recv_counts, num_local: int) -> np.ndarray:
    """[R, R, e] how many rows go from each rank to each, for each expert."""
    num_ranks = len(send_counts)
    send, recv = (np.asarray(c, np.int64).reshape(num_ranks, num_ranks, num_local) for c in (send_counts, recv_counts))
    for a, b, e in np.ndindex(send.shape):
        if send[a, b, e] != recv[b, a, e]:
            raise errors.InvalidArgumentError(
                f"send_counts[{a}][{b * num_local + e}]={send[a, b, e]} differs from "
                f"recv_counts[{b}][{a * num_local + e}]={recv[b, a, e]}; they count the same rows"
            )
    return send


def dequantize(data: np.ndarray, scale: np.ndarray, contracted: int) -> np.ndarray:
    """What scaled numbers stand for, one by one, in f64.

    Args:
      data: int8, fp8, float4_e2m1fn, or uint8 with two e2m1 codes side by side along the last axis, the first of them
        in the low bits.
      scale: [1] f32 for all numbers; or bytes, uint8 or float8_e8m0fnu, one for 32 numbers along the axis
        ``contracted``: byte b is 2^(b - 127), 255 is NaN. These have the shape of the numbers with ceil(H / 64) for H,
        and a last axis of two.
    """
    values = _decode(np.asarray(data))
    if scale.shape == (1,):
        return values * np.float64(scale[0])
    scale_bytes, result = np.asarray(scale).view(np.uint8), np.zeros(values.shape)
    for index in np.ndindex(*values.shape):
        at = list(index)
        at[contracted], member = divmod(index[contracted] // 32, 2)
        byte = int(scale_bytes[(*at, member)])
        result[index] = np.nan if byte == 255 else values[index] * 2.0 ** (byte - 127)
    return result


def _decode(data: np.ndarray) -> np.ndarray:
    name = str(data.dtype)
    if name == "float4_e2m1fn":
        return data.astype(np.float64)
    if name == "uint8":
        codes = np.stack([data & 0xF, data >> 4], axis=-1).reshape(*data.shape[:-1], 2 * data.shape[-1])
        return np.array([number("e2m1", int(code)) for code in codes.ravel()]).reshape(codes.shape)
    codes = data if name == "int8" else data.view(np.uint8)
    return np.array([number(_FORMATS[name], int(code)) for code in codes.ravel()]).reshape(data.shape)


def _numbers(arrays: PerRank, scales: PerRank | None, contracted_last: bool) -> PerRank:
    if scales is None:
        return arrays
    return [
        dequantize(np.asarray(data), np.asarray(scale), np.ndim(data) - (1 if contracted_last else 2))
        for data, scale in zip(arrays, scales, strict=True)
    ]


def _dense(x, weight, x_scale, weight_scale, transpose: bool) -> list[np.ndarray] | None:
    if x is None or weight is None:
        return None
    x, weight = _numbers(x, x_scale, True), _numbers(weight, weight_scale, transpose)
    return [np.asarray(a, np.float64) @ _matrix(w, transpose) for a, w in zip(x, weight, strict=True)]


def _matrix(weight: np.ndarray, transpose: bool) -> np.ndarray:
    weight = np.asarray(weight, np.float64)
    return weight.T if transpose else weight


def _zeros_like(arrays: PerRank) -> list[np.ndarray]:
    return [np.zeros(a.shape) for a in arrays]
