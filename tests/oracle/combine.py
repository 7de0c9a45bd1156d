"""CANN's combine, with and without a residual and RMSNorm behind it, token by token."""

import dataclasses
import math

import numpy as np

from moe_jax import errors
from oracle.dispatch import DispatchResult
from oracle.numerics import COMBINE_RECIPES, dequantize, quantize
from oracle.world import World, active_pairs, make_world, with_tp, without_tp

_F32 = np.float32


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CombineResult:
    """The output of all ranks; each array starts with [W], or [W, 2]. Rows of inactive tokens are zero.

    Attributes:
      x_out: [B, H] of expand_x's dtype.
      unrounded: [B, H] f64, the fp32 sums that were rounded to x_out.
    """

    x_out: np.ndarray
    unrounded: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class NormResult:
    """The outputs of all ranks; each array starts with [W], or [W, 2]. Rows of inactive tokens are zero.

    Attributes:
      y: [B, 1, H] of expand_x's dtype.
      rstd: [B, 1, 1] f32.
      x: [B, 1, H] of expand_x's dtype.
      unrounded: [B, 1, H] f64, the fp32 sums that were rounded to x.
    """

    y: np.ndarray
    rstd: np.ndarray
    x: np.ndarray
    unrounded: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Special:
    """Zero, copy and const experts of one rank."""

    first_copy: int
    first_const: int
    end: int
    ori_x: np.ndarray | None  # [B, H]
    alpha_1: np.ndarray | None  # [Cc] or [Cc, H]
    alpha_2: np.ndarray | None
    v: np.ndarray | None  # [Cc, H]


def moe_distribute_combine(
    expand_x: np.ndarray,
    expert_ids: np.ndarray,
    dispatch_result: DispatchResult,
    expert_scales: np.ndarray,
    *,
    moe_expert_num: int,
    x_active_mask: np.ndarray | None = None,
    shared_expert_x: np.ndarray | None = None,
    elastic_info: np.ndarray | None = None,
    ori_x: np.ndarray | None = None,
    const_expert_alpha_1: np.ndarray | None = None,
    const_expert_alpha_2: np.ndarray | None = None,
    const_expert_v: np.ndarray | None = None,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    tp_world_size: int = 0,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    comm_quant_mode: int = 0,
    nodes: int = 1,
) -> CombineResult:
    """Brings every row home and adds up: in fp32, k ascending, then shared experts, then ``shared_expert_x``.

    ``acc += fp32(w) * fp32(y)`` has two roundings; shared rows and ``shared_expert_x`` have weight 1. A copy expert
    gives w * x, const expert c gives w * (a1 * x + a2 * v[c]) with (a1, a2) = (alpha_1[c], alpha_2[c]) or, for alphas
    [Cc, H], softmax(<alpha_1[c], x>, <alpha_2[c], x>). For T = 2 the rows of both peers are added first and rounded.
    With more than one node, each node's part of the sum is rounded to the dtype of the rows, and to what
    ``comm_quant_mode`` leaves of that, before it travels; parts are added by node ascending, then special experts.

    Args:
      expand_x: [A * P, H] bf16, fp16 or f32, in the order of dispatch; rows past the true number are not read.
      dispatch_result: what ``moe_distribute_dispatch`` returned; triples, counts and, for nodes > 1, weights are read.
      expert_scales: [B, K] f32; of size 0 = all weights are 1. Where nodes > 1 and dispatch had weights, those count
        for routed rows.
      shared_expert_x: [B, H] or [B1, B2, H] with B1 * B2 = B, without shared ranks only.
      ori_x: [B, H], what copy and const experts see.
      const_expert_alpha_1, const_expert_alpha_2: [Cc] or [Cc, H].
      const_expert_v: [Cc, H].
      comm_quant_mode: 0; 2 = int8 in groups of 8 columns; 3, 4 = MX e5m2, MX e4m3: how rows, or parts of sums, travel.
      nodes: W / nodes consecutive ranks form a node.
      expert_ids, x_active_mask, elastic_info and the numbers: as given to dispatch.

    Raises:
      InvalidArgumentError: arguments contradict each other.
      MissingArgumentError: an array is missing that special experts need.
    """
    num_ranks = len(expand_x)
    special_nums = (zero_expert_num, copy_expert_num, const_expert_num)
    world = make_world(
        num_ranks,
        moe_expert_num=moe_expert_num,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        tp_world_size=tp_world_size,
        num_special=sum(special_nums),
        elastic_info=elastic_info,
    )
    if shared_expert_x is not None and shared_expert_rank_num:
        raise errors.InvalidArgumentError("shared_expert_x was given, but there are shared ranks; drop one of them")
    _check_special(special_nums, ori_x, (const_expert_alpha_1, const_expert_alpha_2, const_expert_v))
    if nodes < 1 or num_ranks % nodes:
        raise errors.InvalidArgumentError(f"{nodes=} must divide the {num_ranks} ranks")
    node_of = None if nodes == 1 else [rank // (num_ranks // nodes) for rank in range(num_ranks)]
    ids, shared_x, *special_arrays = (
        with_tp(array, tp_world_size)
        for array in (expert_ids, shared_expert_x, ori_x, const_expert_alpha_1, const_expert_alpha_2, const_expert_v)
    )
    active = active_pairs(ids, with_tp(x_active_mask, tp_world_size))
    rows, pairs = _own_rows(world, expand_x, dispatch_result, tp_world_size)
    recipe = _recipe(comm_quant_mode, tp_world_size)
    values = _travel(world, rows, pairs, ids.shape, recipe if node_of is None else None)
    scales = with_tp(expert_scales, tp_world_size).astype(_F32) if expert_scales.size else np.ones(ids.shape, _F32)
    weights = scales
    if node_of is not None and dispatch_result.expand_scales is not None:
        weights = _row_weights(world, dispatch_result, ids.shape, pairs, tp_world_size)
    unrounded = np.zeros((*ids.shape[:3], expand_x.shape[-1]), _F32)
    for w, p in np.ndindex(ids.shape[:2]):
        special = _special_of(world, special_nums, [None if array is None else array[w, p] for array in special_arrays])
        for i in np.flatnonzero(active[w, p].any(axis=-1)) if w in world.physical else []:
            chosen = (ids[w, p, i], scales[w, p, i], active[w, p, i])
            if node_of is None:
                acc = _sum_token(world, special, i, values[w, p, i], *chosen)
            else:
                homes = [node_of[rank] if rank >= 0 else -1 for rank in _homes(world, w, ids[w, p, i], active[w, p, i])]
                acc = _sum_nodes(homes, nodes, expand_x.dtype, recipe, values[w, p, i], weights[w, p, i])
                acc = acc + _sum_token(world, special, i, None, *chosen)
            if shared_x is not None:
                acc = acc + shared_x[w, p].reshape(ids.shape[2], -1)[i].astype(_F32)
            unrounded[w, p, i] = acc
    return CombineResult(
        x_out=without_tp(unrounded.astype(expand_x.dtype), tp_world_size),
        unrounded=without_tp(unrounded.astype(np.float64), tp_world_size),
    )


def moe_distribute_combine_add_rms_norm(
    expand_x: np.ndarray,
    expert_ids: np.ndarray,
    dispatch_result: DispatchResult,
    expert_scales: np.ndarray,
    residual_x: np.ndarray,
    gamma: np.ndarray,
    *,
    norm_eps: float = 1e-6,
    x_active_mask: np.ndarray | None = None,
    tp_world_size: int = 0,
    elastic_info: np.ndarray | None = None,
    **combine_options,
) -> NormResult:
    """``acc`` = the fp32 sum of ``moe_distribute_combine`` + residual; x, rstd and y follow from the unrounded acc.

    ``rstd = 1 / sqrt(mean(acc^2) + eps)``, in float64 and rounded once; ``y = round(fp32(round(acc * rstd)) * gamma)``.

    Args:
      residual_x: [B, 1, H].
      gamma: [H].
      the others: as ``moe_distribute_combine``.
    """
    combined = moe_distribute_combine(
        expand_x, expert_ids, dispatch_result, expert_scales, x_active_mask=x_active_mask, tp_world_size=tp_world_size,
        elastic_info=elastic_info, **combine_options,
    )  # fmt: skip
    written = active_pairs(np.asarray(expert_ids), x_active_mask).any(axis=-1)
    if elastic_info is not None and elastic_info[0] == 1:
        alive = np.asarray(elastic_info[4 : 4 + len(written)]) >= 0
        written &= alive.reshape(-1, *[1] * (written.ndim - 1))
    acc, rstd = np.zeros(residual_x.shape, _F32), np.zeros((*residual_x.shape[:-1], 1), _F32)
    y = np.zeros(residual_x.shape, expand_x.dtype)
    for token in zip(*np.nonzero(written), strict=True):
        rank, row = token[:-1], (*token, 0)
        acc[row] = combined.unrounded[token].astype(_F32) + residual_x[row].astype(_F32)
        square = float((acc[row].astype(np.float64) ** 2).sum())
        rstd[row] = 1.0 / math.sqrt(square / acc.shape[-1] + norm_eps)
        y[row] = ((acc[row] * rstd[row]).astype(y.dtype).astype(_F32) * gamma[rank].astype(_F32)).astype(y.dtype)
    return NormResult(y=y, rstd=rstd, x=acc.astype(expand_x.dtype), unrounded=acc.astype(np.float64))


def _sum_token(world: World, special: _Special, i, values, ids, weights, active):
    """The fp32 sum of token ``i``: values [K + Ns, H], or None for special experts alone; ids, weights, active [K]."""
    acc = np.zeros((), _F32) if values is None else np.zeros(values.shape[-1], _F32)
    for k in range(len(ids)):
        if active[k] and ids[k] >= world.num_experts:
            acc = acc + weights[k] * _special_value(special, i, int(ids[k]))
        elif active[k] and values is not None:
            acc = acc + weights[k] * values[k]
    for s in range(world.num_shared if values is not None else 0):
        acc = acc + values[len(ids) + s]
    return acc


def _homes(world: World, source: int, ids, active) -> list[int]:
    """The original rank that each of the K + Ns copies of a token of rank ``source`` goes to; -1 for none."""
    routed = [world.home(int(e))[0] if on and e < world.num_experts else -1 for e, on in zip(ids, active, strict=True)]
    logical = world.physical.index(source)
    shared = [world.shared_rank(logical, s) for s in range(world.num_shared)]
    return [world.physical[rank] if rank >= 0 else -1 for rank in (*routed, *shared)]


def _sum_nodes(homes, num_nodes, dtype, recipe, values, weights):
    """The fp32 sum over nodes of what each sends home for one token: its copies' sum, rounded to ``dtype``.

    homes [K + Ns] are nodes, -1 for none; values [K + Ns, H]; weights [K], those of shared experts being 1.
    """
    acc = np.zeros(values.shape[-1], _F32)
    for node in range(num_nodes):
        partial = np.zeros(values.shape[-1], _F32)
        for c, home in enumerate(homes):
            if home == node:
                partial = partial + (weights[c] if c < len(weights) else _F32(1.0)) * values[c]
        sent = partial.astype(dtype)
        if recipe is not None:
            sent = dequantize(recipe, *quantize(recipe, sent[None]))[0]
        acc = acc + (sent.astype(_F32) if node in homes else 0)
    return acc


def _special_value(special: _Special, i: int, expert_id: int) -> np.ndarray:
    """What a special expert makes of token ``i`` before weighting, f32 [H], or a scalar zero."""
    if expert_id < special.first_copy or expert_id >= special.end:
        return _F32(0.0)
    x = special.ori_x[i].astype(_F32)
    if expert_id < special.first_const:
        return x
    c = expert_id - special.first_const
    a1, a2, v = (array[c].astype(np.float64) for array in (special.alpha_1, special.alpha_2, special.v))
    if a1.ndim:
        z1, z2 = float(a1 @ x), float(a2 @ x)
        top = max(z1, z2)
        e1, e2 = math.exp(z1 - top), math.exp(z2 - top)
        a1, a2 = e1 / (e1 + e2), e2 / (e1 + e2)
    return _F32(a1) * x + _F32(a2) * v.astype(_F32)


def _special_of(world, special_nums, arrays):
    first_copy, first_const, end = (world.num_experts + n for n in np.cumsum(special_nums))
    names = ("ori_x", "alpha_1", "alpha_2", "v")
    return _Special(first_copy=first_copy, first_const=first_const, end=end, **dict(zip(names, arrays, strict=True)))


def _own_rows(world, expand_x, dispatched, tp_world_size):
    """By (rank, tp rank): the rows [n, H] that go back over the expert-parallel group, and their triples [n, 3]."""
    expand_x = with_tp(expand_x, tp_world_size)
    triples = with_tp(dispatched.assist_info_for_combine, tp_world_size)
    counts = with_tp(dispatched.ep_recv_counts, tp_world_size)
    rows, pairs = {}, {}
    for d, w in enumerate(world.physical):
        received = [int(counts[w, p, world.num_slots(d) * world.size - 1]) for p in range(expand_x.shape[1])]
        for p, n in enumerate(received):
            rows[w, p], pairs[w, p] = expand_x[w, p, :n], triples[w, p, : 3 * n].reshape(n, 3)
            if tp_world_size == 2:  # the peer holds these rows behind its own
                behind = expand_x[w, 1 - p, received[1 - p] :][:n]
                rows[w, p] = (behind.astype(_F32) + rows[w, p].astype(_F32)).astype(expand_x.dtype)
    return rows, pairs


def _travel(world, rows, pairs, shape, recipe):
    """The values [W, P, B, K + Ns, H] f32 that arrive for the pairs of each rank; NaN for pairs that do not exist."""
    num_ranks, num_peers, num_tokens, top_k = shape
    hidden = next(iter(rows.values())).shape[-1]
    values = np.full((num_ranks, num_peers, num_tokens, top_k + world.num_shared, hidden), np.nan, _F32)
    for (w, p), sent in rows.items():
        arrived = sent.astype(_F32) if recipe is None else dequantize(recipe, *quantize(recipe, sent))
        source, token, k = pairs[w, p].T
        values[np.asarray(world.physical)[source], p, token, k] = arrived
    return values


def _row_weights(world, dispatched, shape, pairs, tp_world_size):
    """The weight of every pair as it came with its row, [W, P, B, K] f32."""
    weights, expand_scales = np.zeros(shape, _F32), with_tp(dispatched.expand_scales, tp_world_size)
    for (w, p), triples in pairs.items():
        source, token, k = triples.T
        routed = k < shape[-1]
        physical = np.asarray(world.physical)[source[routed]]
        weights[physical, p, token[routed], k[routed]] = expand_scales[w, p, : len(triples)][routed]
    return weights


def _recipe(comm_quant_mode, tp_world_size):
    if comm_quant_mode not in COMBINE_RECIPES or (comm_quant_mode and tp_world_size == 2):
        raise errors.InvalidArgumentError(f"{comm_quant_mode=} must be one of 0, 2, 3, 4, and 0 with tp_world_size=2")
    return COMBINE_RECIPES[comm_quant_mode]


def _check_special(special_nums, ori_x, const_arrays):
    _, copy, const = special_nums
    if (copy or const) and ori_x is None:
        raise errors.MissingArgumentError("ori_x is missing: copy and const experts read it")
    if const and any(array is None for array in const_arrays):
        raise errors.MissingArgumentError("const_expert_alpha_1, _alpha_2 and _v are all needed by const experts")
