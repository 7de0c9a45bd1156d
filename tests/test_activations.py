"""Activations: the package's table and the oracle's say the same, and a function of one's own is as good as a name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouping_cases import make_plan, shapes_of
from layer_cases import T, compare, make, make_params, steered_tokens, value_and_grads

import moe_jax as moe
from moe_jax import reference
from moe_jax.activations import TABLE
from moe_jax.config import ACTIVATIONS
from moe_jax.layer import grouping
from moe_jax.reference import experts as oracle

GATED = {"swiglu", "geglu", "geglu_tanh", "reglu", "relu2_gated", "clamped_swiglu"}


def test_one_table():
    assert set(ACTIVATIONS) == set(TABLE) == set(oracle._ACTIVATIONS)
    assert {name for name, row in TABLE.items() if row.gated} == GATED
    assert {name for name, rule in oracle._ACTIVATIONS.items() if rule[2]} == GATED


def test_a_clamp_by_hand():
    clamp = moe.ClampedSwiGLU(limit=2.0, alpha=0.0, shift=3.0)  # half the gate, times up + 3
    assert float(clamp(jnp.float32(8), jnp.float32(9))) == 5.0
    assert float(clamp(jnp.float32(-8), jnp.float32(-9))) == -4.0
    assert moe.ClampedSwiGLU() == moe.ClampedSwiGLU(7, 1.702, 1) and hash(moe.ClampedSwiGLU())


@pytest.mark.parametrize(
    "activation,name",
    [
        (lambda gate, up: jnp.where(gate > 0, gate, 0) * up, "reglu"),
        pytest.param(lambda up, slope=1.0: jnp.square(jax.nn.relu(slope * up)), "relu2", marks=pytest.mark.slow),
    ],
    ids=["gated", "plain"],
)
def test_a_function_in_the_layer_equals_the_oracle(activation, name):
    """In several rounds, with garbage in all rows that nobody may read; its arguments say whether there is a gate."""
    _, init, apply = make(2, 1, activation=activation)
    rng = np.random.default_rng(3)
    params = make_params(init, rng)
    assert ("w_gate" in params) == ("shared_gate" in params) == (name == "reglu")
    x, mask = steered_tokens("one_rank", rng, 2 * T, 2)
    stats = compare(value_and_grads(apply), params, x, mask, moe.RouterConfig(), rng, activation=name)
    assert int(stats.num_rounds) > 1
    other = reference.moe_layer(params, x, moe.RouterConfig(), top_k=2, activation=name)[0]
    plain = {"reglu": lambda gate, up: np.maximum(gate, 0) * up, "relu2": lambda up: np.maximum(up, 0) ** 2}[name]
    same = reference.moe_layer(params, x, moe.RouterConfig(), top_k=2, activation=plain)[0]
    np.testing.assert_array_equal(same, other)


@pytest.mark.parametrize("activation", [*TABLE, moe.ClampedSwiGLU(2.0), jnp.multiply], ids=str)
def test_kernels_fuse_what_they_know(activation):
    shapes: Any = shapes_of()
    way = grouping._way(make_plan(backend="gpu"), activation, shapes[0], shapes[1], None)
    known = ("swiglu", "clamped_swiglu", moe.ClampedSwiGLU(2.0))
    assert way.activates == (activation in known)


def none_of_three(a, b, c):
    return a


class Unhashable:
    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __call__(self, up):
        return up


@pytest.mark.parametrize(
    "activation,words",
    [
        (none_of_three, ["takes 3 arrays", "(gate, up)"]),
        (lambda: 0, ["takes 0 arrays"]),
        (lambda *arrays: arrays[0], ["has no signature", "lambda"]),
        (Unhashable(), ["must be hashable"]),
    ],
    ids=["three", "none", "any", "unhashable"],
)
def test_functions_that_are_none(activation, words):
    mesh = moe.make_mesh(ep=2)
    plan = moe.make_plan(mesh, tokens_per_rank=2, hidden=4, num_experts=2, top_k=1)
    calls = [
        lambda: moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), activation=activation),
        lambda: moe.param_specs(plan, moe.RouterConfig(), activation=activation),
        lambda: plan.cost(8, activation=activation),
    ]
    for call in calls:
        with pytest.raises(moe.errors.InvalidArgumentError) as caught:
            call()
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "activation,error,words",
    [
        (lambda up: up.sum(), moe.errors.ShapeError, "has shape ()"),
        (lambda up: up > 0, moe.errors.DtypeError, "dtype bool"),
    ],
)
def test_what_a_function_returns_is_checked(activation, error, words):
    _, init, apply = make(1, 1, shared=0, activation=activation)
    params = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(error, match="what activation returned") as caught:
        jax.eval_shape(apply, params, jax.ShapeDtypeStruct((T, 16), "float32"))
    assert words in str(caught.value)


@pytest.mark.parametrize("options", [{"limit": 0}, {"alpha": "1"}, {"shift": float("nan")}], ids=str)
def test_clamps_that_are_none(options):
    with pytest.raises(moe.errors.InvalidArgumentError, match=next(iter(options))):
        moe.ClampedSwiGLU(**options)
