"""What one call of the layer costs one device: bytes on the wire, flops, memory traffic, and the time that they take.

Counted is the program of ``moe_on_mesh`` with fp32 parameters and no biases, in a round under an even load. What rows
cost, their transport knows: it lists its steps, see ``moe_jax.plan.steps``; the others are in ``layer_steps``.
"""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from moe_jax.activations import Choice, check_activation
from moe_jax.errors import InvalidArgumentError, UnsupportedError, check_choice, check_count
from moe_jax.hardware import Machine, machine_of
from moe_jax.kernels.table import PLATFORMS
from moe_jax.plan.checks import check_shared, machine_from, width_of_shared
from moe_jax.plan.layer_steps import experts_of, steps_of
from moe_jax.plan.size import Size
from moe_jax.plan.steps import (
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

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

PHASES = ("forward", "forward + backward")


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
    routed, shared = experts_of(plan, size, ffn, activation, shared_ffn, shared_activation)
    costs = {}
    for name in PHASES:
        backward = name == PHASES[1]
        steps = steps_of(plan, size, layout, routed, shared, machine, backward)
        even = steps_of(plan, transport.even_size(plan, size), layout, routed, shared, machine, backward)
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
    experts = experts_of(plan, size, ffn, activation, width_of_shared(plan, ffn, shared_ffn), of_shared)
    steps = steps_of(plan, transport_of(plan).even_size(plan, size), layout, *experts, machine, backward)
    return [exchange for step in steps for exchange in step.collectives], layout
