"""What a run leaves behind in its folder: `metrics.jsonl`, one record per step, and `report.png`, drawn from it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import DataError
from moe_jax.train.atomic import atomic_write
from moe_jax.train.extras import REMEDY, find

Record = dict[str, Any]


class MetricsFile:
    """`metrics.jsonl`, one line per step. A resumed run keeps the records up to its step and drops the rest.

    Raises:
      DataError: the path is no regular file, or holds something else than such records.
    """

    def __init__(self, path: Path, *, done_steps: int) -> None:
        self._path = path
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is not a file, and metrics are written there; remove it or change --out")
        kept = [record for record in _read_records(path) if record["step"] <= done_steps] if done_steps else []
        with atomic_write(path) as file:
            file.writelines(_line(record) for record in kept)
        self._file = path.open("ab", buffering=0)  # a line is one write: a killed run tears at most the last one

    def append(self, record: Record) -> None:
        self._file.write(_line(record))

    def records(self) -> list[Record]:
        return _read_records(self._path)

    def close(self) -> None:
        self._file.close()


def write_report(path: Path, records: list[Record]) -> str:
    """Draws the loss curve and the heat map of expert load over steps; returns a sentence on what was done."""
    if find("matplotlib") is None:
        return f"matplotlib is not installed, so {path} was not drawn; {REMEDY}"
    if not records:
        return f"{path} was not drawn: no step was taken"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, load_axes = figure.subplots(2, 1)
    _draw_loss(loss_axes, records)
    image = _draw_load(load_axes, records)
    figure.colorbar(image, ax=load_axes, label="load / mean load")
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return f"wrote {path}"


def _draw_loss(axes: Any, records: list[Record]) -> None:
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1)
    axes.set(title="training loss", xlabel="step", ylabel="nats per byte")
    axes.grid(alpha=0.3)


def _draw_load(axes: Any, records: list[Record]) -> Any:
    """Rows: the experts of every layer, layer by layer; columns: steps; 1 is a perfectly even load."""
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
    """All whole records; a last line that was cut off by a killed run is left out.

    Raises:
      DataError: the file cannot be read, or any other line is not a record.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None or (records and np.shape(record["load"]) != np.shape(records[0]["load"])):
            raise DataError(
                f"{path}: line {number} is not a record of a step of this run; remove the file or change --out"
            )
        records.append(record)
    return records


def _parse(line: bytes) -> Record | None:
    """The record on a line, None where it holds something else."""
    try:
        record = json.loads(line)
        numbers = [record["step"], record["loss"], *np.ravel(record["load"]).tolist()]
        drawable = np.ndim(record["load"]) == 2
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    plain = all(type(value) in (int, float) for value in numbers) and type(record["step"]) is int
    return record if plain and drawable else None
