"""The distributed-MoE operators of the reference family, with every rank visible: outputs to the byte, in NumPy loops.

An all-ranks array starts with [W], or with [W, 2] when ``tp_world_size`` is 2. Rows that an operator does not write are
zero here. Arithmetic is fp32, one rounding per operation, in the order that the operators state.

Source: aclnnMoeDistributeDispatch, aclnnMoeDistributeCombine and aclnnMoeDistributeCombineAddRmsNorm, all versions.
"""

from moe_jax.reference.family.combine import (
    CombineResult,
    NormResult,
    moe_distribute_combine,
    moe_distribute_combine_add_rms_norm,
)
from moe_jax.reference.family.dispatch import DispatchResult, moe_distribute_dispatch
from moe_jax.reference.family.numerics import dequantize, dispatch_recipe, quantize

__all__ = [
    "CombineResult",
    "DispatchResult",
    "NormResult",
    "dequantize",
    "dispatch_recipe",
    "moe_distribute_combine",
    "moe_distribute_combine_add_rms_norm",
    "moe_distribute_dispatch",
    "quantize",
]
