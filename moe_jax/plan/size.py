"""The extents of one round on one device, and what passes over its rows take: what transports find their costs from."""

import math
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from moe_jax.plan.transport_table import transport_of
from moe_jax.quant import recipe

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

WIDE = 4  # bytes of an integer, a weight, a term of a sum, a number in a parameter


def balanced_rows(tokens: int, top_k: int, ep_size: int, num_shared_ranks: int) -> float:
    """Rows that a rank sends another when routes are even; a rank of a shared expert gets every token it serves."""
    routed = tokens * top_k / (ep_size - num_shared_ranks)
    return max(routed, float(tokens)) if num_shared_ranks else routed


def row_bytes(name: str, hidden: int, dtype: str) -> int:
    """Bytes of a row on the wire under the recipe ``name``."""
    chosen = recipe(name, dtype)
    return hidden * jnp.dtype(dtype).itemsize if chosen is None else chosen.row_bytes(hidden)


class Size(NamedTuple):
    """Extents of one round on one device, from which every transport finds its costs.

    Attributes:
      itemsize: bytes of a number of a row.
      row: bytes of a row in ``plan.dtype``.
      out: bytes of a row on its way to the experts.
      back: bytes of a row on its way back.
      ct: bytes of a cotangent of a row, both ways.
      wide: bytes of a row in fp32.
      sum_item: bytes of a number of ``plan.dtype`` in a sum over ranks.
      slots: rows for which the ep ranks have room, W * capacity.
      sent: rows that an exchange hands over on the way out.
      returned: rows that it hands over on the way back.
      node_slots: tokens that go to the nodes, N * B of "hierarchy".
      everyone: tokens of all ranks.
      arrived: M.
      multiplied: rows of all experts under an even load.
    """

    itemsize: int
    row: int
    out: int
    back: int
    ct: int
    wide: int
    sum_item: int
    slots: int
    sent: int
    returned: int
    node_slots: int
    everyone: int
    arrived: int
    multiplied: int

    @classmethod
    def of(cls, plan: "Plan", widened: tuple[str, ...]) -> "Size":
        itemsize, slots = jnp.dtype(plan.dtype).itemsize, plan.ep_size * plan.pair_capacity
        messages = (
            row_bytes(name, plan.hidden, plan.dtype) for name in (plan.quant, plan.combine_quant, plan.backward_quant)
        )
        everyone, arrived = plan.tp_size * plan.ep_size * plan.tokens_per_rank, plan.num_rows(plan.pair_capacity)
        even = math.ceil(everyone * plan.top_k / plan.num_experts) * plan.num_local_experts
        per_node = min(plan.tokens_per_rank, plan.ep_size // plan.num_nodes * plan.pair_capacity)
        return cls(
            itemsize,
            plan.hidden * itemsize,
            *messages,
            wide=plan.hidden * WIDE,
            sum_item=WIDE if plan.dtype in widened else itemsize,
            slots=slots,
            sent=transport_of(plan).sent_rows(plan, plan.pair_capacity),
            returned=slots,
            node_slots=plan.num_nodes * per_node,
            everyone=everyone,
            arrived=arrived,
            multiplied=min(even, arrived),
        )


def unplaced_bytes(plan: "Plan", size: Size) -> int:
    """Rows of products put into the slots that they came in, and added over tp."""
    widened = 2 * size.wide if size.sum_item > size.itemsize else 0  # rows are cast for the sum, and cast back
    added = (size.arrived + size.slots) * (size.row + widened) if plan.tp_size > 1 else 0
    return 2 * size.arrived * size.row + added


def recoded(size: Size, message: int, rows: int) -> int:
    """Rows into or out of a message that is no row."""
    return rows * (size.row + message) if message != size.row else 0
