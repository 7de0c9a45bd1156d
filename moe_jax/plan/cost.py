"""What one call of the layer costs one device: bytes on the wire, flops, memory traffic, and the time that they take.

Counted is the program of ``moe_on_mesh`` with fp32 parameters and no biases, in a round under an even load. What rows
cost, their transport knows: it lists its steps, see ``moe_jax.plan.steps``.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from moe_jax.activations import Choice, activation_of, check_activation
from moe_jax.errors import InvalidArgumentError, UnsupportedError, check_choice, check_count
from moe_jax.hardware import Machine, machine_of
from moe_jax.kernels.table import PLATFORMS
from moe_jax.plan.checks import check_shared, machine_from, width_of_shared
from moe_jax.plan.steps import (
    ACTIVATION,
    COMBINE,
    DISPATCH,
    GRADIENTS,
    PRODUCTS,
    ROUTE,
    STEP_PHASES,
    Collective,
    Layout,
    Sent,
    Step,
    bytes_of,
    sent_by,
)
from moe_jax.plan.transport_table import transport_of
from moe_jax.quant import recipe

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

PHASES = ("forward", "forward + backward")
# Kernels and steps of the router, the choice, counts and maps: as many as the compilers for v5e and H100 make of them.
_ROUTE_LAUNCHES = {"cpu": 40, "gpu": 40, "npu": 40, "tpu": 100}
WIDE = 4  # bytes of an integer, a weight, a term of a sum, a number in a parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """What one phase of the layer costs one device under an even load.

    Attributes:
      name: "route" (the router, its statistics, counts and maps), "dispatch", "products", "activation", "combine" or
        "gradients" (their sums over devices). What the backward pass does of each counts with it.
      inside_bytes: what leaves the device for others of its node.
      between_bytes: what leaves it for other nodes.
      flops: of products.
      traffic_bytes: what is read from memory and written to it.
      launches: kernels and steps of a program that are started, and exchanges.
      compute_seconds: of the flops, at the rate of their dtype.
      memory_seconds: of the traffic.
      wire_seconds: of the bytes that leave; in each exchange the slower kind of links decides.
      between_seconds: those of ``wire_seconds`` in which the links between nodes are the slower ones.
      latency_seconds: of exchanges and launches, however little they do.
    """

    name: str
    inside_bytes: int
    between_bytes: int
    flops: int
    traffic_bytes: int
    launches: int
    compute_seconds: float
    memory_seconds: float
    wire_seconds: float
    between_seconds: float
    latency_seconds: float

    @property
    def seconds(self) -> float:
        """The time of the phase: products pass while memory is read; exchanges and latencies are added to that."""
        return max(self.compute_seconds, self.memory_seconds) + self.wire_seconds + self.latency_seconds

    @property
    def bound(self) -> tuple[str, float]:
        """What takes longest, "compute", "memory", "wire" or "latency", and the seconds that it takes by itself."""
        return _longest(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One device, one pass: "forward", or "forward + backward".

    Beside the fields below: ``inside_bytes`` and ``between_bytes`` are those of ``wire_bytes`` that stay inside a node
    and that go to other nodes, where the machine has nodes; ``even_wire_bytes`` are those of ``wire_bytes`` that an
    even load fills, all but for "ragged"; ``router_flops`` are those of ``flops`` that the router takes, in fp32
    whatever the rows are; ``hardware`` names the machine, of ``platform``, whose rates give all seconds; ``phases`` are
    those of the layer in their order, under an even load, each a ``Phase``. ``seconds`` is their sum, as if nothing
    passed while something else does but memory traffic and products; ``compute_seconds``, ``memory_seconds``,
    ``wire_seconds``, ``between_seconds`` and ``latency_seconds`` are the sums of theirs.

    ``wire_bytes``: what ``moe_jax.hlo.contract`` counts as ``inline_wire_bytes`` of the compiled layer: rows, and
    beside them counts, weights, the router's statistics and the gradients of parameters that several devices hold. A
    ragged exchange counts with the extent of its operand, as it does there; where it is emulated, as on CPUs, it runs
    in a loop, and is not counted there. Without tokens XLA drops sums of nothing, which are counted here. The backward
    pass is asked for the gradients of parameters and x, and not through the losses.

    ``flops``: of all products with weights, a multiplication and an addition being two. Experts multiply as many rows
    as one has under an even load, each.

    ``traffic_bytes``: what passes over rows and weights read and write, each in full, wherever it comes from. A pass is
    a copy (pack, exchange, permute, unpermute, unpack), a change of format, an activation, a sum or a product. Indices
    do not count. A partial sum of "allgather" reads a row for every choice of every token of all ranks, whether the
    row is there or not.
    """

    wire_bytes: int
    even_wire_bytes: int
    inside_bytes: int
    between_bytes: int
    flops: int
    router_flops: int
    traffic_bytes: int
    hardware: str
    platform: str
    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """The estimated time: the sum over the phases."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def compute_seconds(self) -> float:
        """Of all products."""
        return sum(phase.compute_seconds for phase in self.phases)

    @property
    def memory_seconds(self) -> float:
        """Of all memory traffic."""
        return sum(phase.memory_seconds for phase in self.phases)

    @property
    def wire_seconds(self) -> float:
        """Of all bytes that leave the device."""
        return sum(phase.wire_seconds for phase in self.phases)

    @property
    def between_seconds(self) -> float:
        """Of ``wire_seconds``, those in which the links between nodes are the slower ones."""
        return sum(phase.between_seconds for phase in self.phases)

    @property
    def latency_seconds(self) -> float:
        """Of all exchanges and launches, however little they do."""
        return sum(phase.latency_seconds for phase in self.phases)

    @property
    def bound(self) -> tuple[str, float]:
        """What takes longest, "compute", "memory", "wire" or "latency", and the seconds that it takes by itself."""
        return _longest(self)


def _longest(cost: Phase | Cost) -> tuple[str, float]:
    seconds = {
        "compute": cost.compute_seconds,
        "memory": cost.memory_seconds,
        "wire": cost.wire_seconds,
        "latency": cost.latency_seconds,
    }
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
    activation: Choice,
    shared_ffn: int | None,
    shared_activation: Choice | None,
    num_replicas: int | None,
    platform: str | None,
    hardware: str | Machine | None,
) -> dict[str, Cost]:
    """``Plan.cost``: checks the arguments, and takes from the plan what is not given."""
    check_count("ffn", ffn, low=0)
    if ffn % plan.tp_size:
        raise InvalidArgumentError(f"ffn={ffn} must be divisible by tp={plan.tp_size}")
    check_activation(activation)
    check_shared(plan, shared_ffn, shared_activation)
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
    return layer_costs(
        plan,
        machine,
        ffn=ffn,
        activation=activation,
        shared_ffn=width_of_shared(plan, ffn, shared_ffn),
        shared_activation=activation if shared_activation is None else shared_activation,
        num_replicas=num_replicas,
    )


def layer_costs(
    plan: "Plan",
    machine: Machine,
    *,
    ffn: int,
    activation: Choice,
    shared_ffn: int,
    shared_activation: Choice,
    num_replicas: int,
) -> dict[str, Cost]:
    """The costs of both passes; ``ffn`` 0 leaves out everything that has the width of an expert. See ``Plan.cost``."""
    size = Size.of(plan, machine.widened)
    transport, layout = transport_of(plan), Layout.of(plan, machine, num_replicas)
    routed, shared = _experts(plan, size, ffn, activation, shared_ffn, shared_activation)
    costs = {}
    for name in PHASES:
        backward = name == PHASES[1]
        steps = _steps(plan, size, layout, routed, shared, machine, backward)
        even = _steps(plan, transport.even_size(plan, size), layout, routed, shared, machine, backward)
        passes = 3 if backward else 1  # the gradient of a product takes two
        router = passes * 2 * plan.tokens_per_rank * plan.hidden * plan.num_ids
        flops = passes * sum(2 * f.projections * f.rows * plan.hidden * f.width for f in (routed, shared))
        rate = machine.flops32 if size.itemsize == 4 else machine.flops16
        products = {ROUTE: (router, router / machine.flops32), PRODUCTS: (flops, flops / rate)}
        inside, between = _bytes_of_all(steps, layout)
        costs[name] = Cost(
            wire_bytes=inside + between,
            even_wire_bytes=sum(_bytes_of_all(even, layout)),
            inside_bytes=inside,
            between_bytes=between,
            flops=flops + router,
            router_flops=router,
            traffic_bytes=sum(step.traffic for step in even),
            hardware=machine.name,
            platform=machine.platform,
            phases=tuple(
                _phase(phase, even, *products.get(phase, (0, 0.0)), layout, machine, transport.wire_share(machine))
                for phase in STEP_PHASES
            ),
        )
    return costs


def rows_cost(plan: "Plan") -> Cost:
    """Of a forward and a backward pass, all that a transport decides: everything but what has the width of an FFN."""
    no_experts = {"ffn": 0, "activation": "swiglu", "shared_ffn": 0, "shared_activation": "swiglu"}
    return layer_costs(plan, plan.hardware, **no_experts, num_replicas=plan.num_replicas)[PHASES[1]]


def _bytes_of_all(steps: Iterable[Step], layout: Layout) -> tuple[int, int]:
    """(inside, between) of all exchanges of ``steps``."""
    pairs = [bytes_of(c, layout.group(c.axes)) for step in steps for c in step.collectives]
    return sum(inside for inside, _ in pairs), sum(between for _, between in pairs)


def _phase(
    name: str,
    steps: list[Step],
    flops: int,
    compute_seconds: float,
    layout: Layout,
    machine: Machine,
    wire_share: float,
) -> Phase:
    """The sum of the steps of one phase, as time on ``machine``."""
    steps = [step for step in steps if step.phase == name]
    exchanges = [sent_by(c, layout, machine, wire_share) for step in steps for c in step.collectives]
    sent = sum(exchanges, Sent())
    traffic, launches = sum(step.traffic for step in steps), sum(step.launches for step in steps)
    return Phase(
        name=name,
        inside_bytes=sent.inside,
        between_bytes=sent.between,
        flops=flops,
        traffic_bytes=traffic,
        launches=launches + sum(each.latency > 0 for each in exchanges),
        compute_seconds=compute_seconds,
        memory_seconds=traffic / machine.memory_bandwidth,
        wire_seconds=sent.seconds,
        between_seconds=sent.between_seconds,
        latency_seconds=sent.latency + launches * machine.launch_seconds,
    )


def even_exchanges(
    plan: "Plan",
    backward: bool,
    *,
    ffn: int,
    activation: Choice,
    shared_ffn: int | None,
    shared_activation: Choice | None,
) -> tuple[list[Collective], Layout]:
    """The exchanges whose bytes the phases of ``Plan.cost`` sum up, and how the devices lie that make them."""
    machine, of_shared = plan.hardware, activation if shared_activation is None else shared_activation
    size, layout = Size.of(plan, machine.widened), Layout.of(plan, machine, plan.num_replicas)
    experts = _experts(plan, size, ffn, activation, width_of_shared(plan, ffn, shared_ffn), of_shared)
    steps = _steps(plan, transport_of(plan).even_size(plan, size), layout, *experts, machine, backward)
    return [exchange for step in steps for exchange in step.collectives], layout


def _experts(
    plan: "Plan", size: "Size", ffn: int, activation: Choice, shared_ffn: int, shared_activation: Choice
) -> tuple["_Ffn", "_Ffn"]:
    """(routed, shared)."""
    routed = _Ffn(size.multiplied, plan.num_local_experts, ffn // plan.tp_size, activation)
    return routed, _Ffn(plan.tokens_per_rank, 1, shared_ffn, shared_activation)


class _Ffn(NamedTuple):
    """Experts on one device."""

    rows: int  # of all of them
    experts: int
    width: int
    activation: Choice

    @property
    def projections(self) -> int:
        return 3 if activation_of(self.activation).gated else 2


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


# The steps that every layer has, whatever its transport is.


def _steps(
    plan: "Plan", size: "Size", layout: Layout, routed: "_Ffn", shared: "_Ffn", machine: Machine, backward: bool
) -> list[Step]:
    """All steps of the layer."""
    transport = transport_of(plan)
    of_rows = transport.steps(plan, size, backward) if plan.exchanges else _local_steps(plan, size, backward)
    passes = 3 if backward else 1
    route = Step(
        ROUTE, traffic=passes * _router_traffic(plan), launches=_ROUTE_LAUNCHES[machine.platform] + 4 * backward
    )
    return [
        route,
        *of_rows,
        *(transport.added_steps(plan, size, machine, backward) if plan.exchanges else []),
        *(step for f in (routed, shared) for step in _ffn_steps(f, plan.hidden, size.itemsize, backward)),
        _gathers(plan, layout, routed),
        *_sums(plan, size, layout, routed, shared, backward),
    ]


def _sums(plan: "Plan", size: "Size", layout: Layout, routed: "_Ffn", shared: "_Ffn", backward: bool) -> list[Step]:
    """What is summed over all devices: load and two counts; shares and a loss; gradients of replicated parameters.

    XLA makes one all-reduce of all that have a dtype and a group in common.
    """
    everyone, replicas = (*layout.replicas, *plan.exchange_axes), layout.replicas
    rounds = Collective("all-reduce", replicas, WIDE)
    counts = Collective("all-reduce", everyone, (plan.num_ids + 2) * WIDE)
    floats = (plan.num_ids + 1) * WIDE
    if not backward:
        return [Step(ROUTE, (rounds, counts, Collective("all-reduce", everyone, floats)))]
    floats += plan.hidden * plan.num_ids * WIDE
    narrow = plan.hidden * (3 * plan.num_const_experts + shared.projections * shared.width) * size.sum_item
    sums = (floats + narrow,) if size.sum_item == WIDE else (floats, narrow)
    # Of weights that are split over replicas each device gets its part of the sum, which is then added over the others.
    of_experts = _expert_weights(plan, routed) * WIDE
    others = tuple(name for name in replicas if name not in layout.params)
    experts = (
        Collective("reduce-scatter", layout.params, of_experts),
        Collective("all-reduce", others, of_experts // layout.group(layout.params).size),
    )
    replicated = tuple(Collective("all-reduce", everyone, handed) for handed in sums)
    exchanges = tuple(exchange for exchange in (*replicated, *experts) if exchange.handed)
    return [Step(ROUTE, (rounds, counts)), Step(GRADIENTS, exchanges)]


def _gathers(plan: "Plan", layout: Layout, routed: "_Ffn") -> Step:
    """The weights of experts made whole, where they are split over replicas: one gather for each projection."""
    part = _expert_weights(plan, routed) * WIDE // routed.projections // layout.group(layout.params).size
    return Step(PRODUCTS, (Collective("all-gather", layout.params, part),) * (routed.projections if part else 0))


def _expert_weights(plan: "Plan", routed: "_Ffn") -> int:
    """Numbers in the weights of a device's routed experts, whole along H."""
    return routed.projections * routed.experts * plan.hidden * routed.width


def rounds_step(plan: "Plan") -> Step:
    """The ranks agree on the number of rounds, where they do not know it from the counts that they exchange."""
    return Step(ROUTE, (Collective("all-reduce", plan.exchange_axes, WIDE),) if plan.max_rounds > 1 else ())


def _local_steps(plan: "Plan", size: "Size", backward: bool) -> list[Step]:
    """Of a device that exchanges nothing: a gather each way, of rows as recipes leave them; the sum at the tokens."""
    tokens, pairs = plan.tokens_per_rank, plan.num_pairs

    def out(phase, rows, message):
        return Step(phase, (), 2 * recoded(size, message, rows) + 2 * size.arrived * size.row, launches=1)

    def back(phase, message):
        traffic = 2 * recoded(size, message, size.arrived) + 3 * pairs * size.row + tokens * size.wide
        return Step(phase, (), traffic, launches=2)

    found = [out(DISPATCH, tokens, size.out), back(COMBINE, size.back)]
    if backward:  # cotangents take the same ways; beside that, those of pairs and of weights are made
        beside = 2 * (pairs * size.row + tokens * size.wide)
        found += [out(COMBINE, pairs, size.ct), Step(COMBINE, (), beside, launches=2), back(DISPATCH, size.ct)]
    return found


def _ffn_steps(ffn: "_Ffn", hidden: int, itemsize: int, backward: bool) -> list[Step]:
    """Each product reads two matrices and writes one; so do its two gradients. 16-bit weights are cast copies."""
    if not ffn.width:
        return []
    row, inner, count = hidden * itemsize, ffn.width * itemsize, ffn.projections
    weights = count * ffn.experts * hidden * ffn.width
    casts = weights * (WIDE + itemsize) if itemsize != WIDE else 0
    products, activated = casts + weights * itemsize + ffn.rows * count * (row + inner), ffn.rows * count * inner
    launches, activations = count + (count if casts else 0), 1
    if backward:
        added = 3 * row if count == 3 else 0  # gate's and up's cotangents of a row
        products += casts + 2 * weights * itemsize + ffn.rows * (2 * count * (row + inner) + added)
        activated += ffn.rows * (3 * count - 1) * inner  # made again, and its cotangents
        launches, activations = 3 * launches + 1, 3
    return [Step(PRODUCTS, (), products, launches), Step(ACTIVATION, (), activated, activations)]


# Memory traffic.


def unplaced_bytes(plan: "Plan", size: Size) -> int:
    """Rows of products put into the slots that they came in, and added over tp."""
    widened = 2 * size.wide if size.sum_item > size.itemsize else 0  # rows are cast for the sum, and cast back
    added = (size.arrived + size.slots) * (size.row + widened) if plan.tp_size > 1 else 0
    return 2 * size.arrived * size.row + added


def recoded(size: Size, message: int, rows: int) -> int:
    """Rows into or out of a message that is no row."""
    return rows * (size.row + message) if message != size.row else 0


def _router_traffic(plan: "Plan") -> int:
    tokens, hidden, ids = plan.tokens_per_rank, plan.hidden, plan.num_ids
    return (tokens * hidden + hidden * ids + tokens * ids) * WIDE
