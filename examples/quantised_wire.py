"""A layer whose rows travel as int8: what that saves, and its result and gradient beside the float64 oracle.

Run: python examples/quantised_wire.py
"""

import jax
import numpy as np

import moe_jax as moe

moe.emulate_devices(4)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=4)
T, H, F, E, K = 8, 128, 32, 8, 2
N, router, sizes = T * mesh.size, moe.RouterConfig(), dict(tokens_per_rank=T, hidden=H, num_experts=E, top_k=K)
for recipe in ("none", "int8", "fp8_e4m3", "mx_e2m1"):
    plan = moe.make_plan(mesh, **sizes, dtype="float32", transport="padded", quant=recipe, combine_quant=recipe)
    print(f"{recipe:8}  {plan.cost(F)['forward'].wire_bytes:6,} bytes leave each device")

plan = moe.make_plan(mesh, **sizes, dtype="float32", transport="padded", quant="int8")
_, apply = moe.moe_on_mesh(mesh, plan, router, ffn=F)
rng = np.random.default_rng(0)
shapes = {"router": (H, E), "w_gate": (E, H, F), "w_up": (E, H, F), "w_down": (E, F, H)}
params = {name: rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[-2]) for name, shape in shapes.items()}
x, ct = (rng.normal(size=(N, H)).astype(np.float32) for _ in range(2))


@jax.jit
def forward_and_backward(x, ct):
    y, pull_back = jax.vjp(lambda x: apply(params, x)[0], x)
    return y, *pull_back(ct)


y, d_x = forward_and_backward(x, ct)
# Experts see what int8 makes of a row, and the router sees the row. The gradient takes rounding for the identity.
codes, scales = moe.reference.quant.quantize("int8", x)
seen = moe.reference.quant.dequantize("int8", codes, scales)
want, _ = moe.reference.moe_layer(params, seen, router, top_k=K, router_x=x)
_, both = moe.reference.moe_layer_vjp(params, seen, ct, router, top_k=K, router_x=x)
for made, right in ((y, want), (d_x, both[:, :H] + both[:, H:])):
    np.testing.assert_allclose(made, right, rtol=0, atol=1e-5 * np.abs(right).max())
truth, _ = moe.reference.moe_layer(params, x, router, top_k=K)
print(
    f"int8: y and its gradient are the oracle's; y is {np.abs(y - truth).max() / np.abs(truth).max():.1e} from fp32's"
)
