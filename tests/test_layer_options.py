"""What models ask of a layer beside the plain one, against the oracle.

Gates and widths of shared experts, scales of experts, weights on the input side, choices among the results, and a
balance loss of every sequence.
"""

from typing import Any

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
PARAMETERS: dict[str, Any] = {
    "shared_ffn": WIDE,
    "shared_activation": "gelu",
    "gated_shared": True,
    "expert_scale": True,
}
EVERYTHING = PARAMETERS | {"weigh_inputs": True}
LENGTH = 4  # of a sequence
LOSSES = {"balance": BALANCE, "z": Z, "sequence_balance": 0.2}  # and their weights


def layer(ep, tp, transport="padded", router: Any = ROUTER, *, shared=1, of_plan=None, **options):
    """(the plan, ``init`` and ``apply``); rounds have room for an even load."""
    mesh = moe.make_mesh(ep=ep, tp=tp, nodes=2) if transport == "hierarchy" else mesh_of(ep, tp)
    sizes: dict[str, Any] = {
        "tokens_per_rank": T,
        "hidden": H,
        "num_experts": EXPERTS,
        "top_k": K,
        "dtype": "float32",
        "poison": True,
    }
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
        y, stats = apply(params, x, mask, sequence_length=LENGTH, return_routing=True)
        return jnp.sum(y * ct) + sum(LOSSES[name] * value for name, value in stats.losses.items()), (y, stats)

    poisoned = np.where(mask[:, None], x, np.nan).astype(np.float32)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, (y, stats)), (d_params, d_x) = run(params, poisoned)
    options: dict[str, Any] = {"top_k": K, "token_mask": mask, "shared_activation": "gelu", "weigh_inputs": True}
    options["sequence_length"] = LENGTH
    expected, routing = reference.moe_layer(params, x, ROUTER, **options)
    cts: dict[str, Any] = {f"ct_{name}": weight for name, weight in LOSSES.items()}
    ct_params, ct_x = reference.moe_layer_vjp(params, x, ct, ROUTER, **cts, **options)
    assert_close("y", y, expected)
    np.testing.assert_array_equal(stats.routing[0], routing.expert_ids)
    assert_close("the weights of choices", stats.routing[1], routing.combine_weights)
    assert_close("the mean score", stats.mean_score, routing.mean_score)
    assert set(stats.losses) == set(LOSSES)
    for name, value in stats.losses.items():
        assert_close(name, value, np.asarray(routing.losses[name]))
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
@pytest.mark.parametrize("ep,tp,transport", [*((4, 2, name) for name in TRANSPORTS[1:]), (4, 1, "hierarchy")])
def test_all_together_by_every_transport(ep, tp, transport):
    check(ep, tp, transport, "one_rank")


def test_choices_and_sequences_of_tokens_of_any_shape():
    """Sequences stay together on a device; choices come back as x came, as the router made them before any table."""
    _, init, apply = layer(2, 1, **PARAMETERS)
    rng = np.random.default_rng(2)
    params = make_params(init, rng)
    x = rng.normal(size=(3, 3, H)).astype(
        np.float32
    )  # 6 tokens on one device, 3 on the other, where there is room for 8
    run = jax.jit(apply, static_argnames=("return_routing", "sequence_length"))
    table = np.stack([np.ones(EXPERTS), np.roll(np.arange(EXPERTS), 3)], axis=1).astype(np.int32)
    moved = params | {name: np.roll(params[name], -3, axis=0) for name in ("w_up", "w_gate", "w_down")}
    y, stats = run(moved, x, table=table, return_routing=True, sequence_length=3)
    options: dict[str, Any] = {"top_k": K, "shared_activation": "gelu", "sequence_length": 3}
    expected, routing = reference.moe_layer(params, x.reshape(-1, H), ROUTER, **options)
    assert_close("y", np.asarray(y).reshape(-1, H), expected)
    ids, weights = stats.routing
    assert ids.dtype == jnp.int32 and weights.dtype == jnp.float32
    np.testing.assert_array_equal(ids, routing.expert_ids.reshape(3, 3, K))
    assert_close("weights", weights, routing.combine_weights.reshape(3, 3, K))
    for name in LOSSES:
        assert_close(name, stats.losses[name], np.asarray(routing.losses[name]))


@pytest.mark.parametrize(
    "given,error,words",
    [
        ({"sequence_length": 5}, moe.errors.InvalidArgumentError, "sequence_length=5 does not divide the 12 tokens"),
        ({"sequence_length": 0}, moe.errors.InvalidArgumentError, "sequence_length=0 must be a whole number"),
        ({"sequence_length": 12}, moe.errors.ShapeError, "make a plan for 12"),
        ({"return_routing": 1}, moe.errors.InvalidArgumentError, "return_routing=1 must be True or False"),
        (
            {"sequence_length": 4, "routing": (np.zeros((12, K), np.int32), np.zeros((12, K)))},
            moe.errors.InvalidArgumentError,
            "beside routing=, which has no scores",
        ),
    ],
)
def test_refuses_in_calls(given, error, words):
    _, init, apply = layer(2, 1)
    params = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(error, match=words):
        jax.eval_shape(lambda params, x: apply(params, x, **given), params, jnp.zeros((12, H)))


@pytest.mark.parametrize("runs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_per_shard(runs):
    """``moe_layer`` gives the choices of its device, which are replayed by the argument of that name."""
    plan, init, _ = layer(2, 1, **PARAMETERS)
    params = make_params(init, np.random.default_rng(5))
    specs = moe.param_specs(plan, ROUTER, shared_activation="gelu", gated_shared=True, expert_scale=True)
    x = np.random.default_rng(6).normal(size=(2 * T, H)).astype(np.float32)
    options: dict[str, Any] = {"shared_activation": "gelu", "weigh_inputs": True, "return_routing": True}

    def shard(params, x):
        y, stats = moe.moe_layer(params, x, plan, ROUTER, **options, sequence_length=LENGTH)
        return y, stats, moe.moe_layer(params, x, plan, None, **options, routing=stats.routing)

    everywhere = P()
    stats = moe.LayerStats(
        num_dropped=everywhere, num_rounds=everywhere, load=everywhere, losses=everywhere, mean_score=everywhere,
        routing=P("ep"),
    )  # fmt: skip
    out_specs = (P("ep"), stats, (P("ep"), stats))
    mapped = jax.shard_map(shard, mesh=mesh_of(2, 1), in_specs=(specs, P("ep")), out_specs=out_specs)
    if not runs:
        y, stats, (_, other) = jax.eval_shape(mapped, params, x)
        assert y.shape == x.shape and stats.routing[0].shape == other.routing[1].shape == (2 * T, K)
        return
    y, stats, (replayed, other) = jax.jit(mapped)(params, x)
    expected, routing = reference.moe_layer(
        params, x, ROUTER, top_k=K, shared_activation="gelu", weigh_inputs=True, sequence_length=LENGTH
    )
    assert_close("y", y, expected)
    np.testing.assert_array_equal(replayed, y)
    np.testing.assert_array_equal(stats.routing[0], routing.expert_ids)
    np.testing.assert_array_equal(other.routing[0], routing.expert_ids)
    assert_close("sequences", stats.losses["sequence_balance"], np.asarray(routing.losses["sequence_balance"]))
    assert other.losses == {} and other.mean_score is None


def test_losses_of_micro_batches():
    """Both ways of ``balance_loss`` give loss and gradient of the whole batch; the mean of losses does not."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(16, 6)).astype(np.float32)
    options: dict[str, Any] = {"top_k": 2}
    router = moe.RouterConfig(score="sigmoid")
    expected = reference.route(logits, router, **options)
    ct = reference.route_vjp(logits, router, np.zeros((16, 2)), **options, ct_balance=1.0)

    def once(logits):
        parts = [moe.route(part, router, **options) for part in jnp.split(logits, 4)]
        load, mean_score = sum(part.load for part in parts), sum(part.mean_score for part in parts) / 4
        return moe.balance_loss(load, mean_score), sum(part.losses["balance"] for part in parts) / 4

    (loss, mean_of_losses), d_logits = jax.jit(jax.value_and_grad(once, has_aux=True))(logits)
    assert_close("loss", loss, np.asarray(expected.losses["balance"]))
    assert_close("gradient", d_logits, ct)
    assert abs(float(mean_of_losses) - expected.losses["balance"]) > 0.05

    def of_part(part):
        return moe.balance_loss(expected.load, moe.route(part, router, **options).mean_score) / 4

    run = jax.jit(jax.value_and_grad(of_part))
    losses, grads = zip(*[run(part) for part in np.split(logits, 4)], strict=True)
    assert_close("sum of losses", sum(losses), np.asarray(expected.losses["balance"]))
    assert_close("gradients", np.concatenate(grads), ct)
    assert float(moe.balance_loss(jnp.zeros(3), jnp.zeros(3))) == 0.0
    with pytest.raises(moe.errors.ShapeError, match="mean_score has shape"):
        moe.balance_loss(jnp.zeros(3), jnp.zeros(2))


def test_sequence_balance_by_hand():
    """Two sequences, each of which goes to one expert; together they are even. The third has no token that counts."""
    logits = jnp.array([[9.0, -9.0]] * 2 + [[-9.0, 9.0]] * 2 + [[5.0, 1.0]] * 2)
    mask = jnp.arange(6) < 4
    run = jax.jit(lambda x: moe.route(x, moe.RouterConfig(), top_k=1, token_mask=mask, sequence_length=2).losses)
    losses = run(logits)
    np.testing.assert_allclose([losses["balance"], losses["sequence_balance"]], [1.0, 2.0], rtol=1e-6)
    with pytest.raises(moe.errors.InvalidArgumentError, match="sequence_length=4 does not divide the 6 tokens"):
        moe.route(logits, moe.RouterConfig(), top_k=1, sequence_length=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ep,more", [(1, {}), (2, {"overflow": "drop", "capacity_factor": 0.5}), (2, {"quant": "int8"})], ids=str
)
def test_weights_of_ones_own_on_the_input_side(ep, more):
    """Of routed experts alone: what a copy or a constant expert adds is weighted. A choice that is none weighs NaN."""
    of_plan = {"num_copy_experts": 1, "num_const_experts": 1, **more}
    plan, init, apply = layer(ep, 1, router=None, shared=0, of_plan=of_plan, weigh_inputs=True, chunks=2)
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = {name: rng.normal(scale=0.5, size=of.shape).astype(np.float32) for name, of in shapes.items()}
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
    options: dict[str, Any] = {"top_k": K, "routing": (ids, weights), "weigh_inputs": True, "special": special}
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
    point = {name: rng.normal(size=shape) for name, shape in shapes.items()} | {"x": rng.normal(size=(6, 4))}
    step, ct = {name: rng.normal(size=value.shape) for name, value in point.items()}, rng.normal(size=(6, 4))
    options: dict[str, Any] = {
        "top_k": 2,
        "activation": "gelu",
        "shared_activation": "swiglu",
        "weigh_inputs": weigh_inputs,
    }
    options |= {"sequence_length": 2, "token_mask": np.arange(6) != 2}

    def value(point):
        params, x = {name: point[name] for name in shapes}, point["x"]
        y, routing = reference.moe_layer(params, x, ROUTER, **options)
        return (ct * y).sum() + sum(LOSSES[name] * value for name, value in routing.losses.items())

    params, x = {name: point[name] for name in shapes}, point["x"]
    of_losses: dict[str, Any] = {f"ct_{name}": weight for name, weight in LOSSES.items()}
    cts, ct_x = reference.moe_layer_vjp(params, x, ct, ROUTER, **of_losses, **options)
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
