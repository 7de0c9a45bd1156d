"""The facade's receive window: what arrives lies in it, a reset clears it, and a rank that missed one gets nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aclnn_cases import WORLDS, agree, bits, both, draw, given, groups, over_ep, over_ranks, over_world
from family_cases import Config, dispatch_arrays

import moe_jax as moe
from moe_jax import _compat, aclnn, errors
from moe_jax.recovery.window import Window
from moe_jax.tools.stragglers.faults import delayed

H, W = 8, 4
NAMES = {
    "shared": WORLDS["shared"],  # V3
    "tp": WORLDS["tp"],  # V2
    "codes": WORLDS["codes"],
    "elastic": WORLDS["elastic"],
    # Rows that were quantised before, over fullmesh_v2.
    "ready": Config(world=4, tokens=6, local_experts=2, top_k=2, mask="tokens", expand_scales=True),
}


def arrays_of(config, drawn):
    return given({"x": drawn["x"], "expert_ids": drawn["expert_ids"], **dispatch_arrays(config, drawn)})


def drawn_for(name, rng):
    config, drawn = NAMES[name], draw(rng, NAMES[name])
    if name == "ready":
        shape = drawn["x"].shape
        drawn["x"] = rng.integers(1, 100, shape).astype(np.uint8).view(jnp.float8_e4m3fn)
        drawn["scales"] = rng.integers(1, 9, (*shape[:-1], 3)).astype(np.float32)
    return config, drawn


def used_twice(config, drawn):
    """Dispatch without a window; with a new one, both ways; and with that one again."""
    arrays, numbers = arrays_of(config, drawn), config.dispatch | groups(config)
    window = aclnn.make_receive_window(**arrays, **numbers)
    plain = aclnn.moe_distribute_dispatch_v4(**arrays, **numbers)
    once = both("moe_distribute_dispatch_v4", arrays | {"window": window}, numbers)
    again = aclnn.moe_distribute_dispatch_v4(**arrays, **numbers, window=once[0].window)
    return plain, once, again


@pytest.mark.quick("shared", "codes")
@pytest.mark.parametrize("name", NAMES)
def test_what_arrives_lies_in_the_window(name):
    """The outputs are those without a window, and the window has a message per row, with its triple at the end."""
    config, drawn = drawn_for(name, np.random.default_rng(0))
    program = over_world(config, functools.partial(used_twice, config))
    plain, once, again = jax.tree.map(np.asarray, program(over_ranks(config, drawn)))
    once = agree(*once)
    for sent, step in ((once, 1), (again, 2)):
        assert type(sent) is aclnn.WindowDispatchOutput and sent._fields[:-2] == plain._fields
        for one, other in zip(sent[:-2], plain, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_array_equal(bits(one), bits(other))
        assert (sent.window.step == step).all() and not sent.num_stale.any()
    total = 0
    for rank in np.ndindex(once.num_stale.shape[:2]):
        num_rows = plain.ep_recv_counts[rank].reshape(max(config.tp, 1), -1)[0].max()
        triples = plain.assist_info_for_combine[rank][: 3 * num_rows].reshape(-1, 3)
        assert once.window.counts[rank].sum() == num_rows
        if not config.elastic:  # triples hold logical ranks
            np.testing.assert_array_equal(once.window.counts[rank], np.bincount(triples[:, 0], minlength=config.world))
        messages = {(row[-12:].tobytes(), row[:-12].tobytes()) for row in once.window.data[rank]}
        rows = plain.expand_x[rank][:num_rows] if config.quant_mode == 0 else np.zeros((num_rows, 0), np.uint8)
        for triple, row in zip(triples, rows, strict=True):  # the row itself comes first, if it is not quantised here
            assert any(tag == triple.tobytes() and rest.startswith(row.tobytes()) for tag, rest in messages)
        total += num_rows
    assert total > 0


MODES = [
    ({"quant_mode": 0}, "bfloat16", None),
    ({"quant_mode": 0}, "float32", None),
    ({"quant_mode": 1}, "float16", (1,)),
    *[({"quant_mode": 2, "y_dtype": kind}, "bfloat16", None) for kind in (None, "int8", "float8_e5m2")],
    ({"quant_mode": 2}, "bfloat16", (8, 130)),  # a row of factors for each expert: each copy is quantised on its own
    ({"quant_mode": 3}, "bfloat16", None),
    *[({"quant_mode": 4, "y_dtype": kind}, "bfloat16", None) for kind in (None, "float4_e2m1fn", "uint8")],
    ({"quant_mode": 5}, "bfloat16", None),
    ({"quant_mode": 0}, "float8_e4m3fn", (3, 5)),
    ({"quant_mode": 0}, "float4_e2m1fn", (3, 5)),
    ({"quant_mode": 0}, "uint8", (3, 7)),
]


@pytest.mark.quick("fullmesh_v2-True")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alg", ["fullmesh_v1", "fullmesh_v2"])
def test_windows_fit_every_message(alg, weighted):
    """Traced only: the program writes a message into the window, so their widths must be the same."""

    def shard(drawn, numbers):
        window = aclnn.make_receive_window(**drawn, **numbers)
        sent = aclnn.moe_distribute_dispatch_v4(**drawn, **numbers, window=window)
        assert sent.window.data.shape == window.data.shape and sent.window.data.dtype == window.data.dtype
        return sent.window.data

    for numbers, dtype, scales in MODES:
        numbers = {"group_ep": "ep", "ep_world_size": 4, "moe_expert_num": 8, "comm_alg": alg, **numbers}
        drawn = {"x": jnp.zeros((4, 3, 130), dtype), "expert_ids": np.zeros((4, 3, 2), np.int32)}
        if scales is not None:
            kind = "uint8" if dtype in ("float4_e2m1fn", "uint8") else "float32"
            drawn["scales"] = np.zeros((4, *scales), kind)
        if weighted:
            drawn["expert_scales"] = np.zeros((4, 3, 2), np.float32)
        jax.eval_shape(over_ep(4, functools.partial(shard, numbers=numbers)), drawn)


@pytest.mark.parametrize("kept", ["window", "performance_info"])
def test_without_tokens_nothing_is_written(kept):
    """Where no rank has a token, the window and the clock come back as they were, and all else is zero."""
    config = Config(world=2, local_experts=1, top_k=2, tokens=0, global_bs=4, expand_scales=True)
    arrays = {"x": np.zeros((2, 1, 0, H), np.float32), "expert_ids": np.zeros((2, 1, 0, 2), np.int32)}
    arrays["expert_scales"] = np.zeros((2, 1, 0, 2), np.float32)
    window = Window(
        data=np.full((2, 1, 2, H * 4 + 16), 7, np.uint8), counts=np.full((2, 1, 2), 3, np.int32),
        step=np.full((2, 1, 1), 5, np.int32),
    )  # fmt: skip
    before = {"window": window, "performance_info": np.full((2, 1, 2), 9, np.int32)}[kept]

    def shard(arrays, before):
        return aclnn.moe_distribute_dispatch_v4(**arrays, **config.dispatch, **groups(config), **{kept: before})

    sent = over_world(config, shard)(arrays, before)
    jax.tree.map(np.testing.assert_array_equal, getattr(sent, kept), before)
    assert sent.expand_x.shape == (2, 1, config.capacity, H) and sent.expand_scales.shape == (2, 1, config.capacity)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(sent._replace(**{kept: None})))


# --- a rank is lost ---------------------------------------------------------------------------------------------------

LOST = 2
RECOVERY = Config(world=W, local_experts=2, top_k=2, tokens=5, hidden=H)


def recover(drawn, mask, table):
    """Dispatch; a reset that rank LOST misses; dispatch with its rank table, and without; and combine of each."""
    config, numbers = RECOVERY, RECOVERY.dispatch | groups(RECOVERY)
    arrays = {"x": drawn["x"], "expert_ids": drawn["expert_ids"]}
    first = aclnn.moe_distribute_dispatch_v2(
        **arrays, **older(numbers), window=aclnn.make_receive_window(**arrays, **numbers)
    )
    reset = {"elastic_info": mask, "window": first.window}
    clean = both("moe_distribute_buffer_reset", reset, {"group_ep": "ep", "ep_world_size": W})[1]
    survived = both("moe_distribute_dispatch_v4", arrays | {"elastic_info": table, "window": clean}, numbers)[1]
    stale = aclnn.moe_distribute_dispatch_v4(**arrays, **numbers, window=clean)
    outs = []
    for sent, info in ((survived, table), (stale, None)):
        outs.append(
            aclnn.moe_distribute_combine_v4(
                sent.expand_x, drawn["expert_ids"], sent.assist_info_for_combine, sent.ep_recv_counts,
                drawn["expert_scales"], elastic_info=info, **config.common, **groups(config),
            ).x_out
        )  # fmt: skip
    return first, clean, survived, stale, outs


def older(numbers):
    return {
        name: value
        for name, value in numbers.items()
        if not name.endswith(("zero_expert_num", "copy_expert_num", "const_expert_num"))
    }


def test_dispatch_reset_dispatch():
    alive = np.arange(W) != LOST
    table = moe.make_rank_table(W, alive, num_experts=RECOVERY.experts)
    drawn = draw(np.random.default_rng(0), RECOVERY)
    names = ("x", "expert_ids", "expert_scales")
    drawn = {name: drawn[name] for name in names}
    drawn["expert_ids"] = drawn["expert_ids"] % (2 * (W - 1))  # legal before and after
    ranks = over_ranks(RECOVERY, drawn)
    tiled = [np.broadcast_to(a, (W, 1, *a.shape)) for a in (alive.astype(np.int32), table)]
    first, clean, survived, stale, outs = jax.tree.map(np.asarray, over_world(RECOVERY, recover)(ranks, *tiled))

    assert (first.window.step == 1).all() and not first.num_stale.any()
    for field in ("data", "counts", "step"):
        got, before = getattr(clean, field)[:, 0], getattr(first.window, field)[:, 0]
        np.testing.assert_array_equal(got[LOST], before[LOST])  # isolated: as it was
        assert not got[alive].any()

    # With the rank table nothing is for the lost rank, and nothing is stale: ids count the experts that are left.
    homes = np.flatnonzero(alive)[drawn["expert_ids"] // 2]  # [W, B, K] who gets each pair
    want = np.zeros((W, W), int)  # [receiver, source]
    for source in np.flatnonzero(alive):
        want[:, source] = np.bincount(homes[source].ravel(), minlength=W)
    np.testing.assert_array_equal(survived.window.counts[:, 0], want)
    assert not survived.num_stale.any() and (survived.window.step[:, 0, 0] == np.where(alive, 1, 2)).all()
    weights, x = drawn["expert_scales"].astype(np.float64), drawn["x"].astype(np.float64)
    y = np.where(alive[:, None, None], weights.sum(axis=-1, keepdims=True) * x, 0)
    np.testing.assert_array_equal(outs[0][:, 0].astype(np.float64), y)

    # Without it pairs to and from the lost rank are held back and counted, and no sum without them passes for a result.
    homes = drawn["expert_ids"] // 2
    held = (homes == LOST) != (np.arange(W) == LOST)[:, None, None]
    np.testing.assert_array_equal(stale.num_stale[:, 0, 0], held.sum(axis=(1, 2)))
    assert held.any()
    exact = weights.sum(axis=-1, keepdims=True) * x
    got = outs[1][:, 0].astype(np.float64)
    assert (np.isnan(got) | (got == exact)).all() and np.isnan(got[held.any(axis=-1)]).all()


@pytest.mark.slow
def test_rows_that_were_quantised_before_have_the_same_gradient_with_a_window():
    config, drawn = drawn_for("ready", np.random.default_rng(1))

    def shard(drawn, ct):
        arrays, numbers = arrays_of(config, drawn), config.dispatch | groups(config)
        window = aclnn.make_receive_window(**arrays, **numbers)

        def loss(scales, weights, window):
            sent = aclnn.moe_distribute_dispatch_v4(
                **arrays | {"scales": scales, "expert_scales": weights}, **numbers, window=window
            )
            return jnp.sum(sent.dynamic_scales * ct) + jnp.sum(sent.expand_scales)

        return [jax.grad(loss, (0, 1))(arrays["scales"], arrays["expert_scales"], w) for w in (None, window)]

    rows = config.world * config.tokens * 2
    ct = np.random.default_rng(2).integers(-3, 4, (config.world, 1, rows, 3)).astype(np.float32)
    plain, windowed = over_world(config, shard)(over_ranks(config, drawn), ct)
    for one, other in zip(plain, windowed, strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.asarray(one).any()


@pytest.mark.slow
def test_a_reset_gives_up_on_a_live_rank_and_not_on_an_isolated_one():
    window = aclnn.make_receive_window(
        *(jax.ShapeDtypeStruct(s, d) for s, d in (((2, 4), "float32"), ((2, 1), "int32"))),
        group_ep="ep", ep_world_size=4, moe_expert_num=4,
    )  # fmt: skip
    patience = np.array([1_500_000], np.int32)

    def shard(window, mask, seconds):
        arrays = {"elastic_info": mask, "window": delayed(window, seconds), "time_out": patience}
        _, executor = aclnn.moe_distribute_buffer_reset_get_workspace_size(**arrays, group_ep="ep", ep_world_size=4)
        return executor(**arrays)

    windows = jax.tree.map(lambda a: np.tile(a, (4, *[1] * a.ndim)), window)
    seconds, program = np.array([0, 0, 4, 0], np.float32), over_ep(4, shard)
    jax.block_until_ready(program(windows, np.tile(np.array([1, 1, 0, 1], np.int32), (4, 1)), seconds))
    with pytest.raises(jax.errors.JaxRuntimeError, match="BarrierTimeoutError"):
        jax.block_until_ready(program(windows, np.ones((4, 4), np.int32), seconds))


# --- bad input --------------------------------------------------------------------------------------------------------

SHAPES = {"x": jax.ShapeDtypeStruct((2, 8), "bfloat16"), "expert_ids": jax.ShapeDtypeStruct((2, 1), "int32")}
NUMBERS = {"group_ep": "ep", "ep_world_size": 2, "moe_expert_num": 2}


def test_windows_that_do_not_fit_are_refused():
    window = aclnn.make_receive_window(**SHAPES, **NUMBERS)

    def shard(x, window):
        return aclnn.moe_distribute_dispatch_v4(x, jnp.zeros((2, 1), jnp.int32), **NUMBERS, window=window).window.step

    def run(window):
        mesh, spec = moe.make_mesh(ep=2), jax.sharding.PartitionSpec
        mapped = _compat.shard_map(shard, mesh=mesh, in_specs=spec(), out_specs=spec("ep"))
        return jax.eval_shape(mapped, jnp.zeros((2, 8), jnp.bfloat16), window)

    assert run(window).shape == (2,)
    for wrong, error, text in (
        (window.data, errors.InvalidArgumentError, "window is a.*make_receive_window"),
        (moe.make_receive_window(moe.make_plan(moe.make_mesh(ep=2), tokens_per_rank=2, hidden=8, num_experts=2, top_k=1,
                                               dtype="bfloat16")), errors.DtypeError, "window has dtype bfloat16"),
        (jax.tree.map(lambda a: a[:1] if a.ndim == 1 else a, window), errors.ShapeError, "window.counts"),
        (jax.tree.map(lambda a: a[1:] if a.ndim == 2 else a, window), errors.ShapeError, "aclnn.make_receive_window"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            run(wrong)


def test_a_window_is_made_for_what_a_dispatch_takes():
    with pytest.raises(errors.UnsupportedError, match="comm_alg='hierarchy'"):
        aclnn.make_receive_window(**SHAPES, **NUMBERS, comm_alg="hierarchy")
    with pytest.raises(errors.ShapeError, match="on a3"):
        aclnn.make_receive_window(**SHAPES, **NUMBERS, product="a3")
    elastic = {"elastic_info": jax.ShapeDtypeStruct((8,), "int32")}
    for product, arrays in ((None, elastic), ("a3", elastic), (None, {})):  # V3's on a3
        wide = SHAPES | {"x": jax.ShapeDtypeStruct((2, 1024), "bfloat16")} | arrays
        assert aclnn.make_receive_window(**wide, **NUMBERS, product=product).data.shape == (4, 2048 + 12)
    with pytest.raises(errors.InvalidArgumentError, match="elastic_info was given.*on a5"):
        aclnn.make_receive_window(**wide | elastic, **NUMBERS, product="a5")
    with pytest.raises(errors.UnexpectedArgumentError, match="window was given"):
        aclnn.make_receive_window(**SHAPES, **NUMBERS, window=None)
