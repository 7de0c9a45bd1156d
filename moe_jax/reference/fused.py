"""The grouped product fused with an all-to-all of unequal blocks, row by row, with every rank visible.

R ranks, e experts each. Count lists are [R][R * e], rank r's list first, index peer * e + local expert. Arrays are
given per rank, and so are results; these hold the rows that arrive and no padding.
"""

from collections.abc import Sequence

import numpy as np

from moe_jax import errors

PerRank = Sequence[np.ndarray]
Origins = list[list[tuple[int, int, int]]]  # per receiving rank and row: (source rank, row there, local expert)


def grouped_matmul_all_to_allv(
    gmm_x: PerRank,
    gmm_weight: PerRank,
    send_counts: np.ndarray,
    recv_counts: np.ndarray,
    *,
    mm_x: PerRank | None = None,
    mm_weight: PerRank | None = None,
    transpose_gmm_weight: bool = False,
    transpose_mm_weight: bool = False,
    recv_capacity: int | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
    """Every row times the weights of its expert, then to its rank.

    Args:
      gmm_x: [R] of [A, H1], rows by (local expert, destination rank); rows past the counts are not read.
      gmm_weight: [R] of [e, H1, N1], or [e, N1, H1] with ``transpose_gmm_weight``.
      send_counts: rows of my expert l for rank p.
      recv_counts: rows that come from expert l of rank p.
      mm_x, mm_weight: [R] of [BS, H2] and [H2, N2], or [N2, H2] with ``transpose_mm_weight``; both or neither.
      recv_capacity: only this many rows come to a rank, the first ones by (source rank, expert); None = all.

    Returns:
      y: [R] of [n, N1] f64, rows by (source rank, its expert); mm_y: [R] of [BS, N2] f64 or None.

    Raises:
      InvalidArgumentError: the lists disagree.

    >>> x, weight = np.array([[[1.0], [2.0]], [[3.0], [4.0]]]), np.array([[[[10.0]]], [[[100.0]]]])
    >>> y, _ = grouped_matmul_all_to_allv(x, weight, [[1, 1], [2, 0]], [[1, 2], [1, 0]])
    >>> [rows.ravel().tolist() for rows in y]
    [[10.0, 300.0, 400.0], [20.0]]
    """
    origins = _outward(send_counts, recv_counts, len(gmm_weight[0]), recv_capacity)
    y = []
    for arrived in origins:
        products = [
            np.asarray(gmm_x[a][i], np.float64) @ _matrix(gmm_weight[a][e], transpose_gmm_weight) for a, i, e in arrived
        ]
        y.append(np.array(products).reshape(len(arrived), gmm_weight[0].shape[1 if transpose_gmm_weight else 2]))
    return y, _dense(mm_x, mm_weight, transpose_mm_weight)


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
    transpose_gmm_weight: bool = False,
    transpose_mm_weight: bool = False,
    recv_capacity: int | None = None,
) -> tuple[list[np.ndarray], list[np.ndarray] | None, list[np.ndarray]]:
    """Every row to the rank of its expert, then times the weights there.

    Args:
      gmm_x: [R] of [BSK, H1], rows by (destination rank, its expert); rows past the counts are not read.
      send_counts: rows for expert l of rank p.
      recv_counts: rows from rank p for my expert l.
      gmm_weight, mm_x, mm_weight, recv_capacity: as for ``grouped_matmul_all_to_allv``.

    Returns:
      gmm_y: [R] of [n, N1] f64, rows by (local expert, source rank); mm_y: likewise or None; permuted: [R] of [n, H1],
      the rows that were multiplied.

    Raises:
      InvalidArgumentError: the lists disagree.

    >>> x, weight = np.array([[[1.0], [2.0]], [[3.0], [4.0]]]), np.array([[[[10.0]]], [[[100.0]]]])
    >>> y, _, permuted = all_to_allv_grouped_matmul(x, weight, [[1, 1], [2, 0]], [[1, 2], [1, 0]])
    >>> [rows.ravel().tolist() for rows in y], permuted[0].ravel().tolist()
    ([[10.0, 30.0, 40.0], [200.0]], [1.0, 3.0, 4.0])
    """
    y, permuted = [], []
    for b, arrived in enumerate(_inward(send_counts, recv_counts, len(gmm_weight[0]), recv_capacity)):
        rows = [np.asarray(gmm_x[a][i], np.float64) for a, i, _ in arrived]
        products = [
            row @ _matrix(gmm_weight[b][e], transpose_gmm_weight) for row, (_, _, e) in zip(rows, arrived, strict=True)
        ]
        permuted.append(np.array(rows).reshape(len(rows), gmm_x[0].shape[1]))
        y.append(np.array(products).reshape(len(rows), gmm_weight[0].shape[1 if transpose_gmm_weight else 2]))
    return y, _dense(mm_x, mm_weight, transpose_mm_weight), permuted


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
    """Where the rows come from that reach each rank from the experts: by (source rank, its expert)."""
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
    """Where the rows come from that reach each rank's experts: by (local expert, source rank)."""
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
    """[R, R, e] rows from each rank to each, by expert."""
    num_ranks = len(send_counts)
    send, recv = (np.asarray(c, np.int64).reshape(num_ranks, num_ranks, num_local) for c in (send_counts, recv_counts))
    for a, b, e in np.ndindex(send.shape):
        if send[a, b, e] != recv[b, a, e]:
            raise errors.InvalidArgumentError(
                f"send_counts[{a}][{b * num_local + e}]={send[a, b, e]} differs from "
                f"recv_counts[{b}][{a * num_local + e}]={recv[b, a, e]}; they count the same rows"
            )
    return send


def _dense(x: PerRank | None, weight: PerRank | None, transpose: bool) -> list[np.ndarray] | None:
    if x is None or weight is None:
        return None
    return [np.asarray(a, np.float64) @ _matrix(w, transpose) for a, w in zip(x, weight, strict=True)]


def _matrix(weight: np.ndarray, transpose: bool) -> np.ndarray:
    weight = np.asarray(weight, np.float64)
    return weight.T if transpose else weight


def _zeros_like(arrays: PerRank) -> list[np.ndarray]:
    return [np.zeros(a.shape) for a in arrays]
