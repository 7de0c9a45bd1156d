"""The command: it times one workload after the other, and prints rows as they come, and JSON lines where asked.

It says first how long it will take. Progress goes to standard error.
"""

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax

from moe_jax import quant
from moe_jax.config import DTYPES, Config, MeshConfig
from moe_jax.errors import InvalidArgumentError, check_choice, check_count
from moe_jax.mesh import ensure_devices, make_mesh
from moe_jax.tools.bench.check import WrongResult
from moe_jax.tools.bench.estimate import estimate_seconds, pace_of, words
from moe_jax.tools.bench.measure import measure
from moe_jax.tools.bench.memory import keep_freed_memory
from moe_jax.tools.bench.picture import draw_times
from moe_jax.tools.bench.programs import BASELINES, CONTENDERS, Setting, make_layer, make_setting, on_transport
from moe_jax.tools.bench.report import describe_pass, describe_transports, describe_workload
from moe_jax.tools.bench.workloads import WORKLOADS, Workload, of_config
from moe_jax.tools.drawing import check_picture, save_asked

QUICK = ("W1", "W3", "W4")
REPEATS, QUICK_REPEATS = 7, 3
DEFAULT_MESH = MeshConfig(ep=8)
WIRES = tuple(name for name in quant.NAMES if not name.endswith("static"))  # the layer has no scales for static recipes


def run(
    config: Config | None = None,
    *,
    path: str = "",
    mesh: MeshConfig | None = None,
    workloads: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("float32",),
    quants: Sequence[str] = ("none",),
    contenders: Sequence[str] | None = None,
    repeats: int | None = None,
    quick: bool = False,
    max_seconds: float = 60.0,
    json_path: str | None = None,
    picture: str | None = None,
) -> int:
    """Times the layer on ``workloads`` and on ``config``, with every dtype and wire. Returns the exit code.

    Args:
      config, path: one more workload, and the file that it came from. It is the only one if ``workloads`` is None.
      mesh: None: that of ``config``, or ep=8.
      workloads: names in ``WORKLOADS``; None: all, or W1, W3 and W4 with ``quick``.
      dtypes, quants: the dtypes of rows, and the recipes by which they travel.
      contenders: what the layer is compared with, names in ``CONTENDERS``: usual ways to compute it, which are the
        default, and the layer itself over other transports.
      repeats: rounds of timing; None: 7, or 3 with ``quick``.
      max_seconds: contenders that need longer for one run are left out.
      json_path: a file for JSON lines, raw seconds included; "-": standard output, instead of the tables.
      picture: a file to draw the times of all contenders into, by workload and pass. It is drawn again after each
        workload, so that a run that is ended early leaves a picture of the workloads that were done.

    Returns:
      0, or 1 if a program computed something wrong: such a workload has no times.

    Raises:
      InvalidArgumentError, ConfigError, MeshError: a name or a size is not as above. All are checked before the first
        run.
      UnsupportedError: a picture is asked for, and matplotlib is not installed.
      DataError: the picture cannot be written.
    """
    chosen = _workloads(config, path, workloads, quick)
    _check_each("dtype", dtypes, DTYPES)
    _check_each("quant", quants, WIRES)
    contenders = BASELINES if contenders is None else contenders
    _check_each("against", contenders, CONTENDERS)
    if repeats is not None:
        check_count("repeats", repeats)
    if not max_seconds > 0:
        raise InvalidArgumentError(f"max_seconds={max_seconds} must be above zero")
    if picture is not None:
        check_picture(picture)
    extents = mesh or (config.mesh if config else DEFAULT_MESH)
    kept = keep_freed_memory()
    ensure_devices(extents.num_devices)
    devices = make_mesh(ep=extents.ep, tp=extents.tp, nodes=extents.nodes, dp=extents.dp)
    rounds = repeats or (QUICK_REPEATS if quick else REPEATS)
    others = [name for name in contenders if name not in BASELINES]
    runs = [(workload, dtype, wire) for workload in chosen for dtype in dtypes for wire in quants]
    for workload, dtype, wire in runs:  # whatever does not fit is told before the first run
        for layer in (workload, *(on_transport(workload, name) for name in others)):
            make_layer(layer, devices, dtype, wire)
    records = []
    with contextlib.ExitStack() as stack:
        lines = open_lines(json_path, stack)
        header = {"event": "bench", "mesh": dict(devices.shape), "repeats": rounds, "jax": jax.__version__}
        header |= {"platform": devices.devices.flat[0].platform, "keeps_freed_memory": kept}
        pace = pace_of(devices)
        ahead = sum(
            estimate_seconds(workload, devices.size, contenders, repeats=rounds, max_seconds=max_seconds, pace=pace)
            for workload, *_ in runs
        )
        header["estimated_seconds"] = round(ahead, 1)
        emit(header, lines)
        if lines is not sys.stdout:
            print(
                f"moe_jax bench: {header['mesh']} on {devices.size} {header['platform']} device(s), median (quartiles) "
                f"of {rounds} rounds; 1 = the dense limit; * see below; {words(ahead)}",
                flush=True,
            )
        for workload, dtype, wire in runs:
            setting = functools.partial(make_setting, workload, devices, dtype, wire, contenders)
            records.append(_one((workload.name, dtype, wire), setting, rounds, max_seconds, lines))
            if picture is not None and records[-1] is not None:
                save_asked(draw_times([record for record in records if record is not None], header), picture)
    measured = [record for record in records if record is not None]
    if others and measured and json_path != "-":
        print("\n" + describe_transports(measured))
    if picture is not None and measured and json_path != "-":
        print(f"\ndrew {picture}")
    return 0 if len(measured) == len(runs) else 1


def _one(
    names: tuple[str, str, str],
    make: Callable[[], Setting],
    rounds: int,
    max_seconds: float,
    lines: TextIO | None,
) -> dict[str, Any] | None:
    """Measures and prints one workload, with rows of one dtype and recipe. None if a program was wrong."""

    def progress(text: str) -> None:
        print(f"{' '.join(names)}: {text}", file=sys.stderr, flush=True)

    def finished(record: dict[str, Any], phase: str) -> None:
        if lines is not sys.stdout:
            print(describe_pass(record, phase), flush=True)

    _, dtype, _ = names
    precision = "highest" if dtype == "float32" else "default"  # fp32 products in fp32 wherever it runs
    try:
        with jax.default_matmul_precision(precision):
            setting = make()
            if lines is not sys.stdout:
                print("\n" + describe_workload(names[0], setting.workload, setting.plan), flush=True)
            found = measure(setting, rounds, max_seconds, progress, finished)
    except WrongResult as error:
        print(f"moe_jax bench: {' '.join(names)}: no times: {error}", file=sys.stderr, flush=True)
        what = dict(zip(("workload", "dtype", "quant"), names, strict=True))
        emit({"event": "wrong", **what, "what": str(error)}, lines)
        return None
    emit(found, lines)
    return found


def _workloads(config: Config | None, path: str, names: Sequence[str] | None, quick: bool) -> list[Workload]:
    if names is None:
        names = () if config else QUICK if quick else tuple(WORKLOADS)
    _check_each("workloads", names, WORKLOADS)
    return [WORKLOADS[name] for name in names] + ([of_config(config, path)] if config else [])


def _check_each(name: str, values: Sequence[str], known: Any) -> None:
    for value in values:
        check_choice(name, value, known)


def open_lines(path: str | None, stack: contextlib.ExitStack) -> TextIO | None:
    """The stream that JSON lines go to; None if nobody wants them."""
    if path is None or path == "-":
        return None if path is None else sys.stdout
    try:
        return stack.enter_context(Path(path).open("w"))
    except OSError as error:
        raise InvalidArgumentError(f"json={path!r} cannot be written ({error.strerror}); give another file") from None


def emit(values: dict[str, Any], lines: TextIO | None) -> None:
    """Writes a JSON line, if somebody wants them."""
    if lines is not None:
        print(json.dumps(values), file=lines, flush=True)
