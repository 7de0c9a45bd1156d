"""Wire quantisation: recipes that turn rows into values and scales, one message of bytes, and rows again.

Every recipe fixes its arithmetic to the bit, the same eagerly and compiled, so that all devices agree on every code.
fp32 subnormals count as zero (many devices flush them), except inside microscaled blocks, which treat them exactly.
"""

from moe_jax.quant.base import QTensor, Recipe
from moe_jax.quant.gradient import straight_through
from moe_jax.quant.schemes import NAMES, recipe

__all__ = ["NAMES", "QTensor", "Recipe", "recipe", "straight_through"]
