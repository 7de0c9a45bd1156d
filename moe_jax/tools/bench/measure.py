"""Compiles, checks and times one workload, and puts what it needs beside the theoretical minimum."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from moe_jax.layer.experts import is_gated
from moe_jax.plan.size import row_bytes
from moe_jax.tools.bench.check import check_agreement, check_layer, check_limit
from moe_jax.tools.bench.memory import HEAVY, free_bytes, give_back_freed_memory
from moe_jax.tools.bench.programs import LAYER, LIMIT, PASSES, Program, Setting, compile_programs
from moe_jax.tools.bench.timing import SLOW, SLOW_SECONDS, interleave, quotient, seconds_of
from moe_jax.tools.bench.workloads import rows_that_leave


def measure(
    setting: Setting,
    repeats: int,
    max_seconds: float,
    progress: Callable[[str], None],
    finished: Callable[[dict[str, Any], str], None],
) -> dict[str, Any]:
    """Compiles, checks and times one workload, one pass after the other; the record can be written as JSON.

    Args:
      setting: what to run.
      repeats: how many rounds of timing there are.
      max_seconds: contenders that need longer for a run, by their flops and the pace of the dense limit, are left out.
      progress: called with a few words about what is under way.
      finished: called with the record so far, and with the pass that has just been added to it.

    Returns:
      The workload's sizes, and ``pass_record`` of each pass.

    Raises:
      WrongResult: a program does not compute what it should.
    """
    workload, plan = setting.workload, setting.plan
    record = {
        "event": "workload",
        "workload": workload.name,
        "tokens_per_device": workload.tokens,
        **{name: getattr(workload, name) for name in ("hidden", "ffn", "num_experts", "top_k", "pattern")},
        **{name: getattr(plan, name) for name in ("dtype", "quant", "transport", "backend", "pair_capacity")},
        "mesh": dict(setting.mesh.shape),
        "limit_flops_per_device": setting.limit_flops,
        "phases": {},
    }
    for phase in PASSES:
        programs = {}
        for program in compile_programs(setting, phase):
            programs[program.name] = program
            progress(f"compiled {program.name}, {phase}, in {program.compile_seconds:.1f} s")
        notes: dict[str, str] = {}
        first, record["num_rounds"] = _first_runs(setting, programs, max_seconds, notes, progress)
        give_back_freed_memory()
        once = []
        for name in (name for name in first if name in setting.contenders):
            reason = _why_once(programs[name], first[name], first[LAYER], setting)
            if reason:
                notes[name] = f"{notes[name]}; 1 run: {reason}" if name in notes else f"1 run: {reason}"
                once.append(name)
        timed = {name: programs[name].run for name in first if name not in once}
        ahead = 2 * repeats * sum(first[name] for name in timed)
        progress(f"timing {len(timed)} programs, {phase}, {repeats} rounds: about {ahead:.0f} s")
        seconds = {**interleave(timed, repeats), **{name: [first[name]] for name in once}}
        record["phases"][phase] = pass_record(setting, phase, programs, seconds, notes, record["num_rounds"])
        finished(record, phase)
    return record


def _first_runs(setting, programs, max_seconds, notes, progress) -> tuple[dict[str, float], int]:
    """Runs and checks the programs of a pass once.

    Returns:
      Seconds by name, those of a second run for the limit and the layer, and of the only run for a contender; and the
      rounds that the layer took.
    """
    limit, layer = programs[LIMIT], programs[LAYER]
    forward = layer.phase == PASSES[0]
    result = limit.run()
    check_limit(setting, result if forward else result[0])
    del result
    expected = layer.run()
    y, stats = expected if forward else expected[0]
    check_layer(setting, (y, stats))
    seconds = {program.name: seconds_of(program.run) for program in (limit, layer)}
    for name in setting.contenders:
        program = programs[name]
        reason = _why_never(program, limit, seconds[LIMIT], max_seconds, setting.mesh.size)
        if reason:
            notes[name] = reason
            progress(f"{name}, {program.phase}: {reason}")
            continue
        results: list[Any] = []
        seconds[name] = seconds_of(lambda program=program, results=results: results.append(program.run()))
        note = check_agreement(setting, program, expected, results.pop())
        if note:
            notes[name] = note
        progress(f"checked {name}, {program.phase}")
    return seconds, int(stats.num_rounds)


def _why_once(program: Program, seconds: float, layer_seconds: float, setting: Setting) -> str | None:
    """Why one run, which took ``seconds``, is enough; None if more are wanted."""
    if seconds > max(SLOW * layer_seconds, SLOW_SECONDS):
        return f"slower than {SLOW:.0f} layers"
    free, needed = free_bytes(), _needed_bytes(program, setting.mesh.size)
    if free is not None and needed > HEAVY * free:  # it would leave too little memory to the others
        return f"takes {needed / 2**30:.0f} GiB of memory"
    return None


def _why_never(program: Program, limit: Program, limit_seconds: float, max_seconds: float, devices: int) -> str | None:
    """Why ``program`` cannot be run here; None if it can."""
    if program.contract.flops and limit.contract.flops:
        needed = limit_seconds * program.contract.flops / limit.contract.flops
        if needed > max_seconds:
            return f"not run: {program.contract.flops / limit.contract.flops:.0f} x the flops of the dense limit"
    free, needed = free_bytes(), _needed_bytes(program, devices)
    if free is not None and needed > free:
        give_back_freed_memory()
        free = free_bytes()
    if free is not None and needed > free:
        return f"not run: needs {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
    return None


def _needed_bytes(program: Program, devices: int) -> int:
    temporary, results = program.contract.temporary_bytes, program.contract.output_bytes
    assert temporary is not None and results is not None, "a program that was compiled here tells its memory"
    return devices * (temporary + results)


def pass_record(
    setting: Setting,
    phase: str,
    programs: dict[str, Program],
    seconds: dict[str, list[float]],
    notes: dict[str, str],
    num_rounds: int,
) -> dict[str, Any]:
    """The record of one pass, by program: quotients of times, raw seconds, contracts and minima.

    ``limit_over_layer`` is the dense limit's time over the layer's: 1 is the limit. ``speedups`` are a contender's time
    over the layer's. Minima are those of ``minima``, and wire bytes count the rounds that were taken.
    """
    contract = programs[LAYER].contract
    in_loops = contract.wire_bytes - contract.inline_wire_bytes
    return {
        "limit_over_layer": quotient(seconds[LIMIT], seconds[LAYER]),
        "speedups": {
            name: quotient(seconds[name], seconds[LAYER]) if name in seconds else None for name in setting.contenders
        },
        "notes": notes,
        "seconds": seconds,
        "compile_seconds": {name: program.compile_seconds for name, program in programs.items()},
        "wire_bytes": contract.inline_wire_bytes + (num_rounds - 1) * in_loops,
        "temporary_bytes": contract.temporary_bytes,
        "collectives": contract.counts,
        "collectives_in_loops": sum(c.in_loop for c in contract.collectives),
        "minimum": minima(setting, phase),
        "contracts": {name: program.contract.as_dict() for name, program in programs.items()},
    }


def minima(setting: Setting, phase: str) -> dict[str, float]:
    """What the layer cannot do without, per device (the mean over devices).

    wire_bytes: the bytes of the true rows that leave, out and back; with the backward pass those of their cotangents
    too, which are not quantised.
    temporary_bytes: what the products need at once, untiled and without recomputation: the rows of a balanced device
    and their hidden activations; with the backward pass the inputs of the activation instead of its result.
    collectives: one exchange each way and pass. There is no minimum of compile_seconds: those of the dense limit stand
    beside the layer's.
    """
    plan, ffn = setting.plan, setting.workload.ffn // setting.plan.tp_size
    leaving, item = rows_that_leave(setting.data.ids, plan), jnp.dtype(plan.dtype).itemsize
    ways = row_bytes(plan.quant, plan.hidden, plan.dtype) + row_bytes(plan.combine_quant, plan.hidden, plan.dtype)
    rows, kept = math.prod(setting.data.rows.shape[1:3]), 1
    exchanges = 2 if plan.ep_size > 1 else 0
    if phase != PASSES[0]:
        ways += 2 * row_bytes(plan.backward_quant, plan.hidden, plan.dtype)
        kept, exchanges = (2 if is_gated(setting.workload.activation) else 1), 2 * exchanges
    return {
        "wire_bytes": leaving * ways,
        "temporary_bytes": rows * (plan.hidden + kept * ffn) * item,
        "collectives": exchanges,
    }
