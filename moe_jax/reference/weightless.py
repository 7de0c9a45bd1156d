"""Zero, copy and constant experts, pair by pair."""

import dataclasses
import math

import numpy as np

from moe_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WeightlessExperts:
    """How many weightless experts there are of each kind, in the order of their ids, which follow those of routed ones.

    Attributes:
      num_experts: E, the number of routed experts.
      num_zero: how many zero experts there are.
      num_copy: how many copy experts there are.
      num_const: Cc, how many constant experts there are.
      alpha1: [Cc], or [Cc, H] for a softmax gate.
      alpha2: as alpha1.
      v: [Cc, H].
    """

    num_experts: int
    num_zero: int = 0
    num_copy: int = 0
    num_const: int = 0
    alpha1: np.ndarray | None = None
    alpha2: np.ndarray | None = None
    v: np.ndarray | None = None


def weightless_value(x: np.ndarray, expert_id: int, experts: WeightlessExperts) -> np.ndarray:
    """What expert ``expert_id`` makes of one token x [H], before weighting, f64 [H]; zero for routed and unknown ids.

    zero: 0. copy: x. const c: a1 * x + a2 * v[c], with (a1, a2) = (alpha1[c], alpha2[c]) for alphas [Cc] and
    softmax(<alpha1[c], x>, <alpha2[c], x>) for alphas [Cc, H].
    """
    x = np.asarray(x, np.float64)
    first_copy = experts.num_experts + experts.num_zero
    first_const = first_copy + experts.num_copy
    if first_copy <= expert_id < first_const:
        return x
    if not first_const <= expert_id < first_const + experts.num_const:
        return np.zeros(x.shape)
    if experts.alpha1 is None or experts.alpha2 is None or experts.v is None:
        raise errors.MissingArgumentError(
            f"num_const={experts.num_const}, but alpha1, alpha2 or v is None; pass all three"
        )
    c = expert_id - first_const
    a1, a2 = np.asarray(experts.alpha1[c], np.float64), np.asarray(experts.alpha2[c], np.float64)
    if a1.ndim:
        z1, z2 = float(a1 @ x), float(a2 @ x)
        a1 = 1.0 / (1.0 + math.exp(z2 - z1))
        a2 = 1.0 - a1
    return a1 * x + a2 * np.asarray(experts.v[c], np.float64)


def weightless_sum(
    x: np.ndarray, expert_ids: np.ndarray, combine_weights: np.ndarray, experts: WeightlessExperts
) -> np.ndarray:
    """sum over k of weight_tk * weightless_value(x_t, id_tk): what ``combine`` adds to the sum over rows.

    Args:
      x: [..., T, H].
      expert_ids, combine_weights: [..., T, K]; weights of other pairs are not read.

    Returns:
      [..., T, H] f64.
    """
    y = np.zeros(np.shape(x))
    for token in np.ndindex(y.shape[:-1]):
        for e, weight in zip(expert_ids[token], combine_weights[token], strict=True):
            if e >= experts.num_experts:
                y[token] += weight * weightless_value(x[token], e, experts)
    return y
