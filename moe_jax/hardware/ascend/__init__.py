"""Ascend products as data: what the operators of each take, in a file per product, and the sizes of their buffers."""

import dataclasses

from moe_jax.hardware.ascend.a2 import A2
from moe_jax.hardware.ascend.a3 import A3
from moe_jax.hardware.ascend.a5 import A5
from moe_jax.hardware.ascend.buffers import MB, Sizes, megabytes
from moe_jax.hardware.ascend.everywhere import ANY
from moe_jax.hardware.ascend.legal import QUANTITIES, Choices, Interval, Limits, Product
from moe_jax.hardware.ascend.versions import VERSIONS, lacking, newest_of, with_versions

PRODUCTS = {
    product.name: dataclasses.replace(product, operators=with_versions(product.operators, product.lacks))
    for product in (A2, A3, A5)
}

__all__ = [
    "ANY",
    "MB",
    "PRODUCTS",
    "QUANTITIES",
    "VERSIONS",
    "Choices",
    "Interval",
    "Limits",
    "Product",
    "Sizes",
    "lacking",
    "megabytes",
    "newest_of",
]
