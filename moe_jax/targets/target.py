"""What a target's name stands for, and what must be installed and set in the environment to compile for it."""

import dataclasses
import math
import os
import re
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import jax

from moe_jax import _compat
from moe_jax.errors import InvalidArgumentError, UnsupportedError, check_choice, check_count, suggest
from moe_jax.hardware import GPUS, TPUS

_GPUS_OF_A_HOST = 8
_TPUS_OF_A_HOST = 4
_EXTRAS = {
    "tpu": ("aot-tpu", ("libtpu",)),
    "gpu": ("aot-gpu", ("jax_plugins.xla_cuda12", "nvidia.cuda_nvcc", "nvidia.cuda_runtime")),
}
_COMPILERS = {"cpu": "jaxlib", "tpu": "libtpu", "gpu": "jax-cuda12-plugin"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """One target.

    Attributes:
      name: its name, as the user writes it.
      platform: "cpu", "gpu" or "tpu".
      num_devices: how many devices it has.
      topology: the arguments of jax.experimental.topologies.get_topology_desc, which describe them to the compiler.
    """

    name: str
    platform: str
    num_devices: int
    topology: dict[str, Any]

    @property
    def lowering_platform(self) -> str:
        return {"gpu": "cuda"}.get(self.platform, self.platform)

    def check_installed(self) -> None:
        """Raises UnsupportedError where the compiler is not installed."""
        extra, modules = _EXTRAS.get(self.platform, ("", ()))
        missing = [name for name in modules if not _is_installed(name)]
        if missing:
            raise UnsupportedError(
                f"target={self.name!r} needs the {self.platform.upper()} compiler, and {', '.join(missing)} "
                f"cannot be imported; install it with: pip install 'moe_jax[{extra}]'"
            )

    @property
    def compiler(self) -> str:
        """The package that the compiler comes in, with its version, and JAX's."""
        package = _COMPILERS[self.platform]
        return f"{package} {version(package)}, jax {jax.__version__}"

    def environment(self) -> dict[str, str]:
        """The environment of the process that compiles; everything here is read when JAX starts."""
        theirs = dict(os.environ)
        flags = [f for f in theirs.get("XLA_FLAGS", "").split() if "force_host_platform_device_count" not in f]
        theirs["JAX_PLATFORMS"] = "cpu"  # also on a machine that has the accelerator, which is left alone
        theirs["JAX_ENABLE_X64"] = str(_compat.config_value("jax_enable_x64"))
        theirs["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # the compiler shall run
        theirs["JAX_NUM_CPU_DEVICES"] = str(self.num_devices if self.platform == "cpu" else 1)
        if self.platform == "tpu":
            theirs["TPU_SKIP_MDS_QUERY"] = "1"  # there is no metadata server to ask
            theirs["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # else a lock file keeps a second process out
        if self.platform == "gpu":
            theirs["CUDA_VISIBLE_DEVICES"] = "-1"
            flags.append("--xla_gpu_autotune_level=0")  # there is no card to try kernels on
        theirs["XLA_FLAGS"] = " ".join(flags)
        return theirs


def find_target(name: str) -> Target:
    """The target of that name.

    Raises:
      InvalidArgumentError: there is none; the text lists what there is.
    """
    kind, _, extent = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind in TPUS:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", extent):
            raise InvalidArgumentError(f"target={name!r} lacks a topology; write it as in '{kind}:{TPUS[kind]}'")
        extents = [int(side) for side in extent.split("x")]
        topology: dict[str, Any] = {"topology_name": name}
        chips = math.prod(extents)
        if chips < _TPUS_OF_A_HOST:  # unless told otherwise, the compiler takes hosts to be full
            topology["chips_per_host_bounds"] = (*extents, 1)[:3]
        return Target(name=name, platform="tpu", num_devices=chips, topology=topology)
    if kind not in ("cpu", *GPUS):
        known = ["cpu:8", *(f"{tpu}:{example}" for tpu, example in TPUS.items()), *(f"{gpu}:8" for gpu in GPUS)]
        raise InvalidArgumentError(f"target={name!r} is unknown; {suggest(name, known)} (other sizes go as well)")
    if not re.fullmatch(r"[1-9]\d*", extent):
        raise InvalidArgumentError(f"target={name!r} lacks a number of devices; write it as in '{kind}:8'")
    count = int(extent)
    if kind == "cpu":
        return Target(name=name, platform="cpu", num_devices=count, topology={})
    hosts = math.ceil(count / _GPUS_OF_A_HOST)
    if count % hosts or (hosts > 1 and count % _GPUS_OF_A_HOST):
        raise InvalidArgumentError(f"target={name!r}: a host has {_GPUS_OF_A_HOST} GPUs; ask for a multiple of them")
    extents = f"1x{hosts}x{count // hosts}"  # slices x hosts x devices of a host
    topology = {"topology_name": "", "target_config": GPUS[kind].target_config(), "topology": extents}
    return Target(name=name, platform="gpu", num_devices=count, topology=topology)


def name_target(kind: str, num_devices: int) -> str:
    """The target of ``num_devices`` of a kind: "h100:64", and of TPUs the topology whose sides differ least.

    Raises:
      InvalidArgumentError: there is no such kind, or no topology of so many TPUs.

    >>> from moe_jax.targets.target import name_target
    >>> name_target("v5p", 64), name_target("v5e", 8), name_target("h100", 16)
    ('v5p:4x4x4', 'v5e:2x4', 'h100:16')
    """
    check_choice("kind", kind, ("cpu", *TPUS, *GPUS))
    check_count("num_devices", num_devices)
    if kind not in TPUS:
        return find_target(f"{kind}:{num_devices}").name
    flat = TPUS[kind].count("x") == 1
    if num_devices < _TPUS_OF_A_HOST:
        return f"{kind}:1x{num_devices}" if flat else f"{kind}:1x1x{num_devices}"
    # A host is 2 x 2 chips. Among all ways to lay hosts side by side, the one that is most nearly square or a cube.
    hosts, left = divmod(num_devices, _TPUS_OF_A_HOST)
    if left:
        raise InvalidArgumentError(
            f"num_devices={num_devices}: a host has {_TPUS_OF_A_HOST} {kind} chips; ask for a multiple of them"
        )
    shapes = [
        (2 * i, 2 * j) if flat else (2 * i, 2 * j, k)
        for i in range(1, hosts + 1)
        for j in range(i, hosts // i + 1)
        for k in ((1,) if flat else (hosts // (i * j),))
        if i * j * k == hosts
    ]
    sides = min(shapes, key=lambda shape: (sum(shape), shape))
    ordered = sides if sides[-1] == 1 else sorted(sides)  # the first two sides hold whole hosts
    return f"{kind}:{'x'.join(map(str, ordered))}"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
