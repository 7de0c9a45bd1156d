"""Experts that no layer of ours has, in a shard_map of one's own: one matrix for all, and a low-rank change for each.

Every token goes to the experts of one rank, which takes several rounds and no more memory than a balanced load.
Run: python examples/experts_of_your_own.py
"""

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import moe_jax as moe

moe.emulate_devices(4)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=4)
T, H, E, K, R = 8, 16, 8, 2, 2
plan = moe.make_plan(mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32", capacity_factor=1.0)


def experts(params, rows, group_sizes):  # rows lie expert after expert, group_sizes of them for each
    change = moe.grouped_matmul(moe.grouped_matmul(rows, params["down"], group_sizes), params["up"], group_sizes)
    return jax.nn.relu(rows @ params["shared"] + change)


def shard(params, x, expert_ids, weights):
    return moe.map_experts(experts, params, x, expert_ids, weights, plan)


tokens, by_expert = P(plan.token_axes), {"shared": P(), "down": P("ep"), "up": P("ep")}
run = jax.shard_map(shard, mesh=mesh, in_specs=(by_expert, tokens, tokens, tokens), out_specs=(tokens, P()))

N, rng = T * mesh.size, np.random.default_rng(0)
shapes = {"shared": (H, H), "down": (E, H, R), "up": (E, R, H)}
params = {name: rng.integers(-2, 3, shape).astype(np.float32) for name, shape in shapes.items()}
x, weights = (rng.integers(-2, 3, (N, width)).astype(np.float32) for width in (H, K))
expert_ids = rng.integers(0, 2, (N, K)).astype(np.int32)  # experts 0 and 1 are those of rank 0
y, stats = jax.jit(run)(params, x, expert_ids, weights)

matrices = params["shared"] + params["down"] @ params["up"]  # [E, H, H]; sums of whole numbers are exact
each = np.maximum(np.einsum("nh,nkhf->nkf", x, matrices[expert_ids]), 0)
np.testing.assert_array_equal(y, np.einsum("nk,nkf->nf", weights, each))
print(f"{N * K} pairs for rank 0 of {mesh.size}, in {stats.num_rounds} rounds, {stats.num_dropped} dropped: exact")
