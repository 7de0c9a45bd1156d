"""Grouped products, and the table of back ends that supply them.

``products`` has the operator with its gradients, ``table`` is the one place where an implementation is chosen.
``xla`` is the semantics; ``cpu``, ``gpu``, ``tpu`` and ``tokamax`` are faster, and must give the same. ``gpu`` chooses
between ``mosaic``, JAX's kernels, and ``triton``, our own; those of ``tpu`` are in ``tpu_kernels``. ``kernel_call``
makes a kernel an operation of a program, which is interpreted where its platform is absent.
"""

from moe_jax.kernels import cpu, gpu, tokamax, tpu, xla
from moe_jax.kernels.products import FLOAT_DTYPES, gated_matmul, grouped_matmul, grouped_matmuls, grouped_outer
from moe_jax.kernels.table import (
    Backend,
    backend_names,
    check_backend,
    describe_backend,
    find_transport,
    fused_kernels,
    register_backend,
    resolve_backend,
)

__all__ = [
    "FLOAT_DTYPES",
    "Backend",
    "backend_names",
    "check_backend",
    "describe_backend",
    "find_transport",
    "fused_kernels",
    "gated_matmul",
    "grouped_matmul",
    "grouped_matmuls",
    "grouped_outer",
    "register_backend",
    "resolve_backend",
]

_GPUS = (gpu.GPU, gpu.HOPPER, gpu.BLACKWELL)
for _backend in (xla.BACKEND, tokamax.BACKEND, cpu.BACKEND, *_GPUS, tpu.BACKEND, tpu.LITE):
    register_backend(_backend, replace=True)
