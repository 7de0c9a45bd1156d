"""`sweep.png`: time and memory by mesh, and where the figures come from."""

from pathlib import Path
from typing import Any

from moe_jax.tools.planner.figures import peak_as_compiled
from moe_jax.tools.planner.question import Question
from moe_jax.tools.planner.rows import COMPILED, PREDICTED, RUN, SOURCES, Row
from moe_jax.tools.train.atomic import atomic_write
from moe_jax.tools.train.extras import REMEDY, find

_MOST = 20  # meshes, so that the bars of the best can be read


def draw(path: Path, rows: list[Row], meshes: list[str], question: Question) -> str:
    """Draws time and memory of the first meshes, from the rows of one sweep; returns what was done, in words.

    ``question``: any of the sweep's, which says what is asked of all.
    """
    if find("matplotlib") is None:
        return f"matplotlib is not installed, so {path} was not drawn; {REMEDY}"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = meshes[:_MOST]
    by_source = {
        source: {row["mesh"]: row["found"] for row in rows if row["source"] == source and "found" in row}
        for source in SOURCES
    }
    predicted = [by_source[PREDICTED][mesh] for mesh in shown]
    figure = Figure(figsize=(11, 2 + 0.35 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    last = question.passes[-1]
    _stack(
        time_axes,
        [{k: 1e3 * phase["seconds"] for k, phase in found["time"][last]["phases"].items()} for found in predicted],
    )
    _points(time_axes, shown, {mesh: 1e3 * told[last]["seconds"] for mesh, told in by_source[RUN].items()}, RUN)
    time_axes.set(title=f"time of 1 layer, {last}", xlabel="ms", yticks=range(len(shown)))
    time_axes.set_yticklabels(shown)
    time_axes.set_ylim(len(shown) - 0.5, -0.5)  # the best one on top
    layers = "1 layer" if question.layers == 1 else f"{question.layers} layers"
    _stack(memory_axes, [_gigabytes(found["memory"]["all"]) for found in predicted])
    peaks = {
        mesh: peak_as_compiled(by_source[PREDICTED][mesh], told) / 1e9 for mesh, told in by_source[COMPILED].items()
    }
    _points(memory_axes, shown, peaks, COMPILED)
    there = question.machine.memory_bytes / 1e9
    memory_axes.axvline(there, color="black", linestyle="--", label=f"{question.machine.name}: {there:.0f} GB")
    memory_axes.set(title=f"memory of a device, {layers}", xlabel="GB")
    for axes in (time_axes, memory_axes):
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3, axis="x")
    figure.suptitle(f"bars are {PREDICTED}; {question.tokens} tokens per device, {question.dtype}", fontsize=9)
    try:
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=110)
    except OSError as error:
        return f"{path} was not drawn ({error.strerror})"
    return f"drew {path}"


def _gigabytes(memory: dict[str, Any]) -> dict[str, float]:
    """The largest moment by purpose: what lies there anyway, and what is at work."""
    parts = {name: memory[name] / 1e9 for name in ("weights", "gradients", "optimizer", "activations")}
    return {**parts, "at work": max(0.0, memory["peak"] / 1e9 - sum(parts.values()))}


def _stack(axes: Any, bars: list[dict[str, float]]) -> None:
    """Bars from left to right, one below the other, each of the same parts."""
    starts = [0.0] * len(bars)
    for part in bars[0]:
        lengths = [bar[part] for bar in bars]
        axes.barh(range(len(bars)), lengths, left=starts, label=part)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]


def _points(axes: Any, meshes: list[str], values: dict[str, float], label: str) -> None:
    """A mark for each mesh that has a value."""
    found = [(values[mesh], place) for place, mesh in enumerate(meshes) if mesh in values]
    if found:
        axes.plot(*zip(*found, strict=True), "kD", label=label)
