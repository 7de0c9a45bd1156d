"""Machines as data with sources: what plans are made for, and what compilers must know of a chip that is not here.

``MACHINES`` are what plans are made for and costs are divided by: rates, memory and links of one device, in
``machines.py``; ``find_machine`` reads one of your own from a TOML file. ``gpu`` and ``tpu`` are what compilers are
told of chips, ``peaks`` what a measured device is compared with, and ``ascend`` what CANN's operators accept on each
product.
"""

from moe_jax.hardware.find import find_machine, machine_of
from moe_jax.hardware.gpu import GPUS, Gpu
from moe_jax.hardware.machine import PLATFORMS, Link, Machine, Torus
from moe_jax.hardware.machines import MACHINES
from moe_jax.hardware.peaks import PEAKS, Peak, peak_of
from moe_jax.hardware.tpu import TPUS

__all__ = [
    "GPUS",
    "MACHINES",
    "PEAKS",
    "PLATFORMS",
    "TPUS",
    "Gpu",
    "Link",
    "Machine",
    "Peak",
    "Torus",
    "find_machine",
    "machine_of",
    "peak_of",
]
