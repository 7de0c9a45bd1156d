"""Load balancing on the host: which experts get several replicas, and which rank holds which."""

from moe_jax.balance.placement import Placement, expected_imbalance
from moe_jax.balance.rebalance import rebalance

__all__ = ["Placement", "expected_imbalance", "rebalance"]
