"""The router against the oracle: every option, both losses, every gradient, and tokens spread over devices."""

import fractions
import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_jax
from moe_jax import _compat, config, errors, reference
from moe_jax.layer import router as routers_of_layer

# The library computes in fp32 and the oracle in fp64. Sums over at most 64 tokens of values near 1: a few dozen
# roundings of 6e-8 each. Expert ids and loads are compared for equality.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}

T, E, K = 24, 16, 3
GROUPINGS = [
    {"num_groups": 1, "top_groups": 1},
    {"num_groups": 4, "top_groups": 2},  # "auto": top2 with a bias, max without
    {"num_groups": 8, "top_groups": 2, "group_score": "top2"},
]
SCORES = config.SCORES
GRID = list(itertools.product((False, True), (False, True), GROUPINGS, (False, True)))


def routers(score, share):
    """The whole grid, or a fifth of it in which every option has every value."""
    for topk_first, renormalize, grouping, selection_bias in GRID[:: 5 if share == "fifth" else 1]:
        yield moe_jax.RouterConfig(
            score=score,
            topk_first=topk_first,
            renormalize=renormalize,
            selection_bias=selection_bias,
            scale=2.5 if renormalize else 1.0,
            **grouping,
        )


route = jax.jit(moe_jax.route, static_argnames=("router", "top_k", "axis_name"))  # one program, not one per operation


def tied_logits(rng, shape):
    """Few values, so that ties are everywhere; none so placed that two sums of different scores nearly meet."""
    return rng.integers(0, 4, shape).astype(np.float32)


def spread_logits(rng, shape):
    """Distinct in every row, half a unit apart at least, in random order."""
    steps = np.stack([rng.permutation(shape[1]) for _ in range(shape[0])]) - shape[1] / 2
    return (steps / 2 + rng.uniform(0, 0.1, shape)).astype(np.float32)


def extreme_logits(rng, shape):
    """Logits whose scores saturate, vanish or are zero in fp32, where only logits tell which experts are best.

    With biases of 0 and 1/4, no two sums of different scores meet unless the scores alone decide between them.
    """
    num_experts = shape[1]

    def steps():
        return rng.permutation(num_experts) / 2

    kinds = [
        lambda: 18 + steps(),
        lambda: -110 - steps(),
        lambda: (steps() - num_experts / 4) * 8000 + 2000,
        lambda: rng.choice([-1e4, -200, 30, 1e4], num_experts),
        lambda: rng.choice([-0.0, 0.0], num_experts),
        lambda: np.where(steps() < 1, 20 + steps(), -np.inf),  # fewer finite ones than are chosen
        lambda: np.full(num_experts, -np.inf),
    ]
    return np.array([kinds[t % len(kinds)]() for t in range(shape[0])], np.float32)


LOGITS = {"tied": tied_logits, "spread": spread_logits, "extreme": extreme_logits}
MASKS = {"all": np.ones(T, bool), "some": np.arange(T) % 3 != 1, "none": np.zeros(T, bool)}


def arguments(kind, seed=0, num_tokens=T):
    rng = np.random.default_rng(seed)
    bias = (rng.permutation(E) % (2 if kind == "extreme" else E) / (4 if kind == "extreme" else 8)).astype(np.float32)
    cts = {
        "ct_weights": rng.normal(size=(num_tokens, K)).astype(np.float32),
        "ct_balance": np.float32(1.5),
        "ct_z": np.float32(-0.5),
    }
    return LOGITS[kind](rng, (num_tokens, E)), bias, cts


def route_and_gradient(router, logits, bias, mask, cts):
    """One router: its routing, and the cotangent of ``logits`` for the cotangents ``cts``."""

    def differentiable(logits):
        routing = moe_jax.route(logits, router, top_k=K, bias=bias if router.selection_bias else None, token_mask=mask)
        return (routing.combine_weights, routing.losses["balance"], routing.losses["z"]), routing

    _, pullback, routing = jax.vjp(differentiable, logits, has_aux=True)
    return routing, *pullback((cts["ct_weights"], cts["ct_balance"], cts["ct_z"]))


@functools.cache
def grid_program(score, share):
    """Many options of one score in one program."""
    return jax.jit(lambda *args: [route_and_gradient(router, *args) for router in routers(score, share)])


def check_routing(routing, expected):
    np.testing.assert_array_equal(routing.expert_ids, expected.expert_ids)
    np.testing.assert_array_equal(routing.load, expected.load)
    np.testing.assert_allclose(routing.combine_weights, expected.combine_weights, **CLOSE)
    for name in ("balance", "z"):
        np.testing.assert_allclose(routing.losses[name], expected.losses[name], **CLOSE)
    chex.assert_type([routing.expert_ids, routing.load, routing.combine_weights], [jnp.int32, jnp.int32, jnp.float32])


def test_every_score_is_in_both_tables():
    assert tuple(routers_of_layer.SCORES) == tuple(reference.routing._SCORES) == SCORES


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("kind", list(LOGITS))
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("share", ["fifth", pytest.param("whole", marks=pytest.mark.slow)])
def test_every_option(share, score, kind, mask):
    logits, bias, cts = arguments(kind)
    results = grid_program(score, share)(logits, bias, MASKS[mask], cts)
    for router, (routing, d_logits) in zip(routers(score, share), results, strict=True):
        options = {"top_k": K, "bias": bias if router.selection_bias else None, "token_mask": MASKS[mask]}
        check_routing(routing, reference.route(logits, router, **options))
        expected = reference.route_vjp(logits, router, **options, **cts)
        np.testing.assert_allclose(d_logits, expected, **CLOSE, err_msg=str(router))


def test_no_mask_means_every_token():
    logits, _bias, _ = arguments("tied")
    router = moe_jax.RouterConfig()
    check_routing(route(logits, router, top_k=K), reference.route(logits, router, top_k=K, token_mask=MASKS["all"]))


@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_group_scores_pick_different_groups(group_score):
    """One group has the best expert, the other the best pair."""
    logits = jnp.array([[3.0, 0.0, 2.0, 2.0]])
    router = moe_jax.RouterConfig(topk_first=True, num_groups=2, top_groups=1, group_score=group_score)
    routing = route(logits, router, top_k=2)
    assert routing.expert_ids.tolist() == ([[0, 1]] if group_score == "max" else [[2, 3]])
    check_routing(routing, reference.route(np.asarray(logits), router, top_k=2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_scored_in_fp32(dtype):
    rng = np.random.default_rng(0)
    logits = np.concatenate([tied_logits(rng, (T, E)), extreme_logits(rng, (T, E))]).astype(dtype)
    router = moe_jax.RouterConfig(score="sigmoid")
    check_routing(route(logits, router, top_k=K), reference.route(logits, router, top_k=K))


@pytest.mark.quick("16-16")
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 2), (16, 16)])
def test_every_expert_chosen(num_experts, top_k):
    logits = spread_logits(np.random.default_rng(0), (5, num_experts))
    router = moe_jax.RouterConfig()
    check_routing(route(logits, router, top_k=top_k), reference.route(logits, router, top_k=top_k))


def test_no_tokens():
    logits, router = np.zeros((0, E), np.float32), moe_jax.RouterConfig()
    check_routing(route(logits, router, top_k=K), reference.route(logits, router, top_k=K))


@pytest.mark.parametrize("score", SCORES)
def test_even_choice_has_balance_loss_one(score):
    logits = 3 * np.eye(E, dtype=np.float32)
    routing = route(logits, moe_jax.RouterConfig(score=score), top_k=1)
    np.testing.assert_allclose(routing.losses["balance"], 1.0, **CLOSE)


@pytest.mark.parametrize("score", SCORES)
def test_extreme_logits_have_finite_gradients(score):
    logits = np.array([[1e4, 90.0, 0.0, -60.0, -87.0, -90.0, -104.0, -1e4]], np.float32)  # falling: fp32 has ties
    router = moe_jax.RouterConfig(score=score)

    def differentiable(logits):
        routing = route(logits, router, top_k=8)
        return routing.combine_weights[0, 2] + routing.losses["balance"], routing

    gradient, routing = jax.grad(differentiable, has_aux=True)(logits)
    check_routing(routing, reference.route(logits, router, top_k=8))
    ct_weights = np.eye(8)[[2]]
    expected = reference.route_vjp(logits, router, ct_weights, top_k=8, ct_balance=1.0)
    np.testing.assert_allclose(gradient, expected, **CLOSE)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("low", [-45.0, -60.0, -86.0, -1e3])
def test_shares_of_scores_that_vanish(score, low):
    """Scores, their squares or their sum below what fp32 holds. Differences are exact, and shares depend on them."""
    logits = low + np.array([[3, 1.5, 0, -2, -4, -7]], np.float32)
    for first in (True, False):
        router = moe_jax.RouterConfig(score=score, topk_first=first)

        def differentiable(logits, router=router):
            routing = route(logits, router, top_k=3)
            return routing.combine_weights[0, 1] + routing.losses["balance"], routing

        gradient, routing = jax.grad(differentiable, has_aux=True)(logits)
        check_routing(routing, reference.route(logits, router, top_k=3))
        expected = reference.route_vjp(logits, router, np.array([[0.0, 1, 0]]), top_k=3, ct_balance=1.0)
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(gradient, expected, **CLOSE)


def test_shares_of_far_experts():
    """A softmax router that a bias sends to experts of probability 1e-39: half each, as their logits are equal."""
    logits, bias = np.array([[0.0, -90, -90]], np.float32), np.array([0, 5, 5], np.float32)
    router = moe_jax.RouterConfig(selection_bias=True)
    routing = route(logits, router, top_k=2, bias=bias)
    np.testing.assert_array_equal(routing.combine_weights, [[0.5, 0.5]])
    check_routing(routing, reference.route(logits, router, top_k=2, bias=bias))


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
def test_infinitely_low_logits(score):
    """Excluded experts have no weight; a token for which all are excluded gets equal ones, and no NaN."""
    logits = np.array([[0.0, 1, -np.inf, -np.inf], [-np.inf] * 4], np.float32)
    router = moe_jax.RouterConfig(score=score, topk_first=True)

    def differentiable(logits):
        routing = route(logits, router, top_k=3)
        return jnp.sum(routing.combine_weights[:, 0]), routing

    gradient, routing = jax.jit(jax.grad(differentiable, has_aux=True))(logits)
    np.testing.assert_allclose(
        routing.combine_weights, reference.route(logits, router, top_k=3).combine_weights, **CLOSE
    )
    np.testing.assert_allclose(routing.combine_weights[1], 1 / 3, **CLOSE)
    assert np.isfinite(gradient).all() and np.any(gradient[0])


# --- 64-bit mode -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
def test_64_bit_mode_changes_no_type(score):
    logits, bias, cts = arguments("spread")
    options = {"score": score, "selection_bias": True, "num_groups": 4, "top_groups": 2}
    for first, renormalize in itertools.product((False, True), (False, True)):
        router = moe_jax.RouterConfig(topk_first=first, renormalize=renormalize, **options)
        with jax.enable_x64(True):
            given = jax.tree.map(jnp.asarray, (logits, bias, MASKS["some"], cts))
            routing, d_logits = jax.jit(functools.partial(route_and_gradient, router))(*given)
        check_routing(routing, reference.route(logits, router, top_k=K, bias=bias, token_mask=MASKS["some"]))
        chex.assert_type([*routing.losses.values(), d_logits], jnp.float32)


@pytest.mark.slow
def test_layer_in_64_bit_mode():
    """The same values, gradients and types."""
    mesh, router = moe_jax.make_mesh(ep=2, tp=2), moe_jax.RouterConfig(score="sigmoid", selection_bias=True)
    plan = moe_jax.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=4, top_k=2, dtype="float32")
    init, layer = moe_jax.moe_on_mesh(mesh, plan, router, ffn=8)
    params = jax.tree.map(np.asarray, jax.jit(init)(jax.random.key(0)))
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)

    def run(x64):
        def loss(params, x):
            y, stats = layer(params, x)
            return jnp.sum(y**2), (y, stats)

        with jax.enable_x64(x64):
            given = jax.tree.map(jnp.asarray, (params, x))
            return jax.device_get(jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*given))

    wide, narrow = run(True), run(False)
    chex.assert_trees_all_equal_dtypes(wide, narrow)
    chex.assert_trees_all_close(wide, narrow, **CLOSE)
    assert np.any(narrow[0][1])


# --- tokens spread over devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis_name", [("ep", "tp"), "ep"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_and_load_are_those_of_all_tokens(score, axis_name):
    """Over both axes: 8 shards; over one: 4 shards, each held twice."""
    mesh, router = moe_jax.make_mesh(ep=4, tp=2), moe_jax.RouterConfig(score=score)
    logits, _, cts = arguments("spread", num_tokens=64)
    mask = np.arange(64) % 7 != 0  # unevenly many per shard
    mask[:8] = False  # and none at all on the first

    @functools.partial(
        _compat.shard_map, mesh=mesh, in_specs=P(axis_name), out_specs=((P(axis_name), P(), P()), (P(axis_name), P()))
    )
    def spread(logits, mask):
        routing = moe_jax.route(logits, router, top_k=K, token_mask=mask, axis_name=axis_name)
        losses = routing.losses["balance"], routing.losses["z"]
        return (routing.combine_weights, *losses), (routing.expert_ids, routing.load)

    @jax.jit
    def run(logits, mask, cts):
        outputs, pullback, choice = jax.vjp(lambda logits: spread(logits, mask), logits, has_aux=True)
        return outputs, choice, *pullback((cts["ct_weights"], cts["ct_balance"], cts["ct_z"]))

    (weights, balance, z), (expert_ids, load), d_logits = run(logits, mask, cts)
    expected = reference.route(logits, router, top_k=K, token_mask=mask)
    np.testing.assert_array_equal(expert_ids, expected.expert_ids)
    np.testing.assert_array_equal(load, expected.load)
    np.testing.assert_allclose(weights, expected.combine_weights, **CLOSE)
    np.testing.assert_allclose([balance, z], [expected.losses["balance"], expected.losses["z"]], **CLOSE)
    expected_gradient = reference.route_vjp(logits, router, top_k=K, token_mask=mask, **cts)
    np.testing.assert_allclose(d_logits, expected_gradient, **CLOSE)


def test_choices_do_not_depend_on_how_the_compiler_rounds():
    """Without its optimisations XLA computes the score of a group twice, and not alike to the last bit."""
    logits, bias, _ = arguments("spread")
    router = moe_jax.RouterConfig(num_groups=8, top_groups=2, group_score="top2", selection_bias=True)
    program = jax.jit(lambda logits, bias: moe_jax.route(logits, router, top_k=K, bias=bias).expert_ids)
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    found = program.lower(logits, bias).compile(compiler_options=options)(logits, bias)
    np.testing.assert_array_equal(found, reference.route(logits, router, top_k=K, bias=bias).expert_ids)


# --- the adjoint gathers and compares --------------------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
def test_no_scatter_of_floats(score):
    args = (*arguments("spread")[:2], MASKS["some"], arguments("spread")[2])
    lowered = grid_program(score, "fifth").lower(*args)
    assert "stablehlo.scatter" not in lowered.as_text()  # before XLA's CPU pipeline can turn it into a loop
    assert not re.search(r"= f\d+\[[^=]*\bscatter\(", lowered.compile().as_text())


# --- the selection bias ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [[5, 3, 1, 3], [0, 0, 0, 0], [1, 0, 0, 0], [2**24 + 2, 2**24, 2**24 - 2, 2**24]])
def test_update_selection_bias(load):
    bias, load = np.array([0.5, -0.25, 0.0, 1.0], np.float32), np.array(load, np.int32)
    updated = moe_jax.update_selection_bias(bias, load, rate=0.125)  # a power of two: the sums are exact
    np.testing.assert_array_equal(updated, reference.update_selection_bias(bias, load, rate=0.125))


@pytest.mark.parametrize("rate", [0.125, np.float64(0.125), np.array(0.125), fractions.Fraction(1, 8)])
@pytest.mark.parametrize("x64", [False, True])
def test_the_bias_stays_in_fp32(rate, x64):
    bias, load = np.array([0.5, -0.25], np.float32), np.array([3, 1])
    with jax.enable_x64(x64):
        updated = moe_jax.update_selection_bias(bias, load, rate=rate)
        assert updated.dtype == jnp.float32
    np.testing.assert_array_equal(updated, reference.update_selection_bias(bias, load, rate=0.125))


@pytest.mark.parametrize("num_experts", [3, 7, 160, 384])
def test_equal_loads_leave_the_bias_as_it_is(num_experts):
    """Their sum may leave the 24 bits of fp32; their mean must not."""
    load = np.full(num_experts, 2**24 - 3, np.int32)
    assert not np.any(moe_jax.update_selection_bias(np.zeros(num_experts, np.float32), load, rate=0.125))


def test_updating_the_bias_evens_the_load():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(256, 8)).astype(np.float32) + np.linspace(2, 0, 8, dtype=np.float32)
    router = moe_jax.RouterConfig(score="sigmoid", selection_bias=True)

    @jax.jit
    def step(bias):
        load = moe_jax.route(logits, router, top_k=2, bias=bias).load
        return moe_jax.update_selection_bias(bias, load, rate=0.01), load

    bias, first = step(jnp.zeros(8))
    for _ in range(100):
        bias, load = step(bias)
    assert np.ptp(load) < np.ptp(first) / 4
    assert load.sum() == first.sum() == 512


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"logits": np.zeros(E, np.float32)}, errors.ShapeError, "logits"),
        ({"logits": np.zeros((T, E), np.int32)}, errors.DtypeError, "logits"),
        ({"top_k": 0}, errors.InvalidArgumentError, "top_k=0"),
        ({"top_k": E + 1}, errors.InvalidArgumentError, f"top_k={E + 1}"),
        ({"router": {"num_groups": 8, "top_groups": 1}}, errors.InvalidArgumentError, f"top_k={K}"),
        ({"router": {"num_groups": 3}}, errors.InvalidArgumentError, "num_groups=3"),
        ({"router": {"selection_bias": True}}, errors.MissingArgumentError, "bias"),
        ({"bias": np.zeros(E, np.float32)}, errors.InvalidArgumentError, "bias"),
        ({"router": {"selection_bias": True}, "bias": np.zeros(E - 1, np.float32)}, errors.ShapeError, "bias"),
        ({"token_mask": np.ones(T - 1, bool)}, errors.ShapeError, "token_mask"),
        ({"token_mask": np.ones(T, np.float32)}, errors.DtypeError, "token_mask"),
    ],
)
def test_wrong_arguments_are_named(changes, error, names):
    legal = {"logits": jnp.zeros((T, E)), "router": {}, "top_k": K}
    given = legal | changes
    router = moe_jax.RouterConfig(**given.pop("router"))
    with pytest.raises(error, match=names):
        moe_jax.route(given.pop("logits"), router, **given)


def test_masked_tokens_may_hold_anything():
    """NaN and inf in masked logits reach neither values nor gradients."""
    logits = jnp.array([[1.0, 2.0, 3.0], [jnp.nan] * 3, [jnp.inf, 0.0, -jnp.inf]])
    mask = jnp.array([True, False, False])

    def total(logits):
        routing = moe_jax.route(logits, moe_jax.RouterConfig(), top_k=2, token_mask=mask)
        return jnp.sum(routing.combine_weights**2) + routing.losses["balance"] + routing.losses["z"]

    gradient = jax.jit(jax.grad(total))(logits)
    assert np.isfinite(gradient).all() and np.abs(gradient[0]).max() > 0
    assert not np.asarray(gradient[1:]).any()
