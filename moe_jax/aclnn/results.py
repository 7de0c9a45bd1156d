"""What the operators return, under the reference's names. Values and layouts are the reference's; shapes are those of
the rank that needs most, the same everywhere, and what the reference leaves unwritten is zero."""

from typing import NamedTuple

import jax

Array = jax.Array


class DispatchOutput(NamedTuple):
    """Of ``moe_distribute_dispatch_v4``. A rows for the rank that needs most, P = max(tp_world_size, 1).

    Quantised rows are constants to JAX. ``moe_jax.aclnn.dequantize`` makes rows of them that have a gradient; one that
    is asked for through ``expand_x`` or ``dynamic_scales`` themselves is refused (UnsupportedError), but where they are
    integers: then JAX knows none, as of any integer.
    """

    expand_x: Array  # [P * A, H]; quantised: codes, [P * A, H / 2] u8 for fp4
    dynamic_scales: Array | None  # [P * A] f32, [P * A, groups] f32 or u8; None where none travel
    assist_info_for_combine: Array  # [A * 128] i32: (source rank, token, k) of own row j from 3 j on
    expert_token_nums: Array  # [L] i64 (i32 unless JAX has 64-bit types enabled)
    ep_recv_counts: Array  # [P * L * W] i32, running sums by (expert, source): own, then the tp peer's
    tp_recv_counts: Array | None  # [2] i32 by tp rank; None for tp_world_size < 2
    expand_scales: Array | None  # [A] f32, the expert_scales entry of own rows; None without expert_scales


class TimedDispatchOutput(NamedTuple):
    """``DispatchOutput``, and performance_info with this call's microseconds added."""

    expand_x: Array
    dynamic_scales: Array | None
    assist_info_for_combine: Array
    expert_token_nums: Array
    ep_recv_counts: Array
    tp_recv_counts: Array | None
    expand_scales: Array | None
    performance_info: Array  # [W]


class CombineOutput(NamedTuple):
    """Of ``moe_distribute_combine_v4``."""

    x_out: Array  # [B, H]


class TimedCombineOutput(NamedTuple):
    """``CombineOutput``, and performance_info with this call's microseconds added."""

    x_out: Array
    performance_info: Array  # [W]


class AddRmsNormOutput(NamedTuple):
    """Of ``moe_distribute_combine_add_rms_norm_v2``."""

    y_out: Array  # [B, 1, H]
    rstd_out: Array  # [B, 1, 1] f32
    x_out: Array  # [B, 1, H]


class UpdateExpertOutput(NamedTuple):
    """Of ``moe_update_expert``."""

    balanced_expert_ids: Array  # [BS, K]
    balanced_active_mask: Array | None  # [BS, K] bool; None without pruning


class GroupedMatmulAllToAllvOutput(NamedTuple):
    """Of ``grouped_mat_mul_allto_allv``."""

    y: Array  # [BSK, N1]
    mm_y: Array | None  # [BS, N2]


class AllToAllvGroupedMatmulOutput(NamedTuple):
    """Of ``allto_allv_grouped_mat_mul``."""

    gmm_y: Array  # [A, N1]
    mm_y: Array | None  # [BS, N2]
    permute_out: Array | None  # [A, H1]; None unless permute_out_flag
