"""Ascend products as data: what the operators of each take, in a file per product, and the sizes of their buffers."""

from moe_jax.hardware.ascend.a2 import A2
from moe_jax.hardware.ascend.a3 import A3
from moe_jax.hardware.ascend.a5 import A5
from moe_jax.hardware.ascend.buffers import Sizes, megabytes
from moe_jax.hardware.ascend.everywhere import ANY
from moe_jax.hardware.ascend.legal import E8M0, FLOATS, FP4, FP8, Choices, Interval, Limits
from moe_jax.hardware.ascend.versions import VERSIONS, lacking, newest_of, with_versions

PRODUCTS = {
    "a2": with_versions(A2),
    "a3": with_versions(A3),
    # Section 13: A5 has only the second barrier, which an extension of its own serves. The document of the first
    # barrier knows A3 alone.
    "a5": with_versions(A5, lacks=("distribute_barrier",)),
}

__all__ = [
    "ANY",
    "E8M0",
    "FLOATS",
    "FP4",
    "FP8",
    "PRODUCTS",
    "VERSIONS",
    "Choices",
    "Interval",
    "Limits",
    "Sizes",
    "lacking",
    "megabytes",
    "newest_of",
]
