"""The sample of aclnnGroupedMatMulAlltoAllv: 8 ranks with 4 experts each multiply and send, in fp16.

By default with 1/4 of the sample's tokens and 1/16 of its columns. --full is the sample itself: 5.8 TFLOP, and 7 GB of
memory where one machine holds all 8 ranks.

Run: python examples/cann_grouped_matmul_all_to_allv.py
"""

import sys

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import aclnn

full = "--full" in sys.argv
W, e, H, K = 8, 4, 7168, 2  # EP_WORLD_SIZE, e, H, K; with less than H columns the products would be others
BS, N = (4096, 4096) if full else (1024, 256)  # fewer tokens are refused: A3 wants at least 2 MB for each peer
A = BS * K
moe.emulate_devices(W)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=W)

counts = [A // (W * e)] * (W * e)  # the same list on every rank, so it holds for all; else a table with a row per rank


def rank(arrays):
    """What the thread of one rank does."""
    arrays = {name: array[0] for name, array in arrays.items()}
    _, run = aclnn.grouped_mat_mul_allto_allv_get_workspace_size(
        **arrays, group="ep", ep_world_size=W, send_counts=counts, recv_counts=counts, product="a3"
    )
    return run(**arrays)


def of_all_ranks(step, *shape):
    """[W, ...] fp16 whose 16 bits are (rank + 1) * step."""
    number = (np.arange(1, W + 1, dtype=np.uint16) * step).view(np.float16)
    return np.broadcast_to(number.reshape(W, *(1 for _ in shape)), (W, *shape))


arrays = {
    "gmm_x": of_all_ranks(1024, A, H),  # rows by (expert, destination)
    "gmm_weight": of_all_ranks(512, e, H, N),
    "mm_x": of_all_ranks(1024, BS, H),
    "mm_weight": of_all_ranks(512, H, N),
}
out = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))(arrays)

# 7168 * x * w of each rank; exact in fp16, the first two as subnormals.
significands = np.array([224, 896, 2688, 7168, 10752, 7168, 10752, 7168])
table = significands * 2.0 ** -np.array([24, 24, 24, 24, 23, 21, 20, 18])
y, mm_y = np.asarray(out.y).reshape(W, W, A // W, N), np.asarray(out.mm_y).reshape(W, BS, N)
assert (y == table[:, None, None]).all()  # on every rank the same: the rows of rank 0, of rank 1, ...
assert (mm_y == table[:, None, None]).all()  # rank r's own number
scale = "full size" if full else f"{4096 // BS} x fewer tokens and {4096 // N} x fewer columns than the sample"
print(f"grouped matmul, all-to-allv: y and mmY exact from {table[0]:.4g} to {table[-1]:.4g}, {scale}")
