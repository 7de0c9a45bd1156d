"""Atlas A2 (910B). Sections in brackets are those of the CANN sheet; the documents' own era wins over later."""

from moe_jax.hardware.ascend import buffers
from moe_jax.hardware.ascend.legal import HALVES, Choices, Interval, Limits

# comm_alg "" and "fullmesh" [2.2, 8]: "" means fullmesh, since no environment variable is read here.
_FULLMESH = Limits(
    values={
        "comm_alg": Choices(("", "fullmesh", "hierarchy")),  # [8]
        "ep_world_size": Choices((16, 32, 64, 128, 192, 256)),  # [2.2]
        "moe_expert_num": Interval(1, 512),  # [2.2]
        "local_experts": Interval(1, 24),  # [2.2, below the table]
        "tokens": Interval(1, 256),  # [2.2]
        "hidden": Interval(32, 7168, step=32),  # [2.2]
        "top_k": Interval(1, 16),  # [2.2]
        "tp_world_size": Choices((0, 1)),  # [2.2] A3 only
        "shared_expert_num": Choices((0, 1)),  # [2.2] 0 or the default
        "shared_expert_rank_num": Choices((0,)),  # [3.1] S = 0
        "const_expert_num": Choices((0,)),  # [2.2, 5]
        "mask_dims": Choices((1,)),  # [2.2] the document: 1D only
    },
    absent=("elastic_info",),  # [6]
    buffer=buffers.fullmesh_a2,  # [8]
)
_HIERARCHY = {
    "ep_world_size": Choices((16, 32, 64)),  # [2.2, 8]
    "local_experts": None,  # the document's buffer rule: hierarchy does not need the 24
    "tokens": Interval(1, 512),  # [2.2]
    "hidden": Interval(32, 10240, step=32),  # [2.2]
    "zero_expert_num": Choices((0,)),  # [2.2, 5]
    "copy_expert_num": Choices((0,)),  # [2.2, 5]
}
_WHY = {  # the document takes it with any comm_alg, the sheet does not with hierarchy [2.2]
    "x_active_mask": "it sends every token, and comm_alg='fullmesh' those of a mask [B]",
}


def _operator(values, dtypes, *, hierarchy, absent, required):
    """The limits of an exchange operator: its own beside those that both have; the last three hold with "hierarchy"."""
    base = _FULLMESH.but(values=values, dtypes={"performance_info": ("int64",), **dtypes})  # [2.2]
    with_hierarchy = base.but(
        values={**_HIERARCHY, **hierarchy},
        absent=("elastic_info", "x_active_mask", *absent),  # [2.2, 6]
        why=_WHY,
        required=required,
        buffer=buffers.hierarchy_a2,  # [8]
    )
    return base.but(variants={"hierarchy": with_hierarchy})


A2 = {
    "moe_distribute_dispatch_v4": _operator(
        {"quant_mode": Choices((0, 2))},  # [2.2, 3.2]
        {"x": HALVES, "y_dtype:2": ("int8",), "scales": ("float32",)},  # [2.2, 3.2]
        hierarchy={},
        absent=("scales",),  # [2.2]
        required=("expert_scales",),  # [2.2, 8]
    ),
    "moe_distribute_combine_v4": _operator(
        {"comm_quant_mode": Choices((0,))},  # [9.5]
        {"expand_x": HALVES},  # [9.1]
        hierarchy={"comm_quant_mode": Choices((0, 2))},  # [9.3]
        absent=(),
        required=("expand_scales",),  # [8, 9.1]
    ),
}
