"""A router that sees something else than the experts do: values and gradients of the oracle, for any width of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of
from jax.sharding import PartitionSpec as P
from layer_cases import BALANCE, EXPERTS, F, H, K, T, assert_close

import moe_jax as moe
from moe_jax import reference

EP, SEEN = 2, 5  # devices, and the width of what the router sees
TOKENS = 12  # where there is room for 16
ROUTER = moe.RouterConfig(score="sigmoid", selection_bias=True)


def layer(**options):
    mesh = mesh_of(EP, 1)
    sizes = {"tokens_per_rank": T, "hidden": H, "num_experts": EXPERTS, "top_k": K, "dtype": "float32", "poison": True}
    plan = moe.make_plan(mesh, **sizes, capacity_factor=1.0)
    return plan, *moe.moe_on_mesh(mesh, plan, ROUTER, ffn=F, **{"router_hidden": SEEN, **options})


def some_params(init, rng):
    shapes = jax.eval_shape(init, jax.random.key(0))
    assert shapes["router"].shape == (SEEN, EXPERTS)
    return {name: rng.normal(scale=0.5, size=of.shape).astype(np.float32) for name, of in shapes.items()}


def test_equals_the_oracle():
    """For tokens of any leading shape, with padding between them that holds NaN."""
    _, init, apply = layer()
    rng = np.random.default_rng(0)
    params, mask = some_params(init, rng), np.arange(TOKENS) % 4 > 0
    x, ct = (rng.normal(size=(TOKENS, H)).astype(np.float32) for _ in range(2))
    seen = rng.normal(size=(TOKENS, SEEN)).astype(np.float32)

    def loss(params, x, seen):
        shaped = (array.reshape(3, 4, *array.shape[1:]) for array in (x, mask))
        y, stats = apply(params, *shaped, router_x=seen.reshape(3, 4, SEEN))
        return jnp.sum(y.reshape(ct.shape) * ct) + BALANCE * stats.losses["balance"], (y, stats)

    garbage = (np.where(mask[:, None], array, np.nan) for array in (x, seen))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (y, stats)), (d_params, d_x, d_seen) = run(params, *garbage)
    options = {"top_k": K, "token_mask": mask, "router_x": seen}
    expected, routing = reference.moe_layer(params, x, ROUTER, **options)
    ct_params, ct_both = reference.moe_layer_vjp(params, x, ct, ROUTER, ct_balance=BALANCE, **options)
    assert_close("y", np.asarray(y).reshape(TOKENS, H), expected)
    np.testing.assert_array_equal(stats.load, routing.load)
    assert_close("x", d_x, ct_both[:, :H])
    assert_close("router_x", d_seen, ct_both[:, H:])
    for name, value in ct_params.items():
        assert_close(name, d_params[name], value)


def test_the_oracle_by_differences():
    rng = np.random.default_rng(1)
    params = {
        "router": rng.normal(size=(2, 3)),
        "w_up": rng.normal(size=(3, 4, 2)),
        "w_down": rng.normal(size=(3, 2, 4)),
    }
    x, ct, seen, step = (rng.normal(size=shape) for shape in ((5, 4), (5, 4), (5, 2), (5, 2)))
    options = {"top_k": 2, "activation": "gelu"}

    def value(seen):
        return (ct * reference.moe_layer(params, x, moe.RouterConfig(), router_x=seen, **options)[0]).sum()

    slope = (value(seen + 1e-6 * step) - value(seen - 1e-6 * step)) / 2e-6
    both = reference.moe_layer_vjp(params, x, ct, moe.RouterConfig(), router_x=seen, **options)[1]
    assert both.shape == (5, 4 + 2)
    np.testing.assert_allclose((both[:, 4:] * step).sum(), slope, rtol=1e-6)


def test_per_shard():
    """``moe_layer`` takes it as well, and says what is wrong with it."""
    plan, init, apply = layer()
    params = some_params(init, np.random.default_rng(2))
    specs, x, seen = moe.param_specs(plan, ROUTER), jnp.zeros((EP * T, H)), jnp.zeros((EP * T, SEEN))

    def run(**options):
        def shard(params, x, seen):
            return moe.moe_layer(params, x, plan, ROUTER, **{"router_x": seen, **options})[0]

        mapped = jax.shard_map(shard, mesh=mesh_of(EP, 1), in_specs=(specs, P("ep"), P("ep")), out_specs=P("ep"))
        return jax.eval_shape(mapped, params, x, seen).shape

    assert run() == x.shape
    with pytest.raises(moe.errors.ShapeError, match="router_x has shape"):
        run(router_x=jnp.zeros((T + 1, SEEN)))
    with pytest.raises(moe.errors.DtypeError, match="router_x has dtype int32"):
        run(router_x=jnp.zeros((T, SEEN), jnp.int32))
    with pytest.raises(moe.errors.InvalidArgumentError, match="'router' has shape"):
        run(router_x=None)
    with pytest.raises(moe.errors.InvalidArgumentError, match="beside routing"):
        run(routing=(jnp.zeros((T, K), jnp.int32), jnp.zeros((T, K))))
    with pytest.raises(moe.errors.MissingArgumentError, match="router_x is missing"):
        apply(params, x)
    with pytest.raises(moe.errors.InvalidArgumentError, match="router_hidden=0 must be a whole number"):
        layer(router_hidden=0)


def test_place_takes_a_router_of_any_width():
    plan, _, _ = layer()
    placed = moe.place({"router": np.ones((SEEN, EXPERTS), np.float32)}, mesh_of(EP, 1), plan)
    assert placed["router"].shape == (SEEN, EXPERTS)
