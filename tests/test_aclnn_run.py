"""Every operator of the facade by its two phases: checked on shapes, run by its executor, equal to the direct call.

And both equal to the oracle, bit for bit: data are small whole numbers, whose sums are exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from aclnn_cases import RAN, WORLDS, agree, bits, both, draw, given, groups, over_ep, over_ranks, over_world, shape_of
from family_cases import DTYPES, Config, combine_arrays, dispatch_arrays
from fused_cases import E2M1, INT8, codes, hashable, lists, scales

import moe_jax as moe
from moe_jax import aclnn, errors, reference
from moe_jax.recovery.window import Window
from moe_jax.tools.stragglers.faults import delayed

H = 8
FIELDS = {
    aclnn.DispatchOutput: (
        "expand_x dynamic_scales assist_info_for_combine expert_token_nums ep_recv_counts tp_recv_counts expand_scales"
    ),
    aclnn.CombineOutput: "x_out",
    aclnn.AddRmsNormOutput: "y_out rstd_out x_out",
    aclnn.UpdateExpertOutput: "balanced_expert_ids balanced_active_mask",
    aclnn.GroupedMatmulAllToAllvOutput: "y mm_y",
    aclnn.AllToAllvGroupedMatmulOutput: "gmm_y mm_y permute_out",
}
FIELDS[aclnn.TimedDispatchOutput] = f"{FIELDS[aclnn.DispatchOutput]} performance_info"
FIELDS[aclnn.TimedCombineOutput] = f"{FIELDS[aclnn.CombineOutput]} performance_info"


@pytest.mark.parametrize("output", FIELDS, ids=lambda output: output.__name__)
def test_order_of_the_outputs(output):
    assert output._fields == tuple(FIELDS[output].split())


# --- dispatch and combine ---------------------------------------------------------------------------------------------


VERSIONS_OF = {
    "shared": ("dispatch_v3", "combine_v3"),
    "tp": ("dispatch_v2", "combine_add_rms_norm"),
    "nodes": ("dispatch_v2", "combine_v2"),
    "elastic": ("dispatch_v3", "combine_v3"),
    "codes": ("dispatch_v2", "combine_v2"),
}


def oracle_dispatch(config, drawn):
    return oracle.moe_distribute_dispatch(
        drawn["x"], drawn["expert_ids"], **dispatch_arrays(config, drawn), **config.dispatch
    )


def dispatch_then_combine(config, drawn, timed=None):
    """Both outputs, both ways. ``timed``: [W], what performance_info holds before."""
    clock = {} if timed is None else {"performance_info": timed}
    operands = {"x": drawn["x"], "expert_ids": drawn["expert_ids"], **dispatch_arrays(config, drawn), **clock}
    sent = both("moe_distribute_dispatch_v4", given(operands), config.dispatch | groups(config))
    return sent, combine_both(config, drawn, sent[0], clock)


def combine_both(config, drawn, sent, clock):
    arrays = {name: drawn[name] for name in ("expand_x", "expert_ids", "expert_scales")}
    arrays |= {
        "assist_info_for_combine": sent.assist_info_for_combine,
        "ep_send_counts": sent.ep_recv_counts,
        "tp_send_counts": sent.tp_recv_counts,
        "expand_scales": sent.expand_scales,
        **combine_arrays(drawn),
    }
    numbers = config.common | groups(config)
    numbers |= {"comm_quant_mode": config.comm_quant_mode, "global_bs": config.global_bs}
    if not config.norm:
        return both("moe_distribute_combine_v4", given(arrays) | clock, numbers)
    arrays |= {"residual_x": drawn["residual_x"], "gamma": drawn["gamma"]}
    return both("moe_distribute_combine_add_rms_norm_v2", given(arrays), numbers | {"norm_eps": 1e-5})


@functools.cache
def world_program(name):
    return over_world(WORLDS[name], functools.partial(dispatch_then_combine, WORLDS[name]))


@pytest.mark.quick("elastic")
@pytest.mark.parametrize("name", WORLDS)
def test_dispatch_and_combine(name):
    config = WORLDS[name]
    for seed in range(4):
        drawn = draw(np.random.default_rng(seed), config)
        sent, out = world_program(name)(over_ranks(config, drawn))
        assert {f"moe_distribute_{version}" for version in VERSIONS_OF[name]} <= RAN
        sent, out = agree(*sent), agree(*out)
        expected = oracle_dispatch(config, drawn)
        for field in aclnn.DispatchOutput._fields:
            got, want = getattr(sent, field), getattr(expected, field)
            assert (got is None) == (want is None), field
            if want is not None:
                np.testing.assert_array_equal(bits(got.reshape(want.shape)), bits(want), field)
        compare_combine(config, drawn, out, expected)


def compare_combine(config, drawn, out, expected):
    operands = (drawn["expand_x"], drawn["expert_ids"], expected, drawn["expert_scales"])
    options = combine_arrays(drawn) | config.combine
    if not config.norm:
        want = oracle.moe_distribute_combine(*operands, **options)
        got = np.asarray(out.x_out, np.float64).reshape(want.x_out.shape)
        slack = 0 if config.comm_quant_mode == 0 else 2.0**-8  # sums of these numbers are not exact
        np.testing.assert_allclose(got, want.x_out.astype(np.float64), rtol=slack, atol=2e-6 * (slack > 0))
        return
    norm = (drawn["residual_x"], drawn["gamma"])
    want = oracle.moe_distribute_combine_add_rms_norm(*operands, *norm, **options, norm_eps=1e-5)
    np.testing.assert_array_equal(out.x_out.reshape(want.x.shape), want.x)
    np.testing.assert_allclose(out.rstd_out.reshape(want.rstd.shape), want.rstd, rtol=1e-6)
    got, exact = (np.asarray(a, np.float64) for a in (out.y_out.reshape(want.y.shape), want.y))
    np.testing.assert_allclose(got, exact, rtol=2**-7)  # two roundings, and rstd may fall to either side of one


def test_tp_counts():
    """By tp rank, whichever asks: the rows that came over each rank's own group."""
    config = WORLDS["tp"]

    def shard(drawn):
        arrays = dispatch_arrays(config, drawn)
        sent = aclnn.moe_distribute_dispatch_v4(
            drawn["x"], drawn["expert_ids"], **arrays, **config.dispatch, **groups(config)
        )
        return sent.tp_recv_counts, sent.expert_token_nums

    program, differ = over_world(config, shard), False
    for seed in range(4):
        drawn = draw(np.random.default_rng(seed), config)
        counts, nums = program(over_ranks(config, drawn))
        for w in range(config.world):
            rows = [np.sum((drawn["expert_ids"][:, p] == w) & drawn["x_active_mask"][:, p]) for p in range(2)]
            np.testing.assert_array_equal(counts[w], [rows, rows])
            np.testing.assert_array_equal(nums[w], [[sum(rows)]] * 2)
            differ |= rows[0] != rows[1]
    assert differ


PASSED_ON = [
    ("float8_e4m3fn", "float32", 1, WORLDS["shared"]),
    ("float8_e5m2", "uint8", 3, WORLDS["tp"]),
    ("uint8", "float8_e8m0fnu", 2, WORLDS["elastic"]),
    ("float4_e2m1fn", "uint8", H, WORLDS["shared"]),
    ("float8_e5m2", "float8_e8m0fnu", 2, Config(world=8, local_experts=1, top_k=1, tokens=1, hidden=136)),
]


@pytest.mark.quick("float8_e4m3fn-float32-1-config0", "float4_e2m1fn-uint8-8-config3")
@pytest.mark.parametrize(("dtype", "scale_dtype", "width", "config"), PASSED_ON)
def test_rows_that_were_quantised_before_pass_through(dtype, scale_dtype, width, config):
    """Every bit of codes and scales, NaNs among them."""
    rng = np.random.default_rng(0)
    drawn = draw(rng, config)
    shape = drawn["x"].shape
    x = rng.integers(0, 16 if dtype == "float4_e2m1fn" else 256, shape).astype(np.uint8)
    x = x.view(jnp.dtype(dtype)) if dtype != "float4_e2m1fn" else rng.integers(-6, 7, shape).astype(jnp.dtype(dtype))
    scale = rng.integers(0, 256, (*shape[:-1], width, jnp.dtype(scale_dtype).itemsize)).astype(np.uint8)
    scale = scale.view(jnp.dtype(scale_dtype))[..., 0]
    drawn |= {"x": x, "scales": scale}

    def shard(drawn):
        operands = {"x": drawn["x"], "expert_ids": drawn["expert_ids"], **dispatch_arrays(config, drawn)}
        return both("moe_distribute_dispatch_v4", given(operands), config.dispatch | groups(config))

    names = ("x", "expert_ids", "scales", "x_active_mask", "expert_scales", "elastic_info")
    arrays = {name: value for name, value in over_ranks(config, drawn).items() if name in names}
    got = agree(*over_world(config, shard)(arrays))
    if dtype == "float4_e2m1fn":
        drawn["x"] = drawn["x"].view(np.uint8)
        got = got._replace(expand_x=got.expand_x.view(np.uint8))
    want = oracle_dispatch(config, drawn)
    assert got.expand_x.dtype == drawn["x"].dtype and got.dynamic_scales.dtype == scale.dtype
    for field in aclnn.DispatchOutput._fields:
        mine, theirs = getattr(got, field), getattr(want, field)
        if theirs is not None and field != "expert_token_nums":  # int64 there
            mine, theirs = (np.ascontiguousarray(a).reshape(theirs.shape).view(np.uint8) for a in (mine, theirs))
        if theirs is not None:
            np.testing.assert_array_equal(mine.reshape(theirs.shape), theirs, field)


# --- who waited for whom ----------------------------------------------------------------------------------------------

TIMED = {
    "plain": Config(world=4, local_experts=2, top_k=2, hidden=H, mask="pairs", expand_scales=True),
    "codes": Config(world=4, shared_ranks=1, local_experts=2, top_k=2, hidden=H, quant_mode=2, y_dtype="int8"),
    "elastic": Config(world=4, elastic=True, local_experts=2, top_k=2, hidden=H, comm_quant_mode=2),
}


def timed_program(config):
    def shard(drawn, before):
        return dispatch_then_combine(config, drawn), dispatch_then_combine(config, drawn, before)

    return over_world(config, shard)


@pytest.mark.quick("plain")
@pytest.mark.parametrize("name", TIMED)
def test_performance_info_changes_no_row(name):
    config = TIMED[name]
    drawn = draw(np.random.default_rng(1), config)
    before = np.random.default_rng(0).integers(10**6, 10**7, (config.world, 1, config.world)).astype(np.int32)
    untimed, timed = timed_program(config)(over_ranks(config, drawn), before)
    for plain, clocked in zip(untimed, timed, strict=True):
        (plain, _), (clocked, executed) = jax.tree.map(np.asarray, (plain, clocked))
        assert type(clocked) is type(executed) and clocked._fields == (*plain._fields, "performance_info")
        for one in (clocked, executed):
            agree(plain, type(plain)(*one[:-1]))
            assert one.performance_info.dtype == np.int32
            added = one.performance_info - before
            assert (added >= 0).all() and (np.diagonal(added[:, 0]) == 0).all() and added.any()
            assert (added < 10**8).all(), "less than 100 seconds: the wait was added, not the clock"


@pytest.mark.slow
@pytest.mark.parametrize("late_names", [("x",), ("x", "expert_ids", "x_active_mask", "expert_scales")])
def test_a_slow_rank_gets_the_blame(late_names):
    """A rank that comes late to dispatch, then to combine: every other rank waited longest for it, both times."""
    config, slow = TIMED["plain"], 2
    drawn = draw(np.random.default_rng(1), config)

    def shard(drawn, seconds):
        none = jnp.zeros(config.world, jnp.int32)
        late = drawn | delayed({name: drawn[name] for name in late_names}, seconds)
        (sent, _), _ = dispatch_then_combine(config, late, none)
        after = jnp.where(jnp.min(sent.performance_info) >= 0, seconds, 0.0)  # not before dispatch is through
        late = drawn | {"expand_x": delayed(drawn["expand_x"], after)}
        (out, _) = combine_both(config, late, sent, {"performance_info": none})
        return sent.performance_info, out.performance_info

    seconds = np.zeros((config.world, 1), np.float32)
    seconds[slow] = 2.0
    for operator, waited in zip(
        ("dispatch", "combine"), over_world(config, shard)(over_ranks(config, drawn), seconds), strict=True
    ):
        for me in range(config.world):
            if me != slow:
                assert np.argmax(waited[me, 0]) == slow, f"{operator}: {np.asarray(waited)[:, 0]}"


def test_no_cost_when_off():
    """Without performance_info the program calls no host; with it, it does."""
    config = TIMED["plain"]
    drawn = over_ranks(config, draw(np.random.default_rng(1), config))
    before = np.zeros((config.world, 1, config.world), np.int32)

    def text(*arrays):
        program = over_world(config, functools.partial(dispatch_then_combine, config))
        return program.lower(*arrays).as_text()

    assert "callback" not in text(drawn)
    assert "callback" in text(drawn, before)


# --- what was passed on wrongly ---------------------------------------------------------------------------------------


def tampered_program(config):
    def shard(drawn, sent):
        numbers = config.common | groups(config)
        return aclnn.moe_distribute_combine_v4(
            drawn["expand_x"], drawn["expert_ids"], expert_scales=drawn["expert_scales"], **sent, **numbers
        ).x_out

    return over_world(config, shard)


@pytest.fixture(scope="module", params=[0, 2], ids=["one tp rank", "two tp ranks"])
def passed_on(request):
    """(config, program, arrays, what dispatch passes on) of one draw without masks."""
    config = Config(world=2, tp=request.param, local_experts=1, top_k=2, tokens=3, hidden=H)
    drawn = draw(np.random.default_rng(0), config)
    expected = oracle_dispatch(config, drawn)
    names = {"assist_info_for_combine": "assist_info_for_combine", "ep_send_counts": "ep_recv_counts"}
    names |= {"tp_send_counts": "tp_recv_counts"} if config.tp == 2 else {}
    sent = over_ranks(config, {mine: getattr(expected, theirs) for mine, theirs in names.items()})
    drawn = {name: drawn[name] for name in ("expand_x", "expert_ids", "expert_scales")}
    return config, tampered_program(config), over_ranks(config, drawn), sent


@pytest.mark.parametrize(("column", "value"), [(0, 1), (0, -1), (0, 7), (1, 3), (1, -1), (2, 2), (2, -1)])
def test_a_wrong_triple_makes_nan(passed_on, column, value):
    """Row 1 on rank 0 came from rank 0: only the token that it belongs to is lost."""
    _config, program, drawn, sent = passed_on
    good = np.asarray(program(drawn, sent), np.float64)
    assert np.isfinite(good).all()
    triples = np.array(sent["assist_info_for_combine"])
    source, token, _ = triples[0, 0, 3:6]
    assert source == 0 and triples[0, 0, 3 + column] != value
    triples[0, 0, 3 + column] = value
    got = np.asarray(program(drawn, sent | {"assist_info_for_combine": triples}), np.float64)
    assert np.isnan(got[0, 0, token]).all()
    got[0, 0, token] = good[0, 0, token]
    np.testing.assert_array_equal(got, good)


def test_counts_of_another_dispatch_make_nan(passed_on):
    """No result is a wrong sum: it is NaN, or what it should be."""
    _config, program, drawn, sent = passed_on
    good = np.asarray(program(drawn, sent), np.float64)
    for moved in (1, -1):
        counts = np.array(sent["ep_send_counts"])
        counts[0, :, 0] += moved  # one row more, or less, from rank 0 of those that lie on rank 0
        got = np.asarray(program(drawn, sent | {"ep_send_counts": counts}), np.float64)
        lost = np.isnan(got).any(axis=-1)
        np.testing.assert_array_equal(got[~lost], good[~lost])
        assert lost.any()


def test_counts_of_the_wrong_tp_rank_make_nan(passed_on):
    config, program, drawn, sent = passed_on
    if config.tp < 2:
        pytest.skip("one tp rank has no counts to pass on")
    counts = np.array(sent["tp_send_counts"]) + np.array([1, 0], np.int32)
    assert np.isnan(np.asarray(program(drawn, sent | {"tp_send_counts": counts}), np.float64)).all()


# --- update expert ----------------------------------------------------------------------------------------------------


@pytest.mark.quick("False-0-int32", "True-1-int32", "True-0-int64")
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("prune", [False, True])
def test_update_expert(mode, dtype, prune):
    ranks, tokens, top_k, experts, width = 4, 5, 3, 6, 4
    rng = np.random.default_rng(0)
    table = rng.integers(0, 99, (ranks, experts, width)).astype(np.int32)
    table[:, :, 0] = rng.integers(1, width, (ranks, experts))
    arrays = {"expert_ids": rng.integers(0, experts, (ranks, tokens, top_k)).astype(dtype), "eplb_table": table}
    if prune:
        arrays["expert_scales"] = (rng.integers(0, 5, (ranks, tokens, top_k)) / 8).astype(DTYPES["bfloat16"])
        arrays["pruning_threshold"] = rng.choice([0.0, 0.125, 0.25], (ranks, 1, top_k)).astype(np.float32)
        arrays["active_mask"] = rng.random((ranks, tokens)) < 0.7
    with jax.enable_x64(dtype == "int64"):
        numbers = {"balance_mode": mode, "world_size": ranks}
        calls = (numbers, numbers | {"local_rank_id": 2})
        outs = over_ep(ranks, lambda given: [both("moe_update_expert", given, call) for call in calls])(arrays)
        got, fixed = (agree(*out) for out in outs)
    for rank in range(ranks):
        ids, table, *pruning = (array[rank] for array in arrays.values())
        names = ("combine_weights", "pruning_threshold", "token_mask")
        options = {"ep_size": ranks, "balance": "token" if mode else "rank"} | dict(zip(names, pruning, strict=False))
        for out, me in ((got, rank), (fixed, 2)):
            want_ids, want_mask = reference.update_expert(ids, table, rank=me, **options)
            assert out.balanced_expert_ids.dtype == dtype
            np.testing.assert_array_equal(out.balanced_expert_ids[rank], want_ids)
            assert (out.balanced_active_mask is None) == (want_mask is None)
            if prune:
                np.testing.assert_array_equal(out.balanced_active_mask[rank], want_mask)


def test_a_traced_rank_goes_through_both_phases():
    ranks, table = 4, np.array([[2, 5, 7, 0], [1, 3, 0, 0], [3, 1, 2, 8]], np.int32)
    ids = np.random.default_rng(0).integers(0, 3, (ranks, 5, 2)).astype(np.int32)

    def shard(ids):
        arrays = {"expert_ids": ids, "eplb_table": table}
        numbers = {"world_size": ranks, "local_rank_id": (jax.lax.axis_index("ep") + 1) % ranks}
        _, executor = aclnn.moe_update_expert_get_workspace_size(**arrays, **numbers, product="a3")
        with pytest.raises(TypeError, match="unhashable"):
            hash(executor)
        for wrong in (numbers["local_rank_id"].astype(np.float32), numbers["local_rank_id"][None]):
            with pytest.raises(errors.InvalidArgumentError, match="local_rank_id=.*must be in"):
                aclnn.moe_update_expert(**arrays, **numbers | {"local_rank_id": wrong})
        return aclnn.moe_update_expert(**arrays, **numbers), executor(**arrays)

    got = agree(*over_ep(ranks, shard)(ids)).balanced_expert_ids
    for rank in range(ranks):
        want, _ = reference.update_expert(ids[rank], table, rank=(rank + 1) % ranks, ep_size=ranks, balance="rank")
        np.testing.assert_array_equal(got[rank], want)


def test_a_rank_that_is_an_array_with_a_value_is_checked():
    arrays = {"expert_ids": np.zeros((4, 2), np.int32), "eplb_table": np.ones((3, 2), np.int32)}
    first = aclnn.moe_update_expert_get_workspace_size
    for rank in (1, np.int64(1), np.array(1), jnp.int32(1)):
        executor = first(**arrays, world_size=2, local_rank_id=rank)[1]
        assert dict(executor.attributes)["local_rank_id"] == 1 and hash(executor) is not None
        with pytest.raises(errors.InvalidArgumentError, match=r"local_rank_id=.*2.* must be in \[0, 1\]"):
            first(**arrays, world_size=2, local_rank_id=rank + 1)


# --- barriers and the reset -------------------------------------------------------------------------------------------


@pytest.mark.quick("bfloat16", "bool", "uint32")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "bool", "int8", "uint8", "int16", "uint32"])
def test_barriers_are_the_identity(dtype):
    raw = np.random.default_rng(0).integers(0, 256, (4, 3, 2 * jnp.dtype(dtype).itemsize)).astype(np.uint8)
    x = (raw % 2 if dtype == "bool" else raw).view(jnp.dtype(dtype))  # NaNs included
    patience = np.array([600_000_000], np.int32)
    table = np.tile(moe.make_rank_table(4, np.array([True, True, False, True]), num_experts=4), (4, 1))

    def shard(x, table):
        numbers = {"group": "ep", "world_size": 4}
        outs = [both("distribute_barrier_v2", {"x_ref": x}, numbers)]
        outs.append(both("distribute_barrier_v2", {"x_ref": x, "elastic_info": table}, numbers))
        outs.append(both("distribute_barrier_v2", {"x_ref": x, "time_out": patience}, numbers))
        arrays = {"x_ref": x, "time_out": patience, "elastic_info": table}
        return [*outs, both("distribute_barrier_v2", arrays, numbers)]

    for direct, executed in over_ep(4, shard)(x, table):
        for out in (direct, executed):
            assert out.dtype == x.dtype
            np.testing.assert_array_equal(np.asarray(out).view(np.uint8), x.view(np.uint8))


@pytest.mark.slow
def test_a_barrier_gives_up_on_a_live_rank_and_not_on_a_removed_one():
    patience = np.array([1_500_000], np.int32)

    def shard(x, seconds, table):
        arrays = {"x_ref": delayed(x, seconds), "time_out": patience, "elastic_info": table}
        numbers = {"group": "ep", "world_size": 4}
        _, executor = aclnn.distribute_barrier_v2_get_workspace_size(**jax.tree.map(shape_of, arrays), **numbers)
        return executor(**arrays)

    x, seconds = np.ones((4, 2), np.float32), np.array([0, 0, 4, 0], np.float32)
    everybody = np.tile(moe.make_rank_table(4, num_experts=4), (4, 1))
    without = np.tile(moe.make_rank_table(4, np.arange(4) != 2, num_experts=4), (4, 1))
    program = over_ep(4, shard)
    np.testing.assert_array_equal(program(x, seconds, without), x)
    with pytest.raises(jax.errors.JaxRuntimeError, match="BarrierTimeoutError"):
        jax.block_until_ready(program(x, seconds, everybody))


@pytest.mark.parametrize("need_sync", [0, 1])
def test_buffer_reset(need_sync):
    rng = np.random.default_rng(0)
    window = Window(
        data=rng.integers(1, 9, (4, 6, 3)).astype(np.int8),
        counts=rng.integers(1, 9, (4, 4)).astype(np.int32),
        step=np.arange(1, 5, dtype=np.int32)[:, None],
    )
    mask = np.array([1, 0, 1, 1], np.int32)

    def shard(window, mask):
        numbers = {"group_ep": "ep", "ep_world_size": 4, "need_sync": need_sync}
        return both("moe_distribute_buffer_reset", {"elastic_info": mask, "window": window}, numbers)

    got = agree(*over_ep(4, shard)(window, np.tile(mask, (4, 1))))
    for name in ("data", "counts", "step"):
        old = getattr(window, name)
        want = np.where((mask == 0).reshape(4, *[1] * (old.ndim - 1)), old, 0)
        np.testing.assert_array_equal(getattr(got, name), want)


# --- the grouped pair -------------------------------------------------------------------------------------------------

RANKS, LOCAL, WIDTH, OUT, DENSE = 4, 2, 6, 5, 3
GA, AG = "grouped_mat_mul_allto_allv", "allto_allv_grouped_mat_mul"
QGA, QAG = "quant_grouped_mat_mul_allto_allv", "allto_allv_quant_grouped_mat_mul"
ORACLE = {GA: reference.grouped_matmul_all_to_allv, AG: reference.all_to_allv_grouped_matmul}
ORACLE |= {QGA: ORACLE[GA], QAG: ORACLE[AG]}
INWARD = (AG, QAG)


def tables(kind, rng):
    """The two counts [R, R * e] of all ranks, and as the operator takes them."""
    if kind == "list":  # one list for all ranks: what goes to a peer is what comes from it
        per_expert = rng.integers(0, 3, LOCAL)
        sizes = np.broadcast_to(per_expert, (RANKS, RANKS, LOCAL))
        send, recv = lists(sizes)
        return send, recv, {"send_counts": send[0].tolist(), "recv_counts": recv[0].tolist()}
    send, recv = lists(rng.integers(0, 4, (RANKS, RANKS, LOCAL)))
    return send, recv, {"send_counts": hashable(send), "recv_counts": hashable(recv)}


def compare_pair(name, flags, kind, rng, make):
    """One operator against its oracle; ``make(rows)`` draws its arrays for as many rows of ``gmm_x``."""
    send, recv, counts = tables(kind, rng)
    arrays = make(int(send.sum(axis=1).max()))
    numbers = {"group": "ep", "ep_world_size": RANKS} | flags | counts
    out = agree(*over_ep(RANKS, lambda given: both(name, given, numbers))(arrays))
    transpose = {
        "transpose_gmm_weight": flags.get("trans_gmm_weight", False),
        "transpose_mm_weight": flags.get("trans_mm_weight", False),
    }
    want = ORACLE[name](**arrays, send_counts=send, recv_counts=recv, **transpose)
    dtype = out[0].dtype
    assert out[0].shape[1] == recv.sum(axis=1).max()
    assert (out.mm_y is None) == ("mm_x" not in arrays)
    for got, rows in zip(out[:2], want[:2], strict=True):
        for rank in range(RANKS) if rows is not None else ():
            n = len(rows[rank])
            np.testing.assert_array_equal(
                np.asarray(got[rank][:n], np.float64), rows[rank].astype(dtype).astype(np.float64)
            )
            assert not np.any(np.asarray(got[rank][n:], np.float64))
    if name in INWARD and not flags.get("permute_out_flag", False):
        assert out.permute_out is None
    elif name in INWARD:
        assert out.permute_out.dtype == arrays["gmm_x"].dtype
        for rank in range(RANKS):
            rows = np.asarray(want[2][rank]).astype(arrays["gmm_x"].dtype)
            np.testing.assert_array_equal(out.permute_out[rank][: len(rows)].view(np.uint8), rows.view(np.uint8))


@pytest.mark.quick("table-False-True-allto_allv_grouped_mat_mul", "list-True-True-grouped_mat_mul_allto_allv")
@pytest.mark.parametrize("name", [GA, AG])
@pytest.mark.parametrize(
    ("kind", "transpose", "dense"), [("table", False, True), ("list", True, True), ("table", True, False)]
)
def test_grouped(name, kind, transpose, dense):
    rng = np.random.default_rng(0)
    weight = (OUT, WIDTH) if transpose else (WIDTH, OUT)
    flags = {"trans_gmm_weight": transpose, "trans_mm_weight": transpose and dense}
    flags |= {"permute_out_flag": dense} if name == AG else {}

    def make(rows):
        shapes = {"gmm_x": (rows, WIDTH), "gmm_weight": (LOCAL, *weight)}
        shapes |= {"mm_x": (DENSE, WIDTH), "mm_weight": weight} if dense else {}
        dtype = DTYPES["bfloat16" if transpose else "float16"]
        return {key: rng.integers(-3, 4, (RANKS, *shape)).astype(dtype) for key, shape in shapes.items()}

    compare_pair(name, flags, kind, rng, make)


QUANTISED = [
    (1, INT8, "float16", False, "table"),
    (1, INT8, "bfloat16", True, "list"),
    (6, jnp.float8_e4m3fn, "bfloat16", False, "table"),
    (6, E2M1, "float16", True, "table"),
]


@pytest.mark.quick("6-float4_e2m1fn-float16-True-table-quant_grouped_mat_mul_allto_allv")
@pytest.mark.parametrize("name", [QGA, QAG])
@pytest.mark.parametrize(("mode", "kind", "y_dtype", "transpose", "counts"), QUANTISED)
def test_quantised(name, mode, kind, y_dtype, transpose, counts):
    rng = np.random.default_rng(0)
    hidden = 66 if mode == 6 else WIDTH
    weight, axis = ((OUT, hidden), 1) if transpose else ((hidden, OUT), 0)
    flags = {f"{part}_{side}_quant_mode": mode for part in ("gmm", "mm") for side in ("x", "weight")}
    flags |= {"trans_gmm_weight": transpose, "trans_mm_weight": transpose, "y_dtype": y_dtype}
    flags |= {"permute_out_flag": True} if name == QAG else {}

    def numbers(shape):
        if kind in (INT8, E2M1):
            return codes(rng, kind, shape)
        return rng.integers(-4, 5, shape).astype(np.float32).astype(kind)

    def make(rows):
        arrays = {}
        for part, x, matrix in (("gmm", (rows, hidden), (LOCAL, *weight)), ("mm", (DENSE, hidden), weight)):
            arrays |= {f"{part}_x": numbers((RANKS, *x)), f"{part}_weight": numbers((RANKS, *matrix))}
            arrays[f"{part}_x_scale"] = scales(rng, mode == 6, RANKS, x, 1)
            arrays[f"{part}_weight_scale"] = scales(rng, mode == 6, RANKS, matrix, axis + len(matrix) - 2)
        return arrays

    compare_pair(name, flags, counts, rng, make)


# --- what an executor refuses -----------------------------------------------------------------------------------------


def test_an_executor_takes_what_was_checked_and_nothing_else():
    ids, table = np.zeros((4, 2), np.int32), np.ones((3, 2), np.int32)
    _, executor = aclnn.moe_update_expert_get_workspace_size(ids, table, world_size=2, local_rank_id=0)
    run = jax.jit(lambda ids, table: executor(expert_ids=ids, eplb_table=table))
    assert run(ids, table).balanced_expert_ids.tolist() == [[1, 1]] * 4
    for arrays, error, text in (
        ({"expert_ids": ids}, errors.MissingArgumentError, "eplb_table"),
        ({"expert_ids": ids[:2], "eplb_table": table}, errors.ShapeError, "expert_ids"),
        ({"expert_ids": ids, "eplb_table": table.astype(np.int16)}, errors.DtypeError, "eplb_table"),
        ({"expert_ids": ids, "eplb_table": table, "active_mask": ids}, errors.InvalidArgumentError, "active_mask"),
    ):
        with pytest.raises(error, match=text):
            executor(**arrays)
