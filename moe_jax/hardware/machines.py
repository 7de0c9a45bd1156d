"""The machines that are known by name, with a source for every figure.

Rates of products are without sparsity. A link's rate is that of one device in one direction: half of what is advertised
for both directions, times the share of it that published exchanges reach. Figures that nobody publishes are assumed,
and their sources say so.
"""

import dataclasses

from moe_jax.hardware.gpu import GPUS
from moe_jax.hardware.machine import Link, Machine, Torus

GIB = 2**30
# Latencies and costs of a launch, which are assumed, since nobody publishes them.
_GPU_LAUNCH = 3e-6
_NPU_LAUNCH = 5e-6

_ASSUMED = "; assumed of this device too"
_RAGGED_GPU = (
    "ragged_share",
    "openxla/xla#33386: a ragged exchange inside a node of B200 reaches 2 % of NVLink's rate; over what others reach",
)
_RELAYOUT_TPU = (
    "relayout_passes",
    "libtpu 0.0.42 gives the passes to and from a row in tiles of its own 1.4 times as long as their bytes take",
)
_NO_RELAYOUT = ("relayout_passes", "its rows lie one after the other in memory, with nothing between")
_NOT_WIDENED = ("widened", "none: sums over ranks are made in the dtype of their terms")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reached:
    """What exchanges reach of a kind of link, fitted to what others published (``moe_jax.tools.published``).

    Attributes:
      share: the share of the advertised rate that an exchange of many bytes reaches.
      latency: the seconds that an exchange takes however few bytes it moves.
      source: the rows that gave both figures.
    """

    share: float
    latency: float
    source: str


REACHED = {
    "NVLink": Reached(share=0.701, latency=27.5e-6, source="fitted to the rows of DeepEP V1 on 8 H800"),
    # The network of both of DeepEP's tables: ConnectX-7 with 400 Gb/s.
    "RDMA": Reached(share=0.880, latency=28.7e-6, source="fitted to the rows of DeepEP V1 on 16 to 256 H800"),
    "Infinity Fabric": Reached(share=0.644, latency=19.0e-6, source="fitted to the rows of mori on 8 MI300X"),
    # The rate is over the links that the run had: two of the six that a chip has in a torus of three dimensions.
    "ICI": Reached(
        share=0.892, latency=13.2e-6, source="fitted to the rows of accelerator-microbenchmarks on 4 chips of Ironwood"
    ),
    "HCCS": Reached(share=0.600, latency=52.1e-6, source="fitted to the rows of sgl-kernel-npu on 8 and 32 dies of A3"),
}


def reached_link(kind: str, nominal: float) -> Link:
    """The link of a kind in ``REACHED`` whose advertised rate is ``nominal`` bytes per second one way."""
    return Link(bytes_per_second=REACHED[kind].share * nominal, latency=REACHED[kind].latency)


def _link_sources(part: str, kind: str, advertised: str, about: str = "") -> tuple[tuple[str, str], ...]:
    """The sources of a link of a kind in ``REACHED``."""
    fitted = REACHED[kind].source + about
    return (
        (f"{part}.bytes_per_second", f"{REACHED[kind].share:.1%} of {advertised}; the share is {fitted}"),
        (f"{part}.latency", fitted),
    )


_GPU_LAUNCH_SOURCE = ("launch_seconds", "assumed: a kernel of a CUDA or HIP graph with its gap to the next")


def _nvidia(
    name: str, *, kind: str, flops16: float, flops32: float, flops8: float, nvlink: float, nic: float, node: int = 8
) -> Machine:
    """A card of NVIDIA's; ``nvlink`` and ``nic`` are bytes per second of one card, one way."""
    eight = "INT8" if name == "a100" else "FP8"
    return Machine(
        name=name,
        platform="gpu",
        kinds=(kind,),
        flops16=flops16,
        flops32=flops32,
        flops8=flops8,
        memory_bytes=GPUS[name].device_memory_size,
        memory_bandwidth=GPUS[name].memory_bandwidth,
        inside=reached_link("NVLink", nvlink),
        between=reached_link("RDMA", nic),
        devices_per_node=node,
        launch_seconds=_GPU_LAUNCH,
        ragged_share=0.02 / REACHED["NVLink"].share,
        sources=(
            ("flops16, flops32, flops8", f"NVIDIA's data sheet: BF16, FP32 and {eight} without sparsity"),
            ("memory_bytes, memory_bandwidth", GPUS[name].source),
            *_link_sources(
                "inside",
                "NVLink",
                "half of NVLink's bandwidth both ways by NVIDIA's data sheet",
                _ASSUMED if name == "a100" else "",
            ),
            *_link_sources(
                "between", "RDMA", f"a network card of {nic * 8e-9:.0f} Gb/s per GPU, by NVIDIA's DGX data sheet"
            ),
            ("devices_per_node", f"NVIDIA's data sheet: {node} GPUs share a domain of NVLink"),
            _GPU_LAUNCH_SOURCE,
            _RAGGED_GPU if name == "b200" else (_RAGGED_GPU[0], _RAGGED_GPU[1] + _ASSUMED),
            _NO_RELAYOUT,
            _NOT_WIDENED,
        ),
    )


def _tpu(
    name: str, *, kinds: tuple[str, ...], flops16: float, flops8: float, memory_gib: float, bandwidth: float,
    ici: float, torus: Torus, clock: float, about: str = "",
) -> Machine:  # fmt: skip
    """A TPU; ``ici`` is bytes per second over all links of one device, one way."""
    documented = "Google Cloud's documentation of this TPU" + about
    tested = "" if name in ("v5e", "v5p") else ", a clock that is assumed"
    return Machine(
        name=name,
        platform="tpu",
        kinds=kinds,
        flops16=flops16,
        flops32=flops16 / 6,
        flops8=flops8,
        memory_bytes=int(memory_gib * GIB),
        memory_bandwidth=bandwidth,
        inside=reached_link("ICI", ici),
        torus=torus,
        launch_seconds=1830 / clock,
        relayout_passes=1.4,
        sources=(
            ("flops16, flops8, memory_bandwidth", documented),
            ("flops32", "six passes of bf16 products"),
            ("memory_bytes", "what libtpu 0.0.42 lets a program use, by its message about one that is too large"),
            *_link_sources(
                "inside",
                "ICI",
                f"half of the bidirectional ICI bandwidth in {documented}",
                "" if name == "v7x" else _ASSUMED,
            ),
            ("between, devices_per_node", "none: a slice is one network"),
            ("torus", f"{documented}: chips in a torus; how an all-to-all loads it follows from its shape"),
            (
                "launch_seconds",
                f"libtpu 0.0.42's estimate of the smallest step, 1830 cycles, here of {clock / 1e9:g} GHz{tested}",
            ),
            _RELAYOUT_TPU,
            ("ragged_share", "assumed: a ragged exchange reaches the whole link"),
            _NOT_WIDENED,
        ),
    )


def _ascend(
    name: str, *, flops16: float, flops8: float, memory_gib: float, bandwidth: float, inside: float, between: float,
    node: int, sources: tuple[tuple[str, str], ...],
) -> Machine:  # fmt: skip
    """A device of Huawei's, as CANN counts them: a die where a package has two."""
    return Machine(
        name=name,
        platform="npu",
        flops16=flops16,
        flops32=flops16 / 4,
        flops8=flops8,
        memory_bytes=int(memory_gib * GIB),
        memory_bandwidth=bandwidth,
        inside=reached_link("HCCS", inside),
        between=reached_link("RDMA", between),
        devices_per_node=node,
        launch_seconds=_NPU_LAUNCH,
        sources=(
            *sources,
            ("flops32", "assumed: a quarter of the 16-bit rate"),
            ("launch_seconds", "assumed"),
            ("relayout_passes, ragged_share", "assumed: CANN's operators send rows as they lie"),
            _NOT_WIDENED,
        ),
    )


_MI300X = Machine(
    name="mi300x",
    platform="gpu",
    kinds=("AMD Instinct MI300X",),
    flops16=1307.4e12,
    flops32=163.4e12,
    flops8=2614.9e12,
    memory_bytes=192 * GIB,
    memory_bandwidth=5.3e12,
    inside=reached_link("Infinity Fabric", 7 * 64e9),
    between=reached_link("RDMA", 50e9),
    devices_per_node=8,
    launch_seconds=_GPU_LAUNCH,
    ragged_share=0.02 / REACHED["Infinity Fabric"].share,
    sources=(
        ("flops16, flops32, flops8", "AMD's data sheet: peak BF16, FP32 matrix and FP8 without sparsity"),
        ("memory_bytes, memory_bandwidth", "AMD's data sheet: 192 GB of HBM3, 5.3 TB/s"),
        *_link_sources(
            "inside", "Infinity Fabric", "seven Infinity Fabric links, each 64 GB/s one way by AMD's data sheet"
        ),
        *_link_sources("between", "RDMA", "a network card of 400 Gb/s per GPU, as where mori was measured"),
        ("devices_per_node", "AMD's data sheet of the platform: 8 GPUs, each linked to each other"),
        _GPU_LAUNCH_SOURCE,
        (_RAGGED_GPU[0], _RAGGED_GPU[1] + _ASSUMED),
        _NO_RELAYOUT,
        _NOT_WIDENED,
    ),
)

_CPU = Machine(
    name="cpu",
    platform="cpu",
    kinds=("cpu",),
    flops16=40e9,  # XLA:CPU multiplies 16-bit numbers in fp32
    flops32=40e9,
    memory_bytes=4 * GIB,
    memory_bandwidth=5e9,
    inside=Link(bytes_per_second=2e9, latency=1e-4),
    launch_seconds=5e-6,
    widened=("bfloat16",),
    sources=(
        ("flops16, flops32, memory_bandwidth", "measured on one of 8 emulated devices that share 2 cores"),
        ("flops8", "none: 8-bit numbers are widened"),
        ("memory_bytes", "assumed: a machine of 32 GiB, shared by 8 emulated devices"),
        ("inside.bytes_per_second", "measured on one of 8 emulated devices that share 2 cores"),
        ("inside.latency, launch_seconds", "assumed"),
        ("between, devices_per_node", "none: emulated devices share one memory"),
        ("torus, relayout_passes, ragged_share", "none: emulated devices share one memory"),
        ("widened", "XLA:CPU's collectives, seen in compiled programs"),
    ),
)

_A3_PAPER = (
    "Serving Large Language Models on Huawei CloudMatrix384, arXiv:2506.12708, for one of the two dies of a 910C"
)
_A5_TALK = "Huawei's announcement of the Ascend 950DT, Huawei Connect 2025"

MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        _nvidia(
            "a100", kind="NVIDIA A100-SXM", flops16=312e12, flops32=19.5e12, flops8=624e12, nvlink=300e9, nic=25e9
        ),
        # The PCIe card and the NVL have other clocks than the kind that is named here.
        _nvidia(
            "h100", kind="NVIDIA H100 80GB HBM3", flops16=989e12, flops32=67e12, flops8=1979e12, nvlink=450e9, nic=50e9
        ),
        _nvidia("h200", kind="NVIDIA H200", flops16=989e12, flops32=67e12, flops8=1979e12, nvlink=450e9, nic=50e9),
        _nvidia("b200", kind="NVIDIA B200", flops16=2250e12, flops32=75e12, flops8=4500e12, nvlink=900e9, nic=50e9),
        _nvidia(
            "gb200", kind="NVIDIA GB200", flops16=2500e12, flops32=80e12, flops8=5000e12, nvlink=900e9, nic=50e9,
            node=72,
        ),
        _MI300X,
        _tpu(
            "v5e", kinds=("TPU v5 lite", "TPU v5e"), flops16=197e12, flops8=393e12, memory_gib=15.75, bandwidth=819e9,
            ici=200e9, torus=Torus(dimensions=2, wraps_from=16), clock=1.5e9,
        ),
        _tpu(
            "v5p", kinds=("TPU v5p", "TPU v5"), flops16=459e12, flops8=918e12, memory_gib=95.74, bandwidth=2765e9,
            ici=600e9, torus=Torus(dimensions=3, wraps_from=4), clock=1.75e9,
        ),
        _tpu(
            "v6e", kinds=("TPU v6 lite", "TPU v6e"), flops16=918e12, flops8=1836e12, memory_gib=31.25, bandwidth=1638e9,
            ici=400e9, torus=Torus(dimensions=2, wraps_from=16), clock=1.75e9,
        ),
        _tpu(
            "v7x", kinds=("TPU7x", "TPU v7"), flops16=2307e12 / 2, flops8=4614e12 / 2, memory_gib=94.75,
            bandwidth=7380e9 / 2, ici=300e9, torus=Torus(dimensions=3, wraps_from=4, devices_per_chip=2), clock=1.75e9,
            about=", halved: JAX counts each of a chip's two cores as a device",
        ),
        _ascend(
            "a2", flops16=376e12, flops8=752e12, memory_gib=64, bandwidth=1.6e12, inside=196e9, between=25e9, node=8,
            sources=(
                ("flops16, memory_bytes, memory_bandwidth", "assumed: as of one die of a 910C"),
                ("flops8", "assumed: INT8, twice the 16-bit rate"),
                *_link_sources(
                    "inside", "HCCS", "half of the 392 GB/s that Huawei gives for seven HCCS links both ways", _ASSUMED
                ),
                *_link_sources("between", "RDMA", "a 200 Gb/s RoCE port per NPU: Huawei's Atlas 800T A2", _ASSUMED),
                ("devices_per_node", "Huawei's Atlas 800T A2: 8 NPUs"),
            ),
        ),
        _ascend(
            "a3", flops16=376e12, flops8=752e12, memory_gib=64, bandwidth=1.6e12, inside=196e9, between=25e9, node=768,
            sources=(
                ("flops16, flops8, memory_bytes, memory_bandwidth", _A3_PAPER),
                *_link_sources(
                    "inside", "HCCS", f"half of a package's 392 GB/s one way over the unified bus ({_A3_PAPER})"
                ),
                *_link_sources("between", "RDMA", f"half of a package's 400 Gb/s RoCE ({_A3_PAPER})", _ASSUMED),
                ("devices_per_node", "384 packages of two dies share a unified bus"),
            ),
        ),
        _ascend(
            "a5", flops16=500e12, flops8=1000e12, memory_gib=144e9 / GIB, bandwidth=4e12, inside=1e12, between=50e9,
            node=8192,
            sources=(
                ("flops8, memory_bytes, memory_bandwidth", _A5_TALK),
                ("flops16", "assumed: half of the FP8 rate"),
                *_link_sources(
                    "inside", "HCCS", f"half of an interconnect of 2 TB/s, taken as both ways ({_A5_TALK})", _ASSUMED
                ),
                *_link_sources("between", "RDMA", "a port of 400 Gb/s, which is assumed", _ASSUMED),
                ("devices_per_node", "Huawei's announcement of the Atlas 950 SuperPoD: 8192 NPUs"),
            ),
        ),
        _CPU,
    )
}  # fmt: skip
