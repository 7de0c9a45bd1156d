"""Builders for ``compile_for``, which imports them by name in the process that compiles."""

import functools
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax.kernels import table
from moe_jax.layer import grouping
from moe_jax.layer.experts import activate, project_in, project_out
from moe_jax.layer.params import param_spec
from moe_jax.parameters import rows_of
from moe_jax.transports import InboxOrder

SIZES = {"tokens_per_rank": 64, "hidden": 128, "num_experts": 16, "top_k": 2, "dtype": "bfloat16"}
FFN = 128
WEIGHTS = {row.name for row in rows_of("experts")}


def layer(devices, gradient, backend="auto"):
    """The layer in bf16 over all devices, or its gradient in all weights and x."""
    mesh = moe.make_mesh(ep=len(devices), devices=devices)
    plan = moe.make_plan(mesh, **SIZES, backend=backend, transport="padded")
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=FFN)

    def placed(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = {
        name: placed(a.shape, plan.dtype if name in WEIGHTS else a.dtype, param_spec(name, plan))
        for name, a in jax.eval_shape(init, jax.random.key(0)).items()
    }
    x = placed((plan.tokens_per_rank * mesh.size, plan.hidden), plan.dtype, P(plan.token_axes))
    grad = jax.grad(lambda params, x: jnp.sum(apply(params, x)[0].astype(jnp.float32)), (0, 1))
    return (grad if gradient else apply), (params, x)


def experts(devices, rows, hidden, ffn, groups, dtype="bfloat16"):
    """SwiGLU experts of grouped rows on one device, by what a plan takes for it: the result, and all gradients."""
    device = devices[0]
    kernels = table.registrations(table.resolve_all(device.platform, device.device_kind))

    def train(weights, x, group_sizes, ct):
        def forward(weights, x):
            hidden = activate(*project_in(weights, x, group_sizes, kernels), "swiglu")
            return project_out(weights, hidden, group_sizes, kernels)

        out, pull = jax.vjp(forward, weights, x)
        return out, pull(ct)

    def placed(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    shapes = {"w_gate": (hidden, ffn), "w_up": (hidden, ffn), "w_down": (ffn, hidden)}
    weights = {name: placed(groups, *shape) for name, shape in shapes.items()}
    return train, (weights, placed(rows, hidden), placed(groups, dtype="int32"), placed(rows, hidden))


def slots(devices, rows, hidden, ffn, groups, gradient, dtype="bfloat16"):
    """Experts of rows that lie in slots on one device, forward, or with all gradients, by what a plan takes for it."""
    device = devices[0]
    mesh = moe.make_mesh(ep=1, devices=devices[:1])
    plan = moe.make_plan(mesh, tokens_per_rank=rows, hidden=hidden, num_experts=groups, top_k=1, dtype=dtype)
    forward = functools.partial(grouping.expert_slots, plan, "swiglu")

    def train(experts, arrived, order, group_sizes, ct):
        out, pull = jax.vjp(lambda *floats: forward(*floats, order, group_sizes), experts, arrived)
        return out, pull(ct)

    def placed(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    shapes = {"w_gate": (hidden, ffn), "w_up": (hidden, ffn), "w_down": (ffn, hidden)}
    experts = {name: placed(groups, *shape) for name, shape in shapes.items()}
    order = InboxOrder(placed(rows, dtype="int32"), placed(rows, dtype="int32"))
    operands = (experts, placed(rows, hidden), order, placed(groups, dtype="int32"))
    return (train, (*operands, placed(rows, hidden))) if gradient else (forward, operands)


def products(devices, rows, hidden, columns, groups, dtype, backend="auto"):
    """On each device a grouped product, and its gradients, by the back end of a plan for these devices."""
    mesh = moe.make_mesh(ep=len(devices), devices=devices)
    plan = moe.make_plan(
        mesh, tokens_per_rank=rows, hidden=hidden, num_experts=groups * len(devices), top_k=1, backend=backend
    )

    def shard(lhs, rhs, group_sizes, ct):
        product = functools.partial(moe.grouped_matmul, group_sizes=group_sizes, backend=plan.backend)
        out, pullback = jax.vjp(product, lhs, rhs)
        return out, *pullback(ct)

    run = jax.shard_map(shard, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    shapes = [
        ((rows, hidden), dtype),
        ((groups, hidden, columns), dtype),
        ((groups,), "int32"),
        ((rows, columns), dtype),
    ]
    here = NamedSharding(mesh, P("ep"))
    args = [jax.ShapeDtypeStruct((len(devices) * shape[0], *shape[1:]), kind, sharding=here) for shape, kind in shapes]
    return jax.jit(run), args


def refused(devices):
    raise moe.errors.MeshError(f"{len(devices)} devices are too few")


def nothing(devices):
    return devices


def slow(devices):
    time.sleep(60)
