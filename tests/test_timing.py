"""The timed exchange: the bits of lax.all_to_all, and the blame on the rank that was slow."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import behind, entry_graph, over_ep
from jax.sharding import PartitionSpec as P
from processes import run_processes

import moe_jax
from moe_jax import _compat, errors
from moe_jax.collectives import stopwatch
from moe_jax.collectives.stopwatch import timed_all_to_all
from moe_jax.tools.stragglers.faults import delayed
from moe_jax.transports import add_waited

W = 8


@functools.cache
def timed(slow=False, axes="ep", nodes=1):
    """The exchange of blocks [W, W, ...] of all ranks; ``slow`` adds an argument [W], seconds that a rank is late."""

    def run(blocks, seconds=None):
        return timed_all_to_all(delayed(blocks, seconds) if slow else blocks, axes)

    return jax.jit(over_ep(run, moe_jax.make_mesh(ep=W, nodes=nodes)))


@pytest.mark.quick("ep-1-float32", "ep-1-bool", "axes1-2-bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
@pytest.mark.parametrize("axes,nodes", [("ep", 1), (("node", "ep"), 2)])
def test_same_bits_as_all_to_all(axes, nodes, dtype):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2 if dtype == "bool" else 256, (W, W, 3, 4 * jnp.dtype(dtype).itemsize)).astype(np.uint8)
    blocks = bits.view(jnp.dtype(dtype))  # NaNs included
    got, microseconds = timed(axes=axes, nodes=nodes)(blocks)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.swapaxes(bits, 0, 1))
    assert microseconds.shape == (W, 2, W) and microseconds.dtype == jnp.int32
    assert (np.asarray(microseconds) >= 0).all() and not np.diagonal(microseconds, axis1=0, axis2=2).any()


def test_part_of_the_axes():
    """Each node is a group of its own."""
    blocks = np.arange(W * 4, dtype=np.float32).reshape(W, 4, 1)
    got, microseconds = timed(axes="ep", nodes=2)(blocks)
    np.testing.assert_array_equal(got, np.swapaxes(blocks.reshape(2, 4, 4, 1), 1, 2).reshape(W, 4, 1))
    assert microseconds.shape == (W, 2, 4)


def test_empty_blocks_and_one_rank():
    assert timed()(np.zeros((W, W, 0), np.float32))[0].shape == (W, W, 0)
    specs = {"in_specs": P("ep"), "out_specs": (P("ep"), P(("ep", "tp")))}
    alone = _compat.shard_map(lambda x: timed_all_to_all(x, "ep"), mesh=moe_jax.make_mesh(ep=1), **specs)
    got, microseconds = jax.jit(alone)(np.ones((1, 2), np.float32))
    assert got.tolist() == [[1.0, 1.0]] and microseconds.tolist() == [[0], [0]]


@pytest.mark.parametrize("slow", [0, 3, 7])
def test_slow_rank_gets_the_blame(slow):
    """Every peer names the slow rank, no peer another; for the slow rank itself nobody was late."""
    seconds = np.zeros(W, np.float32)
    seconds[slow] = 1.0
    microseconds = np.array(timed(slow=True)(np.ones((W, W, 2), np.float32), seconds)[1]).sum(1)
    for me in range(W):
        if me != slow:
            assert np.argmax(microseconds[me]) == slow, microseconds
    assert microseconds[slow].sum() < microseconds[:, slow].sum() / (W - 1), microseconds


def test_a_late_block_is_counted_where_it_arrives():
    """Late on one link: its receiver counts it, nobody counts it again, and no rank counts as late itself."""
    seconds = np.zeros((W, W), np.float32)
    seconds[6, 1] = 1.0

    def run(blocks):
        return timed_all_to_all(
            blocks, "ep", lambda block, source: delayed(block, jnp.asarray(seconds)[jax.lax.axis_index("ep"), source])
        )

    blocks = np.arange(W * W, dtype=np.float32).reshape(W, W, 1)
    got, microseconds = jax.jit(over_ep(run))(blocks)
    np.testing.assert_array_equal(got, np.swapaxes(blocks, 0, 1))
    ready, travelled = np.moveaxis(np.array(microseconds), 1, 0)
    assert travelled[6, 1] >= 1_000_000
    travelled[6, 1] = 0
    assert max(ready.max(), travelled.max()) < 500_000, microseconds


def test_performance_info_for_both_parts():
    """[2, W] is added to part by part, [W] by the sum of both; anything else is refused."""
    waited = np.array([[0, 5, 2, 7], [0, 1, 9, 3]], np.int32)
    both, total = np.full((2, 4), 100, np.int32), np.full(4, 100, np.int32)
    np.testing.assert_array_equal(add_waited(jnp.asarray(both), jnp.asarray(waited)), 100 + waited)
    np.testing.assert_array_equal(add_waited(jnp.asarray(total), jnp.asarray(waited)), 100 + waited.sum(0))
    mesh = moe_jax.make_mesh(ep=2)
    plan = moe_jax.make_plan(mesh, tokens_per_rank=2, hidden=4, num_experts=2, top_k=1, dtype="float32")
    ids, weights, x = jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1)), np.zeros((2, 2, 4), np.float32)

    def there_and_back(x, info, back):
        sent = moe_jax.dispatch(x, ids, plan, performance_info=info)
        return sent.performance_info, moe_jax.combine(sent.x, weights, sent.handle, performance_info=back)[1]

    infos = [np.zeros((2, *shape), np.int32) for shape in ((2,), (2, 2))]
    for info, back in (infos, infos[::-1]):
        sent, returned = jax.eval_shape(over_ep(there_and_back, mesh), x, info, back)
        assert (sent.shape, returned.shape) == (info.shape, back.shape) and sent.dtype == jnp.int32
    for bad in ((3,), (1, 2)):
        bad = np.zeros((2, *bad), np.int32)
        for info, back in ((bad, infos[0]), (infos[0], bad)):
            with pytest.raises(errors.ShapeError, match=r"performance_info has shape .*\[W\].*\[2, W\]"):
                jax.eval_shape(over_ep(there_and_back, mesh), x, info, back)
    with pytest.raises(errors.DtypeError, match="microseconds are whole numbers"):
        jax.eval_shape(over_ep(there_and_back, mesh), x, infos[1].astype(np.float32), infos[1])


def test_clock_survives_its_wrap(monkeypatch):
    """The clock passes 2^31 between two shifts: differences stay small, and none is negative."""
    step_ns, readings = 1_000_000, []
    before_shifts, in_all = 2 * W, 2 * W * W  # readings, by all ranks together
    wrap = (before_shifts + in_all) // 2

    def clock():
        readings.append(None)
        return stopwatch._START + 2**31 * 1000 + (len(readings) - wrap) * step_ns

    program, blocks = timed(), np.ones((W, W, 1), np.float32)
    jax.block_until_ready(program(blocks))
    monkeypatch.setattr(stopwatch.time, "monotonic_ns", clock)
    microseconds = np.asarray(program(blocks)[1])
    assert len(readings) == in_all and (microseconds >= 0).all() and microseconds.max() <= in_all * step_ns // 1000


def test_twenty_runs_in_a_row():
    program, blocks = timed(), np.arange(W * W, dtype=np.float32).reshape(W, W, 1)
    for turn in range(20):
        got, _ = program(blocks + turn)
        np.testing.assert_array_equal(got, np.swapaxes(blocks + turn, 0, 1))


def test_gradient_is_the_exchange_back():
    x = np.arange(W * W, dtype=np.float32).reshape(W, W, 1)
    weights = x * x % 7
    got = jax.jit(jax.grad(lambda x: jnp.sum(weights * timed()(x)[0])))(x)
    np.testing.assert_array_equal(got, np.swapaxes(weights, 0, 1))


def test_inside_custom_vjp_and_remat():
    @jax.custom_vjp
    def exchange(x):
        return timed_all_to_all(x, "ep")[0]

    exchange.defvjp(lambda x: (exchange(x), None), lambda _, ct: (exchange(ct),))
    x = np.arange(W * W, dtype=np.float32).reshape(W, W, 1)
    got = jax.jit(jax.grad(lambda x: jnp.sum(x * over_ep(jax.checkpoint(exchange))(x))))(x)
    np.testing.assert_array_equal(got, 2 * np.swapaxes(x, 0, 1))


def test_program_alternates_clock_shift_and_meeting():
    """A reading on both sides of the first meeting, and of each of W - 1 shifts, after each of which all meet."""
    root, nodes = entry_graph(over_ep(lambda x: timed_all_to_all(x, "ep")), np.ones((W, W, 2), np.float32))
    kinds = {"collective-permute": "shift", "custom-call": "clock", "all-reduce": "meet", "all-gather": "meet"}
    kind_of = {name: kinds.get(nodes[name][0].removesuffix("-start")) for name in behind(root, nodes)}
    steps = {name for name, kind in kind_of.items() if kind}
    chain = sorted(steps, key=lambda name: len(behind(name, nodes) & steps))
    turn = ["clock", "shift", "clock", "meet"]
    assert [kind_of[name] for name in chain] == ["clock", "meet", "clock", "meet"] + turn * (W - 1)
    for earlier, later in itertools.pairwise(chain):
        assert earlier in behind(later, nodes)


@pytest.mark.slow
def test_processes_blame_the_slow_one():
    program = """
import time
import jax, numpy as np
from jax.sharding import PartitionSpec as P
import moe_jax
from moe_jax.collectives.stopwatch import timed_all_to_all
num = len(jax.devices())
mesh = moe_jax.make_mesh(ep=num)
data = np.arange(num * num, dtype=np.float32).reshape(num * num, 1)
x = jax.make_array_from_callback(data.shape, jax.NamedSharding(mesh, P("ep")), lambda index: data[index])
spec = P("ep"), P(("ep", "tp"))
run = jax.jit(jax.shard_map(lambda x: timed_all_to_all(x, "ep"), mesh=mesh, in_specs=P("ep"), out_specs=spec))
jax.block_until_ready(run(x))
time.sleep(2 * (PROCESS == 1))
blocks, microseconds = run(x)
for piece, times in zip(blocks.addressable_shards, microseconds.addressable_shards):
    me = piece.index[0].start // num
    assert np.asarray(piece.data).ravel().tolist() == [source * num + me for source in range(num)]
    assert PROCESS == 1 or np.argmax(np.sum(times.data, 0)) == 1, times.data
print("PASSED")
"""
    for ended in run_processes(program, 3):
        assert ended.returncode == 0 and "PASSED" in ended.output, ended.output


BAD_CALLS = [
    (lambda: timed_all_to_all(np.zeros((W + 1, 2), np.float32), "ep"), errors.ShapeError, "blocks"),
    (lambda: timed_all_to_all(np.float32(1) * np.ones(()), "ep"), errors.DtypeError, "not an array"),
    (lambda: timed_all_to_all(jnp.zeros(()), "ep"), errors.ShapeError, "scalar"),
    (lambda: timed_all_to_all(None, "ep"), errors.MissingArgumentError, "blocks"),
    (lambda: timed_all_to_all(jnp.zeros(W), "row"), errors.MeshError, "not bound"),
]


@pytest.mark.parametrize("call,error,text", BAD_CALLS)
def test_bad_calls(call, error, text):
    with pytest.raises(error, match=text):
        jax.eval_shape(over_ep(lambda x: (call(), x)[1]), np.zeros((W, 1), np.float32))
