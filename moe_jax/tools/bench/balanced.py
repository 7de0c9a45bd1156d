"""The layer with replicas of hot experts: what balancing gains on a workload, and what it costs."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax.balance import Placement, expected_imbalance, rebalance, sum_replica_gradients
from moe_jax.balance.placement import over_mean
from moe_jax.config import RouterConfig
from moe_jax.layer.on_mesh import moe_on_mesh
from moe_jax.layer.params import place
from moe_jax.parameters import NAMES_OF_EXPERTS
from moe_jax.plan import Plan, make_plan
from moe_jax.tools.bench.workloads import Data, Workload

Array = jax.Array


class BalancedLayer:
    """The layer of a workload, with one more slot on each rank, experts placed for the load that it has, and shares.

    Attributes:
      placement: which expert each slot holds.
      shares: [E, F - 1] f32, of the load of each expert that its replicas get.
      params: the parameters of the layer, with a row for each slot where they have one for each expert.
      note: how full the fullest rank was and is, in words.
    """

    placement: Placement
    shares: np.ndarray
    params: dict[str, Array]
    note: str

    def __init__(self, workload: Workload, mesh: Mesh, plan: Plan, data: Data, arguments: dict[str, Any]):
        """``plan`` and ``data`` are those of the layer without replicas, made with ``arguments`` of ``make_plan``."""
        experts, ranks = plan.num_experts, plan.ep_size
        load = np.bincount(data.ids.ravel(), minlength=experts)
        self.placement = rebalance(load, num_physical_experts=experts + ranks, num_ranks=ranks)
        self.shares = self.placement.shares(load)
        before = float(over_mean(load.reshape(ranks, -1).sum(1)).max())  # experts lie in their order
        after = float(expected_imbalance(load, self.placement, self.shares))
        self.note = f"{ranks} redundant slots; fullest rank {before:.2f} -> {after:.2f} x mean"
        self._mesh, self._plan = mesh, make_plan(mesh, **{**arguments, "num_experts": experts + ranks})
        slots = self.placement.physical_to_logical
        in_slots = {name: value[slots] if name in NAMES_OF_EXPERTS else value for name, value in data.params.items()}
        self.params = place(in_slots, mesh, self._plan)
        options = {"ffn": workload.ffn, "activation": workload.activation, "num_logical_experts": experts}
        self._apply = moe_on_mesh(mesh, self._plan, RouterConfig(), **options)[1]
        self._table = self.placement.table(self.shares.shape[-1])

    @property
    def first_slots(self) -> np.ndarray:
        """[E] the first slot of each expert."""
        return self.placement.logical_to_physical[:, 0]

    def apply(self, params: dict[str, Array], x: Array) -> tuple[Array, Any]:
        """(params, x [N, H]) -> (y [N, H], stats)."""
        return self._apply(params, x, table=self._table, balance="load", shares=self.shares)

    def sum_gradients(self, with_backward: Callable) -> Callable:
        """``with_backward`` of this layer, with what training needs beside it: every replica gets the sum."""

        def run(params, x, ct):
            results, (d_params, d_x) = with_backward(params, x, ct)
            return results, (sum_replica_gradients(d_params, self.placement, self._mesh, self._plan), d_x)

        return run
