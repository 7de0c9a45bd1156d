"""The quantised wire: recipes that turn rows into codes and scales, these into one message of bytes per row, and back.

``formats`` are the grids of numbers that codes stand for, ``schemes`` how the scale of a block follows from its
numbers, ``base`` what all recipes share, ``message`` the bytes, ``gradient`` the straight-through rule. Every recipe
fixes its arithmetic to the bit, the same eagerly and compiled, so that all devices agree on every code. fp32 subnormals
count as zero (many devices flush them), except inside microscaled blocks, which treat them exactly.
"""

from moe_jax.quant.base import QTensor, Recipe
from moe_jax.quant.gradient import straight_through
from moe_jax.quant.schemes import NAMES, recipe

__all__ = ["NAMES", "QTensor", "Recipe", "recipe", "straight_through"]
