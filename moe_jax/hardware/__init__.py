"""Machines, as data with their sources: what a compiler must know of a chip that is not here."""

from moe_jax.hardware.gpu import GPUS, Gpu
from moe_jax.hardware.tpu import TPUS

__all__ = ["GPUS", "TPUS", "Gpu"]
