"""Times of all-gathers between TPUs that others published. Nobody has published dispatch and combine on TPUs."""

import dataclasses

from moe_jax.hardware import MACHINES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gathered:
    """One line of a published table.

    Attributes:
      machine: a name in ``moe_jax.hardware.MACHINES``.
      slice_: the chips of the slice, by dimension.
      chips: the chips that gather from each other, by dimension.
      arrived: bytes that a chip gets.
      gigabytes_per_second: the published rate, by what a chip gets.
      fits: the kind of link in ``moe_jax.hardware.machines.REACHED`` that was fitted to the line; empty where none was.
    """

    machine: str
    slice_: tuple[int, ...]
    chips: tuple[int, ...]
    arrived: int
    gigabytes_per_second: float
    fits: str


SOURCE = "AI-Hypercomputer/accelerator-microbenchmarks, Ironwood/guides/collectives/all_gather.md at 63b035b"
_BANDWIDTHS = {
    (2, 2, 1): (71.7703034, 129.1869148, 161.9040742, 174.765465, 178.7714158),
    (2, 2, 2): (69.53210305, 127.3945462, 162.0864029, 174.6652133, 178.7592252),
}
GATHERED: tuple[Gathered, ...] = tuple(
    Gathered(
        machine="v7x",
        slice_=slice_,
        chips=(2, 2, 1),
        arrived=1572864 * 4**place,
        gigabytes_per_second=bandwidth,
        fits="ICI" if slice_ == (2, 2, 1) else "",
    )
    for slice_, bandwidths in _BANDWIDTHS.items()
    for place, bandwidth in enumerate(bandwidths)
)


def seconds_at_rate(line: Gathered) -> float:
    """The bytes that arrive, over the rate of the links on which they can: one to each neighbour among ``chips``."""
    machine = MACHINES[line.machine]
    assert machine.torus is not None  # it is a TPU
    # A dimension of two chips has one link for each chip, and a ring has two.
    links = sum(min(side - 1, 2) for side in line.chips)
    share = links / (2 * machine.torus.dimensions)
    return line.arrived / (share * machine.torus.devices_per_chip * machine.inside.bytes_per_second)


def predicted_seconds(line: Gathered) -> float:
    return seconds_at_rate(line) + MACHINES[line.machine].inside.latency


def published_seconds(line: Gathered) -> float:
    return line.arrived / (line.gigabytes_per_second * 1e9)


def error(line: Gathered) -> float:
    """How far the prediction is from the published time, as a share of that."""
    return predicted_seconds(line) / published_seconds(line) - 1
