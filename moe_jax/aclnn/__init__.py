"""CANN's operators with their own names, parameters, outputs and error codes, for programs that were written for CANN.

Each operator is called per shard, inside ``shard_map``: a group name is the name of a mesh axis, and the index along
that axis is the rank. Beside each stands ``<operator>_get_workspace_size``, a host-side call that checks the arguments,
for a product's limits too, and returns the bytes of workspace and an executor. The operators are thin:
``moe_jax.dispatch``, ``moe_jax.combine`` and their companions do the work, and a new program should use those.

The way of a call through the files: ``calls`` binds its arguments to names, ``check`` asks the rules (``rules`` has
their kinds; ``rules_exchange``, ``rules_grouped`` and ``rules_small`` have the rows), and ``dispatch``, ``combine``,
``grouped`` or ``small`` runs it, the first two by way of ``world``. ``results`` says what comes back, and ``codes``
makes rows with a gradient of quantised ones. ``first_phase`` makes the host-side calls from the operators' signatures,
``workspace`` counts their bytes, and ``versions`` has the earlier versions.
"""

from moe_jax.aclnn.codes import dequantize
from moe_jax.aclnn.combine import moe_distribute_combine_add_rms_norm_v2, moe_distribute_combine_v4
from moe_jax.aclnn.dispatch import moe_distribute_dispatch_v4
from moe_jax.aclnn.first_phase import first_phase_of
from moe_jax.aclnn.grouped import (
    allto_allv_grouped_mat_mul,
    allto_allv_quant_grouped_mat_mul,
    grouped_mat_mul_allto_allv,
    quant_grouped_mat_mul_allto_allv,
)
from moe_jax.aclnn.receive_window import make_receive_window
from moe_jax.aclnn.results import (
    AddRmsNormOutput,
    AllToAllvGroupedMatmulOutput,
    CombineOutput,
    DispatchOutput,
    GroupedMatmulAllToAllvOutput,
    TimedCombineOutput,
    TimedDispatchOutput,
    UpdateExpertOutput,
    WindowDispatchOutput,
)
from moe_jax.aclnn.small import distribute_barrier_v2, moe_distribute_buffer_reset, moe_update_expert
from moe_jax.aclnn.versions import (
    distribute_barrier,
    moe_distribute_combine_add_rms_norm,
    moe_distribute_combine_v2,
    moe_distribute_combine_v3,
    moe_distribute_dispatch_v2,
    moe_distribute_dispatch_v3,
)

allto_allv_grouped_mat_mul_get_workspace_size = first_phase_of(allto_allv_grouped_mat_mul)
allto_allv_quant_grouped_mat_mul_get_workspace_size = first_phase_of(allto_allv_quant_grouped_mat_mul)
distribute_barrier_get_workspace_size = first_phase_of(distribute_barrier)
distribute_barrier_v2_get_workspace_size = first_phase_of(distribute_barrier_v2)
grouped_mat_mul_allto_allv_get_workspace_size = first_phase_of(grouped_mat_mul_allto_allv)
moe_distribute_buffer_reset_get_workspace_size = first_phase_of(moe_distribute_buffer_reset)
moe_distribute_combine_add_rms_norm_get_workspace_size = first_phase_of(moe_distribute_combine_add_rms_norm)
moe_distribute_combine_add_rms_norm_v2_get_workspace_size = first_phase_of(moe_distribute_combine_add_rms_norm_v2)
moe_distribute_combine_v2_get_workspace_size = first_phase_of(moe_distribute_combine_v2)
moe_distribute_combine_v3_get_workspace_size = first_phase_of(moe_distribute_combine_v3)
moe_distribute_combine_v4_get_workspace_size = first_phase_of(moe_distribute_combine_v4)
moe_distribute_dispatch_v2_get_workspace_size = first_phase_of(moe_distribute_dispatch_v2)
moe_distribute_dispatch_v3_get_workspace_size = first_phase_of(moe_distribute_dispatch_v3)
moe_distribute_dispatch_v4_get_workspace_size = first_phase_of(moe_distribute_dispatch_v4)
moe_update_expert_get_workspace_size = first_phase_of(moe_update_expert)
quant_grouped_mat_mul_allto_allv_get_workspace_size = first_phase_of(quant_grouped_mat_mul_allto_allv)

__all__ = [
    "AddRmsNormOutput",
    "AllToAllvGroupedMatmulOutput",
    "CombineOutput",
    "DispatchOutput",
    "GroupedMatmulAllToAllvOutput",
    "TimedCombineOutput",
    "TimedDispatchOutput",
    "UpdateExpertOutput",
    "WindowDispatchOutput",
    "allto_allv_grouped_mat_mul",
    "allto_allv_grouped_mat_mul_get_workspace_size",
    "allto_allv_quant_grouped_mat_mul",
    "allto_allv_quant_grouped_mat_mul_get_workspace_size",
    "dequantize",
    "distribute_barrier",
    "distribute_barrier_get_workspace_size",
    "distribute_barrier_v2",
    "distribute_barrier_v2_get_workspace_size",
    "grouped_mat_mul_allto_allv",
    "grouped_mat_mul_allto_allv_get_workspace_size",
    "make_receive_window",
    "moe_distribute_buffer_reset",
    "moe_distribute_buffer_reset_get_workspace_size",
    "moe_distribute_combine_add_rms_norm",
    "moe_distribute_combine_add_rms_norm_get_workspace_size",
    "moe_distribute_combine_add_rms_norm_v2",
    "moe_distribute_combine_add_rms_norm_v2_get_workspace_size",
    "moe_distribute_combine_v2",
    "moe_distribute_combine_v2_get_workspace_size",
    "moe_distribute_combine_v3",
    "moe_distribute_combine_v3_get_workspace_size",
    "moe_distribute_combine_v4",
    "moe_distribute_combine_v4_get_workspace_size",
    "moe_distribute_dispatch_v2",
    "moe_distribute_dispatch_v2_get_workspace_size",
    "moe_distribute_dispatch_v3",
    "moe_distribute_dispatch_v3_get_workspace_size",
    "moe_distribute_dispatch_v4",
    "moe_distribute_dispatch_v4_get_workspace_size",
    "moe_update_expert",
    "moe_update_expert_get_workspace_size",
    "quant_grouped_mat_mul_allto_allv",
    "quant_grouped_mat_mul_allto_allv_get_workspace_size",
]
