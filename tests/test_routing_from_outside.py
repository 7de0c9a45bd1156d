"""The layer with choices that were made outside: the sums and gradients of the oracle, for ids and weights as given."""

from typing import Any, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import expert_ids as draw_ids
from helpers import mesh_of
from jax.sharding import PartitionSpec as P
from layer_cases import EXPERTS, F, H, K, T, assert_close

import moe_jax as moe
from moe_jax import reference

EP = 2
TOKENS = EP * T
SIZES = {"tokens_per_rank": T, "hidden": H, "num_experts": EXPERTS, "top_k": K, "dtype": "float32", "poison": True}


def layer(router=None, **options):
    """(the plan, ``init`` and ``apply``) on two devices, in several rounds where pairs are uneven."""
    mesh = mesh_of(EP, 1)
    plan = moe.make_plan(mesh, **SIZES, capacity_factor=1.0, num_shared_experts=1)
    return plan, *moe.moe_on_mesh(mesh, plan, router, ffn=F, use_bias=True, **options)


def drawn(rng, pattern="zipf"):
    """x, ids, weights and a cotangent; every fifth choice is none, and its weight is NaN."""
    x, ct = (rng.normal(size=(TOKENS, H)).astype(np.float32) for _ in range(2))
    ids = draw_ids(pattern, rng, (TOKENS, K), EXPERTS, EP).astype(np.int32)
    ids.reshape(-1)[::5] = -1
    weights = np.where(ids < 0, np.nan, rng.normal(size=ids.shape)).astype(np.float32)
    return x, ids, weights, ct


def some_params(init, rng):
    shapes = jax.eval_shape(init, jax.random.key(0))
    return {name: rng.normal(scale=0.5, size=of.shape).astype(np.float32) for name, of in shapes.items()}


def expected(params, x, ids, weights, ct, mask=None):
    """(y, load, the cotangents of params, of x and of the weights), by the oracle."""
    given = {"top_k": K, "routing": (ids, weights), "token_mask": mask}
    y, routing = reference.moe_layer(params, x, None, **given)
    d_params, d_x = reference.moe_layer_vjp(params, x, ct, None, **given)
    return y, routing.load, d_params, d_x, reference.combine_weights_vjp(params, x, ct, routing)


def check(got, wanted):
    """``got``: (((_, (y, stats)), (d_params, d_x, d_weights)))."""
    ((_, (y, stats)), (d_params, d_x, d_weights)) = got
    want_y, load, want_params, want_x, want_weights = wanted
    assert_close("y", y, want_y)
    np.testing.assert_array_equal(stats.load, load)
    assert stats.losses == {}
    assert set(d_params) == set(want_params)
    for name, value in want_params.items():
        assert_close(name, d_params[name], value)
    assert_close("x", d_x, want_x)
    assert_close("weights", d_weights, want_weights)


def with_gradients(apply):
    def loss(params, x, weights, ids, ct, mask):
        y, stats = apply(params, x, mask, routing=(ids, weights))
        return jnp.sum(y * ct), (y, stats)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def test_equals_the_oracle_at_any_skew():
    """Of one program, since choices are data; a mask takes tokens out whatever their choices say."""
    _, init, apply = layer()
    assert not {"router", "router_bias"} & set(jax.eval_shape(init, jax.random.key(0)))
    rng, run = np.random.default_rng(0), cast("Any", with_gradients(apply))
    params, mask = some_params(init, rng), np.arange(TOKENS) % 4 > 0
    for pattern in ("zipf", "one_rank"):
        x, ids, weights, ct = drawn(rng, pattern)
        got = run(params, np.where(mask[:, None], x, np.nan), weights, ids, ct, mask)
        check(got, expected(params, x, ids, weights, ct, mask))
    assert run._cache_size() == 1


@pytest.mark.slow
def test_replays_what_a_router_chose():
    """Ids of a table's logical experts, for tokens of any leading shape, with the router's parameters or without."""
    router = moe.RouterConfig()
    _, init, apply = layer(router, num_logical_experts=4)
    rng, params = np.random.default_rng(1), {}
    logical = some_params(init, rng)
    for name, value in logical.items():
        if name[:2] in ("w_", "b_"):  # both instances of an expert are the same
            logical[name] = value[::2]
        params[name] = np.repeat(logical[name], 2, axis=0) if name[:2] in ("w_", "b_") else value
    x = rng.normal(size=(3, 4, H)).astype(np.float32)  # 12 tokens, where there is room for 16
    table = np.array([[2, 2 * e, 2 * e + 1] for e in range(4)], np.int32)
    y, chosen = reference.moe_layer(logical, x.reshape(-1, H), router, top_k=K)
    routing = moe.Routing(
        expert_ids=jnp.asarray(chosen.expert_ids.reshape(3, 4, K), jnp.int32),
        combine_weights=jnp.asarray(chosen.combine_weights.reshape(3, 4, K), jnp.float32),
        losses={"z": jnp.float32(chosen.losses["z"])},
        load=jnp.zeros(4, jnp.int32),  # not read
    )
    run = jax.jit(apply)
    replayed, stats = run(params, x, table=table, routing=routing)
    assert_close("y", np.asarray(replayed).reshape(-1, H), y)
    np.testing.assert_array_equal(stats.load, chosen.load)
    assert stats.losses == routing.losses
    del params["router"], params["router_bias"]
    chex.assert_trees_all_equal(run(params, x, table=table, routing=routing), (replayed, stats))


def test_a_router_of_ones_own_inside_shard_map():
    """``route`` by hand beside ``moe_layer``: what the layer with a router gives, with its losses."""
    router = moe.RouterConfig()
    plan, init, _ = layer(router)
    rng = np.random.default_rng(2)
    params, x = some_params(init, rng), rng.normal(size=(TOKENS, H)).astype(np.float32)

    def shard(params, x):
        logits = x @ params.pop("router") + params.pop("router_bias")
        routing = moe.route(logits, router, top_k=K, axis_name=plan.token_axes)
        return moe.moe_layer(params, x, plan, None, routing=routing)

    specs = moe.param_specs(plan, router, use_bias=True)
    mapped = jax.shard_map(shard, mesh=mesh_of(EP, 1), in_specs=(specs, P("ep")), out_specs=(P("ep"), P()))
    y, stats = jax.jit(mapped)(params, x)
    expected_y, routing = reference.moe_layer(params, x, router, top_k=K)
    assert_close("y", y, expected_y)
    np.testing.assert_array_equal(stats.load, routing.load)
    assert_close("balance", stats.losses["balance"], np.asarray(routing.losses["balance"]))


@pytest.mark.parametrize(
    "routing,error,words",
    [
        (None, moe.errors.MissingArgumentError, "routing is missing"),
        (np.zeros((TOKENS, K), np.int32), moe.errors.InvalidArgumentError, "pass a tuple"),
        ((np.zeros((TOKENS, 1), np.int32), np.zeros((TOKENS, 1))), moe.errors.ShapeError, "expert_ids has shape"),
        ((np.zeros((TOKENS, K), np.int8), np.zeros((TOKENS, K))), moe.errors.DtypeError, "expert_ids has dtype int8"),
        ((np.zeros((TOKENS, K), np.int32), np.zeros((1, K))), moe.errors.ShapeError, "combine_weights has shape"),
        ((np.zeros((TOKENS, K), np.int32),) * 2, moe.errors.DtypeError, "combine_weights has dtype int32"),
    ],
)
def test_refuses(routing, error, words):
    plan, init, apply = layer()
    params = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(error, match=words):
        jax.eval_shape(lambda params, x: apply(params, x, routing=routing), params, jnp.zeros((TOKENS, H)))
    if routing is None:  # per shard as well
        mesh = mesh_of(EP, 1)
        run = jax.shard_map(
            lambda x: moe.moe_layer({}, x, plan, None)[0], mesh=mesh, in_specs=P("ep"), out_specs=P("ep")
        )
        with pytest.raises(error, match="router is None"):
            jax.eval_shape(run, jnp.zeros((TOKENS, H)))
