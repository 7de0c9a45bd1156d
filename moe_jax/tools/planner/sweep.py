"""`python -m moe_jax sweep`: a row for each mesh as soon as it is done; then which mesh is best, and why."""

import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from moe_jax.config import Config, parse_mesh
from moe_jax.errors import CompilationError, InvalidArgumentError, MemoryLimitError, MeshError, check_count
from moe_jax.hardware import Machine, find_machine
from moe_jax.mesh import ensure_devices
from moe_jax.tools.planner import words
from moe_jax.tools.planner.compiled import compile_layer, find_compiler
from moe_jax.tools.planner.figures import BOTH, FORWARD, Found, peak_as_compiled, predict
from moe_jax.tools.planner.here import check_here, time_layer, why_not_here
from moe_jax.tools.planner.meshes import mesh_words, read_mesh, sensible_meshes
from moe_jax.tools.planner.picture import draw
from moe_jax.tools.planner.question import Question, Terms, ask, machine_here
from moe_jax.tools.planner.rows import COMPILED, PREDICTED, RUN, Row, RowsFile

TOP = 3  # so many of all meshes that make sense are compiled or run
SHOWN = 10  # the most meshes of the ranking that are shown
_HEADS = (
    "mesh", "figures", "fits", "memory", "forward", "with backward", "bound by", "sent", "between nodes", "tokens/s",
    "peak",
)  # fmt: skip


def run(
    config: Config,
    path: str,
    meshes: Sequence[str],
    hardware: str | None,
    terms: Terms,
    *,
    num_devices: int | None,
    compiled: bool,
    run: bool,
    top: int | None,
    out: str,
    json_lines: bool,
) -> int:
    """Prints a row for each mesh and each source of figures, then the ranking. Returns the exit code.

    Args:
      config, path: what is planned, and the file that it came from.
      meshes: as `--mesh` takes them.
      hardware: a name or a file as for ``find_machine``; None: what the devices are that are here.
      terms: what else is asked.
      num_devices: also try all meshes of so many devices that make sense.
      compiled, run: whether to ask the compiler of the machine too, and the devices that are here.
      top: compile and run only so many meshes, those that are predicted best; None: all meshes, or ``TOP`` where none
        was named.
      out: the folder of ``sweep.jsonl`` and ``sweep.png``.
      json_lines: print rows as JSON lines instead of a table.

    Raises:
      ConfigError, InvalidArgumentError, MeshError: what is asked breaks a rule; nothing is printed then.
      DataError: a file of ``out`` cannot be read or written.
      UnsupportedError: there is no compiler for the machine, or it is not installed.
    """
    for option, value in (("--devices", num_devices), ("--top", top)):
        if value is not None:
            check_count(option, value)
    if not meshes and num_devices is None:
        raise InvalidArgumentError("sweep has no mesh; give --mesh ep=8,dp=8, once for each mesh, or --devices 64")
    if run:
        sizes = [parse_mesh(text).num_devices for text in meshes]
        _start(max([*sizes, num_devices or 1]))
    machine = machine_here() if hardware is None else find_machine(hardware)
    questions, left_out = _questions(config, path, meshes, machine, terms, num_devices)
    targets = {q: find_compiler(machine, q.mesh.num_devices) for q in questions} if compiled else {}
    if run:
        check_here(machine)
    file = RowsFile(Path(out) / "sweep.jsonl")
    sweep = _Sweep(file, questions, json_lines)
    try:
        sweep.begin(left_out)
        for question in questions:
            sweep.row(question, PREDICTED, "moe_jax", lambda q=question: predict(q))
        most = TOP if top is None and num_devices is not None else top
        for question in questions if most is None else sweep.ranking()[:most]:
            if compiled:
                by = f"{targets[question].name}: {targets[question].compiler}"
                sweep.row(question, COMPILED, by, lambda q=question: compile_layer(q, targets[q]))
            if run:
                by = f"{len(jax.devices())} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
                sweep.row(question, RUN, by, lambda q=question: _run(q, sweep.predicted[q]))
        sweep.end(Path(out))
    except KeyboardInterrupt:
        print(f"moe_jax: the rows above are kept in {out}; the same command goes on", file=sys.stderr)
        raise
    finally:
        file.close()
    return 0


def _start(num_devices: int) -> None:
    """Starts JAX with so many devices, emulated where there is no accelerator. Fewer will do for smaller meshes."""
    with contextlib.suppress(MeshError):
        ensure_devices(num_devices)


def _questions(
    config: Config, path: str, meshes: Sequence[str], machine: Machine, terms: Terms, num_devices: int | None
) -> tuple[list[Question], int]:
    """A question for each mesh, named ones first; and for how many meshes of ``num_devices`` there is no plan.

    Raises:
      ConfigError, InvalidArgumentError, MeshError: a mesh that was named breaks a rule, or there is no mesh at all.
    """
    named = [ask(config, path, machine, read_mesh(text, machine), terms) for text in meshes]
    for question in named:
        question.plan()
    found, reasons = list(dict.fromkeys(named)), []
    for mesh in [] if num_devices is None else sensible_meshes(num_devices, config.moe, machine):
        try:
            question = ask(config, path, machine, mesh, terms)
            question.plan()
        except (InvalidArgumentError, MeshError) as error:
            reasons.append(error)
        else:
            found += [question] * (question not in found)
    if not found:
        raise reasons[0]
    return found, len(reasons)


class _Sweep:
    """The rows of one sweep, printed as they are done.

    Attributes:
      predicted: the predicted figures, by question.
      rows: all rows so far.
    """

    def __init__(self, file: RowsFile, questions: Sequence[Question], json_lines: bool) -> None:
        self.predicted: dict[Question, Found] = {}
        self.rows: list[Row] = []
        self._file, self._questions, self._json_lines = file, questions, json_lines
        first = max(len(_HEADS[0]), *(len(mesh_words(question.mesh)) for question in questions))
        self._widths = (first, 9, 4, 8, 8, 13, 18, 8, 13, 9, 6)

    def begin(self, left_out: int) -> None:
        """Says what is asked, and, where the file ends in half a line, what that means."""
        first = self._questions[0]
        if self._file.torn:
            self._note("the file ends in half a line, as a killed run leaves it; that row is dropped and done again")
        if left_out:
            self._note(f"left out, since no plan can be made for them: {words.many(left_out, 'mesh')}")
        if not self._json_lines:
            layers = words.many(first.layers, "layer")
            least, most = (pick(question.tokens for question in self._questions) for pick in (min, max))
            tokens = words.many(least, "token") if least == most else f"{least} to {most} tokens"
            print(
                f"{words.many(len(self._questions), 'mesh')} of {first.machine.name}, {tokens} per device, "
                f"{first.dtype}; memory is that of {layers}; times are milliseconds of 1 layer; bytes and tokens per "
                f"second are those of each device, {first.passes[-1]}\n"
            )
            print(words.line(_HEADS, self._widths), flush=True)

    def row(self, question: Question, source: str, by: str, make: Callable[[], Found]) -> None:
        """Prints the row of this question and source that is in the file; where there is none, makes it and adds it."""
        asked = question.asked(by)
        row = self._file.find(source, asked)
        if row is None:
            row = {"event": "row", "mesh": mesh_words(question.mesh), "source": source, "asked": asked}
            try:
                row["found"] = make()
            except (CompilationError, MemoryLimitError, _NotHere) as error:  # the other meshes may still be asked about
                row["error"] = str(error)
            self._file.add(row)
        if source == PREDICTED:
            self.predicted[question] = row["found"]
        self.rows.append(row)
        if self._json_lines:
            print(json.dumps(row), flush=True)
        else:
            print(self._line(row, self.predicted[question]), flush=True)

    def ranking(self) -> list[Question]:
        """The questions, best first: those that fit before others, and then those that get through more tokens."""

        def place(question: Question) -> tuple[bool, float]:
            found = self.predicted[question]
            return not found["memory"]["all"]["fits"], -found["tokens_per_second"]

        return sorted(self._questions, key=place)

    def end(self, out: Path) -> None:
        """Says which mesh is best and why, and draws the picture."""
        ranking = self.ranking()
        drawn = draw(out / "sweep.png", self.rows, [mesh_words(q.mesh) for q in ranking], ranking[0])
        if self._json_lines:
            order = [mesh_words(question.mesh) for question in ranking]
            values = {"meshes": order, "rows": str(out / "sweep.jsonl"), "picture": drawn}
            print(json.dumps({"event": "ranking", **values}))
            return
        print()
        if not any(found["memory"]["all"]["fits"] for found in self.predicted.values()):
            print("None of these fits; the fastest come first.")
        for number, question in enumerate(ranking[:SHOWN], start=1):
            print(f"{number:>3}. {self._reason(question, ranking[0])}")
        if len(ranking) > SHOWN:
            print(f"     and {len(ranking) - SHOWN} more, in {out / 'sweep.jsonl'}")
        print(f"\nrows are in {out / 'sweep.jsonl'}; {drawn}")

    def _reason(self, question: Question, best: Question) -> str:
        """A place in the ranking, in words: how long the mesh takes, and which phase makes the difference."""
        found, of_best = self.predicted[question], self.predicted[best]
        time, other = (each["time"][question.passes[-1]] for each in (found, of_best))
        memory = found["memory"]["all"]
        there = "fits" if memory["fits"] else f"does not fit: {words.size(memory['peak'])}"
        text = f"{mesh_words(question.mesh)}: {words.milliseconds(time['seconds'])} ms, {there}"
        if memory["smallest_change"]:
            text += f"; {memory['smallest_change']}"
        if question == best:
            return f"{text}; bound by {time['bound']}"
        # Meshes may have different numbers of tokens, so phases are compared for as many tokens as the first mesh has.
        scale = best.tokens / question.tokens if question.tokens else 1.0
        phases = {
            name: (scale * phase["seconds"], other["phases"][name]["seconds"]) for name, phase in time["phases"].items()
        }
        name = max(phases, key=lambda name: phases[name][0] - phases[name][1])
        mine, theirs = map(words.milliseconds, phases[name])
        ratio = of_best["tokens_per_second"] / found["tokens_per_second"] if found["tokens_per_second"] else 1.0
        bound = time["phases"][name]["bound"]
        return f"{text}; {ratio:.2f} x the time of the first, most in {name}: {mine} ms against {theirs}, by {bound}"

    def _line(self, row: Row, found: Found) -> str:
        mesh, source = row["mesh"], row["source"]
        if "error" in row:
            return f"{words.line((mesh, source), self._widths[:2])}  {row['error'].splitlines()[0]}"
        return words.line((mesh, source, *_cells(row, found)), self._widths)

    def _note(self, text: str) -> None:
        print(json.dumps({"event": "note", "text": text}) if self._json_lines else text, flush=True)


class _NotHere(Exception):
    """A mesh does not fit the devices that are here."""


def _run(question: Question, predicted: Found) -> Found:
    reason = why_not_here(question, predicted["memory"]["one"]["peak"])
    if reason is not None:
        raise _NotHere(f"not run: {reason}")
    return time_layer(question)


def _cells(row: Row, found: Found) -> list[str]:
    """The cells behind the mesh and the source; "-" where this source says nothing."""
    told = row["found"]
    if row["source"] == PREDICTED:
        memory, last = found["memory"]["all"], found["time"][found["passes"][-1]]
        return [
            "yes" if memory["fits"] else "no",
            words.size(memory["peak"]),
            *_times(found["passes"], found["time"]),
            last["bound"],
            words.size(last["inside_bytes"] + last["between_bytes"]),
            words.size(last["between_bytes"]),
            words.rate(found["tokens_per_second"]),
            words.percent(found["peak_share"]),
        ]
    if row["source"] == COMPILED:
        peak = peak_as_compiled(found, told)
        fits = "yes" if peak <= found["machine_bytes"] else "no"
        sent = words.size(told[found["passes"][-1]]["wire_bytes"])
        return [fits, words.size(peak), "-", "-", "-", sent, "-", "-", "-"]
    speed = row["asked"]["terms"]["tokens"] / told[found["passes"][-1]]["seconds"]
    return ["-", "-", *_times(found["passes"], told), "-", "-", "-", words.rate(speed), "-"]


def _times(passes: Sequence[str], times: dict[str, Any]) -> list[str]:
    """The cells of the forward pass and of both passes; "-" for a pass that was not asked about."""
    return [words.milliseconds(times[name]["seconds"]) if name in passes else "-" for name in (FORWARD, BOTH)]
