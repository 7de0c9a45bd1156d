"""aclnnMoeDistributeBufferReset in a recovery: 16 ranks, the fewest that A3 takes, of which one is lost.

Its document has no sample. Run: python examples/cann_buffer_reset.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import aclnn

W, B, H, LOST = 16, 8, 7168, 5  # ranks, each with one expert; tokens of each; the rank that the others no longer reach
moe.emulate_devices(W)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=W)
plan = moe.make_plan(mesh, tokens_per_rank=B, hidden=H, num_experts=W, top_k=1, transport="padded")


def rank(x, expert_ids, elastic_info, rank_table):
    """What one rank does. CANN's window hides in the communicator; here it is a value that goes in and comes out."""
    used = moe.dispatch(x, expert_ids, plan, window=moe.make_receive_window(plan)).window

    # elasticInfo of this operator is a mask: 1 = the links to that rank are good. needSync: leave together.
    arrays = dict(elastic_info=elastic_info, window=used)
    _, reset = aclnn.moe_distribute_buffer_reset_get_workspace_size(
        **arrays, group_ep="ep", ep_world_size=W, need_sync=1, product="a3"
    )
    clean = reset(**arrays)

    # elasticInfo of dispatch is a rank table instead. Both are data: losing a rank compiles nothing again.
    survived = moe.dispatch(x, expert_ids, plan, window=clean, rank_table=rank_table)
    return used, clean, survived.window, survived.stats


ranks = P(("ep", "tp"))
run = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=(ranks, ranks, P(), P()), out_specs=ranks))

x = np.full((W * B, H), 1, np.int16).view(jnp.bfloat16)  # pattern 1, as in the samples of the other documents
expert_ids = np.arange(W * B, dtype=np.int32)[:, None] % (W - 1)  # legal before and after: 15 experts are left
alive = np.arange(W) != LOST
table = moe.make_rank_table(W, alive, num_experts=W)
used, clean, survived, stats = jax.tree.map(np.asarray, run(x, expert_ids, alive.astype(np.int32), table))


def rows_in(window):
    """[W] rows of pattern 1 that lie in each rank's window."""
    return (window.data.view(np.int16).reshape(W, -1, H) == 1).all(axis=-1).sum(axis=-1)


before = np.bincount(expert_ids.ravel(), minlength=W)
np.testing.assert_array_equal(rows_in(used), before)
np.testing.assert_array_equal(rows_in(clean), np.where(alive, 0, before))  # the lost rank's window is as it was
np.testing.assert_array_equal(clean.counts.reshape(W, W).sum(axis=1), np.where(alive, 0, before))
np.testing.assert_array_equal(clean.step, np.where(alive, 0, 1))
assert not clean.data.view(np.int16).reshape(W, -1)[alive].any()

# Logical ranks 0 .. 14 are the survivors in order; the lost rank sends nothing, and nothing is sent to it.
after = np.zeros(W, int)
after[alive] = np.bincount(expert_ids.reshape(W, B)[alive].ravel(), minlength=W - 1)
np.testing.assert_array_equal(rows_in(survived)[alive], after[alive])
np.testing.assert_array_equal(survived.counts.reshape(W, W).sum(axis=1), after)
assert not stats.num_stale.any()
print(f"buffer reset: {alive.sum()} of {W} windows cleaned, all but that of rank {LOST}; then {after.sum()} rows")
