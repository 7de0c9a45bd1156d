"""A measured workload in words: quotients of times, and bytes beside their minima.

Absolute times would say little about another machine; only those of compilation are told.
"""

from typing import Any

from moe_jax.plan import Plan
from moe_jax.tools.bench.programs import BASELINES, LAYER, LIMIT, MINIMAL, PASSES
from moe_jax.tools.bench.workloads import Workload

_NAME = 34


def describe_workload(name: str, workload: Workload, plan: Plan) -> str:
    """The line above the rows of a workload."""
    return (
        f"{name}  {workload.tokens} tokens per device x {plan.hidden} {plan.dtype}, ffn {workload.ffn}, "
        f"top {plan.top_k} of {plan.num_experts}, {workload.pattern}; wire {plan.quant}, {plan.transport}, "
        f"{plan.backend}"
    )


def describe_pass(record: dict[str, Any], phase: str) -> str:
    """The rows of one pass of a workload."""
    found, rounds = record["phases"][phase], record["num_rounds"]
    lines = [
        f"  {phase}" + (f", {rounds} rounds" if rounds > 1 else ""),
        _line("of the dense limit", _quotient(found["limit_over_layer"])),
        *(_line(f"faster than {name}", _speedup(found, name)) for name in found["speedups"]),
        _beside("compile, s", {name: f"{seconds:.1f}" for name, seconds in found["compile_seconds"].items()}),
        _beside("instructions", {name: f"{c['num_instructions']:,}" for name, c in found["contracts"].items()}),
    ]
    for name in ("temporary_bytes", "wire_bytes"):
        least = f"{found['minimum'][name]:,.0f}"
        lines.append(_line(f"{name.replace('_', ' ')} (minimum)", f"{found[name]:,} ({least})"))
    lines.append(_line("collectives (minimum)", _collectives(found)))
    return "\n".join(lines + [f"    * {name}: {text}" for name, text in found["notes"].items()])


def describe_transports(records: list[dict[str, Any]]) -> str:
    """In how many workloads no other transport was faster with the backward pass, and the faster ones elsewhere."""
    compared, slower = 0, []
    for record in records:
        speedups = record["phases"][PASSES[1]]["speedups"]
        others = {name: value for name, value in speedups.items() if name not in BASELINES and value is not None}
        compared += bool(others)
        faster = {name: value for name, value in others.items() if value["median"] < 1}
        if faster:
            name = min(faster, key=lambda name: faster[name]["median"])
            where = f"{record['workload']} {record['dtype']} {record['quant']}"
            slower.append(f"  {where}: {name} took {_quotient(faster[name])} of the time of {record['transport']}")
    best = f"{compared - len(slower)} of {compared}"
    return "\n".join([f"the layer's transport was the fastest in {best}, {PASSES[1]}", *slower])


def _line(name: str, text: str) -> str:
    return f"    {name:<{_NAME}}{text}"


def _beside(name: str, texts: dict[str, str]) -> str:
    """The layer's text, with those of the limit and the minimal layer where these were run."""
    others = [other for other in (LIMIT, MINIMAL) if other in texts]
    return _line(f"{name} ({', '.join(others)})", f"{texts[LAYER]} ({', '.join(texts[other] for other in others)})")


def _quotient(value: dict[str, float], unit: str = "") -> str:
    return f"{value['median']:.3g}{unit} ({value['low']:.3g} to {value['high']:.3g})"


def _speedup(phase: dict[str, Any], name: str) -> str:
    value = phase["speedups"][name]
    if value is None:
        return "not run"
    return _quotient(value, "x") + (" *" if name in phase["notes"] else "")


def _collectives(phase: dict[str, Any]) -> str:
    total = sum(phase["collectives"].values())
    exchanges = phase["collectives"].get("all-to-all", 0)
    text = f"{total}, {exchanges} all-to-all"
    if phase["collectives_in_loops"]:
        text += f", {phase['collectives_in_loops']} in loops"
    return f"{text} ({phase['minimum']['collectives']})"
