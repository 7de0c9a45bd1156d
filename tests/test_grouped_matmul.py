"""Every back end through one contract, against the oracle: values, both gradients, and what NaN must not reach.

Data are integers so small that fp32 sums are exact; the oracle's float64 result, rounded once to the dtype of the
operands, is then the only right answer, so every comparison is for equality. The accelerators' kernels are interpreted
here, and their lowered programs are read for the native instruction.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivative_laws import holds
from grouped_matmul_contract import GROUPINGS, G, H, M, N, check, lowered_text, operands
from hypothesis import given
from hypothesis import strategies as st

import moe_jax
from moe_jax import errors, reference
from moe_jax.kernels import FLOAT_DTYPES, gated_matmul, grouped_matmuls, table, xla
from moe_jax.verify.backend import LAWS, dtypes_of, hold
from moe_jax.verify.kernels import fused_deviations

BACKENDS = ("cpu", "xla", "gpu", "tpu", "auto")


# These laws are about the values of one program, which the second list makes once more with transposed matrices. Other
# laws have programs of their own, and one dtype of each back end is enough; those of rows in slots stand below.
OF_ONE_PROGRAM = (
    "values",
    "gradients",
    "empty_groups",
    "one_group_has_all",
    "rows_past_the_groups",
    "weights_of_others",
)
OTHERS = sorted(set(LAWS) - {*OF_ONE_PROGRAM, "transposed", "rows_in_slots", "activation", "transports"})
CASES = [
    *(
        (backend, law, dtype)
        for backend in BACKENDS
        for dtype in FLOAT_DTYPES
        for law in (*OF_ONE_PROGRAM, "transposed")
    ),
    *((backend, law, dtypes_of(law, FLOAT_DTYPES[1:])[0]) for backend in BACKENDS[:-1] for law in OTHERS),
]


@pytest.mark.quick(
    "cpu-transposed-float16",
    *(f"xla-{law}-float32" for law in OF_ONE_PROGRAM),
    "gpu-transposed-float32",
    *(f"tpu-{law}-float16" for law in OF_ONE_PROGRAM),
    "auto-transposed-bfloat16",
    "cpu-sums_in_fp32-bfloat16",
    "cpu-shard_map-bfloat16",
    "xla-shard_map-bfloat16",
)
@pytest.mark.parametrize(("backend", "law", "dtype"), CASES, ids=["-".join(case) for case in CASES])
def test_every_law(backend, law, dtype):
    """What ``moe_jax.testing`` holds other people's back ends to."""
    cases = hold(law, backend, dtype)
    assert cases or law in ("weights_of_others", "lowering", "added_to"), "only these do not apply to all of them"


@pytest.mark.parametrize("backend", ["cpu", "xla"])
@given(cuts=st.lists(st.integers(0, M), min_size=G, max_size=G), seed=st.integers(0, 2**20))
def test_any_group_sizes(backend, cuts, seed):
    group_sizes = np.diff([0, *sorted(cuts)])
    check(backend, *operands(seed, group_sizes, jnp.float32, False), False)


@pytest.mark.quick(*(f"shape{i}-group_sizes{i}-cpu" for i in (0, 1, 2, 4, 6, 7, 12, 13)))
@pytest.mark.parametrize("backend", ["cpu", "xla"])
@pytest.mark.parametrize(
    ("shape", "group_sizes"),
    [
        ((0, H, N), [0, 0]),  # no rows
        ((1, H, N), [0, 1]),
        ((5, H, N), [2, 2]),  # fewer rows than a tile
        ((300, 3, 2), [131, 150]),  # tiles of 128 and 16: a large one and a row; two large ones, one partly filled
        (
            (300, 3, 2),
            [60, 240],
        ),  # no large one is half full; the last one has no room, and small ones are shifted back
        ((300, 3, 2), [0, 300]),
        ((1100, 2, 2), [1090]),  # two large tiles of 448; small ones behind them, the last one shifted back
        ((1100, 3, 2), [224, 876]),  # a large tile over rows of the next group, which has large ones alone
        ((1100, 3, 2), [223, 257]),
        ((1100, 3, 2), [33, 1067]),  # large tiles that start anywhere
        ((1100, 3, 2), [1099, 1]),
        ((M, 1, 1), [30, 7]),
        ((M, H, 0), [30, 7]),  # nothing to compute
        ((M, 0, N), [30, 7]),  # an empty sum
    ],
)
def test_other_shapes(backend, shape, group_sizes):
    for transpose_rhs in (False, True):
        check(backend, *operands(0, group_sizes, jnp.float32, transpose_rhs, shape), transpose_rhs)


# --- rows in slots, and the activation -------------------------------------------------------------------------------


@pytest.fixture
def by_xla(monkeypatch):
    """A back end of the functions that say what such kernels compute; AMD's GPUs get them."""
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))
    kernels = {word: getattr(xla, word) for word in (*table.KERNELS, *table.FUSED)}
    moe_jax.register_backend(moe_jax.Backend(name="by_xla", kernels=kernels))


@pytest.mark.quick("by_xla-float32-extents0")
@pytest.mark.parametrize("extents", [(20, 8, 6), (150, 70, 40), (37, 6, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backend", ["by_xla", "gpu"])
def test_rows_in_slots_and_the_activation(by_xla, backend, dtype, extents):
    assert fused_deviations(backend, dtype, extents) == [0.0] * 4


def test_only_back_ends_that_bring_such_kernels_are_asked():
    assert fused_deviations("cpu") is None


def test_a_wrong_slot_is_found(by_xla):
    """The law itself: of kernels that are wrong in one slot, or forget a bias."""
    good = table._TABLE["by_xla"]

    def shifted(lhs, rhs, sizes, *, row_slot, into, **static):
        return good.kernels["slot_matmul"](
            lhs, rhs, sizes, row_slot=row_slot if into is None else row_slot ^ 1, into=into, **static
        )

    def unbiased(*operands, up_bias, **static):
        return good.kernels["gated_matmul"](*operands, up_bias=0 * up_bias, **static)

    for word, bad in (("slot_matmul", shifted), ("gated_matmul", unbiased)):
        kernels = {**good.kernels, word: bad}
        moe_jax.register_backend(moe_jax.Backend(name="bad", kernels=kernels), replace=word == "gated_matmul")
        found = np.array(fused_deviations("bad"))
        assert np.isnan(found).any() or found.max() > 0, word


@pytest.mark.quick("by_xla-names0")
@pytest.mark.parametrize("names", [("gate", "up", "down"), ("lhs", "up")])
@pytest.mark.parametrize("backend", ["by_xla", "gpu"])
def test_every_derivative_of_rows_in_slots(by_xla, backend, names):
    """Of lhs through two matrices, their product, and a third matrix, out of slots and into slots again."""
    rng = np.random.default_rng(0)
    sizes, row_slot, total = np.array([4, 0, 5], np.int32), rng.permutation(12)[:11].astype(np.int32), 9
    here = row_slot[:total]
    shapes = {"lhs": (total, 3), "gate": (3, 3, 4), "up": (3, 3, 4), "down": (3, 4, 2), "bias": (3, 2), "ct": (12, 2)}
    whole = {name: rng.integers(-2, 3, shape).astype(np.float32) for name, shape in shapes.items()}

    def loss(params):
        of = {**whole, **params}
        lhs = jnp.zeros((12, 3)).at[here].set(of["lhs"])  # slots that no row has may hold anything in a gradient too
        (hidden,) = gated_matmul(
            backend, jnp.multiply, False, lhs, (of["gate"], of["up"]), (None, None), sizes, row_slot
        )
        (made,) = grouped_matmuls(backend, 12, hidden, (of["down"],), (of["bias"],), sizes, row_slot)
        return jnp.sum(made[here] * whole["ct"][here])

    def formula(params):
        of = {**whole, **params}
        groups = np.repeat(np.arange(3), sizes)
        a, b = (np.einsum("mh,mhn->mn", of["lhs"], of[name][groups]) for name in ("gate", "up"))
        made = np.einsum("mh,mhn->mn", a * b, of["down"][groups]) + of["bias"][groups]
        return np.sum(made * whole["ct"][here])

    holds(loss, formula, {name: whole[name] for name in names}, rng)


@pytest.mark.parametrize("num_written", [0, 2, 3])
def test_zero_past_groups_selects(num_written):
    """Native kernels leave rows past the groups undefined, so zeroing must not be a product."""
    zeroed = xla.zero_past_groups(jnp.full((3, 2), jnp.nan), jnp.array([num_written, 0], jnp.int32))
    np.testing.assert_array_equal(np.isnan(zeroed), np.arange(3)[:, None] < [num_written] * 2)
    np.testing.assert_array_equal(np.nan_to_num(zeroed), 0.0)


@pytest.mark.quick("xla", "auto")
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_product_is_added_to(backend):
    """The sum, and gradients: that of what was there before is the cotangent itself. NaN past the sum spreads nowhere.

    Several products of the same rows: the gradient of the rows is the sum of their gradients.
    """

    @jax.jit
    def run(lhs, rhs, group_sizes, ct, start):
        def summed(lhs, rhs, start):
            return moe_jax.grouped_matmul(lhs, rhs, group_sizes, backend=backend, add_to=start)

        out, pull = jax.vjp(summed, lhs, rhs, start)
        outs, pull_all = jax.vjp(
            lambda lhs: grouped_matmuls(backend, None, lhs, (rhs, 2 * rhs), (None, None), group_sizes), lhs
        )
        return out, *pull(ct), outs, *pull_all((ct, ct))

    for seed, group_sizes in enumerate(GROUPINGS.values()):
        lhs, rhs, sizes, ct = operands(seed, group_sizes, jnp.float32, False)
        stop = sum(group_sizes)
        start = np.roll(ct, 1, axis=1)
        out, d_lhs, d_rhs, d_start, outs, d_shared = run(lhs, rhs, sizes, ct, start)
        product = reference.grouped_matmul(lhs, rhs, sizes)[:stop]
        of_lhs, of_rhs = reference.grouped_matmul_vjp(ct, lhs, rhs, sizes)
        np.testing.assert_array_equal(out[:stop], product + start[:stop])
        np.testing.assert_array_equal(d_lhs[:stop], of_lhs[:stop])
        np.testing.assert_array_equal(d_rhs, of_rhs)
        np.testing.assert_array_equal(d_start[:stop], ct[:stop])
        for factor, each in enumerate(outs, 1):
            np.testing.assert_array_equal(each[:stop], factor * product)
        np.testing.assert_array_equal(d_shared[:stop], 3 * of_lhs[:stop])


# --- lowering --------------------------------------------------------------------------------------------------------


NATIVE = '"chlo.ragged_dot"('


@pytest.mark.parametrize(("backend", "platform"), [("cpu", "cpu"), ("xla", "tpu"), ("gpu", "rocm")])
def test_narrow_products_are_summed_in_fp32(backend, platform):
    lines = lowered_text(backend, platform, jnp.bfloat16).splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line or NATIVE in line]
    # the product and both gradients; on a CPU in large tiles and in small ones
    assert len(products) == (6 if backend == "cpu" else 3)
    assert all(line.endswith("xf32>") for line in products)


@pytest.mark.parametrize(
    ("backend", "platform"),
    [
        ("gpu", "rocm"),
        ("xla", "tpu"),
        ("xla", "cuda"),
        ("auto", "rocm"),
    ],
)
def test_accelerators_get_the_native_instruction(backend, platform):
    assert lowered_text(backend, platform).count(NATIVE) == 3


@pytest.mark.parametrize("backend", ["auto", "gpu", "hopper", "blackwell"])
def test_gpus_get_kernels_that_say_what_they_multiply(backend):
    text = lowered_text(backend, "cuda")
    assert text.count("xla.gpu.triton") == text.count("moe_jax_flops") == 3 and "ragged_dot" not in text


@pytest.mark.parametrize("backend", ["auto", "tpu", "tpu_lite"])
def test_tpus_get_kernels_and_no_pass_over_the_rows(backend):
    """A product and two gradients by kernels; around them integers alone, where masks of the operands once were."""
    text = lowered_text(backend, "tpu", jnp.bfloat16)
    assert text.count("@tpu_custom_call") == 3 and "ragged_dot" not in text
    assert not [line for line in text.splitlines() if "stablehlo.select" in line and "bf16" in line]


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_the_cpu_never_sees_ragged_dot(backend):
    assert "ragged_dot" not in lowered_text(backend, "cpu")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"lhs": jnp.zeros((2, 3, 4))}, errors.ShapeError, "lhs"),
        ({"rhs": jnp.zeros((3, 4))}, errors.ShapeError, "rhs"),
        ({"lhs": jnp.zeros((2, 5))}, errors.ShapeError, "lhs"),
        ({"transpose_rhs": True}, errors.ShapeError, "lhs"),
        ({"lhs": jnp.zeros((2, 3), jnp.int32)}, errors.DtypeError, "lhs"),
        ({"rhs": jnp.zeros((2, 3, 4), jnp.bfloat16)}, errors.DtypeError, "rhs"),
        ({"group_sizes": jnp.zeros(3, jnp.int32)}, errors.ShapeError, "group_sizes"),
        ({"group_sizes": jnp.zeros(2)}, errors.DtypeError, "group_sizes"),
        ({"add_to": jnp.zeros((2, 3))}, errors.ShapeError, "add_to"),
        ({"add_to": jnp.zeros((2, 4), jnp.bfloat16)}, errors.DtypeError, "add_to"),
        ({"backend": "gpuu"}, errors.InvalidArgumentError, "did you mean 'gpu'"),
    ],
)
def test_wrong_arguments_are_named(changes, error, names):
    legal = {"lhs": jnp.zeros((2, 3)), "rhs": jnp.zeros((2, 3, 4)), "group_sizes": jnp.zeros(2, jnp.int32)}
    with pytest.raises(error, match=names):
        moe_jax.grouped_matmul(**legal | changes)
