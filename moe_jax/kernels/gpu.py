"""Back ends for GPUs: Triton kernels of our own for all of NVIDIA's, and JAX's Mosaic kernels for the latest of them.

Each back end runs on CPUs as well: the Triton kernels are interpreted there, slowly and with the same results. On AMD's
GPUs XLA's products run instead, since nobody has measured our tiles there.
"""

import functools
import importlib
from collections.abc import Callable
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
    add_to: jax.Array | None = None,
    row_slot: jax.Array | None = None,
    into: int | None = None,
    **static: Any,
) -> jax.Array:
    """The kernels "grouped_matmul" and "slot_matmul" of ``Backend``; ``kernel`` is as for ``_imported``."""
    num_rows = (lhs if row_slot is None else row_slot).shape[0] if into is None else into
    shape = (num_rows, rhs.shape[1 if static["transpose_rhs"] else 2])
    if row_slot is not None:
        static |= {"into": into}
    more = {"add_to": add_to, "row_slot": row_slot}
    return _run(kernel, xla.slot_matmul, (lhs, rhs, group_sizes), more, static, shape=shape, dtype=lhs.dtype)


def grouped_outer(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    dtype: Any,
    row_slot: jax.Array | None = None,
    slotted: str = "",
) -> jax.Array:
    """The kernels "grouped_outer" and "slot_outer" of ``Backend``."""
    shape = (*group_sizes.shape, lhs.shape[1], rhs.shape[1])
    static = {"dtype": jnp.dtype(dtype), "slotted": slotted}
    operands, more = (lhs, rhs, group_sizes), {"row_slot": row_slot}
    return _run("triton.grouped_outer", xla.slot_outer, operands, more, static, shape=shape, dtype=dtype)


def gated_matmul(
    lhs: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    group_sizes: jax.Array,
    *,
    gating: Callable,
    keep: bool,
    gate_bias: jax.Array | None = None,
    up_bias: jax.Array | None = None,
    row_slot: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The kernel "gated_matmul" of ``Backend``."""
    shape = ((lhs if row_slot is None else row_slot).shape[0], up.shape[2])
    more = {"gate_bias": gate_bias, "up_bias": up_bias, "row_slot": row_slot}
    return _run(
        "triton.gated_matmul",
        xla.gated_matmul,
        (lhs, gate, up, group_sizes),
        more,
        {"gating": gating, "keep": keep},
        shape=shape,
        dtype=lhs.dtype,
        num_results=3 if keep else 1,
    )


def _run(
    kernel: str,
    by_xla: Callable,
    operands: tuple[jax.Array, ...],
    more: dict[str, jax.Array | None],
    static: dict[str, Any],
    **results: Any,
) -> Any:
    """Runs ``kernel``, a name for ``_imported``, on NVIDIA's GPUs, and ``by_xla`` on AMD's; ``more`` goes by keyword.

    ``results``: as for ``kernel_call``.
    """
    given = {name: operand for name, operand in more.items() if operand is not None}

    @sequential_vmap
    def run(*operands):
        call = functools.partial(
            _call, functools.partial(_imported, kernel), tuple(given), precision=_precision(), **static
        )
        others = (("rocm", functools.partial(_call, by_xla, tuple(given), **static)),)
        return kernel_call(call, *operands, platforms=("cuda",), others=others, **results)

    return run(*operands, *given.values())


def _precision() -> str | None:
    """The precision of products of fp32 rows: what JAX was told, or else None, which stands for full fp32."""
    return _compat.config_value("jax_default_matmul_precision")


def _call(kernel: Callable, names: tuple[str, ...], *operands: jax.Array, **static: Any) -> Any:
    """Calls ``kernel`` with the operands, the last of which go by keyword, under ``names``."""
    split = len(operands) - len(names)
    return kernel(*operands[:split], **dict(zip(names, operands[split:], strict=True)), **static)


def _imported(name: str, *operands: Any, **keywords: Any) -> Any:
    """Calls "module.function" of ``moe_jax.kernels``, imported only now: it brings Pallas, which takes a second."""
    module, function = name.split(".")
    return getattr(importlib.import_module(f"moe_jax.kernels.{module}"), function)(*operands, **keywords)


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
        kernels={
            "grouped_matmul": functools.partial(grouped_matmul, matmul),
            "grouped_outer": grouped_outer,
            "slot_matmul": functools.partial(grouped_matmul, _TRITON),
            "slot_outer": grouped_outer,
            "gated_matmul": gated_matmul,
        },
        accumulates=True,
        fuses=None if matmul == _TRITON else functools.partial(_imported, matmul.replace("_matmul", "_fuses")),
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
