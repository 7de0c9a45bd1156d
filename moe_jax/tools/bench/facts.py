"""What the compilers of hardware that is not here make of the layer: exact figures of a program, and no times.

Rows are bf16 and experts are SwiGLU. One process after the other compiles; see ``moe_jax.compile_for``.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from moe_jax import _compat
from moe_jax.errors import check_choice
from moe_jax.layer.params import param_spec
from moe_jax.mesh import make_mesh
from moe_jax.parameters import weights_of
from moe_jax.targets import TargetReport, compile_for
from moe_jax.targets.target import find_target
from moe_jax.tools.bench.baselines import minimal_layer
from moe_jax.tools.bench.command import emit, open_lines
from moe_jax.tools.bench.programs import LAYER, MINIMAL, PASSES, make_layer, make_layer_plan, with_backward
from moe_jax.tools.bench.workloads import Workload

OURS = LAYER
DTYPE = "bfloat16"
WORKLOADS = {
    w.name: w
    for w in (
        Workload(name="A", tokens=1024, hidden=1024, ffn=1024, num_experts=32, top_k=4),
        Workload(name="A64", tokens=1024, hidden=1024, ffn=1024, num_experts=64, top_k=4),
        Workload(name="B", tokens=2048, hidden=2048, ffn=768, num_experts=128, top_k=8),  # as Qwen3-30B-A3B
        Workload(name="C", tokens=1024, hidden=7168, ffn=2048, num_experts=64, top_k=8),  # as wide as DeepSeek-V3
    )
}
_SECONDS = 60  # about how long a program takes to compile on one core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of one program, per device. *Other* is all that neither multiplies nor communicates.

    Attributes:
      target, workload, phase: as asked for.
      what: "layer", or "minimal": one written by hand, see ``baselines.minimal_layer``.
      routed_flops: the flops of the products of T * K rows with their experts, in this phase.
      flops: the flops of the program when routes are even: those of products, and what kernels declare, padding of
        their tiles included. Kernels declare what full buffers take, but multiply only the rows that are there; so the
        slack of buffers is subtracted. On CPUs products are loops of unknown length, which do not count.
      row_bytes: the bytes of T * K rows.
      other_bytes: bytes to and from memory that belong to *other*.
      other_cycles: the cycles that the compiler estimates for *other* on TPUs; None elsewhere.
      gather_bytes: the bytes that gathers take out, for which no cycle is counted.
      temporary_bytes: the most bytes of temporaries at a time, as the compiler planned it.
      num_instructions, compile_seconds: the size of the program, and how long it took to compile, which says little on
        a busy machine.
      uncounted_loops: how many loops of unknown length there are, of which no figure above says anything.
    """

    target: str
    workload: str
    phase: str
    what: str
    routed_flops: int
    flops: int
    row_bytes: int
    other_bytes: int
    other_cycles: int | None
    gather_bytes: int
    temporary_bytes: int
    num_instructions: int
    compile_seconds: float
    uncounted_loops: int

    def __str__(self) -> str:
        cycles = "" if self.other_cycles is None else f"{self.other_cycles / 1e6:.2f} M other cycles, "
        return (
            f"{self.target:<10} {self.workload:<4} {self.what:<8} {self.phase:<18} "
            f"{self.flops / self.routed_flops:.2f} x routed flops, {cycles}{self.other_bytes / self.row_bytes:.1f} x "
            f"rows other bytes, {self.gather_bytes / 1e6:,.0f} MB gathered, "
            f"{self.temporary_bytes / 1e6:,.0f} MB temporary, {self.num_instructions:,} instructions, "
            f"{self.compile_seconds:.0f} s"
        )


def run(
    targets: Sequence[str],
    *,
    workloads: Sequence[str] | None = None,
    contenders: Sequence[str] = (),
    json_path: str | None = None,
) -> int:
    """Compiles the layer for ``targets``. Prints facts as they come, and then a table. Returns the exit code.

    Args:
      targets: as for ``compile_for``.
      workloads: names in ``WORKLOADS``; None: A, B and C, or A64 where the target is one device.
      contenders: () or ("minimal",).
      json_path: a file for JSON lines, or "-": on standard output, instead of words.

    Raises:
      InvalidArgumentError: a name is not as above. UnsupportedError: a compiler is not installed.
      CompilationError: a compiler refuses the layer.
    """
    asked: list[tuple[str, str]] = []
    for target in targets:
        where = find_target(target)
        where.check_installed()
        names = workloads or (("A64",) if where.num_devices == 1 else ("A", "B", "C"))
        asked += [(target, name) for name in names]
    for name in workloads or ():
        check_choice("workloads", name, WORKLOADS)
    for name in contenders:
        check_choice("against", name, (MINIMAL,))
    programs = [
        (target, name, phase, what) for target, name in asked for phase in PASSES for what in (OURS, *contenders)
    ]
    found = []
    with contextlib.ExitStack() as stack:
        lines = open_lines(json_path, stack)
        if lines is not sys.stdout:
            print(f"{len(programs)} programs to compile, about {len(programs) * _SECONDS / 60:.0f} minutes", flush=True)
        for program in programs:
            found.append(facts_of(*program)[0])
            emit({"event": "facts", **dataclasses.asdict(found[-1])}, lines)
            if lines is not sys.stdout:
                print(found[-1], flush=True)
    if lines is not sys.stdout:
        print("\n" + table(found))
    return 0


def facts_of(target: str, workload: str, phase: str, what: str = OURS) -> tuple[Facts, TargetReport]:
    """Compiles one program, of this module's ``build``."""
    report = compile_for(target, f"{__name__}:build", workload, phase, what)
    sizes, passes = WORKLOADS[workload], 1 if phase == PASSES[0] else 3  # its gradients are two more products
    mesh = AbstractMesh((find_target(target).num_devices, 1), ("ep", "tp"))
    plan = make_layer_plan(sizes, mesh, DTYPE, "none")
    pairs, of_row = plan.num_pairs, passes * 3 * 2 * sizes.hidden * sizes.ffn
    counted = what == OURS and report.platform != "cpu"  # on CPUs products are loops over the rows that are there
    slack = plan.num_rows(plan.pair_capacity) - pairs if counted else 0
    facts = Facts(
        target=target,
        workload=workload,
        phase=phase,
        what=what,
        routed_flops=pairs * of_row,
        flops=report.work.flops - slack * of_row,
        row_bytes=pairs * sizes.hidden * jnp.dtype(DTYPE).itemsize,
        other_bytes=report.work.other_bytes,
        other_cycles=report.work.other_cycles,
        gather_bytes=report.work.gather_bytes,
        temporary_bytes=report.temporary_bytes,
        num_instructions=report.num_instructions,
        compile_seconds=report.compile_seconds,
        uncounted_loops=len(report.uncounted_loops),
    )
    return facts, report


def build(devices: Sequence[_compat.Device], name: str, phase: str, what: str) -> tuple[Callable, tuple[Any, ...]]:
    """The builder for ``compile_for``: the layer of a workload over all devices, and its arguments, weights in bf16."""
    workload, mesh = WORKLOADS[name], make_mesh(ep=len(devices), devices=devices)
    plan, init, apply = make_layer(workload, mesh, DTYPE, "none")
    if what == MINIMAL:
        apply = minimal_layer(mesh, plan, workload.activation)

    def placed(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = jax.eval_shape(init, jax.random.key(0))
    narrow = weights_of("experts", params)
    params = {
        name: placed(a.shape, DTYPE if name in narrow else a.dtype, param_spec(name, plan))
        for name, a in params.items()
    }
    x = placed((plan.tokens_per_rank * mesh.size, plan.hidden), DTYPE, PartitionSpec(plan.token_axes))
    return (apply, (params, x)) if phase == PASSES[0] else (with_backward(apply), (params, x, x))


def table(found: Sequence[Facts]) -> str:
    """Markdown: a line for each target and workload, forward / forward + backward."""
    lines = [
        (
            "| target | workload | flops / routed | other cycles, M | other bytes / rows | gathered, MB | "
            "temporary, MB | instructions | compiled in, s |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for target, workload, what in dict.fromkeys((f.target, f.workload, f.what) for f in found):
        both = [f for f in found if (f.target, f.workload, f.what) == (target, workload, what)]
        name = workload if what == OURS else f"{workload}, {what}"
        columns = [
            [f"{f.flops / f.routed_flops:.2f}" for f in both],
            ["-" if f.other_cycles is None else f"{f.other_cycles / 1e6:.2f}" for f in both],
            [f"{f.other_bytes / f.row_bytes:.1f}" for f in both],
            [f"{f.gather_bytes / 1e6:,.0f}" for f in both],
            [f"{f.temporary_bytes / 1e6:,.0f}" for f in both],
            [f"{f.num_instructions:,}" for f in both],
            [f"{f.compile_seconds:.0f}" for f in both],
        ]
        lines.append(
            "| " + " | ".join([target, name, *(" / ".join(dict.fromkeys(column)) for column in columns)]) + " |"
        )
    return "\n".join(lines)
