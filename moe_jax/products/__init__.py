"""Hardware as data: what each product's operators take, a file per product, and the sizes of their buffers."""

from moe_jax.products.a2 import A2
from moe_jax.products.a3 import A3
from moe_jax.products.a5 import A5
from moe_jax.products.buffers import MB, Sizes, megabytes
from moe_jax.products.everywhere import ANY
from moe_jax.products.legal import QUANTITIES, Choices, Interval, Limits, Product

PRODUCTS = {product.name: product for product in (A2, A3, A5)}

__all__ = ["ANY", "MB", "PRODUCTS", "QUANTITIES", "Choices", "Interval", "Limits", "Product", "Sizes", "megabytes"]
