"""moe_jax.ragged_all_to_all in place of jax.lax.ragged_all_to_all: the same call, on any device, and both gradients.

Every rank sends each other rank some rows, and the gradient flows back the same way.
Run: python examples/drop_in_ragged_all_to_all.py
"""

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import moe_jax as moe

moe.emulate_devices(4)  # leave this out where there are accelerators
mesh = moe.make_mesh(ep=4)
W, H = 4, 8
send = np.array([[3, 0, 2, 1], [1, 1, 0, 4], [0, 5, 1, 0], [2, 0, 0, 4]], np.int32)  # [from, to]
starts = np.cumsum(send, axis=1) - send  # of each slice, in what its sender has
lands = np.cumsum(send, axis=0) - send  # of each slice, in what its receiver gets
N, M = 6, 12  # rows that a rank has room for, to send and to receive


def exchange(operand, output, starts, send, lands, received):  # one device's part
    integers = starts.reshape(-1), send.reshape(-1), lands.reshape(-1), received.reshape(-1)
    return moe.ragged_all_to_all(operand, output, *integers, axis_name="ep")  # was: jax.lax.ragged_all_to_all


run = jax.shard_map(exchange, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
integers = starts, send, lands, send.T
rng = np.random.default_rng(0)
operand, output, ct = (rng.integers(-9, 10, (W * n, H)).astype(np.float32) for n in (N, M, M))


@jax.jit
def both(operand, output, ct):
    result, pull_back = jax.vjp(lambda operand, output: run(operand, output, *integers), operand, output)
    return result, *pull_back(ct)


result, d_operand, d_output = (np.asarray(a).reshape(W, -1, H) for a in both(operand, output, ct))
operand, output, ct = (list(a.reshape(W, -1, H)) for a in (operand, output, ct))  # by rank
want = moe.reference.ragged_all_to_all(operand, output, *integers)
want_operand, want_output = moe.reference.ragged_all_to_all_vjp(ct, operand, *integers)
for made, right in ((result, want), (d_operand, want_operand), (d_output, want_output)):
    np.testing.assert_array_equal(made, right)
print(f"{send.sum()} rows between {W} ranks on {jax.devices()[0].platform}: they and both gradients are right")
