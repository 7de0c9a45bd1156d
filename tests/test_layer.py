"""The layer against the float64 oracle: values and every gradient, on every mesh and transport, at any skew.

Routing is steered through x: each token carries a bump per wanted expert, and the router reads it off. So one
compiled program serves all patterns.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FEW_WORLDS, MESHES, MOSTLY_PADDED, TRANSPORTS, expert_ids, mesh_of, over_mesh

import moe_jax as moe
from moe_jax import reference
from moe_jax.config import ACTIVATIONS
from moe_jax.layer.experts import activate, is_gated

H, F, K, T = 16, 8, 2, 8
EXPERTS = 8
BALANCE, Z = 0.3, 0.01  # weights of the losses, so that their gradients are in every comparison
PATTERNS = ["balanced", "random", "zipf", "one_rank", "empty_experts", "masked"]

# fp32 against float64, relative to the largest entry of each array: sums of at most ~1000 terms of like size.
TOLERANCE = 1e-5
LAST_BITS = 2.0**-20  # a few roundings of fp32: two programs for the same sums


def make(ep, tp, transport="padded", router=None, *, shared=1, activation="swiglu", **options):
    mesh = mesh_of(ep, tp)
    defaults = {"dtype": "float32", "capacity_factor": 1.0, "poison": True, "top_k": K, "tokens_per_rank": T}
    plan = moe.make_plan(
        mesh,
        hidden=H,
        num_experts=EXPERTS,
        transport=transport,
        num_shared_experts=shared,
        **{**defaults, **options},
    )
    init, apply = moe.moe_on_mesh(mesh, plan, router or moe.RouterConfig(), ffn=F, activation=activation, use_bias=True)
    return plan, init, apply


def steered_tokens(pattern, rng, num_tokens, ep, top_k=K):
    """x [N, H] whose routes follow ``pattern``, and the token mask."""
    kind = "random" if pattern == "masked" else pattern
    ids = expert_ids(kind, rng, (num_tokens, top_k), EXPERTS, ep)
    x = 0.3 * rng.normal(size=(num_tokens, H))
    for k in range(top_k):
        x[np.arange(num_tokens), ids[:, k]] += 3.0 - 0.5 * k
    mask = rng.random(num_tokens) < 0.6 if pattern == "masked" else np.ones(num_tokens, bool)
    return x.astype(np.float32), mask


def make_params(init, rng):
    params = jax.tree.map(np.asarray, init(jax.random.key(int(rng.integers(2**31)))))
    params = {name: 0.5 * value + 0.1 * rng.normal(size=value.shape) for name, value in params.items()}
    params["router"] *= 0.3  # the rest of the router must not outvote a bump
    params["router"][:EXPERTS] += 1.5 * np.eye(EXPERTS)
    return jax.tree.map(lambda a: a.astype(np.float32), params)


def value_and_grads(apply):
    def loss(params, x, mask, ct):
        y, stats = apply(params, x, mask)
        return jnp.sum(y * ct) + BALANCE * stats.losses["balance"] + Z * stats.losses["z"], (y, stats)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def assert_close(name, got, expected):
    got, scale = np.asarray(got, np.float64), max(np.abs(expected).max(initial=0.0), 1e-6)
    assert got.shape == expected.shape, name
    error = np.abs(got - expected).max(initial=0.0) / scale
    assert error <= TOLERANCE, f"{name}: off by {error:.2e} of its largest entry"


def compare(run, params, x, mask, router, rng, top_k=K, activation="swiglu"):
    """One case through the layer and the oracle. Returns the stats."""
    ct = rng.normal(size=x.shape).astype(np.float32)
    poisoned = np.where(mask[:, None], x, np.nan).astype(np.float32)  # padding may hold anything
    (_, (y, stats)), (d_params, d_x) = run(params, poisoned, mask, ct)
    options = {"top_k": top_k, "activation": activation, "token_mask": mask}
    expected, routing = reference.moe_layer(params, x, router, **options)
    ct_params, ct_x = reference.moe_layer_vjp(params, x, ct, router, ct_balance=BALANCE, ct_z=Z, **options)
    assert_close("y", y, expected)
    assert_close("x", d_x, ct_x)
    assert set(d_params) == set(ct_params)
    for name in d_params:
        assert_close(name, d_params[name], ct_params[name])
    np.testing.assert_array_equal(stats.load, routing.load)
    assert_close("balance", stats.losses["balance"], np.asarray(routing.losses["balance"]))
    assert_close("z", stats.losses["z"], np.asarray(routing.losses["z"]))
    assert int(stats.num_dropped) == 0
    return stats


def run_patterns(ep, tp, transport, repeats):
    _, init, apply = make(ep, tp, transport)
    run, rng, rounds = value_and_grads(apply), np.random.default_rng([ep, tp, repeats]), {}
    for pattern in PATTERNS:
        for _ in range(repeats):
            x, mask = steered_tokens(pattern, rng, T * ep * tp, ep)
            stats = compare(run, make_params(init, rng), x, mask, moe.RouterConfig(), rng)
            rounds[pattern] = max(rounds.get(pattern, 0), int(stats.num_rounds))
    return rounds


@pytest.mark.quick("1-1-padded", "8-1-padded", "4-2-ragged", "4-2-allgather")
@pytest.mark.parametrize("ep,tp,transport", FEW_WORLDS)
def test_equals_oracle(ep, tp, transport):
    rounds = run_patterns(ep, tp, transport, repeats=1)
    assert rounds["balanced"] == 1
    assert rounds["one_rank"] == (1 if ep == 1 else min(ep, EXPERTS // K)), "overflow must take further rounds"


@pytest.mark.slow
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("ep,tp", MESHES)
def test_equals_oracle_many(ep, tp, transport):
    """8 meshes x 3 transports x 6 patterns x 15 = 2160 generated cases, every gradient of each."""
    run_patterns(ep, tp, transport, repeats=15)


ROUTERS = [moe.RouterConfig(score="sigmoid", selection_bias=True, num_groups=4, top_groups=2, scale=2.5)]
SLOW_ROUTERS = [  # every option by itself is in test_routing
    moe.RouterConfig(topk_first=True),
    moe.RouterConfig(renormalize=False, scale=16.0),
    moe.RouterConfig(score="sqrt_softplus", selection_bias=True, scale=1.5),
    moe.RouterConfig(num_groups=4, top_groups=2, group_score="max", renormalize=False),
]
ROUTERS += [pytest.param(router, marks=pytest.mark.slow) for router in SLOW_ROUTERS]


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_routers(router):
    rng = np.random.default_rng(1)
    _, init, apply = make(4, 2, router=router)
    x, mask = steered_tokens("random", rng, T * 8, 4)
    compare(value_and_grads(apply), make_params(init, rng), x, mask, router, rng)


@pytest.mark.parametrize("activation", [pytest.param("gelu", marks=pytest.mark.slow), "clamped_swiglu"])
def test_activations(activation):
    rng = np.random.default_rng(2)
    _, init, apply = make(2, 2, activation=activation)
    params = make_params(init, rng)
    params["w_up"], params["b_up"] = 4 * params["w_up"], 4 * params["b_up"]  # so that some values are clamped
    x, mask = steered_tokens("zipf", rng, T * 4, 2)
    compare(value_and_grads(apply), params, x, mask, moe.RouterConfig(), rng, activation=activation)


@pytest.mark.parametrize("top_k", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(8, marks=pytest.mark.slow)])
def test_top_k(top_k):
    rng = np.random.default_rng(3)
    _, init, apply = make(4, 1, top_k=top_k)
    x, mask = steered_tokens("random", rng, T * 4, 4, top_k)
    compare(value_and_grads(apply), make_params(init, rng), x, mask, moe.RouterConfig(), rng, top_k)


@pytest.mark.parametrize("axes", [{"nodes": 2}, {"dp": 2}], ids=str)
def test_node_and_data_axes(axes):
    mesh = moe.make_mesh(ep=4, **axes)
    plan = moe.make_plan(
        mesh, tokens_per_rank=T, hidden=H, num_experts=EXPERTS, top_k=K, dtype="float32", capacity_factor=1.0
    )
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F)
    rng = np.random.default_rng(4)
    x, mask = steered_tokens("one_rank", rng, T * mesh.size, 4)
    compare(value_and_grads(apply), make_params(init, rng), x, mask, moe.RouterConfig(), rng)


def test_values_do_not_depend_on_mesh_or_rounds():
    """At any capacity: overflow changes when a row travels, never the sum it enters, nor the place that it has there.

    The last bits are the compiler's: XLA:CPU of JAX 0.12 multiplies a row in an order that the number of rows decides.
    """
    rng = np.random.default_rng(5)
    x, _ = steered_tokens("one_rank", rng, T * 4, 4)
    results = []
    for capacity_factor in (0.2, 1.0, 4.0):
        _, init, apply = make(4, 1, capacity_factor=capacity_factor)
        params = make_params(init, np.random.default_rng(6))
        y, stats = jax.jit(apply)(params, x)
        results.append((np.asarray(y), int(stats.num_rounds)))
    assert len({rounds for _, rounds in results}) == 3
    for y, _ in results[1:]:
        assert np.abs(y - results[0][0]).max() <= LAST_BITS * np.abs(y).max()


def test_result_of_a_token_does_not_depend_on_the_others():
    rng = np.random.default_rng(7)
    _, init, apply = make(4, 2)
    params, run = make_params(init, rng), jax.jit(apply)
    x, _ = steered_tokens("random", rng, T * 8, 4)
    other, _ = steered_tokens("one_rank", rng, T * 8, 4)
    other[3] = x[3]
    np.testing.assert_array_equal(run(params, x)[0][3], run(params, other)[0][3])


@pytest.mark.parametrize("transport", MOSTLY_PADDED)
def test_drop_counts_and_skips(transport):
    """What is dropped is counted, contributes nothing and has no gradient."""
    plan, init, apply = make(4, 1, transport, overflow="drop", capacity_factor=1.0, shared=0)
    rng = np.random.default_rng(8)
    params = make_params(init, rng)
    x, mask = steered_tokens("one_rank", rng, T * 4, 4)
    (_, (y, stats)), (_, _d_x) = value_and_grads(apply)(params, x, mask, np.ones_like(x))
    kept_pairs = 4 * plan.pair_capacity
    assert int(stats.num_dropped) == T * 4 * K - kept_pairs
    assert int(stats.num_rounds) == 1
    assert (np.abs(np.asarray(y)).max(axis=1) == 0).sum() > 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_have_gradients_where_axes_are_manual(activation):
    """Of an expert whose matrices are all the identity: in both modes, and to the second order."""
    x = np.linspace(-9.1, 9.0, 64, dtype=np.float32).reshape(16, 4)  # the kinks at 7 are not among them
    ct, names = 1.0 + x[::-1] / 10, ("w_gate", "w_up", "w_down") if is_gated(activation) else ("w_up", "w_down")

    def shard(x, ct):
        def run(x):
            return activate(x if is_gated(activation) else None, x, activation)

        def slope(x):
            return jax.vjp(run, x)[1](ct)[0]

        return run(x), slope(x), jax.jvp(run, (x,), (ct,))[1], jax.jvp(slope, (x,), (ct,))[1]

    mesh, spec = mesh_of(4, 1), jax.sharding.PartitionSpec("ep")
    y, d_x, forward, second = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec))(x, ct)
    plain = {name: np.eye(4) for name in names}
    want, (want_d, _) = reference.expert_ffn(x, plain, activation), reference.expert_ffn_vjp(ct, x, plain, activation)
    around = (x.astype(np.float64) + step * ct for step in (1e-5, -1e-5))
    steps = [reference.expert_ffn_vjp(ct, point, plain, activation)[0] for point in around]
    for got, expected in ((y, want), (d_x, want_d), (forward, want_d)):
        assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.abs(second - (steps[0] - steps[1]) / 2e-5).max() <= 1e-4


def test_bf16_is_close_and_finite():
    rng = np.random.default_rng(9)
    _, init, apply = make(4, 2, dtype="bfloat16")
    params = make_params(init, rng)
    x, mask = steered_tokens("zipf", rng, T * 8, 4)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)  # the oracle sees what the layer sees
    (_, (y, _)), (d_params, _) = value_and_grads(apply)(params, jnp.asarray(x, jnp.bfloat16), mask, np.ones_like(x))
    expected, _ = reference.moe_layer(params, x, moe.RouterConfig(), top_k=K)
    # four roundings to 8 bits on the way (weights, products, activation, row), each 2**-9 of the largest entry
    assert np.abs(np.asarray(y, np.float64) - expected).max() <= 8 * 2**-9 * np.abs(expected).max()
    chex.assert_tree_all_finite(d_params)
    assert y.dtype == jnp.bfloat16


def test_composes_with_scan_and_remat():
    """Two layers in a scan, rematerialised: the same gradients as written out."""
    rng = np.random.default_rng(10)
    _, init, apply = make(4, 2)
    layers = [make_params(init, rng) for _ in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, _ = steered_tokens("zipf", rng, T * 8, 4)

    def scanned(stacked, x):
        body = jax.checkpoint(lambda x, params: (x + apply(params, x)[0], None))
        return jnp.sum(jax.lax.scan(body, x, stacked)[0] ** 2)

    def unrolled(layers, x):
        for params in layers:
            x = x + apply(params, x)[0]
        return jnp.sum(x**2)

    got = jax.jit(jax.grad(scanned))(stacked, x)
    expected = jax.jit(jax.grad(unrolled))(layers, x)
    for name in got:
        for i in range(2):
            assert_close(name, got[name][i], np.asarray(expected[i][name], np.float64))


def test_per_shard_call_inside_ones_own_shard_map():
    plan, init, _apply = make(4, 2, shared=0)
    rng = np.random.default_rng(11)
    params = make_params(init, rng)
    x, _ = steered_tokens("random", rng, T * 8, 4)
    mesh = mesh_of(4, 2)

    def shard(x, local):
        return moe.moe_layer(local, x, plan, moe.RouterConfig())[0]

    def split(name, value):
        """[W, P, ...]: the part of a parameter that each device holds."""
        if name[:2] not in ("w_", "b_"):
            return np.broadcast_to(value, (4, 2, *value.shape))
        by_rank = value.reshape(4, EXPERTS // 4, *value.shape[1:])
        if name == "b_down":
            return np.stack([by_rank, by_rank], axis=1)
        return np.stack(np.split(by_rank, 2, axis=2 if name == "w_down" else -1), axis=1)

    local = {name: split(name, value) for name, value in params.items()}
    y = jax.jit(over_mesh(mesh, shard))(x.reshape(4, 2, T, H), local)
    expected, _ = reference.moe_layer(params, x, moe.RouterConfig(), top_k=K)
    assert_close("y", np.asarray(y).reshape(-1, H), expected)


@pytest.mark.parametrize("transport", MOSTLY_PADDED)
def test_no_tokens(transport):
    mesh = mesh_of(4, 2)
    plan = moe.make_plan(
        mesh, tokens_per_rank=0, hidden=H, num_experts=EXPERTS, top_k=K, dtype="float32", transport=transport
    )
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=F)
    (_, (y, stats)), (d_params, _) = value_and_grads(apply)(
        init(jax.random.key(0)), np.zeros((0, H), np.float32), np.zeros(0, bool), np.zeros((0, H), np.float32)
    )
    assert y.shape == (0, H) and int(stats.load.sum()) == 0
    chex.assert_trees_all_equal(d_params, jax.tree.map(jnp.zeros_like, d_params))


def test_one_trace_for_all_routes():
    _, init, apply = make(4, 2)
    run = jax.jit(chex.assert_max_traces(apply, n=1))
    rng = np.random.default_rng(12)
    for pattern in PATTERNS:
        x, mask = steered_tokens(pattern, rng, T * 8, 4)
        run(make_params(init, rng), x, mask)


def test_two_runs_agree_to_the_bit():
    rng = np.random.default_rng(13)
    _, init, apply = make(4, 2)
    params, run = make_params(init, rng), value_and_grads(apply)
    x, mask = steered_tokens("zipf", rng, T * 8, 4)
    first, second = (run(params, x, mask, np.ones_like(x)) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@functools.cache
def _initial(ep, tp):
    return jax.tree.map(np.asarray, make(ep, tp)[1](jax.random.key(3)))


def test_initial_parameters_do_not_depend_on_the_mesh():
    """Nor on the number of a device's weights, but for last bits of the normal distribution's inverse."""
    chex.assert_trees_all_close(_initial(1, 1), _initial(4, 2), _initial(2, 4), rtol=LAST_BITS, atol=0)
