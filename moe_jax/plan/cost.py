"""What one call of the layer costs one device: bytes on the wire, flops, memory traffic, and the time they bound.

Counted is the program of ``moe_on_mesh`` with fp32 parameters and no biases, in a round under an even load. What rows
cost, their transport knows.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from moe_jax.config import ACTIVATIONS
from moe_jax.errors import InvalidArgumentError, UnsupportedError, check_choice, check_count
from moe_jax.hardware import Machine, machine_of
from moe_jax.kernels.table import PLATFORMS
from moe_jax.plan.checks import machine_from
from moe_jax.plan.transport_table import transport_of
from moe_jax.quant import recipe

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

PHASES = ("forward", "forward + backward")
WIDE = 4  # bytes of an integer, a weight, a term of a sum, a number in a parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One device, one phase.

    Beside the fields below: ``even_wire_bytes`` are those of ``wire_bytes`` that an even load fills, all but for
    "ragged"; ``router_flops`` are those of ``flops`` that the router takes, in fp32 whatever the rows are; ``hardware``
    names the machine, of ``platform``, whose nominal rates give ``compute_seconds``, ``memory_seconds`` and
    ``wire_seconds``, the last of ``even_wire_bytes``, those of rows at the rate of a ragged exchange where they take
    one.

    ``wire_bytes``: what ``moe_jax.hlo.contract`` counts as ``inline_wire_bytes`` of the compiled layer: rows, and
    beside them counts, weights, the router's statistics and the gradients of replicated parameters. A ragged exchange
    counts with the extent of its operand, as it does there; where it is emulated, as on CPUs, it runs in a loop, and is
    not counted there. Without tokens XLA drops sums of nothing, which are counted here. The backward pass is asked for
    the gradients of parameters and x, and not through the losses.

    ``flops``: of all products with weights, a multiplication and an addition being two. Experts multiply as many rows
    as one has under an even load, each.

    ``traffic_bytes``: what passes over rows and weights read and write, each in full, wherever it comes from. A pass is
    a copy (pack, exchange, permute, unpermute, unpack), a change of format, an activation, a sum or a product. Indices
    do not count. A partial sum of "allgather" reads a row for every choice of every token of all ranks, whether the
    row is there or not.
    """

    wire_bytes: int
    even_wire_bytes: int
    flops: int
    router_flops: int
    traffic_bytes: int
    hardware: str
    platform: str
    compute_seconds: float
    memory_seconds: float
    wire_seconds: float

    @property
    def bound(self) -> tuple[str, float]:
        """What takes longest, "compute", "memory" or "wire", and the seconds that it takes by itself."""
        seconds = {"compute": self.compute_seconds, "memory": self.memory_seconds, "wire": self.wire_seconds}
        return max(seconds.items(), key=lambda entry: entry[1])


def balanced_rows(tokens: int, top_k: int, ep_size: int, num_shared_ranks: int) -> float:
    """Rows that a rank sends another when routes are even; a rank of a shared expert gets every token it serves."""
    routed = tokens * top_k / (ep_size - num_shared_ranks)
    return max(routed, float(tokens)) if num_shared_ranks else routed


def row_bytes(name: str, hidden: int, dtype: str) -> int:
    """Bytes of a row on the wire under the recipe ``name``."""
    chosen = recipe(name, dtype)
    return hidden * jnp.dtype(dtype).itemsize if chosen is None else chosen.row_bytes(hidden)


def plan_costs(
    plan: "Plan",
    ffn: int,
    *,
    activation: str,
    num_replicas: int | None,
    platform: str | None,
    hardware: str | Machine | None,
) -> dict[str, Cost]:
    """``Plan.cost``: checks the arguments, and takes from the plan what is not given."""
    check_count("ffn", ffn, low=0)
    if ffn % plan.tp_size:
        raise InvalidArgumentError(f"ffn={ffn} must be divisible by tp={plan.tp_size}")
    check_choice("activation", activation, ACTIVATIONS)
    num_replicas = plan.num_replicas if num_replicas is None else num_replicas
    check_count("num_replicas", num_replicas)
    machine = plan.hardware
    if platform is not None:
        check_choice("platform", platform, PLATFORMS)
        if hardware is not None:
            raise InvalidArgumentError(
                f"platform={platform!r} and hardware={hardware!r} both name rates; leave one out"
            )
        machine = machine if machine.platform == platform else machine_of(platform, "")
    elif hardware is not None:
        machine = machine_from(hardware)
    if plan.num_shared_ranks:
        raise UnsupportedError(
            f"num_shared_ranks={plan.num_shared_ranks}: the layer computes shared experts beside the exchange, and "
            "its cost is that of a plan with num_shared_ranks=0"
        )
    return layer_costs(plan, machine, ffn=ffn, activation=activation, num_replicas=num_replicas)


def layer_costs(plan: "Plan", machine: Machine, *, ffn: int, activation: str, num_replicas: int) -> dict[str, Cost]:
    """The costs by phase; ``ffn`` 0 leaves out everything that has the width of an FFN. See ``Plan.cost``."""
    size = Size.of(plan, machine.widened)
    transport = transport_of(plan)
    even = transport.even_size(plan, size)
    routed = _Ffn(size.multiplied, plan.num_local_experts, ffn // plan.tp_size, activation)
    shared = _Ffn(plan.tokens_per_rank, 1, ffn * plan.num_shared_experts, activation)
    costs = {}
    for phase in PHASES:
        backward = phase == PHASES[1]
        passes = 3 if backward else 1  # the gradient of a product takes two
        sums = _sum_wire(plan, size, routed, shared, num_replicas, backward)
        router = passes * 2 * plan.tokens_per_rank * plan.hidden * plan.num_ids
        flops = passes * sum(2 * f.projections * f.rows * plan.hidden * f.width for f in (routed, shared))
        of_rows = transport.traffic_bytes if plan.exchanges else _local_traffic
        traffic = of_rows(plan, size, backward) + passes * _router_traffic(plan)
        traffic += sum(_ffn_traffic(f, plan.hidden, size.itemsize, backward) for f in (routed, shared))
        traffic += int(transport.passes_at_ends(machine) * _ends(plan, size, backward))
        rows, even_rows = (transport.wire_bytes(plan, s, backward) for s in (size, even))
        share = transport.wire_share(machine)
        costs[phase] = Cost(
            wire_bytes=sums + rows,
            even_wire_bytes=sums + even_rows,
            flops=flops + router,
            router_flops=router,
            traffic_bytes=traffic,
            hardware=machine.name,
            platform=machine.platform,
            compute_seconds=flops / (machine.flops32 if size.itemsize == 4 else machine.flops16)
            + router / machine.flops32,
            memory_seconds=traffic / machine.memory_bandwidth,
            wire_seconds=(sums + even_rows / share) / machine.inside.bytes_per_second,
        )
    return costs


class _Ffn(NamedTuple):
    """Experts on one device."""

    rows: int  # of all of them
    experts: int
    width: int
    activation: str

    @property
    def projections(self) -> int:
        return 2 if self.activation == "gelu" else 3


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


# The wire.


def leaves(op: str, group: int, handed: int) -> int:
    """Bytes that leave a device of a group when each hands over so many."""
    factor = {"all-gather": group, "all-reduce": 2}.get(op, 1)
    return factor * handed * (group - 1) // group


def rounds_bytes(plan: "Plan") -> int:
    """Of the number of rounds, where the ranks do not know it from the counts that they exchange."""
    return leaves("all-reduce", plan.ep_size * plan.tp_size, WIDE) if plan.max_rounds > 1 else 0


def _sum_wire(plan: "Plan", size: Size, routed: _Ffn, shared: _Ffn, num_replicas: int, backward: bool) -> int:
    """What is summed over all devices: load and two counts; shares and a loss; gradients of replicated parameters.

    XLA makes one all-reduce of all that have a dtype and a group in common.
    """
    devices = plan.ep_size * plan.tp_size * num_replicas
    total = leaves("all-reduce", num_replicas, WIDE) + leaves("all-reduce", devices, (plan.num_ids + 2) * WIDE)
    floats = (plan.num_ids + 1) * WIDE
    if not backward:
        return total + leaves("all-reduce", devices, floats)
    floats += plan.hidden * plan.num_ids * WIDE
    narrow = plan.hidden * (3 * plan.num_const_experts + shared.projections * shared.width) * size.sum_item
    sums = (floats + narrow,) if size.sum_item == WIDE else (floats, narrow)
    of_replicas = routed.projections * routed.experts * plan.hidden * routed.width * WIDE
    total += sum(leaves("all-reduce", devices, handed) for handed in sums)
    return total + leaves("all-reduce", num_replicas, of_replicas)


# Memory traffic.


def _local_traffic(plan: "Plan", size: Size, backward: bool) -> int:
    """Of a device that exchanges nothing: a gather each way, of rows as recipes leave them; the sum at the tokens."""
    tokens, pairs = plan.tokens_per_rank, plan.num_pairs

    def out(rows, message):
        return 2 * recoded(size, message, rows) + 2 * size.arrived * size.row

    def back(message):
        return 2 * recoded(size, message, size.arrived) + 3 * pairs * size.row + tokens * size.wide

    total = out(tokens, size.out) + back(size.back)
    if backward:  # cotangents take the same ways; beside that, those of pairs and of weights are made
        total += 2 * (pairs * size.row + tokens * size.wide) + out(pairs, size.ct) + back(size.ct)
    return total


def _ends(plan: "Plan", size: Size, backward: bool) -> int:
    """Bytes of a pass over the rows at both ends of every exchange between ranks."""
    messages = size.out + size.back + 2 * size.ct * backward
    return 2 * (size.sent + size.slots) * messages if plan.ep_size > 1 else 0


def unplaced_bytes(plan: "Plan", size: Size) -> int:
    """Rows of products put into the slots that they came in, and added over tp."""
    widened = 2 * size.wide if size.sum_item > size.itemsize else 0  # rows are cast for the sum, and cast back
    added = (size.arrived + size.slots) * (size.row + widened) if plan.tp_size > 1 else 0
    return 2 * size.arrived * size.row + added


def recoded(size: Size, message: int, rows: int) -> int:
    """Rows into or out of a message that is no row."""
    return rows * (size.row + message) if message != size.row else 0


def _ffn_traffic(ffn: _Ffn, hidden: int, itemsize: int, backward: bool) -> int:
    """Each product reads two matrices and writes one; so do its two gradients. 16-bit weights are cast copies."""
    row, inner, count = hidden * itemsize, ffn.width * itemsize, ffn.projections
    weights = count * ffn.experts * hidden * ffn.width
    casts = weights * (WIDE + itemsize) if itemsize != WIDE else 0
    total = casts + weights * itemsize + ffn.rows * count * (row + 2 * inner)
    if not backward or not ffn.width:
        return total * bool(ffn.width)
    added = 3 * row if count == 3 else 0  # gate's and up's cotangents of a row
    return total + casts + 2 * weights * itemsize + ffn.rows * (2 * count * row + added + (5 * count - 1) * inner)


def _router_traffic(plan: "Plan") -> int:
    tokens, hidden, ids = plan.tokens_per_rank, plan.hidden, plan.num_ids
    return (tokens * hidden + hidden * ids + tokens * ids) * WIDE
