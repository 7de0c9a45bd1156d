"""What holds on every product: the values that have a meaning at all, and the dtypes that JAX can use for them.

Sections in brackets are those of the CANN sheet. Relations between arguments are the rules of ``moe_jax.aclnn``.
"""

from moe_jax.hardware.ascend.legal import E8M0, FLOATS, FP4, FP8, Choices, Interval, Limits
from moe_jax.hardware.ascend.versions import with_versions

_COUNT = Interval(0)

_EXCHANGE = Limits(
    values={
        "comm_alg": Choices(("", "fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy")),  # [8]
        "ep_world_size": Interval(1),
        "moe_expert_num": Interval(1),
        "hidden": Interval(1),
        "top_k": Interval(1),
        "tp_world_size": Choices((0, 1, 2)),  # [2.2]
        "expert_shard_type": Choices((0,)),  # [2.2]
        "shared_expert_num": _COUNT,
        "shared_expert_rank_num": _COUNT,
        "global_bs": _COUNT,
        "zero_expert_num": _COUNT,
        "copy_expert_num": _COUNT,
        "const_expert_num": _COUNT,
    },
    dtypes={
        "expert_ids": ("int32",),
        "x_active_mask": ("bool",),
        "expert_scales": ("float32",),
        "elastic_info": ("int32",),
        "performance_info": ("int64", "int32"),  # int32: what JAX has unless 64-bit types are enabled
    },
)
_COMBINE = _EXCHANGE.but(
    values={"comm_quant_mode": Choices((0, 2, 3, 4)), "out_dtype": Choices((0,)), "group_list_type": Choices((0, 1))},
    dtypes={
        "expand_x": FLOATS,
        "assist_info_for_combine": ("int32",),
        "ep_send_counts": ("int32",),
        "tp_send_counts": ("int32",),
        "expand_scales": ("float32",),
    },
    absent=("activation_scale", "weight_scale", "group_list"),  # [9.1] reserved
)
_BARRIER = Limits(values={"world_size": Interval(1)})
_GROUPED_MATMUL = Limits(
    values={name: Interval(1) for name in ("ep_world_size", "local_experts", "h1", "n1", "h2", "n2")},
    dtypes={"gmm_x": FLOATS},
)
_QUANTISED = _GROUPED_MATMUL.but(
    values={
        "gmm_x_quant_mode": Choices((1, 6)),  # [14.6]
        "mm_x_quant_mode": Choices((0, 1, 6)),  # 0: nothing to multiply
        "comm_quant_mode": Choices((0,)),  # [14.6] reserved
        "comm_quant_dtype": Choices((-1,)),
        "group_size": Choices((0,)),
    },
    dtypes={"gmm_x": ("int8", *FP8, "float4_e2m1fn"), "y_dtype": ("float16", "bfloat16")},  # [14.6]
    absent=("comm_quant_scale",),
)

_NEWEST = {
    "moe_distribute_dispatch_v4": _EXCHANGE.but(
        values={"quant_mode": Interval(0, 5), "expert_token_nums_type": Choices((0, 1))},  # [2.2, 3.2]
        dtypes={
            "x": FLOATS + FP8 + FP4,  # [2.2]
            "scales": ("float32", *E8M0),  # [3.2]
            "window": ("uint8",),  # of messages, whatever rows they hold
            "y_dtype:1": ("int8",),  # [3.2] and below
            "y_dtype:2": ("int8", *FP8),
            "y_dtype:3": FP8,
            "y_dtype:4": FP8 + FP4,
            "y_dtype:5": FP8,
        },
    ),
    "moe_distribute_combine_v4": _COMBINE,
    "moe_distribute_combine_add_rms_norm_v2": _COMBINE.but(dtypes={"performance_info": None}),  # [10] it has none
    "moe_update_expert": Limits(
        values={
            "top_k": Interval(1),
            "logical_experts": Interval(1),
            "table_columns": Interval(2),
            "balance_mode": Choices((0, 1)),
            "ranks": Interval(1),
        },
        dtypes={
            "expert_ids": ("int32", "int64"),
            "eplb_table": ("int32",),
            "expert_scales": FLOATS,
            "pruning_threshold": ("float32",),
            "active_mask": ("bool",),
        },
    ),
    "distribute_barrier_v2": _BARRIER.but(dtypes={"time_out": ("int32",), "elastic_info": ("int32",)}),
    "moe_distribute_buffer_reset": Limits(
        values={"ep_world_size": Interval(1), "need_sync": Choices((0, 1))},
        dtypes={"elastic_info": ("int32",), "time_out": ("int32",)},
    ),
    "grouped_mat_mul_allto_allv": _GROUPED_MATMUL,
    "allto_allv_grouped_mat_mul": _GROUPED_MATMUL,
    "quant_grouped_mat_mul_allto_allv": _QUANTISED,
    "allto_allv_quant_grouped_mat_mul": _QUANTISED.but(
        values={"group_size": Choices((0, 4295032864)), "comm_quant_mode": None, "comm_quant_dtype": None},
        absent=(),
    ),
}

ANY = with_versions(_NEWEST)
