"""The wait matrix for people: a heat map of characters, and one of colours."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.elastic.wait_matrix import Straggler, in_words
from moe_jax.tools.drawing import new_figure

_SHADES = "░▒▓█"
_WIDE = 24  # up to so many ranks have two characters and a space in each cell, more of them one character


def heat_map(waits: np.ndarray) -> str:
    """[R, R] microseconds as shades, each from so many times more than the one before; no colour is needed.

    A cell is blank below twice the median, so a machine on which nobody stands out has a map that is nearly empty.
    """
    ranks = len(waits)
    others = waits[~np.eye(ranks, dtype=bool)]
    lowest = max(2 * np.median(others), 1.0)
    bounds = np.geomspace(lowest, max(0.75 * others.max(), 4 * lowest), len(_SHADES))
    wide = ranks <= _WIDE
    margin = len(f"rank {ranks - 1}") + 1
    lines = [f"{'':>{margin}}{line}".rstrip() for line in _column_heads(ranks, wide)]
    for row in range(ranks):
        levels = np.searchsorted(bounds, waits[row], side="right")
        marks = ["·" if column == row else (" " + _SHADES)[level] for column, level in enumerate(levels)]
        cells = [f" {mark if mark == '·' else mark * 2:<2}" if wide else mark for mark in marks]
        lines.append(f"{f'rank {row}':<{margin}}{''.join(cells)}".rstrip())
    legend = ", ".join(f"{shade} from {in_words(bound)}" for shade, bound in zip(_SHADES, bounds, strict=True))
    return "\n".join([*lines, f"blank below {in_words(lowest)}, {legend}"])


def _column_heads(ranks: int, wide: bool) -> list[str]:
    """The numbers of the columns: side by side, or digit below digit."""
    if wide:
        return ["".join(f" {column:<2}" for column in range(ranks))]
    digits = len(str(ranks - 1))
    numbers = [str(column).rjust(digits) for column in range(ranks)]
    return ["".join(number[place] for number in numbers) for place in range(digits)]


def draw_waits(ready: np.ndarray, travel: np.ndarray, where: str, found: Sequence[Straggler]) -> Any:
    """A figure of both parts of the waits, [R, R] microseconds each, with one scale of colours, and what they say."""
    figure = new_figure(11, 6)
    off = ~np.eye(len(ready), dtype=bool)
    shown = [np.where(off, np.maximum(part, 1.0) / 1e3, np.nan) for part in (ready, travel)]  # 1 us is as good as 0
    limits = {"vmin": min(np.nanmin(part) for part in shown), "vmax": max(np.nanmax(part) for part in shown)}
    titles, images = ("until it was ready", "while its block travelled"), []
    for axes, part, title in zip(figure.subplots(1, 2, sharey=True), shown, titles, strict=True):
        image = axes.imshow(part, norm="log", cmap="magma", interpolation="nearest")
        image.set_clim(**limits)
        images.append(image)
        axes.set(title=title, xlabel="rank that is waited for")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    figure.axes[0].set_ylabel("rank that waits")
    figure.colorbar(images[-1], ax=figure.axes, label="ms in a step, median over steps")
    verdict = "\n".join(str(one) for one in found[:4]) or "no rank and no link stands out"
    figure.suptitle(f"moe_jax stragglers: {where}\n{verdict}", parse_math=False, fontsize=9)
    return figure
