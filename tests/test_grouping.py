"""Rows through their experts, slot by slot, against a float64 loop over rows.

Most data are whole numbers, gates multiples of 128 and the inputs of a GELU of 16: then silu, GELU and both derivatives
are whole numbers or halves in fp32, every sum is exact, and every comparison with them is for equality.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouping_cases import A, F, H, L, M, draw_experts, make_plan, shapes_of
from helpers import small_integers

from moe_jax import reference
from moe_jax.hlo import text as hlo
from moe_jax.layer import grouping
from moe_jax.transports import InboxOrder

SIZES = {  # rows of each expert
    "equal": [3, 3, 3, 3, 3],
    "uneven": [3, 4, 0, 2, 1],
    "as_many_as_fit": [1, 7, 4, 5, 6],
    "empty_groups": [0, 2, 0, 0, 3],
    "giant_first": [M, 0, 0, 0, 0],
    "giant_inside": [0, 0, M, 0, 0],
    "giant_last": [0, 0, 0, 0, M],
    "none": [0, 0, 0, 0, 0],
}

# fp32 and bf16 against float64, relative to the largest entry of each array: bf16 rounds inputs of the activation, the
# activation and the result, and their cotangents, to 8 bits; fp32 sums have at most ~30 terms of like size.
TOLERANCE = {"float32": 2e-6, "bfloat16": 8 * 2**-9}


def through(plan, activation):
    return functools.partial(grouping.expert_slots, plan, activation)


def with_gradients(forward):
    """(experts, arrived, order, group_sizes, ct) -> the result and the cotangents of experts and arrived, jitted."""

    def run(experts, arrived, order, group_sizes, ct):
        out, pull = jax.vjp(lambda *floats: forward(*floats, order, group_sizes), experts, arrived)
        return out, *pull(ct)

    return jax.jit(run)


def overflowing(plan, activation):
    """As ``with_gradients``, of a round that keeps nothing and adds to what other rounds gave, here the experts."""

    def run(experts, arrived, order, group_sizes, ct):
        made = grouping.overflow_slots(plan, activation, experts, arrived, order, group_sizes)
        grads, d_arrived = grouping.add_overflow_gradients(
            plan, activation, experts, experts, arrived, ct, order, group_sizes
        )
        return made, jax.tree.map(jnp.subtract, grads, experts), d_arrived

    return jax.jit(run)


def row_by_row(experts, x, sizes, ct, activation):
    """The definition: row r through its expert alone. -> results, cotangents of the experts, and of the rows."""
    out, d_x = np.zeros(x.shape), np.zeros(x.shape)
    d_experts = {name: np.zeros(value.shape) for name, value in experts.items()}
    for row, expert in enumerate(np.repeat(np.arange(L), sizes)):
        one = {name: value[expert] for name, value in experts.items()}
        here = slice(row, row + 1)
        out[here] = reference.expert_ffn(x[here], one, activation)
        d_x[here], d_one = reference.expert_ffn_vjp(ct[here], x[here], one, activation)
        for name, value in d_one.items():
            d_experts[name][expert] += value
    return out, d_experts, d_x


def place(rng, sizes, num_rows, ordered):
    """Slots of the rows in a random order, with the maps; or the first slots, with none. -> (slots, extent, order)."""
    used = sum(sizes)
    if not ordered:
        return np.arange(used), num_rows, None
    slots = rng.permutation(A)[:used]
    order = InboxOrder(row_inbox=np.full(num_rows, -1, np.int32), inbox_row=np.full(A, -1, np.int32))
    order.row_inbox[:used], order.inbox_row[slots] = slots, np.arange(used)
    return slots, A, order


def compare(run, rng, sizes, *, activation, biases, ordered, num_rows=M, dtype="float32", exact=True):
    """One case: all other slots hold NaN, in what arrived and in the cotangent."""
    experts = draw_experts(rng, activation, biases, exact=exact)
    slots, extent, order = place(rng, sizes, num_rows, ordered)
    rows, cts = (small_integers(rng, (len(slots), H)) if exact else rng.normal(size=(len(slots), H)) for _ in range(2))
    experts, rows, cts = jax.tree.map(lambda a: np.asarray(jnp.asarray(a, dtype)), (experts, rows, cts))
    arrived, ct = (np.full((extent, H), np.nan, rows.dtype) for _ in range(2))
    arrived[slots], ct[slots] = rows, cts
    out, d_experts, d_arrived = run(experts, arrived, order, np.array(sizes, np.int32), ct)
    chex.assert_trees_all_equal_shapes_and_dtypes((out, d_experts, d_arrived), (arrived, experts, arrived))
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (experts, rows, cts))
    expected = dict(zip(("out", "experts", "rows"), row_by_row(*wide[:2], sizes, wide[2], activation), strict=True))
    expected |= expected.pop("experts")
    got = {"out": out[slots], "rows": d_arrived[slots], **d_experts}
    for name, value in expected.items():
        if exact:
            np.testing.assert_array_equal(got[name], value.astype(np.float32), err_msg=f"{name} of {sizes}")
        else:
            error = np.abs(np.asarray(got[name], np.float64) - value).max(initial=0.0)
            allowed = TOLERANCE[dtype] * np.abs(value).max(initial=0.0)
            assert error <= allowed, f"{name} of {sizes}: off by {error:.2e}, allowed {allowed:.2e}"


# --- values and gradients ---------------------------------------------------------------------------------------------

EVERY_FORM = [
    (activation, biases, ordered)
    for activation in ("gelu", "swiglu")
    for biases in (False, True)
    for ordered in (False, True)
]
FORMS = [("gelu", True, True), ("swiglu", False, False)]


def run_form(activation, biases, ordered, many_sizes, **options):
    run = with_gradients(through(make_plan(**options), activation))
    rng = np.random.default_rng([len(activation), biases, ordered])
    for sizes in many_sizes:
        compare(run, rng, sizes, activation=activation, biases=biases, ordered=ordered)
    # JAX 0.12 traces a program with an interpreted kernel a second time at its second call, and then no more.
    most = 2 if options else 1
    assert run._cache_size() <= most, "other counts are other data, not another program"


@pytest.mark.parametrize("activation,biases,ordered", FORMS)
def test_equals_a_loop_over_rows(activation, biases, ordered):
    run_form(activation, biases, ordered, SIZES.values())


@pytest.mark.quick("swiglu-True")
@pytest.mark.parametrize("activation,ordered", [("swiglu", True), ("swiglu", False), ("gelu", True)])
def test_kernels_that_read_slots_and_activate_equal_a_loop_over_rows(activation, ordered):
    """Neither a copy of rows nor a mask: what lies in other slots is NaN, and so is what kernels leave unwritten."""
    run_form(activation, True, ordered, SIZES.values(), backend="gpu")


@pytest.mark.slow
def test_overflow_by_kernels_that_read_slots_equals_a_loop_over_rows():
    run, rng = overflowing(make_plan(backend="gpu"), "swiglu"), np.random.default_rng(2)
    for sizes in SIZES.values():
        compare(run, rng, sizes, activation="swiglu", biases=True, ordered=True)


@pytest.mark.slow
@pytest.mark.parametrize("activation,biases,ordered", EVERY_FORM)
def test_equals_a_loop_over_rows_many(activation, biases, ordered):
    """8 forms x 60 generated counts, from a few rows to as many as there is room for."""
    rng = np.random.default_rng(0)
    totals = rng.integers(0, M + 1, 60)
    drawn = [rng.multinomial(total, rng.dirichlet(np.ones(L) * rng.choice([0.3, 1, 30]))) for total in totals]
    run_form(activation, biases, ordered, [sizes.tolist() for sizes in drawn])


@pytest.mark.quick("gelu-True-False")
@pytest.mark.parametrize("activation,biases,ordered", [("gelu", True, False), ("swiglu", False, True)])
def test_overflow_equals_a_loop_over_rows(activation, biases, ordered):
    run, rng = overflowing(make_plan(), activation), np.random.default_rng(int(biases))
    for sizes in SIZES.values():
        compare(run, rng, sizes, activation=activation, biases=biases, ordered=ordered)


def test_overflow_does_nothing_where_no_row_came():
    """What came in goes out, bit for bit, and not one product is made: all stand in loops that turn once or never."""
    experts, arrived, order, _, ct = (
        jax.tree.map(lambda a: np.full(a.shape, np.nan if a.dtype == np.float32 else -1, a.dtype), operand)
        for operand in shapes_of(biases=False)
    )
    nobody, run = np.zeros(L, np.int32), overflowing(make_plan(), "swiglu")
    experts = jax.tree.map(np.zeros_like, experts)
    made, d_experts, d_arrived = run(experts, arrived, order, nobody, ct)
    assert np.isnan(made).all() and np.isnan(d_arrived).all()
    chex.assert_trees_all_equal(d_experts, experts)
    run = overflowing(make_plan(backend="xla"), "swiglu")  # whose products are no loops of their own
    program = hlo.Program(run.lower(experts, arrived, order, nobody, ct).compile().as_text())
    products = [found for found in program.instructions() if found.op == "dot"]
    assert len(products) >= 3 + 2 + 6 and all(found.in_loop for found in products)


@pytest.mark.quick("bfloat16-swiglu-cpu")
@pytest.mark.parametrize(
    "dtype,activation,backend", [("float32", "clamped_swiglu", "xla"), ("bfloat16", "swiglu", "cpu")]
)
def test_any_numbers_to_a_tolerance(dtype, activation, backend):
    run = with_gradients(through(make_plan(dtype=dtype, backend=backend), activation))
    rng = np.random.default_rng(1)
    for sizes in SIZES.values():
        compare(run, rng, sizes, activation=activation, biases=True, ordered=True, dtype=dtype, exact=False)


# --- the program ------------------------------------------------------------------------------------------------------


def test_backward_pass_keeps_rows_and_inputs_of_the_activation():
    """Every row once, whichever slots there are; beside them weights and integers."""
    experts, arrived, order, group_sizes, _ = shapes_of(biases=False)

    def pull(experts, arrived, order, group_sizes):
        forward = through(make_plan(), "swiglu")
        return jax.vjp(lambda *floats: forward(*floats, order, group_sizes), experts, arrived)[1]

    residuals = jax.tree.leaves(jax.eval_shape(pull, experts, arrived, order, group_sizes))
    floats = sorted(leaf.shape for leaf in residuals if leaf.dtype == np.float32)
    weights = [value.shape for value in experts.values()]
    assert floats == sorted([*weights, (M, F), (M, F), (M, H)])
    assert sorted(leaf.shape for leaf in residuals if leaf.dtype == np.int32) == [(L,), (M,), (A,)]


def test_products_of_each_pass():
    """Three of rows; with the backward pass three more of rows and three of weights, and none made twice."""
    *operands, ct = shapes_of(biases=False)
    forward = through(make_plan(backend="xla"), "swiglu")
    for run, arguments, expected in ((jax.jit(forward), operands, 3), (with_gradients(forward), [*operands, ct], 9)):
        program = hlo.Program(run.lower(*arguments).compile().as_text())
        products = [found for found in program.instructions() if found.op == "dot"]
        assert len(products) == expected and not any(found.in_loop for found in products)
