"""Experts that follow their load while a run trains: what a state holds for that, and whether moving is worth it.

The compiled step keeps a moving average of the load. On the host the loop asks now and then whether another placement
would be so much more even that experts should move; which slots they lie in is data, so that nothing is compiled again.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import moe_jax as moe
from moe_jax.config import BalanceConfig, Config


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Balance:
    """Where the experts of L layers lie, and how loaded they are; all replicated.

    Attributes:
      load: [L, E] f32, the moving average of the pairs that each expert received in a step.
      experts: [L, P] i32, the expert that each slot holds.
      table: [L, E, F] i32, the same as `update_expert` reads it. F has room for all replicas that an expert can have.
    """

    load: jax.Array
    experts: jax.Array
    table: jax.Array

    @classmethod
    def of(
        cls, placement: moe.Placement, load: jax.Array | None, config: Config, replicated: NamedSharding
    ) -> "Balance":
        """The experts of `placement`, on the mesh, and the `load` so far; None: there was none."""
        num_layers, num_slots = placement.physical_to_logical.shape
        num_experts = placement.num_logical_experts
        table = placement.table(1 + num_slots - num_experts)
        load = jnp.zeros((num_layers, num_experts), jnp.float32) if load is None else load
        return cls(*(jax.device_put(array, replicated) for array in (load, placement.physical_to_logical, table)))

    def placement_on_host(self, plan: moe.Plan) -> moe.Placement:
        """The same as `placement`, with the experts as NumPy."""
        return replace(self.placement(plan), physical_to_logical=np.asarray(jax.device_get(self.experts)))

    def placement(self, plan: moe.Plan) -> moe.Placement:
        """The placement as it is now, in a traced program too."""
        return moe.Placement(
            physical_to_logical=self.experts,  # type: ignore[arg-type]
            num_logical_experts=self.table.shape[1],
            num_ranks=plan.ep_size,
        )


@dataclass(frozen=True)
class Better:
    """A placement to move to, and what that changes.

    Attributes:
      placement: for all layers; those in which moving gains too little keep the one they have.
      before, after: the load of the fullest rank over the mean, as the averaged load has it, the mean over layers.
      num_moved: slots of all layers that get another expert.
    """

    placement: moe.Placement
    before: float
    after: float
    num_moved: int

    @property
    def sentence(self) -> str:
        return (
            f"fullest rank {self.before:.2f} -> {self.after:.2f} x mean, {self.num_moved} of "
            f"{self.placement.physical_to_logical.size} slots moved"
        )


def first_placement(config: Config, num_layers: int) -> moe.Placement:
    """Where experts lie before the first step: in their order, or, with replicas, even if all are loaded alike."""
    num_experts = config.moe.num_experts
    if config.num_slots == num_experts:
        slots = np.arange(num_experts, dtype=np.int32)
    else:
        slots = moe.rebalance(np.ones(num_experts), **_sizes(config)).physical_to_logical
    return moe.Placement(
        physical_to_logical=np.tile(slots, (num_layers, 1)),
        num_logical_experts=num_experts,
        num_ranks=config.mesh.ep,
    )


def find_better(config: Config, balance: BalanceConfig, load: np.ndarray, current: moe.Placement) -> Better | None:
    """A better placement for the load [L, E], or None. ``balance`` is the section [balance] of the configuration.

    A layer moves if its fullest rank then has less to do by `balance.threshold` of what it has now. Each layer decides
    for itself, because each has its own price: the slots that move.
    """
    sizes = _sizes(config)
    if balance.max_moved is not None:
        sizes |= {"strategy": "minimal", "current": current, "max_moved": balance.max_moved}
        if not _keeps_to_nodes(current, config.mesh.nodes):  # it was made for another mesh
            sizes["num_nodes"] = 1
    found = moe.rebalance(load, **sizes)
    before, after = (moe.expected_imbalance(load, placement) for placement in (current, found))
    moves = after < before * (1 - balance.threshold)
    if not moves.any():
        return None
    experts = np.where(moves[:, None], found.physical_to_logical, current.physical_to_logical)
    return Better(
        placement=replace(current, physical_to_logical=experts),
        before=float(before.mean()),
        after=float(np.where(moves, after, before).mean()),
        num_moved=int((experts != current.physical_to_logical).sum()),
    )


def _sizes(config: Config) -> dict[str, Any]:
    """What `rebalance` has to know beside the load."""
    return {
        "num_physical_experts": config.num_slots,
        "num_ranks": config.mesh.ep,
        "num_groups": config.router.num_groups,
        "num_nodes": config.mesh.nodes,
    }


def _keeps_to_nodes(placement: moe.Placement, num_nodes: int) -> bool:
    """Whether no expert of a layer has replicas on several nodes."""
    nodes = placement.physical_to_logical.reshape(-1, num_nodes, placement.num_physical_experts // num_nodes)
    held = sum(len(np.unique(node)) for layer in nodes for node in layer)
    return held == len(nodes) * placement.num_logical_experts
