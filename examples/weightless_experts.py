"""Zero, copy and constant experts in the router's choice: they cost no row, so easy tokens cost less.

Run: python examples/weightless_experts.py
"""

import jax
import numpy as np

import moe_jax as moe

moe.emulate_devices(4)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=4)
T, H, F, E, K = 8, 16, 32, 8, 3
plan = moe.make_plan(
    mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32",
    num_zero_experts=2, num_copy_experts=1, num_const_experts=1,  # ids 8 and 9, 10, 11
)  # fmt: skip
router = moe.RouterConfig(renormalize=False)
_, apply = moe.moe_on_mesh(mesh, plan, router, ffn=F)

rng = np.random.default_rng(0)
params = {  # what init would draw
    name: rng.normal(size=like.shape).astype(like.dtype) / np.sqrt(like.shape[-2])
    for name, like in moe.abstract_params(mesh, plan, router, ffn=F).items()
}
x = rng.normal(size=(T * mesh.size, H)).astype(np.float32)
y, stats = jax.jit(apply)(params, x)

constants = {name: params.pop(f"const_{name}") for name in ("alpha1", "alpha2", "v")}
special = moe.reference.WeightlessExperts(num_experts=E, num_zero=2, num_copy=1, num_const=1, **constants)
want, routing = moe.reference.moe_layer(params, x, router, top_k=K, special=special)
np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 * np.abs(want).max())
spared = int((routing.expert_ids >= E).sum())
print(f"{spared} of {routing.expert_ids.size} choices cost no row, and y is right")
