"""GroupedMatMulAlltoAllv, AlltoAllvGroupedMatMul and their quantised siblings, under CANN's names.

Counts are values of the host: a flat list that holds on every rank, or one row for each rank, since all ranks run one
program.
"""

from typing import Any

import jax

from moe_jax.aclnn import workspace
from moe_jax.aclnn.calls import operator
from moe_jax.aclnn.results import AllToAllvGroupedMatmulOutput, GroupedMatmulAllToAllvOutput
from moe_jax.aclnn.rules_grouped import GROUPED, QUANTISED
from moe_jax.fused import all_to_allv_grouped_matmul, grouped_matmul_all_to_allv

Array = jax.Array


@operator(GROUPED, workspace.compute_then_send)
def grouped_mat_mul_allto_allv(
    gmm_x: Array,
    gmm_weight: Array,
    send_counts_tensor: None = None,
    recv_counts_tensor: None = None,
    mm_x: Array | None = None,
    mm_weight: Array | None = None,
    *,
    group: Any,
    ep_world_size: int,
    send_counts: Any,
    recv_counts: Any,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
) -> GroupedMatmulAllToAllvOutput:
    """Multiplies rows with the weights of their experts, then sends them: ``moe_jax.grouped_matmul_all_to_allv``.

    Source: aclnnGroupedMatMulAlltoAllv.
    """
    y, mm_y = grouped_matmul_all_to_allv(
        gmm_x, gmm_weight, send_counts, recv_counts, group, mm_x=mm_x, mm_weight=mm_weight,
        transpose_gmm_weight=trans_gmm_weight, transpose_mm_weight=trans_mm_weight,
    )  # fmt: skip
    return GroupedMatmulAllToAllvOutput(y, mm_y)


@operator(GROUPED, workspace.send_then_compute)
def allto_allv_grouped_mat_mul(
    gmm_x: Array,
    gmm_weight: Array,
    send_counts_tensor: None = None,
    recv_counts_tensor: None = None,
    mm_x: Array | None = None,
    mm_weight: Array | None = None,
    *,
    group: Any,
    ep_world_size: int,
    send_counts: Any,
    recv_counts: Any,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    permute_out_flag: bool = False,
) -> AllToAllvGroupedMatmulOutput:
    """Sends rows to their experts, then multiplies them there: ``moe_jax.all_to_allv_grouped_matmul``.

    Source: aclnnAlltoAllvGroupedMatMul.
    """
    gmm_y, mm_y, permuted = all_to_allv_grouped_matmul(
        gmm_x, gmm_weight, send_counts, recv_counts, group, mm_x=mm_x, mm_weight=mm_weight,
        transpose_gmm_weight=trans_gmm_weight, transpose_mm_weight=trans_mm_weight,
    )  # fmt: skip
    return AllToAllvGroupedMatmulOutput(gmm_y, mm_y, permuted if permute_out_flag else None)


@operator(QUANTISED, workspace.compute_then_send)
def quant_grouped_mat_mul_allto_allv(
    gmm_x: Array,
    gmm_weight: Array,
    gmm_x_scale: Array,
    gmm_weight_scale: Array,
    send_counts_tensor: None = None,
    recv_counts_tensor: None = None,
    mm_x: Array | None = None,
    mm_weight: Array | None = None,
    mm_x_scale: Array | None = None,
    mm_weight_scale: Array | None = None,
    comm_quant_scale: None = None,
    *,
    gmm_x_quant_mode: int,
    gmm_weight_quant_mode: int,
    mm_x_quant_mode: int = 0,
    mm_weight_quant_mode: int = 0,
    comm_quant_mode: int = 0,
    comm_quant_dtype: int = -1,
    group_size: int = 0,
    group: Any,
    ep_world_size: int,
    send_counts: Any,
    recv_counts: Any,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    y_dtype: Any = "bfloat16",
) -> GroupedMatmulAllToAllvOutput:
    """``grouped_mat_mul_allto_allv`` of quantised operands, whose results have the dtype ``y_dtype``.

    The quant modes of rows and weights are (1, 1), one scale per tensor, or (6, 6), one scale per block of 32.

    Source: aclnnQuantGroupedMatMulAlltoAllv.
    """
    y, mm_y = grouped_matmul_all_to_allv(
        gmm_x, gmm_weight, send_counts, recv_counts, group, mm_x=mm_x, mm_weight=mm_weight,
        gmm_x_scale=gmm_x_scale, gmm_weight_scale=gmm_weight_scale,
        mm_x_scale=mm_x_scale, mm_weight_scale=mm_weight_scale, out_dtype=y_dtype,
        transpose_gmm_weight=trans_gmm_weight, transpose_mm_weight=trans_mm_weight,
    )  # fmt: skip
    return GroupedMatmulAllToAllvOutput(y, mm_y)


@operator(QUANTISED, workspace.send_then_compute)
def allto_allv_quant_grouped_mat_mul(
    gmm_x: Array,
    gmm_weight: Array,
    gmm_x_scale: Array,
    gmm_weight_scale: Array,
    send_counts_tensor: None = None,
    recv_counts_tensor: None = None,
    mm_x: Array | None = None,
    mm_weight: Array | None = None,
    mm_x_scale: Array | None = None,
    mm_weight_scale: Array | None = None,
    *,
    gmm_x_quant_mode: int,
    gmm_weight_quant_mode: int,
    mm_x_quant_mode: int = 0,
    mm_weight_quant_mode: int = 0,
    group_size: int = 0,
    group: Any,
    ep_world_size: int,
    send_counts: Any,
    recv_counts: Any,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    permute_out_flag: bool = False,
    y_dtype: Any = "bfloat16",
) -> AllToAllvGroupedMatmulOutput:
    """``allto_allv_grouped_mat_mul`` of quantised operands, whose results have the dtype ``y_dtype``.

    The scales of rows travel with them, and the quant modes are those of ``quant_grouped_mat_mul_allto_allv``.

    Source: aclnnAlltoAllvQuantGroupedMatMul.
    """
    gmm_y, mm_y, permuted = all_to_allv_grouped_matmul(
        gmm_x, gmm_weight, send_counts, recv_counts, group, mm_x=mm_x, mm_weight=mm_weight,
        gmm_x_scale=gmm_x_scale, gmm_weight_scale=gmm_weight_scale,
        mm_x_scale=mm_x_scale, mm_weight_scale=mm_weight_scale, out_dtype=y_dtype,
        transpose_gmm_weight=trans_gmm_weight, transpose_mm_weight=trans_mm_weight,
    )  # fmt: skip
    return AllToAllvGroupedMatmulOutput(gmm_y, mm_y, permuted if permute_out_flag else None)
