"""Where the values of a parameter lie in the tensors of a file: index arithmetic on shapes, without any file.

Axes have letters: E experts, F the width of an expert, H hidden, I what the router scores, S the width of the shared
expert, 1 an axis of one. Two projections that a file keeps in one tensor share an axis, "2F" or "2S"; "EF" is one axis
in which the experts lie one after the other.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from moe_jax.parameters import BY_NAME

_LETTERS = {
    "experts": "E",
    "ffn": "F",
    "hidden": "H",
    "expert_hidden": "H",
    "router_hidden": "H",
    "ids": "I",
    "shared_ffn": "S",
    "one": "1",
}

Extents = dict[str, int]  # by letter
Fetch = Callable[[str, tuple[slice, ...]], np.ndarray]  # a part of the tensor of a name


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a file keeps a parameter.

    Attributes:
      name: of the tensor, below the block; "{e}" stands for the number of an expert, where each has a tensor.
      axes: the axes of that tensor, outermost first, such as "E 2F H".
      part: which half of an axis "2F" or "2S" the parameter is.
      interleaved: whether the two take turns on that axis, instead of one after the other.
    """

    name: str
    axes: str
    part: int = 0
    interleaved: bool = False

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.name

    def names(self, extents: Extents) -> list[str]:
        """The tensors that hold the parameter."""
        return [self.name.format(e=e) for e in range(extents["E"])] if self.per_expert else [self.name]

    def shape(self, extents: Extents) -> tuple[int, ...]:
        """The shape of each of them."""
        sizes = extents | {"1": 1, "2F": 2 * extents["F"], "EF": extents["E"] * extents["F"]}
        sizes["2S"] = 2 * extents["S"]
        return tuple(sizes[axis] for axis in self.axes.split())

    def read(self, parameter: str, extents: Extents, index: tuple[slice, ...], fetch: Fetch) -> np.ndarray:
        """The part ``index`` of the parameter, in its own order of axes. No other values are read but their twins."""
        # 1. What is wanted of every axis of the parameter.
        own_axes = axes_of(parameter)
        bounds = {axis: each.indices(extents.get(axis, 1)) for axis, each in zip(own_axes, index, strict=True)}
        wanted = {axis: (start, stop) for axis, (start, stop, _) in bounds.items()}
        # 2. The same of the tensor's axes. Twins that take turns are read together.
        first, last = wanted.get("E", (0, 1))
        separate = self.per_expert or "EF" in self.axes.split()
        parts = [self._cut(e, wanted, extents, fetch) for e in (range(first, last) if separate else [0])]
        values = np.stack(parts) if separate else parts[0]
        # 3. The order of the parameter's axes. An axis of one that only the file has is dropped.
        found = (["E"] if separate else []) + [axis[-1] for axis in self.axes.split()]
        extra = tuple(place for place, axis in enumerate(found) if axis not in own_axes)
        found = [axis for axis in found if axis in own_axes]
        return np.transpose(np.squeeze(values, extra), [found.index(axis) for axis in own_axes])

    def _cut(self, expert: int, wanted: Mapping[str, tuple[int, int]], extents: Extents, fetch: Fetch) -> np.ndarray:
        cuts, turns = [], []
        for axis in self.axes.split():
            start, stop = wanted.get(axis[-1], (0, 1))
            step = 1
            if axis == "EF":
                start, stop = expert * extents["F"] + start, expert * extents["F"] + stop
            elif axis[0] == "2" and self.interleaved:
                start, stop, step = 2 * start, 2 * stop, 2
            elif axis[0] == "2":
                start, stop = self.part * extents[axis[-1]] + start, self.part * extents[axis[-1]] + stop
            cuts.append(slice(start, stop))
            turns.append(slice(self.part if step == 2 else 0, None, step))
        return fetch(self.name.format(e=expert), tuple(cuts))[tuple(turns)]


Layout = dict[str, Stored]  # where each parameter of the layer is


def axes_of(parameter: str) -> list[str]:
    """The letters of the axes of a parameter of the layer."""
    return [_LETTERS[dim] for dim in BY_NAME[parameter].dims]


def tensors_of(layout: Layout, params: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors, by name, that hold ``params`` in ``layout``; the inverse of ``Stored.read``."""
    together: dict[str, list[str]] = {}
    for parameter in params:
        together.setdefault(layout[parameter].name, []).append(parameter)
    for name, named in together.items():
        members = sorted(named, key=lambda member: layout[member].part)
        stored = layout[members[0]]
        for e in range(len(params[members[0]])) if stored.per_expert else [0]:
            halves = [_arranged(layout[each], each, params[each], e) for each in members]
            yield name.format(e=e), _fused(stored, halves)


def _arranged(stored: Stored, parameter: str, values: np.ndarray, expert: int) -> np.ndarray:
    """A parameter, or one expert's part of it, in the order of axes of the file."""
    own_axes = axes_of(parameter)
    if stored.per_expert:
        values, own_axes = values[expert], own_axes[1:]
    asked = stored.axes.replace("EF", "E F").split()
    order = [own_axes.index(axis[-1]) for axis in asked if axis[-1] in own_axes]
    values = np.transpose(values, order)
    if "EF" in stored.axes.split():
        values = values.reshape(-1, *values.shape[2:])
    ones = tuple(place for place, axis in enumerate(asked) if axis not in own_axes and axis == "1")
    return np.ascontiguousarray(np.expand_dims(values, ones))


def _fused(stored: Stored, halves: list[np.ndarray]) -> np.ndarray:
    """Puts two projections into one tensor; what has no twin stays as it is."""
    if len(halves) == 1:
        return halves[0]
    axis = next(place for place, name in enumerate(stored.axes.split()) if name[0] == "2")
    if not stored.interleaved:
        return np.concatenate(halves, axis)
    shape = list(halves[0].shape)
    shape[axis] *= 2
    return np.ascontiguousarray(np.stack(halves, axis + 1).reshape(shape))
