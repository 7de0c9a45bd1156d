"""Ascend 950 (A5). Sections in brackets are those of the CANN sheet. No hif8: JAX has no such dtype.

Its newest sources are all there is of this product; where a document has a table for "all products", that one holds.
"""

from moe_jax.hardware.ascend import buffers
from moe_jax.hardware.ascend.a3 import BARRIER, GROUPED_MATMUL, UPDATE_EXPERT
from moe_jax.hardware.ascend.legal import E8M0, FP4, FP8, HALVES, Choices, Interval, Limits

_EXCHANGE = Limits(
    values={
        "comm_alg": Choices(("", "fullmesh_v1")),  # [8] "" is fullmesh_v1
        "ep_world_size": Interval(2, 1024),  # [2.2]
        "moe_expert_num": Interval(1, 1024),  # [2.2]
        "experts_by_ranks": Interval(1, 2048),  # [2.2, below the table]
        "tokens": Interval(1, 512),  # [2.2]
        "hidden": Interval(1024, 8192),  # [2.2]
        "top_k": Interval(1, 16),  # [2.2]
        "tp_world_size": Choices((0, 1)),  # [2.2] TP is A3's
        "shared_expert_num": Interval(0, 4),  # [2.2]
    },
    dtypes={"performance_info": ("int64",)},  # [2.2]
    absent=("elastic_info",),  # [6]
    buffer=buffers.fullmesh_a5,  # [8]
)
_COMBINE = _EXCHANGE.but(
    values={"comm_quant_mode": Choices((0, 2, 3, 4))},  # [9.3]
    dtypes={"expand_x": HALVES},  # [9.1]
)

# [14.4, column L] Other numbers of ranks than A3, and no rule about the bytes per peer.
_GROUPED_MATMUL = GROUPED_MATMUL.but(
    values={
        "ep_world_size": Choices((2, 4, 8, 16, 32, 64)),
        "least_bytes_per_peer": None,
        "most_bytes_per_peer": None,
    }
)
# Section 14.6. Mode 1 needs hif8 data, so only mode 6 is left; its scales are those of blocks of 32.
_QUANTISED = _GROUPED_MATMUL.but(
    values={"ep_world_size": Choices((2, 4, 8, 16, 32, 64, 128, 256))},
    dtypes={"gmm_x": (*FP8, "float4_e2m1fn")},
)

A5 = {
    "moe_distribute_dispatch_v4": _EXCHANGE.but(
        dtypes={
            "x": HALVES + FP8 + FP4,  # [2.2]
            "scales": ("float32", *E8M0),  # [2.2]
            "y_dtype:1": ("int8",),  # [3.2]
            "y_dtype:2": ("int8", *FP8),
            "y_dtype:3": FP8,
            "y_dtype:4": FP8,
            "y_dtype:5": FP8,
        },
    ),
    "moe_distribute_combine_v4": _COMBINE,
    # Section 10, newest: no ranks for shared experts, nothing quantised on the wire.
    "moe_distribute_combine_add_rms_norm_v2": _COMBINE.but(
        values={
            "comm_quant_mode": Choices((0,)),
            "shared_expert_rank_num": Choices((0,)),
            "experts_by_ranks": None,  # it is moe_expert_num here
        },
        dtypes={"expand_x": ("bfloat16",), "performance_info": None},
    ),
    "moe_update_expert": UPDATE_EXPERT,
    "distribute_barrier_v2": BARRIER.but(
        dtypes={"x_ref": (*BARRIER.dtypes["x_ref"], *FP8, "float4_e2m1fn", "int4")},
        absent=("elastic_info",),  # [6]
    ),
    "grouped_mat_mul_allto_allv": _GROUPED_MATMUL,
    "allto_allv_grouped_mat_mul": _GROUPED_MATMUL.but(
        values={
            "local_experts": Interval(1, 48),
            "experts_by_ranks": Interval(1, 384),
            "row_remainder": Choices((0,)),
        }
    ),
    "quant_grouped_mat_mul_allto_allv": _QUANTISED,
    "allto_allv_quant_grouped_mat_mul": _QUANTISED,
}
