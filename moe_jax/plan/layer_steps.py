"""The steps that every layer has, whatever its transport is: the router, the experts, and what is summed over devices.

The transport lists those of rows on their way (``Transport.steps``). A step is what ``moe_jax.plan.steps`` says.
"""

from typing import TYPE_CHECKING, NamedTuple

from moe_jax.activations import Choice, activation_of
from moe_jax.hardware import Machine
from moe_jax.plan.size import WIDE, Size, recoded
from moe_jax.plan.steps import (
    ACTIVATION,
    COMBINE,
    DISPATCH,
    GRADIENTS,
    PRODUCTS,
    ROUTE,
    Collective,
    Layout,
    Step,
)
from moe_jax.plan.transport_table import transport_of

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

# Kernels and steps of the router, the choice, counts and maps: as many as the compilers for v5e and H100 make of them.
_ROUTE_LAUNCHES = {"cpu": 40, "gpu": 40, "npu": 40, "tpu": 100}


class Ffn(NamedTuple):
    """Experts on one device."""

    rows: int  # of all of them
    experts: int
    width: int
    activation: Choice

    @property
    def projections(self) -> int:
        return 3 if activation_of(self.activation).gated else 2


def experts_of(
    plan: "Plan", size: Size, ffn: int, activation: Choice, shared_ffn: int, shared_activation: Choice
) -> tuple[Ffn, Ffn]:
    """(routed, shared)."""
    routed = Ffn(size.multiplied, plan.num_local_experts, ffn // plan.tp_size, activation)
    return routed, Ffn(plan.tokens_per_rank, 1, shared_ffn, shared_activation)


def steps_of(
    plan: "Plan", size: Size, layout: Layout, routed: Ffn, shared: Ffn, machine: Machine, backward: bool
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


def rounds_step(plan: "Plan") -> Step:
    """The ranks agree on the number of rounds, where they do not know it from the counts that they exchange."""
    return Step(ROUTE, (Collective("all-reduce", plan.exchange_axes, WIDE),) if plan.max_rounds > 1 else ())


def _sums(plan: "Plan", size: Size, layout: Layout, routed: Ffn, shared: Ffn, backward: bool) -> list[Step]:
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


def _gathers(plan: "Plan", layout: Layout, routed: Ffn) -> Step:
    """The weights of experts made whole, where they are split over replicas: one gather for each projection."""
    part = _expert_weights(plan, routed) * WIDE // routed.projections // layout.group(layout.params).size
    return Step(PRODUCTS, (Collective("all-gather", layout.params, part),) * (routed.projections if part else 0))


def _expert_weights(plan: "Plan", routed: Ffn) -> int:
    """Numbers in the weights of a device's routed experts, whole along H."""
    return routed.projections * routed.experts * plan.hidden * routed.width


def _local_steps(plan: "Plan", size: Size, backward: bool) -> list[Step]:
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


def _ffn_steps(ffn: Ffn, hidden: int, itemsize: int, backward: bool) -> list[Step]:
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


def _router_traffic(plan: "Plan") -> int:
    tokens, hidden, ids = plan.tokens_per_rank, plan.hidden, plan.num_ids
    return (tokens * hidden + hidden * ids + tokens * ids) * WIDE
