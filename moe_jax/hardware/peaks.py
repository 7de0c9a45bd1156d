"""What a device reaches at most, by the name that JAX gives it. A measurement divided by it is a share of the peak."""

import dataclasses

from moe_jax.hardware.find import machine_of_kind
from moe_jax.hardware.machines import MACHINES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """The peaks of one kind of device.

    Attributes:
      kinds: what ``jax.Device.device_kind`` of such a device begins with.
      flops16: flops per second in dense products of bf16 numbers.
      flops32: flops per second in products of fp32 numbers, which on TPUs are six passes of bf16 products.
      memory: bytes per second to and from the main memory.
      source: where the figures come from.
    """

    kinds: tuple[str, ...]
    flops16: float
    flops32: float
    memory: float
    source: str


# CPUs are not listed: ``MACHINES`` has what emulated devices reach, which is no peak.
PEAKS = {
    name: Peak(
        kinds=machine.kinds,
        flops16=machine.flops16,
        flops32=machine.flops32,
        memory=machine.memory_bandwidth,
        source=f"products: {machine.source_of('flops16')}; memory: {machine.source_of('memory_bandwidth')}",
    )
    for name, machine in MACHINES.items()
    if machine.kinds and machine.platform != "cpu"
}


def peak_of(device_kind: str) -> Peak | None:
    """The peaks of a device; None for a device that is not listed, such as a CPU. The longest name that fits counts.

    >>> from moe_jax.hardware import PEAKS, peak_of
    >>> peak_of("TPU v5 lite") == PEAKS["v5e"], peak_of("cpu")
    (True, None)
    """
    machine = machine_of_kind(device_kind)
    return PEAKS.get(machine.name) if machine else None
