"""Times of the layer that a question asks about, on the devices that are here."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import moe_jax as moe
from moe_jax.errors import InvalidArgumentError
from moe_jax.hardware import Machine
from moe_jax.tools.bench.memory import free_bytes
from moe_jax.tools.bench.programs import PASSES, with_backward
from moe_jax.tools.bench.timing import seconds_of
from moe_jax.tools.planner.question import Question, machine_here

REPEATS = 5


def check_here(machine: Machine) -> None:
    """Raises unless the devices that are here are of the platform of ``machine``, so that times may be compared."""
    here = machine_here()
    if here.platform != machine.platform:
        raise InvalidArgumentError(
            f"--run times the layer on the devices that are here, of platform {here.platform!r}, and hardware="
            f"{machine.name!r} is of another; leave --run out, or give --hardware {here.name}"
        )


def why_not_here(question: Question, bytes_per_device: int) -> str | None:
    """Why the layer cannot run on the devices that are here; None if it can.

    ``bytes_per_device``: what the layer takes of each device at its largest moment.
    """
    needed, there = question.mesh.num_devices, len(jax.devices())
    if needed > there:
        return f"the mesh has {needed} devices and {there} are here"
    free = free_bytes()
    if free is not None and needed * bytes_per_device > free:
        return f"needs {needed * bytes_per_device / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free"
    return None


def time_layer(question: Question) -> dict[str, dict[str, Any]]:
    """By pass, the median of the seconds that the layer takes, all seconds, and what it ran on.

    Tokens are normally distributed, so that their routes are nearly even.
    """
    shape, moe_config = question.mesh, question.config.moe
    mesh = moe.make_mesh(ep=shape.ep, tp=shape.tp, nodes=shape.nodes, dp=shape.dp)
    plan = question.plan(mesh)
    init, apply = moe.moe_on_mesh(
        mesh, plan, question.config.router, **moe_config.parameters, weigh_inputs=moe_config.weigh_inputs
    )
    params = init(jax.random.key(0))
    tokens = NamedSharding(mesh, PartitionSpec(plan.token_axes))
    drawn = np.random.default_rng(0).normal(size=(plan.tokens_per_rank * mesh.size, plan.hidden))
    x = jax.device_put(drawn.astype(jnp.dtype(plan.dtype)), tokens)
    whole = with_backward(jax.checkpoint(apply) if question.terms.remat else apply)
    programs = {PASSES[0]: (jax.jit(apply), (params, x)), PASSES[1]: (jax.jit(whole), (params, x, x))}
    found = {}
    for pass_name in question.passes:
        program, arguments = programs[pass_name]
        call = functools.partial(_finished, program, arguments)
        call()  # this call compiles it, and fills the caches
        seconds = [seconds_of(call) for _ in range(REPEATS)]
        device = mesh.devices.flat[0].device_kind
        found[pass_name] = {"seconds": float(np.median(seconds)), "all_seconds": seconds, "device_kind": device}
    return found


def _finished(program: Callable, arguments: tuple[Any, ...]) -> Any:
    """Waits for the results of a program, and returns them."""
    return jax.block_until_ready(program(*arguments))
