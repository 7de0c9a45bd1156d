"""Ranks meet on the host: they announce themselves there, and traced values wait for it.

Order in a compiled program follows data alone. ``probe`` makes a scalar that needs an array, ``hold`` an array that
needs a scalar; a callback or a collective between the two then stands where it was written.
"""

import collections
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax import _compat
from moe_jax.errors import MoEError

Array = jax.Array


class BarrierTimeoutError(MoEError, TimeoutError):
    """A rank did not arrive at a barrier in time. Its text reaches the user inside a jax.errors.JaxRuntimeError."""


# How a traced value is tied to a moment of the program's run.


def probe(tree: Any) -> Array:
    """A non-negative i32 scalar computed from every leaf that has elements; varies over every axis that a leaf does."""
    found = jnp.zeros((), jnp.int32)
    for leaf in jax.tree.leaves(tree):
        if leaf.size:
            first = jnp.real(leaf[(0,) * leaf.ndim])
            wide = first.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else first.astype(jnp.int32)
            found = found | (wide != 0).astype(jnp.int32)
    return found


def hold(tree: Any, moment: Array) -> Any:
    """``tree``, bit for bit, once ``moment`` is known: a non-negative i32 scalar, whose sign XLA cannot foresee.

    The identity in both modes of differentiation; derivatives wait for nobody.
    """
    return jax.tree.map(lambda leaf: _held(leaf, moment), tree)


@jax.custom_jvp
def _held(leaf, moment):
    narrow = narrow_bits(leaf)
    # This value is never chosen. It is made from the moment, since the leaf may be a constant, and XLA would drop a
    # choice between two equal constants.
    otherwise = jnp.broadcast_to(moment.astype(narrow or leaf.dtype), leaf.shape)
    return keep_where(moment >= 0, leaf, lax.bitcast_convert_type(otherwise, leaf.dtype) if narrow else otherwise)


def keep_where(mask: Array, x: Array, otherwise: Array) -> Array:
    """``x`` where ``mask``, else ``otherwise``, both broadcast to ``x``; every bit is kept, NaNs' too."""
    narrow = narrow_bits(x)  # XLA:CPU selects narrow floats in fp32, and the way there and back changes NaNs
    options = [lax.bitcast_convert_type(a, narrow) if narrow else a for a in (x, otherwise)]
    parts = jnp.broadcast_to(mask, x.shape), options[0], jnp.broadcast_to(options[1], x.shape)
    chosen = lax.select(*_compat.as_varying(parts, _compat.union_of_varying_axes(parts)))
    return lax.bitcast_convert_type(chosen, x.dtype) if narrow else chosen


def narrow_bits(x: Array) -> str | None:
    """The unsigned type that has the bits of a float of less than 32; None for other dtypes."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.finfo(x.dtype).bits >= 32:
        return None
    return f"uint{jnp.finfo(x.dtype).bits}"


@_held.defjvp
def _held_jvp(primals, tangents):
    out, tangent = _held(*primals), tangents[0]
    if tangent.dtype == jax.dtypes.float0:
        return out, tangent
    return out, _compat.as_varying(tangent, _compat.varying_axes(out))


def gather_ranks(x: Array, axes: tuple[str, ...]) -> Array:
    """[...] of each rank -> [W, ...] of all, in rank order."""
    return lax.all_gather(x, axes)


def sum_of_arrivals(moment: Array, tree: Any, axes: tuple[str, ...]) -> Array:
    """A non-negative all-reduce over ``axes`` of ``moment`` and the ranks. It varies only where all leaves do."""
    shared = frozenset.intersection(*(_compat.varying_axes(leaf) for leaf in jax.tree.leaves(tree)))
    moment = moment + lax.axis_index(axes)  # so that addends differ: XLA may turn a sum of equal ones into a product
    return lax.psum(moment, (*axes, *sorted(_compat.varying_axes(moment) - shared - set(axes))))


# Callbacks. They are pure_callbacks that are ordered by data, since remat and custom_vjp refuse the effect of an
# io_callback. The members of a batch (vmap) call them one after the other.


def await_live(tree: Any, live: Array, axes: tuple[str, ...], timeout_us: int) -> Array:
    """Announces this rank once ``tree`` is computed, and waits on the host until all ``live`` [W] ranks have done so.

    Returns an i32 zero. Raises BarrierTimeoutError on the host, on every rank or on none, and also on ranks that come
    after the others have given up.
    """
    family, group = group_of(axes)

    def arrive(rank, group, live, _):
        _meet(f"barrier/{family}/{int(group)}", int(rank), np.flatnonzero(live).tolist(), timeout_us, axes)
        return np.int32(0)

    result = jax.ShapeDtypeStruct((), jnp.int32)
    operands = (lax.axis_index(axes), group, live, probe(tree))
    return jax.pure_callback(arrive, result, *operands, vmap_method="sequential")


def group_of(axes: tuple[str, ...]) -> tuple[str, Array]:
    """The layout that ``axes`` belong to, and the number of this rank's group in it: the index along all other axes."""
    mesh = jax.sharding.get_abstract_mesh()
    others = set(mesh.manual_axes) - set(axes)
    others = tuple(sorted(axis for axis in others if mesh.shape[axis] > 1))  # in the same order in every process
    family = "+".join(axes) + "@" + ",".join(f"{axis}={mesh.shape[axis]}" for axis in sorted(mesh.manual_axes))
    return family, lax.axis_index(others) if others else jnp.zeros((), jnp.int32)


def _meet(group: str, rank: int, live: Sequence[int], timeout_us: int, axes: tuple[str, ...]) -> None:
    deadline = time.monotonic() + timeout_us / 1e6
    board = current_board()
    turn = board.announce(group, rank)
    missing = [peer for peer in live if not board.wait(group, turn, peer, max(0.0, deadline - time.monotonic()))]
    verdict = board.settle(group, turn, ",".join(map(str, missing)))  # the first verdict stands for all ranks
    if not verdict:
        if rank == min(live, default=rank):
            board.clean(group, turn - 1)
        return
    absent = [int(peer) for peer in verdict.split(",")]
    late = "; this rank came after the others had given up" if rank in absent else ""
    raise BarrierTimeoutError(
        f"timeout_us={timeout_us}: ranks {absent} of {'*'.join(axes)} did not reach the barrier in time, seen from "
        f"rank {rank} with live ranks {list(live)}{late}; look for their failure, leave them out with rank_table and a "
        "smaller mesh, or allow a longer timeout_us (it must also cover what others compile meanwhile)"
    )


# The boards on which ranks announce themselves. A turn is the number of times that a rank has come to a group.


def current_board() -> "LocalBoard | SharedBoard":
    """The board of this program: shared by processes under jax.distributed, local without it."""
    from jax._src import distributed  # JAX has no public way to the coordination service

    state = distributed.global_state
    return SharedBoard(state.client, _epoch) if state.client is not None and state.num_processes > 1 else _local


def forget_arrivals() -> None:
    """Starts to count arrivals from zero again.

    This is needed where a rank fails before it comes to a barrier and the program goes on: without it that rank would
    be one turn behind for ever. Call it in every process, while no barrier runs.
    """
    global _local, _epoch
    _local, _epoch = LocalBoard(), _epoch + 1


class LocalBoard:
    """Arrivals of the emulated devices of one process."""

    def __init__(self):
        self._changed = threading.Condition()
        self._turns = collections.Counter()  # by (group, rank)
        self._verdicts = {}  # by (group, turn)

    def announce(self, group: str, rank: int) -> int:
        """Counts this arrival and returns the rank's turn, from 1."""
        with self._changed:
            self._turns[group, rank] += 1
            self._changed.notify_all()
            return self._turns[group, rank]

    def wait(self, group: str, turn: int, peer: int, seconds: float) -> bool:
        """Whether ``peer`` came to this turn within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._turns[group, peer] >= turn, seconds)

    def settle(self, group: str, turn: int, verdict: str) -> str:
        """The first verdict that any rank gave on this turn."""
        with self._changed:
            return self._verdicts.setdefault((group, turn), verdict)

    def clean(self, group: str, turn: int) -> None:
        """Forgets a turn that all ranks have left."""
        with self._changed:
            self._verdicts.pop((group, turn), None)


class SharedBoard:
    """Arrivals in several processes, kept as keys of the coordination service of jax.distributed."""

    def __init__(self, client: Any, epoch: int):
        self._client, self._root = client, f"moe_jax/arrival/{epoch}"

    def announce(self, group: str, rank: int) -> int:
        """Counts this arrival and returns the rank's turn, from 1."""
        turn = self._client.key_value_increment(f"{self._root}/{group}/turn/{rank}", 1)
        self._client.key_value_set(self._key(group, turn, rank), "here")
        return turn

    def wait(self, group: str, turn: int, peer: int, seconds: float) -> bool:
        """Whether ``peer`` came to this turn within the time."""
        try:
            self._client.blocking_key_value_get(self._key(group, turn, peer), max(1, round(seconds * 1000)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return False
        return True

    def settle(self, group: str, turn: int, verdict: str) -> str:
        """The first verdict that any rank gave on this turn."""
        key = self._key(group, turn, "verdict")
        try:
            self._client.key_value_set(key, f"missing {verdict}")
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
        return self._client.key_value_try_get(key).removeprefix("missing ")

    def clean(self, group: str, turn: int) -> None:
        """Forgets a turn that all ranks have left."""
        self._client.key_value_delete(f"{self._root}/{group}/{turn}")  # and all keys below it

    def _key(self, group: str, turn: int, what: int | str) -> str:
        return f"{self._root}/{group}/{turn}/{what}"


_local, _epoch = LocalBoard(), 0
