"""Who sends how much to whom: the bytes of a layer's exchanges, device by device."""

import math
from typing import TYPE_CHECKING

import numpy as np

from moe_jax.activations import Choice
from moe_jax.plan.cost import even_exchanges
from moe_jax.plan.steps import Collective, Layout, bytes_of

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan


def wire_bytes(
    plan: "Plan",
    ffn: int,
    *,
    activation: Choice = "swiglu",
    shared_ffn: int | None = None,
    shared_activation: Choice | None = None,
    backward: bool,
    most: int,
) -> tuple[np.ndarray, np.ndarray]:
    """What devices send each other in one call of the layer under an even load, as ``Plan.cost`` counts it.

    Bytes count for the device that they are for, whoever carries them: what a device sends inside its node is spread
    evenly over the other members of its group there, and what it sends to other nodes over the members elsewhere.

    Args:
      plan, ffn, activation, shared_ffn, shared_activation: as for ``Plan.cost``.
      backward: whether to add the backward pass.
      most: the most devices to look at, the first ones.

    Returns:
      (bytes [D, D] f64, from the device of the row to that of the column; the node [D] of each device).
    """
    widths = {"ffn": ffn, "activation": activation, "shared_ffn": shared_ffn, "shared_activation": shared_activation}
    exchanges, layout = even_exchanges(plan, backward, **widths)
    num_devices = math.prod(size for _, size in layout.axes)
    shown = min(num_devices, most)
    found, nodes = np.zeros((shown, shown)), np.arange(num_devices) // layout.node
    for exchange in exchanges:
        _add(found, exchange, layout, nodes)
    return found, nodes[:shown]


def _add(found: np.ndarray, exchange: Collective, layout: Layout, nodes: np.ndarray) -> None:
    """Adds one exchange to ``found`` [D, D]."""
    group = layout.group(exchange.axes)
    if group.size == 1:
        return
    # 1. The group of each device: the coordinates along the axes that the exchange does not run over.
    sizes = [size for _, size in layout.axes]
    kept = [size if name not in exchange.axes else 1 for name, size in layout.axes]
    groups = np.broadcast_to(np.arange(math.prod(kept)).reshape(kept), sizes).ravel()
    # 2. How many members of its group are on its node, itself included.
    _, key, members = np.unique(groups * (nodes[-1] + 1) + nodes, return_inverse=True, return_counts=True)
    # 3. The bytes that each of the others gets from a device with so many neighbours.
    shown = len(found)
    for here in np.unique(members):
        inside, between = bytes_of(exchange, group._replace(outside=group.size - int(here)))
        rows = (members[key] == here)[:shown, None]
        meets = rows & (groups[:shown, None] == groups[:shown]) & ~np.eye(shown, dtype=bool)
        near = nodes[:shown, None] == nodes[:shown]
        found[meets & near] += inside / max(1, here - 1)
        found[meets & ~near] += between / max(1, group.size - here)
