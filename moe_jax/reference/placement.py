"""From logical experts to physical instances, pair by pair."""

import math

import numpy as np

from moe_jax import errors


def update_expert(
    expert_ids: np.ndarray,
    table: np.ndarray,
    *,
    rank: int,
    ep_size: int,
    balance: str = "rank",
    shares: np.ndarray | None = None,
    combine_weights: np.ndarray | None = None,
    pruning_threshold: np.ndarray | None = None,
    token_mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The instance of every pair, and which pairs survive pruning.

    Args:
      expert_ids: [T, K] int, -1 = none.
      table: [E, F] int; row e is [n_e, n_e instances, padding].
      rank, ep_size: this rank and how many there are; not read with ``balance="token"``.
      balance: "rank", "token" or "load".
      shares: [E, F - 1] f32, read with ``balance="load"`` only; None: equal ones.
      combine_weights: [T, K] float; given exactly when ``pruning_threshold`` is.
      pruning_threshold: [K] or [1, K] f32.
      token_mask: [T] bool, False = inactive; None = all active. Read with pruning, and with ``balance="load"``, where
        pairs that are inactive or pruned do not count and go to the first instance.

    Returns:
      (ids, mask): [T, K] of the dtype of ``expert_ids``, with -1 kept and -2 where there is no instance; and
      [T, K] bool, or None without ``pruning_threshold``.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> table = np.array([[1, 4, 0], [2, 0, 3]])
    >>> reference.update_expert(np.array([[1], [1]]), table, rank=1, ep_size=2)[0].tolist()
    [[3], [3]]
    """
    errors.check_choice("balance", balance, ("rank", "token", "load"))
    mask = _kept(expert_ids.shape, combine_weights, pruning_threshold, token_mask)
    counted = np.ones(expert_ids.shape, bool)
    if mask is not None:
        counted = mask
    elif token_mask is not None:
        counted = np.repeat(token_mask[:, None], expert_ids.shape[1], axis=1)
    ids = np.empty_like(expert_ids)
    for t, k in np.ndindex(*expert_ids.shape):
        expert = int(expert_ids[t, k])
        ids[t, k], instances = (-1 if expert == -1 else -2), _instances(expert, table)
        if not instances:
            continue
        if balance == "token":
            ids[t, k] = instances[t % len(instances)]
        elif balance == "rank":
            ids[t, k] = instances[rank // -(-ep_size // len(instances))]
        elif not counted[t, k]:
            ids[t, k] = instances[0]
        else:
            alike = (expert_ids == expert) & counted
            number = int(alike[:t].sum() + alike[t, :k].sum())
            weights = _weights(None if shares is None else shares[expert], len(instances))
            ids[t, k] = instances[_place(number, int(alike.sum()), weights, _turn(rank + expert, ep_size), ep_size)]
    return ids, None if pruning_threshold is None else mask


def _kept(shape, combine_weights, pruning_threshold, token_mask) -> np.ndarray | None:
    if pruning_threshold is None:
        return None
    if combine_weights is None:
        raise errors.MissingArgumentError(
            "combine_weights is None, but pruning_threshold was given; pass both or neither"
        )
    mask = np.zeros(shape, bool)
    for t, k in np.ndindex(*shape):
        active = token_mask is None or bool(token_mask[t])
        total = np.float32(0.0)
        for weight in combine_weights[t]:
            total = np.float32(total + np.float32(weight))
        least = np.float32(np.ravel(pruning_threshold)[k] * total)
        mask[t, k] = active and bool(np.float32(combine_weights[t, k]) >= least)
    return mask


def _instances(expert: int, table: np.ndarray) -> list[int]:
    """The instances of an expert; none if the id or its row is not a legal one."""
    if not 0 <= expert < len(table):
        return []
    num_instances, *instances = table[expert].tolist()
    return instances[:num_instances] if 1 <= num_instances <= len(instances) else []


def _weights(shares: np.ndarray | None, num_instances: int) -> list[int]:
    """Whole numbers in proportion to the shares."""
    if shares is None:
        return [1] * num_instances
    weights = [round(min(float(s), 1.0) * 2**15) if s > 0 else 0 for s in shares[:num_instances]]
    return weights if any(weights) else [1] * num_instances


def _turn(place: int, size: int) -> int:
    """m, where the phase is (m + 1/2) / size: a walk around the circle in steps that keep neighbours far apart."""

    def quotients(step: int, size: int) -> int:
        return 0 if step == 0 else size // step + quotients(size % step, step)

    coprime = [step for step in range(1, size + 1) if math.gcd(step, size) == 1]
    return place * min(coprime, key=lambda step: (quotients(step, size), step)) % size


def _place(number: int, count: int, weights: list[int], turn: int, size: int) -> int:
    """The last place that begins, at the share B / W, at or before the point (number + (turn + 1/2) / size) / count."""
    before = [sum(weights[:place]) for place in range(len(weights))]
    reached = (2 * number * size + 2 * turn + 1) * sum(weights)  # times 2 * size * count, on both sides
    return max(place for place, share in enumerate(before) if 2 * size * count * share <= reached)
