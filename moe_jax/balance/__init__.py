"""Load balancing: which experts get several replicas, which rank holds which, and how their weights get there.

On the host ``strategies`` has ``rebalance``, which finds a placement by the ``search``; ``placement`` is what it finds,
and makes the tables that ``update_expert`` reads; ``shares`` says how replicas that stay where they are best share a
load. ``moves`` are the difference of two placements, which ``migration`` makes on the mesh, and ``replicas`` keeps the
replicas of an expert equal in training. ``leaves`` tells which parts of a pytree belong to experts.
"""

from moe_jax.balance.migration import migrate
from moe_jax.balance.placement import Placement, expected_imbalance
from moe_jax.balance.replicas import sum_replica_gradients
from moe_jax.balance.strategies import rebalance

__all__ = ["Placement", "expected_imbalance", "migrate", "rebalance", "sum_replica_gradients"]
