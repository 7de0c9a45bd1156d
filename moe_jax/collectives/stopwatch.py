"""The exchange with a stopwatch: how long this rank waited for each of the others."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax import _compat
from moe_jax.collectives import rendezvous
from moe_jax.derivatives import custom_gradient
from moe_jax.errors import ShapeError, check_array, check_shape

Array = jax.Array

_START = time.monotonic_ns()
_CLOCK_MASK = 2**31 - 1  # clocks wrap after 35 minutes; differences do not mind
# Seconds; then the exchange goes on and behaves as it would without a stopwatch. It ends a deadlock between ranks that
# reach this and another collective of the program in different orders, before XLA gives up (40 s).
_LONGEST_WAIT = 10.0
_SCALAR = jax.ShapeDtypeStruct((), jnp.int32)


def timed_all_to_all(blocks: Array, axis_names: str | tuple[str, ...]) -> tuple[Array, Array]:
    """``lax.all_to_all`` one peer at a time, and the time that each took.

    A rank's entry is the time until its own blocks were ready, counted from when this rank began to look for it, plus
    the time that its block took to travel. It looks for one rank after the other on the host, before the first block
    moves: a collective that a slow rank holds up would hold up all ranks and put the blame on any of them. Then the
    blocks travel in W - 1 shifts, between two readings of the host clock each. Everything is ordered by data, so the
    compiler cannot move a reading. For finding slow ranks, not for every step. Differentiable; the derivatives
    are plain all_to_alls.

    Args:
      blocks: [W, ...], block j for rank j.
      axis_names: one mesh axis, or several that are flattened in that order.

    Returns:
      blocks: [W, ...], block i came from rank i; the same bits as ``lax.all_to_all(blocks, axis_names, 0, 0)``.
      microseconds: [W] i32 by source; at least 0, and 0 for this rank itself. Varies over every axis of more
        than one device.

    Raises:
      ShapeError, MissingArgumentError, DtypeError: ``blocks`` is no array with one block for each rank.
      InvalidArgumentError, MeshError: ``axis_names`` names no axes, or none that are bound here.

    Source: performanceInfo of MoeDistributeDispatchV3.
    """
    axes = _compat.bound_axes(axis_names)
    num_ranks = lax.axis_size(axes)
    check_array("blocks", blocks)
    if blocks.ndim < 1:
        raise ShapeError("blocks is a scalar; expected [W, ...]")
    check_shape("blocks", blocks, (num_ranks, *blocks.shape[1:]), f"[W, ...], one per rank of {'*'.join(axes)}")
    family, group = rendezvous.group_of(axes)
    moved, microseconds = _timed(axes, f"timing/{family}", _compat.as_varying(blocks, axes), group)
    return moved, _compat.as_varying(microseconds, sorted(_compat.varying_axes(group)))


@functools.partial(custom_gradient, num_static=2)
def _timed(axes, family, blocks, group):
    me, num_ranks, narrow = lax.axis_index(axes), blocks.shape[0], rendezvous.narrow_bits(blocks)
    waited = _wait_for_peers(blocks, me, family, group)
    now = _read_clock(jnp.max(waited), blocks)
    bits = lax.bitcast_convert_type(blocks, narrow) if narrow else blocks  # XLA:CPU changes narrow NaNs that it moves
    arrived, travelled = [bits[me]], [jnp.zeros_like(now)]
    for shift in range(1, num_ranks):
        sent = rendezvous.hold(bits[(me + shift) % num_ranks], now)
        arrived.append(lax.ppermute(sent, axes, [(rank, (rank + shift) % num_ranks) for rank in range(num_ranks)]))
        before, now = now, _read_clock(now, arrived[-1])
        travelled.append((now - before) & _CLOCK_MASK)
    shift_of = (me - jnp.arange(num_ranks)) % num_ranks
    moved = jnp.stack(arrived)[shift_of]
    moved = lax.bitcast_convert_type(moved, blocks.dtype) if narrow else moved
    return moved, waited + jnp.stack(travelled)[shift_of]


def _timed_backward(axes, family, residuals, cts):
    del family, residuals
    ct = cts[0]  # [W, ...], of blocks that moved; d_blocks = ct, each block back at its rank
    return None if ct.dtype == jax.dtypes.float0 else lax.all_to_all(ct, axes, 0, 0), None


_timed.defvjp(lambda *args: (_timed(*args), None), _timed_backward)


def _read_clock(after: Array, tree: Array) -> Array:
    """The host's clock in microseconds, modulo 2^31, read once ``after`` and ``tree`` are there."""

    def read(*_):
        return np.int32((time.monotonic_ns() - _START) // 1000 & _CLOCK_MASK)

    return jax.pure_callback(read, _SCALAR, after, rendezvous.probe(tree), vmap_method="sequential")


def _wait_for_peers(blocks: Array, me: Array, family: str, group: Array) -> Array:
    """[W] i32 microseconds that this rank stood waiting for each other to have its blocks ready."""
    num_ranks = blocks.shape[0]

    def wait(rank, group, _):
        board, name, rank = rendezvous.current_board(), f"{family}/{int(group)}", int(rank)
        turn = board.announce(name, rank)
        waited, complete = np.zeros(num_ranks, np.int32), True
        deadline = time.monotonic() + _LONGEST_WAIT
        for shift in range(1, num_ranks):
            peer = (rank - shift) % num_ranks
            start = time.monotonic_ns()
            complete &= board.wait(name, turn, peer, max(0.0, deadline - time.monotonic()))
            waited[peer] = (time.monotonic_ns() - start) // 1000
        if complete and not rank:  # all are here, so all have left the turn before
            board.clean(name, turn - 1)
        return waited

    result = jax.ShapeDtypeStruct((num_ranks,), jnp.int32)
    return jax.pure_callback(wait, result, me, group, rendezvous.probe(blocks), vmap_method="sequential")
