"""A plan in words."""

from typing import TYPE_CHECKING

from moe_jax.plan.cost import Cost, balanced_rows

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan


def describe(plan: "Plan", *, ffn: int | None, activation: str) -> str:
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
        costs = plan.cost(ffn or 0, activation=activation)
        lines += [f"cost       {phase}: {_words(cost, whole=bool(ffn))}" for phase, cost in costs.items()]
    return "\n".join(lines)


def _bytes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size:,} B" for name, size in sizes.items())


def _words(cost: Cost, *, whole: bool) -> str:
    """``whole``: whether the experts' products are in it."""
    even = "" if cost.even_wire_bytes == cost.wire_bytes else f" at most, {cost.even_wire_bytes:,} B under an even load"
    words = f"{cost.wire_bytes:,} B leave the device{even}; "
    if not whole:
        return words + f"{cost.traffic_bytes:,} B read and written but for products of experts"
    resource, seconds = cost.bound
    return words + (
        f"{cost.flops:,} flops; {cost.traffic_bytes:,} B read and written; {1e3 * seconds:.3g} ms bound by {resource} "
        f"(compute {1e3 * cost.compute_seconds:.3g}, memory {1e3 * cost.memory_seconds:.3g}, wire "
        f"{1e3 * cost.wire_seconds:.3g}, at nominal rates of {cost.hardware})"
    )
