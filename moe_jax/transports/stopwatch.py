"""A stopwatch: it wraps a pairwise transport, and notes how long this rank waited for each of the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import collectives
from moe_jax.collectives.rendezvous import hold
from moe_jax.errors import ShapeError, check_array, check_dtype
from moe_jax.plan import Plan
from moe_jax.transports.base import Opened, Transport

Array = jax.Array


class TimedCounts(NamedTuple):
    """What the ranks told each other.

    Attributes:
      recv_counts: [P, W, L] i32, pairs for this rank by source.
      waited: [2, W] i32, the microseconds that this rank waited for each: until its counts were ready, and for them.
    """

    recv_counts: Array
    waited: Array


class Stopwatch:
    """Counts and opens as the transport that it wraps does, with readings of the host's clock in between.

    Rows travel by the maps that it opens, to one peer after the other in equal blocks: what the wrapped transport notes
    when it sends with them, or collects, is [2, W] i32, the microseconds that this rank waited for each peer: until its
    rows were ready, and while they travelled.
    """

    def __init__(self, transport: Transport):
        self._transport = transport

    def count(self, destination, pairs, plan: Plan):
        # The counts go before any other exchange: a slow rank would hold up everybody in a collective.
        send_counts = pairs.counts.reshape(plan.ep_size, plan.num_local_experts)
        recv_counts, waited = collectives.exchange_counts_timed(send_counts, plan)
        return hold(pairs, jnp.max(waited)), TimedCounts(recv_counts, waited)  # all that follows comes after it

    def open(self, manifest, start, capacity, plan: Plan, *, num_rows) -> Opened:
        opened = self._transport.open_blocks(manifest, start, capacity, plan, num_rows=num_rows)
        return opened._replace(maps=self._transport.timed(opened.maps))


def check_performance_info(performance_info: Array, plan: Plan) -> None:
    """Raises unless ``performance_info`` is [W] or [2, W] of whole numbers."""
    check_array("performance_info", performance_info)
    if performance_info.shape not in ((plan.ep_size,), (2, plan.ep_size)):
        raise ShapeError(
            f"performance_info has shape {performance_info.shape}; expected ({plan.ep_size},) = [W], one per source "
            f"rank, or (2, {plan.ep_size}) = [2, W], until it was ready and while rows travelled"
        )
    check_dtype("performance_info", performance_info, ("int32", "int64"), "microseconds are whole numbers")


def add_waited(performance_info: Array, waited: Array) -> Array:
    """``performance_info`` [W] or [2, W] and the times ``waited`` [2, W] of one exchange, added."""
    added = waited if performance_info.ndim == 2 else waited.sum(0)
    return performance_info + added.astype(performance_info.dtype)
