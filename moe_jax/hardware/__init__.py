"""Machines, as data with their sources: what a compiler must know of a chip that is not here, what a chip reaches.

``gpu`` and ``tpu`` are what compilers are told, ``peaks`` what a device reaches at most, and ``ascend`` what CANN's
operators accept on each product.
"""

from moe_jax.hardware.gpu import GPUS, Gpu
from moe_jax.hardware.peaks import PEAKS, Peak, peak_of
from moe_jax.hardware.tpu import TPUS

__all__ = ["GPUS", "PEAKS", "TPUS", "Gpu", "Peak", "peak_of"]
