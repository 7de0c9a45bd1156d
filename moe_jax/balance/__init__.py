"""Load balancing: which experts get several replicas, which rank holds which, and how their weights get there.

On the host ``rebalance`` finds a placement, by the ``search``; ``placement`` is what it finds, and makes the tables
that ``update_expert`` reads. ``moves`` are the difference of two placements, which ``migrate`` makes on the mesh, and
``replicas`` keeps them equal in training. ``leaves`` tells which parts of a pytree they are.
"""

from moe_jax.balance.migrate import migrate
from moe_jax.balance.placement import Placement, expected_imbalance
from moe_jax.balance.rebalance import rebalance
from moe_jax.balance.replicas import sum_replica_gradients

__all__ = ["Placement", "expected_imbalance", "migrate", "rebalance", "sum_replica_gradients"]
