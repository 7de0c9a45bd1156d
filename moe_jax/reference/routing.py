"""The router, token by token: scores, grouped top-k, combine weights, losses, and their hand-derived gradients.

``router`` is anything with the attributes ``score`` ("softmax", "sigmoid" or "sqrt_softplus"), ``topk_first``,
``renormalize``, ``scale``, ``num_groups``, ``top_groups``, ``selection_bias`` and ``group_score`` ("auto", "max" or
"top2").

Sources: Switch Transformer (arXiv 2101.03961) eq. 4-6 for the balance loss, ST-MoE (arXiv 2202.08906) eq. 5 for the
z loss, DeepSeek-V3 (arXiv 2412.19437) section 2.1.2 for sigmoid scores, groups and the selection bias.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moe_jax import errors
from moe_jax.reference import elementwise as ew


class _Score(NamedTuple):
    """A score as a function of the logits [E] of one token, with all that is derived from it.

    Attributes:
      of: logits -> scores.
      vjp: (cotangent of the scores, logits) -> cotangent of the logits.
      log, log_grad: the logarithm of the score, and its derivative. Shares of a sum are computed from logarithms, since
        scores may vanish. For a softmax ``log`` leaves out a constant, which drops out of shares.
      rest, log_rest: 1 minus the score, and the logarithm of that, for scores that come so near to 1 that float64
        rounds them to 1; None for other scores.
    """

    of: Callable[[np.ndarray], np.ndarray]
    vjp: Callable[[np.ndarray, np.ndarray], np.ndarray]
    log: Callable[[np.ndarray], np.ndarray]
    log_grad: Callable[[np.ndarray], np.ndarray]
    rest: Callable[[np.ndarray], np.ndarray] | None = None
    log_rest: Callable[[np.ndarray], np.ndarray] | None = None


_SCORES = {
    "softmax": _Score(
        of=lambda x: _shares(x, "softmax"),
        vjp=lambda ct, x: _shares_vjp(ct, x, "softmax"),
        log=lambda x: x,
        log_grad=np.ones_like,
    ),
    "sigmoid": _Score(
        of=ew.sigmoid,
        vjp=lambda ct, x: ct * ew.sigmoid_grad(x),
        log=lambda x: -np.logaddexp(0.0, -x),
        log_grad=lambda x: ew.sigmoid(-x),
        rest=lambda x: ew.sigmoid(-x),
        log_rest=lambda x: -np.logaddexp(0.0, x),
    ),
    "sqrt_softplus": _Score(
        of=ew.sqrt_softplus,
        vjp=lambda ct, x: ct * ew.sqrt_softplus_grad(x),
        log=lambda x: 0.5 * _log_softplus(x),
        log_grad=lambda x: 0.5 * _log_softplus_grad(x),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Where each token goes and with which weight.

    Attributes:
      expert_ids: [N, K] i64, best first; -1 in every slot of an inactive token.
      combine_weights: [N, K] f64; 0 for an inactive token.
      losses: "balance" and "z", over active tokens, and "sequence_balance" where ``sequence_length`` was given; 0 where
        no token is active.
      load: [E] i64, assignments per expert.
      mean_score: [E] f64, the mean over active tokens of their scores, where the scores of each token are first divided
        by their sum; None where no router made the choices.
    """

    expert_ids: np.ndarray
    combine_weights: np.ndarray
    losses: dict[str, float]
    load: np.ndarray
    mean_score: np.ndarray | None = None


def route(
    logits: np.ndarray,
    router: Any,
    *,
    top_k: int,
    bias: np.ndarray | None = None,
    expert_scale: np.ndarray | None = None,
    token_mask: np.ndarray | None = None,
    sequence_length: int | None = None,
) -> Routing:
    """Chooses ``top_k`` experts per token, and says what each of them weighs.

    Experts come best first; ties go to the lower index. ``bias`` steers the selection only: it enters neither the
    weights nor the losses. The logits of an inactive token are never read. A token whose logits are all -inf has equal
    shares, and neither a z loss nor a gradient. A NaN is chosen as +inf would be.

    A choice never depends on rounding: a score that saturates or vanishes in float64 does not decide. Experts are
    compared as follows.

    1. Scores grow with logits. So where nothing is added to a score, the logits themselves are compared.
    2. Where something is added (the bias to a score; the best two scores of a group to each other), the sums are
       compared with twice the digits of a float64. A score near 1 enters them as 1 minus its distance from 1.
    3. Where such sums are equal even so, the expert with the greater logit wins. Between groups the logarithm of the
       sum of the scores decides first, and then the greater logits.

    Args:
      logits: [N, E] float.
      router: see the module's text.
      top_k: K, at most the number of experts in the groups that take part.
      bias: [E] float; given exactly when ``router.selection_bias`` is set.
      expert_scale: [E] float, a factor on the final weights of each expert; None: ones.
      token_mask: [N] bool, False = inactive; None = all active.
      sequence_length: how many tokens a sequence has. The loss "sequence_balance" is the mean of the balance losses of
        all sequences that have an active token (DeepSeek-V3, eq. 17-20, with alpha = 1).

    Returns:
      A ``Routing``.

    Raises:
      InvalidArgumentError: an option is unknown, or groups and top_k do not fit E.
      MissingArgumentError: ``router.selection_bias`` without ``bias``.

    >>> import numpy as np, moe_jax as moe
    >>> router = moe.RouterConfig(score="softmax", topk_first=True, renormalize=False)
    >>> routing = moe.reference.route(np.array([[0.0, 2.0, 2.0]]), router, top_k=2)
    >>> routing.expert_ids.tolist(), routing.combine_weights.tolist(), routing.load.tolist()
    ([[1, 2]], [[0.5, 0.5]], [0, 1, 1])
    """
    logits = np.asarray(logits, np.float64)
    num_tokens, num_experts = logits.shape
    _check_router(router, num_experts, top_k, bias)
    active = active_tokens(num_tokens, token_mask)
    expert_ids = np.full((num_tokens, top_k), -1, np.int64)
    combine_weights = np.zeros((num_tokens, top_k))
    # 1. The choices of every active token, and their weights.
    for t in active:
        expert_ids[t] = select_experts(logits[t], router, top_k=top_k, bias=bias)
        combine_weights[t] = expert_weights(logits[t], expert_ids[t], router)
        if expert_scale is not None:
            combine_weights[t] *= np.asarray(expert_scale, np.float64)[expert_ids[t]]
    # 2. The losses, from how often each expert was chosen and what scores it got.
    load = np.bincount(expert_ids[active].ravel(), minlength=num_experts)
    mean_score = _mean_score(logits[active], router)
    losses = {"balance": balance_loss(load, mean_score), "z": _z_loss(logits[active])}
    if sequence_length is not None:
        parts = _sequences(active, num_tokens, sequence_length)
        found = [
            balance_loss(
                np.bincount(expert_ids[part].ravel(), minlength=num_experts), _mean_score(logits[part], router)
            )
            for part in parts
        ]
        losses["sequence_balance"] = float(np.mean(found)) if found else 0.0
    return Routing(
        expert_ids=expert_ids, combine_weights=combine_weights, losses=losses, load=load, mean_score=mean_score
    )


def balance_loss(load: np.ndarray, mean_score: np.ndarray) -> float:
    """E * sum_e f_e * P_e: 1 when both are uniform.

    Args:
      load: [E], assignments per expert; f is load divided by its sum.
      mean_score: [E], P.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> reference.balance_loss(np.array([2, 0]), np.array([0.75, 0.25]))
    1.5
    """
    return float(len(load) * np.asarray(load, np.float64) @ mean_score / max(np.sum(load), 1))


def _sequences(active: np.ndarray, num_tokens: int, length: int) -> list[np.ndarray]:
    """The indices of the active tokens of each sequence that has some."""
    parts = [active[active // length == s] for s in range(num_tokens // length)]
    return [part for part in parts if len(part)]


def route_vjp(
    logits: np.ndarray,
    router: Any,
    ct_weights: np.ndarray,
    *,
    top_k: int,
    bias: np.ndarray | None = None,
    expert_scale: np.ndarray | None = None,
    token_mask: np.ndarray | None = None,
    ct_balance: float = 0.0,
    ct_z: float = 0.0,
    ct_sequence_balance: float = 0.0,
    sequence_length: int | None = None,
) -> np.ndarray:
    """The cotangent of ``logits`` in ``route``.

    The choice of experts is a constant, and so is the share of assignments f_e in the balance loss.

    Args:
      logits, router, top_k, bias, expert_scale, token_mask: as given to ``route``.
      ct_weights: [N, K], cotangent of ``combine_weights``.
      ct_balance, ct_z, ct_sequence_balance: cotangents of the losses.
      sequence_length: as given to ``route``; needed with ``ct_sequence_balance``.

    Returns:
      ct_logits [N, E] f64; zero for inactive tokens.
    """
    logits = np.asarray(logits, np.float64)
    ct_weights = np.asarray(ct_weights, np.float64)
    num_tokens, num_experts = logits.shape
    routing = route(logits, router, top_k=top_k, bias=bias, token_mask=token_mask)
    active = active_tokens(num_tokens, token_mask)
    ct_logits = np.zeros((num_tokens, num_experts))
    for t in active:
        share = routing.load / (len(active) * top_k)  # f_e
        ct_probabilities = ct_balance * num_experts * share / len(active)
        scale = 1.0 if expert_scale is None else np.asarray(expert_scale, np.float64)[routing.expert_ids[t]]
        ct_logits[t] += _expert_weights_vjp(ct_weights[t] * scale, logits[t], routing.expert_ids[t], router)
        ct_logits[t] += _shares_vjp(ct_probabilities, logits[t], router.score)
        if not _is_empty(logits[t]):
            ct_logits[t] += ct_z * 2.0 * np.logaddexp.reduce(logits[t]) / len(active) * ew.softmax(logits[t])
    parts = [] if sequence_length is None else _sequences(active, num_tokens, sequence_length)
    for part in parts:
        share = np.bincount(routing.expert_ids[part].ravel(), minlength=num_experts) / (len(part) * top_k)
        for t in part:
            ct_probabilities = ct_sequence_balance / len(parts) * num_experts * share / len(part)
            ct_logits[t] += _shares_vjp(ct_probabilities, logits[t], router.score)
    return ct_logits


def expert_scale_vjp(
    logits: np.ndarray,
    router: Any,
    ct_weights: np.ndarray,
    *,
    top_k: int,
    bias: np.ndarray | None = None,
    expert_scale: np.ndarray | None = None,
    token_mask: np.ndarray | None = None,
) -> np.ndarray:
    """The cotangent of ``expert_scale`` in ``route``, [E] f64: sums of ct_weights times the weights before scaling.

    The arguments are those of ``route_vjp``. The values of the scales are not needed, since the weights are linear in
    them.
    """
    routing = route(logits, router, top_k=top_k, bias=bias, token_mask=token_mask)
    ct_scale = np.zeros(len(routing.load))
    for t, k in np.argwhere(routing.expert_ids >= 0):
        ct_scale[routing.expert_ids[t, k]] += ct_weights[t, k] * routing.combine_weights[t, k]
    return ct_scale


def update_selection_bias(bias: np.ndarray, load: np.ndarray, *, rate: float) -> np.ndarray:
    """bias + rate * sign(mean(load) - load): loss-free balancing (arXiv 2408.15664), one step.

    Args:
      bias: [E] float.
      load: [E] int, assignments per expert.
      rate: the step.

    Returns:
      The new bias [E] f64.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> reference.update_selection_bias(np.zeros(3), np.array([5, 3, 1]), rate=0.5).tolist()
    [-0.5, 0.0, 0.5]
    """
    load = np.asarray(load, np.float64)
    return np.asarray(bias, np.float64) + rate * np.sign(load.mean() - load)


def active_tokens(num_tokens: int, token_mask: np.ndarray | None) -> np.ndarray:
    """Indices of the active tokens, ascending; ``token_mask`` is [N] bool or None for all of them."""
    if token_mask is None:
        return np.arange(num_tokens)
    errors.check_shape("token_mask", token_mask, (num_tokens,), "[N]")
    return np.flatnonzero(np.asarray(token_mask, bool))


def select_experts(logits: np.ndarray, router: Any, *, top_k: int, bias: np.ndarray | None = None) -> np.ndarray:
    """The expert ids [K] of one token with ``logits`` [E], best first, ties to the lower index."""
    num_experts = len(logits)
    terms = logits[:, None] if router.topk_first else _split_scores(logits, _SCORES[router.score])
    if router.selection_bias:
        terms = np.concatenate([terms, np.asarray(bias, np.float64)[:, None]], axis=1)
        keys = [(*_exact_sum(terms[e]), *([] if router.topk_first else [logits[e]])) for e in range(num_experts)]
    else:
        keys = [(x,) for x in logits]
    groups = np.arange(num_experts).reshape(router.num_groups, -1)
    if router.top_groups < router.num_groups:
        group_keys = [_group_key(group, keys, terms, logits, router) for group in groups]
        groups = groups[sorted(_top(group_keys, router.top_groups))]
    candidates = groups.ravel()
    return candidates[_top([keys[e] for e in candidates], top_k)]


def expert_weights(logits: np.ndarray, expert_ids: np.ndarray, router: Any) -> np.ndarray:
    """The combine weights [K] of one token with ``logits`` [E] that goes to ``expert_ids`` [K]."""
    if router.renormalize:
        return _shares(logits[expert_ids], router.score) * router.scale
    score = _SCORES[router.score].of
    values = score(logits[expert_ids]) if router.topk_first else score(logits)[expert_ids]
    return values * router.scale


def _shares(logits: np.ndarray, score: str) -> np.ndarray:
    """The scores of ``logits`` divided by their sum; equal shares where no logit is above -inf."""
    if _is_empty(logits):
        return np.full(len(logits), 1.0 / len(logits))
    return ew.softmax(_SCORES[score].log(logits))


def _shares_vjp(ct: np.ndarray, logits: np.ndarray, score: str) -> np.ndarray:
    """The cotangent of ``logits`` in ``_shares``."""
    if _is_empty(logits):
        return np.zeros(len(logits))
    return ew.softmax_vjp(ct, _SCORES[score].log(logits)) * _SCORES[score].log_grad(logits)


def _is_empty(logits: np.ndarray) -> bool:
    """Whether every score of this token is 0."""
    return bool(np.all(np.isneginf(logits)))


def _log_softplus(x: np.ndarray) -> np.ndarray:
    """log(log(1 + exp(x))). Below -40 it equals x to the last bit."""
    return np.where(x < -40.0, x, np.log(np.logaddexp(0.0, np.maximum(x, -40.0))))


def _log_softplus_grad(x: np.ndarray) -> np.ndarray:
    """sigmoid(x) / softplus(x)."""
    bounded = np.maximum(x, -40.0)
    return np.where(x < -40.0, 1.0, ew.sigmoid(bounded) / np.logaddexp(0.0, bounded))


def _split_scores(logits: np.ndarray, score: _Score) -> np.ndarray:
    """[E, 2]: two numbers for each expert, whose sum is its score.

    Where a score lies near 1 they are 1 and minus its distance from 1, so that this distance is not lost; elsewhere
    they are the score and 0.
    """
    value, distance = score.of(logits), np.zeros(len(logits))
    if score.rest is not None:
        near_one = value > 0.5
        value, distance = np.where(near_one, 1.0, value), np.where(near_one, score.rest(logits), 0.0)
    return np.stack([value, -distance], axis=1)


def _exact_sum(terms: np.ndarray) -> tuple[float, float]:
    """The sum of all ``terms`` as two floats: the rounded sum, and what rounding took from it."""
    addends = terms.ravel().tolist()
    if not math.isfinite(sum(addends)):
        return sum(addends), 0.0
    total = math.fsum(addends)
    return total, math.fsum([*addends, -total])


def _group_key(group: np.ndarray, keys: list[tuple], terms: np.ndarray, logits: np.ndarray, router: Any) -> tuple:
    """The key by which a ``group`` [E / G] of experts is compared: that of its best, or of the sum of its best two."""
    group_score = router.group_score
    if group_score == "auto":
        group_score = "top2" if router.selection_bias else "max"
    best = group[_top([keys[e] for e in group], {"max": 1, "top2": 2}[group_score])]
    if len(best) == 1:  # also where a group has one expert alone
        return keys[best[0]]
    total = _exact_sum(terms[best])
    if router.topk_first:
        return total
    score = _SCORES[router.score]
    log_sum = np.logaddexp.reduce(score.log(logits[best]))
    if score.log_rest is not None:  # the sum may also come near 2: then its distance from 2 decides
        log_sum -= np.logaddexp.reduce(score.log_rest(logits[best]))
    return (*total, log_sum, *logits[best])


def _top(keys: list[tuple], count: int) -> list[int]:
    """Positions of the greatest ``keys``. The sort is stable in reverse too, so that ties go to the lower index."""
    order = [tuple(math.inf if math.isnan(x) else x for x in key) for key in keys]
    return sorted(range(len(keys)), key=order.__getitem__, reverse=True)[:count]


def _expert_weights_vjp(ct: np.ndarray, logits: np.ndarray, expert_ids: np.ndarray, router: Any) -> np.ndarray:
    """The cotangent of ``logits`` in ``expert_weights``."""
    ct, score_vjp = ct * router.scale, _SCORES[router.score].vjp
    scattered = np.zeros_like(logits)
    if router.renormalize:
        scattered[expert_ids] = _shares_vjp(ct, logits[expert_ids], router.score)
        return scattered
    if router.topk_first:
        scattered[expert_ids] = score_vjp(ct, logits[expert_ids])
        return scattered
    scattered[expert_ids] = ct
    return score_vjp(scattered, logits)


def _mean_score(logits: np.ndarray, router: Any) -> np.ndarray:
    """P_e over active ``logits`` [n, E]; zeros where there are none."""
    return sum((_shares(row, router.score) for row in logits), np.zeros(logits.shape[1])) / max(len(logits), 1)


def _z_loss(logits: np.ndarray) -> float:
    """mean_t logsumexp(logits_t)^2 over active ``logits`` [n, E]."""
    if len(logits) == 0:
        return 0.0
    return float(sum(np.logaddexp.reduce(row) ** 2 for row in logits if not _is_empty(row)) / len(logits))


def _check_router(router: Any, num_experts: int, top_k: int, bias: np.ndarray | None) -> None:
    errors.check_choice("router.score", router.score, _SCORES)
    errors.check_choice("router.group_score", router.group_score, ("auto", "max", "top2"))
    groups, kept = router.num_groups, router.top_groups
    if groups < 1 or num_experts % groups or not 1 <= kept <= groups:
        raise errors.InvalidArgumentError(
            f"num_groups={groups}, top_groups={kept} with {num_experts} experts: num_groups must divide the number of "
            "experts and top_groups must lie in [1, num_groups]"
        )
    selectable = kept * (num_experts // groups)
    if not 1 <= top_k <= selectable:
        raise errors.InvalidArgumentError(f"top_k={top_k} must lie in [1, {selectable}], the experts in kept groups")
    if router.selection_bias and bias is None:
        raise errors.MissingArgumentError("bias=None, but router.selection_bias is set; pass bias [E]")
    if bias is not None and not router.selection_bias:
        raise errors.InvalidArgumentError("bias was given, but router.selection_bias is not set; set it or drop bias")
    if bias is not None:
        errors.check_shape("bias", bias, (num_experts,), "[E]")
