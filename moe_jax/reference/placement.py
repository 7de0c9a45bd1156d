"""From logical experts to physical instances, pair by pair."""

import numpy as np

from moe_jax import errors


def update_expert(
    expert_ids: np.ndarray,
    table: np.ndarray,
    *,
    rank: int,
    ep_size: int,
    balance: str = "rank",
    combine_weights: np.ndarray | None = None,
    pruning_threshold: np.ndarray | None = None,
    token_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The instance of every pair, and which pairs survive pruning.

    Args:
      expert_ids: [T, K] int, -1 = none.
      table: [E, F] int; row e is [n_e, n_e instances, padding].
      rank, ep_size: this rank and how many there are; read with ``balance="rank"`` only.
      balance: "rank" or "token".
      combine_weights: [T, K] float; given exactly when ``pruning_threshold`` is.
      pruning_threshold: [K] or [1, K] f32.
      token_mask: [T] bool, False = inactive; None = all active.

    Returns:
      (ids, mask): [T, K] of the dtype of ``expert_ids``, with -1 kept and -2 where there is no instance; and
      [T, K] bool, or None without ``pruning_threshold``.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> table = np.array([[1, 4, 0], [2, 0, 3]])
    >>> reference.update_expert(np.array([[1], [1]]), table, rank=1, ep_size=2)[0].tolist()
    [[3], [3]]
    """
    errors.check_choice("balance", balance, ("rank", "token"))
    ids = np.empty_like(expert_ids)
    for t, k in np.ndindex(*expert_ids.shape):
        ids[t, k] = _instance(int(expert_ids[t, k]), table, t, rank, ep_size, balance)
    if pruning_threshold is None:
        return ids, None
    if combine_weights is None:
        raise errors.MissingArgumentError(
            "combine_weights is None, but pruning_threshold was given; pass both or neither"
        )
    mask = np.zeros(expert_ids.shape, bool)
    for t, k in np.ndindex(*expert_ids.shape):
        active = token_mask is None or bool(token_mask[t])
        total = np.float32(0.0)
        for weight in combine_weights[t]:
            total = np.float32(total + np.float32(weight))
        least = np.float32(np.ravel(pruning_threshold)[k] * total)
        mask[t, k] = active and bool(np.float32(combine_weights[t, k]) >= least)
    return ids, mask


def _instance(expert: int, table: np.ndarray, token: int, rank: int, ep_size: int, balance: str) -> int:
    if expert == -1:
        return -1
    if not 0 <= expert < len(table):
        return -2
    num_instances, *instances = table[expert].tolist()
    if not 1 <= num_instances <= len(instances):
        return -2
    if balance == "token":
        return instances[token % num_instances]
    ranks_per_instance = -(-ep_size // num_instances)
    return instances[rank // ranks_per_instance]
