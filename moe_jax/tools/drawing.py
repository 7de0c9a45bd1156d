"""Pictures for reports: how one is asked for, begun, and written whole or not at all. matplotlib draws them."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.errors import DataError, InvalidArgumentError
from moe_jax.host.atomic import atomic_write
from moe_jax.host.extras import require

FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: str | Path) -> None:
    """Raises unless a picture can be left at ``path``, so that nobody waits for one that cannot be written.

    Raises:
      UnsupportedError: matplotlib is not installed.
      InvalidArgumentError: the ending of the name is not one of ``FORMATS``, or its folder cannot be written.
    """
    require("matplotlib", "a picture")
    if Path(path).suffix not in FORMATS:
        raise InvalidArgumentError(f"picture={str(path)!r} must end in {', '.join(FORMATS)}; give another file")
    check_writable("picture", path)


def check_writable(name: str, path: str | Path) -> None:
    """Raises InvalidArgumentError unless the argument ``name`` is a path at which a file can be written."""
    if Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK):
        raise InvalidArgumentError(f"{name}={str(path)!r} cannot be written; give a file in a folder that can")


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, which needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Writes the figure in the format that the ending of ``path`` names; an OSError leaves what was there."""
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=110)


def save_asked(figure: Any, path: str | Path) -> None:
    """Writes a picture that a person asked for, after ``check_picture``.

    Raises:
      DataError: there is no room, or the folder has gone.
    """
    try:
        save(figure, Path(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); make room, or give another file") from None


def stack_bars(axes: Any, bars: Sequence[Mapping[str, float]]) -> None:
    """Bars from left to right, one below the other, each of the same parts; every part has a colour and a label."""
    starts = [0.0] * len(bars)
    for part in bars[0]:
        lengths = [bar[part] for bar in bars]
        axes.barh(range(len(bars)), lengths, left=starts, label=part)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]


def name_bars(axes: Any, names: Sequence[str]) -> None:
    """Names the bars that stand one below the other, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(alpha=0.3, axis="x")
