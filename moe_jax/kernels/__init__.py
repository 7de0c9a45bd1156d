"""Row kernels and the table of back ends that supply them."""

from moe_jax.kernels import accelerator, cpu, xla
from moe_jax.kernels.grouped_matmul import FLOAT_DTYPES, grouped_matmul, grouped_outer
from moe_jax.kernels.table import Backend, backend_names, find_transport, register_backend, resolve_backend

__all__ = [
    "FLOAT_DTYPES",
    "Backend",
    "backend_names",
    "find_transport",
    "grouped_matmul",
    "grouped_outer",
    "register_backend",
    "resolve_backend",
]

for _backend in (xla.BACKEND, cpu.BACKEND, accelerator.GPU, accelerator.TPU):
    register_backend(_backend, replace=True)
