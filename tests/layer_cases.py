"""What the tests of the layer share: a layer, its parameters, tokens with steered routes, and the oracle beside it.

Routing is steered through x: each token carries a bump per wanted expert, and the router reads it off. So one
compiled program serves all patterns.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers import expert_ids, mesh_of

import moe_jax as moe
from moe_jax import reference

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
    """Parameters of the shapes that ``init`` makes, drawn by NumPy: compiling ``init`` would take seconds."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = {}
    for name, made in shapes.items():
        is_bias = name.startswith("b_") or len(made.shape) == 1
        params[name] = rng.normal(size=made.shape) * (0.1 if is_bias else 0.1 + 0.5 / np.sqrt(made.shape[-2]))
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


@functools.cache
def program(ep, tp, transport):
    """(init, compiled value and gradients) of the layer that ``make`` makes: one program for all tests of a file."""
    _, init, apply = make(ep, tp, transport)
    return init, value_and_grads(apply)


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
