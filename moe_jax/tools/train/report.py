"""What a run leaves behind in its folder: `metrics.jsonl`, one record per step, and `report.png`, drawn from it."""

import json
import textwrap
import warnings
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import Config
from moe_jax.errors import DataError
from moe_jax.host.atomic import append_line, atomic_write
from moe_jax.host.extras import REMEDY, find
from moe_jax.tools.drawing import new_figure, save
from moe_jax.tools.planner.meshes import mesh_words
from moe_jax.tools.train.sample import printable

LINE_LENGTH, MAX_LINES = 110, 30  # the room for a sample in the picture
MAX_COLUMNS = 1000  # of the image of loads, which has no room for more
_CURVES = {
    "imbalance": "fullest expert / mean load",
    "rank_imbalance": "fullest rank / mean load",
    "dropped": "dropped pairs",
    "rounds": "rounds",
    "tokens_per_s": "tokens / s",
}

MOVED = "rebalanced_moved_slots"  # what a record has where experts moved

Record = dict[str, Any]


class MetricsFile:
    """The file `metrics.jsonl`: one line per step, and one for every validation loss, sample and move of experts.

    A validation loss and a sample have the step that they came after; a move has the step that it came before.
    A resumed run keeps the records of the steps that its checkpoint holds and drops later ones. The file is not touched
    before the first new record is written.

    Raises:
      DataError: the path is no regular file, or the file holds something else than such records.
    """

    def __init__(self, path: Path, *, done_steps: int) -> None:
        self._path = path
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is not a file, and metrics are written there; remove it or change --out")
        self._kept = [record for record in _read_records(path) if record["step"] <= done_steps] if done_steps else []
        self._file: FileIO | None = None

    def append(self, record: Record) -> None:
        """Adds a record as a line, whole or not at all.

        Raises:
          DataError: there is no room for the line.
        """
        try:
            if self._file is None:
                self._file = self._open()
            append_line(self._file, _line(record))
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written ({error.strerror}); make room, or change --out") from None

    def records(self) -> list[Record]:
        return self._kept if self._file is None else _read_records(self._path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> FileIO:
        with atomic_write(self._path) as file:
            file.writelines(_line(record) for record in self._kept)
        return self._path.open("ab", buffering=0)


def write_report(path: Path, records: list[Record], config: Config) -> str:
    """Draws a run from its records; returns a sentence on the outcome.

    The picture has the losses, the load of every expert over steps, how uneven that of experts and ranks was and where
    experts moved, dropped pairs, rounds, tokens per second, and the last sample. Its title is the name of the run's
    folder and what was trained.
    """
    if find("matplotlib") is None:
        return f"matplotlib is not installed, so {path} was not drawn; {REMEDY}"
    if not any("load" in record for record in records):
        return f"{path} was not drawn: no step was taken"
    try:
        # The font may lack characters of a sample. A box is drawn for each of them, and nobody needs a warning.
        with warnings.catch_warnings(action="ignore"):
            save(draw_run(path.absolute().parent.name, records, config), path)
    except OSError as error:
        return f"{path} was not drawn ({error.strerror})"
    return f"drew {path}"


def draw_run(name: str, records: list[Record], config: Config) -> Any:
    """The figure of ``write_report``, of the run with this name; a step at least was taken."""
    steps = [record for record in records if "load" in record]
    sample = next((_lines(record["sample"]) for record in reversed(records) if "sample" in record), [])
    heights = [3.2, 3.2, 2.0] + [0.3 + 0.15 * len(sample)] * bool(sample)  # inches
    figure = new_figure(11, 0.6 + sum(heights))
    figure.suptitle(f"{name}\n{_describe(config)}", parse_math=False, fontsize=10)
    grid = figure.add_gridspec(len(heights), len(_CURVES), height_ratios=heights)
    loss_axes, load_axes = (figure.add_subplot(grid[row, :]) for row in (0, 1))
    _draw_loss(loss_axes, steps, [record for record in records if "validation_loss" in record])
    figure.colorbar(_draw_load(load_axes, steps), ax=load_axes, label="load / mean load")
    curves = [figure.add_subplot(grid[2, column]) for column in range(len(_CURVES))]
    for axes, (key, title) in zip(curves, _CURVES.items(), strict=True):
        _draw_curve(axes, [(r["step"], r[key]) for r in steps if key in r])
        if key == "rank_imbalance":
            _draw_moves(axes, [record for record in records if MOVED in record])
        axes.set_title(title, fontsize=9)
        axes.set_ylim(0, None if axes.dataLim.y1 > 0 else 1)
    for axes in (loss_axes, load_axes, *curves):
        axes.set(xlabel="step", xlim=load_axes.get_xlim())
        axes.xaxis.get_major_locator().set_params(integer=True)
    if sample:
        axes = figure.add_subplot(grid[3, :])
        axes.set_axis_off()
        axes.set_title("sample")
        place = {"va": "top", "transform": axes.transAxes}
        axes.text(0, 1, "\n".join(sample), family="monospace", fontsize=8, parse_math=False, **place)
    return figure


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The mean over a window around each step, [T]: up to T / 100 steps before it, two at least, and as many after it.

    A window is as long on both sides, so that what falls evenly is left as it is and does not lag behind.
    """
    num_steps = len(values)
    places = np.arange(num_steps)
    half = np.minimum(max(2, num_steps // 100), np.minimum(places, num_steps - 1 - places))
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return (sums[places + half + 1] - sums[places - half]) / (2 * half + 1)


def _describe(config: Config) -> str:
    """What was trained, in a line."""
    moe, model, train = config.moe, config.model, config.train
    assert model is not None and train is not None, "a run has both sections"
    balance = config.balance
    moving = f", moving every {balance.every} steps among {config.num_slots} slots" if balance else ""
    weightless = f" and {moe.num_ids - moe.num_experts} without weights" if moe.num_ids > moe.num_experts else ""
    return (
        f"top {moe.top_k} of {moe.num_experts} experts{weightless}{moving}, ffn {moe.ffn}; "
        f"{model.layers} layers, hidden {model.hidden}; "
        f"{train.batch_size} x {model.seq_len} tokens a step, {train.dtype}, learning rate {train.learning_rate:g}; "
        f"mesh {mesh_words(config.mesh)}"
    )


def _draw_loss(axes: Any, steps: list[Record], validations: list[Record]) -> None:
    _draw_curve(axes, [(r["step"], r["loss"]) for r in steps], "training")
    if validations:
        last = validations[-1]["validation_loss"]
        places = [r["step"] for r in validations], [r["validation_loss"] for r in validations]
        axes.plot(*places, "o", color="tab:orange", clip_on=False, zorder=3, label=f"validation: {last:.3f}")
    axes.set(title="loss", ylabel="nats per byte")
    axes.legend()


def _draw_curve(axes: Any, points: list[tuple[int, float]], name: str = "") -> None:
    """What was measured, pale, and its smoothed course over it."""
    if points:
        places, values = zip(*points, strict=True)
        axes.plot(places, values, linewidth=1, alpha=0.35, color="tab:blue", label=name)
        axes.plot(places, smooth(values), linewidth=1.5, color="tab:blue", label=name and f"{name}, smoothed")
    axes.grid(alpha=0.3)


def _draw_moves(axes: Any, moves: list[Record]) -> None:
    """An arrow wherever experts moved, from the imbalance that the averaged load had before to that after."""
    for record in moves:
        place, before, after = record["step"] - 0.5, record["rebalanced_before"], record["rebalanced_after"]
        axes.axvline(place, color="tab:orange", linewidth=0.8, alpha=0.5)
        axes.annotate("", (place, after), (place, before), arrowprops={"arrowstyle": "->", "color": "tab:orange"})
        axes.plot([place, place], [before, after], linestyle="", marker=".", color="tab:orange")


def _lines(sample: str) -> list[str]:
    """Breaks a sample into lines, and cuts it to as many as the picture has room for."""
    text = printable(sample).expandtabs(4)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, LINE_LENGTH) or [""]]
    return lines[:MAX_LINES] + ["..."] * (len(lines) > MAX_LINES)


def _draw_load(axes: Any, records: list[Record]) -> Any:
    """Draws an image with a row for every expert, layer by layer, and a column for every step; 1 is an even load.

    Where there are more steps than a picture has room for, a column is the sum over some that follow each other.
    """
    starts = np.unique(np.linspace(0, len(records), min(len(records), MAX_COLUMNS), endpoint=False).astype(int))
    shape = np.shape(records[0]["load"])
    load = np.zeros((len(starts), *shape))  # [columns, L, E]
    for column, (start, end) in enumerate(zip(starts, [*starts[1:], len(records)], strict=True)):
        load[column] = np.sum([record["load"] for record in records[start:end]], axis=0)
    num_layers, num_experts = shape
    relative = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)
    first, last = records[0]["step"], records[-1]["step"]
    image = axes.imshow(
        relative.reshape(len(starts), -1).T,
        aspect="auto",
        interpolation="nearest",
        extent=(first - 0.5, last + 0.5, num_layers * num_experts - 0.5, -0.5),
        vmin=0,
        vmax=2,
    )
    for layer in range(1, num_layers):
        axes.axhline(layer * num_experts - 0.5, color="white", linewidth=1)
    axes.set(title="expert load", ylabel=f"expert ({num_experts} per layer)")
    return image


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _read_records(path: Path) -> list[Record]:
    """Reads all whole records. A last line without an end, which a killed run leaves, is skipped.

    Raises:
      DataError: the file cannot be read, or another line is not a record.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    records, shape = [], None
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None and "load" in record:
            shape = shape or np.shape(record["load"])
        if record is None or ("load" in record and np.shape(record["load"]) != shape):
            raise DataError(
                f"{path}: line {number} is not a record of a step of this run; remove the file or change --out"
            )
        records.append(record)
    return records


def _parse(line: bytes) -> Record | None:
    """The record on a line; None if the line holds something else."""
    try:
        record = json.loads(line)
        if "sample" in record:
            numbers, whole = [record["step"]], isinstance(record["sample"], str)
        elif "validation_loss" in record:
            numbers, whole = [record["step"], record["validation_loss"]], True
        elif MOVED in record:
            numbers, whole = [record[name] for name in ("step", "rebalanced_before", "rebalanced_after", MOVED)], True
        else:
            numbers = [record["step"], record["loss"], *np.ravel(record["load"]).tolist()]
            whole = np.ndim(record["load"]) == 2
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    plain = all(type(value) in (int, float) for value in numbers) and type(record["step"]) is int
    return record if plain and whole else None
