"""The kernels for TPUs: which tiles are visited, how large they are, and what the interpreted kernels compute.

What every back end computes, these as well, is in test_grouped_matmul.py; here blocks are made so small that products
run over several of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_matmul_contract import WORKLOADS
from jax import lax

import moe_jax
from moe_jax import reference
from moe_jax.kernels import grouped_matmuls, table, tpu

ROWS, TILE, STEP = 400, 256, 128  # a step may be shifted back over another, at the end of a tile
SIZES = {
    "any": [37, 90, 3, 0, 230],
    "full tiles": [256, 0, 128, 0, 16],
    "a step back over another": [20, 300, 0, 0, 40],
    "a short one at the end of a tile": [250, 6, 70, 1, 65],
    "first and last empty": [0, 150, 0, 190, 0],
    "one": [0, 0, 400, 0, 0],
    "none": [0, 0, 0, 0, 0],
}


def visited(group_sizes, tile_rows, every_group):
    """The oracle of ``plan_visits``: (group, tile) in order."""
    found, start = [], 0
    last_tile = -(-ROWS // tile_rows) - 1
    for group, size in enumerate(group_sizes):
        if size:
            found += [(group, tile) for tile in range(start // tile_rows, (start + size - 1) // tile_rows + 1)]
        elif every_group:
            found.append((group, min(start // tile_rows, last_tile)))
        start += size
    return found


@pytest.mark.parametrize("every_group", [False, True])
def test_visits(every_group):
    plan = jax.jit(functools.partial(tpu.plan_visits, num_rows=ROWS, tile_rows=TILE, every_group=every_group))
    rng = np.random.default_rng(0)
    drawn = [np.diff([0, *np.sort(rng.integers(0, ROWS + 1, 5))]).tolist() for _ in range(50)]
    for sizes in (*SIZES.values(), *drawn):
        visits = jax.tree.map(np.asarray, plan(np.array(sizes, np.int32)))
        expected = visited(sizes, TILE, every_group)
        assert visits.bounds.tolist() == [0, *np.cumsum(sizes)]
        assert visits.num_visits == max(len(expected), 1) and len(visits.groups) >= len(expected)
        pairs = list(zip(visits.groups.tolist(), visits.row_tiles.tolist(), strict=True))
        assert pairs[: len(expected)] == expected
        assert 0 <= visits.groups.min() and visits.groups.max() < 5
        assert 0 <= visits.row_tiles.min() and visits.row_tiles.max() <= (ROWS - 1) // TILE


def multiplied(group_sizes, tiles):
    """Rows that the kernels take for these groups: every visit in steps, the last one rounded up to a part of one."""
    total, start, part = 0, 0, tiles.step // 4
    for size in group_sizes:
        for first in range(start // tiles.rows * tiles.rows, start + size, tiles.rows):
            low, high = max(start, first) // 16 * 16, min(start + size, first + tiles.rows)
            total += -(-(high - low) // part) * part
        start += size
    return total


@pytest.mark.parametrize("name", WORKLOADS)
def test_kernels_multiply_little_more_than_the_rows_that_are_there(name):
    """On average over random routes at most 1.15 times as many, and as many as they declare within a hundredth."""
    num_rows, hidden, ffn, groups = WORKLOADS[name]
    tiles = tpu.matmul_tiles(num_rows, groups, hidden, ffn, 2, 1)
    rng = np.random.default_rng(0)
    drawn = [multiplied(rng.multinomial(num_rows, [1 / groups] * groups), tiles) for _ in range(30)]
    declared = tpu.multiplied_rows(num_rows, groups, tiles)
    assert abs(np.mean(drawn) / declared - 1) < 0.01
    assert max(drawn) <= 1.15 * num_rows and declared <= 1.15 * num_rows


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("name", WORKLOADS)
def test_blocks_fit_and_leave_nothing_empty(name, cores):
    num_rows, hidden, ffn, groups = WORKLOADS[name]
    for tiles_of in (tpu.matmul_tiles, tpu.outer_tiles):
        for contracted, columns in ((hidden, ffn), (ffn, hidden)):
            tiles = tiles_of(num_rows, groups, contracted, columns, 2, cores)
            assert contracted % tiles.contracted == columns % tiles.columns == tiles.rows % tiles.step == 0
            assert columns // tiles.columns % cores == 0
            assert 2 * 2 * tiles.contracted * tiles.columns < tpu._BLOCK_BYTES
    if cores == 1:
        up = tpu.matmul_tiles(num_rows, groups, hidden, ffn, 2, cores)
        assert up.columns == ffn  # rows are fetched once


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "tpu"),
        ("TPU v5 lite", "tpu_lite"),
        ("TPU v5e", "tpu_lite"),
        ("TPU v5", "tpu"),
        ("TPU v5p", "tpu"),
        ("TPU v6 lite", "tpu_lite"),
        ("TPU7x", "tpu_lite"),
    ],
)
def test_which_back_end_a_plan_takes(kind, name):
    assert table.resolve_all("tpu", kind) == name


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    """Several tiles of rows, of columns, and of the contraction, whose last ones hang over the ends."""
    monkeypatch.setattr(tpu, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(tpu, "row_tiles", lambda num_rows, num_groups: (TILE, STEP))
    tiles = tpu.matmul_tiles(ROWS, 5, 300, 150, 4, 2)
    assert tiles == (TILE, STEP, 128, 128)


def draw(rng, *shape, dtype=jnp.float32, low=-4):
    return rng.integers(low, 5, shape).astype(dtype)


@pytest.mark.quick("bfloat16-True")
@pytest.mark.parametrize(("dtype", "transpose_rhs"), [(jnp.float32, False), (jnp.bfloat16, True)])
def test_several_blocks(small_blocks, dtype, transpose_rhs):
    """Sums of 300 products are beyond what bf16 holds, so they are right only if they are rounded once."""
    rng = np.random.default_rng(0)
    lhs, ct, start = (draw(rng, ROWS, width, dtype=dtype, low=0) for width in (300, 150, 150))
    rhs = draw(rng, 5, *((150, 300) if transpose_rhs else (300, 150)), dtype=dtype, low=0)

    @jax.jit
    def run(lhs, rhs, sizes, ct, start):
        product = table.call_kernel("grouped_matmul", "tpu", lhs, rhs, sizes, add_to=start, transpose_rhs=transpose_rhs)
        return product, table.call_kernel("grouped_outer", "tpu", lhs, ct, sizes, dtype=dtype)

    for sizes in SIZES.values():
        stop, sizes = sum(sizes), np.array(sizes, np.int32)
        for array in (lhs, ct, start):
            array[stop:] = np.nan
        product, sums = run(lhs, rhs, sizes, ct, start)
        expected = reference.grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs)[:stop] + start[:stop]
        np.testing.assert_array_equal(product[:stop], expected.astype(dtype))
        _, d_rhs = reference.grouped_matmul_vjp(ct, lhs, np.zeros((5, 300, 150)), sizes)
        np.testing.assert_array_equal(sums, d_rhs.astype(dtype))
        for array in (lhs, ct, start):
            array[stop:] = 1


def test_groups_do_not_spread_what_they_hold(small_blocks):
    """Infinities and NaN in the rows of one group, which shares tiles and steps with others, stay with it."""
    rng = np.random.default_rng(1)
    sizes = np.array(SIZES["any"], np.int32)
    lhs, ct, rhs = draw(rng, ROWS, 140), draw(rng, ROWS, 20), draw(rng, 5, 140, 20)
    lhs[37:127:2], ct[38:127:2] = np.inf, np.nan

    @jax.jit
    def run(lhs, rhs, sizes, ct):
        product = table.call_kernel("grouped_matmul", "tpu", lhs, rhs, sizes, transpose_rhs=False)
        return product, table.call_kernel("grouped_outer", "tpu", lhs, ct, sizes, dtype=jnp.float32)

    product, sums = run(lhs.copy(), rhs, sizes, ct.copy())
    lhs[37:127], ct[37:127] = 0, 0
    expected = reference.grouped_matmul(lhs, rhs, sizes)
    rows = np.r_[0:37, 127:360]
    np.testing.assert_array_equal(np.asarray(product)[rows], expected[rows])
    _, d_rhs = reference.grouped_matmul_vjp(ct, lhs, rhs, sizes)
    others = np.array([0, 2, 3, 4])
    np.testing.assert_array_equal(np.asarray(sums)[others], d_rhs[others])


def test_batches_and_second_derivatives():
    """d_lhs = ct @ rhs^T, so the derivative of <d_lhs, v> in rhs is what v and ct give as a gradient of weights."""
    rng = np.random.default_rng(2)
    lhs, ct, v = draw(rng, 2, 20, 6), draw(rng, 2, 20, 3), draw(rng, 2, 20, 6)
    rhs, sizes = draw(rng, 3, 6, 3), np.array([[5, 0, 11], [0, 20, 0]], np.int32)

    def second(lhs, sizes, ct, v):
        def of_rhs(rhs):
            _, pull = jax.vjp(lambda lhs: moe_jax.grouped_matmul(lhs, rhs, sizes, backend="tpu"), lhs)
            there = (jnp.arange(20) < jnp.sum(sizes))[:, None]
            return jnp.sum(jnp.where(there, pull(ct)[0] * v, 0))

        return moe_jax.grouped_matmul(lhs, rhs, sizes, backend="tpu"), jax.grad(of_rhs)(rhs)

    products, second_derivatives = jax.jit(jax.vmap(second))(lhs, sizes, ct, v)
    for i in range(2):
        stop = sizes[i].sum()
        np.testing.assert_array_equal(products[i, :stop], reference.grouped_matmul(lhs[i], rhs, sizes[i])[:stop])
        expected = reference.grouped_matmul_vjp(ct[i], v[i], rhs, sizes[i])[1]
        np.testing.assert_array_equal(second_derivatives[i], expected)


def test_where_jax_is_told_to_have_64_bit_numbers():
    lhs, rhs, sizes = np.ones((20, 6), np.float32), np.ones((2, 6, 3), np.float32), np.array([5, 11], np.int32)

    def product_and_gradients(lhs, rhs):
        out, pull = jax.vjp(lambda *operands: moe_jax.grouped_matmul(*operands, sizes, backend="tpu"), lhs, rhs)
        return out, *pull(out)

    with jax.enable_x64(True):
        traced = jax.jit(product_and_gradients).trace(lhs, rhs)
        assert traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == 3
        out, d_lhs, d_rhs = jax.jit(product_and_gradients)(lhs, rhs)
    assert (out[:16] == 6).all() and (d_lhs[:16] == 18).all()
    np.testing.assert_array_equal(d_rhs, np.broadcast_to(6.0 * sizes[:, None, None], (2, 6, 3)))


def test_what_fp32_operands_are_multiplied_in():
    """One pass of the matrix unit, as everywhere in JAX, unless more is asked for; fp16 has more bits than bf16."""
    chosen = {}
    for asked in (None, "bfloat16", "highest", "float32"):
        with jax.default_matmul_precision(asked):
            chosen[asked] = tpu._precision(jnp.float32)
    default, exact = lax.Precision.DEFAULT, lax.Precision.HIGHEST
    assert chosen == {None: default, "bfloat16": default, "highest": exact, "float32": exact}
    assert tpu._precision(jnp.float16) == exact and tpu._precision(jnp.bfloat16) == default


def test_the_gradient_of_rows_through_several_matrices_is_accumulated_by_the_kernel():
    """Three products of rows back for three matrices; the kernels of the second and third take the sum so far."""
    lhs, sizes = jnp.ones((40, 6)), jnp.array([20, 15], jnp.int32)
    matrices = tuple(jnp.ones((2, 6, width)) for width in (3, 3, 5))

    def pull(lhs, *cts):
        return jax.vjp(lambda lhs: grouped_matmuls("tpu", None, lhs, matrices, (None,) * 3, sizes), lhs)[1](cts)[0]

    def kernels(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "moe_kernel":
                yield [v.aval.shape for v in eqn.invars if v.aval.ndim > 1]
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from kernels(inner)

    cts = [jnp.ones((40, width)) for width in (3, 3, 5)]
    found = [shapes for shapes in kernels(jax.make_jaxpr(pull)(lhs, *cts).jaxpr) if shapes[0][1] != 6]
    assert [len(shapes) for shapes in found] == [2, 3, 3]
    text = jax.jit(pull).trace(lhs, *cts).lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.add" not in "".join(line for line in text.splitlines() if "40x6" in line)
