"""A plan in words."""

import dataclasses
import math
from typing import TYPE_CHECKING

from moe_jax.activations import Choice
from moe_jax.plan.cost import PHASES, Cost, rows_cost
from moe_jax.plan.size import balanced_rows
from moe_jax.plan.steps import ACTIVATION, COMBINE, DISPATCH, PRODUCTS

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

_CHUNKS = (1, 2, 4, 8)  # numbers of chunks that are compared
_WORTH_SAYING = 0.98  # of the time; what saves less is not named


def describe(
    plan: "Plan",
    *,
    ffn: int | None,
    activation: Choice,
    shared_ffn: int | None,
    shared_activation: Choice | None,
) -> str:
    """``Plan.describe``: a line for each choice, with its reason, and for what the plan takes and costs."""
    balanced = balanced_rows(plan.tokens_per_rank, plan.top_k, plan.ep_size, plan.num_shared_ranks)
    slack = f", {plan.pair_capacity / balanced:.2f} x the balanced load" if balanced else ""
    lines = [
        f"mesh       ep={plan.ep_size} over {'*'.join(plan.ep_axis)}, tp={plan.tp_size} over {plan.tp_axis}"
        + (f", {plan.num_replicas} replicas over {'*'.join(plan.dp_axis)}" if plan.dp_axis else "")
        + f", on {plan.hardware.name}",
        f"tokens     {plan.tokens_per_rank} per device x {plan.hidden} {plan.dtype}, top {plan.top_k} of "
        f"{plan.num_ids} experts, {plan.num_experts} routed ({plan.num_local_experts} per rank), "
        f"{plan.num_zero_experts} zero, {plan.num_copy_experts} copy, {plan.num_const_experts} constant; "
        f"{plan.num_shared_experts} shared"
        + (f" on {plan.num_shared_ranks} ranks of their own" if plan.num_shared_ranks else ""),
        f"transport  {plan.transport}: {plan.transport_reason}",
        f"capacity   {plan.pair_capacity} rows per pair of ranks and round{slack}; "
        f"{plan.num_rows(plan.pair_capacity)} rows per device in a round of the layer, "
        f"{plan.num_rows(plan.dispatch_capacity)} in a call of dispatch alone"
        + (", the worst skew" if plan.overflow == "dropless" else ""),
        f"wire       out {plan.quant}, back {plan.combine_quant}, cotangents {plan.backward_quant}",
        f"overflow   {plan.overflow}, "
        + (f"at most {plan.max_rounds} rounds" if plan.overflow == "dropless" else "counting what does not fit"),
        f"backend    {plan.backend}: {plan.backend_reason}",
        f"workspace  of a round of the layer: {_bytes(plan.workspace())}",
        f"           of a call of dispatch alone, and combine: {_bytes(plan.workspace('dispatch'))}",
    ]
    if ffn is not None or not plan.num_shared_ranks:
        shared = {"shared_ffn": shared_ffn, "shared_activation": shared_activation} if ffn else {}
        costs = plan.cost(ffn or 0, activation=activation, **shared)
        lines += [f"cost       {phase}: {_words(cost, whole=bool(ffn))}" for phase, cost in costs.items()]
        if ffn and plan.exchanges:
            lines += [*_chunks_line(plan, costs[PHASES[1]]), *_capacity_line(plan, costs[PHASES[1]], balanced)]
    return "\n".join(lines)


def cost_words(cost: Cost) -> str:
    """The time of a candidate, and what it consists of."""
    parts = (
        f"{cost_bytes(cost)} sent in {_ms(cost.wire_seconds)}",
        f"{cost.traffic_bytes:,} B touched in {_ms(cost.memory_seconds)}",
        f"{_ms(cost.latency_seconds)} of latency",
    )
    return f"{_ms(cost.seconds)} ({', '.join(parts)})"


def cost_bytes(cost: Cost) -> str:
    """Bytes that leave a device under an even load, and which part of them goes to other nodes."""
    outside = sum(phase.between_bytes for phase in cost.phases)
    return f"{cost.even_wire_bytes:,} B" + (f", {outside:,} of them to other nodes," if outside else "")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _bytes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size:,} B" for name, size in sizes.items())


def _words(cost: Cost, *, whole: bool) -> str:
    """``whole``: whether the experts' products are in it."""
    even = "" if cost.even_wire_bytes == cost.wire_bytes else f" at most, {cost.even_wire_bytes:,} B under an even load"
    words = f"{cost.wire_bytes:,} B leave the device{even}; "
    if not whole:
        return words + f"{cost.traffic_bytes:,} B read and written but for products of experts"
    resource, _ = cost.bound
    phases = ", ".join(f"{phase.name} {1e3 * phase.seconds:.3g}" for phase in cost.phases if phase.seconds)
    return words + (
        f"{cost.flops:,} flops; {cost.traffic_bytes:,} B read and written; {_ms(cost.seconds)} bound by {resource} "
        f"(compute {1e3 * cost.compute_seconds:.3g}, memory {1e3 * cost.memory_seconds:.3g}, wire "
        f"{1e3 * cost.wire_seconds:.3g}, latency {1e3 * cost.latency_seconds:.3g}, at nominal rates of "
        f"{cost.hardware}; by phase: {phases})"
    )


def _chunks_line(plan: "Plan", cost: Cost) -> list[str]:
    """The number of chunks that should take the least time: one travels while another is multiplied."""
    phases = {phase.name: phase for phase in cost.phases}
    moving, computing = [phases[DISPATCH], phases[COMBINE]], [phases[PRODUCTS], phases[ACTIVATION]]
    wire = sum(phase.wire_seconds for phase in moving)
    work = sum(max(phase.compute_seconds, phase.memory_seconds) for phase in computing)
    latency = sum(phase.latency_seconds for phase in (*moving, *computing))
    # Of n chunks all but one hide the shorter of the two behind the longer; each pays for its own launches.
    seconds = {
        n: cost.seconds - (1 - 1 / n) * min(wire, work) + (n - 1) * latency
        for n in _CHUNKS
        if plan.tokens_per_rank and plan.tokens_per_rank % n == 0
    }
    best = min(seconds, key=lambda n: seconds[n], default=1)
    if best == 1 or seconds[best] > _WORTH_SAYING * cost.seconds:
        return []
    return [
        (
            f"chunks     {best} would take {_ms(seconds[best])} instead of {_ms(cost.seconds)}, {PHASES[1]}, where "
            "rows travel while others are multiplied"
        )
    ]


def _capacity_line(plan: "Plan", cost: Cost, balanced: float) -> list[str]:
    """What rows without a pair cost, where a round has room for them and its exchange carries them."""
    least = dataclasses.replace(plan, pair_capacity=max(1, math.ceil(balanced)))
    saved = rows_cost(plan).seconds - rows_cost(least).seconds
    if saved < (1 - _WORTH_SAYING) * cost.seconds:
        return []
    return [
        (
            f"           capacity_factor=1.0 would take {_ms(saved)} less, {PHASES[1]}, where routes are perfectly "
            "even, and a second round wherever they are not"
        )
    ]
