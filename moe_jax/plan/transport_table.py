"""The table of transports: which object knows how the rows of a plan travel.

It stands below the transports, since a plan asks its transport what it costs, and the transports ask the plan for its
sizes. ``moe_jax.transports`` fills it in when the package is imported.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan
    from moe_jax.transports.base import Transport

_TABLE: dict[str, "Transport"] = {}  # in the order in which "auto" compares them


def add_transport(transport: "Transport") -> None:
    """Enters a ``moe_jax.transports.Transport`` under its name."""
    _TABLE[transport.name] = transport


def is_taken(transport: "Transport") -> bool:
    """Whether the name of ``transport`` is that of another one, which plans may have kept."""
    return _TABLE.get(transport.name, transport) is not transport


def transport_of(plan: "Plan") -> "Transport":
    """The ``moe_jax.transports.Transport`` of a plan."""
    return _TABLE[plan.transport]


def transport_names() -> tuple[str, ...]:
    """The names of all transports, those that came with the package first."""
    return tuple(_TABLE)


@contextlib.contextmanager
def entered(transport: "Transport") -> Iterator[None]:
    """Enters a transport for as long as the context lasts, in place of another one of its name. For tests."""
    before = dict(_TABLE)
    add_transport(transport)
    try:
        yield
    finally:
        _TABLE.clear()
        _TABLE.update(before)
