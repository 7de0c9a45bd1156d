"""What a plan's buffers take: bytes per device of everything that rows pass through in a forward pass."""

from typing import TYPE_CHECKING

import jax.numpy as jnp

from moe_jax.errors import check_choice
from moe_jax.plan.transport_table import transport_of

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan


def workspace(plan: "Plan", call: str) -> dict[str, int]:
    """``Plan.workspace``, which says what is counted."""
    check_choice("call", call, ("layer", "dispatch"))
    capacity = plan.pair_capacity if call == "layer" else plan.dispatch_capacity
    row = plan.hidden * jnp.dtype(plan.dtype).itemsize
    rows = plan.num_rows(capacity)
    if call == "layer" and not plan.exchanges:
        buffers = {"outbox": 0, "inbox": 0, "return": plan.num_pairs * row}
        integers = 2 * rows + plan.num_pairs
    else:
        buffers, integers = transport_of(plan).buffers(plan, capacity)
    counts = (plan.tp_size + 1) * plan.num_experts
    return {**buffers, "rows": rows * row, "integers": 4 * (integers + counts)}
