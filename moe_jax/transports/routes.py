"""Which module moves the rows of a handle: by the kind of its maps."""

from typing import NamedTuple

import jax

from moe_jax.transports import all_gather, all_to_all, hierarchy
from moe_jax.types import DispatchHandle, ExchangeMaps, GatherMaps, HierarchyMaps

ROUTES = {ExchangeMaps: all_to_all, GatherMaps: all_gather, HierarchyMaps: hierarchy}


class RowOrder(NamedTuple):
    """Which arrival slot belongs to which row, where the rows were left in their slots; -1 marks "none"."""

    row_slot: jax.Array  # [M] i32
    slot_row: jax.Array  # [P * A] i32


def arrival_order(handle: DispatchHandle) -> RowOrder | None:
    """The order of rows that are left in their arrival slots; None where rows are picked in order straight away."""
    maps = handle.maps
    return None if isinstance(maps, GatherMaps) else RowOrder(maps.row_slot, maps.slot_row)
