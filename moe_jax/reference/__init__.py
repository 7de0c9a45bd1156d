"""The oracle: the definition of correct, in NumPy and float64, with all ranks visible and in plain loops.

It is slow on purpose, and free of JAX. Everything faster in this library is tested against these functions, forward and
backward. A file has the name of what it defines: ``routing``, ``placement`` (update_expert), ``exchange`` (dispatch and
combine), ``experts``, ``weightless``, ``layer``, ``quant``, ``fused`` and ``rms_norm``. They use the functions of
``elementwise``.
"""

from moe_jax.reference import quant
from moe_jax.reference.exchange import (
    Dispatched,
    combine,
    combine_vjp,
    dispatch,
    dispatch_vjp,
    ragged_all_to_all,
    ragged_all_to_all_vjp,
)
from moe_jax.reference.experts import expert_ffn, expert_ffn_vjp, grouped_matmul, grouped_matmul_vjp
from moe_jax.reference.fused import (
    all_to_allv_grouped_matmul,
    all_to_allv_grouped_matmul_vjp,
    grouped_matmul_all_to_allv,
    grouped_matmul_all_to_allv_vjp,
)
from moe_jax.reference.layer import combine_weights_vjp, moe_layer, moe_layer_vjp
from moe_jax.reference.placement import update_expert
from moe_jax.reference.rms_norm import add_rms_norm, add_rms_norm_vjp
from moe_jax.reference.routing import (
    Routing,
    balance_loss,
    expert_scale_vjp,
    route,
    route_vjp,
    update_selection_bias,
)
from moe_jax.reference.weightless import WeightlessExperts, weightless_sum, weightless_value

# Earlier names of these three, which stay importable.
SpecialExperts, special_sum, special_value = WeightlessExperts, weightless_sum, weightless_value

__all__ = [
    "Dispatched",
    "Routing",
    "SpecialExperts",
    "WeightlessExperts",
    "add_rms_norm",
    "add_rms_norm_vjp",
    "all_to_allv_grouped_matmul",
    "all_to_allv_grouped_matmul_vjp",
    "balance_loss",
    "combine",
    "combine_vjp",
    "combine_weights_vjp",
    "dispatch",
    "dispatch_vjp",
    "expert_ffn",
    "expert_ffn_vjp",
    "expert_scale_vjp",
    "grouped_matmul",
    "grouped_matmul_all_to_allv",
    "grouped_matmul_all_to_allv_vjp",
    "grouped_matmul_vjp",
    "moe_layer",
    "moe_layer_vjp",
    "quant",
    "ragged_all_to_all",
    "ragged_all_to_all_vjp",
    "route",
    "route_vjp",
    "special_sum",
    "special_value",
    "update_expert",
    "update_selection_bias",
    "weightless_sum",
    "weightless_value",
]
