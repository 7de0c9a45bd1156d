"""The exchange with a stopwatch: how long this rank waited for each of the others."""

import functools
import time
from collections.abc import Callable

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
_SCALAR = jax.ShapeDtypeStruct((), jnp.int32)


def timed_all_to_all(
    blocks: Array, axis_names: str | tuple[str, ...], on_arrival: Callable[[Array, Array], Array] | None = None
) -> tuple[Array, Array]:
    """``lax.all_to_all`` one peer at a time, and the time that each took.

    The time has two parts. The first is how long this rank stood ready while the other one was not: every rank reads
    its clock when its blocks are ready, meets all others, and reads the clock again when they let it go. The longer it
    stood there the earlier it came, so the differences of these times say who waited for whom, and ranks on several
    hosts need no common clock. The second part is the time that the block took to travel. Blocks travel in W - 1
    shifts, between two readings of the clock each, and all ranks meet before every shift and after the last one: so a
    block that is late is counted where it arrives, and makes no other block late.

    Everything is ordered by data, so the compiler cannot move a reading. There are 2 W readings, each a call of the
    host, and W + 1 collectives of one number beside the shifts. So this is for finding slow ranks, not for every step.
    Where a device works ahead of its host, a reading is the time at which the host gets to know. Differentiable; the
    derivatives are plain all_to_alls.

    Args:
      blocks: [W, ...], block j for rank j.
      axis_names: one mesh axis, or several that are flattened in that order.
      on_arrival: what each block passes when it has come and its clock has not been read yet, static: a function of the
        block and of the i32 rank that it came from, with the block as its result. For rehearsals: see
        ``moe_jax.tools.stragglers``.

    Returns:
      blocks: [W, ...], block i came from rank i; the same bits as ``lax.all_to_all(blocks, axis_names, 0, 0)``.
      microseconds: [2, W] i32 by source: until it was ready, and travelling. At least 0, and 0 for this rank itself.
        Varies over every axis of more than one device.

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
    _, group = rendezvous.group_of(axes)
    moved, microseconds = _timed(axes, on_arrival, _compat.as_varying(blocks, axes), group)
    return moved, _compat.as_varying(microseconds, sorted(_compat.varying_axes(group)))


@functools.partial(custom_gradient, num_static=2)
def _timed(axes, on_arrival, blocks, group):
    me, num_ranks, narrow = lax.axis_index(axes), blocks.shape[0], rendezvous.narrow_bits(blocks)
    read_clock = functools.partial(_read_clock, me, group)

    def meet(reading):  # of the reading one bit, because sums of readings could overflow
        return rendezvous.sum_of_arrivals(reading & 1, reading, axes)

    # 1. Who came how early: the last one to be ready stands in the meeting for no time at all.
    ready = read_clock(blocks)
    stood = (read_clock(meet(ready)) - ready) & _CLOCK_MASK
    all_stood = lax.all_gather(stood, axes)
    waited = jnp.maximum(stood - all_stood, 0)
    # 2. The shifts, each of which begins when all ranks have left the one before.
    met = jnp.max(all_stood)
    bits = lax.bitcast_convert_type(blocks, narrow) if narrow else blocks  # XLA:CPU changes narrow NaNs that it moves
    arrived, travelled = [bits[me]], [jnp.zeros_like(ready)]
    for shift in range(1, num_ranks):
        before = read_clock(met)
        sent = rendezvous.hold(bits[(me + shift) % num_ranks], before)
        block = lax.ppermute(sent, axes, [(rank, (rank + shift) % num_ranks) for rank in range(num_ranks)])
        if on_arrival is not None:
            block = on_arrival(block, (me - shift) % num_ranks)
        after = read_clock((before, block))
        arrived.append(block)
        travelled.append((after - before) & _CLOCK_MASK)
        met = meet(after)
    # 3. Shift s brought the block of rank me - s.
    shift_of = (me - jnp.arange(num_ranks)) % num_ranks
    moved = rendezvous.hold(jnp.stack(arrived), met)[shift_of]
    moved = lax.bitcast_convert_type(moved, blocks.dtype) if narrow else moved
    return moved, jnp.stack([waited, jnp.stack(travelled)[shift_of]])


def _timed_backward(axes, on_arrival, residuals, cts):
    del on_arrival, residuals
    ct = cts[0]  # [W, ...], of blocks that moved; d_blocks = ct, each block back at its rank
    return None if ct.dtype == jax.dtypes.float0 else lax.all_to_all(ct, axes, 0, 0), None


_timed.defvjp(lambda *args: (_timed(*args), None), _timed_backward)


def _read_clock(me: Array, group: Array, after: Array | tuple[Array, ...]) -> Array:
    """The host's clock in microseconds, modulo 2^31, read once ``after`` is there; a reading of this rank's own."""

    def read(_):
        return np.int32((time.monotonic_ns() - _START) // 1000 & _CLOCK_MASK)

    # One operand, because JAX makes an array of each.
    return jax.pure_callback(read, _SCALAR, rendezvous.probe((me, group, after)), vmap_method="sequential")
