"""CANN's dispatch, pair by pair."""

import collections
import dataclasses

import numpy as np

from moe_jax import errors
from oracle.numerics import dispatch_recipe, quantize
from oracle.world import World, active_pairs, make_world, with_tp, without_tp


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DispatchResult:
    """The outputs of all ranks; each array starts with [W], or [W, 2]. P = max(T, 1).

    Attributes:
      expand_x: [A * P, H] like x, i8, or u8 (fp8 codes); [A * P, H / 2] u8 for pairs of fp4 codes.
      dynamic_scales: [A * P] f32, [A * P, ceil(H / 128)] f32 or [A * P, even] u8.
      assist_info_for_combine: [A * 128] i32: (source rank, token, k) of own row j from 3 * j on.
      expert_token_nums: [L] i64.
      ep_recv_counts: [P * L * W] i32, running sums by (expert, source): own, then the peer's.
      tp_recv_counts: [2] i32 by tp rank, for T = 2.
      expand_scales: [A] f32 when expert_scales was given: own routed rows.
      num_rows: [] i64, rows written to expand_x, the peer's included; not an output.
    """

    expand_x: np.ndarray
    dynamic_scales: np.ndarray | None
    assist_info_for_combine: np.ndarray
    expert_token_nums: np.ndarray
    ep_recv_counts: np.ndarray
    tp_recv_counts: np.ndarray | None
    expand_scales: np.ndarray | None
    num_rows: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Own:
    """What one rank received over its expert-parallel group."""

    pairs: np.ndarray  # [n, 3] i64
    slots: np.ndarray  # [L', W'] i64, rows by local expert and source
    values: np.ndarray  # [n, ...]
    scales: np.ndarray | None  # [n, ...]
    weights: np.ndarray | None  # [n] f32


def moe_distribute_dispatch(
    x: np.ndarray,
    expert_ids: np.ndarray,
    *,
    moe_expert_num: int,
    scales: np.ndarray | None = None,
    x_active_mask: np.ndarray | None = None,
    expert_scales: np.ndarray | None = None,
    elastic_info: np.ndarray | None = None,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    y_dtype: str | None = None,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    tp_world_size: int = 0,
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> DispatchResult:
    """Sends a copy of each active token to each of its routed experts and, with shared ranks, to each shared expert.

    Rows stand by local expert, source rank and flat pair index, all ascending; behind them those of the tp peer.
    ``elastic_info`` renumbers: ids, order, counts and triples are of the world that is left; removed ranks give zeros.

    Args:
      x: [B, H] bf16 or fp16; with quant_mode 0 and ``scales``, any dtype that travels as it is.
      expert_ids: [B, K] int in [0, E + zero + copy + const); distinct within a row. Ids from E on send nothing.
      scales: f32 [E or Ns + E, H], smoothing by expert, for modes 1 to 3; mode 1 also takes [1] and [H]. Mode 0: [B] or
        [B, d], and the token's entry travels with it.
      x_active_mask: bool [B], whose number of trues n says that tokens 0 .. n - 1 are active, or [B, K].
      expert_scales: [B, K] f32, asks for expand_scales.
      elastic_info: [4 + 2 * W] i32, one for all ranks: (1, W', S', E', logical by original rank, original by logical
        rank), -1 where there is none; a 0 in front turns it off.
      y_dtype: of expand_x: "int8", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"; None = int8, or x's for mode 0.
      global_bs: W times the largest B of any rank; 0 = B is the same everywhere.
      expert_token_nums_type: 1 = rows by expert; 0 = their inclusive running sums.
      tp_world_size: 0, 1 or 2.
      moe_expert_num, shared_expert_num, shared_expert_rank_num, quant_mode, zero_expert_num, copy_expert_num,
        const_expert_num: as the operator.

    Returns:
      A ``DispatchResult``, with A the largest capacity that any rank needs.

    Raises:
      InvalidArgumentError: arguments contradict each other, or an active id is out of range.

    >>> x = np.array([[[10], [11]], [[20], [21]]], np.float16)  # W = 2, B = 2, H = 1
    >>> d = moe_distribute_dispatch(x, np.array([[[0], [1]], [[1], [0]]]), moe_expert_num=2)
    >>> d.expand_x[..., 0].tolist(), d.ep_recv_counts.tolist()
    ([[10.0, 21.0, 0.0, 0.0], [11.0, 20.0, 0.0, 0.0]], [[1, 2], [1, 2]])
    """
    num_ranks, num_peers, top_k = len(x), max(tp_world_size, 1), np.shape(expert_ids)[-1]
    world = make_world(
        num_ranks,
        moe_expert_num=moe_expert_num,
        shared_expert_num=shared_expert_num,
        shared_expert_rank_num=shared_expert_rank_num,
        tp_world_size=tp_world_size,
        num_special=zero_expert_num + copy_expert_num + const_expert_num,
        elastic_info=elastic_info,
    )
    recipe = dispatch_recipe(quant_mode, y_dtype)
    _check_scales(recipe, x, scales)
    x, ids, scales, mask, weights = (
        with_tp(array, tp_world_size) for array in (x, np.asarray(expert_ids), scales, x_active_mask, expert_scales)
    )
    active = active_pairs(ids, mask)
    capacity = _capacity(num_ranks, x.shape[2], min(world.num_local, top_k), global_bs)
    own = {}
    for p in range(num_peers):
        lanes = [None if array is None else array[:, p] for array in (x, ids, scales, weights)]
        routes = _routes(world, lanes[1], active[:, p])
        for d in range(world.size):
            own[world.physical[d], p] = _receive(world, routes, d, recipe, *lanes)
    result = _write(own, (num_ranks, num_peers), capacity, world.num_local, expert_token_nums_type)
    result["expand_scales"] = None if weights is None else result["expand_scales"]
    result["tp_recv_counts"] = result["tp_recv_counts"] if tp_world_size == 2 else None
    return DispatchResult(**{name: without_tp(array, tp_world_size) for name, array in result.items()})


def _routes(world: World, ids: np.ndarray, active: np.ndarray) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """(source, token, k) of all rows, in their order, by (rank, local expert); numbers are logical. ids [W, B, K]."""
    routes = collections.defaultdict(list)
    _, num_tokens, top_k = ids.shape
    for source in range(world.size):
        rank_ids, rank_active = ids[world.physical[source]], active[world.physical[source]]
        for i in range(num_tokens):
            for k in range(top_k):
                e = int(rank_ids[i, k])
                if rank_active[i, k] and not 0 <= e < world.num_experts + world.num_special:
                    raise errors.InvalidArgumentError(
                        f"expert_ids[{i}, {k}]={e} of rank {source} must lie in "
                        f"[0, {world.num_experts + world.num_special}); mask pairs that do not exist"
                    )
                if rank_active[i, k] and e < world.num_experts:
                    routes[world.home(e)].append((source, i, k))
            for s in range(world.num_shared if rank_active[i].any() else 0):
                routes[world.shared_rank(source, s), 0].append((source, i, top_k + s))
    return routes


def _receive(world, routes, d, recipe, x, ids, scales, weights) -> _Own:
    """The rows of logical rank ``d``, out of the arrays [W, ...] of its tp lane."""
    groups = [routes[d, slot] for slot in range(world.num_slots(d))]
    slots = np.array([np.bincount([source for source, _, _ in group], minlength=world.size) for group in groups])
    pairs = np.array([pair for group in groups for pair in group], np.int64).reshape(-1, 3)
    origin = (np.asarray(world.physical)[pairs[:, 0]], pairs[:, 1])
    values, row_scales, row_weights = x[origin], None, None
    if recipe is None and scales is not None:
        row_scales = scales[origin]
    elif recipe is not None:
        smooth = None if scales is None else _smoothing(world, pairs, origin[0], ids, scales, x.shape[-1])
        values, row_scales = quantize(recipe, values, smooth=smooth)
        row_scales = None if recipe == "int8_static" else row_scales
        if recipe in ("int8", "fp8_e4m3", "fp8_e5m2"):
            row_scales = row_scales[:, 0]
    if weights is not None:
        routed = pairs[:, 2] < ids.shape[-1]
        row_weights = np.where(routed, weights[(*origin, np.where(routed, pairs[:, 2], 0))], 0.0)
    return _Own(pairs=pairs, slots=slots, values=values, scales=row_scales, weights=row_weights)


def _smoothing(world, pairs, sources, ids, scales, hidden):
    """The factors of each row [n, H]: those that the source rank holds for the row's expert."""
    smooth, top_k = np.zeros((len(pairs), hidden), np.float32), ids.shape[-1]
    for j, ((_, i, k), source) in enumerate(zip(pairs, sources, strict=True)):
        expert = k - top_k if k >= top_k else world.num_shared + ids[source, i, k]
        smooth[j] = scales[source] if scales.ndim == 2 else scales[source, expert]
    return smooth


def _write(own: dict, lead: tuple[int, int], capacity: int, num_local: int, nums_type: int) -> dict:
    """The outputs [W, P, ...], zero where nothing arrived."""
    (num_ranks, num_peers), some = lead, next(iter(own.values()))
    rows = (*lead, capacity * num_peers)
    expand_x = np.zeros(rows + some.values.shape[1:], some.values.dtype)
    scales = None if some.scales is None else np.zeros(rows + some.scales.shape[1:], some.scales.dtype)
    triples, expand_scales = np.zeros((*lead, capacity * 128), np.int32), np.zeros((*lead, capacity), np.float32)
    nums, counts = np.zeros((*lead, num_local), np.int64), np.zeros((*lead, num_peers, num_ranks * num_local), np.int32)
    tp_counts, num_rows = np.zeros((*lead, 2), np.int32), np.zeros(lead, np.int64)
    for (w, p), mine in own.items():
        n = len(mine.pairs)
        triples[w, p, : 3 * n] = mine.pairs.reshape(-1)
        if mine.weights is not None:
            expand_scales[w, p, :n] = mine.weights
        for half, q in enumerate([p, 1 - p][:num_peers]):  # own rows first, whatever the tp rank
            part, first = own[w, q], num_rows[w, p]
            stop = first + len(part.pairs)
            expand_x[w, p, first:stop] = part.values
            if scales is not None:
                scales[w, p, first:stop] = part.scales
            counts[w, p, half, : part.slots.size] = np.cumsum(part.slots)
            nums[w, p, : len(part.slots)] += part.slots.sum(axis=1)
            tp_counts[w, p, q] = len(part.pairs)
            num_rows[w, p] = stop
        if nums_type == 0:
            experts = len(mine.slots)
            nums[w, p, :experts] = np.cumsum(nums[w, p, :experts])
    return {
        "expand_x": expand_x,
        "dynamic_scales": scales,
        "assist_info_for_combine": triples,
        "expert_token_nums": nums,
        "ep_recv_counts": counts.reshape(*lead, -1),
        "tp_recv_counts": tp_counts,
        "expand_scales": expand_scales,
        "num_rows": num_rows,
    }


def _capacity(num_ranks, num_tokens, copies, global_bs):
    """A of a rank with routed experts; one with a shared expert, which gets at most every token, needs no more."""
    if global_bs and (global_bs % num_ranks or global_bs < num_ranks * num_tokens):
        raise errors.InvalidArgumentError(f"{global_bs=} must be 0, or a multiple of W={num_ranks} and at least W * B")
    most = global_bs // num_ranks if global_bs else num_tokens
    return most * num_ranks * copies


def _check_scales(recipe, x, scales):
    if scales is not None and recipe is None and x.dtype.name in ("float16", "bfloat16"):
        raise errors.InvalidArgumentError(f"scales was given, but quant_mode=0 sends {x.dtype} rows as they are")
    if scales is not None and recipe is not None and recipe.startswith("mx"):
        raise errors.InvalidArgumentError(f"scales was given, but {recipe!r} takes none")
    if scales is None and recipe == "int8_static":
        raise errors.MissingArgumentError("scales is missing: quant_mode=1 multiplies by it")
