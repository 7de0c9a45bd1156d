"""The count lists of the fused pair: they are read, checked if they are static, and cut into one rank's blocks.

A list is flat, index peer * e + local expert. *Static* lists are Python or NumPy integers: [R * e], the same on every
rank, or a table [R, R * e] with one row per rank. *Traced* lists are i32 arrays [R * e] of this rank.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.errors import (
    DtypeError,
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    check_count,
    check_dtype,
    check_shape,
    count_violations,
)

Array = jax.Array


class Counts(NamedTuple):
    """What this rank sends and receives; R ranks, e local experts.

    Attributes:
      send: [R, e] i32, how many rows go to or belong to each expert of each peer.
      recv: [R, e] i32, how many rows come from, or for, each expert of each peer.
      recv_capacity: rows of the result.
      may_overflow: whether more rows than ``recv_capacity`` can come.
      tables: the counts of all ranks, a table [R, R, e] i64 for sends and one for receives; None where they are traced.
    """

    send: Array
    recv: Array
    recv_capacity: int
    may_overflow: bool
    tables: tuple[np.ndarray, np.ndarray] | None


def read_counts(
    send_counts: Any,
    recv_counts: Any,
    *,
    axes: tuple[str, ...],
    num_ranks: int,
    num_local: int,
    num_rows: int,
    recv_capacity: int | None,
) -> Counts:
    """Both lists as blocks of this rank, and the number of rows that the result has.

    Args:
      send_counts, recv_counts: as the caller gave them.
      axes: the mesh axes of the exchange.
      num_ranks, num_local: R and e.
      num_rows: rows of the input, on every rank.
      recv_capacity: as the caller gave it; None takes the least that certainly suffices.

    Raises:
      MissingArgumentError, DtypeError, ShapeError, InvalidArgumentError: see the fused operators.
    """
    if recv_capacity is not None:
        check_count("recv_capacity", recv_capacity, 0)
        recv_capacity = int(recv_capacity)
    # 1. Both lists are given, and both are static or both traced.
    named = {"send_counts": send_counts, "recv_counts": recv_counts}
    for name, counts in named.items():
        if counts is None:
            raise MissingArgumentError(f"{name} is None; pass one count per (peer, local expert)")
    static = [not isinstance(counts, jax.Array) for counts in named.values()]
    if static[0] != static[1]:
        known, other = ("send_counts", "recv_counts") if static[0] else ("recv_counts", "send_counts")
        raise InvalidArgumentError(
            f"{known} is known while tracing and {other} is a traced array; pass both as lists or both as i32 arrays"
        )
    # 2. Static lists say the counts of all ranks. They are checked; the result is as long as the fullest rank needs;
    #    and this rank takes its own rows of the tables.
    if static[0]:
        send, recv = (_read_table(name, counts, num_ranks, num_local) for name, counts in named.items())
        _check_tables(send, recv, num_rows, recv_capacity)
        needed = int(recv.sum(axis=(1, 2)).max())
        me = lax.axis_index(axes)
        return Counts(
            send=jnp.asarray(send, jnp.int32)[me],
            recv=jnp.asarray(recv, jnp.int32)[me],
            recv_capacity=needed if recv_capacity is None else recv_capacity,
            may_overflow=False,
            tables=(send, recv),
        )
    # 3. Traced lists say the counts of this rank alone, and only their form can be checked. Every rank could send all
    #    of its rows here, so without a capacity the result has room for that.
    for name, counts in named.items():
        check_shape(name, counts, (num_ranks * num_local,), f"[R * e] for R = {num_ranks}, e = {num_local}")
        check_dtype(name, counts, ("int32",), "cast it with .astype(jnp.int32)")
    worst = num_ranks * num_rows
    capacity = worst if recv_capacity is None else recv_capacity
    return Counts(
        send=send_counts.reshape(num_ranks, num_local),
        recv=recv_counts.reshape(num_ranks, num_local),
        recv_capacity=capacity,
        may_overflow=capacity < worst,
        tables=None,
    )


def most_rows_per_chunk(table: np.ndarray, chunks: int) -> int:
    """The most rows that any rank exchanges in any chunk.

    Args:
      table: [R, R, e], what each rank exchanges with each expert of each peer.
      chunks: how many groups the peers are cut into, by their distance along the ring.
    """
    # 1. [rank, shift]: the rows that a rank exchanges with the peer that is so many steps ahead of it along the ring.
    ranks = np.arange(len(table))
    by_shift = table.sum(axis=2)[ranks[:, None], (ranks[:, None] + ranks) % len(table)]
    # 2. A chunk is a stretch of consecutive shifts.
    return int(by_shift.reshape(len(table), chunks, -1).sum(axis=2).max())


def _read_table(name: str, counts: Any, num_ranks: int, num_local: int) -> np.ndarray:
    """A static list as [R, R, e] i64: entry (rank, peer, expert), the same for every rank if the list is flat."""
    if isinstance(counts, np.ndarray):
        if counts.dtype.kind not in "iu":
            raise DtypeError(f"{name} has dtype {counts.dtype}; counts are whole numbers: pass an integer array")
        counts = counts.tolist()
    if not isinstance(counts, (list, tuple)):
        raise DtypeError(f"{name} is a {type(counts).__name__}; pass a list of whole numbers or an i32 array")
    # A flat list stands for one row, which is the same for every rank.
    nested = any(isinstance(row, (list, tuple, np.ndarray)) for row in counts)
    rows = list(counts) if nested else [counts]
    length = num_ranks * num_local
    layout = f"[R * e] or [R, R * e] for R = {num_ranks}, e = {num_local}"
    if nested and len(rows) != num_ranks:
        raise ShapeError(f"{name} has {len(rows)} rows; expected {num_ranks}, one per rank: {layout}")
    for rank, row in enumerate(rows):
        at = f"{name}[{rank}]" if nested else name
        if not isinstance(row, (list, tuple, np.ndarray)) or len(row) != length:
            came = f"{len(row)} entries" if hasattr(row, "__len__") else f"the value {row!r}"
            raise ShapeError(f"{at} has {came}; expected {length}: {layout}, index peer * e + local expert")
        for index, entry in enumerate(row):
            if isinstance(entry, jax.Array):
                raise DtypeError(f"{at}[{index}] is a traced value in a list; pass one i32 array: jnp.stack({name})")
            if count_violations(at, entry, 0):
                raise InvalidArgumentError(f"{at}[{index}]={entry!r} must be a whole number of rows, at least 0")
    table = np.array([[int(entry) for entry in row] for row in rows], np.int64)
    return np.broadcast_to(table, (num_ranks, length)).reshape(num_ranks, num_ranks, num_local)


def _check_tables(send: np.ndarray, recv: np.ndarray, num_rows: int, recv_capacity: int | None) -> None:
    # 1. No rank sends more rows than it has.
    for rank, total in enumerate(send.sum(axis=(1, 2))):
        if total > num_rows:
            raise InvalidArgumentError(
                f"send_counts sums to {total} on rank {rank}, but gmm_x has {num_rows} rows; "
                f"the sum must not exceed the rows: correct the counts or pass all the rows"
            )
    # 2. What one rank sends is what the other one expects.
    disagreeing = np.argwhere(send.transpose(1, 0, 2) != recv)
    if len(disagreeing):
        to, source, expert = disagreeing[0].tolist()
        num_local = send.shape[2]
        raise InvalidArgumentError(
            f"send_counts and recv_counts disagree: rank {source} sends {send[source, to, expert]} rows (index "
            f"{to * num_local + expert} of its send_counts) and rank {to} expects {recv[to, source, expert]} (index "
            f"{source * num_local + expert} of its recv_counts); recv_counts of rank b at a * e + l must equal "
            f"send_counts of rank a at b * e + l. A flat list holds on every rank alike; where ranks differ, pass "
            f"tables [R, R * e] with one row per rank"
        )
    # 3. Every rank has room for what it receives.
    for rank, total in enumerate(recv.sum(axis=(1, 2))):
        if recv_capacity is not None and total > recv_capacity:
            raise InvalidArgumentError(
                f"recv_capacity={recv_capacity} is less than the {total} rows that rank {rank} receives; raise it, or "
                f"leave it out"
            )
