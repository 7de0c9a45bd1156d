"""What a run leaves behind in its folder: `metrics.jsonl`, one record per step, and `report.png`, drawn from it."""

import json
import textwrap
import warnings
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import DataError
from moe_jax.tools.train.atomic import append_line, atomic_write
from moe_jax.tools.train.extras import REMEDY, find
from moe_jax.tools.train.sample import printable

LINE_LENGTH, MAX_LINES = 110, 30  # the room for a sample in the picture

Record = dict[str, Any]


class MetricsFile:
    """The file `metrics.jsonl`: one line per step, and one for every validation loss and sample, with its last step.

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


def write_report(path: Path, records: list[Record]) -> str:
    """Draws the losses, the load of every expert over steps and the last sample; returns a sentence on the outcome."""
    if find("matplotlib") is None:
        return f"matplotlib is not installed, so {path} was not drawn; {REMEDY}"
    steps = [record for record in records if "load" in record]
    if not steps:
        return f"{path} was not drawn: no step was taken"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sample = next((_lines(record["sample"]) for record in reversed(records) if "sample" in record), [])
    heights = [3.5, 3.5] + [0.3 + 0.15 * len(sample)] * bool(sample)  # inches
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, load_axes, *sample_axes = figure.subplots(len(heights), 1, height_ratios=heights)
    _draw_loss(loss_axes, steps, [record for record in records if "validation_loss" in record])
    image = _draw_load(load_axes, steps)
    figure.colorbar(image, ax=load_axes, label="load / mean load")
    for axes in (loss_axes, load_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in sample_axes:
        axes.set_axis_off()
        axes.set_title("sample")
        place = {"va": "top", "transform": axes.transAxes}
        axes.text(0, 1, "\n".join(sample), family="monospace", fontsize=8, parse_math=False, **place)
    try:
        # The font may lack characters of a sample. A box is drawn for each of them, and nobody needs a warning.
        with warnings.catch_warnings(action="ignore"), atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=110)
    except OSError as error:
        return f"{path} was not drawn ({error.strerror})"
    return f"drew {path}"


def _draw_loss(axes: Any, steps: list[Record], validations: list[Record]) -> None:
    axes.plot([r["step"] for r in steps], [r["loss"] for r in steps], linewidth=1, label="training")
    if validations:
        last = validations[-1]["validation_loss"]
        places = [r["step"] for r in validations], [r["validation_loss"] for r in validations]
        axes.plot(*places, "o", label=f"validation: {last:.3f}")
    axes.set(title="loss", xlabel="step", ylabel="nats per byte")
    axes.legend()
    axes.grid(alpha=0.3)


def _lines(sample: str) -> list[str]:
    """Breaks a sample into lines, and cuts it to as many as the picture has room for."""
    text = printable(sample).expandtabs(4)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, LINE_LENGTH) or [""]]
    return lines[:MAX_LINES] + ["..."] * (len(lines) > MAX_LINES)


def _draw_load(axes: Any, records: list[Record]) -> Any:
    """Draws an image with a row for every expert, layer by layer, and a column for every step; 1 is an even load."""
    load = np.array([r["load"] for r in records], np.float64)  # [steps, L, E]
    num_layers, num_experts = load.shape[1:]
    relative = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)
    first, last = records[0]["step"], records[-1]["step"]
    image = axes.imshow(
        relative.reshape(len(records), -1).T,
        aspect="auto",
        interpolation="nearest",
        extent=(first - 0.5, last + 0.5, num_layers * num_experts - 0.5, -0.5),
        vmin=0,
        vmax=2,
    )
    for layer in range(1, num_layers):
        axes.axhline(layer * num_experts - 0.5, color="white", linewidth=1)
    axes.set(title="expert load", xlabel="step", ylabel=f"expert ({num_experts} per layer)")
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
        else:
            numbers = [record["step"], record["loss"], *np.ravel(record["load"]).tolist()]
            whole = np.ndim(record["load"]) == 2
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    plain = all(type(value) in (int, float) for value in numbers) and type(record["step"]) is int
    return record if plain and whole else None
