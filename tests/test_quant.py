"""Quantisation recipes against the oracle, bit by bit, eagerly and compiled; against their bounds; and by hand."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_jax
from moe_jax import _compat, errors, quant, reference

NAMES = quant.NAMES[1:]
DTYPES = ("float32", "bfloat16", "float16")
WIDTHS = (40, 140)  # short last blocks of 128, 32 and 8; an odd number of blocks of 32
LARGEST = {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0, "e2m1": 6.0}


def target(name):
    return next(t for t in ("e4m3", "e5m2", "e2m1", "int8") if t in name)


def smooth_for(name, rows, hidden):
    """A scale where one is needed or taken; exact powers of two beside others."""
    if name.startswith("mx") or name == "int8_group8":
        return None
    rng = np.random.default_rng(1)
    return (2.0 ** rng.integers(-2, 3, (rows, hidden)) * rng.choice([1.0, 1.1, -0.7], (rows, hidden))).astype(
        np.float32
    )


def ties(name, hidden):
    """Every point halfway between two codes, with the largest number in each block of 8: scales are powers of two."""
    codes = np.arange(128) if target(name) == "int8" else None
    if codes is None:
        width = {"e4m3": 0x7F, "e5m2": 0x7C, "e2m1": 8}[target(name)]
        codes = np.array([reference.quant.number(target(name), c) for c in range(width)])
    middles = (codes[1:] + codes[:-1]) / 2
    picked = np.resize(middles[-np.arange(hidden) * 3 % len(middles)], hidden) * (-1.0) ** np.arange(hidden)
    picked[::8] = LARGEST[target(name)]
    return picked


def rows_of(name, dtype, hidden):
    """Rows that cover what can happen; those named in the comments are one kind each."""
    rng = np.random.default_rng(0)
    info = jnp.finfo(dtype)
    small, large = float(info.tiny), float(info.max)
    normal = rng.normal(size=(4, hidden)) * [[1.0], [1e-3], [30.0], [1.0]]
    sparse = np.where(rng.random(hidden) < 0.9, 0.0, normal[0])  # whole blocks of zeros
    rows = [
        *normal,
        np.exp(rng.uniform(np.log(small), np.log(large) - 1, hidden)) * rng.choice([-1, 1], hidden),  # all magnitudes
        ties(name, hidden),
        rng.integers(-3, 4, hidden),  # equal numbers
        sparse,
        np.zeros(hidden),
        -np.zeros(hidden),
        rng.uniform(-1, 1, hidden) * small,  # subnormals of the dtype
        rng.uniform(-1, 1, hidden) * small * 300,  # scales at the edge of the subnormals
        rng.uniform(-1, 1, hidden) * large,
        np.full(hidden, large),
    ]
    broken = np.tile(normal[0], (3, 1))
    broken[:, hidden // 2] = [np.nan, np.inf, -np.inf]
    with np.errstate(over="ignore"):
        return np.concatenate([np.array(rows), broken]).astype(jnp.dtype(dtype))


def everything(recipe, x, smooth):
    q = recipe.quantize(x, smooth=smooth)
    message = recipe.pack(q)
    return q, recipe.dequantize(q), recipe.error_bound(q), message, recipe.unpack(message, x.shape[1])


compiled = jax.jit(everything, static_argnums=0)


def bits(array):
    """The bytes of an array, all NaNs alike."""
    array = np.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    return np.where(np.isnan(array.astype(np.float32)), width(2 ** (8 * array.dtype.itemsize) - 1), array.view(width))


def same(a, b):
    """Equal to the bit, NaN being NaN."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for got, expected in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        np.testing.assert_array_equal(bits(got), bits(expected))


# --- against the oracle ----------------------------------------------------------------------------------------------


# In float32 every recipe; in bfloat16 one with a scale per row, one per group and one of codes of four bits.
@pytest.mark.quick(
    *(f"{name}-float32" for name in NAMES), "int8-bfloat16", "fp8_e4m3_group128-bfloat16", "mx_e2m1-bfloat16"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_codes_scales_and_bound(name, dtype):
    recipe = quant.recipe(name, dtype)
    for hidden in WIDTHS if dtype == "bfloat16" else WIDTHS[1:]:
        x = rows_of(name, dtype, hidden)
        smooth = smooth_for(name, *x.shape)
        q, back, bound, message, unpacked = compiled(recipe, x, smooth)
        values, scale = reference.quant.quantize(name, x, smooth=smooth)
        stored = np.asarray(q.values)
        stored = stored if target(name) == "int8" else stored.view(jnp.dtype(recipe.values_dtype))
        np.testing.assert_array_equal(bits(stored), bits(values.view(stored.dtype)))
        same(q.scale, scale)
        same(back, reference.quant.dequantize(name, values, scale))
        check_bound(name, x, smooth, back, bound)
        check_message(recipe, q, message, unpacked, hidden)


def check_bound(name, x, smooth, back, bound):
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(np.float64) * (1.0 if smooth is None else smooth)
        error = np.abs(y - np.asarray(back, np.float64))
    read = ~np.isnan(y) if name == "int8_static" else np.isfinite(bound)  # with a static scale NaN becomes 0
    read &= np.isfinite(bound)
    assert (error[read] <= np.asarray(bound, np.float64)[read]).all()
    finite = np.isfinite(y).all(axis=1) & (np.abs(y) < 1e30).all(axis=1)
    if name not in ("int8_static", "int8_group8"):
        assert np.isfinite(bound[finite]).all()


def check_message(recipe, q, message, unpacked, hidden):
    assert message.dtype == jnp.uint8 and message.shape[1] == recipe.row_bytes(hidden)
    assert q.values.dtype == recipe.values_dtype and q.values.shape[1:] == recipe.values_shape(hidden)
    assert q.scale.dtype == recipe.scale_dtype and q.scale.shape[1:] == recipe.scale_shape(hidden)
    size = q.values.nbytes // len(q.values)
    plain = np.concatenate([np.asarray(q.values).view(np.uint8), np.asarray(q.scale).view(np.uint8)], axis=1)
    np.testing.assert_array_equal(message, plain)
    assert size + q.scale.nbytes // len(q.values) == recipe.row_bytes(hidden)
    for got, sent in ((unpacked.values, q.values), (unpacked.scale, q.scale)):
        assert got.dtype == sent.dtype
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(sent).view(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_eager_and_compiled_agree(name):
    for dtype in DTYPES if name == "int8_group8" else ("bfloat16",):
        recipe, x = quant.recipe(name, dtype), rows_of(name, dtype, 40)
        smooth = smooth_for(name, *x.shape)
        q, back, _, *wire = everything(recipe, jnp.asarray(x), smooth)  # a bound may differ in its last bit
        q_compiled, back_compiled, _, *wire_compiled = compiled(recipe, x, smooth)
        same((q, back, wire), (q_compiled, back_compiled, wire_compiled))


@pytest.mark.quick("int8", "mx_e4m3", "fp8_e5m2_group128")
@pytest.mark.parametrize("name", NAMES)
def test_whatever_the_program_around(name):
    """Only the rows come out, so XLA may fuse all of it: the same bits as step by step."""
    recipe, x = quant.recipe(name, "float32"), rows_of(name, "float32", 40)
    smooth = smooth_for(name, *x.shape)
    fused = jax.jit(lambda x: recipe.dequantize(recipe.quantize(x, smooth=smooth)))(x)
    same(fused, compiled(recipe, x, smooth)[1])


@functools.cache
def bound_program(name, dtype):
    return jax.jit(functools.partial(everything, quant.recipe(name, dtype)))


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(-10, 10))
def check_any_bits(name, dtype, seed, log_smooth):
    rng = np.random.default_rng(seed)
    width = np.uint32 if dtype == "float32" else np.uint16
    x = rng.integers(0, np.iinfo(width).max, (3, 36), width, endpoint=True).view(jnp.dtype(dtype))
    x[0] = rng.normal(size=36)
    smooth = None if smooth_for(name, 1, 1) is None else (rng.normal(size=36) * 2.0**log_smooth).astype(np.float32)
    _, back, bound, *_ = bound_program(name, dtype)(x, smooth)
    check_bound(name, x, smooth, back, bound)


@pytest.mark.quick("int8-float32", "fp8_e4m3-bfloat16", "fp8_e5m2_group128-float16", "mx_e2m1-bfloat16")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_bound_holds_for_any_bits(name, dtype):
    check_any_bits(name, dtype)


# --- by hand ---------------------------------------------------------------------------------------------------------


def quantize(name, row, dtype="float32", smooth=None):
    q = jax.jit(quant.recipe(name, dtype).quantize)(jnp.array([row], dtype), smooth=smooth)
    return np.asarray(q.values)[0].astype(np.float32).tolist(), np.asarray(q.scale)[0].astype(np.float32).tolist()


def test_integers_tie_to_even():
    row = [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    assert quantize("int8", row) == ([127, 0, 2, 2, 0, -2, -2], [1.0])
    assert quantize("int8_static", row, smooth=jnp.float32(1.0)) == ([127, 0, 2, 2, 0, -2, -2], [])


def test_a_static_scale_saturates():
    row = [100.0, -100.0, 1.0, np.nan, np.inf, -np.inf]
    assert quantize("int8_static", row, smooth=jnp.float32(2.0)) == ([127, -128, 2, 0, 127, -128], [])
    recipe = quant.recipe("int8_static", "float32")
    q = recipe.quantize(jnp.array([[63.4, 63.6]]), smooth=jnp.float32(2.0))
    assert recipe.error_bound(q)[0].tolist() == [np.inf, np.inf]  # 127 may be anything above


def test_the_scale_is_the_reciprocal_of_the_multiplier():
    amax = np.random.default_rng(0).uniform(1, 2, (1000, 1)).astype(np.float32)
    scale = jax.jit(quant.recipe("int8", "float32").quantize)(amax).scale
    np.testing.assert_array_equal(scale, np.float32(1) / (np.float32(127) / amax))
    assert 50 < np.sum(np.asarray(scale) != amax / np.float32(127)) < 950
    group = jax.jit(quant.recipe("fp8_e4m3_group128", "float32").quantize)(amax).scale
    np.testing.assert_array_equal(group, amax * (np.float32(1) / np.float32(448)))  # and here it is not


def test_fp8_ties_to_even_with_scale_one():
    # Between 256 and 448 e4m3 counts in 32s, near 1 in eighths; its smallest number is 2^-9.
    row = [448.0, 272.0, 304.0, 1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, -272.0]
    expected = [448.0, 256.0, 320.0, 1.0, 1.25, 0.0, 2.0**-8, -256.0]
    for name in ("fp8_e4m3", "fp8_e4m3_group128"):
        values, (scale,) = quantize(name, row)
        assert values == expected and abs(scale - 1) <= 2.0**-23


def test_a_group_reads_no_other_group():
    row = np.ones(300, np.float32)
    row[128:256], row[256:] = 1e-6, 1e6
    values, scale = quantize("fp8_e4m3_group128", row)
    assert set(values) == {448.0} and len(scale) == 3
    np.testing.assert_allclose(scale, np.array([1.0, 1e-6, 1e6]) / 448, rtol=1e-6)


def test_the_floor_rule_saturates_and_the_clip_rule_does_not():
    row = [1.9375] + [1.0] * 31
    assert quantize("mx_e4m3", row) == ([448.0] + [256.0] * 31, [127 - 8, 0])  # 1.9375 * 256 = 496
    assert quantize("mx_clip_e4m3", row) == ([256.0] + [128.0] * 31, [127 - 7, 0])  # 248 is a tie: 240 is odd
    assert quantize("mx_e5m2", [1.0])[1] == [127 - 15, 0]
    assert quantize("mx_clip_e4m3", [448.0])[1][0] in (127, 128)  # v is 1, or next above it


def test_two_fp4_codes_per_byte_even_column_low():
    values, scale = quantize("mx_e2m1", [1.0, -6.0, 0.5, 4.0, 5.0, -0.25, 0.75, 2.5])
    assert [int(v) for v in values] == [0xF2, 0x61, 0x86, 0x42] and scale == [127, 0]


def test_e2m1_as_ml_dtypes_has_it():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    z = np.concatenate([np.linspace(-6, 6, 481), [6.0]]).astype(np.float32)  # 4 <= max < 8: the scale is 1
    recipe = quant.recipe("mx_e2m1", "float32")
    rows = np.stack([np.full_like(z, 6.0), z], axis=1).reshape(-1, 4)
    got = np.asarray(jax.jit(lambda rows: recipe.dequantize(recipe.quantize(rows)))(rows)).reshape(-1, 2)[:, 1]
    np.testing.assert_array_equal(got, z.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_microscaled_zeros_subnormals_and_broken_blocks():
    row = np.zeros(128, np.float32)
    row[32:64] = 1e-40  # subnormals alone
    row[64], row[96] = np.inf, np.nan
    values, scale = quantize("mx_e4m3", row)
    assert scale == [0, 0, 255, 255]
    assert values[:64] == [0.0] * 64 and np.isnan(values[64:]).all()
    clipped, scale = quantize("mx_clip_e5m2", row)
    assert scale[:2] == [127 - 29] * 2 and scale[2:] == [255, 255]  # 1e-4 / 57344 lies between 2^-30 and 2^-29
    assert clipped[:64] == [0.0] * 64 and np.isnan(clipped[64:]).all()


def test_subnormals_beside_normal_numbers_are_exact_in_a_block():
    """2^-126 sets s = 0, so the multiplier is 2^127 and 2^-128 becomes 0.5."""
    for dtype in ("float32", "bfloat16"):
        row = np.array([2.0**-126, 2.0**-128, -(2.0**-130), 0.0]).astype(jnp.dtype(dtype))
        assert quantize("mx_e4m3", row, dtype) == ([2.0, 0.5, -0.125, 0.0], [0, 0])


def test_groups_of_eight_round_to_fp16_before_the_integer():
    row = [127.0, 100.51, 3.5, 2.5, -127.0, 0.0, 0.0, 0.0] + [0.0] * 8 + [1.0, -1.0]
    values, scale = quantize("int8_group8", row)
    assert scale[0] == 1.0 and scale[1] == 0.0
    assert values == [127, 100, 4, 2, -127, 0, 0, 0] + [0] * 8 + [127, -127]  # 100.51 -> 100.5 -> 100


def test_groups_of_eight_travel_and_arrive_in_the_dtype_of_the_rows():
    recipe, x = quant.recipe("int8_group8", "bfloat16"), jnp.array([[300.0, 7.0]], jnp.bfloat16)
    q = recipe.quantize(x)
    assert q.scale.dtype == jnp.bfloat16 and q.scale[0, 0] == jnp.bfloat16(300 / 127)
    back = recipe.dequantize(q)
    assert back.dtype == jnp.float32 and back[0, 0] == jnp.bfloat16(127 * float(q.scale[0, 0]))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "int8_static"])
def test_broken_rows_are_never_silent(name):
    recipe = quant.recipe(name, "float32")
    seen = jax.jit(lambda x: recipe.dequantize(recipe.quantize(x)))
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((2, 8), np.float32)
        x[0, 3] = bad
        back = np.asarray(seen(x))
        assert not np.isfinite(back[0]).any() and np.isfinite(back[1]).all()


# --- bytes on the wire -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("int8_static", "bfloat16", 7168),
        ("int8", "bfloat16", 7168 + 4),
        ("fp8_e5m2", "bfloat16", 7168 + 4),
        ("fp8_e4m3_group128", "bfloat16", 7168 + 56 * 4),
        ("mx_e4m3", "bfloat16", 7168 + 224),
        ("mx_e2m1", "bfloat16", 3584 + 224),
        ("int8_group8", "bfloat16", 7168 + 896 * 2),
        ("int8_group8", "float32", 7168 + 896 * 4),
    ],
)
def test_row_bytes(name, dtype, size):
    assert quant.recipe(name, dtype).row_bytes(7168) == size


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_survive_unpack_and_pack(name):
    recipe = quant.recipe(name, "float16")
    rows = np.random.default_rng(0).integers(0, 256, (3, recipe.row_bytes(70)), np.uint8)
    np.testing.assert_array_equal(jax.jit(lambda r: recipe.pack(recipe.unpack(r, 70)))(rows), rows)


@pytest.mark.quick("mx_e4m3", "int8_group8")
@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name):
    recipe, x = quant.recipe(name, "bfloat16"), jnp.zeros((0, 40), jnp.bfloat16)
    q, back, _, message, _ = compiled(recipe, x, np.float32(1.0) if recipe.needs_smooth else None)
    assert back.shape == (0, 40) and message.shape == (0, recipe.row_bytes(40)) and q.scale.shape[0] == 0


def test_recipes_are_static_and_compare_by_value():
    recipes = {quant.recipe(name, dtype) for name in NAMES for dtype in DTYPES for _ in range(2)}
    assert len(recipes) == len(NAMES) * len(DTYPES)
    assert all(jax.tree.leaves(recipe) == [] for recipe in recipes)
    assert quant.recipe("none", "float32") is None


# --- the derivative --------------------------------------------------------------------------------------------------


@pytest.mark.quick("int8-float32", "fp8_e4m3_group128-float32")
@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("bfloat16", "float16"))]
)
@pytest.mark.parametrize("name", NAMES)
def test_straight_through(name, dtype):
    recipe, rng = quant.recipe(name, dtype), np.random.default_rng(0)
    x = rng.normal(size=(4, 40)).astype(jnp.dtype(dtype))
    ct = rng.normal(size=(4, 40)).astype(jnp.dtype(dtype))
    smooth = None if not recipe.takes_smooth else jnp.asarray(rng.uniform(10, 20, 40), jnp.float32)
    seen, pullback = jax.vjp(functools.partial(quant.straight_through, recipe), x, smooth)
    ct_x, ct_smooth = pullback(ct)
    same(ct_x, ct)
    assert ct_smooth is None or not ct_smooth.any()
    assert seen.dtype == x.dtype and not np.array_equal(seen, x)
    same(seen, jax.jit(functools.partial(quant.straight_through, recipe))(x, smooth))
    bound = np.asarray(compiled(recipe, x, smooth)[2], np.float64) / (1.0 if smooth is None else smooth)
    error = np.abs(np.float64(seen) - np.float64(x))
    rounding = 2 * float(jnp.finfo(dtype).eps) * np.abs(np.float64(x))  # to the dtype of x, after the division
    assert (error <= bound + rounding).all()


def test_straight_through_where_smooth_is_zero():
    recipe, smooth = quant.recipe("int8", "float32"), jnp.array([1.0, 0.0])
    seen, pullback = jax.vjp(lambda x: quant.straight_through(recipe, x, smooth), jnp.array([[127.0, 5.0]]))
    assert seen.tolist() == [[127.0, 0.0]] and pullback(jnp.ones((1, 2)))[0].tolist() == [[1.0, 1.0]]


def test_over_a_mesh():
    """Rows split over devices, smooth held by all: the same bits, and gradients with check_vma on."""
    mesh, recipe = moe_jax.make_mesh(ep=8), quant.recipe("int8", "float32")
    x = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    smooth = np.linspace(1, 2, 8, dtype=np.float32)

    def shard(x, smooth):
        q = recipe.unpack(recipe.pack(recipe.quantize(x, smooth=smooth)), 8)
        return quant.straight_through(recipe, x, smooth), recipe.dequantize(q)

    run = _compat.shard_map(shard, mesh=mesh, in_specs=(P("ep"), P()), out_specs=P("ep"))
    seen, back = jax.jit(run)(x, smooth)
    same(back, compiled(recipe, x, smooth)[1])
    same(seen, jax.jit(functools.partial(quant.straight_through, recipe))(x, smooth))
    gradients = jax.jit(jax.grad(lambda x, smooth: 3.0 * run(x, smooth)[0].sum(), argnums=(0, 1)))(x, smooth)
    assert (np.asarray(gradients[0]) == 3.0).all() and not np.asarray(gradients[1]).any()


# --- what is refused -------------------------------------------------------------------------------------------------

X = np.ones((2, 8), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "names"),
    [
        (lambda: quant.recipe("int9", "float32"), errors.InvalidArgumentError, "name='int9'.*did you mean 'int8'"),
        (lambda: quant.recipe(None, "float32"), errors.InvalidArgumentError, "name=None"),
        (lambda: quant.recipe("int8", "float64"), errors.InvalidArgumentError, "dtype='float64'"),
        (lambda: quant.recipe("int8", "bfloat16").quantize(X), errors.DtypeError, "x has dtype float32.*bfloat16"),
        (lambda: quant.recipe("int8", "float32").quantize(X[0]), errors.ShapeError, "x has shape"),
        (lambda: quant.recipe("int8", "float32").quantize(X[:, :0]), errors.InvalidArgumentError, "hidden=0"),
        (lambda: quant.recipe("int8_static", "float32").quantize(X), errors.MissingArgumentError, "smooth is missing"),
        (lambda: quant.recipe("mx_e4m3", "float32").quantize(X, smooth=X), errors.InvalidArgumentError, "smooth"),
        (lambda: quant.recipe("int8_group8", "float32").quantize(X, smooth=X), errors.InvalidArgumentError, "smooth"),
        (lambda: quant.recipe("int8", "float32").quantize(X, smooth=X[:, :3]), errors.ShapeError, "smooth has shape"),
        (lambda: quant.recipe("int8", "float32").quantize(X, smooth=2.0), errors.DtypeError, "smooth"),
        (lambda: quant.recipe("int8", "float32").quantize(X, smooth=X > 0), errors.DtypeError, "smooth has dtype bool"),
        (lambda: quant.recipe("mx_e2m1", "float32").quantize(X[:, :7]), errors.ShapeError, "hidden=7 is odd"),
        (lambda: quant.recipe("int8", "float32").unpack(jnp.zeros((2, 8), jnp.uint8), 8), errors.ShapeError, "rows"),
        (lambda: quant.recipe("int8", "float32").unpack(jnp.zeros((2, 12)), 8), errors.DtypeError, "rows"),
        (lambda: quant.recipe("int8", "float32").row_bytes(0), errors.InvalidArgumentError, "hidden=0"),
        (lambda: quant.straight_through("int8", X), errors.InvalidArgumentError, "recipe is a str"),
    ],
)
def test_wrong_arguments_are_named(call, error, names):
    with pytest.raises(error, match=names):
        call()
