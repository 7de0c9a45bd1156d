"""MoeUpdateExpert, DistributeBarrier and MoeDistributeBufferReset, under CANN's names."""

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer

from moe_jax import _compat
from moe_jax.aclnn import workspace
from moe_jax.aclnn.calls import operator
from moe_jax.aclnn.results import UpdateExpertOutput
from moe_jax.aclnn.rules_small import BARRIER, BUFFER_RESET, UPDATE_EXPERT
from moe_jax.errors import InvalidArgumentError
from moe_jax.layer.placement import update_expert
from moe_jax.recovery.barrier import barrier
from moe_jax.recovery.window import Window, buffer_reset

Array = jax.Array


@operator(UPDATE_EXPERT, workspace.update_expert)
def moe_update_expert(
    expert_ids: Array,
    eplb_table: Array,
    expert_scales: Array | None = None,
    pruning_threshold: Array | None = None,
    active_mask: Array | None = None,
    *,
    world_size: int | None = None,
    local_rank_id: int | Array | None = None,
    balance_mode: int = 0,
    group_ep: Any = "ep",
) -> UpdateExpertOutput:
    """Maps logical expert ids to physical instances by a table, and prunes them. Nothing is communicated.

    The rank is ``local_rank_id``, or, where that is None and ``balance_mode`` is 0, the index along ``group_ep``. Only
    ``balance_mode=0`` reads ``world_size``. A traced ``local_rank_id`` stays in the executor of a first phase, which
    then runs in the program that is being traced.

    Returns:
      UpdateExpertOutput; its mask is None without ``pruning_threshold``.

    Raises:
      As ``moe_update_expert_get_workspace_size`` with product=None; MeshError: ``group_ep`` is not bound here, or does
        not have ``world_size`` ranks.

    Source: aclnnMoeUpdateExpert.
    """
    rank = local_rank_id
    if rank is None:
        rank = lax.axis_index(_compat.bound_axes(group_ep, "group_ep")) if balance_mode == 0 else 0
    ids, mask = update_expert(
        expert_ids,
        eplb_table,
        rank=rank,
        ep_size=world_size or 1,  # with balance_mode=1 it is not read
        balance="token" if balance_mode else "rank",
        combine_weights=expert_scales,
        pruning_threshold=pruning_threshold,
        token_mask=active_mask,
    )
    return UpdateExpertOutput(ids, mask)


@operator(BARRIER, workspace.barrier)
def distribute_barrier_v2(
    x_ref: Any, time_out: Any = None, elastic_info: Array | None = None, *, group: Any, world_size: int
) -> Any:
    """Returns ``x_ref`` unchanged, on no rank before all ranks of ``group`` have computed theirs; see ``barrier``.

    Nobody waits for ranks that ``elastic_info`` removes. Ranks wait for the others no longer than ``time_out``, [1] int
    in microseconds (None: for ever). It must be a value of the host, since it decides whether the host takes part.

    Source: aclnnDistributeBarrierV2.
    """
    return barrier(x_ref, group, rank_table=elastic_info, timeout_us=_microseconds(time_out))


@operator(BUFFER_RESET, workspace.buffer_reset)
def moe_distribute_buffer_reset(
    elastic_info: Array,
    window: Window,
    *,
    group_ep: Any,
    ep_world_size: int,
    need_sync: int = 1,
    time_out: Any = None,
) -> Window:
    """Zeroes the receive window of every rank that ``elastic_info`` [W] marks 1. With need_sync=1 these then meet.

    ``window`` is the one that ``moe_distribute_dispatch_v4`` takes and returns. ``time_out`` as in
    ``distribute_barrier_v2``: how long to wait for a rank that is marked 1.

    Source: aclnnMoeDistributeBufferReset, whose window is the communicator's; it waits for ever.
    """
    return buffer_reset(window, elastic_info, group_ep, sync=bool(need_sync), timeout_us=_microseconds(time_out))


def _microseconds(time_out: Any) -> int | None:
    """The number in an array [1], which must be a value of the host."""
    if isinstance(time_out, Tracer):
        raise InvalidArgumentError("time_out is traced; it must be a value of the host, such as np.array([5000000])")
    return None if time_out is None else int(np.asarray(time_out).ravel()[0])
