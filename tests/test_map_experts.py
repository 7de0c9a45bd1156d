"""Experts of your own in the rounds of the layer.

The law: ``y[t] = sum_k w[t, k] * expert(id[t, k])(x[t])`` and its gradients, by a float64 loop over tokens, for experts
that no layer of ours has: another width out, parameters in a tree, integers among them, and rows past the last one
that would poison a sum. Whole numbers make every sum exact.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import expert_ids as draw_ids
from helpers import mesh_of, small_integers
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import reference

T, H, WIDE, E, K = 4, 3, 5, 8, 2


def experts(params, rows, group_sizes):
    """A product to another width, scaled by powers of two, and a bias by expert; integers say which scale."""
    ids = jnp.repeat(jnp.arange(len(group_sizes)), group_sizes, total_repeat_length=rows.shape[0])
    scale = jnp.exp2(params["exponent"].astype(rows.dtype))[ids][:, None]
    made = moe.grouped_matmul(rows, params["inner"]["w"], group_sizes)
    return made * scale + params["inner"]["b"][ids] * jnp.sum(rows, axis=1, keepdims=True)


def drawn(rng, ep, tp, pattern):
    """Global arrays: parameters by expert, tokens, choices, a cotangent."""
    tokens = T * ep * tp
    params = {
        "inner": {"w": small_integers(rng, (E, H, WIDE)), "b": small_integers(rng, (E, WIDE))},
        "exponent": rng.integers(-1, 3, E).astype(np.int32),
    }
    ids = draw_ids(pattern, rng, (tokens, K), E, ep)
    weights, x, ct = (small_integers(rng, shape) for shape in ((tokens, K), (tokens, H), (tokens, WIDE)))
    return (
        params,
        x,
        ids,
        np.where(ids < 0, np.nan, weights).astype(np.float32),
        ct,
    )  # a weight of no choice is anything


def oracle(params, x, ids, weights, ct, tp=1):
    """(y, d_w, d_b, d_x, d_weights), token by token in float64. Each of ``tp`` ranks adds the same once more."""
    w, b = (params["inner"][name].astype(np.float64) for name in "wb")
    x, weights, ct = (array.astype(np.float64) for array in (x, weights, ct))
    y, d_w, d_b, d_x, d_weights = (
        np.zeros_like(ct),
        np.zeros_like(w),
        np.zeros_like(b),
        np.zeros_like(x),
        np.zeros_like(weights),
    )
    for t, k in np.ndindex(ids.shape):
        e = ids[t, k]
        if e < 0:
            continue
        scale = 2.0 ** params["exponent"][e] * tp
        made = x[t] @ w[e] * scale + b[e] * x[t].sum() * tp
        y[t] += weights[t, k] * made
        d_weights[t, k] = made @ ct[t]
        d_made = weights[t, k] * ct[t]
        d_w[e] += np.outer(x[t], d_made) * scale
        d_b[e] += d_made * x[t].sum() * tp
        d_x[t] += w[e] @ d_made * scale + (b[e] @ d_made) * tp
    return y, d_w, d_b, d_x, d_weights


def on_mesh(mesh, plan, fn=experts, **options):
    """(params, x, ids, weights) -> (y, stats), with parameters by expert and tokens over everything."""
    tokens = P(plan.token_axes)

    def shard(params, x, ids, weights):
        return moe.map_experts(fn, params, x, ids, weights, plan, **options)

    return jax.shard_map(shard, mesh=mesh, in_specs=(P(plan.ep_axis), tokens, tokens, tokens), out_specs=(tokens, P()))


def check(ep, tp, pattern, **options):
    mesh = mesh_of(ep, tp)
    chunks = options.pop("chunks", 1)
    sizes = {"tokens_per_rank": T, "hidden": H, "num_experts": E, "top_k": K, "dtype": "float32", "poison": True}
    plan = moe.make_plan(mesh, **sizes | options)
    params, x, ids, weights, ct = drawn(np.random.default_rng(0), ep, tp, pattern)
    weights[ids < 0] = np.nan  # of a choice that is none, anything
    layer = on_mesh(mesh, plan, chunks=chunks)

    def loss(floats, x, weights):
        y, stats = layer({"inner": floats, "exponent": params["exponent"]}, x, ids, weights)
        return jnp.sum(y * ct), (y, stats)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (y, stats)), (d_params, d_x, d_weights) = run(params["inner"], x, weights)
    got = (y, d_params["w"], d_params["b"], d_x, d_weights)
    for found, wanted in zip(got, oracle(params, x, ids, weights, ct, tp), strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(stats.load, np.bincount(ids[ids >= 0], minlength=E))
    assert stats.num_dropped == 0 and not stats.losses
    return stats


@pytest.mark.parametrize(
    "transport", ["padded", *(pytest.param(t, marks=pytest.mark.slow) for t in ("allgather", "ragged"))]
)
def test_values_and_gradients_at_any_skew(transport):
    assert check(4, 1, "one_rank", transport=transport, capacity_factor=0.5).num_rounds > 2


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["random", "masked", "none"])
@pytest.mark.parametrize("ep,tp", [(1, 1), (4, 2), (8, 1)])
def test_values_and_gradients_on_every_mesh(ep, tp, pattern):
    check(ep, tp, pattern)


def test_one_device_and_results_of_tp_ranks_are_added():
    check(1, 1, "masked")
    check(2, 2, "masked")


def test_tables_send_every_pair_to_the_instance_that_the_oracle_says():
    """A row's result is the instance that made it: two choices of a token, told apart by their weights.

    Two groups of devices with experts of their own, tp ranks and chunks, each of which is split for itself; choices
    that are none or of no expert, padding; another table and other shares in the same program. Statistics are those of
    the logical experts.
    """
    dp, ep, tp, chunks, tokens, instances = 2, 2, 2, 2, 12, 6
    mesh = jax.make_mesh((dp, ep, tp), ("dp", "ep", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    sizes = {"tokens_per_rank": tokens, "hidden": H, "num_experts": instances, "top_k": K, "dtype": "float32"}
    plan = moe.make_plan(mesh, token_axes=("dp", "ep", "tp"), **sizes, num_zero_experts=1)

    def names(ids, rows, group_sizes):
        return jnp.repeat(ids, group_sizes, total_repeat_length=rows.shape[0])[:, None] + jnp.zeros((1, H))

    def shard(*given):
        *data, mask, table, shares = given
        return moe.map_experts(
            names, *data, plan, token_mask=mask, table=table, balance="load", shares=shares, chunks=chunks
        )

    everyone = P(plan.token_axes)
    specs = (P("ep"), everyone, everyone, everyone, everyone, P(), P())
    run = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=(everyone, P())))
    rng, ranks = np.random.default_rng(0), dp * ep * tp
    weights = np.tile(np.array([1, 64], np.float32), (ranks * tokens, 1))
    x = np.ones((ranks * tokens, H), np.float32)
    for slots in ([0, 1, 2, 0, 0, 1], [1, 0, 0, 2, 2, 2]):
        placement = moe.Placement(physical_to_logical=np.array(slots), num_logical_experts=3, num_ranks=ep)
        table, shares = placement.table(4), rng.choice([0, 0.25, 0.5, 1], (3, 4)).astype(np.float32)
        ids = rng.choice([-1, 0, 0, 0, 1, 2, 3, 4], (ranks * tokens, K)).astype(np.int32)  # 3 is the zero expert
        mask = rng.random(ranks * tokens) < 0.9
        y, stats = run(np.arange(instances, dtype=np.float32), x, ids, weights, mask, table, shares)
        logical = np.where(mask[:, None] & (ids < 3), ids, -1).reshape(dp, ep * tp * chunks, tokens // chunks, K)
        wanted = np.zeros(logical.shape)
        for group, part in np.ndindex(dp, ep * tp * chunks):
            wanted[group, part], _ = reference.update_expert(
                logical[group, part], table, rank=part, ep_size=ep * tp * chunks, balance="load", shares=shares
            )
        wanted = np.where(wanted >= 0, wanted * tp, 0).reshape(-1, K) @ [1, 64]
        np.testing.assert_array_equal(y, np.repeat(wanted[:, None], H, axis=1))
        active = ids[np.repeat(mask[:, None], K, axis=1) & (ids >= 0)]
        np.testing.assert_array_equal(stats.load, np.bincount(active, minlength=5)[:4])
    assert run._cache_size() == 1


@pytest.mark.slow
def test_chunks_and_hierarchy():
    check(4, 1, "random", chunks=2)
    mesh = moe.make_mesh(ep=4, nodes=2)
    sizes = {"tokens_per_rank": T, "hidden": H, "num_experts": E, "top_k": K, "dtype": "float32"}
    plan = moe.make_plan(mesh, **sizes, transport="hierarchy")
    params, x, ids, weights, ct = drawn(np.random.default_rng(0), 4, 1, "random")
    y, _ = jax.jit(on_mesh(mesh, plan))(params, x, ids, weights)
    np.testing.assert_array_equal(y, oracle(params, x, ids, weights, ct)[0])


@pytest.mark.slow
def test_integers_are_parameters_without_a_gradient():
    mesh = mesh_of(2, 1)
    plan = moe.make_plan(
        mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32", capacity_factor=0.5
    )
    params, x, ids, weights, _ = drawn(np.random.default_rng(0), 2, 1, "one_rank")
    layer = on_mesh(mesh, plan)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(layer(params, x, ids, weights)[0]), allow_int=True))(params)
    assert grads["exponent"].dtype == jax.dtypes.float0
    chex.assert_tree_all_finite(grads["inner"])


def test_padding_and_weightless_experts():
    """Zero experts add nothing, copy experts the token itself; padding may hold anything, and counts nowhere."""
    mesh = mesh_of(2, 1)
    sizes = {"tokens_per_rank": 2, "hidden": H, "num_experts": 2, "top_k": 2, "dtype": "float32"}
    plan = moe.make_plan(mesh, **sizes, num_zero_experts=1, num_copy_experts=1)
    mask = np.array([True, True, True, False])
    x = np.arange(4 * H, dtype=np.float32).reshape(4, H)
    x[3] = np.nan
    ids = np.array([[0, 2], [3, 1], [3, 3], [0, 1]], np.int32)

    def shard(x, ids, mask):
        return moe.map_experts(lambda _, rows, sizes: 10 * rows, (), x, ids, jnp.ones((2, 2)), plan, token_mask=mask)

    y, stats = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P("ep"), out_specs=(P("ep"), P())))(x, ids, mask)
    np.testing.assert_array_equal(y, x[:3].repeat([1, 1, 1], 0)[[0, 1, 2, 0]] * np.array([[10], [11], [2], [0]]))
    np.testing.assert_array_equal(stats.load, [1, 1, 1, 3])


def test_no_tokens_at_all():
    mesh = mesh_of(2, 1)
    plan = moe.make_plan(mesh, tokens_per_rank=0, hidden=H, num_experts=E, top_k=K, dtype="float32")
    params, *_ = drawn(np.random.default_rng(0), 2, 1, "random")
    y, stats = jax.jit(on_mesh(mesh, plan))(params, jnp.ones((0, H)), jnp.ones((0, K), jnp.int32), jnp.ones((0, K)))
    assert y.shape == (0, WIDE) and not stats.load.any()
    with pytest.raises(moe.errors.ShapeError, match="fn returned tuple"):
        layer = on_mesh(mesh, plan, lambda p, rows, n: (rows,))
        layer(params, jnp.ones((0, H)), jnp.ones((0, K), jnp.int32), jnp.ones((0, K)))


@pytest.mark.parametrize("ep,factor", [(1, 1.0), (2, 0.5), (2, 2.0)])
def test_traced_values_from_outside_are_refused_on_every_mesh(ep, factor):
    """Whether they could be read would else depend on the number of rounds, and a gradient on the mesh."""
    mesh = mesh_of(ep, 1)
    plan = moe.make_plan(
        mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32", capacity_factor=factor
    )
    _, x, ids, weights, _ = drawn(np.random.default_rng(0), ep, 1, "random")

    def total(scale):
        return on_mesh(mesh, plan, lambda p, rows, n: rows * scale)((), x, ids, weights)[0].sum()

    jax.eval_shape(lambda: total(np.float32(3)))  # a value that is known may be read
    with pytest.raises(moe.errors.InvalidArgumentError, match=r"fn='<lambda>' reads traced values.*float32\[\]"):
        jax.eval_shape(jax.grad(total), 3.0)


WRONG = {
    "no function": ({"fn": 3}, moe.errors.InvalidArgumentError, "fn=3 must be a function"),
    "rows lost": (
        {"fn": lambda p, rows, n: rows[1:]},
        moe.errors.ShapeError,
        r"fn returned an array of shape \(\d+, 3\)",
    ),
    "no array": ({"fn": lambda p, rows, n: None}, moe.errors.ShapeError, "fn returned NoneType"),
    "integers": ({"fn": lambda p, rows, n: rows.astype(int)}, moe.errors.DtypeError, "what fn returned has dtype int"),
    "ids": ({"expert_ids": np.ones((2 * T, K), np.int64)}, moe.errors.DtypeError, "expert_ids has dtype"),
    "weights": (
        {"combine_weights": np.ones((2 * T, 3), np.float32)},
        moe.errors.ShapeError,
        "combine_weights has shape",
    ),
    "chunks": ({"chunks": 3}, moe.errors.InvalidArgumentError, "chunks=3 does not divide"),
    "plan": ({"num_const_experts": 1}, moe.errors.UnsupportedError, "constant experts have parameters"),
}


@pytest.mark.parametrize("name", WRONG)
def test_misuse_is_one_clear_error(name):
    given, error, words = WRONG[name]
    mesh = mesh_of(2, 1)
    options = {name: given[name] for name in ("num_const_experts",) if name in given}
    plan = moe.make_plan(mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32", **options)
    params, x, ids, weights, _ = drawn(np.random.default_rng(0), 2, 1, "random")
    with jax.enable_x64(error is moe.errors.DtypeError), pytest.raises(error, match=words):
        layer = on_mesh(mesh, plan, given.get("fn", experts), chunks=given.get("chunks", 1))
        jax.eval_shape(layer, params, x, given.get("expert_ids", ids), given.get("combine_weights", weights))


def test_other_data_traces_nothing_again():
    mesh, traces = mesh_of(2, 1), []
    plan = moe.make_plan(mesh, tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32")

    def noted(params, rows, group_sizes):
        traces.append(rows.shape)
        return experts(params, rows, group_sizes)

    layer = jax.jit(on_mesh(mesh, plan, noted))
    counts = []
    for seed in range(3):
        params, x, ids, weights, _ = drawn(np.random.default_rng(seed), 2, 1, "zipf")
        layer(params, x, ids, weights)
        counts.append(len(traces))
    assert counts[0] == counts[2] > 0
