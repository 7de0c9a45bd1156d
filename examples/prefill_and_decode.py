"""One set of parameters for prompts and for single steps, in which sequences have ended: a plan for each.

Run: python examples/prefill_and_decode.py
"""

import jax
import numpy as np

import moe_jax as moe

moe.emulate_devices(4)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=4)
B, L, H, F, E, K = 6, 10, 16, 32, 8, 2
router = moe.RouterConfig()
sizes = dict(hidden=H, num_experts=E, top_k=K, dtype="float32")
prefill_plan = moe.make_plan(mesh, tokens_per_rank=B * L // mesh.size, **sizes)
decode_plan = moe.make_plan(mesh, tokens_per_rank=2, **sizes)  # room for 8 tokens in a step; 6 sequences run
_, prefill = moe.moe_on_mesh(mesh, prefill_plan, router, ffn=F)
_, decode = moe.moe_on_mesh(mesh, decode_plan, router, ffn=F)

rng = np.random.default_rng(0)
params = {  # what init would draw, or a checkpoint holds
    name: rng.normal(size=like.shape).astype(like.dtype) / np.sqrt(like.shape[-2])
    for name, like in moe.abstract_params(mesh, prefill_plan, router, ffn=F).items()
}
params = moe.place(params, mesh, prefill_plan)  # as both plans want it
x = rng.normal(size=(B, L + 1, H)).astype(np.float32)  # a prompt of length L and a token after it
running = np.arange(B) != 2  # the third sequence has ended: its token goes nowhere

y_prompt, _ = jax.jit(prefill)(params, x[:, :L])
y_step, stats = jax.jit(decode)(params, x[:, L:], running[:, None])

want, _ = moe.reference.moe_layer(jax.tree.map(np.asarray, params), x.reshape(-1, H), router, top_k=K)
want = want.reshape(x.shape)
np.testing.assert_allclose(y_prompt, want[:, :L], rtol=0, atol=1e-5)
np.testing.assert_allclose(y_step[:, 0], want[:, L] * running[:, None], rtol=0, atol=1e-5)
assert stats.load.sum() == K * running.sum()
print(f"{B} prompts of {L} tokens, then a step of {running.sum()} of them, with the same weights: both are right")
