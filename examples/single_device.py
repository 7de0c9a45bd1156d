"""The layer on one device, where nothing is exchanged: its result and all gradients, beside the float64 oracle.

Run: python examples/single_device.py
"""

import jax
import jax.numpy as jnp
import numpy as np

import moe_jax as moe

T, H, F, E, K = 24, 16, 32, 8, 2
mesh = moe.make_mesh()  # the first device
plan = moe.make_plan(mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32")
router = moe.RouterConfig(score="sigmoid", scale=2.0)
init, apply = moe.moe_on_mesh(mesh, plan, router, ffn=F)
params = init(jax.random.key(0))
x, ct = jax.random.normal(jax.random.key(1), (2, T, H))


@jax.jit
def forward_and_backward(params, x, ct):
    def loss(params, x):
        y, stats = apply(params, x)
        return jnp.vdot(y, ct), (y, stats)

    (_, (y, stats)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, stats, gradients


y, stats, (d_params, d_x) = forward_and_backward(params, x, ct)
params, x, ct = jax.tree.map(np.asarray, (params, x, ct))
want, routing = moe.reference.moe_layer(params, x, router, top_k=K)
want_params, want_x = moe.reference.moe_layer_vjp(params, x, ct, router, top_k=K)
for name, made, right in [("y", y, want), ("x", d_x, want_x), *((n, d_params[n], want_params[n]) for n in params)]:
    np.testing.assert_allclose(made, right, rtol=0, atol=1e-5 * np.abs(right).max(), err_msg=name)
np.testing.assert_array_equal(stats.load, routing.load)
print(
    f"{T} tokens, {E} experts, {stats.num_rounds} round: y and the gradients of x and {len(params)} weights are right"
)
