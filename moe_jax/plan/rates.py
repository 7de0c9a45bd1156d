"""What one device of each platform reaches, nominally: figures to divide a cost by, not promises."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Per device and second.

    Attributes:
      flops16: of products of 16-bit numbers.
      flops32: of products of fp32 numbers.
      memory: bytes read and written.
      wire: bytes that leave the device.
      widened: dtypes that a sum over ranks turns into fp32 first.
      ragged_wire: the share of ``wire`` that the native ragged exchange reaches.
      ragged_passes: how often, at each end of such an exchange, its rows are read and written beside it.
      source: where the figures come from; ragged_source: those of the ragged exchange.
    """

    flops16: float
    flops32: float
    memory: float
    wire: float
    widened: tuple[str, ...] = ()
    ragged_wire: float = 1.0
    ragged_passes: float = 0.0
    source: str
    ragged_source: str = ""


RATES = {
    "cpu": Rates(
        flops16=40e9,  # XLA:CPU multiplies 16-bit numbers as fp32
        flops32=40e9,
        memory=5e9,
        wire=2e9,
        widened=("bfloat16",),
        source="measured on one of 8 emulated devices that share 2 cores",
    ),
    "gpu": Rates(
        flops16=989e12,
        flops32=67e12,
        memory=3.35e12,
        wire=450e9,
        ragged_wire=0.02,
        ragged_source="a ragged exchange reaches 2 % of NVLink inside a node by openxla/xla#33386",
        source="H100 SXM by NVIDIA's data sheet: BF16 without sparsity, FP32, HBM3, NVLink one way (half of 900 GB/s)",
    ),
    "tpu": Rates(
        flops16=459e12,
        flops32=459e12 / 6,  # six passes of bf16 products
        memory=2765e9,
        wire=600e9,
        ragged_passes=1.4,
        ragged_source="a ragged exchange wants every row in tiles of its own, and the passes there and back take 1.4 "
        "times as long as their bytes say, by libtpu 0.0.42's estimates of three layers on v5e and v5p",
        source="TPU v5p by Google Cloud's documentation: BF16, HBM, interconnect one way (half of 1200 GB/s)",
    ),
}
