"""The grouped product fused with an all-to-all: both directions against the oracle, forward and every gradient.

Data are small integers unless a test says otherwise, so that every comparison is for equality. Rows past the counts
hold NaN, in inputs and in cotangents.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fused_cases import CAPACITY, IN, OPS, OUT, ROWS, cut_to_fit, hashable, inner, lists, table
from helpers import mesh_for, per_rank, small_integers
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import _compat, errors, reference
from moe_jax.fused import exchange

H, N = 5, 3
SMALL = 12  # a capacity that may be exceeded
PATTERNS = ["even", "uneven", "sparse", "giant", "to_one", "flood", "from_one", "nothing"]


def results(op, *args, **options):
    """Outputs of the grouped part alone, as a tuple."""
    out = getattr(moe, op)(*args, **options)
    return (out[0], out[2]) if op == IN else (out[0],)


@functools.cache
def program(op, num_ranks, axes="x", counts=None, **options):
    """(x, weight, cts[, send, recv]) -> (results, d_x, d_weight); ``counts`` are static lists as nested tuples."""

    def body(x, weight, cts, *traced):
        lists = counts or traced
        run = functools.partial(results, op, axis_name=axes, **options)
        out, pullback = jax.vjp(lambda x, weight: run(x, weight, *lists), x, weight)
        return out, *pullback(cts)

    return jax.jit(per_rank(num_ranks, body, axes))


def poison(rows, counts):
    """NaN past the true number of rows of each rank."""
    rows = np.array(rows)
    for rank, total in enumerate(counts.sum(axis=1)):
        rows[rank, total:] = np.nan
    return rows


def data(rng, op, sizes, capacity, *, dtype=np.float32, transpose=False, draw=small_integers):
    """x, weight, and the cotangents of the results."""
    num_ranks, _, num_local = sizes.shape
    send, recv = lists(sizes)
    x = poison(draw(rng, (num_ranks, ROWS, H)), send)
    weight = draw(rng, (num_ranks, num_local, *((N, H) if transpose else (H, N))))
    cts = [poison(draw(rng, (num_ranks, capacity, n)), recv) for n in ((N, H) if op == IN else (N,))]
    return jax.tree.map(lambda a: np.asarray(a, jnp.dtype(dtype)), (x, weight, tuple(cts)))


def oracle(op, x, weight, cts, send, recv, **options):
    """What ``program`` gives, in float64 and without padding."""
    x, weight, cts = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, weight, cts))
    out = getattr(reference, op)(x, weight, send, recv, **options)
    out = (out[0], out[2]) if op == IN else (out[0],)
    return out, *getattr(reference, f"{op}_vjp")(*cts, x, weight, send, recv, **options)


def check(op, program_results, x, weight, cts, send, recv, **options):
    out, d_x, d_weight = jax.device_get(program_results)  # a slice of an array of JAX is a program
    expected, expected_x, expected_weight = oracle(op, x, weight, cts, send, recv, **options)
    for mine, true in zip(out, expected, strict=True):
        for rank, rows in enumerate(true):
            np.testing.assert_array_equal(mine[rank, : len(rows)], rows)
            np.testing.assert_array_equal(mine[rank, len(rows) :], 0.0)
    np.testing.assert_array_equal(d_x, np.stack(expected_x))
    np.testing.assert_array_equal(d_weight, np.stack(expected_weight))


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.quick("8-2-axes1-True-grouped_matmul_all_to_allv")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("num_ranks", "num_local", "axes", "transpose"),
    [
        (2, 3, "x", True),
        (8, 2, ("ep", "tp"), True),
        *(pytest.param(ranks, local, "x", False, marks=pytest.mark.slow) for ranks, local in ((1, 2), (4, 1))),
    ],
)
def test_patterns(op, num_ranks, num_local, axes, transpose):
    """With two ranks the capacity is the default one, which holds even all rows of both."""
    given, capacity = (None, 2 * ROWS) if num_ranks == 2 else (CAPACITY, CAPACITY)
    run = program(op, num_ranks, axes, recv_capacity=given, transpose_gmm_weight=transpose)
    for seed, pattern in enumerate(PATTERNS):
        rng = np.random.default_rng(seed)
        sizes = table(pattern, num_ranks, num_local, rng, capacity=capacity)
        args, counts = data(rng, op, sizes, capacity, transpose=transpose), lists(sizes)
        check(op, run(*args, *counts), *args, *counts, transpose_gmm_weight=transpose)


@pytest.mark.slow
@pytest.mark.quick("1-all_to_allv_grouped_matmul")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("chunks", [1, 4])
@given(draw=st.data())
def test_generated_counts(op, chunks, draw):
    """More rows than the result holds, too: the last ones by (source rank, expert) stay at home."""
    num_ranks, num_local = 4, 2
    entry = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, ROWS))
    flat = draw.draw(st.lists(entry, min_size=num_ranks**2 * num_local, max_size=num_ranks**2 * num_local))
    sizes = cut_to_fit(np.array(flat, np.int64).reshape(num_ranks, num_ranks, num_local), ROWS, num_ranks * ROWS)
    args, counts = data(np.random.default_rng(0), op, sizes, SMALL), lists(sizes)
    run = program(op, num_ranks, recv_capacity=SMALL, chunks=chunks)
    check(op, run(*args, *counts), *args, *counts, recv_capacity=SMALL)


@pytest.mark.quick("grouped_matmul_all_to_allv")
@pytest.mark.parametrize("op", OPS)
def test_static_counts(op):
    """A table, as lists or as an array; results are as long as the longest."""
    rng = np.random.default_rng(3)
    sizes = table("sparse", 4, 2, rng)
    counts = lists(sizes)
    longest = counts[1].sum(axis=1).max()
    args = data(rng, op, sizes, longest)
    found = program(op, 4, counts=tuple(hashable(c) for c in counts))(*args)
    assert found[0][0].shape[1] == longest < CAPACITY
    check(op, found, *args, *counts)
    as_arrays = per_rank(4, lambda x, weight: results(op, x, weight, *counts, "x", recv_capacity=CAPACITY))
    assert jax.eval_shape(as_arrays, *args[:2])[0].shape[1] == CAPACITY


@pytest.mark.quick("all_to_allv_grouped_matmul")
@pytest.mark.parametrize("op", OPS)
def test_flat_static_list_holds_on_every_rank(op):
    flat = [2, 1] * 4
    sizes = np.tile(np.array([2, 1]), (4, 4, 1))
    x, weight, cts = data(np.random.default_rng(0), op, sizes, 12)
    found = jax.jit(per_rank(4, lambda x, weight: results(op, x, weight, flat, flat, "x")))(x, weight)
    for mine, true in zip(found, oracle(op, x, weight, cts, *lists(sizes))[0], strict=True):
        np.testing.assert_array_equal(mine, np.stack(true))


@pytest.mark.slow
def test_one_undoes_the_other():
    """With unit weights and swapped lists, the way in after the way out puts every row where it was."""
    rng = np.random.default_rng(5)
    sizes = table("uneven", 4, 3, rng)
    counts = lists(sizes)
    unit = np.tile(np.eye(H, dtype=np.float32), (4, 3, 1, 1))
    x = poison(small_integers(rng, (4, ROWS, H)), counts[0])

    def out_and_in(x, unit, send, recv):
        y, _ = moe.grouped_matmul_all_to_allv(x, unit, send, recv, "x")
        return moe.all_to_allv_grouped_matmul(y, unit, recv, send, "x", recv_capacity=ROWS)[0]

    np.testing.assert_array_equal(jax.jit(per_rank(4, out_and_in))(x, unit, *counts), np.nan_to_num(x))


@pytest.mark.quick("grouped_matmul_all_to_allv-bfloat16")
@pytest.mark.parametrize(("op", "dtype"), [(OUT, "bfloat16"), (IN, "float16")])
def test_products_are_summed_in_float32_and_rounded_once(op, dtype):
    """2048 + 1 - 2048: in 16 bits the one would be lost, were partial sums rounded."""
    row = np.pad([2048, 1, -2048], (0, H - 3)).astype(jnp.dtype(dtype))
    x, weight = np.tile(row, (2, 2, 1)), np.ones((2, 1, H, N), jnp.dtype(dtype))
    run = jax.jit(per_rank(2, lambda x, weight: results(op, x, weight, [1, 1], [1, 1], "x")[0]))
    y = run(x, weight)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, 1.0)


def test_document_sample():
    """The reference document's example in fp16, 8 ranks, hidden 64 for 7168; two of the results are subnormal."""
    num_ranks, num_local, hidden, each = 8, 4, 64, 2
    patterns = (np.arange(1, num_ranks + 1)[:, None] * np.array([1024, 512])).astype(np.uint16)
    x, weight = patterns.view(np.float16).T  # x_r = 2^(r-14), w_r from 2^-15
    rows = num_ranks * num_local * each
    flat = [each] * (num_ranks * num_local)

    def shard(x, weight):
        return moe.grouped_matmul_all_to_allv(x, weight, flat, flat, "x", mm_x=x, mm_weight=weight[0])

    y, mm_y = jax.jit(per_rank(num_ranks, shard))(
        np.broadcast_to(x[:, None, None], (num_ranks, rows, hidden)),
        np.broadcast_to(weight[:, None, None, None], (num_ranks, num_local, hidden, N)),
    )
    expected = (hidden * x.astype(np.float64) * weight.astype(np.float64)).astype(np.float16)
    assert np.sum(expected < np.finfo(np.float16).tiny) >= 2
    per_source = np.repeat(expected.view(np.uint16), num_local * each)
    np.testing.assert_array_equal(
        np.asarray(y).view(np.uint16), np.broadcast_to(per_source[None, :, None], (num_ranks, rows, N))
    )
    np.testing.assert_array_equal(
        np.asarray(mm_y).view(np.uint16),
        np.broadcast_to(expected.view(np.uint16)[:, None, None], (num_ranks, rows, N)),
    )


@pytest.mark.quick("True-all_to_allv_grouped_matmul")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("transpose", [False, True])
def test_dense_part(op, transpose):
    """Values and gradients; its weights, and the experts', are replicated here, so that their gradients sum up."""
    rng = np.random.default_rng(0)
    x, mm_x = small_integers(rng, (4, 4, H)), small_integers(rng, (4, 7, 6))
    weight, mm_weight = small_integers(rng, (1, H, N)), small_integers(rng, (2, 6) if transpose else (6, 2))
    ct, mm_ct = small_integers(rng, (4, 4, N)), small_integers(rng, (4, 7, 2))
    options = {"mm_x": mm_x, "mm_weight": [mm_weight] * 4, "transpose_mm_weight": transpose}

    def shard(x, mm_x, ct, mm_ct, weight, mm_weight):
        def run(x, weight, mm_x, mm_weight):
            named = {"mm_x": mm_x, "mm_weight": mm_weight, "transpose_mm_weight": transpose}
            return getattr(moe, op)(x, weight, [1] * 4, [1] * 4, "x", **named)[:2]

        out, pullback = jax.vjp(run, x[0], weight, mm_x[0], mm_weight)
        _, d_weight, d_mm_x, d_mm_weight = pullback((ct[0], mm_ct[0]))
        return out[1][None], d_mm_x[None], d_weight, d_mm_weight

    specs = (P("x"), P("x"), P("x"), P("x"), P(), P())
    mapped = _compat.shard_map(shard, mesh=mesh_for(4), in_specs=specs, out_specs=(P("x"), P("x"), P(), P()))
    mm_y, d_mm_x, d_weight, d_mm_weight = jax.jit(mapped)(x, mm_x, ct, mm_ct, weight, mm_weight)
    counts = np.ones((2, 4, 4), int)
    np.testing.assert_array_equal(mm_y, getattr(reference, op)(x, [weight] * 4, *counts, **options)[1])
    oriented = mm_weight.T if transpose else mm_weight
    np.testing.assert_array_equal(d_mm_x, mm_ct @ oriented.T)
    summed = np.einsum("rbh,rbn->hn", mm_x, mm_ct)
    np.testing.assert_array_equal(d_mm_weight, summed.T if transpose else summed)
    cts = (ct, np.zeros_like(x)) if op == IN else (ct,)
    per_rank_weight = getattr(reference, f"{op}_vjp")(*cts, x, [weight] * 4, *counts)[1]
    np.testing.assert_array_equal(d_weight, sum(per_rank_weight))


@pytest.mark.quick("True-3-all_to_allv_grouped_matmul", "False-3-grouped_matmul_all_to_allv")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("static", "rows"), [(True, 3), (False, 3), (False, 0)])
def test_no_rows(op, static, rows):
    """Nothing arrives, or there is nothing that could."""

    def shard(x, weight):
        counts = [0] * 4 if static else jnp.zeros(4, jnp.int32)
        out, pullback = jax.vjp(lambda x, weight: results(op, x, weight, counts, counts, "x"), x, weight)
        return out, *pullback(jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), out))

    x, weight = np.full((2, rows, H), np.nan, np.float32), np.ones((2, 2, H, N), np.float32)
    out, d_x, d_weight = jax.jit(per_rank(2, shard))(x, weight)
    assert out[0].shape == (2, 0 if static else 2 * rows, N)
    for zero in (*out, d_x, d_weight):
        assert not zero.size or not np.any(zero)


@pytest.mark.slow
def test_counts_are_data():
    """New traced counts run the program that is there."""
    traces = []

    def shard(x, weight, send, recv):
        traces.append(None)
        return results(OUT, x, weight, send, recv, "x")

    run = jax.jit(per_rank(2, shard))
    for seed, pattern in enumerate(PATTERNS):
        rng = np.random.default_rng(seed)
        sizes = table(pattern, 2, 2, rng)
        run(*data(rng, OUT, sizes, CAPACITY)[:2], *lists(sizes))
    assert len(traces) == 1


# --- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("static", "chunks"), [(False, 4), (True, 2)])
def test_chunks_change_no_bit(op, static, chunks):
    """Any floats: the same values and, where a program with gradients is at hand, the same gradients."""
    rng = np.random.default_rng(2)
    sizes = table("uneven", 4, 2, rng, capacity=SMALL)
    counts = lists(sizes)
    args = data(rng, op, sizes, SMALL, draw=lambda rng, shape: rng.standard_normal(shape, np.float32))

    def run(n):
        if not static:
            return program(op, 4, recv_capacity=SMALL, chunks=n)(*args, *counts)
        forward = per_rank(4, lambda x, weight: results(op, x, weight, *counts, "x", chunks=n, recv_capacity=SMALL))
        return (jax.jit(forward)(*args[:2]),)

    cut, whole = run(chunks), run(1)
    jax.tree.map(np.testing.assert_array_equal, cut, whole)
    for mine, true in zip(whole[0], oracle(op, *args, *counts)[0], strict=True):
        for rank, rows in enumerate(true):
            np.testing.assert_allclose(mine[rank, : len(rows)], rows, rtol=1e-5, atol=1e-5)


def contains(eqn, names):
    """Whether a primitive of ``names`` occurs in an equation, however deep."""
    if eqn.primitive.name in names:
        return True
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda value: inner(value) is not None)
    jaxprs = [inner(value) for value in values if inner(value) is not None]
    return any(contains(e, names) for jaxpr in jaxprs for e in jaxpr.eqns)


def stages(jaxpr):
    """("product" or "transfer", the numbers of the stages that it needs) for every stage, in program order."""
    found, needed = [], {}
    for eqn in jaxpr.eqns:
        needs = set().union(*(needed.get(v, set()) for v in eqn.invars if not hasattr(v, "val")))
        for kind, names in (("transfer", {"ragged_all_to_all"}), ("product", {"dot_general", "ragged_dot_general"})):
            if contains(eqn, names):
                found.append((kind, needs))
                needs = needs | {len(found) - 1}
        needed |= dict.fromkeys(eqn.outvars, needs)
    return found


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("direction", ["compute_then_send", "send_then_compute"])
def test_chunks_do_not_wait_for_each_other(direction, chunks):
    extents = exchange.Extents(("x",), 4, "auto", False, chunks, ROWS, ROWS, ROWS)

    def body(rows, weight, counts):
        rows, weight, counts = _compat.as_varying((rows, weight, counts), ("x",))
        route = exchange.make_route(extents, counts, counts, token_limit=False, expert_limit=False)
        run = getattr(exchange, f"_{direction}")
        return run(extents, rows, weight, route)

    shapes = (((4, ROWS, H), "float32"), ((4, 2, H, N), "float32"), ((4, 4, 2), "int32"))
    jaxpr = jax.make_jaxpr(per_rank(4, body))(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    (mapped,) = jaxpr.eqns
    found = stages(inner(mapped.params["jaxpr"]))
    # No product waits for the transfer of another chunk, no transfer for the product of a later one.
    kinds = [kind for kind, _ in found]
    assert kinds.count("product") == kinds.count("transfer") == chunks
    products, transfers = ([i for i, kind in enumerate(kinds) if kind == k] for k in ("product", "transfer"))
    for chunk, (product, transfer) in enumerate(zip(products, transfers, strict=True)):
        if direction == "compute_then_send":  # transfers write into one result, one after the other
            assert not found[product][1]
            assert found[transfer][1] == {*products[: chunk + 1], *transfers[:chunk]}
        else:
            assert not found[transfer][1]
            assert found[product][1] == {transfer}


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_every_rank_sends_in_every_chunk(chunks):
    """To 8 / chunks peers, which expect it in that chunk; over the chunks to every peer once."""
    extents = exchange.Extents(("x",), 8, "auto", False, chunks, ROWS, ROWS, ROWS)

    def body(counts):
        route = exchange.make_route(extents, counts, counts, token_limit=False, expert_limit=False)
        parts = list(exchange._chunks(extents, route))
        return jnp.stack([c.sizes[:, 0] for c in parts]), jnp.stack([c.token_sizes for c in parts])

    sent, expected = map(np.asarray, jax.jit(per_rank(8, body))(np.ones((8, 8, 1), np.int32)))  # [rank, chunk, peer]
    np.testing.assert_array_equal(sent.sum(axis=2), 8 // chunks)
    np.testing.assert_array_equal(sent.sum(axis=1), 1)
    np.testing.assert_array_equal(expected, sent.transpose(2, 1, 0))


# --- what the compiled program contains ------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradient_scatters_no_floats():
    """Forward one direction, backward the other: this program has both."""
    sizes = table("even", 2, 2, np.random.default_rng(0))
    args = (*data(np.random.default_rng(0), IN, sizes, CAPACITY), *lists(sizes))
    text = program(IN, 2, recv_capacity=CAPACITY).lower(*args).compile().as_text()
    assert "all-to-all" in text
    assert not re.search(r"= \(?(f|bf)\d+\[[\d,]*\]\S* scatter\(", text)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "@tpu_custom_call"), ("cuda", "xla.gpu.triton")])
def test_accelerators_get_one_native_exchange_per_chunk(op, platform, kernel):
    run = per_rank(4, lambda x, weight: results(op, x, weight, [1] * 8, [1] * 8, "x", chunks=2))
    args = [jax.ShapeDtypeStruct((4, *shape), np.float32) for shape in ((ROWS, H), (2, H, N))]
    text = jax.jit(run).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    calls = text.count("custom_call @ragged_all_to_all")
    assert calls in (1, 2)  # identical exchanges may share one function
    assert kernel in text and "ragged_dot" not in text


# --- what is refused -------------------------------------------------------------------------------------------------

TRACED = object()  # stands for jnp.ones(4, int32), which cannot be made at collection time
BAD = [
    ({"gmm_x": None}, errors.MissingArgumentError, "gmm_x"),
    ({"gmm_x": np.ones(4, np.float32)}, errors.ShapeError, "gmm_x"),
    ({"gmm_x": np.ones((4, 2), np.int32)}, errors.DtypeError, "gmm_x"),
    ({"gmm_x": np.ones((4, 3), np.float32)}, errors.ShapeError, "gmm_x.*transpose_gmm_weight"),
    ({"gmm_weight": np.ones((2, 2), np.float32)}, errors.ShapeError, "gmm_weight"),
    ({"gmm_weight": np.ones((0, 2, 3), np.float32)}, errors.ShapeError, "gmm_weight.*local expert"),
    ({"gmm_weight": np.ones((2, 2, 3), np.float16)}, errors.DtypeError, "gmm_weight"),
    ({"transpose_gmm_weight": 1}, errors.InvalidArgumentError, "transpose_gmm_weight"),
    ({"send_counts": None}, errors.MissingArgumentError, "send_counts"),
    ({"recv_counts": None}, errors.MissingArgumentError, "recv_counts"),
    ({"send_counts": "1111"}, errors.DtypeError, "send_counts"),
    ({"send_counts": []}, errors.ShapeError, "send_counts has 0 entries; expected 4"),
    ({"send_counts": [1, 1, 1]}, errors.ShapeError, "send_counts has 3 entries; expected 4"),
    ({"send_counts": [[1] * 4] * 3}, errors.ShapeError, "send_counts has 3 rows"),
    ({"send_counts": [[1] * 4, [1] * 3]}, errors.ShapeError, r"send_counts\[1\] has 3 entries"),
    ({"send_counts": [[1] * 4, 5]}, errors.ShapeError, r"send_counts\[1\] has the value 5"),
    ({"send_counts": [1, 1, 1, -1]}, errors.InvalidArgumentError, r"send_counts\[3\]=-1"),
    ({"send_counts": [1, 1, 1.5, 1]}, errors.InvalidArgumentError, r"send_counts\[2\]=1.5"),
    ({"send_counts": [1, True, 1, 1]}, errors.InvalidArgumentError, r"send_counts\[1\]=True"),
    ({"recv_counts": np.ones(4, np.float32)}, errors.DtypeError, "recv_counts"),
    ({"send_counts": [2] * 4, "recv_counts": [2] * 4}, errors.InvalidArgumentError, "sums to 8 on rank 0.*4 rows"),
    ({"send_counts": [2, 1, 1, 0]}, errors.InvalidArgumentError, "disagree: rank 0 sends 2 .* rank 0 expects 1"),
    ({"recv_counts": [1, 1, 1, 0]}, errors.InvalidArgumentError, "disagree: rank 1 sends 1 .* rank 0 expects 0"),
    ({"send_counts": TRACED}, errors.InvalidArgumentError, "recv_counts is known.*send_counts is a traced"),
    ({"send_counts": [TRACED] * 4}, errors.DtypeError, r"jnp.stack\(send_counts\)"),
    ({"recv_capacity": 3}, errors.InvalidArgumentError, "recv_capacity=3 .* 4 rows that rank 0"),
    ({"recv_capacity": -1}, errors.InvalidArgumentError, "recv_capacity"),
    ({"recv_capacity": 4.0}, errors.InvalidArgumentError, "recv_capacity"),
    ({"chunks": 0}, errors.InvalidArgumentError, "chunks"),
    ({"chunks": 3}, errors.InvalidArgumentError, r"chunks=3 does not divide the 2 ranks.*\[1, 2\]"),
    ({"backend": "cpuu"}, errors.InvalidArgumentError, "backend.*did you mean 'cpu'"),
    ({"axis_name": "nowhere"}, errors.MeshError, "nowhere"),
    ({"mm_x": np.ones((1, 2), np.float32)}, errors.MissingArgumentError, "mm_weight is None"),
    ({"mm_weight": np.ones((1, 2), np.float32)}, errors.MissingArgumentError, "mm_x is None"),
    ({"transpose_mm_weight": True}, errors.InvalidArgumentError, "transpose_mm_weight=True needs mm_x"),
    ({"mm_x": np.ones((1, 2), np.float32), "mm_weight": np.ones((3, 4), np.float32)}, errors.ShapeError, "mm_x"),
    ({"mm_x": np.ones((1, 2), np.float16), "mm_weight": np.ones((2, 4), np.float32)}, errors.DtypeError, "mm_x"),
    ({"mm_x": np.ones((1, 2), np.float32), "mm_weight": np.ones((2, 4), np.float16)}, errors.DtypeError, "mm_weight"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "text"), BAD)
@pytest.mark.parametrize("op", OPS)
def test_wrong_arguments_are_named(op, changes, error, text):
    legal = {"gmm_x": np.ones((4, 2), np.float32), "gmm_weight": np.ones((2, 2, 3), np.float32)}
    legal |= {"send_counts": [1] * 4, "recv_counts": [1] * 4, "axis_name": "x"}

    def body():
        given = dict(legal | changes)
        if given["send_counts"] is TRACED:
            given["send_counts"] = jnp.ones(4, jnp.int32)
        elif isinstance(given["send_counts"], list) and TRACED in given["send_counts"]:
            given["send_counts"] = list(jnp.ones(4, jnp.int32))
        return results(op, **given)

    with pytest.raises(error, match=text) as caught:
        jax.eval_shape(_compat.shard_map(body, mesh=mesh_for(2), in_specs=(), out_specs=P("x")))
    assert isinstance(caught.value, moe.MoEError)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("counts", "error"),
    [(np.ones(3, np.int32), errors.ShapeError), (np.ones(4, np.float32), errors.DtypeError)],
)
def test_wrong_traced_counts_are_named(op, counts, error):
    def body(counts):
        return results(op, jnp.ones((4, 2)), jnp.ones((2, 2, 3)), jnp.ones(4, jnp.int32), counts, "x")

    with pytest.raises(error, match="recv_counts"):
        jax.eval_shape(_compat.shard_map(body, mesh=mesh_for(2), in_specs=P(), out_specs=P("x")), counts)


def test_oracle_refuses_lists_that_disagree():
    x, weight = np.ones((2, 2, 1)), np.ones((2, 1, 1, 1))
    with pytest.raises(errors.InvalidArgumentError, match="differs"):
        reference.grouped_matmul_all_to_allv(x, weight, [[1, 1], [1, 1]], [[1, 1], [0, 1]])
