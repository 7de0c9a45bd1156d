"""Rows through their experts, slot by slot, against a float64 loop over rows; and how many rows an even load has.

Most data are whole numbers, gates multiples of 128 and the inputs of a GELU of 16: then silu, GELU and both derivatives
are whole numbers or halves in fp32, every sum is exact, and every comparison with them is for equality.
"""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import small_integers
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

import moe_jax as moe
from moe_jax import expert_slots, hlo, reference
from moe_jax.kernels import table
from moe_jax.movement import RowOrder

L, H, F = 5, 6, 4
M, A = 23, 29  # rows, and slots that they may lie in where they have an order
S = 3

SIZES = {  # rows of each expert
    "equal": [3, 3, 3, 3, 3],
    "uneven": [3, 2, 2, 0, 3],  # two thirds of S * L rows: the fewest that pay as equal groups
    "too_few": [3, 1, 2, 0, 3],
    "one_above": [3, 4, 0, 2, 1],
    "past_the_kept": [1, 7, 4, 5, 6],  # more than S * L rows: the backward pass keeps some without their activations
    "empty_groups": [0, 2, 0, 0, 3],
    "giant_first": [M, 0, 0, 0, 0],
    "giant_inside": [0, 0, M, 0, 0],
    "giant_last": [0, 0, 0, 0, M],
    "none": [0, 0, 0, 0, 0],
}

# fp32 and bf16 against float64, relative to the largest entry of each array: bf16 rounds inputs of the activation, the
# activation and the result, and their cotangents, to 8 bits; fp32 sums have at most ~30 terms of like size.
TOLERANCE = {"float32": 2e-6, "bfloat16": 8 * 2**-9}


def make_plan(mesh=(1, 1), *, num_experts=L, tokens=M, top_k=1, **options):
    """A plan for a mesh that need not be there, where ranks multiply M rows of L experts."""
    options = {"dtype": "float32", "hidden": H, "poison": True, **options}
    mesh = AbstractMesh(mesh, ("ep", "tp"))
    return moe.make_plan(mesh, tokens_per_rank=tokens, num_experts=num_experts, top_k=top_k, **options)


def through(plan, activation, equal_rows):
    return functools.partial(expert_slots.expert_slots, plan=plan, activation=activation, equal_rows=equal_rows)


def with_gradients(forward):
    """(experts, arrived, order, group_sizes, ct) -> the result and the cotangents of experts and arrived, jitted."""

    def run(experts, arrived, order, group_sizes, ct):
        out, pull = jax.vjp(lambda *floats: forward(*floats, order, group_sizes), experts, arrived)
        return out, *pull(ct)

    return jax.jit(run)


def overflowing(plan, activation):
    """As ``with_gradients``, of a round that keeps nothing and adds to what other rounds gave, here the experts."""

    def run(experts, arrived, order, group_sizes, ct):
        where = {"order": order, "group_sizes": group_sizes, "plan": plan, "activation": activation}
        made = expert_slots.overflow_slots(experts, arrived, **where)
        grads, d_arrived = expert_slots.add_overflow_gradients(experts, experts, arrived, ct, **where)
        return made, jax.tree.map(jnp.subtract, grads, experts), d_arrived

    return jax.jit(run)


def draw_experts(rng, activation, biases, *, exact=True):
    shapes = {"w_gate": (L, H, F), "w_up": (L, H, F), "w_down": (L, F, H)}
    shapes |= {"b_gate": (L, F), "b_up": (L, F), "b_down": (L, H)} if biases else {}
    if activation == "gelu":
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("_gate")}
    if not exact:
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    factors = {"up": 16} if activation == "gelu" else {"gate": 128}
    return {name: small_integers(rng, shape) * factors.get(name[2:], 1) for name, shape in shapes.items()}


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
    order = RowOrder(row_slot=np.full(num_rows, -1, np.int32), slot_row=np.full(A, -1, np.int32))
    order.row_slot[:used], order.slot_row[slots] = slots, np.arange(used)
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
    (equal_rows, activation, biases, ordered)
    for equal_rows in (0, S)
    for activation in ("gelu", "swiglu")
    for biases in (False, True)
    for ordered in (False, True)
]
FORMS = [(0, "gelu", True, True), (0, "swiglu", False, False), (S, "gelu", True, False), (S, "swiglu", True, True)]


def run_form(equal_rows, activation, biases, ordered, many_sizes):
    run = with_gradients(through(make_plan(), activation, equal_rows))
    rng = np.random.default_rng([equal_rows, len(activation), biases, ordered])
    for sizes in many_sizes:
        compare(run, rng, sizes, activation=activation, biases=biases, ordered=ordered)
    assert run._cache_size() == 1, "other counts are other data, not another program"


@pytest.mark.parametrize("equal_rows,activation,biases,ordered", FORMS)
def test_equals_a_loop_over_rows(equal_rows, activation, biases, ordered):
    run_form(equal_rows, activation, biases, ordered, SIZES.values())


@pytest.mark.slow
@pytest.mark.parametrize("equal_rows,activation,biases,ordered", EVERY_FORM)
def test_equals_a_loop_over_rows_many(equal_rows, activation, biases, ordered):
    """16 forms x 60 generated counts, from a few rows to as many as there is room for."""
    rng = np.random.default_rng(0)
    totals = rng.integers(0, M + 1, 60)
    drawn = [rng.multinomial(total, rng.dirichlet(np.ones(L) * rng.choice([0.3, 1, 30]))) for total in totals]
    assert any(max(sizes) <= S for sizes in drawn) and any(max(sizes) > S and sum(sizes) < S * L for sizes in drawn)
    run_form(equal_rows, activation, biases, ordered, [sizes.tolist() for sizes in drawn])


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


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_pieces_change_no_bit(dtype):
    """Slots in a piece for each of four ranks, or at once, as on a back end that is not asked for pieces."""
    meshes = [(4, 1), (4, 2)]  # the slots of tp ranks are summed, and never in pieces
    plans = [make_plan(mesh, num_experts=4 * L, dtype=dtype, transport="padded") for mesh in meshes]
    rng, found = np.random.default_rng(0), []
    experts = jax.tree.map(lambda a: jnp.asarray(a, dtype), draw_experts(rng, "swiglu", True, exact=False))
    slots, sizes = rng.permutation(28), np.array([3, 2, 2, 0, 3], np.int32)  # enough for equal groups
    order = RowOrder(row_slot=np.full(M, -1, np.int32), slot_row=np.full(28, -1, np.int32))
    order.row_slot[:10], order.slot_row[slots[:10]] = slots[:10], np.arange(10)
    arrived, ct = (jnp.asarray(rng.normal(size=(28, H)), dtype) for _ in range(2))
    for plan, num_pieces in zip(plans, [4, 1], strict=True):
        assert expert_slots._how(plan, "swiglu", S, arrived, order).num_pieces == num_pieces
        runs = [with_gradients(through(plan, "swiglu", equal_rows)) for equal_rows in (0, S)]
        runs.append(overflowing(plan, "swiglu"))
        found.append([run(experts, arrived, order, sizes, ct) for run in runs])
    used = jax.tree.map(lambda a: a if a.shape[0] != 28 else a[slots[:10]], found)
    chex.assert_trees_all_equal(*used)


@pytest.mark.parametrize("equal_rows,num_rows", [(1, M), (4, M), (4, 4 * L)])
def test_no_equal_rows_change_a_bit(equal_rows, num_rows):
    """The same numbers for every S, the largest that M has room for included."""
    run, rng = with_gradients(through(make_plan(), "swiglu", equal_rows)), np.random.default_rng(equal_rows)
    for sizes in SIZES.values():
        sizes = [min(size, num_rows) for size in sizes]
        if sum(sizes) <= num_rows:
            compare(run, rng, sizes, activation="swiglu", biases=True, ordered=True, num_rows=num_rows)


@pytest.mark.parametrize(
    "dtype,activation,backend", [("float32", "clamped_swiglu", "xla"), ("bfloat16", "swiglu", "cpu")]
)
def test_any_numbers_to_a_tolerance(dtype, activation, backend):
    run = with_gradients(through(make_plan(dtype=dtype, backend=backend), activation, S))
    rng = np.random.default_rng(1)
    for sizes in SIZES.values():
        compare(run, rng, sizes, activation=activation, biases=True, ordered=True, dtype=dtype, exact=False)


# --- the two layouts --------------------------------------------------------------------------------------------------


def shapes_of(dtype="float32", *, biases=True):
    """Experts, what arrived, its order, the counts and a cotangent, as shapes."""
    experts = draw_experts(np.random.default_rng(0), "swiglu", biases)
    experts = {name: jax.ShapeDtypeStruct(value.shape, dtype) for name, value in experts.items()}
    arrived = jax.ShapeDtypeStruct((A, H), dtype)
    integers = (jax.ShapeDtypeStruct((extent,), "int32") for extent in (M, A, L))
    row_slot, slot_row, group_sizes = integers
    return experts, arrived, RowOrder(row_slot, slot_row), group_sizes, arrived


def products_by_branch(run, *operands):
    """(products outside loops, products inside) of each branch of each conditional of the compiled program."""
    program = hlo.Program(run.lower(*operands).compile().as_text())

    def products(computation, in_loop=False):
        found = collections.Counter()
        for instruction in program.computations[computation].values():
            found[in_loop] += instruction.op == "dot"
            for callee, loops, _ in instruction.callees():
                found += products(callee, in_loop or loops)
        return found

    choices = [found for found in program.instructions() if found.op == "conditional"]
    branches = [[products(callee) for callee, *_ in choice.callees()] for choice in choices]
    return sorted(sorted((found[False], found[True]) for found in both) for both in branches)


def test_one_choice_of_layout_for_each_pass():
    """On one side of it products in loops, for large tiles and small ones, on the other without. S = 0: no choice."""
    *operands, ct = shapes_of(biases=False)
    for equal_rows in (0, S):
        forward = through(make_plan(), "swiglu", equal_rows)
        there = products_by_branch(jax.jit(forward), *operands)
        both = products_by_branch(with_gradients(forward), *operands, ct)
        assert there == ([[(0, 6), (3, 0)]] if equal_rows else [])
        # six gradients of three products, those of weights in one size of tiles; in loops also the first two products
        # again, for the rows without inner activations, which fit into one tile: it serves as large and small
        assert both == ([[(0, 6), (3, 0)], [(0, 11), (6, 0)]] if equal_rows else [])


def test_layout_follows_from_the_counts(monkeypatch):
    """Batched products that give NaN show when they were taken: no expert has more than S rows, and two thirds are."""
    experts, rng, taken = draw_experts(np.random.default_rng(0), "gelu", False), np.random.default_rng(1), set()

    def nan_product(inputs, weight, bias):
        return jnp.full((*inputs.shape[:2], weight.shape[2]), jnp.nan, inputs.dtype)

    monkeypatch.setattr(expert_slots, "batched_product", nan_product)
    run = jax.jit(through(make_plan(), "gelu", S))
    for sizes in SIZES.values():
        if not sum(sizes):
            continue
        out = run(experts, small_integers(rng, (M, H)), None, np.array(sizes, np.int32))[: sum(sizes)]
        expected = max(sizes) <= S and sum(sizes) >= 2 / 3 * S * L
        assert np.isnan(out).all() == np.isnan(out).any() == expected, sizes
        taken.add(expected)
    assert taken == {False, True}


@pytest.mark.parametrize("equal_rows,kept", [(0, M), (S, S * L), (4, 4 * L)])
def test_backward_pass_keeps_the_rows_of_an_even_load(equal_rows, kept):
    """Of ``kept`` rows the inputs of the activation; every row once, whichever slots there are; and integers."""
    experts, arrived, order, group_sizes, _ = shapes_of(biases=False)

    def pull(experts, arrived, order, group_sizes):
        forward = through(make_plan(), "swiglu", equal_rows)
        return jax.vjp(lambda *floats: forward(*floats, order, group_sizes), experts, arrived)[1]

    residuals = jax.tree.leaves(jax.eval_shape(pull, experts, arrived, order, group_sizes))
    floats = sorted(leaf.shape for leaf in residuals if leaf.dtype == np.float32)
    weights = [value.shape for value in experts.values()]
    assert floats == sorted([*weights, (kept, F), (kept, F), (kept, H), (M - kept, H)])
    assert sorted(leaf.shape for leaf in residuals if leaf.dtype == np.int32) == [(L,), (M,), (A,)]


# --- how many rows are even -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "equal_rows,options",
    [
        (16, dict(mesh=(4, 2), num_experts=8, tokens=8, top_k=2, capacity_factor=1.0)),  # 128 pairs for 8 experts
        (16, dict(mesh=(4, 2), num_experts=8, tokens=8, top_k=2, capacity_factor=2.0)),  # more room changes nothing
        (4, dict(mesh=(4, 2), num_experts=8, tokens=8, top_k=2, capacity_factor=0.25)),  # 8 rows for 2 experts
        (3, dict(mesh=(2, 1), num_experts=4, tokens=5, top_k=1)),  # 10 pairs for 4 experts, rounded up
        (1, dict(mesh=(1, 1), num_experts=4, tokens=3, top_k=2)),  # 6 for 4, rounded up; but there are 6 rows in all
        (0, dict(mesh=(2, 1), num_experts=16, tokens=1, top_k=1)),  # 2 rows for 8 experts
        (0, dict(mesh=(2, 1), num_experts=4, tokens=0)),
        (0, dict(mesh=(4, 2), num_experts=8, tokens=8, top_k=2, backend="xla")),
        (12, dict(mesh=(4, 1), num_experts=6, tokens=18, num_shared_experts=1, num_shared_ranks=1)),
    ],
    ids=str,
)
def test_equal_rows_of_a_plan(equal_rows, options):
    assert make_plan(**options).equal_rows == equal_rows


@pytest.mark.parametrize("batches", [False, True])
def test_equal_rows_are_for_back_ends_that_batch_them(monkeypatch, batches):
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))
    kernels = moe.resolve_backend("grouped_matmul", "xla").kernels
    moe.register_backend(moe.Backend(name="mine", platforms=("cpu",), kernels=kernels, batches_equal_groups=batches))
    assert [make_plan(backend=name).equal_rows > 0 for name in ("mine", "auto")] == [batches, batches]


@given(
    mesh=st.tuples(st.integers(1, 8), st.integers(1, 4)),
    experts_per_rank=st.integers(1, 20),
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 8),
    zero_experts=st.integers(0, 8),
    capacity_factor=st.one_of(st.none(), st.floats(0.01, 20)),
    transport=st.sampled_from(["padded", "ragged", "allgather"]),
)
def test_equal_rows_are_the_most_with_room(
    mesh, experts_per_rank, tokens, top_k, zero_experts, capacity_factor, transport
):
    """S * L <= M, and no expert has S for more than the even load; one row more would break one of the two."""
    num_experts = mesh[0] * experts_per_rank
    plan = make_plan(
        mesh,
        num_experts=num_experts,
        tokens=tokens,
        top_k=min(top_k, num_experts),
        num_zero_experts=zero_experts,
        capacity_factor=capacity_factor,
        transport=transport,
    )
    num_rows, num_pairs = plan.num_rows(plan.pair_capacity), mesh[0] * mesh[1] * tokens * plan.top_k
    each = plan.equal_rows

    def allowed(each):
        return each * experts_per_rank <= num_rows and (each - 1) * num_experts < num_pairs

    assert allowed(each) or not each
    assert not allowed(each + 1) or not tokens
