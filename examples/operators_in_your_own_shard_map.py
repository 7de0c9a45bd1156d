"""dispatch -> grouped matmuls -> combine inside one's own shard_map, with hand-made routes and a mask.

Run: python examples/operators_in_your_own_shard_map.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import moe_jax as moe

moe.emulate_devices(8)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=4, tp=2)
T, H, F, E, K = 6, 8, 16, 8, 2
plan = moe.make_plan(mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32")


def shard(x, expert_ids, weights, mask, w_up, w_down):
    sent = moe.dispatch(x, expert_ids, plan, token_mask=mask)  # rows of my experts, expert by expert
    hidden = jax.nn.relu(moe.grouped_matmul(sent.x, w_up, sent.group_sizes))
    rows = moe.grouped_matmul(hidden, w_down, sent.group_sizes)  # partial sums: this tp rank's half of F
    return moe.combine(rows, weights, sent.handle)  # added over tp, returned, weighted


tokens = P(("ep", "tp"))
run = jax.jit(
    jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, tokens, P("ep", None, "tp"), P("ep", "tp", None)),
        out_specs=tokens,
    )
)

N = T * mesh.size
keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (N, H))
w_up, w_down = jax.random.normal(keys[1], (E, H, F)), jax.random.normal(keys[2], (E, F, H))
expert_ids = (jnp.arange(N * K, dtype=jnp.int32) % E).reshape(N, K)
weights = jnp.full((N, K), 0.5)
mask = jnp.arange(N) % 3 != 0  # every third token is padding

y = run(x, expert_ids, weights, mask, w_up, w_down)
dense = sum(
    0.5 * jnp.einsum("nf,nfh->nh", jax.nn.relu(jnp.einsum("nh,nhf->nf", x, w_up[ids])), w_down[ids])
    for ids in expert_ids.T
)
np.testing.assert_allclose(y, jnp.where(mask[:, None], dense, 0.0), rtol=1e-4, atol=1e-4)

gradient = jax.grad(lambda x: jnp.sum(run(x, expert_ids, weights, mask, w_up, w_down) ** 2))(x)
print(f"{N} tokens through {E} experts on {dict(mesh.shape)}: equal to the dense computation")
print(f"gradient of a masked token: {jnp.abs(gradient[0]).max():.1f}, of the next: {jnp.abs(gradient[1]).max():.1f}")
