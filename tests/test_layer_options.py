"""What models ask of a layer beside the plain one, against the oracle: gates, scales, weights on the input side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TRANSPORTS, mesh_of
from jax.sharding import PartitionSpec as P
from layer_cases import BALANCE, EXPERTS, F, H, K, T, Z, assert_close, make_params, steered_tokens

import moe_jax as moe
from moe_jax import reference

WIDE = 6  # of the shared expert, whose activation has no gate
ROUTER = moe.RouterConfig(score="sigmoid", selection_bias=True, scale=2.5)
PARAMETERS = {"shared_ffn": WIDE, "shared_activation": "gelu", "gated_shared": True, "expert_scale": True}
EVERYTHING = PARAMETERS | {"weigh_inputs": True}


def layer(ep, tp, transport="padded", router=ROUTER, *, shared=1, of_plan=None, **options):
    """(the plan, ``init`` and ``apply``); rounds have room for an even load."""
    mesh = moe.make_mesh(ep=ep, tp=tp, nodes=2) if transport == "hierarchy" else mesh_of(ep, tp)
    sizes = {"tokens_per_rank": T, "hidden": H, "num_experts": EXPERTS, "top_k": K, "dtype": "float32", "poison": True}
    sizes |= {"transport": transport, "capacity_factor": 1.0, "num_shared_experts": shared}
    plan = moe.make_plan(mesh, **sizes | (of_plan or {}))
    return plan, *moe.moe_on_mesh(mesh, plan, router, ffn=F, **options)


def check(ep, tp, transport, pattern, seed=0):
    """One case with all options: values and every gradient. Returns the stats."""
    _, init, apply = layer(ep, tp, transport, **EVERYTHING)
    rng = np.random.default_rng(seed)
    params = make_params(init, rng)
    params["expert_scale"] = rng.normal(size=EXPERTS).astype(np.float32)
    x, mask = steered_tokens(pattern, rng, T * ep * tp, ep)
    ct = rng.normal(size=x.shape).astype(np.float32)

    def loss(params, x):
        y, stats = apply(params, x, mask)
        return jnp.sum(y * ct) + BALANCE * stats.losses["balance"] + Z * stats.losses["z"], (y, stats)

    poisoned = np.where(mask[:, None], x, np.nan).astype(np.float32)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (y, stats)), (d_params, d_x) = run(params, poisoned)
    options = {"top_k": K, "token_mask": mask, "shared_activation": "gelu", "weigh_inputs": True}
    expected, _ = reference.moe_layer(params, x, ROUTER, **options)
    ct_params, ct_x = reference.moe_layer_vjp(params, x, ct, ROUTER, ct_balance=BALANCE, ct_z=Z, **options)
    assert_close("y", y, expected)
    assert_close("x", d_x, ct_x)
    assert set(d_params) == set(ct_params)
    for name, value in ct_params.items():
        assert_close(name, d_params[name], value)
    return stats


def test_all_together_equals_the_oracle():
    """In several rounds, which keep nothing but compute again."""
    assert int(check(2, 2, "padded", "one_rank").num_rounds) == 2


def test_all_together_on_one_device():
    check(1, 1, "padded", "masked")


@pytest.mark.slow
@pytest.mark.parametrize("transport", [*TRANSPORTS, "hierarchy"])
@pytest.mark.parametrize("ep,tp", [(4, 1), (4, 2)])
def test_all_together_by_every_transport(ep, tp, transport):
    for pattern in ("one_rank", "masked"):
        check(ep, tp, transport, pattern, seed=ep + tp)


@pytest.mark.slow
@pytest.mark.parametrize("ep,more", [(1, {}), (2, {}), (2, {"overflow": "drop"}), (2, {"quant": "int8"})], ids=str)
def test_weights_of_ones_own_on_the_input_side(ep, more):
    """Of routed experts alone: what a copy or a constant expert adds is weighted. A choice that is none weighs NaN."""
    of_plan = {"num_copy_experts": 1, "num_const_experts": 1, **more}
    plan, init, apply = layer(ep, 1, router=None, shared=0, of_plan=of_plan, weigh_inputs=True, chunks=2)
    rng = np.random.default_rng(3)
    params = make_params(init, rng)
    x = rng.integers(-2, 3, size=(ep * T, H)).astype(np.float32)
    ids = rng.integers(-1, plan.num_ids, size=(ep * T, K)).astype(np.int32)
    if "overflow" in more:
        ids[:, :] = [[-1, 7]]  # more than there is room for
    weights = np.where(ids < 0, np.nan, 2.0 ** rng.integers(-2, 3, size=ids.shape)).astype(np.float32)
    y, stats = jax.jit(apply)(params, x, routing=(ids, weights))
    dropped = int(stats.num_dropped)
    assert (dropped > 0) == ("overflow" in more)
    experts = {name: value for name, value in params.items() if not name.startswith("const")}
    constants = {name.removeprefix("const_"): params[name] for name in ("const_alpha1", "const_alpha2", "const_v")}
    special = reference.WeightlessExperts(num_experts=EXPERTS, num_copy=1, num_const=1, **constants)
    options = {"top_k": K, "routing": (ids, weights), "weigh_inputs": True, "special": special}
    expected = reference.moe_layer(experts, x, None, **options)[0]
    if dropped:
        kept = np.abs(np.asarray(y)).max(axis=1) > 0
        assert (~kept).sum() == dropped
        expected = np.where(kept[:, None], expected, 0.0)
    if "quant" in more:
        assert np.abs(y - expected).max() <= 0.02 * np.abs(expected).max()
    else:
        assert_close("y", y, expected)


@pytest.mark.parametrize("weigh_inputs", [False, True])
def test_the_oracle_by_differences(weigh_inputs):
    """Of every parameter and of x, at a point where choices are far from changing."""
    rng = np.random.default_rng(1)
    shapes = {"router": (4, 3), "selection_bias": (3,), "expert_scale": (3,), "w_up": (3, 4, 2), "w_down": (3, 2, 4)}
    shapes |= {"shared_gate": (4, 5), "shared_up": (4, 5), "shared_down": (5, 4), "shared_router": (4, 1)}
    point = {name: rng.normal(size=shape) for name, shape in shapes.items()} | {"x": rng.normal(size=(5, 4))}
    step, ct = {name: rng.normal(size=value.shape) for name, value in point.items()}, rng.normal(size=(5, 4))
    options = {"top_k": 2, "activation": "gelu", "shared_activation": "swiglu", "weigh_inputs": weigh_inputs}

    def value(point):
        params, x = {name: point[name] for name in shapes}, point["x"]
        return (ct * reference.moe_layer(params, x, ROUTER, **options)[0]).sum()

    params, x = {name: point[name] for name in shapes}, point["x"]
    cts, ct_x = reference.moe_layer_vjp(params, x, ct, ROUTER, **options)
    for name, found in (cts | {"x": ct_x}).items():
        if name != "selection_bias":  # it steers the choice alone
            around = [value(point | {name: point[name] + sign * 1e-6 * step[name]}) for sign in (1, -1)]
            np.testing.assert_allclose((found * step[name]).sum(), (around[0] - around[1]) / 2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "shared,change,words",
    [
        (0, {"shared_ffn": 4}, "shared_ffn=4: the plan has no shared expert"),
        (0, {"shared_activation": "gelu"}, "shared_activation='gelu': the plan has no shared expert"),
        (0, {"gated_shared": True}, "gated_shared=True: the plan has no shared expert"),
        (1, {"shared_ffn": 0}, "shared_ffn=0 must be a whole number"),
        (1, {"shared_activation": "elu"}, "shared_activation='elu' is unknown"),
        (1, {"gated_shared": 1}, "gated_shared=1 must be True or False"),
        (1, {"expert_scale": None}, "expert_scale=None must be True or False"),
        (1, {"weigh_inputs": 1}, "weigh_inputs=1 must be True or False"),
        (1, {"expert_scale": True, "router": None}, "expert_scale=True was given and router is None"),
    ],
)
def test_refuses(shared, change, words):
    with pytest.raises(moe.errors.InvalidArgumentError, match=words):
        layer(2, 1, shared=shared, **change)
    if not {"shared_ffn", "weigh_inputs"} & set(change):  # which decide about no layout
        plan = layer(2, 1, shared=shared)[0]
        with pytest.raises(moe.errors.InvalidArgumentError, match=words):
            moe.param_specs(plan, **{"router": ROUTER} | change)


def test_what_was_asked_for_must_be_there():
    """A gate that is forgotten would change values; a layer made without one takes it as it takes biases."""
    plan, init, apply = layer(2, 1, **PARAMETERS)
    params, x = jax.eval_shape(init, jax.random.key(0)), jnp.zeros((2 * T, H))
    assert params["shared_up"].shape == (H, WIDE) and "shared_gate" not in params
    assert moe.param_specs(
        plan, ROUTER, shared_activation="gelu", gated_shared=True, expert_scale=True
    ) == dict.fromkeys(params, P()) | {
        name: P("ep", "tp", None) if name == "w_down" else P("ep", None, "tp") for name in ("w_up", "w_gate", "w_down")
    }
    for name in ("shared_router", "expert_scale"):
        fewer = {other: value for other, value in params.items() if other != name}
        with pytest.raises(moe.errors.InvalidArgumentError, match=f"'{name}' is missing"):
            jax.eval_shape(apply, fewer, x)
    plain = layer(2, 1, shared_activation="gelu")[2]
    assert jax.eval_shape(plain, params, x)[0].shape == x.shape
    with pytest.raises(moe.errors.InvalidArgumentError, match="'shared_gate' is missing"):
        jax.eval_shape(layer(2, 1)[2], params, x)


def test_costs_and_memory_know_the_shared_expert():
    """One as wide and with the activation of two routed ones is what the plan takes where nothing is said."""
    plan = layer(2, 1, shared=2)[0]
    said = {"shared_ffn": 2 * F, "shared_activation": "swiglu"}
    assert plan.cost(F, **said) == plan.cost(F)
    assert plan.memory(F, **said).peak == plan.memory(F).peak
    other, plain = plan.cost(F, shared_ffn=3 * F, shared_activation="gelu"), plan.cost(F)
    assert other["forward"].flops == plain["forward"].flops  # two projections of 3 F, and three of 2 F
    narrow = plan.memory(F, shared_ffn=F, shared_activation="gelu")
    assert plan.memory(F).weights - narrow.weights == 4 * (3 * 2 - 2) * F * H
    with pytest.raises(moe.errors.InvalidArgumentError, match="shared_ffn=4: the plan has no shared expert"):
        layer(2, 1, shared=0)[0].cost(F, shared_ffn=4)
