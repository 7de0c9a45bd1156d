"""Meshes and emulated devices: where the operators run."""

import glob
import math
import textwrap
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from moe_jax import _compat
from moe_jax.errors import DeviceInitError, InvalidArgumentError, MeshError, check_count

# For each of JAX's plug-ins: patterns of device files. A machine that has the accelerator has a file of at least one.
_DEVICE_FILES = {
    "jax-cuda": ("/dev/nvidia*", "/dev/dxg", "/dev/nvhost*"),  # Linux, WSL, Jetson
    "jax-rocm": ("/dev/kfd",),
    "libtpu": ("/dev/accel*", "/dev/vfio/*"),
    "jax-metal": ("/",),
}


def emulate_devices(num_devices: int) -> None:
    """Makes the CPU appear as ``num_devices`` devices; call it before the first device query.

    A second call never takes devices away: JAX shows the largest number that was asked for.

    Args:
      num_devices: how many CPU devices JAX shows, at least 1.

    Raises:
      DeviceInitError: JAX has already initialised its devices and shows fewer.

    >>> import moe_jax as moe
    >>> moe.emulate_devices(8)
    """
    check_count("num_devices", num_devices)
    if _compat.backends_are_initialized():
        found = len(jax.devices())
        if jax.default_backend() == "cpu" and found >= num_devices:
            return
        raise DeviceInitError(
            f"num_devices={num_devices}: JAX already started with {found} {jax.default_backend()} device(s), and the "
            "number is fixed by the first device query; call emulate_devices before anything that touches a device"
        )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(int(num_devices), _compat.config_value("jax_num_cpu_devices")))


def ensure_devices(num_devices: int) -> None:
    """Emulates CPU devices on a machine without an accelerator; raises MeshError if there are too few even so."""
    check_count("num_devices", num_devices)
    if not _compat.backends_are_initialized() and not has_accelerator():
        emulate_devices(num_devices)
    if len(jax.devices()) < num_devices:
        raise MeshError(_too_few(num_devices))


def has_accelerator() -> bool:
    """Whether JAX runs on something else than the CPU, or would do so once it is started. Asking does not start it."""
    if _compat.backends_are_initialized():
        return jax.default_backend() != "cpu"
    platforms = _compat.config_value("jax_platforms")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    from importlib.metadata import distributions  # slow to import, and only the command line asks

    names = [(dist.name or "").lower().replace("_", "-") for dist in distributions()]
    # A plug-in alone does not make an accelerator: for compile_for, compilers are installed on machines that have none.
    return any(
        name.startswith(plugin) and any(glob.glob(device) for device in devices)
        for plugin, devices in _DEVICE_FILES.items()
        for name in names
    )


def _too_few(needed: int) -> str:
    return (
        f"the mesh needs {needed} devices and JAX shows {len(jax.devices())} ({jax.default_backend()}); "
        f"make it smaller, or call moe_jax.emulate_devices({needed}) before the first device query"
    )


def make_mesh(
    ep: int = 1, tp: int = 1, *, nodes: int = 1, dp: int = 1, devices: Sequence[_compat.Device] | None = None
) -> Mesh:
    """A mesh over the first ``ep * tp * dp`` devices, all axes Auto.

    Axes, outermost first: "dp" (only if dp > 1), "node" (only if nodes > 1), "ep", "tp". With ``nodes`` > 1 the
    experts spread over ("node", "ep"), and the "ep" axis has ``ep // nodes`` entries.

    Args:
      ep: expert-parallel size over all nodes.
      tp: tensor-parallel size.
      nodes: nodes that the expert-parallel group spans; divides ``ep``.
      dp: replicas of the whole group.
      devices: which devices to take instead of ``jax.devices()``, such as those that ``compile_for`` gives a builder.

    Raises:
      InvalidArgumentError: a size is not a positive whole number, or ``nodes`` does not divide ``ep``.
      MeshError: there are too few devices.

    >>> import moe_jax as moe
    >>> moe.emulate_devices(8)  # leave this out where there are accelerators
    >>> dict(moe.make_mesh(ep=4, tp=2).shape)
    {'ep': 4, 'tp': 2}
    """
    for name, value in (("ep", ep), ("tp", tp), ("nodes", nodes), ("dp", dp)):
        check_count(name, value)
    if ep % nodes:
        raise InvalidArgumentError(f"nodes={nodes} does not divide ep={ep}; every node holds the same number of ranks")
    axes = [("dp", dp)] * (dp > 1) + [("node", nodes)] * (nodes > 1) + [("ep", ep // nodes), ("tp", tp)]
    sizes = [int(size) for _, size in axes]
    needed = math.prod(sizes)
    if devices is None:
        devices = jax.devices()
        if len(devices) < needed:
            raise MeshError(_too_few(needed))
    elif len(devices) < needed:
        raise MeshError(f"the mesh needs {needed} devices and devices= has {len(devices)}; make it smaller")
    return _compat.auto_mesh(np.array(devices[:needed]).reshape(sizes), [name for name, _ in axes])


def mesh_violations(mesh: Mesh | AbstractMesh) -> list[str]:
    """The rules that ``mesh`` breaks: it must be a mesh, and none of its axes may be empty."""
    remedy = "build the mesh with moe_jax.make_mesh(ep=..., tp=...), or with jax.sharding.Mesh"
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        return [f"mesh={textwrap.shorten(repr(mesh), 200, placeholder=' ...')} is not a jax.sharding.Mesh; {remedy}"]
    if not all(mesh.shape.values()):
        return [f"mesh has axes {dict(mesh.shape)}, one of them of size 0; {remedy}"]
    return []
