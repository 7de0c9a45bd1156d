"""What a device reaches at most, by the name that JAX gives it. A measurement divided by it is a share of the peak."""

import dataclasses

from moe_jax.hardware.gpu import GPUS


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


def _gpu(kind: str, name: str, flops16: float, flops32: float) -> Peak:
    source = f"products: NVIDIA's data sheet, without sparsity; memory: {GPUS[name].source}"
    return Peak(kinds=(kind,), flops16=flops16, flops32=flops32, memory=GPUS[name].memory_bandwidth, source=source)


def _tpu(kinds: tuple[str, ...], flops16: float, memory: float) -> Peak:
    source = "Google Cloud's documentation: peak BF16 per chip, HBM bandwidth per chip"
    return Peak(kinds=kinds, flops16=flops16, flops32=flops16 / 6, memory=memory, source=source)


PEAKS = {
    "a100": _gpu("NVIDIA A100-SXM", "a100", 312e12, 19.5e12),
    "h100": _gpu("NVIDIA H100 80GB HBM3", "h100", 989e12, 67e12),  # the PCIe card and the NVL have other clocks
    "h200": _gpu("NVIDIA H200", "h200", 989e12, 67e12),
    "b200": _gpu("NVIDIA B200", "b200", 2250e12, 75e12),
    "v5e": _tpu(("TPU v5 lite", "TPU v5e"), 197e12, 819e9),
    "v6e": _tpu(("TPU v6 lite", "TPU v6e"), 918e12, 1640e9),
    "v5p": _tpu(("TPU v5p", "TPU v5"), 459e12, 2765e9),
}


def peak_of(device_kind: str) -> Peak | None:
    """The peaks of a device; None for a device that is not listed, such as a CPU. The longest name that fits counts.

    >>> from moe_jax.hardware import PEAKS, peak_of
    >>> peak_of("TPU v5 lite") == PEAKS["v5e"], peak_of("cpu")
    (True, None)
    """
    fitting = [(kind, peak) for peak in PEAKS.values() for kind in peak.kinds if device_kind.startswith(kind)]
    return max(fitting, key=lambda found: len(found[0]), default=(None, None))[1]
