"""Load balancing on the host: which experts get several replicas, and which rank holds which.

``rebalance`` finds a placement, by the ``search``; ``placement`` is what it finds, and makes the tables that
``update_expert`` reads.
"""

from moe_jax.balance.placement import Placement, expected_imbalance
from moe_jax.balance.rebalance import rebalance

__all__ = ["Placement", "expected_imbalance", "rebalance"]
