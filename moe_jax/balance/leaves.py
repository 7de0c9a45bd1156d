"""Which leaves of a pytree belong to the slots of experts, and to which layer: the keys on their paths say so."""

import re
from typing import Any

import jax
import numpy as np

from moe_jax.balance.placement import Placement
from moe_jax.parameters import NAMES_OF_EXPERTS


def name_of(what: str, path: tuple[Any, ...]) -> str:
    """The name of a leaf of the argument ``what`` in errors."""
    return f"{what}{jax.tree_util.keystr(path)}"


def missing_of(what: str) -> str:
    """What is wrong with the argument ``what`` if none of its leaves belongs to slots."""
    return f"{what} has no leaf below the name of an expert's parameter ({', '.join(sorted(NAMES_OF_EXPERTS))})"


def _words(path: tuple[Any, ...]) -> list[str]:
    """The keys of a path as text."""
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def _place_of_name(path: tuple[Any, ...]) -> int | None:
    """The place in a path of the key that is the name of an expert's parameter, or of the last such key."""
    return max((i for i, word in enumerate(_words(path)) if word in NAMES_OF_EXPERTS), default=None)


def belongs_to_slots(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf belongs to slots. A single number that an optimiser keeps for a whole parameter does not."""
    return _place_of_name(path) is not None and np.size(leaf) > 1


def layers_of(what: str, paths: dict[int, tuple[Any, ...]], placement: Placement, found: list[str]) -> dict[int, int]:
    """The row of the placement for each leaf that moves; ``found`` gets what is wrong with their numbers."""
    if placement.physical_to_logical.ndim == 1:
        return dict.fromkeys(paths, 0)
    numbers = {}
    for i, path in paths.items():
        words = _words(path)[: _place_of_name(path)]
        ends = [int(end[0]) for word in words if (end := re.search(r"\d+$", word))]
        if ends:
            numbers[i] = ends[-1]
        else:
            found.append(f"{name_of(what, path)} has no number of its layer before its name in its path")
    rows = {number: row for row, number in enumerate(sorted(set(numbers.values())))}
    num_layers = len(placement.physical_to_logical)
    if len(rows) != num_layers:
        found.append(f"{what} has experts of the layers {sorted(rows)}, and the placements are for {num_layers} layers")
    return {i: rows[number] for i, number in numbers.items()}
