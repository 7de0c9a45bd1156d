"""Atlas A3 (910_93). Sections in brackets are those of the CANN sheet; the documents' own era wins over later.

The document calls expertScales of dispatch unsupported, but its own sample passes them, so they are taken [2.2, 2.11].
"""

from moe_jax.hardware.ascend import buffers
from moe_jax.hardware.ascend.legal import HALVES, Choices, Interval, Limits

# comm_alg "" and "fullmesh_v1" [2.2, 8].
_FULLMESH = Limits(
    values={
        "comm_alg": Choices(("", "fullmesh_v1", "fullmesh_v2", "hierarchy")),  # [8]
        "ep_world_size": Interval(2, 768),  # [2.2]
        "moe_expert_num": Interval(1, 1024),  # [2.2]
        "experts_by_ranks": Interval(1, 2048),  # [2.2, below the table]
        "tokens": Interval(1, 512),  # [2.2]
        "hidden": Interval(1024, 8192),  # [2.2]
        "top_k": Interval(1, 16),  # [2.2]
        "local_experts_with_tp": Choices((1,)),  # [2.2, 2.9]
        "shared_expert_num": Interval(0, 4),  # [2.2]
    },
    absent=("elastic_info", "performance_info"),  # [6, 7] reserved in the V4 document
    buffer=buffers.fullmesh_v1,  # [8]
)
_FULLMESH_V2 = {
    "tokens": Interval(1, 256),  # [8]
    "top_k": Interval(1, 12),  # [8]
    "tp_world_size": Choices((0, 1)),  # [8]
}
_HIERARCHY = {
    "ep_world_size": Interval(16, 256, step=16),  # [2.2]
    "moe_expert_num": Interval(1, 512),  # [2.2]; with S = 0 this is L * W <= 512 too
    "local_experts": Interval(1, 24),  # [2.2, below the table]
    "tokens": Interval(1, 256),  # [2.2]
    "hidden": Interval(1024, 7168, step=32),  # [2.2]
    "shared_expert_rank_num": Choices((0,)),  # [8]
    "zero_expert_num": Choices((0,)),  # [2.2]
    "copy_expert_num": Choices((0,)),
    "const_expert_num": Choices((0,)),
    "tp_world_size": Choices((0, 1)),  # no TP domain in its buffer rule
}


def _operator(values, dtypes, required, **others):
    """The limits of an exchange operator: its own ones beside those that all have. "hierarchy" needs ``required``."""
    base = _FULLMESH.but(values=values, dtypes=dtypes, **others)
    absent = ("elastic_info", *(name for name in base.absent if name != "elastic_info"))  # [6, 8]
    v2 = base.but(values=_FULLMESH_V2, absent=absent, buffer=others.get("buffer", buffers.fullmesh_v2))
    hierarchy = base.but(
        values=_HIERARCHY, absent=absent, required=required, buffer=others.get("buffer", buffers.hierarchy_a3)
    )
    return base.but(variants={"fullmesh_v2": v2, "hierarchy": hierarchy})


_DISPATCH = {
    "values": {"quant_mode": Choices((0, 2))},  # [2.2, 3.2] static quantisation is refused
    "dtypes": {"x": HALVES, "y_dtype:2": ("int8",), "scales": ("float32",)},  # [2.2, 3.2]
    "required": ("expert_scales",),  # [8]
}
_COMBINE = {
    "values": {"comm_quant_mode": Choices((0, 2))},  # [9.3]
    "dtypes": {"expand_x": HALVES},  # [9.1]
    "required": ("expand_scales",),  # [8, 9.1]
}
_NORM = _operator(
    {"comm_quant_mode": Choices((0,))},  # [10]
    {"expand_x": ("bfloat16",)},
    required=("expand_scales",),
    absent=(),
    buffer=buffers.add_rms_norm,  # [8]
)
_ELASTIC = {"tp_world_size_with_elastic": Choices((0, 1))}  # [6] where elastic_info is taken

# The document's era: 8 to 64 ranks, 2 to 100 MB per peer as a hard rule [14.4, column H].
GROUPED_MATMUL = Limits(
    values={
        "ep_world_size": Choices((8, 16, 32, 64)),
        "local_experts": Interval(1, 32),
        "experts_by_ranks": Interval(1, 256),
        "rows": Interval(1, 52428799),
        "h1": Interval(1, 65535),
        "n1": Interval(1, 65535),
        "h2": Interval(1, 12288),
        "n2": Interval(1, 65535),
        "rows_per_token": Interval(2, 8),
        "least_bytes_per_peer": Interval(2 * buffers.MB),
        "most_bytes_per_peer": Interval(0, 100 * buffers.MB),
    },
    dtypes={"gmm_x": HALVES},
)

# Section 13. The old tiling's upper bound, 384.
_BARRIER_DTYPES = (
    "bfloat16", "float16", "float32", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
)  # fmt: skip
BARRIER = Limits(values={"world_size": Interval(2, 384)}, dtypes={"x_ref": _BARRIER_DTYPES})

# Section 11.
UPDATE_EXPERT = Limits(
    values={
        "tokens": Interval(1, 512),
        "top_k": Interval(1, 16),
        "logical_experts": Interval(1, 1024),
        "ranks": Interval(2, 768),  # world_size, read with balance_mode 0 only
        "table_columns_by_token": Interval(2, 769),  # with balance_mode 1; with 0 it is at most world_size + 1
    },
)

A3 = {
    "moe_distribute_dispatch_v4": _operator(**_DISPATCH),
    "moe_distribute_combine_v4": _operator(**_COMBINE),
    # Section 6: V3 takes elastic_info, which V4 reserves again.
    "moe_distribute_dispatch_v3": _operator(**_DISPATCH, absent=()).but(values=_ELASTIC),
    "moe_distribute_combine_v3": _operator(**_COMBINE, absent=()).but(values=_ELASTIC),
    # Section 10; here V2 takes elastic_info [6].
    "moe_distribute_combine_add_rms_norm": _NORM,
    "moe_distribute_combine_add_rms_norm_v2": _NORM.but(values=_ELASTIC),
    "moe_update_expert": UPDATE_EXPERT,
    "distribute_barrier_v2": BARRIER,
    # Section 12.1.
    "moe_distribute_buffer_reset": Limits(values={"ep_world_size": Interval(16, 128, step=16)}),
    "grouped_mat_mul_allto_allv": GROUPED_MATMUL,
    "allto_allv_grouped_mat_mul": GROUPED_MATMUL,
}
