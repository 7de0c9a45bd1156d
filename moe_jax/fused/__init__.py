"""The grouped product fused with an all-to-all of unequal blocks, in both orders.

``api`` has the two operators. ``exchange`` computes them in chunks of peers, so that one chunk can travel while another
is multiplied; ``counts`` says who sends whom how much; ``dense`` is the product beside the exchange; ``scaled`` and
``scheme`` are for operands with scales.
"""

from moe_jax.fused.api import all_to_allv_grouped_matmul, grouped_matmul_all_to_allv

__all__ = ["all_to_allv_grouped_matmul", "grouped_matmul_all_to_allv"]
