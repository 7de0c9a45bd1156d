"""The grouped product fused with an all-to-all of unequal blocks, in both orders."""

from moe_jax.fused.api import all_to_allv_grouped_matmul, grouped_matmul_all_to_allv

__all__ = ["all_to_allv_grouped_matmul", "grouped_matmul_all_to_allv"]
