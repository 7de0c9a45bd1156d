"""What the compiler of the machine makes of the layer that a question asks about."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

import moe_jax as moe
from moe_jax import _compat
from moe_jax.errors import UnsupportedError
from moe_jax.hardware import GPUS, MACHINES, TPUS, Machine
from moe_jax.layer.experts import is_gated
from moe_jax.targets.target import Target, find_target, name_target
from moe_jax.tools.bench.programs import PASSES, with_backward
from moe_jax.tools.planner.figures import check_fits
from moe_jax.tools.planner.question import Question


def find_compiler(machine: Machine, num_devices: int) -> Target:
    """The target of ``compile_for`` for so many devices of ``machine``.

    Raises:
      UnsupportedError: no compiler for such a machine is known, or it is not installed.
      InvalidArgumentError: there is no target of so many devices.
    """
    # For a machine of the user's own that takes its kinds from a listed one, programs are compiled as for that one.
    known = [name for name in ("cpu", *GPUS, *TPUS) if set(MACHINES[name].kinds) & set(machine.kinds)]
    if not known:
        raise UnsupportedError(
            f"no compiler is known for hardware={machine.name!r}, only for cpu, {', '.join([*GPUS, *TPUS])}; "
            "leave --compile out"
        )
    target = find_target(name_target(machine.name if machine.name in known else known[0], num_devices))
    target.check_installed()
    return target


def compile_layer(question: Question, target: Target) -> dict[str, dict[str, Any]]:
    """By pass, what the compiler of ``target`` says of the layer, per device: bytes, flops, and how long it took.

    ``flops`` are None on CPUs, where products are loops of unknown length. Elsewhere kernels declare what full buffers
    take, and the slack of buffers is subtracted. ``memory_bytes`` are the bytes of arguments, results and temporaries;
    on TPUs they are the peak that the compiler reports, since it spreads temporaries over more memory than they need.
    ``cycles`` are the TPU compiler's own estimates, None elsewhere.

    Raises:
      MemoryLimitError: one layer does not fit a device; the compiler is not asked then.
      CompilationError: the compiler refuses the layer.
    """
    plan, moe_config = question.plan(), question.config.moe
    check_fits(question, plan)
    of_row = 2 * (3 if is_gated(moe_config.activation) else 2) * plan.hidden * moe_config.ffn // plan.tp_size
    found = {}
    for pass_name in question.passes:
        report = moe.compile_for(target.name, f"{__name__}:build", question, pass_name)
        held = report.argument_bytes + report.output_bytes + report.temporary_bytes
        slack = plan.num_rows(plan.pair_capacity) - plan.num_pairs * plan.tp_size if plan.exchanges else 0
        flops = report.work.flops - slack * of_row * (1 if pass_name == PASSES[0] else 3)
        found[pass_name] = {
            "target": target.name,
            "compiler": report.compiler,
            "flops": None if report.platform == "cpu" else flops,
            "traffic_bytes": report.bytes_accessed,
            "wire_bytes": report.inline_wire_bytes,
            "argument_bytes": report.argument_bytes,
            "output_bytes": report.output_bytes,
            "temporary_bytes": report.temporary_bytes,
            "memory_bytes": report.peak_bytes if report.platform == "tpu" else held,
            "cycles": report.cycles,
            "compile_seconds": report.compile_seconds,
        }
    return found


def build(devices: Sequence[_compat.Device], question: Question, pass_name: str) -> tuple[Callable, tuple[Any, ...]]:
    """The builder for ``compile_for``: the layer over all devices of the target, and its arguments in fp32."""
    shape, moe_config = question.mesh, question.config.moe
    mesh = moe.make_mesh(ep=shape.ep, tp=shape.tp, nodes=shape.nodes, dp=shape.dp, devices=devices)
    plan, router = question.plan(mesh), question.config.router
    params = moe.abstract_params(mesh, plan, router, **moe_config.parameters)
    tokens = NamedSharding(mesh, PartitionSpec(plan.token_axes))
    x = jax.ShapeDtypeStruct((plan.tokens_per_rank * mesh.size, plan.hidden), plan.dtype, sharding=tokens)
    options = {**moe_config.parameters, "weigh_inputs": moe_config.weigh_inputs}
    apply = moe.moe_on_mesh(mesh, plan, router, **options)[1]
    if pass_name == PASSES[0]:
        return apply, (params, x)
    return with_backward(jax.checkpoint(apply) if question.terms.remat else apply), (params, x, x)
