"""What a machine is: the rates, sizes and links of one of its devices, each with its source, and their rules."""

import dataclasses
import math
from typing import Any

from moe_jax.errors import choice_violations, count_violations, raise_all

PLATFORMS = ("cpu", "gpu", "tpu", "npu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What one device sends over one kind of link, one way.

    Attributes:
      bytes_per_second: what an exchange of many bytes reaches.
      latency: seconds that one exchange takes however few bytes it moves.
    """

    bytes_per_second: float
    latency: float

    def __post_init__(self) -> None:
        raise_all(figure_violations(self), "Link")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Torus:
    """A network without switches, in which bytes for a distant device pass through the devices between.

    Attributes:
      dimensions: in how many dimensions the chips stand; each has a link to both neighbours in every dimension.
      wraps_from: from so many chips along a dimension on, the last one is linked to the first.
      devices_per_chip: devices that share the links of a chip.
    """

    dimensions: int
    wraps_from: int
    devices_per_chip: int = 1

    def __post_init__(self) -> None:
        raise_all(figure_violations(self), "Torus")

    def all_to_all_share(self, num_devices: int) -> float:
        """The share of a device's links that carries its own rows in an all-to-all among so many neighbouring devices.

        The longest side of the chips, n of them, is what limits: half of all bytes must pass its middle. A ring has two
        links there for every line of chips and carries 4 / (n * dimensions) of what a chip's links carry together; a
        line without the link that closes it carries half of that. A device's bytes for itself do not travel.
        """
        chips = math.ceil(num_devices / self.devices_per_chip)
        if num_devices < 2 or chips < 2:
            return 1.0
        side = max(_sides(chips, self.dimensions))
        passes = 4 if side >= self.wraps_from else 2
        return min(1.0, passes / (side * self.dimensions) * (chips - 1) / chips)

    def gather_share(self, num_devices: int) -> float:
        """The share of a device's links that it can use where so many neighbouring devices gather or sum.

        The chip at a corner of the box limits all others: in a dimension that is no ring it has a neighbour on one side
        only, and none where the box is one chip thick.
        """
        chips = math.ceil(num_devices / self.devices_per_chip)
        if chips < 2:
            return 1.0
        sides = _sides(chips, self.dimensions)
        return sum((side > 1) + (side >= self.wraps_from) for side in sides) / (2 * self.dimensions)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """The devices of one kind and the links between them. All figures are of one device, as JAX counts devices.

    Attributes:
      name: what it is called, as in ``hardware="h100"``.
      platform: "cpu", "gpu", "tpu" or "npu".
      kinds: what ``jax.Device.device_kind`` of such a device begins with; of all machines the longest that fits counts.
      flops16: flops per second in dense products of 16-bit numbers.
      flops32: flops per second in products of fp32 numbers.
      flops8: flops per second in dense products of 8-bit numbers, fp8 or int8; None where it has none or none is known.
      memory_bytes: bytes of the main memory that programs may use.
      memory_bandwidth: bytes per second to and from the main memory.
      inside: the link between devices of one node.
      between: the link between nodes; None where all devices are inside.
      devices_per_node: devices of a node; None where all devices are inside.
      torus: how the links inside are laid out, where they have no switch; None where any device reaches any other at
        the full rate.
      launch_seconds: what starting one kernel or step costs.
      relayout_passes: how often the rows are read and written at each end of a ragged exchange, beside the exchange
        itself.
      ragged_share: the share of the rate of the link ``inside`` that a native ragged exchange reaches.
      widened: dtypes that a sum over ranks turns into fp32 first.
      sources: pairs of texts: names of fields, joined by ", ", and where their figures come from. "inside.latency"
        names a figure of a link. A figure that is assumed has a source that says so.
    """

    name: str
    platform: str
    kinds: tuple[str, ...] = ()
    flops16: float
    flops32: float
    flops8: float | None = None
    memory_bytes: int
    memory_bandwidth: float
    inside: Link
    between: Link | None = None
    devices_per_node: int | None = None
    torus: Torus | None = None
    launch_seconds: float
    relayout_passes: float = 0.0
    ragged_share: float = 1.0
    widened: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self) -> None:
        raise_all(figure_violations(self), f"Machine {self.name!r}")

    def source_of(self, figure: str) -> str:
        """Where a figure comes from, such as "flops16" or "between.latency"; empty where ``sources`` do not say."""
        said = {name: text for names, text in self.sources for name in names.split(", ")}
        return said.get(figure, said.get(figure.partition(".")[0], ""))

    def all_to_all_share(self, num_devices: int) -> float:
        """The share of the link ``inside`` that an all-to-all among so many neighbouring devices reaches."""
        return self.torus.all_to_all_share(num_devices) if self.torus else 1.0

    def gather_share(self, num_devices: int) -> float:
        """The share of the link ``inside`` that a gather or a sum over so many neighbouring devices reaches."""
        return self.torus.gather_share(num_devices) if self.torus else 1.0


# What a figure must be, by its name. All figures that are not listed are rates, and above zero.
_TEXTS = ("name",)
_TUPLES = ("kinds", "widened", "sources")
_COUNTS = ("memory_bytes", "devices_per_node", "dimensions", "wraps_from", "devices_per_chip")
_MAY_BE_ZERO = ("latency", "launch_seconds", "relayout_passes")
PARTS = {"inside": Link, "between": Link, "torus": Torus}
MAY_BE_NONE = ("flops8", "between", "devices_per_node", "torus")


def figure_violations(part: Any) -> list[str]:
    """The rules that the figures of a Machine, Link or Torus break, each by itself or together with others."""
    given = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    found = [text for name, value in given.items() for text in value_violations(name, value)]
    if isinstance(part, Machine):
        found += _relation_violations(part)
    return found


def value_violations(name: str, value: Any) -> list[str]:
    """The rules that one figure of a Machine, Link or Torus breaks."""
    if value is None and name in MAY_BE_NONE:
        return []
    if name in PARTS:
        kind = PARTS[name].__name__
        return [] if isinstance(value, PARTS[name]) else [f"{name}={value!r} is not a {kind}; give a moe_jax {kind}"]
    if name in _TUPLES:
        return _tuple_violations(name, value)
    if name == "platform":
        return choice_violations(name, value, PLATFORMS)
    if name in _TEXTS:
        return [] if isinstance(value, str) and value else [f"{name}={value!r} must be a word"]
    if name in _COUNTS:
        return count_violations(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return [f"{name}={value!r} must be a finite number"]
    if value < 0 or (not value and name not in _MAY_BE_ZERO):
        return [f"{name}={value!r} must be {'zero or more' if name in _MAY_BE_ZERO else 'above zero'}"]
    if name == "ragged_share" and value > 1:
        return [f"{name}={value!r} is a share: at most 1"]
    return []


def _tuple_violations(name: str, value: Any) -> list[str]:
    if name == "sources":
        pairs = isinstance(value, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value)
        if pairs and all(isinstance(word, str) for pair in value for word in pair):
            return []
        return [f"sources={value!r} must be a tuple of pairs: names of fields, and where their figures come from"]
    if isinstance(value, tuple) and all(isinstance(word, str) and word for word in value):
        return []
    return [f"{name}={value!r} must be a tuple of words"]


def _relation_violations(machine: Machine) -> list[str]:
    found = []
    if (machine.between is None) != (machine.devices_per_node is None):
        found.append(
            f"between={machine.between!r} and devices_per_node={machine.devices_per_node!r} belong together: give "
            "both, or neither where all devices are inside"
        )
    return found


def _sides(count: int, dimensions: int) -> tuple[int, ...]:
    """The sides of the most even box of ``count`` chips: the one whose longest side is the shortest."""
    if dimensions == 1:
        return (count,)
    first = [side for side in range(1, math.isqrt(count) + 1) if count % side == 0]
    first += [count // side for side in first]
    boxes = ((side, *_sides(count // side, dimensions - 1)) for side in first)
    return min(boxes, key=max)
