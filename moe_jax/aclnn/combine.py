"""MoeDistributeCombine and MoeDistributeCombineAddRmsNorm, under CANN's names."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import _compat, collectives
from moe_jax.aclnn import workspace
from moe_jax.aclnn import world as worlds
from moe_jax.aclnn.calls import operator
from moe_jax.aclnn.results import AddRmsNormOutput, CombineOutput, TimedCombineOutput
from moe_jax.aclnn.rules_exchange import ADD_RMS_NORM, COMBINE
from moe_jax.layer.combine import combine_sum, normalize
from moe_jax.layer.weightless import Constants
from moe_jax.transports import Stopwatch, transport_of
from moe_jax.transports.manifest import open_round
from moe_jax.types import DispatchHandle

Array = jax.Array


@operator(COMBINE, workspace.combine)
@_compat.vary_as_operands("expand_x", "expand_scales")
def moe_distribute_combine_v4(
    expand_x: Array,
    expert_ids: Array,
    assist_info_for_combine: Array,
    ep_send_counts: Array,
    expert_scales: Array,
    tp_send_counts: Array | None = None,
    x_active_mask: Array | None = None,
    activation_scale: None = None,
    weight_scale: None = None,
    group_list: None = None,
    expand_scales: Array | None = None,
    shared_expert_x: Array | None = None,
    elastic_info: Array | None = None,
    ori_x: Array | None = None,
    const_expert_alpha_1: Array | None = None,
    const_expert_alpha_2: Array | None = None,
    const_expert_v: Array | None = None,
    performance_info: Array | None = None,
    *,
    group_ep: Any,
    ep_world_size: int,
    moe_expert_num: int,
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
) -> CombineOutput | TimedCombineOutput:
    """Brings the experts' rows back to their tokens, and sums them with weights. Call it per shard.

    Pass what dispatch returned unchanged: assist_info_for_combine, ep_recv_counts as ``ep_send_counts`` and
    tp_recv_counts as ``tp_send_counts`` say where rows go. Rows whose triple is out of range or names another source
    than the counts become NaN, and so do all rows of a rank whose counts are not what the others sent. With "hierarchy"
    the weights of routed rows are those of ``expand_scales``, where it is given; rows of shared experts have weight 1,
    as everywhere. The rows of masked tokens are zero. Of ``activation_scale``, ``weight_scale`` and ``group_list``,
    which are reserved, only None is legal.

    Returns:
      CombineOutput; with ``performance_info``, its new value too. Differentiable in every float array.

    Raises:
      As ``moe_distribute_combine_v4_get_workspace_size`` with product=None; MeshError: a group is not bound here.

    Source: aclnnMoeDistributeCombineV4.
    """
    given = locals()
    total, active, waited = _total(given)
    x_out = jnp.where(active[:, None], total.astype(expand_x.dtype), jnp.zeros((), expand_x.dtype))
    return CombineOutput(x_out) if waited is None else TimedCombineOutput(x_out, waited)


@operator(ADD_RMS_NORM, workspace.add_rms_norm)
@_compat.vary_as_operands("expand_x", "expand_scales")
def moe_distribute_combine_add_rms_norm_v2(
    expand_x: Array,
    expert_ids: Array,
    assist_info_for_combine: Array,
    ep_send_counts: Array,
    expert_scales: Array,
    residual_x: Array,
    gamma: Array,
    tp_send_counts: Array | None = None,
    x_active_mask: Array | None = None,
    activation_scale: None = None,
    weight_scale: None = None,
    group_list: None = None,
    expand_scales: Array | None = None,
    shared_expert_x: Array | None = None,
    elastic_info: Array | None = None,
    ori_x: Array | None = None,
    const_expert_alpha_1: Array | None = None,
    const_expert_alpha_2: Array | None = None,
    const_expert_v: Array | None = None,
    *,
    group_ep: Any,
    ep_world_size: int,
    moe_expert_num: int,
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
) -> AddRmsNormOutput:
    """``moe_distribute_combine_v4``, plus a residual, and the RMSNorm of that sum.

    The residual is ``residual_x`` [B, 1, H], and ``gamma`` [H] are the factors of the norm.

    Returns:
      AddRmsNormOutput, zero for masked tokens. Differentiable in every float array.

    Raises:
      As ``moe_distribute_combine_add_rms_norm_v2_get_workspace_size`` with product=None; MeshError likewise.

    Source: aclnnMoeDistributeCombineAddRmsNormV2.
    """
    given = locals()
    total, active, _ = _total(given | {"performance_info": None})
    y, rstd, x = normalize(total, residual_x.reshape(total.shape), gamma, norm_eps, expand_x.dtype.name)
    y, rstd, x = (jnp.where(active[:, None], part, jnp.zeros((), part.dtype)) for part in (y, rstd[:, None], x))
    return AddRmsNormOutput(y_out=y[:, None], rstd_out=rstd[:, None], x_out=x[:, None])


def _total(given: dict[str, Any]) -> tuple[Array, Array, Array | None]:
    """The fp32 sums [B, H], which tokens are active [B], and the new performance_info."""
    tokens, hidden = given["expert_ids"].shape[0], given["expand_x"].shape[1]
    world = worlds.make_world(given, given["expand_x"], dtype=str(given["expand_x"].dtype))
    plan = world.plan
    arrays = {name: value for name, value in given.items() if isinstance(value, jax.Array)}
    given = given | _compat.as_varying_alike(arrays, plan.exchange_axes)
    active = worlds.active_tokens(given["x_active_mask"], given["expert_ids"], plan, given["elastic_info"])
    weights = given["expert_scales"]
    if not weights.size:  # without weights it is a plain sum
        weights = jnp.ones_like(given["expand_x"], shape=given["expert_ids"].shape, dtype=jnp.float32)
    if not plan.num_pairs:
        return jnp.zeros_like(weights, shape=(0, hidden)), active, given["performance_info"]
    handle, rows, row_weights = _handle(world, given)
    shared_x = given["shared_expert_x"]
    total, waited = combine_sum(
        rows,
        weights,
        handle,
        None if shared_x is None else shared_x.reshape(tokens, hidden),
        given["performance_info"],
        given["ori_x"] if plan.num_copy_experts + plan.num_const_experts else None,
        Constants(given["const_expert_alpha_1"], given["const_expert_alpha_2"], given["const_expert_v"]),
        row_weights=row_weights,
    )
    return total, active, waited


def _handle(world: worlds.World, given: dict[str, Any]) -> tuple[DispatchHandle, Array, Array | None]:
    """The handle that dispatch had, made again from what it returned; the rows to send back; and their weights.

    Rows for which the returned values contradict each other are NaN. Weights are those of this rank's own rows, zero
    for the peer's rows, and None where rows are weighted at their tokens.
    """
    plan, capacity = world.plan, world.capacity
    ledger = worlds.Ledger(plan, given["elastic_info"])
    num_counts = plan.tp_size * plan.num_local_experts * plan.ep_size
    sums = given["ep_send_counts"][:num_counts].reshape(plan.tp_size, -1)  # A2's hierarchy may have scratch behind
    recv_counts = ledger.counts(sums)
    ids, mask, table = given["expert_ids"], given["x_active_mask"], given["elastic_info"]
    manifest = worlds.make_manifest(world, ids, mask, table, recv_counts=recv_counts)
    transport = transport_of(plan)
    opener = transport if given["performance_info"] is None else Stopwatch(transport)
    handle = open_round(opener, manifest, 0, plan.max_pair_rows, plan, num_rows=world.num_rows)
    handle = dataclasses.replace(handle, maps=transport.plain(handle.maps))
    lanes = jnp.sum(recv_counts, axis=(1, 2), dtype=jnp.int32)
    row = jnp.arange(world.num_rows)
    triples = given["assist_info_for_combine"].ravel()[: 3 * capacity].reshape(capacity, 3)
    fits = triples[:, 0] == ledger.source_of_row(sums[0], capacity)
    for column, end in ((1, plan.tokens_per_rank), (2, plan.pairs_per_token)):
        fits &= (triples[:, column] >= 0) & (triples[:, column] < end)
    if given["performance_info"] is None:  # a collective in front of the timed exchange would wait for its slow ranks
        fits &= transport.counts_agree(recv_counts, manifest, handle.recv_counts, plan)
    fits = jnp.pad(fits, (0, world.num_rows - capacity), constant_values=True)
    fits |= row >= lanes[collectives.tp_rank(plan)]
    if plan.tp_size > 1:
        fits &= jnp.all(given["tp_send_counts"] == lanes)
    written = (row < jnp.sum(lanes))[:, None]
    rows = jnp.where(written, given["expand_x"][: world.num_rows], 0)  # the caller's array may have more rows
    rows = jnp.where(fits[:, None] | ~written, rows, jnp.nan)
    if not transport.takes_row_weights or given["expand_scales"] is None:
        return handle, rows, None
    # Routed rows have the weights that came with them, and rows of shared experts, whose k is K or more, have weight 1.
    weights = jnp.where(triples[:, 2] < plan.top_k, given["expand_scales"][:capacity], 1.0)
    weights = jnp.where(row[:capacity] < lanes[collectives.tp_rank(plan)], weights, 0.0)
    return handle, rows, jnp.pad(weights, (0, world.num_rows - capacity))
