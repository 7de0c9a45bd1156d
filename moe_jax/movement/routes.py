"""Which module moves the rows of a handle: by the kind of its maps."""

from moe_jax.movement import exchange, gather, hierarchy
from moe_jax.types import ExchangeMaps, GatherMaps, HierarchyMaps

ROUTES = {ExchangeMaps: exchange, GatherMaps: gather, HierarchyMaps: hierarchy}
