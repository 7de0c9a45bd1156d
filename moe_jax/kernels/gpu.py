"""Back ends for GPUs: kernels of our own in Pallas Triton for all, JAX's Mosaic kernels for Hopper and Blackwell.

Each of them runs on CPUs as well, where the Triton kernels are interpreted: the same numbers, slowly. On AMD's GPUs
XLA's products run, since nobody has looked at our tiles there.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.kernels import xla
from moe_jax.kernels.by_platform import by_platform
from moe_jax.kernels.table import Backend


def _kernels(matmul: str) -> Mapping[str, Callable]:
    """The kernels of a back end: ``matmul``, a function of ``moe_jax.kernels``, where CUDA runs, and Triton's."""
    run_matmul = by_platform(
        "grouped_matmul",
        _type_of_matmul,
        cuda=functools.partial(_call, matmul),
        cpu=functools.partial(_call, _TRITON, interpret=True),
        rocm=_xla_matmul,
    )
    run_outer = by_platform(
        "grouped_outer",
        _type_of_outer,
        cuda=functools.partial(_call, "triton.grouped_outer"),
        cpu=functools.partial(_call, "triton.grouped_outer", interpret=True),
        rocm=_xla_outer,
    )

    def grouped_matmul(lhs, rhs, group_sizes, *, transpose_rhs, add_to=None):
        operands = (lhs, rhs, group_sizes) if add_to is None else (lhs, rhs, group_sizes, add_to)
        return run_matmul(*operands, transpose_rhs=transpose_rhs, precision=_precision())

    def grouped_outer(lhs, rhs, group_sizes, *, dtype):
        return run_outer(lhs, rhs, group_sizes, dtype=jnp.dtype(dtype), precision=_precision())

    return {"grouped_matmul": grouped_matmul, "grouped_outer": grouped_outer}


def _precision() -> str | None:
    """What products of fp32 rows may lose: nothing, unless JAX is told so."""
    return jax.config.jax_default_matmul_precision


def _type_of_matmul(lhs, rhs, *others, transpose_rhs, precision):
    return jax.ShapeDtypeStruct((lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]), lhs.dtype)


def _type_of_outer(lhs, rhs, group_sizes, *, dtype, precision):
    return jax.ShapeDtypeStruct((*group_sizes.shape, lhs.shape[1], rhs.shape[1]), dtype)


def _call(name: str, *operands: jax.Array, **static: Any) -> jax.Array:
    """Imported when it is called, since it brings Pallas, which takes a second."""
    module, function = name.split(".")
    return getattr(importlib.import_module(f"moe_jax.kernels.{module}"), function)(*operands, **static)


def _xla_matmul(lhs, rhs, group_sizes, add_to=None, *, transpose_rhs, precision):
    product = xla.grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)
    return product if add_to is None else product + add_to


def _xla_outer(lhs, rhs, group_sizes, *, dtype, precision):
    return xla.grouped_outer(lhs, rhs, group_sizes, dtype=dtype)


def jax_has_mosaic_kernels() -> bool:
    """Whether this JAX has the kernels that ``mosaic`` calls, and absl-py, which their files import. Imports nothing."""
    folder = Path(jax.__file__).parent / "experimental/pallas/ops/gpu"
    names = ("ragged_dot_mgpu", "blackwell_ragged_dot_mgpu")
    return all((folder / f"{name}.py").exists() for name in names) and find_spec("absl") is not None


def _backend(name: str, device_kinds: tuple[str, ...], matmul: str, about: str) -> Backend:
    if matmul.startswith("mosaic") and not jax_has_mosaic_kernels():
        matmul = _TRITON
        about = "Pallas Triton; this JAX lacks the Mosaic kernels, or absl-py, which they import, is not installed"
    return Backend(
        name=name,
        platforms=("gpu",),
        device_kinds=device_kinds,
        kernels=_kernels(matmul),
        accumulates=True,
        about=about,
    )


_TRITON = "triton.grouped_matmul"
GPU = _backend("gpu", (), _TRITON, "Pallas Triton")
HOPPER = _backend(
    "hopper",
    ("*H100*", "*H200*", "*H800*", "*H20*"),
    "mosaic.hopper_matmul",
    "JAX's Mosaic kernel for products of 16-bit rows in multiples of 64 in large groups, Pallas Triton for all others",
)
BLACKWELL = _backend(
    "blackwell",
    ("*B200*", "*B300*"),
    "mosaic.blackwell_matmul",
    "JAX's Mosaic kernel for products of 16-bit rows in multiples of 256 in large groups, Pallas Triton for all others",
)
