"""The process that compiles: it reads a job, makes the program, compiles it, and writes down what came of it."""

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
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, SingleDeviceSharding

from moe_jax import _compat
from moe_jax.errors import CompilationError, InvalidArgumentError
from moe_jax.hlo.contract import memory_fields
from moe_jax.targets.target import Target, find_target


def main(folder: Path) -> None:
    """Does the job in ``folder/job``. It leaves ``result.json`` in the folder, and ``program.hlo`` if all went well."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    job = pickle.loads((folder / "job").read_bytes())
    try:
        result = _compile(job, folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller hears of it
        result = {"error": f"{type(error).__name__}: {error}"}
    (folder / "result.json").write_text(json.dumps(result))


def _leave_with_parent() -> None:
    """Ends this process when its parent ends. However that happens, the other end of standard input is closed then."""
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
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if text is None or memory is None:
        raise CompilationError(f"the compiler of target={target.name!r} tells nothing about the program that it made")
    (folder / "program.hlo").write_text(text)
    return {
        "memory": {**memory_fields(memory), "peak_bytes": int(memory.peak_memory_in_bytes)},
        "device_kind": devices[0].device_kind,
        "lower_seconds": middle - started,
        "compile_seconds": ended - middle,
    }


def _devices(target: Target) -> list[_compat.Device]:
    if target.platform == "cpu":
        return jax.devices()
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform=target.lowering_platform, **target.topology).devices


def _lower_built(job: dict[str, Any], devices: list[_compat.Device]) -> jax.stages.Lowered:
    """Calls the builder with the devices of the target, which can compile and nothing else."""
    module, _, function = job["builder"].partition(":")
    built = getattr(importlib.import_module(module), function)(devices, *job["args"])
    is_pair = isinstance(built, tuple) and len(built) == 2
    if not (is_pair and callable(built[0]) and isinstance(built[1], (tuple, list))):
        raise InvalidArgumentError(
            f"fn={job['builder']!r} returned {built!r:.200}; a builder returns a function and a tuple of its arguments"
        )
    fn, args = built
    return _compat.jitted(fn).lower(*args)


def _lower_exported(job: dict[str, Any], devices: list[_compat.Device]) -> jax.stages.Lowered:
    """Lays the exported program out over the target's devices: device i of the caller's mesh is device i here."""
    exported = job["exported"]
    avals = exported.in_avals
    # As jit does, this drops arguments that nothing reads: they are no arguments of the program, in which zeros stand
    # for them.
    read = [
        place
        for place, aval in enumerate(avals)
        if place in exported.module_kept_var_idx or jnp.issubdtype(aval.dtype, jax.dtypes.extended)
    ]

    def call(*arrays):
        leaves = dict(zip(read, arrays, strict=True))
        return exported.call(*(leaves[p] if p in leaves else jnp.zeros(a.shape, a.dtype) for p, a in enumerate(avals)))

    jitted = jax.jit(call, donate_argnums=[read.index(place) for place in job["donated"] if place in read])
    if exported.nr_devices == 1:
        placed = [SingleDeviceSharding(devices[0])] * len(avals)
        return jitted.lower(*(_argument(avals[place], placed[place]) for place in read))
    shape = job["mesh"] or AbstractMesh((exported.nr_devices,), ("devices",), axis_types=(AxisType.Auto,))
    here = np.array(devices[: exported.nr_devices]).reshape(tuple(shape.shape.values()))
    mesh = Mesh(here, shape.axis_names, axis_types=shape.axis_types)
    placed = exported.in_shardings_jax(mesh)
    with jax.set_mesh(mesh):  # tells JAX the devices, where no argument does
        return jitted.lower(*(_argument(avals[place], placed[place]) for place in read))


def _argument(aval: jax.core.ShapedArray, sharding: jax.sharding.Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
