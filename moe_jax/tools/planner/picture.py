"""`sweep.png`: time and memory by mesh, and where the figures come from."""

from pathlib import Path
from typing import Any

from moe_jax.host.extras import REMEDY, find
from moe_jax.tools.drawing import name_bars, new_figure, save, stack_bars
from moe_jax.tools.planner.figures import peak_as_compiled
from moe_jax.tools.planner.question import Question
from moe_jax.tools.planner.rows import COMPILED, PREDICTED, RUN, SOURCES, Row

_MOST = 20  # the most meshes, so that the bars of the best ones can be read


def draw(path: Path, rows: list[Row], meshes: list[str], question: Question) -> str:
    """Draws time and memory of the first meshes, from the rows of one sweep; returns what was done, in words.

    ``question``: any question of the sweep: it says what is asked about all meshes.
    """
    if find("matplotlib") is None:
        return f"matplotlib is not installed, so {path} was not drawn; {REMEDY}"
    shown = meshes[:_MOST]
    by_source = {
        source: {row["mesh"]: row["found"] for row in rows if row["source"] == source and "found" in row}
        for source in SOURCES
    }
    predicted = [by_source[PREDICTED][mesh] for mesh in shown]
    figure = new_figure(11, 2 + 0.35 * len(shown))
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    last = question.passes[-1]
    stack_bars(
        time_axes,
        [{k: 1e3 * phase["seconds"] for k, phase in found["time"][last]["phases"].items()} for found in predicted],
    )
    _points(time_axes, shown, {mesh: 1e3 * told[last]["seconds"] for mesh, told in by_source[RUN].items()}, RUN)
    time_axes.set(title=f"time of 1 layer, {last}", xlabel="ms")
    layers = "1 layer" if question.layers == 1 else f"{question.layers} layers"
    stack_bars(memory_axes, [gigabytes(found["memory"]["all"]) for found in predicted])
    peaks = {
        mesh: peak_as_compiled(by_source[PREDICTED][mesh], told) / 1e9 for mesh, told in by_source[COMPILED].items()
    }
    _points(memory_axes, shown, peaks, COMPILED)
    there = question.machine.memory_bytes / 1e9
    memory_axes.axvline(there, color="black", linestyle="--", label=f"{question.machine.name}: {there:.0f} GB")
    memory_axes.set(title=f"memory of a device, {layers}", xlabel="GB")
    for axes in (time_axes, memory_axes):
        name_bars(axes, shown)
        axes.legend(fontsize=7)
    figure.suptitle(f"bars are {PREDICTED}; {question.tokens} tokens per device, {question.dtype}", fontsize=9)
    try:
        save(figure, path)
    except OSError as error:
        return f"{path} was not drawn ({error.strerror})"
    return f"drew {path}"


def gigabytes(memory: dict[str, Any]) -> dict[str, float]:
    """Gigabytes at the largest moment by purpose: what is in memory all the time, and what is at work."""
    parts = {name: memory[name] / 1e9 for name in ("weights", "gradients", "optimizer", "activations")}
    return {**parts, "at work": max(0.0, memory["peak"] / 1e9 - sum(parts.values()))}


def _points(axes: Any, meshes: list[str], values: dict[str, float], label: str) -> None:
    """Draws a mark for each mesh that has a value."""
    found = [(values[mesh], place) for place, mesh in enumerate(meshes) if mesh in values]
    if found:
        axes.plot(*zip(*found, strict=True), "kD", label=label)
