"""What one call of the layer costs one device: bytes on the wire, flops, memory traffic, and the time they bound.

Counted is the program of ``moe_on_mesh`` with fp32 parameters and no biases, in a round under an even load.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from moe_jax.config import ACTIVATIONS
from moe_jax.errors import InvalidArgumentError, UnsupportedError, check_choice, check_count
from moe_jax.plan.rates import RATES
from moe_jax.quant import recipe

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

PHASES = ("forward", "forward + backward")
_WIDE = 4  # bytes of an integer, a weight, a term of a sum, a number in a parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One device, one phase.

    Beside the fields below: ``even_wire_bytes`` are those of ``wire_bytes`` that an even load fills, all but for
    "ragged"; ``router_flops`` are those of ``flops`` that the router takes, in fp32 whatever the rows are; ``platform``
    is the one whose nominal rates give ``compute_seconds``, ``memory_seconds`` and ``wire_seconds``, the last of
    ``even_wire_bytes``, those of rows at the rate of a ragged exchange where they take one.

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


def plan_costs(plan: "Plan", ffn: int, *, activation: str, num_replicas: int, platform: str | None) -> dict[str, Cost]:
    """``Plan.cost``: checks the arguments, and takes the plan's own platform where none is given."""
    check_count("ffn", ffn, low=0)
    if ffn % plan.tp_size:
        raise InvalidArgumentError(f"ffn={ffn} must be divisible by tp={plan.tp_size}")
    check_choice("activation", activation, ACTIVATIONS)
    check_count("num_replicas", num_replicas)
    if platform is None:
        platform = plan.backend if plan.backend in RATES else plan.platform
    check_choice("platform", platform, RATES)
    if plan.num_shared_ranks:
        raise UnsupportedError(
            f"num_shared_ranks={plan.num_shared_ranks}: the layer computes shared experts beside the exchange, and "
            "its cost is that of a plan with num_shared_ranks=0"
        )
    return layer_costs(plan, platform, ffn=ffn, activation=activation, num_replicas=num_replicas)


def layer_costs(plan: "Plan", platform: str, *, ffn: int, activation: str, num_replicas: int) -> dict[str, Cost]:
    """The costs by phase; ``ffn`` 0 leaves out everything that has the width of an FFN. See ``Plan.cost``."""
    rates = RATES[platform]
    size = _Size.of(plan, rates.widened)
    even = size._replace(sent=min(size.sent, plan.num_pairs), returned=min(size.returned, plan.num_pairs))
    even = even if plan.transport == "ragged" else size
    routed = _Ffn(size.multiplied, plan.num_local_experts, ffn // plan.tp_size, activation)
    shared = _Ffn(plan.tokens_per_rank, 1, ffn * plan.num_shared_experts, activation)
    costs = {}
    for phase in PHASES:
        backward = phase == PHASES[1]
        passes = 3 if backward else 1  # the gradient of a product takes two
        sums = _sum_wire(plan, size, routed, shared, num_replicas, backward)
        router = passes * 2 * plan.tokens_per_rank * plan.hidden * plan.num_ids
        flops = passes * sum(2 * f.projections * f.rows * plan.hidden * f.width for f in (routed, shared))
        traffic = _row_traffic(plan, size, backward) + passes * _router_traffic(plan)
        traffic += sum(_ffn_traffic(f, plan.hidden, size.itemsize, backward) for f in (routed, shared))
        traffic += int(rates.ragged_passes * _ragged_ends(plan, size, backward))
        rows, even_rows = (_row_wire(plan, s, backward) for s in (size, even))
        share = rates.ragged_wire if plan.transport == "ragged" else 1.0
        costs[phase] = Cost(
            wire_bytes=sums + rows,
            even_wire_bytes=sums + even_rows,
            flops=flops + router,
            router_flops=router,
            traffic_bytes=traffic,
            platform=platform,
            compute_seconds=flops / (rates.flops32 if size.itemsize == 4 else rates.flops16) + router / rates.flops32,
            memory_seconds=traffic / rates.memory,
            wire_seconds=(sums + even_rows / share) / rates.wire,
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


class _Size(NamedTuple):
    """Of one round on one device: bytes of a row in each of its forms, and rows of each buffer."""

    itemsize: int
    row: int
    out: int  # on its way to the experts
    back: int
    ct: int  # of a cotangent, both ways
    wide: int  # in fp32
    sum_item: int  # bytes of a number of ``plan.dtype`` in a sum over ranks
    slots: int  # what the ep ranks send, W * capacity
    sent: int  # what an exchange hands over on the way out
    returned: int  # and on the way back
    crossing: int  # what goes to the nodes
    everyone: int  # tokens of all ranks
    arrived: int  # M
    multiplied: int

    @classmethod
    def of(cls, plan, widened: tuple[str, ...]) -> "_Size":
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
            wide=plan.hidden * _WIDE,
            sum_item=_WIDE if plan.dtype in widened else itemsize,
            slots=slots,
            sent=min(slots, plan.num_pairs) if plan.transport == "ragged" else slots,
            returned=slots,
            crossing=plan.num_nodes * per_node,
            everyone=everyone,
            arrived=arrived,
            multiplied=min(even, arrived),
        )


# The wire.


def _leaves(op: str, group: int, handed: int) -> int:
    """Bytes that leave a device of a group when each hands over so many."""
    factor = {"all-gather": group, "all-reduce": 2}.get(op, 1)
    return factor * handed * (group - 1) // group


def _row_wire(plan, size: _Size, backward: bool) -> int:
    """Rows, and what says where they go and how much they weigh."""
    world, nodes, pairs = plan.ep_size * plan.tp_size, plan.num_nodes, plan.num_pairs * _WIDE
    counts = plan.num_experts * _WIDE
    total = _there(plan, size, size.out) + _home(plan, size, size.back)
    if plan.transport == "allgather":
        total += 2 * _leaves("all-gather", world, pairs)  # destinations, weights
    entries = plan.num_copies * _WIDE  # of a token
    if plan.transport == "hierarchy":
        total += _leaves("all-to-all", plan.ep_size, counts) + _leaves("all-gather", plan.tp_size, counts)
        total += 2 * _leaves("all-to-all", nodes, size.crossing * entries)  # destinations, weights
    if not plan.sums_at_experts:
        total += _leaves("all-gather", world, counts)
    elif plan.max_rounds > 1:
        total += _leaves("all-reduce", world, _WIDE)
    if not backward:
        return total
    total += _there(plan, size, size.ct, weighted=True) + _home(plan, size, size.ct)
    if plan.transport == "allgather":
        total += _leaves("reduce-scatter", world, world * pairs)  # gradients of the weights
    if plan.transport == "hierarchy":
        total += _leaves("reduce-scatter", plan.tp_size, size.arrived * _WIDE)
        total += _leaves("all-to-all", plan.ep_size // nodes, size.slots * _WIDE)
        total += _leaves("all-to-all", nodes, size.crossing * entries)
    return total


def _there(plan, size: _Size, message: int, weighted: bool = False) -> int:
    """Messages to the experts; ``weighted``: on a hierarchy they have the weights with them."""
    if plan.transport == "allgather":
        return _leaves("all-gather", plan.ep_size * plan.tp_size, plan.tokens_per_rank * message)
    total, ranks = 0, plan.ep_size
    if plan.transport == "hierarchy":
        ranks //= plan.num_nodes
        entries = plan.num_copies * _WIDE if weighted else 0
        total += _leaves("all-to-all", plan.num_nodes, size.crossing * (message + entries))
        message += _WIDE if weighted else 0
    total += _leaves("all-to-all", ranks, size.sent * message)
    return total + _leaves("all-gather", plan.tp_size, size.slots * message)


def _home(plan, size: _Size, message: int) -> int:
    """Rows from the experts."""
    if plan.transport == "allgather":
        return _leaves("reduce-scatter", plan.ep_size * plan.tp_size, size.everyone * size.wide)
    total = _leaves("reduce-scatter", plan.tp_size, size.arrived * plan.hidden * size.sum_item)
    if plan.transport == "hierarchy":
        total += _leaves("all-to-all", plan.ep_size // plan.num_nodes, size.slots * size.row)
        return total + _leaves("all-to-all", plan.num_nodes, size.crossing * message)
    return total + _leaves("all-to-all", plan.ep_size, size.returned * message)


def _sum_wire(plan, size: _Size, routed: _Ffn, shared: _Ffn, num_replicas: int, backward: bool) -> int:
    """What is summed over all devices: load and two counts; shares and a loss; gradients of replicated parameters.

    XLA makes one all-reduce of all that have a dtype and a group in common.
    """
    devices = plan.ep_size * plan.tp_size * num_replicas
    total = _leaves("all-reduce", num_replicas, _WIDE) + _leaves("all-reduce", devices, (plan.num_ids + 2) * _WIDE)
    floats = (plan.num_ids + 1) * _WIDE
    if not backward:
        return total + _leaves("all-reduce", devices, floats)
    floats += plan.hidden * plan.num_ids * _WIDE
    narrow = plan.hidden * (3 * plan.num_const_experts + shared.projections * shared.width) * size.sum_item
    sums = (floats + narrow,) if size.sum_item == _WIDE else (floats, narrow)
    of_replicas = routed.projections * routed.experts * plan.hidden * routed.width * _WIDE
    total += sum(_leaves("all-reduce", devices, handed) for handed in sums)
    return total + _leaves("all-reduce", num_replicas, of_replicas)


# Memory traffic.


def _row_traffic(plan, size: _Size, backward: bool) -> int:
    """Passes over rows but for products."""
    if not plan.exchanges:
        return _local_traffic(plan, size, backward)
    gathers, pairs = plan.transport == "allgather", plan.num_pairs
    tokens, everyone = plan.tokens_per_rank, size.everyone * plan.num_copies
    total = _pass_out(plan, size, tokens, size.out) + _pass_home(plan, size, size.back)
    if not backward:
        return total
    if gathers:  # of every choice of every token, <row, cotangent>
        total += tokens * (size.wide + size.row) + 2 * size.arrived * size.row + everyone * (size.row + size.wide)
        return total + _pass_out(plan, size, tokens, size.ct) + _pass_home(plan, size, size.ct)
    if plan.transport == "hierarchy":  # the same for every row that arrived
        total += tokens * (size.wide + size.row) + 4 * size.arrived * size.row
        return total + _pass_out(plan, size, tokens, size.ct) + _pass_home(plan, size, size.ct)
    total += 2 * (pairs * size.row + tokens * size.wide)  # cotangents of pairs and of weights
    return total + _pass_out(plan, size, pairs, size.ct) + _pass_home(plan, size, size.ct)


def _local_traffic(plan, size: _Size, backward: bool) -> int:
    """Of a device that exchanges nothing: a gather each way, of rows as recipes leave them; the sum at the tokens."""
    tokens, pairs = plan.tokens_per_rank, plan.num_pairs

    def there(rows, message):
        return 2 * _recoded(size, message, rows) + 2 * size.arrived * size.row

    def home(message):
        return 2 * _recoded(size, message, size.arrived) + 3 * pairs * size.row + tokens * size.wide

    total = there(tokens, size.out) + home(size.back)
    if backward:  # beside the same of cotangents: those of pairs and of weights
        total += 2 * (pairs * size.row + tokens * size.wide) + there(pairs, size.ct) + home(size.ct)
    return total


def _ragged_ends(plan, size: _Size, backward: bool) -> int:
    """Bytes of a pass over the rows at both ends of every ragged exchange."""
    messages = size.out + size.back + 2 * size.ct * backward
    return 2 * (size.sent + size.slots) * messages if plan.transport == "ragged" and plan.ep_size > 1 else 0


def _recoded(size: _Size, message: int, rows: int) -> int:
    """Rows into or out of a message that is no row."""
    return rows * (size.row + message) if message != size.row else 0


def _pass_out(plan, size: _Size, rows: int, message: int) -> int:
    """``rows`` as messages to the experts, and in their order there."""
    coded, world = _recoded(size, message, rows) + _recoded(size, message, size.arrived), plan.ep_size * plan.tp_size
    if plan.transport == "allgather":
        moved = (plan.tokens_per_rank + size.everyone) * message if world > 1 else 0
        return coded + moved + 2 * size.arrived * message
    packed = 2 * size.sent * message
    if plan.transport == "hierarchy":
        packed += 4 * size.crossing * message
    moved = (size.sent + size.slots) * message if plan.ep_size > 1 else 0
    gathered = (size.slots + size.arrived) * message if plan.tp_size > 1 else 0
    return coded + packed + moved + gathered + 2 * size.arrived * size.row


def _pass_home(plan, size: _Size, message: int) -> int:
    """Rows of products as messages to the tokens, and summed."""
    tokens = plan.tokens_per_rank
    if plan.transport == "allgather":
        sums = size.everyone * (plan.num_copies * size.row + size.wide)
        moved = (size.everyone + tokens) * size.wide if plan.ep_size * plan.tp_size > 1 else 0
        return 2 * _recoded(size, message, size.arrived) + sums + moved
    unplaced = 2 * size.arrived * size.row
    widened = 2 * size.wide if size.sum_item > size.itemsize else 0  # rows are cast for the sum, and cast back
    added = (size.arrived + size.slots) * (size.row + widened) if plan.tp_size > 1 else 0
    if plan.transport == "hierarchy":
        inside = 2 * size.slots * size.row if plan.ep_size > plan.num_nodes else 0
        sums = size.crossing * (plan.num_copies * size.row + size.wide + 3 * message)
        return unplaced + added + inside + sums + tokens * (plan.num_nodes * message + size.wide)
    moved = (size.slots + size.sent) * message if plan.ep_size > 1 else 0
    coded = _recoded(size, message, size.slots) + _recoded(size, message, plan.num_pairs)
    unpacked = plan.num_pairs * (2 * message + size.row) + tokens * size.wide
    return unplaced + added + moved + coded + unpacked


def _ffn_traffic(ffn: _Ffn, hidden: int, itemsize: int, backward: bool) -> int:
    """Each product reads two matrices and writes one; so do its two gradients. 16-bit weights are cast copies."""
    row, inner, count = hidden * itemsize, ffn.width * itemsize, ffn.projections
    weights = count * ffn.experts * hidden * ffn.width
    casts = weights * (_WIDE + itemsize) if itemsize != _WIDE else 0
    total = casts + weights * itemsize + ffn.rows * count * (row + 2 * inner)
    if not backward or not ffn.width:
        return total * bool(ffn.width)
    added = 3 * row if count == 3 else 0  # gate's and up's cotangents of a row
    return total + casts + 2 * weights * itemsize + ffn.rows * (2 * count * row + added + (5 * count - 1) * inner)


def _router_traffic(plan) -> int:
    tokens, hidden, ids = plan.tokens_per_rank, plan.hidden, plan.num_ids
    return (tokens * hidden + hidden * ids + tokens * ids) * _WIDE
