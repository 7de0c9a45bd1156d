"""A stopwatch: it wraps a pairwise transport, and notes how long this rank waited for each of the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import collectives
from moe_jax.collectives.rendezvous import hold
from moe_jax.transports.base import Opened, Transport

Array = jax.Array


class TimedCounts(NamedTuple):
    """What the ranks told each other.

    Attributes:
      recv_counts: [P, W, L] i32, pairs for this rank by source.
      waited: [W] i32, the microseconds that this rank waited for the counts of each rank.
    """

    recv_counts: Array
    waited: Array


class Stopwatch:
    """Counts and opens as the transport that it wraps does, with readings of the host's clock in between.

    Rows travel by the maps that it opens, to one peer after the other in equal blocks: what the wrapped transport notes
    when it sends with them, or collects, is [W] i32, the microseconds that this rank waited for each peer.
    """

    def __init__(self, transport: Transport):
        self._transport = transport

    def count(self, destination, pairs, plan):
        # The counts go before any other exchange: a slow rank would hold up everybody in a collective.
        send_counts = pairs.counts.reshape(plan.ep_size, plan.num_local_experts)
        recv_counts, waited = collectives.exchange_counts_timed(send_counts, plan)
        return hold(pairs, jnp.max(waited)), TimedCounts(recv_counts, waited)  # all that follows comes after it

    def open(self, manifest, start, capacity, plan, *, num_rows) -> Opened:
        opened = self._transport.open_blocks(manifest, start, capacity, plan, num_rows=num_rows)
        return opened._replace(maps=self._transport.timed(opened.maps))
