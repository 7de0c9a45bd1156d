"""The layer against the float64 oracle: values and every gradient, on every mesh and transport, at any skew.

What everybody runs takes a few programs, and asks many laws of each: see ``program`` in ``layer_cases``.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MANY_WORLDS, MOSTLY_PADDED, mesh_of, over_mesh
from layer_cases import (
    EXPERTS,
    LAST_BITS,
    PATTERNS,
    TOLERANCE,
    F,
    H,
    K,
    T,
    assert_close,
    compare,
    make,
    make_params,
    program,
    steered_tokens,
    value_and_grads,
)

import moe_jax as moe
from moe_jax import reference
from moe_jax.activations import TABLE
from moe_jax.layer.experts import activate, is_gated


def run_patterns(ep, tp, transport, repeats):
    init, run = program(ep, tp, transport)
    rng, rounds = np.random.default_rng([ep, tp, repeats]), {}
    for pattern in PATTERNS:
        for _ in range(repeats):
            x, mask = steered_tokens(pattern, rng, T * ep * tp, ep)
            stats = compare(run, make_params(init, rng), x, mask, moe.RouterConfig(), rng)
            rounds[pattern] = max(rounds.get(pattern, 0), int(stats.num_rounds))
    return rounds


def check_world(ep, tp, transport, repeats):
    """At any skew, in as many rounds as it takes, by one program for all routes."""
    rounds = run_patterns(ep, tp, transport, repeats)
    assert rounds["balanced"] == 1
    assert rounds["one_rank"] == (1 if ep == 1 else min(ep, EXPERTS // K)), "overflow must take further rounds"
    assert program(ep, tp, transport)[1]._cache_size() == 1


def test_equals_oracle():
    check_world(4, 2, "padded", repeats=1)


@pytest.mark.slow
@pytest.mark.parametrize("ep,tp,transport", MANY_WORLDS)
def test_equals_oracle_many(ep, tp, transport):
    """14 worlds x 6 patterns x 15 = 1260 generated cases, every gradient of each."""
    check_world(ep, tp, transport, repeats=15)


ROUTERS = [  # every option by itself is in test_routing
    moe.RouterConfig(score="sigmoid", selection_bias=True, num_groups=4, top_groups=2, scale=2.5),
    moe.RouterConfig(topk_first=True),
    moe.RouterConfig(renormalize=False, scale=16.0),
    moe.RouterConfig(score="sqrt_softplus", selection_bias=True, scale=1.5),
    moe.RouterConfig(num_groups=4, top_groups=2, group_score="max", renormalize=False),
]


def check_options(seed, ep, tp, router=None, *, pattern="random", top_k=K, activation="swiglu"):
    """One case with these options against the oracle."""
    rng, router = np.random.default_rng(seed), router or moe.RouterConfig()
    _, init, apply = make(ep, tp, router=router, top_k=top_k, activation=activation)
    params = make_params(init, rng)
    if activation != "swiglu":
        params["w_up"], params["b_up"] = 4 * params["w_up"], 4 * params["b_up"]  # so that some values are clamped
    x, mask = steered_tokens(pattern, rng, T * ep * tp, ep, top_k)
    compare(value_and_grads(apply), params, x, mask, router, rng, top_k, activation)


@pytest.mark.slow
def test_options_together():
    """A router of groups with a bias, a clamped activation, three choices per token: all in one program."""
    check_options(1, 4, 1, ROUTERS[0], top_k=3, activation="clamped_swiglu")


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_routers(router):
    check_options(1, 4, 2, router)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "clamped_swiglu"])
def test_activations(activation):
    check_options(2, 2, 2, pattern="zipf", activation=activation)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 5, 8])
def test_top_k(top_k):
    check_options(3, 4, 1, top_k=top_k)


@pytest.mark.slow
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


@pytest.mark.slow
def test_values_do_not_depend_on_mesh_or_rounds():
    """At any capacity: overflow changes when a row travels, never the sum it enters, nor the place that it has there.

    The last bits are the compiler's: XLA:CPU of JAX 0.12 multiplies a row in an order that the number of rows decides.
    """
    rng = np.random.default_rng(5)
    x, _ = steered_tokens("one_rank", rng, T * 4, 4)
    results = []
    for capacity_factor in (0.2, 4.0):
        _, init, apply = make(4, 1, capacity_factor=capacity_factor)
        params = make_params(init, np.random.default_rng(6))
        y, stats = jax.jit(apply)(params, x)
        results.append((np.asarray(y), int(stats.num_rounds)))
    assert len({rounds for _, rounds in results}) == 2
    for y, _ in results[1:]:
        assert np.abs(y - results[0][0]).max() <= LAST_BITS * np.abs(y).max()


def test_result_of_a_token_does_not_depend_on_the_others():
    rng = np.random.default_rng(7)
    init, run = program(4, 2, "padded")
    params = make_params(init, rng)
    x, mask = steered_tokens("random", rng, T * 8, 4)
    other, _ = steered_tokens("one_rank", rng, T * 8, 4)
    other[3] = x[3]
    y, y_other = (run(params, tokens, mask, np.ones_like(x))[0][1][0] for tokens in (x, other))
    np.testing.assert_array_equal(y[3], y_other[3])
    assert not np.array_equal(y, y_other)


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


@pytest.mark.parametrize("activation", [*TABLE, moe.ClampedSwiGLU(3.0, alpha=1.0, shift=0.5)], ids=str)
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


@pytest.mark.slow
def test_bf16_is_close_and_finite():
    rng = np.random.default_rng(9)
    _, init, apply = make(2, 1, dtype="bfloat16")
    params = make_params(init, rng)
    x, mask = steered_tokens("zipf", rng, T * 2, 2)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)  # the oracle sees what the layer sees
    (_, (y, _)), (d_params, _) = value_and_grads(apply)(params, jnp.asarray(x, jnp.bfloat16), mask, np.ones_like(x))
    expected, _ = reference.moe_layer(params, x, moe.RouterConfig(), top_k=K)
    # four roundings to 8 bits on the way (weights, products, activation, row), each 2**-9 of the largest entry
    assert np.abs(np.asarray(y, np.float64) - expected).max() <= 8 * 2**-9 * np.abs(expected).max()
    chex.assert_tree_all_finite(d_params)
    assert y.dtype == jnp.bfloat16


@pytest.mark.slow
def test_composes_with_scan_and_remat():
    """Two layers in a scan, rematerialised: the gradients of the oracle, one layer after the other."""
    rng, router = np.random.default_rng(10), moe.RouterConfig()
    _, init, apply = make(2, 2)
    layers = [make_params(init, rng) for _ in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x, _ = steered_tokens("zipf", rng, T * 4, 2)

    def scanned(stacked, x):
        body = jax.checkpoint(lambda x, params: (x + apply(params, x)[0], None))
        return jnp.sum(jax.lax.scan(body, x, stacked)[0] ** 2)

    got, d_x = jax.jit(jax.grad(scanned, argnums=(0, 1)))(stacked, x)
    inputs = [x.astype(np.float64)]
    for params in layers:
        inputs.append(inputs[-1] + reference.moe_layer(params, inputs[-1], router, top_k=K)[0])
    ct = 2 * inputs.pop()
    for i in (1, 0):
        expected, ct_x = reference.moe_layer_vjp(layers[i], inputs[i], ct, router, top_k=K)
        ct = ct + ct_x
        for name in got:
            assert_close(f"{name} of layer {i}", got[name][i], expected[name])
    assert_close("x", d_x, ct)


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
        make_params(init, np.random.default_rng(0)),
        np.zeros((0, H), np.float32),
        np.zeros(0, bool),
        np.zeros((0, H), np.float32),
    )
    assert y.shape == (0, H) and int(stats.load.sum()) == 0
    chex.assert_trees_all_equal(d_params, jax.tree.map(jnp.zeros_like, d_params))


def test_two_runs_agree_to_the_bit():
    rng = np.random.default_rng(13)
    init, run = program(4, 2, "padded")
    params = make_params(init, rng)
    x, mask = steered_tokens("zipf", rng, T * 8, 4)
    first, second = (run(params, x, mask, np.ones_like(x)) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@functools.cache
def _initial(ep, tp):
    return jax.tree.map(np.asarray, make(ep, tp)[1](jax.random.key(3)))


@pytest.mark.slow
def test_initial_parameters_do_not_depend_on_the_mesh():
    """Nor on the number of a device's weights, but for last bits of the normal distribution's inverse."""
    chex.assert_trees_all_close(_initial(1, 1), _initial(4, 2), _initial(2, 4), rtol=LAST_BITS, atol=0)
