"""Who takes part in an exchange, under which number, and which of its pairs are active."""

import dataclasses

import numpy as np

from moe_jax import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The ranks that take part: all of them, or those that ``elastic_info`` leaves. Numbers are of this world.

    Attributes:
      size: W.
      shared_ranks: S: ranks 0 .. S - 1 hold shared experts, the others L routed experts each.
      num_experts: E.
      num_special: ids from E on that stand for zero, copy and const experts.
      num_shared: Ns; 0 without shared ranks.
      num_local: L.
      physical: [W] the original rank behind each logical one.
    """

    size: int
    shared_ranks: int
    num_experts: int
    num_special: int
    num_shared: int
    num_local: int
    physical: tuple[int, ...]

    @property
    def per_shared(self) -> int:
        """P: the ranks that share the tokens of one shared expert."""
        return self.shared_ranks // self.num_shared

    def shared_rank(self, source: int, s: int) -> int:
        """Where the tokens of rank ``source`` meet shared expert ``s``."""
        return source % self.per_shared + s * self.per_shared

    def home(self, expert: int) -> tuple[int, int]:
        """The rank and the local slot of a routed expert."""
        return self.shared_ranks + expert // self.num_local, expert % self.num_local

    def num_slots(self, rank: int) -> int:
        """How many experts a rank holds."""
        return 1 if rank < self.shared_ranks else self.num_local


def make_world(
    num_ranks: int,
    *,
    moe_expert_num: int,
    shared_expert_num: int,
    shared_expert_rank_num: int,
    tp_world_size: int,
    num_special: int,
    elastic_info: np.ndarray | None,
) -> World:
    """The world of ``num_ranks`` original ranks.

    Raises:
      InvalidArgumentError: W - S does not divide E, S is no multiple of Ns, T is unknown or does not fit L, or
        elastic_info contradicts itself.
    """
    holders = num_ranks - shared_expert_rank_num
    _require(shared_expert_rank_num >= 0 and holders > 0, f"{shared_expert_rank_num=} must lie in [0, {num_ranks})")
    _require(moe_expert_num % holders == 0, f"{moe_expert_num=} must be a multiple of W - S = {holders}")
    num_local = moe_expert_num // holders
    _require(tp_world_size in (0, 1, 2), f"{tp_world_size=} must be 0, 1 or 2")
    _require(tp_world_size < 2 or num_local == 1, f"tp_world_size=2 allows one expert per rank, not {num_local}")
    size, shared_ranks, num_experts = num_ranks, shared_expert_rank_num, moe_expert_num
    physical = tuple(range(num_ranks))
    if elastic_info is not None and elastic_info[0] == 1:
        size, shared_ranks, num_experts = (int(v) for v in elastic_info[1:4])
        physical = _survivors(np.asarray(elastic_info), num_ranks, size)
        fits = size > shared_ranks and num_experts == num_local * (size - shared_ranks)
        _require(fits, f"elastic_info has E={num_experts}, W={size}, S={shared_ranks}: L must stay {num_local}")
    if shared_ranks:
        ok = shared_expert_num > 0 and shared_ranks % shared_expert_num == 0
        _require(ok, f"{shared_ranks} shared ranks must be a multiple of {shared_expert_num=}")
    else:
        _require(shared_expert_num in (0, 1), f"{shared_expert_num=} must be 0 or 1 without shared ranks")
    return World(
        size=size,
        shared_ranks=shared_ranks,
        num_experts=num_experts,
        num_special=num_special,
        num_shared=shared_expert_num if shared_ranks else 0,
        num_local=num_local,
        physical=physical,
    )


def active_pairs(expert_ids: np.ndarray, x_active_mask: np.ndarray | None) -> np.ndarray:
    """bool [..., B, K], for ids [..., B, K] and a mask [..., B, K] or [..., B]; of the latter only the trues count."""
    active = np.ones(expert_ids.shape, bool)
    if x_active_mask is None:
        return active
    if x_active_mask.ndim == expert_ids.ndim:
        return active & x_active_mask
    count = x_active_mask.sum(axis=-1, keepdims=True)
    return active & (np.arange(expert_ids.shape[-2]) < count)[..., None]


def with_tp(array: np.ndarray | None, tp_world_size: int) -> np.ndarray | None:
    """[W, P, ...] for an all-ranks array, P = max(T, 1)."""
    return array if array is None or tp_world_size == 2 else np.asarray(array)[:, None]


def without_tp(array: np.ndarray | None, tp_world_size: int) -> np.ndarray | None:
    """The inverse of ``with_tp``."""
    return array if array is None or tp_world_size == 2 else array[:, 0]


def _survivors(elastic_info, num_ranks, size):
    errors.check_shape("elastic_info", elastic_info, (4 + 2 * num_ranks,), "[4 + 2 * W]")
    logical, physical = elastic_info[4 : 4 + num_ranks], elastic_info[4 + num_ranks :]
    for rank in range(num_ranks):
        known = logical[rank] == -1 or (0 <= logical[rank] < size and physical[logical[rank]] == rank)
        _require(known, f"elastic_info: the tables of rank {rank} contradict each other")
    _require((logical >= 0).sum() == size, f"elastic_info names {(logical >= 0).sum()} survivors, but W={size}")
    return tuple(int(rank) for rank in physical[:size])


def _require(condition, text):
    if not condition:
        raise errors.InvalidArgumentError(text)
