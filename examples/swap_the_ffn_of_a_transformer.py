"""A transformer in flax nnx, whose feed-forward layers become Mixture-of-Experts on a mesh of data x expert.

The transformer knows nothing of experts, and not a line of it changes. It needs flax (the extra "nnx") and optax.

Run: python examples/swap_the_ffn_of_a_transformer.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import moe_jax as moe
from moe_jax.interop.nnx import MoE

VOCAB, HIDDEN, LAYERS, BATCH, LENGTH = 16, 32, 2, 8, 16


# 1. The transformer as it was.


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention_norm = nnx.RMSNorm(HIDDEN, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, HIDDEN, decode=False, rngs=rngs)
        self.ffn_norm = nnx.RMSNorm(HIDDEN, rngs=rngs)
        self.ffn = nnx.Sequential(
            nnx.Linear(HIDDEN, 4 * HIDDEN, rngs=rngs), nnx.gelu, nnx.Linear(4 * HIDDEN, HIDDEN, rngs=rngs)
        )

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(VOCAB, HIDDEN, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(HIDDEN, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x))


# 2. The swap: a module that takes and returns what the old one did, and leaves its balance loss where nnx.capture finds
#    it; a mesh and a plan; and the assignment.


class Experts(MoE):
    def __call__(self, x):
        y, stats = super().__call__(x)
        self.sow(nnx.Intermediate, "balance", stats.losses["balance"])
        return y


moe.emulate_devices(8)  # leave this out where there are accelerators
mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
plan = moe.make_plan(
    mesh, tokens_per_rank=BATCH * LENGTH // 8, hidden=HIDDEN, num_experts=8, top_k=2, dtype="float32",
    ep_axis="expert", tp_axis=None, token_axes=("data", "expert"),
)  # fmt: skip
model = Transformer(nnx.Rngs(0))
for block in model.blocks:
    block.ffn = Experts(mesh, plan, moe.RouterConfig(), ffn=2 * HIDDEN, rngs=nnx.Rngs(1))

# 3. Training as it was, but for the balance loss.

optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def loss(model, tokens):
    logits, found = nnx.capture(model, nnx.Intermediate)(tokens[:, :-1])
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    return entropy + 0.01 * sum(jax.tree.leaves(found)), entropy


@nnx.jit
def step(model, optimizer, tokens):
    (_, entropy), grads = nnx.value_and_grad(loss, has_aux=True)(model, tokens)
    optimizer.update(model, grads)
    return entropy


# Every sequence counts upwards by a step of its own, so the next token is known after two of them.
start, stride = jax.random.randint(jax.random.key(2), (2, BATCH, 1), 0, VOCAB)
tokens = (start + stride * jnp.arange(LENGTH + 1)) % VOCAB
tokens = jax.device_put(tokens, jax.NamedSharding(mesh, jax.P(("data", "expert"))))
for i in range(30):
    entropy = step(model, optimizer, tokens)
    if i % 10 == 0 or i == 29:
        print(f"step {i:2d}  loss {entropy:.4f}")
print("w_up of the first block:", model.blocks[0].ffn.w_up[...].sharding.spec)
