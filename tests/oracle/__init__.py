"""The oracle of the CANN facade: its operators in NumPy loops, with every rank visible and every output to the byte.

It is a tool of the tests of ``moe_jax.aclnn``; the oracle of the library itself is ``moe_jax.reference``.
An all-ranks array starts with [W], or with [W, 2] when ``tp_world_size`` is 2. Rows that an operator does not write are
zero here. Arithmetic is fp32, one rounding per operation, in the order that the operators state.

Source: aclnnMoeDistributeDispatch, aclnnMoeDistributeCombine and aclnnMoeDistributeCombineAddRmsNorm, all versions.
"""

from oracle.combine import (
    CombineResult,
    NormResult,
    moe_distribute_combine,
    moe_distribute_combine_add_rms_norm,
)
from oracle.dispatch import DispatchResult, moe_distribute_dispatch
from oracle.numerics import dequantize, dispatch_recipe, quantize

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
