"""A Mixture-of-Experts layer in a jitted training step, over a mesh of 8 emulated devices.

Run: python examples/layer_in_a_training_step.py
"""

import jax
import jax.numpy as jnp

import moe_jax as moe

moe.emulate_devices(8)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=4, tp=2)
plan = moe.make_plan(mesh, tokens_per_rank=64, hidden=32, num_experts=16, top_k=2, dtype="float32")
init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=64)
print(plan.describe())


def loss(params, x, target):
    y, stats = apply(params, x)
    return jnp.mean((y - target) ** 2) + 0.01 * stats.losses["balance"], stats


@jax.jit
def step(params, x, target):
    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, x, target)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), value, stats


params = init(jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (64 * 8, 32))
target = jnp.roll(x, 1, axis=1)
for i in range(20):
    params, value, stats = step(params, x, target)
    if i % 5 == 0 or i == 19:
        print(f"step {i:2d}  loss {value:.4f}  rounds {stats.num_rounds}  dropped {stats.num_dropped}")
