"""``compile_for``: the calling side. It lowers the program, hands it to a process of its own, and reads the result."""

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import export

from moe_jax import _compat
from moe_jax.errors import CompilationError, InvalidArgumentError, MeshError
from moe_jax.targets.report import TargetReport, make_report
from moe_jax.targets.target import Target, find_target

_LOG_LINES = 30


def compile_for(target: str, fn: Callable | str, *abstract_args: Any) -> TargetReport:
    """Compiles ``fn`` for hardware that need not be here, with its real compiler, and reports what came of it.

    Nothing runs on the target, so every figure is exact and repeatable, and no time is measured. The compiler works in
    a process of its own, which ends with this call, also when the call is interrupted.

    What is decided where. A function is traced and lowered to StableHLO in this process, for the target's platform:
    ``jax.lax.platform_dependent``, and with it ``backend="auto"`` of ``grouped_matmul``, take the target's branch. What
    Python code asks while it is traced is answered by the devices that are here: ``jax.default_backend()``, and
    ``make_plan``, which takes the back end and the transport for the platform of its mesh. On a mesh of emulated CPUs
    the plan is therefore one for CPUs unless it is made with ``backend="tpu"`` or ``"gpu"`` and a named ``transport``.
    To have everything decided for the target, pass a builder: it runs in the other process, and the mesh that it makes
    of the target's devices has the target's platform. (``jax.default_backend()`` says "cpu" there as well.)

    Args:
      target: the number of devices, or a topology, of a kind of machine: "cpu:8", "v5e:2x4", "v5p:2x2x2", "v6e:2x4",
        "h100:8", "h200:8", "b200:8", "gb200:8", "a100:8". GPUs beyond 8 come in hosts of 8.
      fn: a function, jitted (its shardings and donations are kept) or plain, over one device, or over a mesh of as
        many devices as the target has. Device i of the mesh is device i of the target; emulated devices will do, and so
        does an ``AbstractMesh``. Or the name of a builder, "package.module:function": a function (devices,
        *abstract_args) -> (fn, args) that makes a mesh of the devices, and ``fn`` and its ShapeDtypeStructs over it.
      abstract_args: arrays or ``jax.ShapeDtypeStruct``s, with their shardings if there are several devices; trees of
        them too. For a builder: anything that can be pickled.

    Returns:
      A ``TargetReport``: flops, memory traffic, collectives with their bytes, gathers and scatters, memory, kernels,
      and on TPU the compiler's own cycles by named scope. ``assert_hlo_contract`` takes it.

    Raises:
      InvalidArgumentError: the target is unknown, or ``fn`` or an argument is not as above.
      UnsupportedError: the target's compiler is not installed; the text says how to install it.
      MeshError: ``fn`` wants another number of devices than the target has.
      CompilationError: the program cannot be lowered for the target, or the compiler refuses it.

    Installed compilers are JAX plug-ins, for which JAX looks for devices when it starts in this process: on a machine
    that has none, ``emulate_devices``, or JAX_PLATFORMS=cpu in the environment, spares it the search and its warnings.
    GPU programs are compiled without a card to try kernels on, so XLA takes its default tiles instead of tuned ones.
    The TPU compiler leaves kernels, collectives and some others unpriced, and its prices are estimates.

    >>> import jax.numpy as jnp, moe_jax as moe
    >>> report = moe.compile_for("cpu:8", lambda a, b: a @ b, jnp.ones((64, 32)), jnp.ones((32, 16)))
    >>> report.flops == 2 * 64 * 32 * 16
    True
    """
    where = find_target(target)
    where.check_installed()
    if isinstance(fn, str):
        job, devices = _job_of_builder(fn, abstract_args), where.num_devices
    else:
        job = _job_of_function(where, fn, abstract_args)
        devices = job["exported"].nr_devices
    with tempfile.TemporaryDirectory(prefix="moe_jax_compile_") as name:
        folder = Path(name)
        (folder / "job").write_bytes(_pickled({"target": target, **job}))
        result = _run(where, folder)
        hlo = (folder / "program.hlo").read_text()
    return make_report(
        hlo, **result, target=target, platform=where.platform, num_devices=devices, compiler=where.compiler
    )


def _job_of_builder(name: str, args: tuple) -> dict[str, Any]:
    module, colon, function = name.partition(":")
    if not (colon and module and function.isidentifier()):
        raise InvalidArgumentError(f"fn={name!r} does not name a builder; write it as 'package.module:function'")
    if module == "__main__":
        raise InvalidArgumentError(f"fn={name!r}: the process that compiles cannot import a script; use a module")
    return {"builder": name, "args": args}


def _job_of_function(target: Target, fn: Callable, args: tuple) -> dict[str, Any]:
    """``fn`` as StableHLO, the mesh that it is over, and which arguments it may overwrite."""
    if not callable(fn):
        raise InvalidArgumentError(f"fn={fn!r} is neither a function nor the name of a builder")
    for leaf in jax.tree.leaves(args):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise InvalidArgumentError(
                f"abstract_args hold {leaf!r}; pass arrays or jax.ShapeDtypeStructs, and bind what is static to "
                "fn with functools.partial"
            )
    jitted = _compat.jitted(fn)
    traced = jitted.trace(*args)  # mistakes in fn are raised here, unchanged
    donated = tuple(place for place, info in enumerate(jax.tree.leaves(traced.args_info)) if info.donated)
    # The other process has the same JAX, so it knows every custom call that this one knows, however new.
    checks = [export.DisabledSafetyCheck.custom_call("ALL")]
    try:
        exported = export.export(jitted, platforms=[target.lowering_platform], disabled_checks=checks)(*args)
    except Exception as error:
        raise CompilationError(f"fn cannot be lowered for target={target.name!r}: {error}") from error
    if exported.nr_devices not in (1, target.num_devices):
        raise MeshError(
            f"target={target.name!r} has {target.num_devices} devices and fn is over a mesh of {exported.nr_devices}; "
            "make the mesh as large as the target, or name another target"
        )
    # Arguments and results become flat tuples, since the other process need not know the classes of the caller's trees.
    flat_in = jax.tree.structure(((0,) * len(exported.in_avals), {}))
    flat_out = jax.tree.structure((0,) * len(exported.out_avals))
    exported = dataclasses.replace(exported, in_tree=flat_in, out_tree=flat_out, _get_vjp=None)
    return {"exported": exported, "mesh": _compat.mesh_of_exported(exported), "donated": donated}


def _pickled(job: dict[str, Any]) -> bytes:
    try:
        return pickle.dumps(job)
    except Exception as error:  # pickle raises whatever the object raises
        raise InvalidArgumentError(f"abstract_args cannot be pickled for the process that compiles: {error}") from error


def _run(target: Target, folder: Path) -> dict[str, Any]:
    """Lets another process do the job in ``folder``; its result, or its error."""
    environment = {**target.environment(), "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-P", "-m", "moe_jax.targets.child", str(folder)]
    with open(folder / "log", "wb") as log:
        # The child has a session of its own. So Ctrl-C reaches this process alone, which can end all of the child's.
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = child.wait()
        finally:
            _end(child)
    written = folder / "result.json"
    if not written.exists():
        tail = "\n".join((folder / "log").read_text(errors="replace").splitlines()[-_LOG_LINES:])
        raise CompilationError(f"the compiler of target={target.name!r} ended with code {code} and no result:\n{tail}")
    result = json.loads(written.read_text())
    if "error" in result:
        raise CompilationError(f"target={target.name!r}: {result['error']}")
    return result


def _end(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and so have its children
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:  # the pipe that ``_run`` opened: its end tells the child that nobody waits for it
        child.stdin.close()
