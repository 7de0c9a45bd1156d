"""Zero, copy and constant experts against the oracle: exact on integers, gradients by the oracle's differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MOSTLY_PADDED, TRANSPORTS, mesh_of, over_mesh, small_integers

import moe_jax as moe
from moe_jax import reference

T, H, K, E = 5, 3, 3, 8
Z, CP, CC = 2, 2, 3
IDS = E + Z + CP + CC

# fp32 against float64, relative to the largest entry; a softmax and sums of a few terms of like size.
TOLERANCE = 1e-5
STEP = 1e-5  # of central differences in float64: their own error is about 1e-9


def make_plan(ep, tp, transport="padded", **options):
    defaults = {"num_zero_experts": Z, "num_copy_experts": CP, "num_const_experts": CC, "poison": True}
    return moe.make_plan(
        mesh_of(ep, tp), tokens_per_rank=T, hidden=H, num_experts=E, top_k=K, dtype="float32", transport=transport,
        capacity_factor=0.6, **{**defaults, **options},
    )  # fmt: skip


def special_of(alpha1, alpha2, v):
    return reference.SpecialExperts(
        num_experts=E, num_zero=Z, num_copy=CP, num_const=CC, alpha1=alpha1, alpha2=alpha2, v=v
    )


def generate(rng, ep, tp, gated):
    lead = (ep, tp, T)
    ids = rng.integers(-1, IDS, (*lead, K)).astype(np.int32)
    ids[0, 0, 0] = [E, E + 1, E]  # only zero experts
    ids[0, 0, 1] = [E + Z, E + Z + CP, IDS - 1]  # only copy and constant ones
    mask = rng.random((*lead, K)) < 0.8
    weights = small_integers(rng, (*lead, K))
    alphas = small_integers(rng, (2, CC, H) if gated else (2, CC))
    return small_integers(rng, (*lead, H)), ids, mask, weights, *alphas, small_integers(rng, (CC, H))


def round_trip(plan, x, ids, mask, weights, alpha1, alpha2, v):
    """Identity experts; rows are split over tp, which adds them."""
    sent = moe.dispatch(x, ids, plan, token_mask=mask)
    y = moe.combine(
        sent.x / plan.tp_size, weights, sent.handle, x=x, const_alpha1=alpha1, const_alpha2=alpha2, const_v=v
    )
    return y, sent.group_sizes, sent.stats.num_invalid


def oracle(x, ids, mask, weights, alpha1, alpha2, v):
    active = np.where(mask, ids, -1)
    sent = reference.dispatch(x, np.where(active < E, active, -1), num_experts=E)
    rows = [[rank / len(ranks) for rank in ranks] for ranks in sent.rows]
    y = reference.combine(rows, weights, sent)
    return y + reference.special_sum(x, active, weights, special_of(alpha1, alpha2, v)), sent.group_sizes


def on_every_rank(constants, ep, tp):
    return [np.broadcast_to(value, (ep, tp, *value.shape)) for value in constants]


@pytest.mark.quick("1-1-padded-softmax", "1-1-ragged-plain", "1-1-allgather-plain", "4-2-allgather-softmax")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "softmax"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("ep,tp", [(1, 1), (4, 2), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_equals_oracle(ep, tp, transport, gated):
    rng, plan = np.random.default_rng([ep, tp]), make_plan(ep, tp, transport)
    run = jax.jit(over_mesh(mesh_of(ep, tp), lambda *args: round_trip(plan, *args)))
    for _ in range(4):
        x, ids, mask, weights, *constants = generate(rng, ep, tp, gated)
        unread = np.where(mask & (ids >= 0), weights, np.nan)
        y, sizes, invalid = run(x, ids, mask, unread.astype(np.float32), *on_every_rank(constants, ep, tp))
        want, want_sizes = oracle(x, ids, mask, weights, *constants)
        np.testing.assert_array_equal(sizes, want_sizes)  # they cost no row
        assert not np.asarray(invalid).any()
        if gated:
            assert np.abs(y - want).max() <= TOLERANCE * np.abs(want).max()
        else:
            np.testing.assert_array_equal(y, want)


@pytest.mark.quick("softmax")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "softmax"])
def test_gradients_equal_differences_of_the_oracle(gated):
    rng, plan = np.random.default_rng(5), make_plan(2, 1)
    x, ids, mask, *floats = generate(rng, 2, 1, gated)
    ct = rng.normal(size=x.shape)
    floats = [x, *(0.5 * value for value in floats)]

    def shard(x, ids, mask, ct, *floats):
        def loss(x, *floats):
            return round_trip(plan, x, ids, mask, *floats)[0]

        return jax.vjp(loss, x, *floats)[1](ct)

    args = (*floats[:2], *on_every_rank(floats[2:], 2, 1))
    got = jax.jit(over_mesh(mesh_of(2, 1), shard))(
        *(np.asarray(a, t) for a, t in ((args[0], np.float32), (ids, np.int32), (mask, bool), (ct, np.float32))),
        *(np.asarray(a, np.float32) for a in args[1:]),
    )
    for i, value in enumerate(floats):
        want = np.zeros(value.shape)
        for at in np.ndindex(value.shape):
            sides = []
            for step in (STEP, -STEP):
                moved = [np.array(other, np.float64) for other in floats]
                moved[i][at] += step
                sides.append(np.sum(ct * oracle(moved[0], ids, mask, *moved[1:])[0]))
            want[at] = (sides[0] - sides[1]) / (2 * STEP)
        mine = np.asarray(got[i], np.float64)
        mine = mine if i < 2 else mine.sum((0, 1))  # constants are replicated: each rank has its share
        assert np.abs(mine - want).max() <= TOLERANCE * max(np.abs(want).max(), 1.0), i


@pytest.mark.slow
@pytest.mark.parametrize("transport", MOSTLY_PADDED)
def test_layer_equals_oracle(transport):
    """Values of all outputs; gradients along random directions, with overflow rounds on the way."""
    hidden, tokens = 16, 8
    mesh = mesh_of(4, 2)
    plan = moe.make_plan(
        mesh, tokens_per_rank=tokens, hidden=hidden, num_experts=E, top_k=K, dtype="float32", transport=transport,
        capacity_factor=0.3, poison=True, num_zero_experts=Z, num_copy_experts=CP, num_const_experts=CC,
    )  # fmt: skip
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=8)
    rng = np.random.default_rng(6)
    params = {name: np.asarray(value) for name, value in init(jax.random.key(1)).items()}
    assert params["router"].shape == (hidden, IDS) and params["const_v"].shape == (CC, hidden)
    x, ct = rng.normal(size=(2, tokens * 8, hidden)).astype(np.float32)

    def loss(params, x):
        y, stats = apply(params, x)
        return jnp.sum(y * ct), (y, stats)

    (_, (y, stats)), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    def want(params, x):
        constants = [params[f"const_{name}"] for name in ("alpha1", "alpha2", "v")]
        routed = {name: value for name, value in params.items() if not name.startswith("const_")}
        return reference.moe_layer(routed, x, moe.RouterConfig(), top_k=K, special=special_of(*constants))

    expected, routing = want(params, x)
    assert np.abs(y - expected).max() <= TOLERANCE * np.abs(expected).max()
    np.testing.assert_array_equal(stats.load, routing.load)
    assert stats.load.shape == (IDS,) and int(stats.num_rounds) > 1

    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    for name in [*params, "x"]:
        if name == "x":
            direction = ({key: np.zeros(value.shape) for key, value in params.items()}, rng.normal(size=x.shape))
        else:
            zeros = {key: np.zeros(value.shape) for key, value in params.items()}
            direction = ({**zeros, name: rng.normal(size=params[name].shape)}, np.zeros(x.shape))
        sides = [
            np.sum(ct * want(*jax.tree.map(lambda a, d, s=step: a + s * d, wide, direction))[0])
            for step in (1e-6, -1e-6)
        ]
        slope = (sides[0] - sides[1]) / 2e-6
        products = jax.tree.map(lambda g, d: np.sum(np.asarray(g, np.float64) * d), grads, direction)
        assert abs(sum(jax.tree.leaves(products)) - slope) <= 1e-4 * max(abs(slope), 1.0), name


BAD = {
    "x missing": ({"x": None}, "x is missing"),
    "alpha missing": ({"const_alpha1": None}, "const_alpha1 is missing"),
    "v missing": ({"const_v": None}, "const_v is missing"),
    "alphas differ": ({"const_alpha2": jnp.zeros((CC, H))}, "const_alpha2 has shape"),
    "v too short": ({"const_v": jnp.zeros((CC - 1, H))}, "const_v has shape"),
    "dtype": ({"const_v": jnp.zeros((CC, H), jnp.bfloat16)}, "const_v has dtype"),
}


def _call(plan, changes):
    given = {
        "x": jnp.zeros((T, H)), "const_alpha1": jnp.zeros(CC), "const_alpha2": jnp.zeros(CC),
        "const_v": jnp.zeros((CC, H)),
    }  # fmt: skip

    def shard(ids):
        sent = moe.dispatch(jnp.zeros((T, H)), ids, plan)
        return moe.combine(sent.x, jnp.zeros((T, K)), sent.handle, **{**given, **changes})

    jax.eval_shape(over_mesh(mesh_of(2, 1), shard), jnp.zeros((2, 1, T, K), jnp.int32))


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named(case):
    changes, text = BAD[case]
    with pytest.raises(moe.MoEError, match=text):
        _call(make_plan(2, 1), changes)


def test_constants_without_constant_experts_are_refused():
    with pytest.raises(ValueError, match="const_alpha1 was given"):
        _call(make_plan(2, 1, num_const_experts=0), {})
