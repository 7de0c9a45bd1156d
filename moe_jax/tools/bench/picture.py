"""The picture of `bench`: the time of every contender in each pass, workload by workload."""

from typing import Any

import numpy as np

from moe_jax.tools.bench.programs import LAYER, LIMIT, PASSES
from moe_jax.tools.drawing import name_bars, new_figure

_COLOURS = dict(zip(PASSES, ("tab:blue", "tab:orange"), strict=True))


def draw_times(records: list[dict[str, Any]], header: dict[str, Any]) -> Any:
    """A figure of all workloads that were measured.

    Args:
      records: as ``measure`` returns them.
      header: the first JSON line of the run, which says on what.
    """
    names = [_contenders(record) for record in records]
    heights = [0.9 + 0.38 * len(each) for each in names]
    figure = new_figure(10, 0.5 + sum(heights))
    rows = figure.subplots(len(records), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, record, contenders in zip(rows, records, names, strict=True):
        _draw_workload(axes, record, contenders)
    rows[-1].set_xlabel("ms; bars are medians, lines reach from quartile to quartile")
    figure.legend(*rows[0].get_legend_handles_labels(), fontsize=8, loc="outside lower right")
    mesh = ", ".join(f"{name}={size}" for name, size in header["mesh"].items())
    figure.suptitle(f"moe_jax bench: {mesh}, {header['platform']}, JAX {header['jax']}", parse_math=False)
    return figure


def _contenders(record: dict[str, Any]) -> list[str]:
    """All that the picture shows: the limit, the layer, and what the layer is compared with."""
    found = record["phases"].values()
    return list(dict.fromkeys([LIMIT, LAYER, *(name for each in found for name in each["speedups"])]))


def _draw_workload(axes: Any, record: dict[str, Any], contenders: list[str]) -> None:
    """Draws two bars for each contender; a contender that was not run in a pass says so."""
    for number, phase in enumerate(PASSES):
        found = record["phases"][phase]
        quotients = {LIMIT: found["limit_over_layer"], **found["speedups"]}  # the quotients of the table
        for place, name in enumerate(contenders):
            seconds, middle = found["seconds"].get(name), place + 0.4 * (number - 0.5)
            low, median, high = 1e3 * np.percentile(seconds, [25, 50, 75]) if seconds else (0.0, 0.0, 0.0)
            text = f"{median:.3g} ms" if seconds else "not run"
            if seconds and name != LAYER:
                text += f", {quotients[name]['median']:.3g} x the layer"
            axes.barh(middle, median, 0.38, color=_COLOURS[phase], label="" if place else phase)
            axes.plot([low, high], [middle] * 2, color="black", linewidth=1)
            axes.annotate(text, (high, middle), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7)
    name_bars(axes, contenders)
    axes.margins(x=0.22)
    axes.set_title(
        f"{record['workload']}: {record['tokens_per_device']} tokens per device x {record['hidden']}, top "
        f"{record['top_k']} of {record['num_experts']}, ffn {record['ffn']}, {record['dtype']}, wire "
        f"{record['quant']}, {record['transport']}",
        fontsize=9,
        parse_math=False,
    )
