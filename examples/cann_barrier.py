"""The sample of aclnnDistributeBarrier: a barrier between dispatch and combine, on 8 x 2 ranks.

Run: python examples/cann_barrier.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import aclnn

W, T, B, H, K, E = 8, 2, 8, 7168, 3, 7  # epWorldSize, tpWorldSize, Bs, H, K, moeExpertNum
moe.emulate_devices(W * T)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=W, tp=T)

SAME = dict(  # in the sample's order, but for the rank ids, which are the indices along the axes
    group_ep="ep", ep_world_size=W, moe_expert_num=E, group_tp="tp", tp_world_size=T, expert_shard_type=0,
    shared_expert_num=1, shared_expert_rank_num=1, global_bs=B * W, comm_alg=None, product="a3",
)  # fmt: skip


def rank(x, expert_ids, expert_scales):
    """What the thread of one rank does."""
    arrays = dict(x=x, expert_ids=expert_ids, expert_scales=expert_scales)
    _, dispatch = aclnn.moe_distribute_dispatch_v2_get_workspace_size(
        **arrays, **SAME, quant_mode=0, expert_token_nums_type=1
    )
    sent = dispatch(**arrays)

    # Nobody goes on before all 8 ranks of the ep axis have their rows. The barrier returns its argument, and only what
    # is computed from the result waits: there are no streams. It needs no group of its own here, as it does on CANN.
    _, barrier = aclnn.distribute_barrier_get_workspace_size(sent.expand_x, group="ep", world_size=W, product="a3")
    expand_x = barrier(x_ref=sent.expand_x)

    arrays = dict(
        expand_x=expand_x,
        expert_ids=expert_ids,
        assist_info_for_combine=sent.assist_info_for_combine,
        ep_send_counts=sent.ep_recv_counts,
        expert_scales=expert_scales,
        tp_send_counts=sent.tp_recv_counts,
    )
    _, combine = aclnn.moe_distribute_combine_v2_get_workspace_size(
        **arrays, **SAME, out_dtype=0, comm_quant_mode=0, group_list_type=1
    )
    return sent, expand_x, combine(**arrays).x_out


ranks = P(("ep", "tp"))
run = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=ranks, out_specs=ranks))


def sample(pattern):
    """The sample's arrays of all ranks, every number of x having these 16 bits."""
    x = np.full((W * T * B, H), pattern, np.int16).view(jnp.bfloat16)
    expert_ids = np.tile(np.arange(K, dtype=np.int32), (W * T * B, 1))
    return x, expert_ids, np.full((W * T * B, K), 0.1, np.float32)


sent, expand_x, tiny = jax.tree.map(np.asarray, run(*sample(1)))

# The shared expert on rank 0 and experts 0, 1, 2 behind it: 64 rows of the own tp rank, 64 of the other one.
rows = np.where(np.arange(W) < 4, W * B, 0)[:, None] * np.ones(T, int)  # [W, T]
np.testing.assert_array_equal(sent.tp_recv_counts.reshape(W, T, T), rows[..., None] * np.ones(T, int))
np.testing.assert_array_equal(sent.expert_token_nums.reshape(W, T), 2 * rows)
assert (sent.expand_x.view(np.int16).reshape(W, T, -1, H) == (rows > 0)[..., None, None]).all()
np.testing.assert_array_equal(expand_x.view(np.int16), sent.expand_x.view(np.int16))  # bit for bit

# Combine adds the rows of both tp ranks: xOut = 0.1 * 2x * 3 + 2x = 2.6x, here with x = 1.
x_out = np.asarray(run(*sample(0x3F80))[2], np.float64)
assert (x_out == 2.59375).all()  # 2.6 in bf16
# The sample's own x is 2^-133, subnormal in fp32, and there XLA takes sums of such numbers for zero on some devices.
# Where it does not, 2.6 steps of 2^-133 are pattern 3: the same as 2^-133 times the result above, rounded to bf16.
keeps_subnormals = jax.jit(lambda a: a * 0.5)(np.float32(2.0**-133)) > 0
assert (tiny.view(np.int16) == (3 if keeps_subnormals else 0)).all()
assert ((x_out * 2.0**-133).astype(jnp.bfloat16).view(np.int16) == 3).all()
print("dispatch, barrier, combine: 64 + 64 rows on ranks 0 to 3, the same before and after, xOut = 2.6 x")
