"""The sample of aclnnMoeUpdateExpert: update expert, dispatch, and combine with add and RMSNorm, on 8 x 2 ranks.

Run: python examples/cann_update_expert.py
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import aclnn

W, T, B, H, K, E = 8, 2, 8, 7168, 3, 8  # epWorldSize, tpWorldSize, BS, H, K, moeExpertNum
moe.emulate_devices(W * T)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=W, tp=T)  # device = epRankId * T + tpRankId, as in the sample

SAME = dict(  # in the sample's order, but for the rank ids, which are the indices along the axes
    group_ep="ep", ep_world_size=W, moe_expert_num=E, group_tp="tp", tp_world_size=T, expert_shard_type=0,
    shared_expert_num=0, shared_expert_rank_num=0, global_bs=B * W, comm_alg=None, product="a3",
)  # fmt: skip


def rank(x, expert_ids, eplb_table, expert_scales, shared_expert_x, residual_x, gamma):
    """What the thread of one rank does."""
    arrays = dict(expert_ids=expert_ids, eplb_table=eplb_table)
    _, update = aclnn.moe_update_expert_get_workspace_size(
        **arrays, world_size=W, group_ep="ep", balance_mode=0, product="a3"
    )  # localRankId is the index along group_ep
    expert_ids = update(**arrays).balanced_expert_ids  # physical ids, for dispatch and for combine

    arrays = dict(x=x, expert_ids=expert_ids, expert_scales=expert_scales)
    _, dispatch = aclnn.moe_distribute_dispatch_v2_get_workspace_size(
        **arrays, **SAME, quant_mode=0, expert_token_nums_type=1
    )
    sent = dispatch(**arrays)

    arrays = dict(
        expand_x=sent.expand_x,
        expert_ids=expert_ids,
        assist_info_for_combine=sent.assist_info_for_combine,
        ep_send_counts=sent.ep_recv_counts,
        expert_scales=expert_scales,
        residual_x=residual_x,
        gamma=gamma,
        tp_send_counts=sent.tp_recv_counts,
        shared_expert_x=shared_expert_x,
    )
    _, combine = aclnn.moe_distribute_combine_add_rms_norm_get_workspace_size(
        **arrays, **SAME, out_dtype=0, comm_quant_mode=0, group_list_type=1, norm_eps=1e-6
    )
    return expert_ids, sent, combine(**arrays)


ranks = P(("ep", "tp"))
specs = (ranks, ranks, P(), ranks, ranks, ranks, P())
run = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=specs, out_specs=ranks))


def sample(pattern):
    """The sample's arrays of all ranks; these are the bits of every number of x, sharedExpertX, residualX and gamma."""
    x = np.full((W * T * B, H), pattern, np.int16).view(jnp.bfloat16)
    expert_ids = np.tile(np.arange(K, dtype=np.int32), (W * T * B, 1))
    eplb_table = np.stack([np.ones(E), np.arange(E)], axis=1).astype(np.int32)  # one instance each, on its own rank
    expert_scales = np.full((W * T * B, K), 0.1, np.float32)
    return x, expert_ids, eplb_table, expert_scales, x[:, None], x[:, None], x[0]


expert_ids, sent, tiny = jax.tree.map(np.asarray, run(*sample(1)))
np.testing.assert_array_equal(expert_ids, sample(1)[1])

# Experts 0, 1, 2 get a row from each of the 64 tokens of their tp lane, then those of the other lane: own rows first.
rows = np.where(np.arange(W) < K, W * B, 0)[:, None] * np.ones(T, int)  # [W, T]
np.testing.assert_array_equal(sent.tp_recv_counts.reshape(W, T, T), rows[..., None] * np.ones(T, int))
np.testing.assert_array_equal(sent.expert_token_nums.reshape(W, T), 2 * rows)
sums = rows[..., None, None] // W * np.arange(1, W + 1)  # each lane's start from its own 0
np.testing.assert_array_equal(sent.ep_recv_counts.reshape(W, T, T, W), np.broadcast_to(sums, (W, T, T, W)))
assert (sent.expand_x.view(np.int16).reshape(W, T, -1, H) == (rows > 0)[..., None, None]).all()

# Combine adds the rows of both lanes, so 2x comes back: xOut = 0.1 * 2x * 3 + x + x = 2.6x. With x = 1:
out = jax.tree.map(lambda a: np.asarray(a, np.float64), run(*sample(0x3F80))[2])
assert (out.x_out == 2.59375).all()  # 2.6 in bf16
np.testing.assert_allclose(out.rstd_out, 1 / np.sqrt(2.6**2 + 1e-6), rtol=1e-6)  # of the sum before it is rounded
assert (out.y_out == 1).all()  # RMSNorm of equal numbers; exact, as bf16 forgives the last bits of fp32
# The sample's own x is 2^-133, subnormal in fp32, and there XLA takes sums of such numbers for zero on some devices.
# Where it does not, 2.6 steps of 2^-133 are pattern 3. Squares underflow, so rstd is 1 / sqrt(eps), and y is zero.
keeps_subnormals = jax.jit(lambda a: a * 0.5)(np.float32(2.0**-133)) > 0
assert (tiny.x_out.view(np.int16) == (3 if keeps_subnormals else 0)).all()
np.testing.assert_allclose(tiny.rstd_out, 1000, rtol=1e-6)
assert not tiny.y_out.any()
print("update expert, dispatch, combine + RMSNorm: 64 + 64 rows for experts 0, 1, 2; xOut = 2.6 x, y = gamma")
