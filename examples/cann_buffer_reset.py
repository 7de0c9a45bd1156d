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

SAME = dict(group_ep="ep", ep_world_size=W, moe_expert_num=W, global_bs=B * W, product="a3")


def rank(x, expert_ids, elastic_info, rank_table):
    """What one rank does. CANN's window hides in the communicator; here it is a value that goes in and comes out."""
    arrays = dict(x=x, expert_ids=expert_ids)
    arrays["window"] = aclnn.make_receive_window(**arrays, **SAME)
    _, dispatch = aclnn.moe_distribute_dispatch_v3_get_workspace_size(**arrays, **SAME)
    used = dispatch(**arrays).window

    # elasticInfo of this operator is a mask: 1 = the links to that rank are good. needSync: leave together.
    arrays = dict(elastic_info=elastic_info, window=used)
    _, reset = aclnn.moe_distribute_buffer_reset_get_workspace_size(
        **arrays, group_ep="ep", ep_world_size=W, need_sync=1, product="a3"
    )
    clean = reset(**arrays)

    # elasticInfo of dispatch, V3's on A3, is a rank table instead. Both are data: losing a rank compiles nothing again.
    arrays = dict(x=x, expert_ids=expert_ids, elastic_info=rank_table, window=clean)
    _, dispatch = aclnn.moe_distribute_dispatch_v3_get_workspace_size(**arrays, **SAME)
    return used, clean, dispatch(**arrays)


ranks = P("ep")
run = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=(ranks, ranks, P(), P()), out_specs=ranks))

x = np.full((W * B, H), 1, np.int16).view(jnp.bfloat16)  # pattern 1, as in the samples of the other documents
expert_ids = np.arange(W * B, dtype=np.int32)[:, None] % (W - 1)  # legal before and after: 15 experts are left
alive = np.arange(W) != LOST
table = moe.make_rank_table(W, alive, num_experts=W)
used, clean, survived = jax.tree.map(np.asarray, run(x, expert_ids, alive.astype(np.int32), table))


def rows_in(window):
    """[W] rows that lie in each rank's window, by what it says of each source."""
    return window.counts.reshape(W, W).sum(axis=1)


before = np.bincount(expert_ids.ravel(), minlength=W)
np.testing.assert_array_equal(rows_in(used), before)
np.testing.assert_array_equal(rows_in(clean), np.where(alive, 0, before))  # the lost rank's window is as it was
np.testing.assert_array_equal(clean.step, np.where(alive, 0, 1))
memory, old = (window.data.reshape(W, -1) for window in (clean, used))
assert not memory[alive].any() and (memory[LOST] == old[LOST]).all() and old[LOST].any()

# Logical ranks 0 .. 14 are the survivors in order; the lost rank sends nothing, and nothing is sent to it.
after = np.zeros(W, int)
after[alive] = np.bincount(expert_ids.reshape(W, B)[alive].ravel(), minlength=W - 1)
np.testing.assert_array_equal(rows_in(survived.window), after)
np.testing.assert_array_equal(survived.expert_token_nums, after)
assert not survived.num_stale.any()  # nobody waits for a rank that has missed the reset
messages = survived.window.data.reshape(W, -1, 2 * H + 12)  # of a row: its values, then source, token and k
sources = messages[alive][..., 2 * H : 2 * H + 4].copy().view(np.int32)
assert sources.max() < W - 1 and not survived.window.counts.reshape(W, W)[:, LOST].any()
print(f"buffer reset: {alive.sum()} of {W} windows cleaned, all but that of rank {LOST}; then {after.sum()} rows")
