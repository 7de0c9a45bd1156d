"""Times of dispatch and combine that others published, as they published them.

Each table says how it counts; a bandwidth is turned back into a time by the bytes that its publisher divided by it.
"""

import dataclasses
from collections.abc import Iterator

from moe_jax.hardware import MACHINES, Machine
from moe_jax.hardware.machines import reached_link

HIDDEN, TOP_K = 7168, 8  # the same in all rows: the shape of DeepSeek-V3
DISPATCH, COMBINE = "dispatch", "combine"
# Bytes of a row of HIDDEN numbers on the wire; 8-bit numbers travel with an fp32 scale per 128 of them, or per row.
ROW_BYTES = {"bf16": 2 * HIDDEN, "fp8": HIDDEN + HIDDEN // 128 * 4, "int8": HIDDEN + 4}


def _like(base: str, name: str, kind: str, nominal: float, source: str) -> Machine:
    """A machine that differs from a known one in its links inside a node. Only its links are read here."""
    sources = (*MACHINES[base].sources, ("inside.bytes_per_second", source))
    return dataclasses.replace(MACHINES[base], name=name, inside=reached_link(kind, nominal), sources=sources)


PUBLISHED_MACHINES = {
    **MACHINES,
    "h800": _like("h100", "h800", "NVLink", 200e9, "NVIDIA's data sheet: NVLink of 400 GB/s both ways"),
    "mi355x": _like(
        "mi300x", "mi355x", "Infinity Fabric", 7 * 76.8e9, "AMD's data sheet: seven links of 76.8 GB/s one way"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One line of a published table.

    Attributes:
      system: the library and its kernels.
      machine: a name in ``PUBLISHED_MACHINES``.
      ranks: the number of GPUs or NPUs that exchange.
      tokens: tokens of each rank.
      experts: experts of all ranks together.
      groups: the most nodes that the experts of a token are on; None: any number.
      rows: what travels. "pairs": a row for every choice of a token. "ranks": one for every rank that a token goes to,
        and between nodes one for every node, which hands it on.
      counts: what the publisher multiplied by a row's bytes for a bandwidth, "pairs", and "ranks" or "nodes" that a
        token goes to, its own among them; "time" where a time is published.
      dispatch, combine: GB/s, or microseconds where ``counts`` is "time"; None where nothing is published.
      dtypes: the dtypes of rows that are dispatched and of those that are combined, names in ``ROW_BYTES``.
      fits: the kind of link in ``moe_jax.hardware.machines.REACHED`` that was fitted to the line; empty where none was.
      note: why the fit need not hold here.
    """

    system: str
    machine: str
    ranks: int
    tokens: int
    experts: int
    groups: int | None
    rows: str
    counts: str
    dispatch: float | None
    combine: float | None
    dtypes: tuple[str, str]
    fits: str
    note: str

    def published(self, way: str) -> float | None:
        return self.dispatch if way == DISPATCH else self.combine

    def dtype(self, way: str) -> str:
        return self.dtypes[way == COMBINE]

    @property
    def source(self) -> str:
        return SOURCES[self.system.split(",")[0]]


SOURCES = {
    "DeepEP V1": "deepseek-ai/DeepEP, docs/legacy.md at 0297fc8",
    "DeepEP V2": "deepseek-ai/DeepEP, README.md at 0297fc8; the better of its two lines for 8 GPUs",
    "Hybrid-EP": "deepseek-ai/DeepEP, docs/README_Hybrid-EP.md at 41cad94: kernels only, the most SMs of each table",
    "UCCL-EP": "uccl-project/uccl, ep/README.md at 021c2c0",
    "mori": "ROCm/mori, README.md at 05bb5f4, the most CUs; what its bandwidth counts: docs/MORI-EP-BENCHMARK.md; "
    "MI355X: a later README.md",
    "NCCL EP": "NVIDIA/nccl, contrib/nccl_ep/README.md at 02c72f8",
    "pplx-kernels": "perplexityai/pplx-kernels, README.md: NVLink inside a node, IBGDA between nodes",
    "torch all-to-all": "perplexityai/pplx-kernels, README.md: NCCL's all-to-all of one token per GPU",
    "sgl-kernel-npu": "sgl-project/sgl-kernel-npu, README.md at 060a3fa",
}


def _table(
    system: str,
    machine: str,
    tokens: int,
    lines: dict[int, tuple[float | None, float | None]],
    *,
    rows: str = "ranks",
    counts: str = "time",
    dtypes: tuple[str, str] = ("fp8", "bf16"),
    experts: int = 256,
    experts_per_rank: int | None = None,
    groups: int | None = None,
    fits: str = "",
    note: str = "",
) -> Iterator[Published]:
    """Lines of a table: by the number of ranks, the figures of dispatch and combine."""
    for ranks, (dispatch, combine) in lines.items():
        yield Published(
            system=system,
            machine=machine,
            ranks=ranks,
            tokens=tokens,
            experts=experts_per_rank * ranks if experts_per_rank else experts,
            groups=groups,
            rows=rows,
            counts=counts,
            dispatch=dispatch,
            combine=combine,
            dtypes=dtypes,
            fits=fits,
            note=note,
        )


_EFA = "EFA network cards"
_BF16 = ("bf16", "bf16")
_INT8 = ("int8", "bf16")

PUBLISHED: tuple[Published, ...] = (
    # Large exchanges.
    *_table("DeepEP V1", "h800", 4096, {8: (153, 158)}, counts="ranks", fits="NVLink"),
    *_table("DeepEP V1", "h800", 4096, {16: (43, 43)}, counts="nodes", groups=4),
    *_table("DeepEP V1", "h800", 4096, {32: (58, 57), 64: (51, 50)}, counts="nodes", groups=4, fits="RDMA"),
    *_table("DeepEP V2", "h100", 8192, {16: (90, 81), 32: (61, 61)}, counts="nodes", groups=4),
    *_table("DeepEP V2", "b200", 8192, {16: (90, 91)}, counts="nodes", groups=4),
    *_table("DeepEP V2", "b200", 8192, {8: (726, 740)}, counts="ranks"),
    *_table(
        "Hybrid-EP", "h100", 4096, {16: (68.48, 62.95), 32: (55.35, 57.46), 64: (46.52, 49.77)}, counts="nodes",
        experts_per_rank=8,
    ),
    *_table(
        "Hybrid-EP", "h100", 4096, {16: (71.71, None), 32: (57.69, None), 64: (49.97, None)}, counts="nodes",
        experts_per_rank=8, dtypes=_BF16,
    ),
    *_table("Hybrid-EP", "b200", 4096, {8: (599.27, 673.84)}, counts="ranks", experts_per_rank=8),
    *_table("Hybrid-EP", "b200", 4096, {8: (734.95, None)}, counts="ranks", experts_per_rank=8, dtypes=_BF16),
    *_table(
        "Hybrid-EP", "gb200", 4096,
        {8: (713.98, 737.13), 16: (650.48, 666.26), 24: (577.96, 639.80), 32: (538.86, 605.15), 36: (489.27, 596.99)},
        counts="ranks", experts_per_rank=8,
    ),
    *_table(
        "Hybrid-EP", "gb200", 4096,
        {8: (764.03, None), 16: (706.95, None), 24: (665.97, None), 32: (642.23, None), 36: (632.31, None)},
        counts="ranks", experts_per_rank=8, dtypes=_BF16,
    ),
    *_table("UCCL-EP", "h200", 4096, {8: (320, 319)}, counts="ranks"),
    *_table(
        "UCCL-EP", "h200", 4096, {16: (50, 18), 24: (53, 26), 32: (54, 43)}, counts="nodes", groups=4, experts=288,
        note=_EFA,
    ),
    *_table("UCCL-EP", "b200", 4096, {8: (280, 426)}, counts="ranks", note="kernels of DeepEP V1, on few SMs"),
    *_table(
        "UCCL-EP", "b200", 4096, {16: (53, 60), 24: (53, 59), 32: (53, 57)}, counts="nodes", groups=4, experts=288,
        note=_EFA,
    ),
    *_table("mori", "mi300x", 4096, {8: (307, 330)}, counts="ranks", fits="Infinity Fabric"),
    *_table("mori", "mi300x", 4096, {16: (63, 49), 32: (57, 50)}, counts="nodes"),
    *_table("mori", "mi355x", 4096, {8: (345, 420)}, counts="ranks"),
    *_table("UCCL-EP", "mi300x", 4096, {8: (260, 304)}, counts="ranks"),
    *_table("UCCL-EP", "mi300x", 4096, {8: (295, None)}, counts="ranks", dtypes=_BF16),
    *_table("UCCL-EP", "mi300x", 4096, {16: (74, 78), 32: (60, 60), 64: (52, 51)}, counts="nodes", groups=4),
    *_table(
        "UCCL-EP", "mi300x", 4096, {16: (82, None), 32: (61, None), 64: (53, None)}, counts="nodes", groups=4,
        dtypes=_BF16,
    ),
    *_table(
        "sgl-kernel-npu", "a3", 4096, {8: (146, 125), 32: (102, 95)}, counts="ranks", dtypes=_INT8, fits="HCCS"
    ),
    *_table("sgl-kernel-npu", "a3", 4096, {16: (107, 103), 64: (81, 91), 128: (57, 81)}, counts="ranks", dtypes=_INT8),
    # Small exchanges.
    *_table("DeepEP V1, low latency", "h800", 128, {8: (77, 114)}, rows="pairs", fits="NVLink"),
    *_table(
        "DeepEP V1, low latency", "h800", 128,
        {16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}, rows="pairs",
        fits="RDMA",
    ),
    *_table(
        "NCCL EP, low latency", "h100", 128, {8: (224.3, 185.2), 16: (76.7, 73.0), 32: (53.6, 50.0), 64: (48.8, 43.8)},
        rows="pairs", counts="pairs", dtypes=_BF16,
    ),
    *_table(
        "pplx-kernels", "h100", 128,
        {8: (83.6, 102.3), 16: (622.4, 668.1), 32: (427.6, 481.4), 64: (317.4, 529.9), 128: (307.7, 593.9)},
        rows="pairs", note="NVSHMEM, with latencies of its own",
    ),
    *_table(
        "torch all-to-all", "h100", 1,
        {8: (24.4, None), 16: (109.7, None), 32: (95.7, None), 64: (101.6, None), 128: (132.0, None)}, rows="pairs",
        dtypes=_BF16, note="NCCL, which XLA calls too",
    ),
    *_table("mori, low latency", "mi300x", 128, {8: (35, 47)}, fits="Infinity Fabric"),
    # Its bandwidths between nodes, 63 and 110 GB/s, count a row for every choice.
    *_table("mori, low latency", "mi300x", 128, {16: (115, 141), 32: (157, 280)}, rows="pairs"),
    *_table("mori, low latency", "mi355x", 128, {8: (31, 36)}),
    *_table("UCCL-EP, low latency", "mi300x", 128, {8: (65, 92), 16: (136, 207), 32: (224, 341)}, rows="pairs"),
    *_table(
        "UCCL-EP, low latency", "h200", 128, {16: (226, 293), 24: (386, 580), 32: (465, 694)}, rows="pairs",
        experts=288, note=_EFA,
    ),
    *_table(
        "UCCL-EP, low latency", "b200", 128, {16: (228, 318), 24: (448, 566), 32: (406, 617)}, rows="pairs",
        experts=288, note=_EFA,
    ),
    *_table(
        "sgl-kernel-npu, low latency", "a3", 128, {8: (132, 126), 32: (153, 151)}, rows="pairs", dtypes=_INT8,
        fits="HCCS",
    ),
    *_table("sgl-kernel-npu, low latency", "a3", 128, {16: (139, 135)}, rows="pairs", dtypes=_INT8),
)  # fmt: skip
