"""The host-side first phase of every operator: ``<operator>_get_workspace_size``.

Each takes the operator's own keywords as arrays, NumPy arrays or ``jax.ShapeDtypeStruct`` s of one rank, checks them in
the reference's order (null pointers, dtypes, everything else) and returns

- the bytes of the operator's buffers on one rank (``buffer_bytes`` says what is counted), and
- an executor, which runs the operator inside ``shard_map`` on arrays like those that were checked,

or raises a ``MoEError`` whose ``status`` is the reference's code: 161001 (something is missing), 161002 (a dtype),
561002 (a shape, a value, a relation). ``product`` says whose limits hold: "a2", "a3", "a5", or None for no product's,
where only the impossible is refused. ``hccl_buffsize`` is the size in MB of a communicator's buffer there.
A parameter without a value is None; group names are mesh axis names, or tuples of some. Where they are bound, as inside
``shard_map``, their sizes must be those that the call says.
"""

from typing import Any

from moe_jax.aclnn.arguments import signature_checked
from moe_jax.aclnn.executor import Executor
from moe_jax.aclnn.first_phase import first_phase

WorkspaceAndExecutor = tuple[int, Executor]


@signature_checked
def moe_distribute_dispatch_v4_get_workspace_size(
    x: Any = None,
    expert_ids: Any = None,
    scales: Any = None,
    x_active_mask: Any = None,
    expert_scales: Any = None,
    elastic_info: Any = None,
    performance_info: Any = None,
    *,
    group_ep: Any = None,
    ep_world_size: int | None = None,
    moe_expert_num: int | None = None,
    group_tp: Any = "",
    tp_world_size: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str | None = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: Any = None,
    window: Any = None,
    product: str | None = None,
    hccl_buffsize: int = 200,
) -> WorkspaceAndExecutor:
    """First phase of ``moe_distribute_dispatch_v4``; ``y_dtype`` is that of quantised rows, None = the mode's own.

    ``window`` is the state that the rows arrive in, where a program keeps one: see ``make_receive_window``.

    >>> x, ids = jax.ShapeDtypeStruct((8, 512), "bfloat16"), jax.ShapeDtypeStruct((8, 4), "int32")
    >>> sizes = dict(group_ep="ep", ep_world_size=8, moe_expert_num=32)
    >>> num_bytes, executor = moe_distribute_dispatch_v4_get_workspace_size(x, ids, **sizes)
    >>> num_bytes
    298656
    >>> moe_distribute_dispatch_v4_get_workspace_size(x, ids, **sizes, product="a3")
    Traceback (most recent call last):
    moe_jax.errors.ShapeError: x with shape (8, 512): 512 = H, the hidden size, must be in [1024, 8192] on a3; ...
    """
    return first_phase("moe_distribute_dispatch_v4", locals())


@signature_checked
def moe_distribute_combine_v4_get_workspace_size(
    expand_x: Any = None,
    expert_ids: Any = None,
    assist_info_for_combine: Any = None,
    ep_send_counts: Any = None,
    expert_scales: Any = None,
    tp_send_counts: Any = None,
    x_active_mask: Any = None,
    activation_scale: Any = None,
    weight_scale: Any = None,
    group_list: Any = None,
    expand_scales: Any = None,
    shared_expert_x: Any = None,
    elastic_info: Any = None,
    ori_x: Any = None,
    const_expert_alpha_1: Any = None,
    const_expert_alpha_2: Any = None,
    const_expert_v: Any = None,
    performance_info: Any = None,
    *,
    group_ep: Any = None,
    ep_world_size: int | None = None,
    moe_expert_num: int | None = None,
    group_tp: Any = "",
    tp_world_size: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
    comm_alg: str | None = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    product: str | None = None,
    hccl_buffsize: int = 200,
) -> WorkspaceAndExecutor:
    """First phase of ``moe_distribute_combine_v4``; three reserved arrays and two attributes have one legal value."""
    return first_phase("moe_distribute_combine_v4", locals())


@signature_checked
def moe_distribute_combine_add_rms_norm_v2_get_workspace_size(
    expand_x: Any = None,
    expert_ids: Any = None,
    assist_info_for_combine: Any = None,
    ep_send_counts: Any = None,
    expert_scales: Any = None,
    residual_x: Any = None,
    gamma: Any = None,
    tp_send_counts: Any = None,
    x_active_mask: Any = None,
    activation_scale: Any = None,
    weight_scale: Any = None,
    group_list: Any = None,
    expand_scales: Any = None,
    shared_expert_x: Any = None,
    elastic_info: Any = None,
    ori_x: Any = None,
    const_expert_alpha_1: Any = None,
    const_expert_alpha_2: Any = None,
    const_expert_v: Any = None,
    *,
    group_ep: Any = None,
    ep_world_size: int | None = None,
    moe_expert_num: int | None = None,
    group_tp: Any = "",
    tp_world_size: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
    comm_alg: str | None = "",
    norm_eps: float = 1e-6,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    product: str | None = None,
    hccl_buffsize: int = 200,
) -> WorkspaceAndExecutor:
    """First phase of ``moe_distribute_combine_add_rms_norm_v2``."""
    return first_phase("moe_distribute_combine_add_rms_norm_v2", locals())


@signature_checked
def moe_update_expert_get_workspace_size(
    expert_ids: Any = None,
    eplb_table: Any = None,
    expert_scales: Any = None,
    pruning_threshold: Any = None,
    active_mask: Any = None,
    *,
    world_size: int | None = None,
    local_rank_id: Any = None,
    balance_mode: int = 0,
    group_ep: Any = "ep",
    product: str | None = None,
    hccl_buffsize: int = 200,
) -> WorkspaceAndExecutor:
    """First phase of ``moe_update_expert``; ``world_size`` is read with ``balance_mode=0`` only.

    A traced ``local_rank_id`` stays in the executor, which then runs in the program that is being traced.
    """
    return first_phase("moe_update_expert", locals())


@signature_checked
def distribute_barrier_v2_get_workspace_size(
    x_ref: Any = None,
    time_out: Any = None,
    elastic_info: Any = None,
    *,
    group: Any = None,
    world_size: int | None = None,
    product: str | None = None,
    hccl_buffsize: int = 200,
) -> WorkspaceAndExecutor:
    """First phase of ``distribute_barrier_v2``; ``time_out`` is in microseconds."""
    return first_phase("distribute_barrier_v2", locals())


@signature_checked
def moe_distribute_buffer_reset_get_workspace_size(
    elastic_info: Any = None,
    window: Any = None,
    *,
    group_ep: Any = None,
    ep_world_size: int | None = None,
    need_sync: int = 1,
    time_out: Any = None,
    product: str | None = None,
    hccl_buffsize: int = 200,
) -> WorkspaceAndExecutor:
    """First phase of ``moe_distribute_buffer_reset``; ``window`` is the state to clear, which JAX holds as an array.

    ``time_out`` is in microseconds, as that of ``distribute_barrier_v2``.
    """
    return first_phase("moe_distribute_buffer_reset", locals())


@signature_checked
def grouped_mat_mul_allto_allv_get_workspace_size(
    gmm_x: Any = None,
    gmm_weight: Any = None,
    send_counts_tensor: Any = None,
    recv_counts_tensor: Any = None,
    mm_x: Any = None,
    mm_weight: Any = None,
    *,
    group: Any = None,
    ep_world_size: int | None = None,
    send_counts: Any = None,
    recv_counts: Any = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    product: str | None = None,
    hccl_buffsize: int = 200,
) -> WorkspaceAndExecutor:
    """First phase of ``grouped_mat_mul_allto_allv``; count lists are this rank's, or tables with a row per rank."""
    return first_phase("grouped_mat_mul_allto_allv", locals())


@signature_checked
def allto_allv_grouped_mat_mul_get_workspace_size(
    gmm_x: Any = None,
    gmm_weight: Any = None,
    send_counts_tensor: Any = None,
    recv_counts_tensor: Any = None,
    mm_x: Any = None,
    mm_weight: Any = None,
    *,
    group: Any = None,
    ep_world_size: int | None = None,
    send_counts: Any = None,
    recv_counts: Any = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    permute_out_flag: bool = False,
    product: str | None = None,
    hccl_buffsize: int = 200,
) -> WorkspaceAndExecutor:
    """First phase of ``allto_allv_grouped_mat_mul``; count lists are this rank's, or tables with a row per rank."""
    return first_phase("allto_allv_grouped_mat_mul", locals())


@signature_checked
def quant_grouped_mat_mul_allto_allv_get_workspace_size(
    gmm_x: Any = None,
    gmm_weight: Any = None,
    gmm_x_scale: Any = None,
    gmm_weight_scale: Any = None,
    send_counts_tensor: Any = None,
    recv_counts_tensor: Any = None,
    mm_x: Any = None,
    mm_weight: Any = None,
    mm_x_scale: Any = None,
    mm_weight_scale: Any = None,
    comm_quant_scale: Any = None,
    *,
    gmm_x_quant_mode: int | None = None,
    gmm_weight_quant_mode: int | None = None,
    mm_x_quant_mode: int = 0,
    mm_weight_quant_mode: int = 0,
    comm_quant_mode: int = 0,
    comm_quant_dtype: int = -1,
    group_size: int = 0,
    group: Any = None,
    ep_world_size: int | None = None,
    send_counts: Any = None,
    recv_counts: Any = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    y_dtype: Any = "bfloat16",
    product: str | None = None,
    hccl_buffsize: int = 200,
) -> WorkspaceAndExecutor:
    """First phase of ``quant_grouped_mat_mul_allto_allv``; ``y_dtype`` is that of both results."""
    return first_phase("quant_grouped_mat_mul_allto_allv", locals())


@signature_checked
def allto_allv_quant_grouped_mat_mul_get_workspace_size(
    gmm_x: Any = None,
    gmm_weight: Any = None,
    gmm_x_scale: Any = None,
    gmm_weight_scale: Any = None,
    send_counts_tensor: Any = None,
    recv_counts_tensor: Any = None,
    mm_x: Any = None,
    mm_weight: Any = None,
    mm_x_scale: Any = None,
    mm_weight_scale: Any = None,
    *,
    gmm_x_quant_mode: int | None = None,
    gmm_weight_quant_mode: int | None = None,
    mm_x_quant_mode: int = 0,
    mm_weight_quant_mode: int = 0,
    group_size: int = 0,
    group: Any = None,
    ep_world_size: int | None = None,
    send_counts: Any = None,
    recv_counts: Any = None,
    trans_gmm_weight: bool = False,
    trans_mm_weight: bool = False,
    permute_out_flag: bool = False,
    y_dtype: Any = "bfloat16",
    product: str | None = None,
    hccl_buffsize: int = 200,
) -> WorkspaceAndExecutor:
    """First phase of ``allto_allv_quant_grouped_mat_mul``; ``y_dtype`` is that of both results."""
    return first_phase("allto_allv_quant_grouped_mat_mul", locals())
