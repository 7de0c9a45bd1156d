"""One workload: compiled, checked, timed, and put beside its theoretical minimum."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from moe_jax.bench.check import check_agreement, check_layer, check_limit
from moe_jax.bench.memory import HEAVY, free_bytes, give_back_freed_memory
from moe_jax.bench.programs import LAYER, LIMIT, PASSES, Program, Setting, compile_programs
from moe_jax.bench.timing import SLOW, SLOW_SECONDS, interleave, quotient, seconds_of
from moe_jax.bench.workloads import rows_that_leave
from moe_jax.experts import is_gated
from moe_jax.plan.cost import row_bytes

Key = tuple[str, str]


def measure(setting: Setting, repeats: int, max_seconds: float, progress: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one workload, ready for JSON; see ``record``.

    Args:
      setting: what to run.
      repeats: rounds of timing.
      max_seconds: contenders that need longer for a run, by their flops and the pace of the dense limit, are left out.
      progress: takes a few words.

    Raises:
      WrongResult: a program does not compute what it should.
    """
    programs = {}
    for program in compile_programs(setting):
        programs[program.key] = program
        progress(f"compiled {program.name}, {program.phase}, in {program.compile_seconds:.1f} s")
    notes: dict[Key, str] = {}
    first, num_rounds = _first_runs(setting, programs, max_seconds, notes, progress)
    give_back_freed_memory()
    once = []
    for key in (key for key in first if key[0] in setting.contenders):
        reason = _why_once(programs[key], first[key], first[LAYER, key[1]], setting)
        if reason:
            _add_note(notes, key, f"1 run: {reason}")
            once.append(key)
    timed = {key: programs[key].run for key in first if key not in once}
    progress(f"timing {len(timed)} programs, {repeats} rounds")
    seconds = {**interleave(timed, repeats), **{key: [first[key]] for key in once}}
    return record(setting, programs, seconds, notes, num_rounds)


def _first_runs(setting, programs, max_seconds, notes, progress) -> tuple[dict[Key, float], int]:
    """Runs and checks everything once.

    Returns:
      Seconds by key, of a second run of limit and layer, and of the only run of a contender; the layer's rounds.
    """
    seconds: dict[Key, float] = {}
    num_rounds = 0
    for phase in PASSES:
        limit, layer = programs[LIMIT, phase], programs[LAYER, phase]
        result = limit.run()
        check_limit(setting, result if phase == PASSES[0] else result[0])
        expected = layer.run()
        y, stats = expected if phase == PASSES[0] else expected[0]
        check_layer(setting, (y, stats))
        num_rounds = int(stats.num_rounds)
        del result
        seconds[limit.key], seconds[layer.key] = seconds_of(limit.run), seconds_of(layer.run)
        for name in setting.contenders:
            program = programs[name, phase]
            reason = _why_never(program, limit, seconds[limit.key], max_seconds, setting.mesh.size)
            if reason:
                notes[program.key] = reason
                progress(f"{name}, {phase}: {reason}")
                continue
            results: list[Any] = []
            seconds[program.key] = seconds_of(lambda program=program, results=results: results.append(program.run()))
            note = check_agreement(setting, program, expected, results.pop())
            if note:
                notes[program.key] = note
            progress(f"checked {name}, {phase}")
    return seconds, num_rounds


def _why_once(program: Program, seconds: float, layer_seconds: float, setting: Setting) -> str | None:
    """Why one run, of so many seconds, is enough; None: it is not."""
    if seconds > max(SLOW * layer_seconds, SLOW_SECONDS):
        return f"slower than {SLOW:.0f} layers"
    free, needed = free_bytes(), _needed_bytes(program, setting.mesh.size)
    if free is not None and needed > HEAVY * free:  # all others would find their memory gone
        return f"takes {needed / 2**30:.0f} GiB of memory"
    return None


def _why_never(program: Program, limit: Program, limit_seconds: float, max_seconds: float, devices: int) -> str | None:
    """Why ``program`` cannot be run here; None: it can."""
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
    return devices * (program.contract.temporary_bytes + program.contract.output_bytes)


def _add_note(notes: dict[Key, str], key: Key, text: str) -> None:
    notes[key] = f"{notes[key]}; {text}" if key in notes else text


def record(
    setting: Setting,
    programs: dict[Key, Program],
    seconds: dict[Key, list[float]],
    notes: dict[Key, str],
    num_rounds: int,
) -> dict[str, Any]:
    """The workload's sizes, and for each pass: quotients of times, raw seconds, contracts and minima.

    ``limit_over_layer`` is the dense limit's time over the layer's: 1 is the limit. ``speedups`` are a contender's time
    over the layer's. Minima are those of ``minima``; wire bytes are those of the rounds that were taken.
    """
    workload, plan = setting.workload, setting.plan
    phases = {}
    for phase in PASSES:
        layer = seconds[LAYER, phase]
        contract = programs[LAYER, phase].contract
        in_loops = contract.wire_bytes - contract.inline_wire_bytes
        phases[phase] = {
            "limit_over_layer": quotient(seconds[LIMIT, phase], layer),
            "speedups": {
                name: quotient(seconds[name, phase], layer) if (name, phase) in seconds else None
                for name in setting.contenders
            },
            "notes": {name: text for (name, noted), text in notes.items() if noted == phase},
            "seconds": {name: values for (name, timed), values in seconds.items() if timed == phase},
            "compile_seconds": {name: p.compile_seconds for (name, made), p in programs.items() if made == phase},
            "wire_bytes": contract.inline_wire_bytes + (num_rounds - 1) * in_loops,
            "temporary_bytes": contract.temporary_bytes,
            "collectives": contract.counts,
            "collectives_in_loops": sum(c.in_loop for c in contract.collectives),
            "minimum": minima(setting, phase),
            "contracts": {name: p.contract.as_dict() for (name, made), p in programs.items() if made == phase},
        }
    return {
        "event": "workload",
        "workload": workload.name,
        "tokens_per_device": workload.tokens,
        **{name: getattr(workload, name) for name in ("hidden", "ffn", "num_experts", "top_k", "pattern")},
        **{name: getattr(plan, name) for name in ("dtype", "quant", "transport", "backend", "pair_capacity")},
        "mesh": dict(setting.mesh.shape),
        "num_rounds": num_rounds,
        "limit_flops_per_device": setting.limit_flops,
        "phases": phases,
    }


def minima(setting: Setting, phase: str) -> dict[str, float]:
    """What the layer cannot do without, per device (the mean over devices).

    wire_bytes: the true rows that leave, there and back; with the backward pass their cotangents too, unquantised.
    temporary_bytes: what the products need at once, untiled and without recomputation: the rows of a balanced device
    and their hidden activations; with the backward pass the inputs of the activation instead of its result.
    collectives: one exchange each way and pass. compile_seconds is not here: the dense limit's stands beside it.
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
