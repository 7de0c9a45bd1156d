"""The picture of `plan`: time by phase, memory by purpose, and who sends how much to whom."""

from typing import Any

import numpy as np

from moe_jax.plan import Plan
from moe_jax.plan.wire import wire_bytes
from moe_jax.tools.drawing import name_bars, new_figure, stack_bars
from moe_jax.tools.planner import words
from moe_jax.tools.planner.figures import BOTH, Found
from moe_jax.tools.planner.meshes import mesh_words
from moe_jax.tools.planner.picture import gigabytes
from moe_jax.tools.planner.question import Question

MOST = 256  # the most devices of the heat map, so that each of them is at least a point
WIDE = 50  # where the largest number is so many times the smallest, colours follow the logarithm


def draw_plan(question: Question, path: str, plan: Plan, found: Found) -> Any:
    """The figure of one plan.

    Args:
      question, path: what was asked, of the configuration in this file.
      plan: the plan of the question.
      found: what ``predict`` says.
    """
    figure = new_figure(13, 5.5)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1))
    time_axes, memory_axes, wire_axes = map(figure.add_subplot, (grid[0, 0], grid[1, 0], grid[:, 1]))
    _draw_time(time_axes, found)
    _draw_memory(memory_axes, question, found)
    _draw_wire(figure, wire_axes, question, plan, found)
    figure.suptitle(
        f"{path}, {mesh_words(question.mesh)} on {question.machine.name}: {plan.transport}, {question.tokens} tokens "
        f"per device, {question.dtype}; predicted",
        parse_math=False,
    )
    return figure


def _draw_time(axes: Any, found: Found) -> None:
    """Draws a bar for each pass, made of its phases, with the time of the whole pass behind it."""
    passes = [found["time"][name] for name in found["passes"]]
    stack_bars(axes, [{name: 1e3 * part["seconds"] for name, part in each["phases"].items()} for each in passes])
    _finish(axes, found["passes"], [words.milliseconds(each["seconds"]) + " ms" for each in passes])
    axes.set(title="time of 1 layer, by phase", xlabel="ms")


def _draw_memory(axes: Any, question: Question, found: Found) -> None:
    """Draws bars for one layer and for all: what is in memory at the largest moment, and what a device has."""
    columns = {"1 layer": "one"} | ({} if question.layers == 1 else {f"{question.layers} layers": "all"})
    memories = [found["memory"][key] for key in columns.values()]
    stack_bars(axes, [gigabytes(memory) for memory in memories])
    there = found["machine_bytes"] / 1e9
    axes.axvline(there, color="black", linestyle="--", label=f"a device has {there:.1f} GB")
    _finish(axes, list(columns), [words.size(m["peak"]) + ("" if m["fits"] else ", TOO LARGE") for m in memories])
    axes.set(title="memory of a device at the largest moment, by purpose", xlabel="GB")


def _finish(axes: Any, names: list[str], texts: list[str]) -> None:
    """Names the bars, writes a text behind each, and leaves room for it and for the legend."""
    for place, text in enumerate(texts):
        end = sum(bars[place].get_width() for bars in axes.containers)
        axes.annotate(text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    name_bars(axes, names)
    axes.margins(x=0.4)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_wire(figure: Any, axes: Any, question: Question, plan: Plan, found: Found) -> None:
    """Draws a heat map: a row for each device that sends, a column for each that receives, a frame for each node."""
    from matplotlib.colors import LogNorm

    last = found["passes"][-1]
    sent, nodes = wire_bytes(plan, **question.config.moe.widths, backward=last == BOTH, most=MOST)
    values = np.ma.masked_equal(sent / 1e6, 0.0)
    wide = values.count() and values.max() > WIDE * values.min()
    image = axes.imshow(values, cmap="viridis", interpolation="nearest", norm=LogNorm() if wide else None)
    if not wide:
        image.set_clim(0, max(1e-6, float(values.max()) if values.count() else 0.0))
    borders = np.flatnonzero(np.diff(nodes)) + 0.5
    for border in borders:
        axes.axhline(border, color="white", linewidth=min(0.6, 4 / len(borders)))
        axes.axvline(border, color="white", linewidth=min(0.6, 4 / len(borders)))
    num_devices, shown = question.mesh.num_devices, len(nodes)
    first = f", of the first {shown} of {num_devices}" if shown < num_devices else ""
    time = found["time"][last]
    split = ", ".join(
        f"{words.size(time[key])} {where}"
        for key, where in (("inside_bytes", "in its node"), ("between_bytes", "to other nodes"))
        if key == "inside_bytes" or question.machine.between
    )
    axes.set(title=f"wire, {last}, even load\na device sends {split}", xlabel=f"to device{first}", ylabel="from device")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes, label="MB", shrink=0.85)
