"""What the operators return, under CANN's names.

Values and layouts are CANN's. Shapes are the same on all ranks, namely those of the rank that needs most, and entries
that CANN leaves unwritten are zero.
"""

from typing import NamedTuple

import jax

from moe_jax import _compat
from moe_jax.recovery.window import Window

Array = jax.Array


@_compat.exportable
class DispatchOutput(NamedTuple):
    """What ``moe_distribute_dispatch_v4`` returns. A rows are enough for any rank; P = max(tp_world_size, 1).

    Quantised rows are constants to JAX. ``moe_jax.aclnn.dequantize`` makes rows of them that have a gradient. A
    gradient that is asked for through ``expand_x`` or ``dynamic_scales`` themselves is refused with an
    UnsupportedError, unless they are integers, for which JAX knows no gradient at all.

    Attributes:
      expand_x: [P * A, H]; quantised: codes, [P * A, H / 2] u8 for fp4.
      dynamic_scales: [P * A] f32, [P * A, groups] f32 or u8; None where none travel.
      assist_info_for_combine: [A * 128] i32: (source rank, token, k) of own row j from 3 j on.
      expert_token_nums: [L] i64 (i32 unless JAX has 64-bit types enabled), rows of each expert, or their running sum.
      ep_recv_counts: [P * L * W] i32, running sums by (expert, source): those of this rank, then those of the tp peer.
      tp_recv_counts: [2] i32, rows by tp rank; None for tp_world_size < 2.
      expand_scales: [A] f32, the expert_scales entry of own rows; None without expert_scales.
    """

    expand_x: Array
    dynamic_scales: Array | None
    assist_info_for_combine: Array
    expert_token_nums: Array
    ep_recv_counts: Array
    tp_recv_counts: Array | None
    expand_scales: Array | None


@_compat.exportable
class TimedDispatchOutput(NamedTuple):
    """``DispatchOutput``, and performance_info with this call's microseconds added.

    Attributes:
      expand_x, dynamic_scales, assist_info_for_combine, expert_token_nums, ep_recv_counts, tp_recv_counts,
        expand_scales: as there.
      performance_info: [W] microseconds waited for each source.
    """

    expand_x: Array
    dynamic_scales: Array | None
    assist_info_for_combine: Array
    expert_token_nums: Array
    ep_recv_counts: Array
    tp_recv_counts: Array | None
    expand_scales: Array | None
    performance_info: Array


@_compat.exportable
class WindowDispatchOutput(NamedTuple):
    """``DispatchOutput``, and the receive window that it arrived in.

    Attributes:
      expand_x, dynamic_scales, assist_info_for_combine, expert_token_nums, ep_recv_counts, tp_recv_counts,
        expand_scales: as there.
      window: what arrived, for the next dispatch or a buffer reset.
      num_stale: [1] i32, pairs that were not sent, since the window of their rank is at another step.
    """

    expand_x: Array
    dynamic_scales: Array | None
    assist_info_for_combine: Array
    expert_token_nums: Array
    ep_recv_counts: Array
    tp_recv_counts: Array | None
    expand_scales: Array | None
    window: Window
    num_stale: Array


@_compat.exportable
class CombineOutput(NamedTuple):
    """What ``moe_distribute_combine_v4`` returns.

    Attributes:
      x_out: [B, H], the sum for each token.
    """

    x_out: Array


@_compat.exportable
class TimedCombineOutput(NamedTuple):
    """``CombineOutput``, and performance_info with this call's microseconds added.

    Attributes:
      x_out: [B, H], the sum for each token.
      performance_info: [W] microseconds waited for each rank.
    """

    x_out: Array
    performance_info: Array


@_compat.exportable
class AddRmsNormOutput(NamedTuple):
    """What ``moe_distribute_combine_add_rms_norm_v2`` returns.

    Attributes:
      y_out: [B, 1, H], normalised.
      rstd_out: [B, 1, 1] f32, one over the root of the mean square.
      x_out: [B, 1, H], the sum with the residual.
    """

    y_out: Array
    rstd_out: Array
    x_out: Array


@_compat.exportable
class UpdateExpertOutput(NamedTuple):
    """What ``moe_update_expert`` returns.

    Attributes:
      balanced_expert_ids: [BS, K] instances.
      balanced_active_mask: [BS, K] bool; None without pruning.
    """

    balanced_expert_ids: Array
    balanced_active_mask: Array | None


@_compat.exportable
class GroupedMatmulAllToAllvOutput(NamedTuple):
    """What ``grouped_mat_mul_allto_allv`` returns.

    Attributes:
      y: [BSK, N1], the products at the ranks of their tokens.
      mm_y: [BS, N2], the dense product; None without ``mm_x``.
    """

    y: Array
    mm_y: Array | None


@_compat.exportable
class AllToAllvGroupedMatmulOutput(NamedTuple):
    """What ``allto_allv_grouped_mat_mul`` returns.

    Attributes:
      gmm_y: [A, N1], the products at the ranks of their experts.
      mm_y: [BS, N2], the dense product; None without ``mm_x``.
      permute_out: [A, H1], the rows that were multiplied; None unless ``permute_out_flag``.
    """

    gmm_y: Array
    mm_y: Array | None
    permute_out: Array | None
