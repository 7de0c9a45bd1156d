"""Routers: which experts each token goes to, with what weight, and how even the load is."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax import _compat, collectives
from moe_jax.config import RouterConfig, router_violations
from moe_jax.derivatives import custom_gradient
from moe_jax.errors import (
    InvalidArgumentError,
    MissingArgumentError,
    check_count,
    check_dtype,
    check_mask,
    check_rank,
    check_shape,
    check_type,
    raise_all,
)
from moe_jax.layout import count_each
from moe_jax.types import Routing

_FLOATS = ("float32", "bfloat16", "float16")
_SMALL = -20.0  # below it softplus(x) = exp(x) up to a relative exp(x) / 2, which fp32 does not hold


def route(
    logits: jax.Array,
    router: RouterConfig,
    *,
    top_k: int,
    bias: jax.Array | None = None,
    expert_scale: jax.Array | None = None,
    token_mask: jax.Array | None = None,
    axis_name: str | Sequence[str] | None = None,
    sequence_length: int | None = None,
) -> Routing:
    """Chooses ``top_k`` distinct experts for every token.

    ``scores = f(logits)`` with f one of softmax, sigmoid, sqrt(softplus). The choice is the top k of ``scores``
    (of ``logits`` with ``router.topk_first``), plus ``bias`` if the router has a selection bias, inside the best
    ``top_groups`` of ``num_groups`` expert groups; ties go to the lower id. The weights are the chosen scores without
    bias (with ``topk_first``: f over the chosen logits), divided by their sum if ``renormalize``, times ``scale``, and
    times ``expert_scale`` of the expert.
    All arithmetic is fp32. The choice has no gradient; the weights and losses have.

    Scores that saturate or vanish in fp32 do not decide. Without a bias the choice compares logits, as scores grow with
    them, and group score "max" compares the best logits. Sums (with a bias; of the best two of a group) are compared as
    fp32 rounds them. Where such sums of scores are equal, the greater logit decides, and between groups the greater sum
    of scores as taken between logarithms, then the greater logits; so saturation does not decide between equal biases
    either, as they are at the start of training. Quotients are taken between logarithms too, and are right for any
    finite logits, in their gradients as well.

    An expert of logit -inf has score 0. Where all logits of a token are -inf, quotients are equal shares (1 / top_k,
    and 1 / E in the balance loss), and the token has no z loss and no gradient. A NaN is chosen before any number, as
    +inf is, so that it can be seen: its weight is NaN, and with it every weight and loss that shares a sum with it.

    Args:
      logits: [T, E] float.
      router: the static recipe.
      top_k: experts per token, 1 <= top_k <= E; inside the kept groups when there are groups.
      bias: [E] f32, added for the choice only; required if, and only if, ``router.selection_bias``.
      expert_scale: [E] float, a factor on the weights of each expert, which has a gradient; None: ones.
      token_mask: [T] bool; tokens that are false get ids of -1 and weights of 0 and do not count.
      axis_name: mesh axes over which the tokens are spread; losses and load are then those of all tokens.
      sequence_length: a divisor of T; the tokens are sequences of so many, one after the other, and the losses have a
        "sequence_balance". None: they have not.

    Returns:
      Routing. ``losses["balance"] = E * sum_e f_e P_e`` (Switch Transformer, eq. 4, over top_k choices: f_e the share
      of choices that fell on e, P_e the mean normalised score; 1.0 when even), ``losses["z"] = mean(logsumexp^2)``
      (ST-MoE, eq. 5). ``losses["sequence_balance"]`` is the mean over the sequences of ``E * sum_e f_e P_e`` with f and
      P of the tokens of one sequence (DeepSeek-V3, eq. 17 to 20 with alpha = 1; f counts the choices that were made,
      with the bias if there is one); a sequence without a token that counts is left out. ``load`` [E] i32 counts
      choices, and ``mean_score`` is P. For losses of several micro-batches see ``balance_loss``.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError: an argument breaks a rule above.
      MeshError: ``axis_name`` is not bound here.

    >>> import jax.numpy as jnp, moe_jax as moe
    >>> moe.route(jnp.array([[0.0, 2.0, 1.0]]), moe.RouterConfig(), top_k=2).expert_ids
    Array([[1, 2]], dtype=int32)
    """
    _check_route(logits, router, top_k, bias, expert_scale, token_mask)
    check_sequences(sequence_length, logits.shape[0])
    axes = () if axis_name is None else _compat.bound_axes(axis_name)
    return choose_experts(logits, router, top_k, bias, expert_scale, token_mask, axes, sequence_length)


def choose_experts(
    logits: jax.Array,
    router: RouterConfig,
    top_k: int,
    bias: jax.Array | None,
    expert_scale: jax.Array | None,
    token_mask: jax.Array | None,
    axes: tuple[str, ...],
    sequence_length: int | None,
) -> Routing:
    """``route`` of arguments that have been checked; ``axes``: the mesh axes over which the tokens are spread.

    The last sequence may be cut off, if its tokens are masked.
    """
    with jax.named_scope("route"):
        logits, score = logits.astype(jnp.float32), SCORES[router.score]
        if token_mask is not None:  # padding may hold anything, and its gradient is zero
            logits = jnp.where(token_mask[:, None], logits, 0.0)
        scores = score.of(logits)
        expert_ids = _choose(*lax.stop_gradient((logits, scores, bias)), router, top_k)
        if router.renormalize:
            weights = _shares(_take_columns(logits, expert_ids), score.log)
        elif router.topk_first:
            weights = score.of(_take_columns(logits, expert_ids))
        else:
            weights = _take_columns(scores, expert_ids)
        weights = weights * router.scale
        if expert_scale is not None:
            weights = weights * _take_columns(expert_scale.astype(jnp.float32) + jnp.zeros_like(logits), expert_ids)
        active = jnp.ones_like(logits[:, 0], dtype=bool) if token_mask is None else token_mask
        expert_ids = jnp.where(active[:, None], expert_ids, -1)
        weights = jnp.where(active[:, None], weights, 0.0)
        losses, load, mean_score = _losses(logits, scores, expert_ids, active, router, axes, sequence_length)
    return Routing(expert_ids=expert_ids, combine_weights=weights, losses=losses, load=load, mean_score=mean_score)


def balance_loss(load: jax.Array, mean_score: jax.Array) -> jax.Array:
    """The balance loss of any tokens, from what ``route`` or a layer says of them: ``E * sum_e f_e P_e``, f32 scalar.

    The loss of a batch is not the mean of those of its micro-batches: with f and P of few tokens each, every one of
    them would have to be even by itself. What is wanted is f and P of the whole batch. Two ways:

    - Where one gradient is taken of all micro-batches, such as through a ``lax.scan`` over them: add the loads, take
      the mean of the mean scores (weighted by tokens, if they have different numbers), and call this function once.
    - Where gradients of micro-batches are accumulated: the loss has no gradient in the load, and for a given load it is
      linear in the mean score. So give every micro-batch the load of the whole batch, from a forward pass before or, as
      an estimate, of the step before, and average the losses: their mean, and the mean of their gradients, are those of
      the batch. (Qiu et al., "Demons in the Detail", 2025, which sums loads over micro-batches and devices.)

    ``losses["sequence_balance"]`` needs nothing of that: it is a mean over sequences.

    Args:
      load: [E] integer or float, choices of each expert; no gradient flows through it.
      mean_score: [E] float, of ``Routing`` or ``LayerStats``.

    Raises:
      ShapeError, DtypeError: an argument is not as above.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> route = jax.jit(lambda logits: moe.route(logits, moe.RouterConfig(), top_k=2))
    >>> batch = jnp.array([[[3.0, 2.0, 0.0], [1.0, 0.0, 0.0]], [[0.0, 1.0, 5.0], [0.0, 0.0, 2.0]]])
    >>> whole, parts = route(batch.reshape(4, 3)), [route(part) for part in batch]
    >>> load = sum(part.load for part in parts)
    >>> mean = sum(moe.balance_loss(load, part.mean_score) for part in parts) / 2
    >>> bool(jnp.allclose(mean, whole.losses["balance"]))
    True
    """
    check_rank("load", load, 1, "[E]")
    check_dtype("load", load, (jnp.integer, jnp.floating))
    check_shape("mean_score", mean_score, load.shape, "[E], as load")
    check_dtype("mean_score", mean_score, (jnp.floating,))
    load = lax.stop_gradient(load.astype(jnp.float32))
    fraction = load / jnp.maximum(jnp.sum(load), 1.0)
    return load.shape[0] * jnp.sum(fraction * mean_score.astype(jnp.float32))


def update_selection_bias(bias: jax.Array, load: jax.Array, *, rate: float) -> jax.Array:
    """One step of balancing without a loss: raises the bias of experts below the mean load, lowers it above.

    ``bias + rate * sign(mean(load) - load)`` (DeepSeek-V3, section 2.1.2).

    Args:
      bias: [E] f32.
      load: [E] integer or float, pairs per expert over all tokens of the step.
      rate: the step, in units of the score; not negative. A number, or a traced scalar.

    Returns:
      The new bias [E] f32, whatever the precision of ``rate``.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError: an argument breaks a rule above.

    >>> import jax.numpy as jnp, moe_jax as moe
    >>> moe.update_selection_bias(jnp.zeros(3), jnp.array([5, 3, 1]), rate=0.5)
    Array([-0.5,  0. ,  0.5], dtype=float32)
    """
    check_rank("bias", bias, 1, "[E]")
    check_dtype("bias", bias, ("float32",), "keep it in fp32: small steps vanish in narrower types")
    check_shape("load", load, bias.shape, "[E], as bias")
    check_dtype("load", load, (jnp.integer, jnp.floating))
    if isinstance(rate, (jax.Array, np.ndarray)):
        check_shape("rate", rate, (), "a scalar")
        check_dtype("rate", rate, (jnp.floating,))
    elif isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= rate < math.inf:
        raise InvalidArgumentError(f"rate={rate!r} must be a number, finite and not below zero")
    load = load.astype(jnp.float32)
    load = load - jnp.min(load)  # sums of differences stay exact for longer, and equal loads stay equal to their mean
    rate = rate if isinstance(rate, (jax.Array, np.ndarray)) else float(rate)
    return bias + jnp.asarray(rate, jnp.float32) * jnp.sign(jnp.mean(load) - load)


def _check_route(logits, router, top_k, bias, expert_scale, token_mask):
    check_rank("logits", logits, 2, "[T, E]")
    check_dtype("logits", logits, _FLOATS)
    check_type("router", router, RouterConfig, "build one with moe_jax.RouterConfig(...)")
    check_count("top_k", top_k)
    num_experts = logits.shape[1]
    raise_all(router_violations(router, num_experts, f"the {num_experts} experts of logits", top_k), "route")
    if router.selection_bias and bias is None:
        raise MissingArgumentError("bias is missing: router.selection_bias is true; pass an fp32 array [E]")
    if bias is not None:
        if not router.selection_bias:
            raise InvalidArgumentError("bias was given but router.selection_bias is false; set it or leave bias out")
        check_shape("bias", bias, (num_experts,), "[E], one per expert")
        check_dtype("bias", bias, (jnp.floating,))
    if expert_scale is not None:
        check_shape("expert_scale", expert_scale, (num_experts,), "[E], one per expert")
        check_dtype("expert_scale", expert_scale, (jnp.floating,))
    if token_mask is not None:
        check_mask("token_mask", token_mask, logits.shape[:1], "[T]")


def check_sequences(sequence_length: int | None, num_tokens: int) -> None:
    """Raises unless ``num_tokens`` are whole sequences of ``sequence_length``, or nothing is said of sequences."""
    if sequence_length is None:
        return
    check_count("sequence_length", sequence_length)
    if num_tokens % sequence_length:
        raise InvalidArgumentError(
            f"sequence_length={sequence_length} does not divide the {num_tokens} tokens; pad the last sequence, and "
            "mask what is padding"
        )


def _choose(
    logits: jax.Array, scores: jax.Array, bias: jax.Array | None, router: RouterConfig, top_k: int
) -> jax.Array:
    """The expert ids [T, K] of every token, best first."""
    selection = logits if router.topk_first else scores
    if bias is not None:
        selection = selection + bias.astype(jnp.float32)
    keys = (selection,)
    if not router.topk_first:  # scores grow with logits, but may be equal in fp32 where logits are not
        keys = (logits,) if bias is None else (selection, logits)
    keys = tuple(map(_comparable, keys))
    if router.top_groups == router.num_groups:
        return _best(keys, top_k)

    # 1. The best groups, in ascending order, so that ties between their experts go to the lower id.
    (num_tokens, num_experts), num_groups = logits.shape, router.num_groups
    size = num_experts // num_groups
    *keys, selection = (array.reshape(num_tokens, num_groups, size) for array in (*keys, selection))
    kept = jnp.sort(_best(_group_keys(keys, selection, router), router.top_groups), axis=-1)
    # 2. The best experts of those groups and of no others, however low they are.
    keys = [jnp.take_along_axis(key, kept[:, :, None], axis=1) for key in keys]
    picks = _best([key.reshape(num_tokens, router.top_groups * size) for key in keys], top_k)
    return jnp.take_along_axis(kept, picks // size, axis=1) * size + picks % size


def _group_keys(keys: Sequence[jax.Array], selection: jax.Array, router: RouterConfig) -> list[jax.Array]:
    """What groups are compared by: keys [T, G], the most important one first.

    ``keys`` and ``selection`` [T, G, E / G] belong to the experts of each group. Where scores are compared, the last of
    ``keys`` is the logits.
    """
    pair = router.resolved_group_score == "top2" and selection.shape[-1] > 1
    best = _best(keys, 2 if pair else 1)  # [T, G, 1 or 2]
    keys = [jnp.take_along_axis(key, best, axis=-1) for key in keys]
    if not pair:
        return [key[..., 0] for key in keys]
    total = _comparable(jnp.sum(jnp.take_along_axis(selection, best, axis=-1), axis=-1))
    if router.topk_first:
        return [total]
    logits = jnp.moveaxis(keys[-1], -1, 0)  # [2, T, G]: the logits of the best experts, and of the second best
    score = SCORES[router.score]
    log_sum = jnp.logaddexp(*score.log(logits))
    if score.log_rest is not None:  # their sum saturates at 2: compare the distance from there as well
        log_sum -= jnp.logaddexp(*score.log_rest(logits))
    return [total, _comparable(log_sum), *logits]


def _comparable(key: jax.Array) -> jax.Array:
    """``key`` with one zero and no NaN: ``top_k`` sorts -0.0 below 0.0, and NaN is equal to nothing."""
    is_minus_zero = lax.bitcast_convert_type(key, jnp.int32) == np.int32(-(2**31))
    return jnp.where(jnp.isnan(key), jnp.inf, jnp.where(is_minus_zero, 0.0, key))


def _best(keys: Sequence[jax.Array], count: int) -> jax.Array:
    """Positions [..., count] of the greatest along the last axis: by the first key, then the next, then the lowest.

    ``keys`` are ``_comparable``. With several keys this takes one round per position: a sort by two keys is 20 times
    slower on CPUs. A round is a single reduction, which reads each key once. To look for the greatest value, and then
    for its place, would compare two computations of one key, which a compiler may round differently.
    """
    if len(keys) == 1:
        return lax.top_k(keys[0], count)[1]
    *leading, num = keys[0].shape
    positions = lax.broadcasted_iota(jnp.int32, keys[0].shape, keys[0].ndim - 1)

    def better(first, second):
        wins, even = jnp.zeros(first[0].shape, bool), jnp.ones(first[0].shape, bool)
        for mine, other in zip(first[:-1], second[:-1], strict=True):
            wins |= even & (mine > other)
            even &= mine == other
        wins |= even & (first[-1] < second[-1])
        return tuple(jnp.where(wins, mine, other) for mine, other in zip(first, second, strict=True))

    chosen = jnp.full((*leading, 0), num, jnp.int32)
    for _ in range(count):
        taken = jnp.any(positions[..., None] == chosen[..., None, :], axis=-1)
        # Those taken come after all others, however low these are.
        operands = [-taken.astype(jnp.int32), *keys, positions]
        lowest = [np.int32(-2), *[np.float32(-np.inf)] * len(keys), np.int32(num)]
        pick = lax.reduce(operands, lowest, better, (keys[0].ndim - 1,))[-1]
        chosen = jnp.concatenate([chosen, pick[..., None]], axis=-1)
    return chosen


class Score(NamedTuple):
    """What the router asks of a score: functions of fp32 logits [..., E].

    Attributes:
      of: the score. It grows with the logit.
      log: its logarithm, up to a term that all experts of a token share. Scores may vanish in fp32 where this does not.
      log_rest: the logarithm of 1 minus the score, for a score that comes so near to 1 that fp32 takes it for 1; None
        for others.
      is_share: whether the scores of a token add up to 1.
    """

    of: Callable[[jax.Array], jax.Array]
    log: Callable[[jax.Array], jax.Array]
    log_rest: Callable[[jax.Array], jax.Array] | None = None
    is_share: bool = False


def _shares(logits: jax.Array, log_score: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Scores divided by their sum on the last axis, also where all vanish in fp32; equal where all logits are -inf."""
    excluded = logits == -jnp.inf  # their derivative would be NaN, so they are kept out of it
    logs = jnp.where(excluded, -jnp.inf, log_score(jnp.where(excluded, 0.0, logits)))
    return jax.nn.softmax(jnp.where(jnp.all(excluded, axis=-1, keepdims=True), 0.0, logs), axis=-1)


@jax.custom_jvp
def _sigmoid(x: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(x)


@_sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    # d_sigmoid(x) = sigmoid(x) * sigmoid(-x)    # [T, E]
    # JAX's own rule, sigmoid(x) * (1 - sigmoid(x)), is 0 from x = 17 on, where 1 - sigmoid(x) rounds to 0.
    (x,), (tangent,) = primals, tangents
    return _sigmoid(x), tangent * _sigmoid(x) * _sigmoid(-x)


def _sqrt_softplus(logits: jax.Array) -> jax.Array:
    # Far below zero softplus(x) is exp(x), and its root exp(x / 2). softplus itself vanishes at half the logit at which
    # exp(x / 2) does, and from there on its root would be 0, where it has no slope.
    small = logits < _SMALL
    root = jnp.sqrt(jax.nn.softplus(jnp.where(small, 0.0, logits)))
    return jnp.where(small, jnp.exp(0.5 * jnp.where(small, logits, 0.0)), root)


def _log_sqrt_softplus(logits: jax.Array) -> jax.Array:
    small = logits < _SMALL
    return 0.5 * jnp.where(small, logits, jnp.log(jax.nn.softplus(jnp.where(small, 0.0, logits))))


SCORES = {
    "softmax": Score(of=lambda x: _shares(x, lambda x: x), log=lambda x: x, is_share=True),
    "sigmoid": Score(of=_sigmoid, log=jax.nn.log_sigmoid, log_rest=lambda x: jax.nn.log_sigmoid(-x)),
    "sqrt_softplus": Score(of=_sqrt_softplus, log=_log_sqrt_softplus),
}


@custom_gradient
def _take_columns(table: jax.Array, columns: jax.Array) -> jax.Array:
    """table [T, E], columns [T, K] distinct in a row -> [T, K].

    It compares every column with every choice: K is small, and neither it nor its gradient gathers or scatters.
    """
    chosen = columns == jnp.arange(table.shape[1], dtype=columns.dtype)[:, None, None]  # [E, T, K]
    return jnp.sum(jnp.where(chosen, table.T[..., None], 0.0), axis=0)


def _take_forward(table, columns):
    return _take_columns(table, columns), (table, columns)


def _take_backward(residuals, ct):
    # d_table[t, e] = ct[t, k] where columns[t, k] = e, else 0    # [T, E]
    table, columns = residuals
    all_columns = jnp.arange(table.shape[1], dtype=columns.dtype)
    total = jnp.zeros_like(table)
    for k in range(columns.shape[1]):
        total += jnp.where(columns[:, k, None] == all_columns, ct[:, k, None], 0.0)
    return total, None


_take_columns.defvjp(_take_forward, _take_backward)


def _losses(
    logits: jax.Array,
    scores: jax.Array,
    expert_ids: jax.Array,
    active: jax.Array,
    router: RouterConfig,
    axes: tuple[str, ...],
    sequence_length: int | None,
) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Losses, load, [E] i32, and mean score, [E], over the active tokens of all ranks along ``axes``."""
    num_experts, top_k = logits.shape[1], expert_ids.shape[1]
    score = SCORES[router.score]
    shares = scores if score.is_share else _shares(logits, score.log)
    load = count_each(expert_ids, num_experts)
    num_active = jnp.sum(active, dtype=jnp.int32)
    share_sum = jnp.sum(jnp.where(active[:, None], shares, 0.0), axis=0)
    normalised = active & jnp.any(logits != -jnp.inf, axis=-1)  # else the sum is empty and has no logarithm
    log_sums = jax.nn.logsumexp(jnp.where(normalised[:, None], logits, 0.0), axis=-1)
    z_sum = jnp.sum(jnp.where(normalised, jnp.square(log_sums), 0.0))
    sums = load, num_active, share_sum, z_sum
    of_sequences = None
    if sequence_length is not None:
        of_sequences = _balance_of_sequences(shares, expert_ids, active, sequence_length)
    if axes:
        sums, of_sequences = collectives.sum_over((sums, of_sequences), axes)
    load, num_active, share_sum, z_sum = sums
    count = jnp.maximum(num_active, 1).astype(jnp.float32)
    fraction = load.astype(jnp.float32) / (count * top_k)
    mean_score = share_sum / count
    losses = {"balance": num_experts * jnp.sum(fraction * mean_score), "z": z_sum / count}
    if of_sequences is not None:
        total, num_sequences = of_sequences
        losses["sequence_balance"] = total / jnp.maximum(num_sequences, 1).astype(jnp.float32)
    return losses, load, mean_score


def _balance_of_sequences(
    shares: jax.Array, expert_ids: jax.Array, active: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """(the sum of the balance losses of all sequences of ``length`` tokens, how many of them have an active token)."""
    num_tokens, num_experts = shares.shape
    # 1. How often each token chose each expert, which is a sum over its choices; -1 is no expert.
    chosen = jnp.zeros_like(shares)
    for k in range(expert_ids.shape[1]):
        chosen += expert_ids[:, k, None] == jnp.arange(num_experts, dtype=expert_ids.dtype)
    # 2. Sums over the tokens of each sequence, [S, E] and [S]. A last one that is cut off is filled up with zeros.
    missing = -num_tokens % length

    def of_sequences(array):
        array = jnp.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1)))
        return jnp.sum(array.reshape(-1, length, *array.shape[1:]), axis=1)

    choices, share_sums = of_sequences(chosen), of_sequences(jnp.where(active[:, None], shares, 0.0))
    sizes = of_sequences(active.astype(jnp.float32))
    # 3. E * sum_e f_e P_e of each, 0 where no token is active.
    some = jnp.maximum(sizes, 1.0)
    losses = num_experts * jnp.sum(choices * share_sums, axis=1) / (expert_ids.shape[1] * jnp.square(some))
    return jnp.sum(losses), jnp.sum(sizes > 0, dtype=jnp.int32)
