"""The command: measures, or reads what was measured, and says what it means."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.config import Config, MeshConfig
from moe_jax.elastic.wait_matrix import Straggler, find_stragglers, in_words
from moe_jax.errors import InvalidArgumentError, check_count
from moe_jax.mesh import ensure_devices, make_mesh
from moe_jax.tools.drawing import check_picture, check_writable, save_asked
from moe_jax.tools.stragglers.faults import parse_duration, parse_faults
from moe_jax.tools.stragglers.measure import Layer, layer_of, measure, small_layer
from moe_jax.tools.stragglers.picture import draw_waits, heat_map
from moe_jax.tools.stragglers.waits import Waits, read_waits, write_waits
from moe_jax.tools.train import peers

STEPS, WARM_UP, AT_LEAST = 30, 2, "0.5ms"
DEFAULT_MESH = MeshConfig(ep=8)


def run(
    config: Config | None = None,
    *,
    path: str = "",
    mesh: MeshConfig | None = None,
    steps: int = STEPS,
    warm_up: int = WARM_UP,
    at_least: str = AT_LEAST,
    injected: Sequence[str] = (),
    distributed: bool | str = False,
    given: str | None = None,
    out: str | None = None,
    picture: str | None = None,
    json_lines: bool = False,
) -> int:
    """Times the exchanges of a layer, prints who waits for whom, and says what is slow. Returns the exit code, 0.

    Args:
      config, path: a layer to time, and the file that it came from; None: a small one.
      mesh: None: that of ``config``, or ep=8. All its devices are expert-parallel ranks.
      steps: how many are timed.
      warm_up: how many of the first are left out.
      at_least: what a slow rank or link adds to a step at least: "0.5ms".
      injected: faults of a rehearsal, as ``parse_faults`` reads them.
      distributed: whether this is one of several processes, as for ``train``; the first one prints and writes.
      given: a file of waits to read instead of measuring.
      out: a file to write the waits of all steps into.
      picture: a file to draw into.
      json_lines: print one JSON object instead of text.

    Raises:
      InvalidArgumentError, ConfigError, MeshError: an argument is not as above; all is checked first.
      DataError: a file cannot be read or written.
      UnsupportedError: there is to be a picture, and matplotlib is not installed.
    """
    check_count("--steps", steps)
    check_count("--warm-up", warm_up, low=0)
    least = 1e6 * parse_duration("--at-least", at_least)
    if picture is not None:
        check_picture(picture)
    if out is not None:
        check_writable("--out", out)
    if given is not None:
        waits = read_waits(Path(given))
    else:
        if warm_up >= steps:
            raise InvalidArgumentError(f"--warm-up {warm_up} leaves none of --steps {steps}; take more steps")
        waits = _measured(config, path, mesh or (config.mesh if config else DEFAULT_MESH), steps, injected, distributed)
    if not peers.leads():
        return 0
    found = find_stragglers(waits.ready, waits.travel, warm_up=warm_up, at_least=least)
    ready, travel, total = (
        np.median(part[warm_up:], axis=0) for part in (waits.ready, waits.travel, waits.ready + waits.travel)
    )
    files = [str(file) for file in (out, picture) if file is not None]
    if out is not None:
        write_waits(waits, Path(out))
    if picture is not None:
        save_asked(draw_waits(ready, travel, waits.where, found), picture)
    counted = {"ranks": len(total), "steps": len(waits.ready) - warm_up, "warm_up": warm_up}
    if json_lines:
        record = {"event": "stragglers", "where": waits.where, **counted}
        record |= {"ready": ready.tolist(), "travel": travel.tolist(), "files": files}
        record["stragglers"] = [{**dataclasses.asdict(one), "text": str(one)} for one in found]
        print(json.dumps(record))
        return 0
    print(f"{waits.where}: {counted['steps']} steps, after {warm_up} that are left out")
    print("How long each rank (row) waited for each other one (column) in a step, median over steps:\n")
    print(heat_map(total) + "\n")
    print("\n".join(_verdict(found, total)))
    if files:
        print(f"wrote {', '.join(files)}")
    return 0


def _measured(
    config: Config | None, path: str, mesh: MeshConfig, steps: int, injected: Sequence[str], distributed: bool | str
) -> Waits:
    if mesh.num_devices != mesh.ep:
        raise InvalidArgumentError(
            f"the mesh has tp={mesh.tp} and dp={mesh.dp}, and stragglers times one group of ranks; give all devices to "
            f"it, as in --mesh ep={mesh.num_devices}"
        )
    if mesh.ep < 2:
        raise InvalidArgumentError("the mesh has one rank, which waits for nobody; give more, as in --mesh ep=8")
    layer: Layer = small_layer(mesh.ep) if config is None else layer_of(dataclasses.replace(config, mesh=mesh), path)
    delays = parse_faults(injected, mesh.ep)
    if distributed:
        place = peers.parse_place(distributed) if isinstance(distributed, str) else None
        peers.join(place, num_devices=mesh.num_devices)
    else:
        ensure_devices(mesh.num_devices)
    devices = make_mesh(ep=mesh.ep, nodes=mesh.nodes)
    ready, travel = measure(devices, layer, delays, steps)
    extents = f"ep={mesh.ep}" + (f", nodes={mesh.nodes}" if mesh.nodes > 1 else "")
    rehearsal = f", rehearsing {', '.join(injected)}" if injected else ""
    return Waits(ready=ready, travel=travel, where=f"{extents} on {devices.devices.flat[0].device_kind}{rehearsal}")


def _verdict(found: Sequence[Straggler], total: np.ndarray) -> list[str]:
    if found:
        return [str(one) for one in found]
    others: Any = total[~np.eye(len(total), dtype=bool)]
    usual, longest = in_words(float(np.median(others))), in_words(float(others.max()))
    return [f"no rank and no link stands out: ranks wait {usual} for each other, and {longest} at most"]
