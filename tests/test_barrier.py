"""The barrier: nobody passes before all have come, in the compiled program and on the host; and rank tables."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import behind, entry_graph, over_ep, over_mesh
from jax.sharding import PartitionSpec as P
from processes import run_processes

import moe_jax
from moe_jax import _compat, errors
from moe_jax.collectives import rendezvous
from moe_jax.elastic.rank_table import make_rank_table, read_rank_table
from moe_jax.recovery.barrier import BarrierTimeoutError, barrier
from moe_jax.tools.stragglers.faults import delayed

W = 8
FAR = 120_000_000  # microseconds, longer than any test


# --- what comes out --------------------------------------------------------------------------------------------------

DTYPES = [
    "float32", "bfloat16", "float16", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn", "int4", "uint4", "complex64",
]  # fmt: skip


def any_bits(rng, dtype, shape):
    """Every value of narrow types, random bits for the wide ones: NaNs with payload, both zeros, subnormals."""
    dtype = np.dtype(dtype)
    if dtype.name == "bool":
        return rng.random(shape) < 0.5
    if dtype.name in ("float4_e2m1fn", "int4", "uint4"):  # one nibble in each byte
        values = rng.integers(-8 if dtype.name == "int4" else 0, 8 if dtype.name == "int4" else 16, shape)
        return values.astype(dtype) if "int" in dtype.name else values.astype(np.uint8).view(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return rng.integers(0, 256, size).astype(np.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("timeout_us", [None, FAR])
def test_every_bit_comes_back(timeout_us):
    rng = np.random.default_rng(0)
    tree = {name: any_bits(rng, name, (W, 2, 65)) for name in DTYPES}
    tree["empty"], tree["scalars"] = np.zeros((W, 0, 3), np.float32), np.arange(W, dtype=np.int32)
    tree["first_is_nan"] = np.full((W, 1), np.nan, np.float32)
    with jax.enable_x64(True):
        got = jax.jit(over_ep(lambda tree: barrier(tree, "ep", timeout_us=timeout_us)))(tree)
        for name, value in tree.items():
            assert got[name].dtype == value.dtype and got[name].shape == value.shape
            assert np.asarray(got[name]).tobytes() == value.tobytes(), name


def test_derivatives_pass():
    x, c = np.arange(W * 3, dtype=np.float32).reshape(W, 3) - 7, np.arange(W * 3, dtype=np.float32).reshape(W, 3) % 5

    def run(x, wrap=lambda f: f):
        @wrap
        def step(x, c):
            return c * barrier({"a": x * x, "i": jnp.ones(2, jnp.int8)}, "ep", timeout_us=FAR)["a"]

        return over_ep(lambda x, c: barrier(step(x, c), "ep"))(x, c)

    for wrap in (lambda f: f, jax.checkpoint):
        got = jax.jit(jax.grad(lambda x: jnp.sum(run(x, wrap))))(x)
        np.testing.assert_array_equal(got, 2 * x * c)
    value, tangent = jax.jit(lambda x, t: jax.jvp(run, (x,), (t,)))(x, c)
    np.testing.assert_array_equal(value, c * x * x)
    np.testing.assert_array_equal(tangent, 2 * x * c * c)


def test_batches():
    """The members of a batch wait one after the other, and so the clocks of a dispatch are read."""
    x = np.arange(2 * W * 3, dtype=np.float32).reshape(2, W, 3)
    passed = jax.jit(jax.vmap(over_ep(lambda x: barrier(x, "ep", timeout_us=FAR))))(x)
    np.testing.assert_array_equal(passed, x)
    plan = moe_jax.make_plan(
        moe_jax.make_mesh(ep=W), tokens_per_rank=1, hidden=3, num_experts=W, top_k=1, dtype="float32"
    )
    ids, waited = jnp.zeros((1, 1), jnp.int32), jnp.zeros(W, jnp.int32)
    timed = over_ep(lambda x: moe_jax.dispatch(x[None], ids, plan, performance_info=waited).performance_info)
    assert jax.eval_shape(jax.vmap(timed), x).shape == (2, W, W)


def test_inside_scan_and_custom_vjp():
    @jax.custom_vjp
    def twice(x):
        return 2 * barrier(x, "ep", timeout_us=FAR)

    twice.defvjp(lambda x: (twice(x), None), lambda _, ct: (2 * ct,))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (twice(x), None), x, length=3)[0]

    x = np.arange(W, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(jax.jit(over_ep(scanned))(x), 8 * x)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: jnp.sum(over_ep(scanned)(x))))(x), np.full((W, 1), 8))


@pytest.mark.parametrize("timeout_us", [None, FAR])
def test_type_stays_what_it_was(timeout_us):
    """Leaves that are the same on all tp ranks, or on all ranks, are still typed so: out_specs would refuse others."""
    mesh = moe_jax.make_mesh(ep=2, tp=2, dp=2)
    rows, same = np.arange(8.0, dtype=np.float32), np.arange(3.0, dtype=np.float32)
    for specs in ((P("ep"), P()), (P("ep"), P("tp")), (P(("dp", "ep", "tp")), P("ep"))):
        data = (rows, np.resize(same, 4) if specs[1] != P() else same)
        run = _compat.shard_map(
            lambda *x: barrier(x, "ep", timeout_us=timeout_us), mesh=mesh, in_specs=specs, out_specs=specs
        )
        for got, value in zip(jax.jit(run)(*data), data, strict=True):
            np.testing.assert_array_equal(got, value)


# --- what the compiled program says -----------------------------------------------------------------------------------


def chained_all_reduces(function, *args):
    """How many all-reduces the result needs, each of which needs the one before; raises where they form no chain."""
    root, nodes = entry_graph(function, *args)
    sums = [name for name in behind(root, nodes) if nodes[name][0].startswith("all-reduce")]
    depths = sorted(len(behind(name, nodes) & set(sums)) for name in sums)
    assert depths == list(range(len(sums)))
    return len(sums)


def test_result_needs_the_collective():
    x = np.ones((W, 4), np.float32)
    assert chained_all_reduces(over_ep(lambda x: barrier(x, "ep")), x) == 1
    assert chained_all_reduces(over_ep(lambda x: barrier(x * 2, "ep") + 1), x) == 1
    assert chained_all_reduces(over_ep(lambda x: barrier(jnp.zeros_like(x), "ep")), x) == 1  # a known value
    assert chained_all_reduces(over_ep(lambda x: jnp.sin(barrier(barrier(x, "ep"), "ep"))[:1]), x) == 2
    assert chained_all_reduces(over_ep(lambda x: barrier(barrier(x, "ep") @ x, "ep")), x) == 2
    assert chained_all_reduces(over_ep(lambda x: barrier(x, "ep", timeout_us=FAR)), x) == 1
    for axes in ("ep", "node", ("node", "ep"), ("ep", "node")):
        mesh = moe_jax.make_mesh(ep=W, nodes=2)
        assert chained_all_reduces(over_ep(lambda x, axes=axes: barrier(x, axes), mesh), x) == 1

    def removable(x):  # what a barrier must not be: the compiler sees that nothing needs the sum
        total = jax.lax.psum(_compat.as_varying(jnp.ones(()), ("ep",)), "ep")
        return jax.lax.optimization_barrier((x, total))[0]

    assert chained_all_reduces(over_ep(removable), x) == 0


def test_waits_for_what_it_is_given():
    """The sum needs every leaf of x: the barrier does not start before they are computed."""
    x = np.ones((W, 4), np.float32)

    def two(x):
        return barrier((jax.lax.ppermute(x, "ep", [(0, 1)]), jax.lax.all_gather(x, "ep")), "ep")

    root, nodes = entry_graph(over_ep(two), x)
    (total,) = [name for name in behind(root, nodes) if nodes[name][0].startswith("all-reduce")]
    needed = {nodes[name][0].removesuffix("-done") for name in behind(total, nodes)}
    assert {"collective-permute", "all-gather"} <= needed


# --- who waits for whom -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes,nodes", [("ep", 1), (("node", "ep"), 2), ("ep", 2)])
@pytest.mark.parametrize("timeout_us", [None, FAR])
def test_nobody_passes_before_all_have_come(axes, nodes, timeout_us):
    mesh = moe_jax.make_mesh(ep=W, nodes=nodes)
    log = []

    def note(what, rank, x):
        def append(rank, _):
            log.append((what, int(rank)))
            return np.int32(0)

        return rendezvous.hold(
            x, jax.pure_callback(append, jax.ShapeDtypeStruct((), jnp.int32), rank, rendezvous.probe(x))
        )

    def run(x, rank, seconds):
        x = note("in", rank, delayed(x, seconds))
        return note("out", rank, barrier(x, axes, timeout_us=timeout_us))

    seconds = np.zeros(W, np.float32)
    seconds[5] = 0.2
    program = jax.jit(over_ep(run, mesh))
    for _ in range(3):
        log.clear()
        jax.block_until_ready(program(np.ones((W, 3), np.float32), np.arange(W, dtype=np.int32), seconds))
        groups = [range(W)] if axes != "ep" or nodes == 1 else [range(4), range(4, 8)]
        for group in groups:
            events = [what for what, rank in log if rank in group]
            assert events == ["in"] * len(group) + ["out"] * len(group)


def test_many_turns_on_few_cores():
    """Eight devices block in callbacks and meet in collectives, in turn, without starving each other."""

    def run(x):
        for _ in range(4):
            x = jnp.tanh(barrier(x, "ep", timeout_us=FAR) @ x)
        return x

    program, x = jax.jit(over_ep(run)), jnp.ones((W, 16, 16))
    for _ in range(20):
        x = program(x)
    assert np.isfinite(np.asarray(x)).all()


def test_missing_rank_raises_on_all_then_all_go_on():
    patience = 3_000_000

    def run(x, seconds, table):
        return barrier(delayed(x, seconds), "ep", rank_table=table, timeout_us=patience) + 1

    program = jax.jit(over_ep(run))
    x, on_time, late = np.arange(W, dtype=np.float32)[:, None], np.zeros(W, np.float32), np.zeros(W, np.float32)
    late[3] = 2e-6 * patience
    alive = np.arange(W) != 3
    everybody = np.tile(make_rank_table(W, num_experts=W), (W, 1))
    without = np.tile(make_rank_table(W, alive, num_experts=W), (W, 1))
    np.testing.assert_array_equal(program(x, on_time, everybody), x + 1)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(program(x, late, everybody))
    for part in ("BarrierTimeoutError", "ranks [3] of ep", f"timeout_us={patience}", "rank_table"):
        assert part in str(caught.value)
    np.testing.assert_array_equal(program(x, on_time, everybody), x + 1)
    np.testing.assert_array_equal(program(x, late, without), x + 1)  # nobody gives up on a removed rank
    assert program._cache_size() == 1  # the table is data


def test_board_agrees_on_one_verdict():
    board, verdicts = rendezvous.LocalBoard(), {}
    board.announce("g", 0)
    assert not board.wait("g", 1, 1, 0.01)

    def settle(rank):
        verdicts[rank] = board.settle("g", 1, str(rank))

    threads = [threading.Thread(target=settle, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(verdicts.values())) == 1
    assert board.settle("g", 2, "other") == "other" and board.settle("h", 1, "third") == "third"
    board.clean("g", 1)
    assert board.settle("g", 1, "") == ""


def test_forget_arrivals_brings_ranks_back_into_step():
    rendezvous.current_board().announce("lost", 0)  # rank 1 failed before it came
    rendezvous.forget_arrivals()
    board = rendezvous.current_board()
    assert board.announce("lost", 0) == board.announce("lost", 1) == 1


# --- several processes ------------------------------------------------------------------------------------------------

_PROGRAM = """
import time
import jax, numpy as np
from jax._src import distributed
from jax.sharding import PartitionSpec as P
import moe_jax
from moe_jax.recovery.barrier import barrier
num = len(jax.devices())
mesh = moe_jax.make_mesh(ep=num)
def two(x):
    return barrier(2 * barrier(x, "ep", timeout_us=PATIENCE), "ep", timeout_us=PATIENCE)
data = np.arange(num, dtype=np.float32)
x = jax.make_array_from_callback((num,), jax.NamedSharding(mesh, P("ep")), lambda index: data[index])
run = jax.jit(jax.shard_map(two, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))).lower(x).compile()
client = distributed.global_state.client
client.wait_at_barrier("compiled", 60_000)
time.sleep(LATE.get(PROCESS, 0))
for _ in range(3):
    x = run(x)
for shard in x.addressable_shards:
    assert np.asarray(shard.data) == 8 * data[shard.index], shard
client.wait_at_barrier("done", 60_000)
kept = client.key_value_dir_get("moe_jax/arrival")
assert len(kept) <= 3 * num + 2, kept  # old turns are cleaned up
print("PASSED")
"""


def test_processes_pass_together():
    settings = "PATIENCE, LATE = 60_000_000, {1: 1}\n"
    for ended in run_processes(settings + _PROGRAM, 2, devices=2):
        assert ended.returncode == 0 and "PASSED" in ended.output, ended.output


@pytest.mark.slow
def test_processes_give_up_on_one_that_never_comes():
    settings = "PATIENCE, LATE = 3_000_000, {2: 1000}\n"
    *waiting, asleep = run_processes(settings + _PROGRAM, 3, wait_for=[0, 1])
    for ended in waiting:
        assert ended.returncode not in (0, None), ended.output
        assert "BarrierTimeoutError: timeout_us=3000000: ranks [2] of ep" in ended.output, ended.output
    assert "PASSED" not in asleep.output and "BarrierTimeoutError" not in asleep.output


@pytest.mark.slow
def test_process_that_comes_too_late_is_told():
    """It finds all others announced, and must not walk into a collective that they have left."""
    settings = "PATIENCE, LATE = 2_000_000, {1: 4}\n"
    early, late = run_processes(settings + _PROGRAM, 2)
    for ended in (early, late):
        assert ended.returncode not in (0, None), ended.output
        assert "ranks [1] of ep" in ended.output, ended.output
    assert "this rank came after the others had given up" in late.output, late.output


# --- rank tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0, 2])
def test_rank_table_against_a_loop(shared):
    rng, per_rank, num = np.random.default_rng(1), 3, 6
    read = jax.jit(lambda table: read_rank_table(table, num, 99, 98))
    for _ in range(20):
        alive = rng.random(num) < 0.7
        if alive.sum() <= shared:
            continue
        logical, physical = [-1] * num, [-1] * num
        place = 0
        for rank in range(num):
            if alive[rank]:
                logical[rank], physical[place] = place, rank
                place += 1
        experts = per_rank * (num - shared) - per_rank * (num - place)
        table = make_rank_table(num, alive, num_shared_ranks=shared, num_experts=per_rank * (num - shared))
        assert table.dtype == np.int32 and table.tolist() == [1, place, shared, experts, *logical, *physical]
        got = read(table)
        assert [int(value) for value in got[:3]] == [place, shared, experts]
        assert got.logical.tolist() == logical and got.physical.tolist() == physical
        garbage = table.copy()
        garbage[4 + num + place :] = 77  # behind the last survivor: not to be read
        assert read(garbage).physical.tolist() == physical


def test_rank_table_that_changes_nothing():
    for table in (None, make_rank_table(4, num_experts=8), np.array([0] + [9] * 11, np.int32)):
        got = read_rank_table(table, 4, 8, 1)
        assert [int(value) for value in got[:3]] == [4, 1, 8]
        assert got.logical.tolist() == got.physical.tolist() == [0, 1, 2, 3]
        assert all(value.dtype == jnp.int32 for value in got)


BAD_TABLES = [
    (dict(num_ranks=4, alive=[False] * 4, num_experts=4), errors.InvalidArgumentError, "leaves 0"),
    (dict(num_ranks=3, alive=[True, True, False], num_shared_ranks=2, num_experts=4), ValueError, "3 are"),
    (dict(num_ranks=4, alive=[True] * 3, num_experts=4), errors.ShapeError, r"\(3,\)"),
    (dict(num_ranks=4, alive=[1] * 4, num_experts=4), errors.DtypeError, "astype"),
    (dict(num_ranks=4, alive="all", num_experts=4), errors.DtypeError, "a str"),
    (dict(num_ranks=4, num_shared_ranks=4, num_experts=4), errors.InvalidArgumentError, "less than"),
    (dict(num_ranks=4, num_shared_ranks=1, num_experts=4), errors.InvalidArgumentError, "multiple of the 3"),
    (dict(num_ranks=0, num_experts=4), errors.InvalidArgumentError, "num_ranks=0"),
]  # fmt: skip


@pytest.mark.parametrize("arguments,error,text", BAD_TABLES)
def test_bad_rank_tables(arguments, error, text):
    with pytest.raises(error, match=text):
        make_rank_table(**arguments)


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_CALLS = [
    (dict(x=None), errors.MissingArgumentError, "no array"),
    (dict(x=[1.0]), errors.DtypeError, "a float"),
    (dict(x=np.zeros(2, np.int64)), errors.DtypeError, "64-bit"),
    (dict(axis_name="tensor"), errors.MeshError, "not bound"),
    (dict(axis_name=()), errors.InvalidArgumentError, "axis_name"),
    (dict(timeout_us=0), errors.InvalidArgumentError, "at least 1"),
    (dict(timeout_us=1.5), errors.InvalidArgumentError, "whole number"),
    (dict(timeout_us=2**31), errors.InvalidArgumentError, "at most"),
    (dict(rank_table=np.zeros(12, np.int32)), errors.ShapeError, "4 [+] 2W"),
    (dict(rank_table=np.zeros(20, np.float32)), errors.DtypeError, "int32"),
]


@pytest.mark.parametrize("change,error,text", BAD_CALLS)
def test_bad_calls(change, error, text):
    call = {"x": np.zeros(2, np.float32), "axis_name": "ep", **change}
    with pytest.raises(error, match=text):
        jax.eval_shape(over_ep(lambda x: (barrier(**call), x)[1]), np.zeros((W, 1), np.float32))


def test_outside_shard_map():
    with pytest.raises(errors.MeshError, match="shard_map"):
        barrier(np.zeros(2, np.float32), "ep")
    assert issubclass(BarrierTimeoutError, (errors.MoEError)) and issubclass(BarrierTimeoutError, TimeoutError)


def test_tensor_parallel_ranks_wait_apart():
    """Each tp column is a group of its own."""
    mesh = moe_jax.make_mesh(ep=4, tp=2)
    x = np.arange(8.0, dtype=np.float32).reshape(4, 2, 1)
    run = jax.jit(over_mesh(mesh, lambda x: barrier(x, "ep", timeout_us=FAR)))
    for _ in range(3):
        np.testing.assert_array_equal(run(x), x)
