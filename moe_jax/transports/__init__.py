"""How rows travel between tokens and experts.

``manifest`` says which pairs travel, and where to. ``base`` is the protocol of a transport; ``all_to_all``,
``all_gather`` and ``hierarchy`` are those that there are, and ``stopwatch`` wraps one. ``send`` and ``collect`` are the
differentiable ways out and back, whatever the transport is, and ``linear`` the maps that their derivatives are made of.
"""

from moe_jax.plan.transport_table import transport_names, transport_of
from moe_jax.transports.all_gather import ALL_GATHER
from moe_jax.transports.all_to_all import PADDED, RAGGED
from moe_jax.transports.base import InboxOrder, Transport, register_transport
from moe_jax.transports.collect import collect_rows
from moe_jax.transports.hierarchy import HIERARCHY
from moe_jax.transports.send import CodedRows, Sent, carry_rows, dequantized, send_as_is, send_rows, send_smoothed
from moe_jax.transports.stopwatch import Stopwatch, add_waited, check_performance_info

__all__ = [
    "ALL_GATHER",
    "HIERARCHY",
    "PADDED",
    "RAGGED",
    "CodedRows",
    "InboxOrder",
    "Sent",
    "Stopwatch",
    "Transport",
    "add_waited",
    "carry_rows",
    "check_performance_info",
    "collect_rows",
    "dequantized",
    "register_transport",
    "send_as_is",
    "send_rows",
    "send_smoothed",
    "transport_names",
    "transport_of",
]

for _transport in (PADDED, ALL_GATHER, RAGGED, HIERARCHY):
    register_transport(_transport)
