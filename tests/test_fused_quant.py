"""The fused pair on scaled numbers, against the oracle that undoes the scales one number at a time.

Rows past the counts hold NaN, or the largest code of a format that has none.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_cases import E2M1, E4M3, E5M2, E8M0, IN, INT8, OPS, OUT, PACKED, codes, hashable, inner, lists, scales, table
from helpers import mesh_for, per_rank
from jax import lax
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import _compat, errors, quant, reference
from moe_jax.fused import scaled

N, ROWS, CAPACITY = 6, 16, 40
OUT_OF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative error of one rounding


def poisoned(x, counts):
    """Garbage in the rows past the counts of each rank."""
    x = np.array(x)
    for rank, total in enumerate(counts.sum(axis=1)):
        x.view(np.uint8)[rank, total:] = 0xFF if x.dtype != E2M1 else 0xF
    return x


def operands(rng, sizes, kinds, hidden, *, microscaled, transpose, scale_dtype=np.uint8):
    """What both operators take, per rank, with a dense part."""
    num_ranks, _, num_local = sizes.shape
    weight = (num_local, N, hidden) if transpose else (num_local, hidden, N)
    axis = 2 if transpose else 1
    draw = functools.partial(scales, rng, microscaled, num_ranks, dtype=scale_dtype)
    return {
        "gmm_x": poisoned(codes(rng, kinds[0], (num_ranks, ROWS, hidden)), lists(sizes)[0]),
        "gmm_weight": codes(rng, kinds[1], (num_ranks, *weight)),
        "gmm_x_scale": draw((ROWS, hidden), 1),
        "gmm_weight_scale": draw(weight, axis),
        "mm_x": codes(rng, kinds[0], (num_ranks, 5, hidden)),
        "mm_weight": codes(rng, kinds[1], (num_ranks, *weight[1:])),
        "mm_x_scale": draw((5, hidden), 1),
        "mm_weight_scale": draw(weight[1:], axis - 1),
    }


def run(op, given, counts, *, axes="x", static=False, **options):
    def body(given, *traced):
        return getattr(moe, op)(send_counts=traced[0], recv_counts=traced[1], axis_name=axes, **given, **options)

    if static:
        fixed = [hashable(c) for c in counts]
        return jax.jit(per_rank(len(counts[0]), lambda given: body(given, *fixed), axes))(given)
    return jax.jit(per_rank(len(counts[0]), body, axes))(given, *counts)


def check(op, found, given, counts, dtype, *, exact=False, transpose=False, **options):
    flags = {"transpose_gmm_weight": transpose, "transpose_mm_weight": transpose}
    send, recv = counts
    expected = getattr(reference, op)(**given, send_counts=send, recv_counts=recv, **flags, **options)
    terms = getattr(reference, op)(
        **magnitudes(given, transpose), send_counts=send, recv_counts=recv, **flags, **options
    )
    assert found[0].dtype == found[1].dtype == dtype
    for mine, true, size in zip(found[:2], expected[:2], terms[:2], strict=True):
        for rank, rows in enumerate(true):
            part = np.asarray(mine[rank], np.float64)
            if exact:
                np.testing.assert_array_equal(part[: len(rows)], rows.astype(dtype).astype(np.float64))
            else:  # one rounding, plus those of a sum in fp32: at most as many as it has terms
                bound = OUT_OF[str(jnp.dtype(dtype))] * np.abs(rows) + 2.0**-24 * 300 * size[rank] + 2.0**-25
                assert np.all(np.abs(part[: len(rows)] - rows) <= bound)
            assert not np.any(part[len(rows) :])
    if op == IN:
        assert found[2].dtype == given["gmm_x"].dtype
        for rank, rows in enumerate(expected[2]):
            mine = np.asarray(found[2])[rank]  # in this order: an eager slice of a sharded array may lose a -0
            np.testing.assert_array_equal(mine.view(np.uint8)[: len(rows)], rows.view(np.uint8))
            assert not np.any(mine.view(np.uint8)[len(rows) :])


def magnitudes(given, transpose):
    """The absolute values of the operands, which bound the rounding of any order of summation."""
    result = {}
    for part in ("gmm", "mm"):
        for side in ("x", "weight"):
            data, scale = given[f"{part}_{side}"], given[f"{part}_{side}_scale"]
            axis = data.ndim - 2 if side == "x" or transpose else data.ndim - 3
            result[f"{part}_{side}"] = [
                np.abs(reference.fused.dequantize(a, s, axis)) for a, s in zip(data, scale, strict=True)
            ]
    return result


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick("4-2-x-5-True-2-all_to_allv_grouped_matmul")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("num_ranks", "num_local", "axes", "hidden", "transpose", "chunks"),
    [
        pytest.param(1, 2, "x", 7, False, 1, marks=pytest.mark.slow),
        (4, 2, "x", 5, True, 2),
        pytest.param(8, 1, ("ep", "tp"), 9, False, 8, marks=pytest.mark.slow),
    ],
)
def test_int8_is_exact(op, num_ranks, num_local, axes, hidden, transpose, chunks):
    """Every rank has scales of its own, powers of two; those of rows go along."""
    rng = np.random.default_rng(0)
    sizes = table("uneven", num_ranks, num_local, rng)
    counts = lists(sizes)
    given = operands(rng, sizes, (INT8, INT8), hidden, microscaled=False, transpose=transpose)
    options = {"transpose_gmm_weight": transpose, "transpose_mm_weight": transpose, "chunks": chunks}
    found = run(op, given, counts, axes=axes, out_dtype="float32", recv_capacity=CAPACITY, **options)
    check(op, found, given, counts, jnp.float32, exact=True, transpose=transpose)


@pytest.mark.quick("False-grouped_matmul_all_to_allv")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("transpose", [False, True])
def test_int8_sums_past_the_whole_numbers_of_float32(op, transpose):
    """3000 columns in three pieces; the partial sums are larger than 2^24, and cancel up to 1."""
    hidden = 3000
    x = np.full((2, 2, hidden), 127, np.int8)
    weight = np.full((2, 1, hidden, N), 127, np.int8)
    weight[:, :, 1400:2800], weight[:, :, 2800:] = -127, 0
    x[:, :, -1], weight[:, :, -1] = 1, 1  # in all 1
    weight = weight.swapaxes(2, 3) if transpose else weight
    one = np.ones((2, 1), np.float32)
    given = {"gmm_x": x, "gmm_weight": weight, "gmm_x_scale": one, "gmm_weight_scale": one}
    given |= {"mm_x": x, "mm_weight": weight[:, 0], "mm_x_scale": one, "mm_weight_scale": one}
    flags = {"transpose_gmm_weight": transpose, "transpose_mm_weight": transpose}
    found = run(op, given, [np.ones((2, 2), np.int32)] * 2, static=True, out_dtype=jnp.bfloat16, **flags)
    np.testing.assert_array_equal(found[0], 1.0)
    np.testing.assert_array_equal(found[1], 1.0)


def test_int8_sums_are_exact_in_whatever_order_a_device_adds():
    """One term after the other in fp32: exact by pieces, and not at once."""
    rng = np.random.default_rng(0)
    lhs = rng.integers(100, 128, (2, 4000)).astype(np.float32)
    rhs = rng.integers(100, 128, (1, 4000, 3)).astype(np.float32)
    exact = (lhs.astype(np.int64) @ rhs[0].astype(np.int64)).astype(np.float32)

    def dot(lhs, rhs):
        total = np.zeros((lhs.shape[0], rhs.shape[2]), np.float32)
        for column in range(lhs.shape[1]):
            total += np.asarray(lhs)[:, column, None] * np.asarray(rhs)[0, column]
        return jnp.asarray(total)

    assert np.any(dot(lhs, rhs) != exact)
    np.testing.assert_array_equal(scaled._whole_numbers(lhs, rhs, dot, 1), exact)


FLOATS = [
    # formats, hidden, microscaled, transposed, result, dtype of microscales
    ((E4M3, E5M2), 33, False, True, "float16", None),
    ((E4M3, E4M3), 70, True, False, "float32", np.uint8),
    ((E5M2, E4M3), 128, True, True, "bfloat16", E8M0),
    ((PACKED, PACKED), 98, True, False, "bfloat16", np.uint8),
    ((E2M1, PACKED), 66, True, True, "float32", np.uint8),
]
SLOW_FLOATS = [
    ((E5M2, E5M2), 12, False, False, "bfloat16", None),
    ((E4M3, E5M2), 31, True, True, "float16", np.uint8),
    ((PACKED, PACKED), 34, True, True, "float32", np.uint8),
    ((E2M1, E2M1), 66, True, False, "float16", E8M0),
]
FLOATS += [pytest.param(*scheme, marks=pytest.mark.slow) for scheme in SLOW_FLOATS]


@pytest.mark.quick(
    "kinds0-33-False-True-float16-None-all_to_allv_grouped_matmul",
    "kinds2-128-True-True-bfloat16-float8_e8m0fnu-all_to_allv_grouped_matmul",
    "kinds4-66-True-True-float32-uint8-grouped_matmul_all_to_allv",
)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("kinds", "hidden", "microscaled", "transpose", "dtype", "scale_dtype"), FLOATS)
def test_schemes(op, kinds, hidden, microscaled, transpose, dtype, scale_dtype):
    rng = np.random.default_rng(1)
    sizes = table("uneven", 4, 2, rng)
    counts = lists(sizes)
    given = operands(rng, sizes, kinds, hidden, microscaled=microscaled, transpose=transpose, scale_dtype=scale_dtype)
    options = {"transpose_gmm_weight": transpose, "transpose_mm_weight": transpose, "recv_capacity": CAPACITY}
    found = run(op, given, counts, out_dtype=dtype, **options)
    check(op, found, given, counts, dtype, transpose=transpose)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_chunks_static_counts_and_overflow(op):
    """The same bits for every number of chunks; more rows than the result holds stay at home, as without scales."""
    rng = np.random.default_rng(2)
    sizes = table("uneven", 4, 2, rng)
    counts = lists(sizes)
    given = operands(rng, sizes, (E4M3, E4M3), 70, microscaled=True, transpose=False)
    limited = {"out_dtype": "float32", "recv_capacity": 12}
    whole, cut = run(op, given, counts, **limited), run(op, given, counts, chunks=4, **limited)
    check(op, whole, given, counts, "float32", recv_capacity=12)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), whole, cut)
    most = counts[1].sum(axis=1).max()
    fixed = run(op, given, counts, static=True, chunks=2, out_dtype="float32")
    assert fixed[0].shape[1] == most > 12
    check(op, fixed, given, counts, "float32")


def bits(array):
    return np.asarray(array).view(np.uint8)


@pytest.mark.quick("grouped_matmul_all_to_allv")
@pytest.mark.parametrize("op", OPS)
def test_numbers_and_scales_of_a_recipe(op):
    """What ``moe_jax.quant`` makes of rows and of transposed weights multiplies as the rows that it gives back."""
    rng = np.random.default_rng(3)
    recipe, hidden = quant.recipe("mx_e2m1", "float32"), 70
    x = rng.standard_normal((2, 4, hidden), np.float32)
    weight = rng.standard_normal((2, 2, N, hidden), np.float32)

    def shard(x, weight):
        q, w = recipe.quantize(x), recipe.quantize(weight.reshape(-1, hidden))
        floats = getattr(moe, op)(
            recipe.dequantize(q), recipe.dequantize(w).reshape(weight.shape), [1] * 4, [1] * 4, "x",
            transpose_gmm_weight=True,
        )  # fmt: skip
        codes = getattr(moe, op)(
            q.values, w.values.reshape(2, N, -1), [1] * 4, [1] * 4, "x", transpose_gmm_weight=True,
            gmm_x_scale=q.scale.reshape(len(x), -1, 2), gmm_weight_scale=w.scale.reshape(2, N, -1, 2),
            out_dtype=jnp.float32,
        )  # fmt: skip
        return floats[0], codes[0]

    floats, of_codes = jax.jit(per_rank(2, shard))(x, weight)
    assert np.any(floats)
    np.testing.assert_array_equal(of_codes, floats)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_64_bit_mode(op):
    """Counts stay i32 and results what they are, with scales and without, where rows overflow."""
    rng = np.random.default_rng(4)
    sizes = table("uneven", 4, 2, rng)
    counts = lists(sizes)
    given = operands(rng, sizes, (INT8, INT8), 5, microscaled=False, transpose=False)
    floats = {name: (given[name] % 8).astype(np.float32) for name in ("gmm_x", "gmm_weight", "mm_x", "mm_weight")}
    with jax.enable_x64(True):
        found = run(op, given, counts, out_dtype="float32", recv_capacity=12)
        plain = run(op, floats, counts, recv_capacity=12)
    check(op, found, given, counts, jnp.float32, exact=True, recv_capacity=12)
    expected = getattr(reference, op)(**floats, send_counts=counts[0], recv_counts=counts[1], recv_capacity=12)
    assert plain[0].dtype == jnp.float32
    for mine, rows in zip(np.asarray(plain[0]), expected[0], strict=True):
        np.testing.assert_array_equal(mine[: len(rows)], rows)


def test_nan_scale_spoils_what_it_scales_and_nothing_else():
    x, weight = np.ones((1, 2, 32)).astype(E4M3), np.ones((1, 2, 32, N)).astype(E4M3)
    given = {"gmm_x": x, "gmm_weight": weight}
    given["gmm_x_scale"] = np.array([[[[255, 0]], [[126, 0]]]], np.uint8)
    given["gmm_weight_scale"] = np.full((1, 2, 1, N, 2), 127, np.uint8)
    y = run(OUT, given, [np.ones((1, 2), np.int32)] * 2, static=True, out_dtype="float32")[0]
    assert np.all(np.isnan(y[0, 0]))
    np.testing.assert_array_equal(y[0, 1], 16.0)


# --- one message -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2])
def test_scales_travel_in_the_message_of_their_rows(chunks):
    rng = np.random.default_rng(0)
    sizes = table("even", 4, 2, rng)
    given = operands(rng, sizes, (E4M3, E4M3), 70, microscaled=True, transpose=False)

    def body(given):
        return moe.all_to_allv_grouped_matmul(
            send_counts=[2] * 8, recv_counts=[2] * 8, axis_name="x", chunks=chunks, out_dtype="bfloat16", **given
        )

    (mapped,) = jax.make_jaxpr(per_rank(4, body))(given).eqns
    sent = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "ragged_all_to_all":
                sent.append(eqn.invars[0].aval)
            for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: inner(v) is not None):
                if inner(value) is not None:
                    visit(inner(value))

    visit(inner(mapped.params["jaxpr"]))
    assert {(a.shape, str(a.dtype)) for a in sent} == {((ROWS, 70 + 4), "uint8")}
    text = jax.jit(per_rank(4, body)).trace(given).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("custom_call @ragged_all_to_all") in (1, chunks)  # identical exchanges may share one function


# --- derivatives are refused -----------------------------------------------------------------------------------------

LEAVES = ["gmm_x", "gmm_weight_scale", "mm_x_scale", "mm_weight"]


def scaled_call(op):
    """A legal call per shard on floats that may be differentiated: (operands, function of them)."""
    one = jnp.ones(1, jnp.float32)
    given = {"gmm_x": jnp.ones((2, 4), E4M3), "gmm_weight": jnp.ones((1, 4, 3), E4M3)}
    given |= {"gmm_x_scale": one, "gmm_weight_scale": one, "mm_x": jnp.ones((2, 4), E4M3)}
    given |= {"mm_weight": jnp.ones((4, 3), E4M3), "mm_x_scale": one, "mm_weight_scale": one}
    options = {"send_counts": [1, 1], "recv_counts": [1, 1], "axis_name": "x", "out_dtype": jnp.float32}

    def call(given):
        return getattr(moe, op)(**given, **options)

    return given, call


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivatives_are_refused(op, leaf, mode):
    given, call = scaled_call(op)

    def total(value):
        y, mm_y, *_ = call(given | {leaf: value})
        return lax.psum(jnp.sum(y) + jnp.sum(mm_y), "x")

    mapped = _compat.shard_map(total, mesh=mesh_for(2), in_specs=P(), out_specs=P())
    with pytest.raises(errors.UnsupportedError, match="stop_gradient"):
        if mode == "reverse":
            jax.eval_shape(jax.grad(mapped), given[leaf])
        else:
            jax.eval_shape(lambda v: jax.jvp(mapped, (v,), (v,)), given[leaf])


@pytest.mark.quick("grouped_matmul_all_to_allv")
@pytest.mark.parametrize("op", OPS)
def test_stop_gradient_makes_it_a_constant(op):
    given, call = scaled_call(op)

    def total(scale):
        y = call(given | {"gmm_x_scale": lax.stop_gradient(scale)})[0]
        return lax.psum(jnp.sum(y) * scale[0], "x")

    mapped = _compat.shard_map(total, mesh=mesh_for(2), in_specs=P(), out_specs=P())
    np.testing.assert_array_equal(jax.jit(jax.grad(mapped))(jnp.full(1, 2.0)), 2 * 2 * 3 * 4 * 2.0)


# --- what is refused -------------------------------------------------------------------------------------------------

F32, U8 = np.ones(1, np.float32), np.full((4, 1, 2), 127, np.uint8)
MICRO = {
    "gmm_x": np.ones((4, 4)).astype(E4M3), "gmm_weight": np.ones((2, 4, 3)).astype(E4M3),
    "gmm_x_scale": U8, "gmm_weight_scale": np.full((2, 1, 3, 2), 127, np.uint8),
}  # fmt: skip
DENSE = {"mm_x": np.ones((4, 4)).astype(E4M3), "mm_weight": np.ones((4, 3)).astype(E4M3)}
WRONG = [
    ({"gmm_x_scale": None}, errors.MissingArgumentError, "gmm_x_scale is None"),
    ({"gmm_weight_scale": None}, errors.MissingArgumentError, "gmm_weight_scale is None"),
    ({"gmm_x_scale": 1.0}, errors.DtypeError, "gmm_x_scale"),
    ({"gmm_x_scale": F32.astype(np.float16)}, errors.DtypeError, "gmm_x_scale has dtype float16"),
    ({"gmm_x_scale": np.ones(4, np.float32)}, errors.ShapeError, r"gmm_x_scale.*\[1\]"),
    ({"gmm_weight_scale": np.ones((), np.float32)}, errors.ShapeError, "gmm_weight_scale"),
    ({"gmm_weight_scale": U8}, errors.DtypeError, "both must be float32, or both E8M0"),
    ({"out_dtype": None}, errors.MissingArgumentError, "out_dtype is None"),
    ({"out_dtype": "int8"}, errors.InvalidArgumentError, "out_dtype='int8'"),
    ({"out_dtype": "bf17"}, errors.InvalidArgumentError, "out_dtype='bf17'"),
    ({"gmm_x": np.ones((4, 4), np.float32)}, errors.DtypeError, "gmm_x is float32.*no scheme"),
    ({"gmm_x": np.ones((4, 4)).astype(E4M3)}, errors.DtypeError, "gmm_weight int8.*no scheme"),
    ({"gmm_x": np.ones((4, 2), np.uint8)}, errors.DtypeError, "gmm_x is uint8"),
    ({"gmm_x": np.ones((4, 3), np.int8)}, errors.ShapeError, "rows of 3 numbers.*transpose_gmm_weight"),
    ({"gmm_x": np.ones((4, 2**17), np.int8), "gmm_weight": np.ones((2, 2**17, 3), np.int8)},
     errors.ShapeError, "may overflow int32"),
    ({"gmm_x_scale": None, "gmm_weight_scale": None, "out_dtype": None}, errors.DtypeError, "gmm_x.*gmm_x_scale"),
    ({"gmm_x": np.ones((4, 4), np.float32), "gmm_weight": np.ones((2, 4, 3), np.float32), "gmm_x_scale": None,
      "gmm_weight_scale": None}, errors.InvalidArgumentError, "out_dtype='float32' needs scales"),
    (DENSE, errors.MissingArgumentError, "mm_x comes without scales"),
    ({"mm_x_scale": F32}, errors.InvalidArgumentError, "mm_x_scale was given without mm_x"),
    (DENSE | {"mm_x_scale": F32}, errors.MissingArgumentError, "mm_weight_scale is None"),
    (DENSE | {"mm_x_scale": U8, "mm_weight_scale": np.full((1, 3, 2), 127, np.uint8)},
     errors.InvalidArgumentError, "mm_x comes with E8M0 scales and gmm_x with float32 scales"),
    (MICRO | {"gmm_x": np.ones((4, 4), np.int8), "gmm_weight": np.ones((2, 4, 3), np.int8)},
     errors.DtypeError, "gmm_x is int8.*no scheme"),
    (MICRO | {"gmm_x": np.ones((4, 2), np.uint8)}, errors.DtypeError, "no scheme"),
    (MICRO | {"gmm_x_scale": np.ones((4, 1), np.uint8)}, errors.ShapeError, "gmm_x_scale.*ceil"),
    (MICRO | {"gmm_weight_scale": np.ones((2, 3, 1, 2), np.uint8)}, errors.ShapeError, "gmm_weight_scale.*N, 2"),
    (MICRO | {"gmm_weight": np.ones((2, 3, 4)).astype(E4M3), "transpose_gmm_weight": True},
     errors.ShapeError, r"gmm_weight_scale.*\[e, N, ceil"),
    (MICRO | {"gmm_x": np.ones((4, 3)).astype(E2M1), "gmm_weight": np.ones((2, 3, 3)).astype(E2M1)},
     errors.ShapeError, "gmm_x has 3 columns.*even"),
]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("changes", "error", "text"), WRONG)
def test_wrong_scales_are_named(op, changes, error, text):
    legal = {"gmm_x": np.ones((4, 4), np.int8), "gmm_weight": np.ones((2, 4, 3), np.int8)}
    legal |= {"gmm_x_scale": F32, "gmm_weight_scale": F32, "out_dtype": "float32"}
    given = legal | changes | {"send_counts": [1] * 4, "recv_counts": [1] * 4, "axis_name": "x"}
    mapped = _compat.shard_map(lambda: getattr(moe, op)(**given)[0], mesh=mesh_for(2), in_specs=(), out_specs=P("x"))
    with pytest.raises(error, match=text) as caught:
        jax.eval_shape(mapped)
    assert isinstance(caught.value, moe.MoEError)
