"""The quantised wire against the oracle: exact codes and scales, straight-through gradients, one message."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TRANSPORTS, expert_ids, mesh_of, over_mesh, small_integers

import moe_jax as moe
from moe_jax import reference

H, T, K = 40, 3, 2
RECIPES = [name for name in moe.quant.NAMES if name not in ("none", "int8_static")]
SMOOTHED = [  # every recipe that can be smoothed with every kind, every kind on every transport
    ("int8", "one", "allgather"),
    ("int8", "row", "ragged"),
    ("int8", "experts", "padded"),
    ("int8_static", "one", "ragged"),
    ("int8_static", "row", "padded"),
    ("int8_static", "experts", "allgather"),
    ("fp8_e4m3", "one", "padded"),
    ("fp8_e4m3", "row", "allgather"),
    ("fp8_e4m3", "experts", "ragged"),
    ("fp8_e5m2_group128", "one", "allgather"),
    ("fp8_e5m2_group128", "row", "padded"),
    ("fp8_e5m2_group128", "experts", "ragged"),
]


def make_plan(ep, tp, transport, **options):
    options = {"dtype": "bfloat16", "num_experts": 2 * ep, "poison": True, "hidden": H, **options}
    return moe.make_plan(mesh_of(ep, tp), tokens_per_rank=T, top_k=K, transport=transport, **options)


def rows_of_all_sizes(rng, shape, dtype):
    """Mixed magnitudes, rows of zeros and subnormals among them."""
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-4, 4, (*shape[:-1], 1))
    x[rng.random(shape[:-1]) < 0.1] = 0
    return jnp.asarray(x, dtype)


@functools.cache
def program(plan, with_smooth, with_weights):
    """(x, ids, smooth, weights, ct) -> codes, scales, row weights, dequantised rows and their adjoints."""

    def shard(x, ids, smooth, weights, ct, ct_weights):
        def rows(x, smooth, weights):
            options = {"smooth_scales": smooth} if with_smooth else {}
            options |= {"combine_weights": weights} if with_weights else {}
            d = moe.dispatch(x, ids, plan, **options)
            row_weights = d.row_weights if with_weights else ct_weights
            return (moe.dequantize(d), row_weights), (d.x, d.scales, d.group_sizes)

        (out, row_weights), pull, aux = jax.vjp(rows, x, smooth, weights, has_aux=True)
        return aux, out, row_weights, pull((ct, ct_weights if with_weights else jnp.zeros_like(ct_weights)))

    return jax.jit(over_mesh(mesh_of(plan.ep_size, plan.tp_size), shard))


def bits(codes):
    return np.asarray(codes).view(np.uint8) if np.asarray(codes).dtype.itemsize == 1 else np.asarray(codes)


def smoothing(kind, rng, plan):
    """Powers of two, so that products and sums of small integers stay exact."""
    num_rows = plan.pairs_per_token - plan.top_k + plan.num_experts
    shape = {"none": (1,), "one": (1,), "row": (plan.hidden,), "experts": (num_rows, plan.hidden)}[kind]
    return 2.0 ** (rng.integers(-2, 3, shape) * (kind != "none")).astype(np.float32)


def factors_of(origins, ids, smooth, plan):
    """[n, H] the smoothing factors of every row."""
    if smooth.ndim == 1:
        return np.broadcast_to(smooth, (len(origins), plan.hidden))
    shared = plan.pairs_per_token - plan.top_k
    rows = [k - K if k >= K else shared + ids[w, p, t, k] for p, w, t, k in origins]
    return smooth[np.array(rows, int)].reshape(len(origins), plan.hidden)


def compare(plan, kind, seed, *, with_weights=True):
    rng = np.random.default_rng(seed)
    W, P = plan.ep_size, plan.tp_size
    ids = expert_ids("masked", rng, (W, P, T, K), plan.num_experts, W)
    x = rows_of_all_sizes(rng, (W, P, T, plan.hidden), plan.dtype)
    smooth = smoothing(kind, rng, plan)
    everywhere = np.broadcast_to(smooth, (W, P, *smooth.shape))
    weights = small_integers(rng, (W, P, T, K))
    expected = reference.dispatch(
        np.asarray(x), ids, num_experts=plan.num_experts, num_shared_experts=plan.num_shared_experts,
        num_shared_ranks=plan.num_shared_ranks,
    )  # fmt: skip
    num_rows = plan.num_rows(plan.max_pair_rows)
    ct = small_integers(rng, (W, P, num_rows, plan.hidden))
    ct_weights = small_integers(rng, (W, P, num_rows))
    run = program(plan, kind != "none", with_weights)
    (codes, scales, sizes), out, row_weights, pulled = run(
        x, ids, everywhere, weights, jnp.asarray(ct, plan.dtype), ct_weights
    )
    np.testing.assert_array_equal(sizes, expected.group_sizes)
    d_x, d_smooth = np.zeros(x.shape), np.zeros((W, P, *smooth.shape))
    d_weights = np.zeros(weights.shape)
    for w, p in np.ndindex(W, P):
        rows, origins = expected.rows[w][p], expected.origins[w][p]
        factors = factors_of(origins, ids, smooth, plan)
        values, scale = reference.quant.quantize(plan.quant, rows, smooth=factors if kind != "none" else None)
        n = len(rows)
        np.testing.assert_array_equal(bits(codes[w, p, :n]), bits(values))
        np.testing.assert_array_equal(np.asarray(scales)[w, p, :n], scale)
        back = reference.quant.dequantize(plan.quant, values, scale)
        np.testing.assert_array_equal(np.asarray(out)[w, p, :n], np.asarray(jnp.asarray(back, plan.dtype)))
        for row, (q, src, t, k) in enumerate(origins):
            d_x[src, q, t] += ct[w, p, row] * factors[row]
            if with_weights:
                assert row_weights[w, p, row] == (weights[src, q, t, k] if k < K else 1)
                if k < K:
                    d_weights[src, q, t, k] += ct_weights[w, p, row]
            product = ct[w, p, row] * np.asarray(x, np.float64)[src, q, t]
            if kind == "row":
                d_smooth[src, q] += product
            elif kind == "one":
                d_smooth[src, q] += product.sum()
            elif kind == "experts":
                index = k - K if k >= K else plan.pairs_per_token - plan.top_k + ids[src, q, t, k]
                d_smooth[src, q, index] += product
    np.testing.assert_array_equal(np.asarray(pulled[0]), np.asarray(jnp.asarray(d_x, plan.dtype)))
    if with_weights:
        np.testing.assert_array_equal(pulled[2], d_weights)
    if kind != "none":  # each copy is smoothed where its route quantises it: compare the sum over ranks
        np.testing.assert_allclose(
            np.asarray(pulled[1], np.float64).sum((0, 1)), d_smooth.sum((0, 1)), rtol=3e-5, atol=1e-3 * np.abs(x).max()
        )


@pytest.mark.quick("fp8_e5m2_group128", "mx_clip_e4m3")
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_exact(name):
    compare(make_plan(4, 2, "padded", quant=name), "none", 0)


WIRES = [("int8", "bfloat16"), ("mx_e4m3", "float16")]
WIRES += [pytest.param("fp8_e4m3_group128", "float32", marks=pytest.mark.slow)]


@pytest.mark.quick("int8-bfloat16-allgather", "mx_e4m3-float16-padded")
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name,dtype", WIRES)
def test_transports_and_dtypes(name, dtype, transport):
    compare(make_plan(8, 1, transport, quant=name, dtype=dtype), "none", 1, with_weights=transport != "ragged")


@pytest.mark.quick("int8-one-allgather", "int8-experts-padded", "int8_static-row-padded")
@pytest.mark.parametrize("name,kind,transport", SMOOTHED)
def test_smoothing(name, kind, transport):
    compare(make_plan(4, 1, transport, quant=name), kind, 2)


@pytest.mark.quick("allgather")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_smoothing_of_shared_experts_comes_first(transport):
    plan = make_plan(4, 2, transport, quant="int8", num_experts=4, num_shared_experts=2, num_shared_ranks=2)
    compare(plan, "experts", 3)


@functools.cache
def combine_program(plan):
    def shard(x, rows, ids, weights, ct):
        handle = moe.dispatch(x, ids, plan).handle
        y, pull = jax.vjp(lambda rows, w: moe.combine(rows, w, handle), rows, weights)
        d_x = jax.vjp(lambda x: moe.dispatch(x, ids, plan).x, x)[1](rows)[0]
        return y, pull(ct), d_x

    return jax.jit(over_mesh(mesh_of(plan.ep_size, plan.tp_size), shard))


BOTH_WAYS = [
    ("int8_group8", "allgather"),
    ("mx_e4m3", "padded"),
    ("int8_group8", "ragged"),
    ("mx_e5m2", "padded"),
    ("mx_e5m2", "allgather"),
    ("int8", "ragged"),
]


@pytest.mark.quick("int8_group8-allgather", "mx_e4m3-padded")
@pytest.mark.parametrize("name,transport", BOTH_WAYS)
def test_combine_and_cotangents_on_a_quantised_wire(name, transport):
    """Rows come back as the recipe leaves them; so do cotangents under ``backward_quant``, in both directions."""
    plan = make_plan(4, 1, transport, combine_quant=name, backward_quant=name, dtype="float32")
    rng = np.random.default_rng(4)
    W, num_rows = 4, plan.num_rows(plan.max_pair_rows)

    def hat(rows):
        return reference.quant.dequantize(name, *reference.quant.quantize(name, np.asarray(rows, np.float32)))

    ids = expert_ids("masked", rng, (W, 1, T, K), plan.num_experts, W)
    weights = rng.standard_normal((W, 1, T, K)).astype(np.float32)
    x, ct = (np.asarray(rows_of_all_sizes(rng, (W, 1, T, H), "float32")) for _ in range(2))
    rows = np.asarray(rows_of_all_sizes(rng, (W, 1, num_rows, H), "float32"))
    expected = reference.dispatch(x, ids, num_experts=plan.num_experts)
    y, (d_rows, d_weights), d_x = combine_program(plan)(x, rows, ids, weights, ct)

    hats = [[hat(rows[w, 0, : len(expected.rows[w][0])])] for w in range(W)]
    want = reference.combine(hats, weights, expected)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(d_x, reference.dispatch_vjp(hats, expected, T), rtol=1e-5, atol=1e-5 * np.abs(x).max())
    # The cotangent of a pair is weighted at the token by one route and at the expert by the other.
    late = transport == "allgather"
    for w in range(W):
        for row, (p, src, t, k) in enumerate(expected.origins[w][0]):
            weight = weights[src, p, t, k]
            sent = weight * hat(ct[src, p, t][None])[0] if late else hat((weight * ct[src, p, t])[None])[0]
            np.testing.assert_allclose(d_rows[w, 0, row], sent, rtol=1e-5, atol=1e-6 * np.abs(ct).max())
    cts = np.asarray([hat(c[0])[None] for c in ct]) if late else ct
    want = reference.combine_vjp(cts, hats, weights, expected)[1]
    np.testing.assert_allclose(d_weights, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


_SLOW = [(name, transport) for name in ("int8", "fp8_e4m3", "mx_e4m3") for transport in ("padded", "allgather")][1:-1]


@pytest.mark.parametrize(
    ("name", "transport"),
    [("int8", "padded"), ("mx_e4m3", "allgather"), *(pytest.param(*case, marks=pytest.mark.slow) for case in _SLOW)],
)
def test_a_derivative_through_codes_is_refused(name, transport):
    plan = make_plan(2, 1, transport, quant=name, dtype="float32", poison=False)

    def by_hand(x, ids):
        d = moe.dispatch(x, ids, plan)
        return jnp.sum(d.x[:1].astype(jnp.float32)) * jnp.sum(d.scales[:1].astype(jnp.float32))

    run, x, ids = over_mesh(mesh_of(2, 1), by_hand), jnp.ones((2, 1, T, H)), jnp.zeros((2, 1, T, K), jnp.int32)
    with pytest.raises(moe.errors.UnsupportedError, match="moe_jax.dequantize"):
        jax.jit(jax.grad(lambda x: jnp.sum(run(x, ids))))(x)
    frozen = over_mesh(mesh_of(2, 1), lambda x, ids: jax.lax.stop_gradient(by_hand(x, ids)) * jnp.sum(x))
    assert np.any(jax.jit(jax.grad(lambda x: jnp.sum(frozen(x, ids))))(x)), "constants may be used"


def test_one_message():
    """Codes, scales and weights share one exchange: as many as unquantised rows need."""

    def count(**options):
        plan = make_plan(4, 1, "padded", overflow="drop", poison=False, **options)

        def shard(x, ids, weights):
            d = moe.dispatch(x, ids, plan, combine_weights=weights)
            return d.x, d.scales, d.row_weights

        shapes = [((4, 1, T, H), jnp.bfloat16), ((4, 1, T, K), jnp.int32), ((4, 1, T, K), jnp.float32)]
        arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        return jax.jit(over_mesh(mesh_of(4, 1), shard)).lower(*arrays).as_text().count("stablehlo.all_to_all")

    assert count(quant="int8") == count(quant="mx_e4m3") == count() == 1  # of rows; counts are gathered


BAD = [
    ("none", {"smooth_scales": (H,)}, "takes none"),
    ("mx_e4m3", {"smooth_scales": (H,)}, "takes none"),
    ("int8_static", {}, "smooth_scales is missing"),
    ("int8", {"smooth_scales": (3, H)}, "expected one of"),
    ("int8", {"combine_weights": (T, K + 1)}, "combine_weights"),
]


@pytest.mark.parametrize("name,arrays,text", BAD)
def test_bad_input(name, arrays, text):
    plan = make_plan(2, 1, "padded", quant=name)
    arrays = {key: np.ones((2, 1, *shape), np.float32) for key, shape in arrays.items()}

    def shard(x, ids, options):
        return moe.dispatch(x, ids, plan, **options).x

    with pytest.raises(moe.MoEError, match=text):
        over_mesh(mesh_of(2, 1), shard)(
            jnp.ones((2, 1, T, H), jnp.bfloat16), jnp.zeros((2, 1, T, K), jnp.int32), arrays
        )


@pytest.mark.parametrize("argument", ["combine_quant", "backward_quant"])
def test_recipes_that_need_a_scale_are_for_dispatch_alone(argument):
    with pytest.raises(moe.errors.InvalidArgumentError, match=f"{argument}='int8_static'"):
        make_plan(2, 1, "padded", **{argument: "int8_static"})
    with pytest.raises(moe.errors.InvalidArgumentError, match="must be even"):
        make_plan(2, 1, "padded", hidden=7, **{argument: "mx_e2m1"})
