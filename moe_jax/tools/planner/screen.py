"""`python -m moe_jax plan`: one screen by which a person can decide."""

import dataclasses
import json
import re
import textwrap
from typing import Any

from moe_jax.config import Config
from moe_jax.hardware import find_machine
from moe_jax.plan import Plan
from moe_jax.tools.drawing import check_picture, save_asked
from moe_jax.tools.planner import words
from moe_jax.tools.planner.compiled import compile_layer, find_compiler
from moe_jax.tools.planner.figures import FORWARD, Found, check_fits, predict
from moe_jax.tools.planner.meshes import mesh_words, on_nodes, read_mesh
from moe_jax.tools.planner.plan_picture import draw_plan
from moe_jax.tools.planner.question import Question, Terms, ask, machine_here

_NAME = 30  # columns of the first column of a table
_WIDTH = 120
_LABEL = 10  # columns for the word at the beginning of a line


def run(
    config: Config,
    path: str,
    mesh: str | None,
    hardware: str | None,
    terms: Terms,
    *,
    compiled: bool,
    describe: bool,
    picture: str | None = None,
    json_lines: bool,
) -> int:
    """Prints the screen, or one JSON object. Returns the exit code.

    Args:
      config, path: what is planned, and the file that it is from.
      mesh: as `--mesh` takes it; None: that of ``config``.
      hardware: a name or a file as for ``find_machine``; None: what the devices are that are here.
      terms: what else is asked.
      compiled: also ask the compiler of the machine.
      describe: also print ``Plan.describe``.
      picture: a file to draw into: time by phase, memory by purpose, and who sends how much to whom.
      json_lines: print one JSON object instead.

    Raises:
      ConfigError, InvalidArgumentError, MeshError: what is asked breaks a rule; nothing is printed then.
      DataError: the picture cannot be written.
      MemoryLimitError: a compiler is to be asked about a layer that does not fit; nothing is printed then.
      UnsupportedError: there is no compiler for the machine, or it or what draws is not installed; nothing is printed
        then.
      CompilationError: the compiler refuses the layer.
    """
    if picture is not None:
        check_picture(picture)
    machine = machine_here() if hardware is None else find_machine(hardware)
    shape = on_nodes(config.mesh, machine) if mesh is None else read_mesh(mesh, machine)
    question = ask(config, path, machine, shape, terms)
    plan, found = question.plan(), predict(question)
    other = question.unquantised()
    unquantised = None if other is None else predict(other)
    target = find_compiler(machine, shape.num_devices) if compiled else None
    if compiled:
        check_fits(question, plan)
    description = plan.describe(**config.moe.widths) if describe else None
    if picture is not None:
        save_asked(draw_plan(question, path, plan, found), picture)
    if json_lines:
        others = {
            "unquantised": None if unquantised is None else unquantised["time"],
            "compiled": None if target is None else compile_layer(question, target),
            "description": description,
            "picture": picture,
        }
        print(json.dumps({"event": "plan", **_values(question, plan), **found, **others}))
        return 0
    print("\n".join(_screen(question, path, found, unquantised)), flush=True)
    if target is not None:
        print(f"\n{'compiling':<{_LABEL}} for {target.name}: a minute or more per pass", flush=True)
        print("\n".join(compared(found, compile_layer(question, target))))
    if description is not None:
        print("\n" + description)
    if picture is not None:
        print(f"\ndrew {picture}")
    return 0


def _values(question: Question, plan: Plan) -> dict[str, Any]:
    """The plan as data: its fields, the bytes of its buffers, and its costs with their exact counts."""
    moe_config = question.config.moe
    costs = plan.cost(**moe_config.widths)
    return {
        **dataclasses.asdict(plan),
        "workspace": plan.workspace(),
        "dispatch_workspace": plan.workspace("dispatch"),
        "cost": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
        "mesh": mesh_words(question.mesh),
        "terms": dataclasses.asdict(question.terms),
    }


def _screen(question: Question, path: str, found: Found, unquantised: Found | None) -> list[str]:
    moe_config, model, machine = question.config.moe, question.model, question.machine
    nodes = f", {machine.devices_per_node} to a node" if machine.devices_per_node else ""
    shared = f", {moe_config.num_shared_experts} shared" if moe_config.num_shared_experts else ""
    return [
        _labelled(
            "layer",
            f"{path}: top {moe_config.top_k} of {moe_config.num_experts} experts{shared}, hidden {model.hidden}, ffn "
            f"{moe_config.ffn}; {model.layers} layers",
        ),
        _labelled(
            "machine",
            f"{question.mesh.num_devices} x {machine.name}{nodes}, {words.size(machine.memory_bytes)} each",
        ),
        _labelled(
            "mesh",
            f"{mesh_words(question.mesh)}: {words.many(found['experts_per_rank'], 'expert')} per rank; "
            f"{question.tokens} tokens per device, {question.dtype}",
        ),
        _labelled("transport", f"{found['transport']}: {_short(found['transport_reason'])}"),
        "",
        *_verdict(question, found),
        "",
        *_memory_table(question, found),
        "",
        *_time_table(question, found),
        "",
        *_savings(found, unquantised),
        _speed(question, found),
        _labelled("figures", "predicted; --compile puts the compiler's beside them, --describe says what the plan is"),
    ]


def _labelled(label: str, text: str) -> str:
    indent = " " * (_LABEL + 1)
    return textwrap.fill(f"{label:<{_LABEL}} {text}", _WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _short(reason: str) -> str:
    """A reason without brackets and the sources at its end: ``Plan.describe`` has all of it."""
    return re.sub(r" \([^()]*\)", "", reason).split("; ")[0]


def _verdict(question: Question, found: Found) -> list[str]:
    """Whether one layer fits, and whether all do; and if not, the smallest change with which they would."""
    lines = []
    for layers, key in _columns(question).items():
        memory, there = found["memory"][key], words.size(found["machine_bytes"])
        what = f"{layers}: {words.size(memory['peak'])} of {there}"
        lines.append(_labelled("fits" if memory["fits"] else "TOO LARGE", what))
        if memory["smallest_change"]:
            lines.append(_labelled("", memory["smallest_change"]))
    return lines


def _columns(question: Question) -> dict[str, str]:
    """The columns of the table of memory, by their heads."""
    columns = {"1 layer": "one"}
    return columns if question.layers == 1 else {**columns, f"{question.layers} layers": "all"}


def _memory_table(question: Question, found: Found) -> list[str]:
    columns = _columns(question)
    widths = (_NAME, *(12 for _ in columns))
    tables = [found["memory"][key] for key in columns.values()]
    purposes = {
        "weights": "weights",
        "gradients": "gradients",
        f"optimizer, {question.terms.optimizer}": "optimizer",
        "kept for the backward pass": "activations",
    }
    lines = [words.line(("memory of a device", *columns), widths)]
    for name, key in purposes.items():
        lines.append(words.line((f"  {name}", *(words.size(table[key]) for table in tables)), widths))
    for pass_name in tables[0]["programs"]:
        cells = (words.size(table["programs"][pass_name]["temporaries"]) for table in tables)
        lines.append(words.line((f"  at work, {pass_name}", *cells), widths))
    lines.append(
        words.line(("  of that, to receive rows", *(words.size(table["receive"]) for table in tables)), widths)
    )
    lines.append(words.line(("largest moment", *(words.size(table["peak"]) for table in tables)), widths))
    return [*lines, words.line(("a device has", *[words.size(found["machine_bytes"])] * len(tables)), widths)]


def _time_table(question: Question, found: Found) -> list[str]:
    """A line for each phase of the layer. What bounds a phase, and what it sends, is for the pass that counts."""
    passes = [found["time"][name] for name in found["passes"]]
    heads = ("forward", "with backward")[: len(passes)]
    nodes = ("in node", "between nodes") if question.machine.between else ("sent",)
    widths = (_NAME, *(13 for _ in heads), 18, *(max(9, len(name)) for name in nodes))

    def cells(parts: list[dict[str, Any]]) -> list[str]:
        sent = [words.size(parts[-1][key]) for key in ("inside_bytes", "between_bytes")]
        return [*(words.milliseconds(part["seconds"]) for part in parts), parts[-1]["bound"], *sent[: len(nodes)]]

    phases = [
        words.line((f"  {name}", *cells([part["phases"][name] for part in passes])), widths)
        for name in passes[-1]["phases"]
    ]
    head = words.line(("time of 1 layer, ms", *heads, "bound by", *nodes), widths)
    return [head, *phases, words.line(("in all", *cells(passes)), widths)]


def _savings(found: Found, unquantised: Found | None) -> list[str]:
    """What the recipes of the wire save in each pass; nothing where there are none."""
    if unquantised is None:
        return []
    return [_saved(name, found["time"][name], unquantised["time"][name]) for name in found["passes"]]


def _saved(name: str, time: dict[str, Any], before: dict[str, Any]) -> str:
    sent, was = (each["inside_bytes"] + each["between_bytes"] for each in (time, before))
    seconds = f"{words.milliseconds(time['seconds'])} ms instead of {words.milliseconds(before['seconds'])}"
    return _labelled(
        "saves",
        f"{name}: {words.size(sent)} sent instead of {words.size(was)} ({words.less(sent, was)}), {seconds} "
        f"({words.less(time['seconds'], before['seconds'])})",
    )


def _speed(question: Question, found: Found) -> str:
    all_layers = f", {words.rate(found['tokens_per_second'] / question.layers)} through {question.layers} of them"
    return _labelled(
        "speed",
        f"{words.rate(found['tokens_per_second'])} tokens per second and device through 1 layer, {question.passes[-1]}"
        f"{all_layers if question.layers > 1 else ''}; {words.percent(found['peak_share'])} of the peak",
    )


def compared(found: Found, compiled: dict[str, dict[str, Any]]) -> list[str]:
    """The figures of the compiler beside the estimates, by pass, with the errors of the estimates."""
    widths = (_NAME, 14, 14, 10)
    told = compiled[FORWARD]
    lines = [_labelled("compiler", f"{told['target']}: {told['compiler']}")]
    for pass_name, told in compiled.items():
        time = found["time"][pass_name]
        lines.append(words.line((pass_name, "predicted", "compiled", "error"), widths))
        program = found["memory"]["one"]["programs"][pass_name]
        figures: list[tuple[str, float | None, float | None, Any]] = [
            ("flops", time["flops"], told["flops"], words.count),
            ("sent", time["wire_bytes"], told["wire_bytes"], words.size),
            ("read and written", time["traffic_bytes"], told["traffic_bytes"], words.size),
            ("arguments", program["arguments"], told["argument_bytes"], words.size),
            ("results", program["results"], told["output_bytes"], words.size),
            ("temporaries", program["temporaries"], told["temporary_bytes"], words.size),
            ("memory in all", sum(program.values()), told["memory_bytes"], words.size),
            ("cycles with a price", None, told["cycles"], words.count),
        ]
        for name, mine, theirs, word in figures:
            if theirs is not None:
                cells = (
                    ("-", word(theirs), "-") if mine is None else (word(mine), word(theirs), words.error(theirs, mine))
                )
                lines.append(words.line((f"  {name}", *cells), widths))
    return lines
