"""What ``compile_for`` reports about a program."""

import dataclasses
from typing import Any

from moe_jax.hlo.contract import Contract, contract_fields
from moe_jax.hlo.cost import Kernel, Work, work_of
from moe_jax.hlo.text import Program

_SHOWN = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetReport(Contract):
    """What the compiler of a target made of a program: the fields of ``Contract``, and those below. All is per device.

    ``flops`` is ``work.flops``: products alone, and what kernels declare. ``cycles`` are the TPU compiler's own
    estimates; it makes none for kernels, collectives and some others, which ``work.unpriced`` counts.

    Attributes:
      target: the name of the target, as it was asked for.
      platform: "cpu", "gpu" or "tpu".
      device_kind: what the compiler calls the devices.
      num_devices: how many devices the program runs on.
      work: what surely runs, loops by their trip count: a ``moe_jax.hlo.cost.Work`` with ``flops``,
        ``bytes_accessed``, ``collective_bytes``, ``cycles``, ``gathers``, ``scatters``.
      loop_work: the same for one turn of each loop whose trip count is not known when the program is compiled.
      uncounted_loops: those loops by name, with their scopes.
      kernels: the custom calls that run something.
      peak_bytes: the most memory in use at a time by the compiler's word, arguments and results included; XLA:CPU
        leaves temporaries out of it.
      lower_seconds, compile_seconds: how long it took, which says little on a busy machine.
      compiler: its package and JAX's, with versions.
      hlo: the text of the program.
    """

    temporary_bytes: int  # this and the next three are always known of a program that was compiled
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    target: str
    platform: str
    device_kind: str
    num_devices: int
    work: Work
    loop_work: Work
    uncounted_loops: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    peak_bytes: int
    lower_seconds: float
    compile_seconds: float
    compiler: str
    hlo: str = dataclasses.field(repr=False)

    @property
    def bytes_accessed(self) -> int:
        """The bytes that are read from memory and written to it; on TPU only those of the main memory."""
        return self.work.bytes_accessed

    @property
    def cycles(self) -> int | None:
        """The cycles that the compiler estimates; None where it estimates none."""
        return self.work.cycles

    @property
    def cycles_by_scope(self) -> dict[str, int]:
        """The estimated cycles by the named scopes around an operation, as in "dispatch/exchange", largest first."""
        return dict(self.work.scope_cycles)

    def as_dict(self) -> dict[str, Any]:
        """All fields but the program's text, and the sums, as a dict that JSON can hold."""
        values = super().as_dict()
        del values["hlo"]
        for name in ("work", "loop_work"):
            for table in ("scope_cycles", "flops_by_op", "unpriced"):
                values[name][table] = dict(getattr(getattr(self, name), table))
        return {**values, "cycles": self.cycles, "bytes_accessed": self.bytes_accessed}

    def __str__(self) -> str:
        devices = f"{self.num_devices} device{'s' if self.num_devices > 1 else ''}"
        lines = [
            (
                f"{self.target}: {devices} of {self.device_kind}, lowered in {self.lower_seconds:.1f} s, compiled in "
                f"{self.compile_seconds:.1f} s by {self.compiler}"
            ),
            *_lines(self.work),
        ]
        lines += [f"kernel        {_kernel(kernel)}" for kernel in self.kernels]
        if self.uncounted_loops:
            lines.append(f"not counted   loops of unknown length: {', '.join(self.uncounted_loops)}; one turn of each:")
            lines += ["  " + line for line in _lines(self.loop_work)]
        lines.append(f"peak memory   {self.peak_bytes:,} B")
        return "\n".join(lines) + "\n" + super().__str__()


def make_report(hlo: str, memory: dict[str, int], **facts: Any) -> TargetReport:
    """The report of one compiled program; ``memory`` holds the fields of ``Contract`` and ``peak_bytes``."""
    peak = memory["peak_bytes"]
    sizes = {name: value for name, value in memory.items() if name != "peak_bytes"}
    costs = work_of(Program(hlo), has_fast_memory=facts["platform"] == "tpu")
    return TargetReport(
        **contract_fields(hlo, sizes, costs.certain.flops),
        work=costs.certain,
        loop_work=costs.per_turn,
        kernels=costs.kernels,
        uncounted_loops=costs.uncounted_loops,
        peak_bytes=peak,
        hlo=hlo,
        **facts,
    )


def _lines(work: Work) -> list[str]:
    by_op = ", ".join(f"{name} {flops:,}" for name, flops in work.flops_by_op[:_SHOWN])
    lines = [
        f"products      {work.flops:,} flops" + (f": {by_op}" if by_op else ""),
        f"traffic       {work.bytes_accessed:,} B to and from memory, {work.collective_bytes:,} B into collectives",
        f"by index      {work.gathers} gathers, {work.scatters} scatters",
    ]
    if work.cycles is not None:
        lines.append(f"cycles        {work.cycles:,} priced")
        lines += [f"  {cycles:>12,}  {scope}" for scope, cycles in work.scope_cycles[:_SHOWN]]
        left = work.scope_cycles[_SHOWN:]
        if left:
            lines.append(f"  {sum(cycles for _, cycles in left):>12,}  in {len(left)} more scopes")
        lines.append("  not priced: " + (", ".join(f"{n} x {name}" for name, n in work.unpriced[:_SHOWN]) or "nothing"))
    return lines


def _kernel(kernel: Kernel) -> str:
    flops = "no flops declared" if kernel.flops is None else f"{kernel.flops:,} flops declared"
    turn = " in a turn of a loop of unknown length" if kernel.in_uncounted_loop else ""
    return f"{kernel.executions} x {kernel.name} ({kernel.target}){turn}, {flops}"
