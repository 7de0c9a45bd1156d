"""The sample of aclnnMoeDistributeDispatchV4: dispatch and combine on 8 ranks, the first of them for a shared expert.

Run: python examples/cann_dispatch_combine.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import aclnn

W, B, H, K, E = 8, 8, 7168, 3, 7  # epWorldSize, Bs, H, K, moeExpertNum
moe.emulate_devices(W)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=W)

SAME = dict(  # what dispatch and combine must agree on; groupEp is a mesh axis, and epRankId the index along it
    group_ep="ep", ep_world_size=W, group_tp="tp", tp_world_size=1, moe_expert_num=E, shared_expert_num=1,
    shared_expert_rank_num=1, global_bs=B * W, zero_expert_num=1, copy_expert_num=1, const_expert_num=1, product="a3",
)  # fmt: skip


def rank(x, expert_ids, expert_scales, ori_x, alpha, v):
    """What the thread of one rank does. First phases look at shapes alone: they run once, as the program is traced."""
    arrays = dict(x=x, expert_ids=expert_ids, expert_scales=expert_scales)
    _, dispatch = aclnn.moe_distribute_dispatch_v4_get_workspace_size(**arrays, **SAME, expert_token_nums_type=1)
    sent = dispatch(**arrays)  # the other result is the bytes of the workspace, which JAX allocates; no stream either

    arrays = dict(
        expand_x=sent.expand_x,  # an FFN would come here, driven by sent.expert_token_nums
        expert_ids=expert_ids,
        assist_info_for_combine=sent.assist_info_for_combine,
        ep_send_counts=sent.ep_recv_counts,
        expert_scales=expert_scales,
        ori_x=ori_x,
        const_expert_alpha_1=alpha,
        const_expert_alpha_2=alpha,
        const_expert_v=v,
    )
    _, combine = aclnn.moe_distribute_combine_v4_get_workspace_size(**arrays, **SAME, group_list_type=1)
    return sent, combine(**arrays).x_out


ranks = P("ep")
run = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=(ranks, ranks, ranks, ranks, P(), P()), out_specs=ranks))


def sample(pattern):
    """The sample's arrays of all ranks, every number of x and oriX having these 16 bits."""
    x = np.full((W * B, H), pattern, np.int16).view(jnp.bfloat16)
    expert_ids = np.tile(np.arange(K, dtype=np.int32), (W * B, 1))
    expert_scales = np.full((W * B, K), 0.1, np.float32)
    return x, expert_ids, expert_scales, x, np.zeros(1, jnp.bfloat16), np.zeros((1, H), jnp.bfloat16)


sent, x_out = jax.tree.map(np.asarray, run(*sample(1)))

# Ranks 0 to 3 hold the shared expert and experts 0, 1, 2: a row from each token. A = 64 rows everywhere; the rest is 0.
rows = np.where(np.arange(W) < 4, W * B, 0)
np.testing.assert_array_equal(sent.expert_token_nums, rows)
np.testing.assert_array_equal(sent.ep_recv_counts.reshape(W, W), rows[:, None] // W * np.arange(1, W + 1))
bits = sent.expand_x.view(np.int16).reshape(W, W * B, H)
assert (bits == (rows > 0)[:, None, None]).all()
triples = sent.assist_info_for_combine.reshape(W, W * B * 128)[:, : 3 * W * B].reshape(W, W * B, 3)
j = np.arange(W * B)
for r, k in enumerate((3, 0, 1, 2)):  # k = K + s marks the copy for shared expert s
    np.testing.assert_array_equal(triples[r], np.stack([j // B, j % B, np.full(W * B, k)], axis=1))
assert not triples[4:].any()

# xOut = 0.1x + 0.1x + 0.1x + x, rounded to bf16. Pattern 1 is x = 2^-133, where bf16 has steps of 2^-133: 1.3 steps are
# pattern 1 again. But 2^-133 is subnormal in fp32 too, and XLA takes such numbers for zero in sums on some devices, on
# CPUs among them. Everywhere x = 1 gives 1.3, rounded to steps of 2^-7; times 2^-133 on the host that is the sample's.
keeps_subnormals = jax.jit(lambda a: a * 0.5)(np.float32(2.0**-133)) > 0
assert (x_out.view(np.int16) == (1 if keeps_subnormals else 0)).all()
_, x_out = run(*sample(0x3F80))  # x = 1, the sample's x times 2^133
x_out = np.asarray(x_out, np.float64)
assert (x_out == 1.296875).all()
assert ((x_out * 2.0**-133).astype(jnp.bfloat16).view(np.int16) == 1).all()
print(f"dispatch V4, combine V4: {sent.expert_token_nums} rows per rank, xOut = 1.3 x to bf16's rounding")
