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
    """The experts of one kind, routed or shared, on one device.

    Attributes:
      rows: the rows of all of them.
      experts: how many there are.
      width: the width of one of them, the part that tp leaves it.
      activation: as for ``moe_on_mesh``.
      fused: what the kernels of the plan's back end do beside the products, see ``Size``.
    """

    rows: int
    experts: int
    width: int
    activation: Choice
    fused: tuple[str, ...] = ()

    @property
    def projections(self) -> int:
        return 3 if activation_of(self.activation).gated else 2

    @property
    def activates(self) -> bool:
        """Whether one kernel multiplies with gate and up, and activates."""
        return "gated_matmul" in self.fused and activation_of(self.activation).fusible


def experts_of(
    plan: "Plan", size: Size, ffn: int, activation: Choice, shared_ffn: int, shared_activation: Choice
) -> tuple[Ffn, Ffn]:
    """The routed and the shared experts of a device."""
    routed = Ffn(size.multiplied, plan.num_local_experts, ffn // plan.tp_size, activation, size.fused)
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
    """The step in which ranks agree on the number of rounds, where counts that they exchange do not tell it."""
    return Step(ROUTE, (Collective("all-reduce", plan.exchange_axes, WIDE),) if plan.max_rounds > 1 else ())


def _sums(plan: "Plan", size: Size, layout: Layout, routed: Ffn, shared: Ffn, backward: bool) -> list[Step]:
    """The steps that sum over all devices: load and counts, shares and a loss, gradients of replicated parameters.

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
    # Where replicas split weights, each device gets its part of the sum, which is then added over the other replicas.
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
    """The step that makes the weights of experts whole, where replicas split them: a gather for each projection."""
    part = _expert_weights(plan, routed) * WIDE // routed.projections // layout.group(layout.params).size
    return Step(PRODUCTS, (Collective("all-gather", layout.params, part),) * (routed.projections if part else 0))


def _expert_weights(plan: "Plan", routed: Ffn) -> int:
    """How many numbers the weights of a device's routed experts have, whole along H."""
    return routed.projections * routed.experts * plan.hidden * routed.width


def _local_steps(plan: "Plan", size: Size, backward: bool) -> list[Step]:
    """The steps of a device that exchanges nothing: a gather of rows each way, recipes, and the sum at the tokens."""
    tokens, pairs = plan.tokens_per_rank, plan.num_pairs

    def out(phase, rows, message):
        return Step(phase, (), 2 * recoded(size, message, rows) + 2 * size.arrived * size.row, launches=1)

    def back(phase, message):
        traffic = 2 * recoded(size, message, size.arrived) + 3 * pairs * size.row + tokens * size.wide
        return Step(phase, (), traffic, launches=2)

    found = [out(DISPATCH, tokens, size.out), back(COMBINE, size.back)]
    if backward:  # cotangents go the same ways, and those of pairs and weights are computed too
        beside = 2 * (pairs * size.row + tokens * size.wide)
        found += [out(COMBINE, pairs, size.ct), Step(COMBINE, (), beside, launches=2), back(DISPATCH, size.ct)]
    return found


def _ffn_steps(ffn: Ffn, hidden: int, itemsize: int, backward: bool) -> list[Step]:
    """Products and activation. A product and its gradients read two matrices and write one; 16-bit weights are cast."""
    if not ffn.width:
        return []
    row, inner, count = hidden * itemsize, ffn.width * itemsize, ffn.projections
    weights = count * ffn.experts * hidden * ffn.width
    casts, casting = (weights * (WIDE + itemsize), count) if itemsize != WIDE else (0, 0)
    if ffn.activates:  # one kernel reads a row and writes what goes into the last product, and what is kept beside it
        multiplied, multiplying = 2 * (row + inner) + (count - 1) * inner * backward, count - 1
        activated, activating = 0, 0
    else:
        multiplied, multiplying = count * (row + inner), count
        activated, activating = count * inner, 1
    products, launches = casts + weights * itemsize + ffn.rows * multiplied, multiplying + casting
    if backward:
        # The cotangents of a row from gate and up: the second product adds to what the first one wrote, or a pass does.
        in_place = "slot_matmul" in ffn.fused
        added = (row if in_place else 3 * row) if count == 3 else 0
        products += casts + 2 * weights * itemsize + ffn.rows * (2 * count * (row + inner) + added)
        launches += 2 * (count + casting) + (not in_place)
        # It is made again, and its cotangents: in one pass, or in two.
        activated += (2 * count if ffn.activates else 3 * count - 1) * inner
        activating += 1 if ffn.activates else 2
    return [Step(PRODUCTS, (), products, launches), Step(ACTIVATION, (), ffn.rows * activated, activating)]


def _router_traffic(plan: "Plan") -> int:
    tokens, hidden, ids = plan.tokens_per_rank, plan.hidden, plan.num_ids
    return (tokens * hidden + hidden * ids + tokens * ids) * WIDE
