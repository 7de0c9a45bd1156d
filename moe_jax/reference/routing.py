"""The router, token by token: scores, grouped top-k, combine weights, losses, and their hand-derived gradients.

``router`` is anything with the attributes ``score`` ("softmax", "sigmoid" or "sqrt_softplus"), ``topk_first``,
``renormalize``, ``scale``, ``num_groups``, ``top_groups``, ``selection_bias`` and ``group_score`` ("auto", "max" or
"top2").

Sources: Switch Transformer (arXiv 2101.03961) eq. 4-6 for the balance loss, ST-MoE (arXiv 2202.08906) eq. 5 for the
z loss, DeepSeek-V3 (arXiv 2412.19437) section 2.1.2 for sigmoid scores, groups and the selection bias.
"""

import dataclasses
from typing import Any

import numpy as np

from moe_jax import errors
from moe_jax.reference import elementwise as ew

_SCORES = {
    "softmax": (ew.softmax, ew.softmax_vjp),
    "sigmoid": (ew.sigmoid, lambda ct, x: ct * ew.sigmoid_grad(x)),
    "sqrt_softplus": (ew.sqrt_softplus, lambda ct, x: ct * ew.sqrt_softplus_grad(x)),
}
# The logarithms of the scores and their derivatives. Shares of a sum are taken between these, as scores may vanish; the
# constant that the logarithm of a softmax lacks drops out.
_LOG_SCORES = {
    "softmax": (lambda x: x, np.ones_like),
    "sigmoid": (lambda x: -np.logaddexp(0.0, -x), lambda x: ew.sigmoid(-x)),
    "sqrt_softplus": (lambda x: 0.5 * _log_softplus(x), lambda x: 0.5 * _log_softplus_grad(x)),
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Where each token goes and with which weight.

    Attributes:
      expert_ids: [N, K] i64, best first; -1 in every slot of an inactive token.
      combine_weights: [N, K] f64; 0 for an inactive token.
      losses: "balance" and "z", over active tokens; 0 when there are none.
      load: [E] i64, assignments per expert.
    """

    expert_ids: np.ndarray
    combine_weights: np.ndarray
    losses: dict[str, float]
    load: np.ndarray


def route(
    logits: np.ndarray, router: Any, *, top_k: int, bias: np.ndarray | None = None, token_mask: np.ndarray | None = None
) -> Routing:
    """Picks ``top_k`` experts per token and weights them.

    Experts come best first; ties go to the lower index. ``bias`` steers the selection only: it enters neither the
    weights nor the losses. The logits of an inactive token are never read.

    Args:
      logits: [N, E] float.
      router: see the module's text.
      top_k: K, at most the number of experts in the kept groups.
      bias: [E] float; given exactly when ``router.selection_bias`` is set.
      token_mask: [N] bool, False = inactive; None = all active.

    Returns:
      A ``Routing``.

    Raises:
      InvalidArgumentError: an option is unknown, or groups and top_k do not fit E.
      MissingArgumentError: ``router.selection_bias`` without ``bias``.

    >>> from types import SimpleNamespace
    >>> router = SimpleNamespace(score="softmax", topk_first=True, renormalize=False, scale=1.0, num_groups=1,
    ...                          top_groups=1, selection_bias=False, group_score="auto")
    >>> routing = route(np.array([[0.0, 2.0, 2.0]]), router, top_k=2)
    >>> routing.expert_ids.tolist(), routing.combine_weights.tolist(), routing.load.tolist()
    ([[1, 2]], [[0.5, 0.5]], [0, 1, 1])
    """
    logits = np.asarray(logits, np.float64)
    num_tokens, num_experts = logits.shape
    _check_router(router, num_experts, top_k, bias)
    active = active_tokens(num_tokens, token_mask)
    expert_ids = np.full((num_tokens, top_k), -1, np.int64)
    combine_weights = np.zeros((num_tokens, top_k))
    for t in active:
        expert_ids[t] = select_experts(logits[t], router, top_k=top_k, bias=bias)
        combine_weights[t] = expert_weights(logits[t], expert_ids[t], router)
    load = np.bincount(expert_ids[active].ravel(), minlength=num_experts)
    losses = {"balance": _balance_loss(logits[active], load, router, top_k), "z": _z_loss(logits[active])}
    return Routing(expert_ids=expert_ids, combine_weights=combine_weights, losses=losses, load=load)


def route_vjp(
    logits: np.ndarray,
    router: Any,
    ct_weights: np.ndarray,
    *,
    top_k: int,
    bias: np.ndarray | None = None,
    token_mask: np.ndarray | None = None,
    ct_balance: float = 0.0,
    ct_z: float = 0.0,
) -> np.ndarray:
    """The cotangent of ``logits`` in ``route``.

    The choice of experts is a constant, and so is the share of assignments f_e in the balance loss.

    Args:
      logits, router, top_k, bias, token_mask: as given to ``route``.
      ct_weights: [N, K], cotangent of ``combine_weights``.
      ct_balance, ct_z: cotangents of the two losses.

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
        ct_logsumexp = ct_z * 2.0 * np.logaddexp.reduce(logits[t]) / len(active)
        ct_logits[t] += _expert_weights_vjp(ct_weights[t], logits[t], routing.expert_ids[t], router)
        ct_logits[t] += _shares_vjp(ct_probabilities, logits[t], router.score)
        ct_logits[t] += ct_logsumexp * ew.softmax(logits[t])
    return ct_logits


def update_selection_bias(bias: np.ndarray, load: np.ndarray, *, rate: float) -> np.ndarray:
    """bias + rate * sign(mean(load) - load): loss-free balancing (arXiv 2408.15664), one step.

    Args:
      bias: [E] float.
      load: [E] int, assignments per expert.
      rate: the step.

    Returns:
      The new bias [E] f64.

    >>> update_selection_bias(np.zeros(3), np.array([5, 3, 1]), rate=0.5).tolist()
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
    selection = logits if router.topk_first else _SCORES[router.score][0](logits)
    if router.selection_bias:
        selection = selection + np.asarray(bias, np.float64)
    return _top(_mask_groups(selection, router), top_k)


def expert_weights(logits: np.ndarray, expert_ids: np.ndarray, router: Any) -> np.ndarray:
    """The combine weights [K] of one token with ``logits`` [E] that goes to ``expert_ids`` [K]."""
    if router.renormalize:
        return _shares(logits[expert_ids], router.score) * router.scale
    score, _ = _SCORES[router.score]
    values = score(logits[expert_ids]) if router.topk_first else score(logits)[expert_ids]
    return values * router.scale


def _shares(logits: np.ndarray, score: str) -> np.ndarray:
    """The scores of ``logits`` divided by their sum; equal shares where no logit is above -inf."""
    if np.all(np.isneginf(logits)):
        return np.full(len(logits), 1.0 / len(logits))
    return ew.softmax(_LOG_SCORES[score][0](logits))


def _shares_vjp(ct: np.ndarray, logits: np.ndarray, score: str) -> np.ndarray:
    log_score, log_score_grad = _LOG_SCORES[score]
    return ew.softmax_vjp(ct, log_score(logits)) * log_score_grad(logits)


def _log_softplus(x: np.ndarray) -> np.ndarray:
    """log(log(1 + exp(x))); below -40 it is x to the last bit."""
    return np.where(x < -40.0, x, np.log(np.logaddexp(0.0, np.maximum(x, -40.0))))


def _log_softplus_grad(x: np.ndarray) -> np.ndarray:
    """sigmoid(x) / softplus(x)."""
    bounded = np.maximum(x, -40.0)
    return np.where(x < -40.0, 1.0, ew.sigmoid(bounded) / np.logaddexp(0.0, bounded))


def _top(values: np.ndarray, count: int) -> np.ndarray:
    # A stable sort of the negated values is what sends ties to the lower index.
    return np.argsort(-values, kind="stable")[:count]


def _mask_groups(selection: np.ndarray, router: Any) -> np.ndarray:
    """``selection`` [E] with -inf for every expert outside the ``top_groups`` best groups."""
    by_group = selection.reshape(router.num_groups, -1)
    group_score = router.group_score
    if group_score == "auto":
        group_score = "top2" if router.selection_bias else "max"
    best = {"max": 1, "top2": 2}[group_score]  # a group of one expert has only that one to add up
    group_values = np.array([np.sort(group)[::-1][:best].sum() for group in by_group])
    masked = np.full_like(by_group, -np.inf)
    kept = _top(group_values, router.top_groups)
    masked[kept] = by_group[kept]
    return masked.ravel()


def _expert_weights_vjp(ct: np.ndarray, logits: np.ndarray, expert_ids: np.ndarray, router: Any) -> np.ndarray:
    ct = ct * router.scale
    _, score_vjp = _SCORES[router.score]
    scattered = np.zeros_like(logits)
    if router.renormalize:
        scattered[expert_ids] = _shares_vjp(ct, logits[expert_ids], router.score)
        return scattered
    if router.topk_first:
        scattered[expert_ids] = score_vjp(ct, logits[expert_ids])
        return scattered
    scattered[expert_ids] = ct
    return score_vjp(scattered, logits)


def _balance_loss(logits: np.ndarray, load: np.ndarray, router: Any, top_k: int) -> float:
    """E * sum_e f_e * P_e over active ``logits`` [n, E]: 1 when both are uniform."""
    num_active, num_experts = logits.shape
    if num_active == 0:
        return 0.0
    share = load / (num_active * top_k)
    mean_probability = sum(_shares(row, router.score) for row in logits) / num_active
    return float(num_experts * (share @ mean_probability))


def _z_loss(logits: np.ndarray) -> float:
    """mean_t logsumexp(logits_t)^2 over active ``logits`` [n, E]."""
    if len(logits) == 0:
        return 0.0
    return float(sum(np.logaddexp.reduce(row) ** 2 for row in logits) / len(logits))


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
