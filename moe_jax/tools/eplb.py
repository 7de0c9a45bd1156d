"""`python -m moe_jax eplb`: from measured loads to a placement of experts, what it gains, and a picture of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import moe_jax as moe
from moe_jax.balance.placement import over_mean, rank_loads, read_load
from moe_jax.errors import DataError, InvalidArgumentError, MoEError
from moe_jax.host.atomic import atomic_write
from moe_jax.host.extras import REMEDY, find
from moe_jax.tools.drawing import new_figure, save


def run(
    path: str,
    *,
    ranks: int,
    redundant: int,
    groups: int,
    nodes: int,
    steps: int | None,
    out: str,
    json_lines: bool,
) -> int:
    """Places experts for the loads in a file, says what that gains, and writes ``placement.json`` and ``load.png``.

    Args:
      path: a JSON list of loads, [E] or [layers, E], or the ``metrics.jsonl`` of a training run.
      ranks, redundant, groups, nodes: as for ``moe_jax.rebalance``; P = E + redundant. Counts, as has been checked.
      steps: of metrics, how many of the last steps to sum up; None for all.
      out: the folder to write into, which is made if it is not there.
      json_lines: print one JSON object instead of sentences.

    Raises:
      DataError: the file holds no loads, or the folder cannot be written.
      InvalidArgumentError: the sizes do not fit each other. The text names the options, as a person gave them.
    """
    load, source = read_loads(Path(path), steps)
    layers = np.atleast_2d(load)
    num_experts = layers.shape[1]
    num_slots = num_experts + redundant
    _check_sizes(num_experts, num_slots, ranks, groups, nodes)
    placement = moe.rebalance(
        layers, num_physical_experts=num_slots, num_ranks=ranks, num_groups=groups, num_nodes=nodes
    )
    # Before: the experts in order, as evenly many on each rank as possible.
    in_order = np.stack([part.sum(1) for part in np.array_split(layers, ranks, axis=1)], axis=1)
    before, after = over_mean(in_order), over_mean(rank_loads(layers, placement))
    imbalance = [loads.max(1) for loads in (before, after)]
    written = _write(Path(out), placement, before, after)
    if json_lines:
        values = {"layers": len(layers), "experts": num_experts, "ranks": ranks, "redundant": redundant}
        values |= {"before": imbalance[0].tolist(), "after": imbalance[1].tolist(), "files": written}
        print(json.dumps({"event": "eplb", **values}))
        return 0
    print(f"{source}: {len(layers)} layers, {num_experts} experts; {ranks} ranks, {redundant} redundant slots")
    print("load of the fullest rank over the mean   all layers   worst layer")
    for name, values in (("  experts in order", imbalance[0]), ("  placed", imbalance[1])):
        print(f"{name:<38} {values.mean():>12.3f} {values.max():>13.3f}")
    gain = imbalance[0].mean() / imbalance[1].mean()
    print(f"A step that waits for the fullest rank of each layer gets {gain:.2f} times as fast.")
    layer, expert = np.unravel_index(placement.replica_counts.argmax(), placement.replica_counts.shape)
    if redundant:
        print(f"most replicas: {placement.replica_counts.max()}, of expert {expert} in layer {layer}")
    print(f"wrote {', '.join(written)}" + ("" if find("matplotlib") else f"; matplotlib, for a picture: {REMEDY}"))
    return 0


def _check_sizes(num_experts: int, num_slots: int, ranks: int, groups: int, nodes: int) -> None:
    """Raises where ``rebalance`` would refuse the sizes, in the words of the command line."""
    redundant = num_slots - num_experts
    if num_slots % ranks:
        raise InvalidArgumentError(
            f"--ranks={ranks} does not divide the {num_slots} slots, {num_experts} experts and --redundant={redundant}"
            f"; every rank has as many slots: pass --redundant {-num_experts % ranks}, or other --ranks"
        )
    if num_experts % groups:
        raise InvalidArgumentError(
            f"--groups={groups} does not divide the {num_experts} experts; groups are equal, so take a divisor"
        )
    if groups % nodes == 0 and ranks % nodes:  # otherwise nodes do not count
        raise InvalidArgumentError(
            f"--nodes={nodes} does not divide --ranks={ranks}; every node has as many ranks: take a divisor"
        )


def read_loads(path: Path, steps: int | None = None) -> tuple[np.ndarray, str]:
    """The loads in a file, [E] or [layers, E], and what they are, in words.

    Raises:
      DataError: the file cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason}); pass loads as JSON, or a run's metrics.jsonl") from None
    try:
        if path.suffix == ".jsonl":
            records = _read_lines(text)
            loads = [record["load"] for record in records if isinstance(record, dict) and "load" in record]
            if not loads:
                raise DataError(f"{path}: no line has a load; pass the metrics.jsonl of a training run")
            loads = loads[-steps:] if steps else loads
            return _as_loads(path, np.array(loads).sum(0)), f"{path}, sum of {len(loads)} steps"
        if steps is not None:
            raise DataError(f"{path}: --steps is for metrics.jsonl; a JSON file holds one set of loads")
        return _as_loads(path, np.array(json.loads(text))), str(path)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: holds no loads ({error}); expected lists of numbers, all of one length") from None


def _read_lines(text: str) -> list[Any]:
    """The JSON of every line. A run that is under way, or was killed, may have written half of its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    records = [json.loads(line) for line in lines[:-1]]
    try:
        return records + [json.loads(line) for line in lines[-1:]]
    except json.JSONDecodeError:
        if text.endswith("\n"):
            raise
        return records


def _as_loads(path: Path, load: np.ndarray) -> np.ndarray:
    if load.ndim not in (1, 2) or not np.issubdtype(load.dtype, np.number):
        raise DataError(f"{path}: holds no list of loads, nor a list of such lists for several layers")
    try:
        return read_load(load)
    except MoEError as error:
        raise DataError(f"{path}: {error}") from None


def _write(folder: Path, placement: "moe.Placement", before: np.ndarray, after: np.ndarray) -> list[str]:
    """Writes the placement with its tables, and the picture where matplotlib is installed; returns the paths."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "placement.json") as file:
            file.write(placement.to_json().encode() + b"\n")
        with atomic_write(folder / "tables.json") as file:
            file.write(json.dumps(placement.table().tolist()).encode() + b"\n")
        written = [str(folder / "placement.json"), str(folder / "tables.json")]
        if find("matplotlib") is not None:
            save(_draw(before, after), folder / "load.png")
            written.append(str(folder / "load.png"))
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); pass another --out") from None
    return written


def _draw(before: np.ndarray, after: np.ndarray) -> Any:
    """Two pictures of [layers, R] loads over the mean, with one scale of colours."""
    figure = new_figure(9, 2.5 + 0.08 * len(before))
    largest, images = max(before.max(), after.max()), []
    pictures = zip(figure.subplots(1, 2, sharey=True), (before, after), ("in order", "placed"), strict=True)
    for axes, part, title in pictures:
        image = axes.imshow(part, aspect="auto", vmin=0, vmax=largest, cmap="magma", interpolation="nearest")
        axes.set(title=f"{title}: fullest rank {part.max():.2f} x mean", xlabel="rank", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        images.append(image)
    figure.colorbar(images[-1], ax=figure.axes, label="load / mean load")
    return figure
