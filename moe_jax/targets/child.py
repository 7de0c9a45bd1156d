"""The process that compiles: reads a job, lowers or calls the builder, compiles, and writes down what came of it."""

import importlib
import json
import os
import pickle
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from moe_jax import _compat
from moe_jax.contract import memory_fields
from moe_jax.errors import InvalidArgumentError
from moe_jax.targets.target import find_target


def main(folder: Path) -> None:
    """Does the job in ``folder/job``, and leaves ``result.json`` there, and ``program.hlo`` if all went well."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    job = pickle.loads((folder / "job").read_bytes())
    try:
        result = _compile(job, folder)
    except Exception as error:  # whatever it is, the caller hears of it
        result = {"error": f"{type(error).__name__}: {error}"}
    (folder / "result.json").write_text(json.dumps(result))


def _leave_with_parent() -> None:
    """The other end of standard input closes when the parent ends, however it ends."""
    sys.stdin.buffer.read()
    os._exit(1)


def _compile(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    target = find_target(job["target"])
    devices = _devices(target)
    started = time.perf_counter()
    lowered = _lower_built(job, devices) if "builder" in job else _lower_exported(job, devices)
    middle = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    (folder / "program.hlo").write_text(compiled.as_text())
    memory = compiled.memory_analysis()
    return {
        "memory": {**memory_fields(memory), "peak_bytes": int(memory.peak_memory_in_bytes)},
        "device_kind": devices[0].device_kind,
        "lower_seconds": middle - started,
        "compile_seconds": ended - middle,
    }


def _devices(target) -> list[jax.Device]:
    if target.platform == "cpu":
        return jax.devices()
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform=target.lowering_platform, **target.topology).devices


def _lower_built(job: dict[str, Any], devices: list[jax.Device]) -> jax.stages.Lowered:
    """Calls the builder with the devices of the target, which can compile and nothing else."""
    module, _, function = job["builder"].partition(":")
    built = getattr(importlib.import_module(module), function)(devices, *job["args"])
    if not (isinstance(built, tuple) and len(built) == 2 and callable(built[0]) and isinstance(built[1], (tuple, list))):
        raise InvalidArgumentError(
            f"fn={job['builder']!r} returned {built!r:.200}; a builder returns a function and a tuple of its arguments"
        )
    fn, args = built
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    return jitted.lower(*args)


def _lower_exported(job: dict[str, Any], devices: list[jax.Device]) -> jax.stages.Lowered:
    """Lays the exported program out over the target's devices: device i of the caller's mesh is device i here."""
    exported = job["exported"]
    jitted = jax.jit(exported.call, donate_argnums=job["donated"])
    avals = exported.in_avals
    if exported.nr_devices == 1:
        here = SingleDeviceSharding(devices[0])
        return jitted.lower(*(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here) for a in avals))
    names, sizes = job["mesh"] or (("devices",), (exported.nr_devices,))
    mesh = _compat.auto_mesh(np.array(devices[: exported.nr_devices]).reshape(sizes), names)
    args = []
    for aval, placed in zip(avals, job["placed"]):
        sharding = None if placed is None else NamedSharding(mesh, PartitionSpec(*placed[0]), memory_kind=placed[1])
        args.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding))
    with jax.set_mesh(mesh):  # says which devices, if no argument does
        return jitted.lower(*args)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
