"""What a plan's buffers take: bytes per device of everything that rows pass through in a forward pass."""

from typing import TYPE_CHECKING

import jax.numpy as jnp

from moe_jax.errors import check_choice
from moe_jax.plan.cost import row_bytes

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan


def workspace(plan: "Plan", call: str) -> dict[str, int]:
    """``Plan.workspace``, which says what is counted."""
    check_choice("call", call, ("layer", "dispatch"))
    capacity = plan.pair_capacity if call == "layer" else plan.dispatch_capacity
    compact = plan.transport == "ragged" or capacity > plan.pair_capacity  # rows lie end to end
    row = plan.hidden * jnp.dtype(plan.dtype).itemsize
    out, back = (row_bytes(name, plan.hidden, plan.dtype) for name in (plan.quant, plan.combine_quant))
    rows, slots = plan.num_rows(capacity), plan.ep_size * capacity
    tokens = plan.tp_size * plan.ep_size * plan.tokens_per_rank
    arrival = plan.tp_size * slots
    if call == "layer" and not plan.exchanges:
        buffers = {"send": 0, "arrival": 0, "return": plan.num_pairs * row}
        integers = 2 * rows + plan.num_pairs
    elif plan.transport == "allgather":
        buffers = {"arrival": tokens * out, "return": tokens * plan.hidden * 4}
        integers = 2 * tokens * plan.top_k + rows
    elif plan.transport == "hierarchy":
        crossing = plan.num_nodes * min(plan.tokens_per_rank, plan.ep_size // plan.num_nodes * capacity)
        sent = min(slots, crossing * plan.num_copies) if compact else slots
        buffers = {
            "crossing": 2 * crossing * out,
            "send": sent * out,
            "arrival": arrival * out,
            "return": sent * row + crossing * (4 * plan.hidden + back),
        }
        integers = crossing * (1 + plan.num_copies) + plan.tokens_per_rank * plan.num_nodes + sent + arrival + rows
    else:
        sent = min(slots, plan.num_pairs) if compact else slots
        buffers = {"send": sent * out, "arrival": arrival * out, "return": plan.num_pairs * back}
        integers = sent + 3 * plan.num_pairs + arrival + rows
    counts = (plan.tp_size + 1) * plan.num_experts
    return {**buffers, "rows": rows * row, "integers": 4 * (integers + counts)}
