"""NVIDIA GPUs as XLA's compiler wants them described, in a GpuTargetConfigProto.

The figures are those of files that openxla/xla keeps in ``xla/backends/gpu/target_config/specs``; each file is named
with its commit below. Rates of single instructions, which those files list too, are left out: XLA compiles without
them.
"""

import dataclasses

# What all of those files say alike.
_COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
}
# Fields of ``Gpu`` whose names are those of the proto.
_OWN = (
    "core_count", "fpus_per_core", "clock_rate_ghz", "memory_bandwidth", "device_memory_size", "l2_cache_size",
    "shared_memory_per_core", "shared_memory_per_block_optin",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card. Sizes are in bytes, rates in bytes per second and GHz; names are those of ``GpuDeviceInfoProto``.

    Attributes:
      description: the name of the card.
      compute_capability: the major number; the minor one of all is 0.
      has_accelerated_features: wgmma and the like, as of sm_90a beside sm_90.
      core_count, fpus_per_core, clock_rate_ghz: multiprocessors, fp32 units of each, and their clock.
      memory_bandwidth, device_memory_size: the rate and the size of the main memory.
      l2_cache_size, shared_memory_per_core, shared_memory_per_block_optin: sizes of memories on the chip.
      source: where the figures come from.
    """

    description: str
    compute_capability: int
    has_accelerated_features: bool
    core_count: int
    fpus_per_core: int
    clock_rate_ghz: float
    memory_bandwidth: int
    device_memory_size: int
    l2_cache_size: int
    shared_memory_per_core: int
    shared_memory_per_block_optin: int
    source: str

    def target_config(self) -> str:
        """The text of the GpuTargetConfigProto, with the versions of CUDA 12.8 and cuDNN 9.10."""
        figures = {**_COMMON, **{name: getattr(self, name) for name in _OWN}}
        features = "feature_extension: ACCELERATED_FEATURES" if self.has_accelerated_features else ""
        lines = [f"  {name}: {value}" for name, value in figures.items()]
        lines.append(f"  cuda_compute_capability {{ major: {self.compute_capability} {features} }}")
        return "\n".join(
            [
                "gpu_device_info {",
                *lines,
                "}",
                'platform_name: "CUDA"',
                "dnn_version_info { major: 9 minor: 10 }",
                "runtime_version { major: 12 minor: 8 }",
                f'device_description_str: "{self.description}"',
            ]
        )


_SPECS = "openxla/xla, xla/backends/gpu/target_config/specs/"

GPUS = {
    "a100": Gpu(
        description="NVIDIA A100-SXM4-80GB",
        compute_capability=8,
        has_accelerated_features=False,
        core_count=108,
        fpus_per_core=64,
        clock_rate_ghz=1.41,
        memory_bandwidth=2_039_040_000_000,
        device_memory_size=85_100_068_864,
        l2_cache_size=41_943_040,
        shared_memory_per_core=167_936,
        shared_memory_per_block_optin=166_912,
        source=_SPECS + "a100_sxm_80.txtpb at 4336d12e0706168f6a382ddb231f3a83853b0657",
    ),
    "h100": Gpu(
        description="NVIDIA H100 80GB HBM3",
        compute_capability=9,
        has_accelerated_features=True,
        core_count=132,
        fpus_per_core=128,
        clock_rate_ghz=1.98,
        memory_bandwidth=3_352_320_000_000,
        device_memory_size=84_942_979_072,
        l2_cache_size=52_428_800,
        shared_memory_per_core=233_472,
        shared_memory_per_block_optin=232_448,
        source=_SPECS + "h100_sxm.txtpb at 0774019d97e77dc433ce97604295f6fc0f5b3b65",
    ),
    "h200": Gpu(
        description="NVIDIA H200 141GB HBM3e",
        compute_capability=9,
        has_accelerated_features=True,
        core_count=132,
        fpus_per_core=128,
        clock_rate_ghz=1.98,
        memory_bandwidth=4_800_000_000_000,
        device_memory_size=151_397_597_184,
        l2_cache_size=52_428_800,
        shared_memory_per_core=233_472,
        shared_memory_per_block_optin=232_448,
        source=_SPECS + "h200.txtpb at 4336d12e0706168f6a382ddb231f3a83853b0657",
    ),
    "b200": Gpu(
        description="NVIDIA B200",
        compute_capability=10,
        has_accelerated_features=True,
        core_count=148,
        fpus_per_core=128,
        clock_rate_ghz=1.965,
        memory_bandwidth=7_672_320_000_000,
        device_memory_size=191_514_411_008,
        l2_cache_size=132_644_864,
        shared_memory_per_core=233_472,
        shared_memory_per_block_optin=232_448,
        source=_SPECS + "b200.txtpb at 300ec95ab85fa9f40af388054f7d43707407cb52",
    ),
    "gb200": Gpu(
        description="NVIDIA GB200",
        compute_capability=10,
        has_accelerated_features=True,
        core_count=152,
        fpus_per_core=128,
        clock_rate_ghz=2.062,
        memory_bandwidth=7_928_064_000_000,
        device_memory_size=197_897_748_480,
        l2_cache_size=135_528_448,
        shared_memory_per_core=233_472,
        shared_memory_per_block_optin=232_448,
        source=_SPECS + "gb200.txtpb at 300ec95ab85fa9f40af388054f7d43707407cb52",
    ),
}
