"""The router where fp32 ends: scores that saturate or vanish, infinite logits, sums that rounding makes equal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import reference

RELATIVE = {"rtol": 1e-5, "atol": 0}  # a dozen roundings of numbers that may be as small as fp32 holds
# Logarithms of the scores in float64, and their derivatives with the sum of a softmax held fast: shares do not see it.
LOGS = {
    "softmax": lambda x: x - np.logaddexp.reduce(x, axis=-1, keepdims=True),
    "sigmoid": lambda x: -np.logaddexp(0, -x),
    "sqrt_softplus": lambda x: 0.5 * np.log(np.logaddexp(0, np.maximum(x, -700))),
}
SLOPES_OF_LOGS = {
    "softmax": np.ones_like,
    "sigmoid": lambda x: np.exp(-np.logaddexp(0, x)),
    "sqrt_softplus": lambda x: 0.5 * np.exp(-np.logaddexp(0, -x)) / np.logaddexp(0, x),
}


@functools.partial(jax.jit, static_argnames=("router", "top_k"))
def run(logits, router, top_k, bias=None):
    return moe_jax.route(logits, router, top_k=top_k, bias=bias)


# --- values and slopes, to a relative precision ----------------------------------------------------------------------


@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
def test_scores_and_slopes_at_both_ends(score):
    logits = np.arange(80, -84, -4, dtype=np.float32)[None]
    router = moe_jax.RouterConfig(score=score, renormalize=False)

    def differentiable(logits):
        weights = run(logits, router, logits.size).combine_weights
        return jnp.sum(weights), weights

    slopes, weights = jax.grad(differentiable, has_aux=True)(logits)
    wide = logits.astype(np.float64)
    np.testing.assert_allclose(weights, np.exp(LOGS[score](wide)), **RELATIVE)
    np.testing.assert_allclose(slopes, np.exp(LOGS[score](wide)) * SLOPES_OF_LOGS[score](wide), **RELATIVE)


def test_a_root_of_softplus_that_vanished():
    """At -160 softplus is 1e-70, which fp32 does not hold, and its root is 1e-35, which it does."""
    router = moe_jax.RouterConfig(score="sqrt_softplus", renormalize=False)
    logits = np.full((1, 1), -160.0, np.float32)
    weight, slope = jax.value_and_grad(lambda x: run(x, router, 1).combine_weights[0, 0])(logits)
    np.testing.assert_allclose([weight, slope[0, 0]], np.exp(-80.0) * np.array([1, 0.5]), **RELATIVE)


@pytest.mark.parametrize("score", list(LOGS))
@pytest.mark.parametrize("low", [-600.0, -100.0, -30.0, 20.0, 80.0])
def test_shares_and_their_slopes(score, low):
    """d w0 / d l0 = w0 w1 (log s)'(l0), d w0 / d l1 = -w0 w1 (log s)'(l1): tiny where scores saturate, and not zero."""
    logits = np.array([[low + 0.5, low]], np.float32)
    router = moe_jax.RouterConfig(score=score)
    gradient = jax.grad(lambda x: run(x, router, 2).combine_weights[0, 0])(logits)
    wide = logits[0].astype(np.float64)
    logs = LOGS[score](wide)
    first = 1 / (1 + np.exp(logs[1] - logs[0]))
    np.testing.assert_allclose(run(logits, router, 2).combine_weights, [[first, 1 - first]], **RELATIVE)
    expected = first * (1 - first) * SLOPES_OF_LOGS[score](wide) * [1, -1]
    assert np.all(expected != 0)
    np.testing.assert_allclose(gradient[0], expected, **RELATIVE)


@pytest.mark.parametrize("score", list(LOGS))
def test_shares_of_the_lowest_logits_that_fp32_holds(score):
    lowest = float(np.finfo(np.float32).min)
    logits = np.array([[-np.inf, lowest, lowest / 2, lowest]], np.float32)
    routing = run(logits, moe_jax.RouterConfig(score=score), 3)
    assert routing.expert_ids.tolist() == [[2, 1, 3]]
    assert routing.combine_weights.tolist() == [[1, 0, 0]]


# --- sums are compared as fp32 rounds them; of equal sums the scores decide -------------------------------------------


def check_best(values, chosen, tolerance):
    """No value [T, N] that was not ``chosen`` [T, C] exceeds one that was by more than ``tolerance`` [T]."""
    taken = np.zeros(values.shape, bool)
    np.put_along_axis(taken, np.asarray(chosen), True, axis=1)
    assert np.all(taken.sum(axis=1) == np.shape(chosen)[1])  # distinct
    least = np.where(taken, values, np.inf).min(axis=1)
    assert np.all(np.where(taken, -np.inf, values).max(axis=1) <= least + tolerance)


@pytest.mark.quick("softmax-True", "sigmoid-False")
@pytest.mark.parametrize("topk_first", [False, True])
@pytest.mark.parametrize("score", list(LOGS))
def test_no_choice_is_wrong_by_more_than_the_rounding_of_sums(score, topk_first):
    """Logits of every magnitude, each close to another one of its row, and any biases."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(256, 8)) * 10.0 ** rng.uniform(-2, 3, (256, 1))
    logits = np.concatenate([half, half[:, ::-1] + rng.normal(size=(256, 8)) / 64], axis=1).astype(np.float32)
    bias = (rng.normal(size=16) / 64).astype(np.float32)
    wide = logits.astype(np.float64)
    sums = (wide if topk_first else np.exp(LOGS[score](wide))) + bias
    tolerance = 4 * np.finfo(np.float32).eps * np.abs(sums).max(axis=1)

    router = moe_jax.RouterConfig(score=score, topk_first=topk_first, selection_bias=True)
    check_best(sums, run(logits, router, 5, bias).expert_ids, tolerance)
    # Who chooses every expert of the kept groups shows which they are.
    router = moe_jax.RouterConfig(
        score=score, topk_first=topk_first, selection_bias=True, num_groups=4, top_groups=2, group_score="top2"
    )
    groups = np.array([np.unique(ids // 4) for ids in np.asarray(run(logits, router, 8, bias).expert_ids)])
    check_best(np.sort(sums.reshape(256, 4, 4), axis=-1)[..., -2:].sum(axis=-1), groups, 2 * tolerance)


def test_a_saturated_deepseek_router():
    """Zero biases, as before the first step. Scores are 1 in fp32; the groups with 30 and 31, and with 40, are best."""
    router = moe_jax.RouterConfig(score="sigmoid", selection_bias=True, num_groups=4, top_groups=2)
    logits = np.array([[18, 19, 30, 31, 25, 20, 26, 40]], np.float32)
    routing = run(logits, router, 3, np.zeros(8, np.float32))
    assert routing.expert_ids.tolist() == [[7, 3, 2]]
    # Another bias where all are equal changes nothing, and one that differs decides.
    assert run(logits, router, 3, np.full(8, 0.3, np.float32)).expert_ids.tolist() == [[7, 3, 2]]
    assert run(logits, router, 3, np.eye(8, dtype=np.float32)[0]).expert_ids.tolist() == [[0, 3, 2]]


@pytest.mark.parametrize("biased", [False, True])
def test_both_zeros_are_equal(biased):
    logits, bias = np.array([[-0.0, 0.0, -0.0, 0.0]], np.float32), np.zeros(4, np.float32)
    router = moe_jax.RouterConfig(topk_first=True, selection_bias=biased)
    assert run(logits, router, 3, bias if biased else None).expert_ids.tolist() == [[0, 1, 2]]


# --- infinite logits, and NaN -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("topk_first", "biased"), [(False, False), (True, True)])
def test_a_kept_group_is_never_left(topk_first, biased):
    """Not even for experts that are as low as those outside."""
    options = {"num_groups": 2, "top_groups": 1, "group_score": "max"}
    router = moe_jax.RouterConfig(topk_first=topk_first, selection_bias=biased, **options)
    logits, bias = np.array([[-np.inf, -np.inf, 5, -np.inf]], np.float32), np.zeros(4, np.float32)
    routing = run(logits, router, 2, bias if biased else None)
    assert routing.expert_ids.tolist() == [[2, 3]]
    assert routing.combine_weights.tolist() == [[1, 0]]


@pytest.mark.quick("softmax-True", "sigmoid-False", "sqrt_softplus-True")
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("score", list(LOGS))
def test_a_token_without_experts(score, renormalize):
    """It counts as one of equal scores, has no z loss, and gradients neither from it nor beside it are NaN."""
    logits = np.array([[-np.inf] * 4, [3, -np.inf, 1, 2]], np.float32)
    router = moe_jax.RouterConfig(score=score, renormalize=renormalize)

    def differentiable(logits):
        routing = run(logits, router, 2)
        return jnp.sum(routing.combine_weights[:, 0]) + routing.losses["balance"] + routing.losses["z"], routing

    gradient, routing = jax.jit(jax.grad(differentiable, has_aux=True))(logits)
    expected = reference.route(logits, router, top_k=2)
    assert routing.expert_ids.tolist() == expected.expert_ids.tolist() == [[0, 1], [0, 3]]
    equal = 1 / 2 if renormalize else 1 / 4 if score == "softmax" else 0
    assert routing.combine_weights[0].tolist() == expected.combine_weights[0].tolist() == [equal, equal]
    z = np.logaddexp.reduce([3.0, 1.0, 2.0]) ** 2 / 2
    np.testing.assert_allclose([routing.losses["z"], expected.losses["z"]], z, **RELATIVE)
    assert not np.any(gradient[0]) and not gradient[1, 1]
    expected = reference.route_vjp(logits, router, np.eye(2)[[0, 0]], top_k=2, ct_balance=1.0, ct_z=1.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.quick("softmax-1-False", "sigmoid-2-True", "sqrt_softplus-1-False")
@pytest.mark.parametrize(("num_groups", "biased"), [(1, False), (2, True)])
@pytest.mark.parametrize("score", list(LOGS))
@np.errstate(invalid="ignore")
def test_nan_is_chosen_and_seen(score, num_groups, biased):
    logits, bias = np.array([[1, 2, 3, -np.nan], [1, 2, 4, 3]], np.float32), np.zeros(4, np.float32)
    router = moe_jax.RouterConfig(score=score, selection_bias=biased, num_groups=num_groups)
    bias = bias if biased else None
    for routing in (run(logits, router, 2, bias), reference.route(logits, router, top_k=2, bias=bias)):
        assert routing.expert_ids.tolist() == [[3, 2], [2, 3]]
        assert np.isnan(routing.combine_weights[0]).all() and np.isfinite(routing.combine_weights[1]).all()
        assert np.isnan(routing.losses["balance"]) and np.isnan(routing.losses["z"])
