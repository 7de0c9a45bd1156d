"""Back ends for GPUs: Triton kernels of our own for all of NVIDIA's, and JAX's Mosaic kernels for the latest of them.

Each back end runs on CPUs as well, where the Triton kernels are interpreted: slowly, with the same results. On AMD's
GPUs XLA's products run instead, since nobody has measured our tiles there.
"""

import functools
import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from moe_jax import _compat
from moe_jax.kernels import xla
from moe_jax.kernels.kernel_call import kernel_call
from moe_jax.kernels.table import Backend

_TRITON = "triton.grouped_matmul"


def grouped_matmul(
    kernel: str,
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    transpose_rhs: bool,
    add_to: jax.Array | None = None,
) -> jax.Array:
    """lhs [M, H], rhs [G, H, N] ([G, N, H] if ``transpose_rhs``), group_sizes [G] -> [M, N], plus ``add_to`` [M, N].

    ``kernel``: "module.function" in ``moe_jax.kernels``.
    """
    shape = (lhs.shape[0], rhs.shape[1 if transpose_rhs else 2])

    def by_xla(lhs, rhs, group_sizes, *added):
        return sum(added, xla.grouped_matmul(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs))

    @sequential_vmap
    def run(*operands):
        call = functools.partial(_call, kernel, transpose_rhs=transpose_rhs, precision=_precision())
        return kernel_call(
            call, *operands, shape=shape, dtype=lhs.dtype, platforms=("cuda",), others=(("rocm", by_xla),)
        )

    return run(lhs, rhs, group_sizes, *(() if add_to is None else (add_to,)))


def grouped_outer(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, dtype: Any) -> jax.Array:
    """lhs [M, H], rhs [M, N], group_sizes [G] -> [G, H, N] in ``dtype``."""
    shape = (*group_sizes.shape, lhs.shape[1], rhs.shape[1])

    @sequential_vmap
    def run(*operands):
        call = functools.partial(_call, "triton.grouped_outer", dtype=jnp.dtype(dtype), precision=_precision())
        by_xla = functools.partial(xla.grouped_outer, dtype=dtype)
        return kernel_call(call, *operands, shape=shape, dtype=dtype, platforms=("cuda",), others=(("rocm", by_xla),))

    return run(lhs, rhs, group_sizes)


def _precision() -> str | None:
    """The precision of products of fp32 rows: None, which stands for full fp32, unless JAX was told another one."""
    return _compat.config_value("jax_default_matmul_precision")


def _call(kernel: str, *operands: jax.Array, **static: Any) -> jax.Array:
    """Calls ``kernel``, "module.function". Its module is imported only now: it brings Pallas, which takes a second."""
    module, function = kernel.split(".")
    return getattr(importlib.import_module(f"moe_jax.kernels.{module}"), function)(*operands, **static)


def jax_has_mosaic_kernels() -> bool:
    """Whether this JAX has the kernels that ``mosaic`` calls, and absl-py, which they import. Imports nothing."""
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
        kernels={"grouped_matmul": functools.partial(grouped_matmul, matmul), "grouped_outer": grouped_outer},
        accumulates=True,
        about=about,
    )


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
