"""Experts that follow their load while a run trains: what a state holds for that, and whether moving is worth it.

The compiled step keeps a moving average of the load. On the host the loop looks at it now and then, gives the replicas
of experts other shares, and asks whether another placement would be so much more even that experts should move. Slots
and shares are data, so that nothing is compiled again.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import moe_jax as moe
from moe_jax.balance.strategies import keeps_to_nodes
from moe_jax.config import BalanceConfig, Config


@dataclass(frozen=True)
class Places:
    """Where the experts of L layers lie, on the host.

    Attributes:
      placement: the expert of each slot, [L, P].
      shares: [L, E, F - 1] f32, of the load of each expert that its replicas get; zeros: equal ones.
    """

    placement: moe.Placement
    shares: np.ndarray

    def imbalance(self, load: np.ndarray) -> np.ndarray:
        """[L] the load of the fullest rank over the mean, for the load [L, E] of experts."""
        return moe.expected_imbalance(load, self.placement, self.shares)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Balance:
    """Where the experts of L layers lie, and how loaded they are; all replicated.

    Attributes:
      load: [L, E] f32, the moving average of the pairs that each expert received in a step.
      experts: [L, P] i32, the expert that each slot holds.
      table: [L, E, F] i32, the same as `update_expert` reads it. F has room for all replicas that an expert can have.
      shares: [L, E, F - 1] f32, as in `Places`.
    """

    load: jax.Array
    experts: jax.Array
    table: jax.Array
    shares: jax.Array

    @classmethod
    def of(cls, places: Places, load: jax.Array | None, replicated: NamedSharding) -> "Balance":
        """The same as `places`, on the mesh, and the `load` so far; None: there was none."""
        placement, shares = places.placement, places.shares
        table = placement.table(shares.shape[-1])
        load = jnp.zeros(shares.shape[:-1], jnp.float32) if load is None else load
        arrays = (load, placement.physical_to_logical, table, shares)
        return cls(*(jax.device_put(array, replicated) for array in arrays))

    def placement(self, plan: moe.Plan) -> moe.Placement:
        """The placement as it is now, in a traced program too."""
        return moe.Placement(
            physical_to_logical=self.experts,  # type: ignore[arg-type]
            num_logical_experts=self.table.shape[1],
            num_ranks=plan.ep_size,
        )

    def places(self, plan: moe.Plan, mode: str) -> Places:
        """The same, on the host, as the layer reads it in this `mode`: equal shares unless that is "load"."""
        experts, shares = map(np.asarray, jax.device_get((self.experts, self.shares)))
        shares = shares if mode == "load" else np.zeros_like(shares)
        return Places(replace(self.placement(plan), physical_to_logical=experts), shares)


@dataclass(frozen=True)
class Better:
    """What a look at the load leads to.

    Attributes:
      places: the new ones. Layers in which experts gain too little by moving keep their slots.
      before, after: the load of the fullest rank over the mean, as the averaged load has it, the mean over layers.
      num_moved: slots of all layers that get another expert.
    """

    places: Places
    before: float
    after: float
    num_moved: int

    @property
    def sentence(self) -> str:
        return (
            f"fullest rank {self.before:.2f} -> {self.after:.2f} x mean, {self.num_moved} of "
            f"{self.places.placement.physical_to_logical.size} slots moved"
        )


def first_places(config: Config, num_layers: int) -> Places:
    """Where experts lie before the first step: in their order, or, with replicas, even if all are loaded alike."""
    num_experts = config.moe.num_experts
    if config.num_slots == num_experts:
        slots = np.arange(num_experts, dtype=np.int32)
    else:
        slots = moe.rebalance(np.ones(num_experts), **_sizes(config)).physical_to_logical
    placement = moe.Placement(
        physical_to_logical=np.tile(slots, (num_layers, 1)), num_logical_experts=num_experts, num_ranks=config.mesh.ep
    )
    most_replicas = 1 + config.num_slots - num_experts
    return Places(placement, np.zeros((num_layers, num_experts, most_replicas), np.float32))


def find_better(config: Config, balance: BalanceConfig, load: np.ndarray, now: Places) -> Better:
    """Better places for the load [L, E], as far as there are any. ``balance`` is the section [balance] of `config`.

    A layer moves if its fullest rank then has less to do by `balance.threshold` than with the best shares in the slots
    of now. Each layer decides for itself, because each has its own price: the slots that move.
    """
    sizes, num_nodes = _sizes(config), config.mesh.nodes
    if balance.max_moved is None:
        found = nearest(moe.rebalance(load, **sizes), now.placement, num_nodes)
    else:
        if not keeps_to_nodes(now.placement, sizes["num_groups"], num_nodes):  # it was made for another mesh
            sizes["num_nodes"] = 1
        few = {"strategy": "minimal", "current": now.placement, "max_moved": balance.max_moved}
        found = moe.rebalance(load, **sizes, **few)

    def with_shares(placement: moe.Placement) -> Places:
        most_replicas = now.shares.shape[-1]
        follows = balance.mode == "load"
        return Places(placement, placement.shares(load, most_replicas) if follows else np.zeros_like(now.shares))

    stay, move = with_shares(now.placement), with_shares(found)
    moves = move.imbalance(load) < stay.imbalance(load) * (1 - balance.threshold)
    experts = np.where(moves[:, None], move.placement.physical_to_logical, stay.placement.physical_to_logical)
    shares = np.where(moves[:, None, None], move.shares, stay.shares)
    places = Places(replace(now.placement, physical_to_logical=experts), shares)
    return Better(
        places=places,
        before=float(now.imbalance(load).mean()),
        after=float(places.imbalance(load).mean()),
        num_moved=int((experts != now.placement.physical_to_logical).sum()),
    )


def nearest(placement: moe.Placement, current: moe.Placement, num_nodes: int) -> moe.Placement:
    """As even as `placement`, with its ranks and their slots in such an order that few slots differ from `current`.

    Ranks of a node are alike, and slots of a rank too. Greedy: of all pairs of a rank of `placement` and one of
    `current` that share a node, the one with most experts in common comes first.
    """
    num_ranks = placement.num_ranks
    node = np.arange(num_ranks) * num_nodes // num_ranks
    ordered = []
    for experts, before in zip(placement.physical_to_logical, current.physical_to_logical, strict=True):
        new, old = experts.reshape(num_ranks, -1), before.reshape(num_ranks, -1)
        held = [(rows[:, :, None] == np.arange(placement.num_logical_experts)).sum(1) for rows in (new, old)]  # [R, E]
        common = np.where(node[:, None] == node, np.minimum(held[0][:, None], held[1]).sum(-1), -1)
        rows = np.empty_like(new)
        for _ in range(num_ranks):
            rank, place = np.unravel_index(common.argmax(), common.shape)
            rows[place] = _in_slots_of(new[rank], old[place])
            common[rank], common[:, place] = -2, -2
        ordered.append(rows.ravel())
    return replace(placement, physical_to_logical=np.stack(ordered))


def _in_slots_of(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """The experts `new` of a rank in such an order that those which are in `old` too keep their slots."""
    left, row = new.tolist(), np.full_like(new, -1)
    for slot, expert in enumerate(old.tolist()):
        if expert in left:
            left.remove(expert)
            row[slot] = expert
    row[row < 0] = left
    return row


def _sizes(config: Config) -> dict[str, Any]:
    """What `rebalance` has to know beside the load. The router's groups may hold experts without weights too."""
    num_experts, per_group = config.moe.num_experts, config.moe.num_ids // config.router.num_groups
    return {
        "num_physical_experts": config.num_slots,
        "num_ranks": config.mesh.ep,
        "num_groups": 1 if num_experts % per_group else num_experts // per_group,
        "num_nodes": config.mesh.nodes,
    }
