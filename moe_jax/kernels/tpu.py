"""Grouped products for TPUs: XLA's own."""

from moe_jax.kernels import xla
from moe_jax.kernels.table import Backend

BACKEND = Backend(name="tpu", platforms=("tpu",), kernels=xla.BACKEND.kernels, about=xla.BACKEND.about)
