"""A measured workload in words: quotients, and bytes beside their minima. No absolute times but those of compiling."""

from typing import Any

from moe_jax.bench.programs import BASELINES, LAYER, LIMIT, PASSES

_NAME, _COLUMN = 30, 34


def describe(record: dict[str, Any]) -> str:
    """The table of one workload, a column for each pass."""
    phases = [record["phases"][phase] for phase in PASSES]
    rounds = f", {record['num_rounds']} rounds" if record["num_rounds"] > 1 else ""
    lines = [
        f"{record['workload']}  {record['tokens_per_device']} tokens per device x {record['hidden']} "
        f"{record['dtype']}, ffn {record['ffn']}, top {record['top_k']} of {record['num_experts']}, "
        f"{record['pattern']}; wire {record['quant']}, {record['transport']}, {record['backend']}{rounds}",
        _line("", PASSES),
        _line("of the dense limit", [_quotient(p["limit_over_layer"]) for p in phases]),
        *(_line(f"faster than {name}", [_speedup(p, name) for p in phases]) for name in phases[0]["speedups"]),
        _line("compile, s (limit)", [_compiled(p["compile_seconds"]) for p in phases]),
    ]
    for name in ("temporary_bytes", "wire_bytes"):
        texts = [f"{p[name]:,} ({p['minimum'][name]:,.0f})" for p in phases]
        lines.append(_line(f"{name.replace('_', ' ')} (minimum)", texts))
    lines.append(_line("collectives (minimum)", [_collectives(p) for p in phases]))
    for phase, found in zip(PASSES, phases, strict=True):
        lines += [f"  {phase}: {name}: {text}" for name, text in found["notes"].items()]
    return "\n".join(lines)


def describe_transports(records: list[dict[str, Any]]) -> str:
    """In how many workloads no other transport was faster with the backward pass, and which was faster elsewhere."""
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


def _line(name: str, texts: Any) -> str:
    return (f"  {name:<{_NAME}}" + "".join(f"{text:<{_COLUMN}}" for text in texts)).rstrip()


def _quotient(value: dict[str, float], unit: str = "") -> str:
    return f"{value['median']:.3g}{unit} ({value['low']:.3g} to {value['high']:.3g})"


def _speedup(phase: dict[str, Any], name: str) -> str:
    value = phase["speedups"][name]
    if value is None:
        return "not run"
    return _quotient(value, "x") + (" *" if name in phase["notes"] else "")


def _compiled(seconds: dict[str, float]) -> str:
    return f"{seconds[LAYER]:.1f} ({seconds[LIMIT]:.1f})"


def _collectives(phase: dict[str, Any]) -> str:
    total = sum(phase["collectives"].values())
    exchanges = phase["collectives"].get("all-to-all", 0)
    text = f"{total}, {exchanges} all-to-all"
    if phase["collectives_in_loops"]:
        text += f", {phase['collectives_in_loops']} in loops"
    return f"{text} ({phase['minimum']['collectives']})"
