"""Grouped products for GPUs: XLA's own."""

from moe_jax.kernels import xla
from moe_jax.kernels.table import Backend

BACKEND = Backend(name="gpu", platforms=("gpu",), kernels=xla.BACKEND.kernels, about=xla.BACKEND.about)
