"""What is predicted of one question: memory, time and wire, as plain data that a row of a sweep can hold."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from moe_jax.errors import InvalidArgumentError, MeshError
from moe_jax.hardware import Machine
from moe_jax.plan import Plan
from moe_jax.plan.cost import PHASES, Cost, Phase
from moe_jax.plan.memory import Change, Memory, smallest_change
from moe_jax.tools.planner.meshes import resized
from moe_jax.tools.planner.question import Question

FORWARD, BOTH = PHASES
Found = dict[str, Any]


def predict(question: Question) -> Found:
    """The figures of the layer, per device.

    Returns:
      A dict with these keys:

      - "passes": the passes that are asked about. The last one is the one that counts: "forward + backward", or
        "forward" where nothing is trained.
      - "transport", "transport_reason", "experts_per_rank", "pair_capacity": what the plan decided.
      - "time": for each pass, "forward" and "forward + backward": its "seconds", what it is "bound" by, and the bytes
        that leave the device under an even load, "inside_bytes" and "between_bytes"; the same for each of its "phases";
        and exact counts, as in ``Cost``: "wire_bytes", "flops", "traffic_bytes".
      - "memory": for "one" and for "all" layers, bytes of "weights", "gradients", "optimizer", "activations" and
        "receive" buffers; by pass, "arguments", "results" and "temporaries" of the "programs" of one layer; the "peak"
        and the "moment" when it comes; whether it "fits", and the "smallest_change" by which it would.
      - "machine_bytes": the memory that a device has.
      - "tokens_per_second": how many tokens each device gets through one layer in the pass that counts.
      - "peak_share": the flops per second in that pass, as a share of what a device reaches.

    Raises:
      InvalidArgumentError, MeshError: the plan refuses the question.
    """
    plan, moe_config = question.plan(), question.config.moe
    costs = plan.cost(**moe_config.widths)
    time = {name: _time(cost, question.machine) for name, cost in costs.items()}
    last = time[question.passes[-1]]
    return {
        "passes": list(question.passes),
        "transport": plan.transport,
        "transport_reason": plan.transport_reason,
        "experts_per_rank": plan.num_local_experts,
        "pair_capacity": plan.pair_capacity,
        "time": time,
        "memory": {
            "one": _memory(question, memory_of(question, plan, 1)),
            "all": _memory(question, memory_of(question, plan, question.layers)),
        },
        "machine_bytes": question.machine.memory_bytes,
        "tokens_per_second": plan.tokens_per_rank / last["seconds"] if last["seconds"] else 0.0,
        "peak_share": last["flops"] / last["seconds"] / _peak(question) if last["seconds"] else 0.0,
    }


def peak_as_compiled(found: Found, told: dict[str, Any]) -> int:
    """The largest moment of all layers, where the layer at work takes what its compiler says (``compile_layer``)."""
    memory = found["memory"]["all"]
    pass_name = found["passes"][-1]
    return memory["peak"] - sum(memory["programs"][pass_name].values()) + told[pass_name]["memory_bytes"]


def _time(cost: Cost, machine: Machine) -> dict[str, Any]:
    phases = {
        phase.name: {
            "seconds": phase.seconds,
            "bound": _bound(phase, machine),
            "inside_bytes": phase.inside_bytes,
            "between_bytes": phase.between_bytes,
        }
        for phase in cost.phases
    }
    return {
        "seconds": cost.seconds,
        "bound": _bound(cost, machine),
        "phases": phases,
        "inside_bytes": sum(phase["inside_bytes"] for phase in phases.values()),
        "between_bytes": sum(phase["between_bytes"] for phase in phases.values()),
        "wire_bytes": cost.wire_bytes,
        "flops": cost.flops,
        "traffic_bytes": cost.traffic_bytes,
    }


def _bound(cost: Cost | Phase, machine: Machine) -> str:
    """What takes longest; for the wire, whether in nodes or between them; "" where nothing takes time."""
    name, seconds = cost.bound
    if name != "wire" or machine.between is None:
        return name if seconds else ""
    return "wire between nodes" if 2 * cost.between_seconds > cost.wire_seconds else "wire in node"


def memory_of(question: Question, plan: Plan, layers: int, chunks: int = 1) -> Memory:
    """What a device has in its memory with so many layers."""
    moe_config, terms = question.config.moe, question.terms
    return plan.memory(
        **moe_config.widths,
        weigh_inputs=moe_config.weigh_inputs,
        layers=layers,
        optimizer=terms.optimizer,
        remat=terms.remat,
        chunks=chunks,
        hardware=question.machine,
    )


def check_fits(question: Question, plan: Plan) -> None:
    """Raises MemoryLimitError where one layer does not fit. The text names the smallest change with which it would."""
    memory = memory_of(question, plan, 1)
    if not memory.fits():
        raise memory.refusal(memory.machine, _change_of(question, memory))


def _change_of(question: Question, memory: Memory) -> str:
    """The smallest change by which ``memory`` would fit if the question were asked with it."""
    return smallest_change(memory, memory.machine, lambda change: _changed(question, change, memory.layers))


def _changed(question: Question, change: Change, layers: int) -> Memory | None:
    """The memory of the plan that is made with ``change``, by the transport that is best then."""
    config, terms = question.config, question.terms
    terms = dataclasses.replace(terms, remat=change.memory.question.remat)
    if change.name in ("ep", "tp"):
        mesh = resized(question.mesh, question.machine, **{change.name: int(change.value)})
        config = dataclasses.replace(config, mesh=mesh)
    elif change.name == "tokens_per_rank":
        terms = dataclasses.replace(terms, tokens=int(change.value))
    elif change.name == "capacity_factor":
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, capacity_factor=change.value))
    changed = dataclasses.replace(question, config=config, terms=terms)
    try:
        plan = changed.plan()
    except (InvalidArgumentError, MeshError):
        return None
    return memory_of(changed, plan, layers, chunks=int(change.value) if change.name == "chunks" else 1)


def _memory(question: Question, memory: Memory) -> dict[str, Any]:
    fits = memory.fits()
    programs = {FORWARD: memory.forward, **({} if memory.backward is None else {BOTH: memory.backward})}
    return {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "receive": memory.receive,
        "programs": {
            name: {"arguments": p.arguments, "results": p.results, "temporaries": p.temporaries}
            for name, p in programs.items()
        },
        "peak": memory.peak,
        "moment": memory.moment,
        "fits": fits,
        "smallest_change": None if fits else _change_of(question, memory),
    }


def _peak(question: Question) -> float:
    """Flops per second that a device reaches in products of rows."""
    narrow = jnp.dtype(question.dtype).itemsize < 4
    return question.machine.flops16 if narrow else question.machine.flops32
