"""The ragged all-to-all against the oracle: values, both gradients, both schedules, and what travels.

Data are small integers, so sums of cotangents are exact and every comparison is for equality.
"""

import functools
import math

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_for, per_rank
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import moe_jax
from moe_jax import _compat, errors, reference
from moe_jax.collectives import ragged

NUM_IN, NUM_OUT = 20, 24  # rows of operand and output per rank
INTEGERS = ("input_offsets", "send_sizes", "output_offsets", "recv_sizes")
FLAT = "x"
PAIRED = ("ep", "tp")


@functools.cache
def forward_program(num_ranks, axes=FLAT):
    return jax.jit(per_rank(num_ranks, functools.partial(moe_jax.ragged_all_to_all, axis_name=axes), axes))


@functools.cache
def gradient_program(num_ranks, axes=FLAT):
    def body(operand, output, ct, *integers):
        def exchange(operand, output):
            return moe_jax.ragged_all_to_all(operand, output, *integers, axis_name=axes)

        result, pullback = jax.vjp(exchange, operand, output)
        return result, *pullback(ct)

    return jax.jit(per_rank(num_ranks, body, axes))


def integers(rng, shape, dtype=np.float32):
    return rng.integers(-9, 10, shape).astype(dtype)


def cut_to_fit(sizes, num_in, num_out):
    """Slices no longer than the operand, and no more rows for a rank than its result holds."""
    sizes = np.minimum(sizes, num_in)
    room = num_out - (np.cumsum(sizes, axis=0) - sizes)
    return np.minimum(sizes, np.maximum(room, 0)).astype(np.int32)


def lay_out(rng, sizes, num_in, num_out, *, overlapping):
    """Offsets for ``sizes`` [W, W]: results in random order with gaps; operands end to end, or anywhere."""
    num_ranks = len(sizes)
    if overlapping:
        input_offsets = rng.integers(0, num_in - sizes + 1)
    else:
        input_offsets = np.cumsum(sizes, axis=1) - sizes
    output_offsets = np.zeros_like(sizes)
    for j in range(num_ranks):
        order = rng.permutation(num_ranks)
        spare = np.sort(rng.integers(0, num_out - sizes[:, j].sum() + 1, num_ranks))
        output_offsets[order, j] = spare + np.cumsum(sizes[order, j]) - sizes[order, j]
    nowhere = rng.integers(-3, num_in + num_out, sizes.shape)  # the offsets of an empty slice mean nothing
    offsets = (np.where(sizes > 0, o, nowhere).astype(np.int32) for o in (input_offsets, output_offsets))
    input_offsets, output_offsets = offsets
    return input_offsets, sizes, output_offsets, np.ascontiguousarray(sizes.T)


def fits_end_to_end(sizes, num_in):
    return bool((sizes.sum(axis=1) <= num_in).all())


def patterns(num_ranks, num_in=NUM_IN, num_out=NUM_OUT):
    """Named [W, W] size matrices."""
    ranks = np.arange(num_ranks)
    zero = np.zeros((num_ranks, num_ranks), np.int32)
    named = {name: zero.copy() for name in ("nothing", "all_to_one", "one_to_all", "permutation", "hot_pair", "even")}
    named["all_to_one"][:, 1] = num_out // num_ranks
    named["one_to_all"][1] = num_in // num_ranks
    named["permutation"][ranks, (ranks + 1) % num_ranks] = num_in
    named["hot_pair"][0, 1] = num_in
    named["even"][:] = num_in // num_ranks
    named["broadcast"] = cut_to_fit(np.where(ranks[:, None] == 0, num_in, zero), num_in, num_out)  # rank 0 to all
    return named


def size_matrices(num_ranks, largest):
    entry = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, largest))
    return st.lists(entry, min_size=num_ranks**2, max_size=num_ranks**2).map(
        lambda flat: np.array(flat, np.int32).reshape(num_ranks, num_ranks)
    )


def check_forward(num_ranks, axes, slices, rng, row_shape=(3,), dtype=np.float32, num_in=NUM_IN, num_out=NUM_OUT):
    operand = integers(rng, (num_ranks, num_in, *row_shape), dtype)
    output = integers(rng, (num_ranks, num_out, *row_shape), dtype)
    result = forward_program(num_ranks, axes)(operand, output, *slices)
    expected = np.stack(reference.ragged_all_to_all(operand, output, *slices))
    chex.assert_type(result, dtype)
    np.testing.assert_array_equal(result, expected)


def check_gradients(num_ranks, axes, slices, rng, num_in=NUM_IN, num_out=NUM_OUT):
    operand = integers(rng, (num_ranks, num_in, 3))
    output, ct = integers(rng, (num_ranks, num_out, 3)), integers(rng, (num_ranks, num_out, 3))
    result, d_operand, d_output = gradient_program(num_ranks, axes)(operand, output, ct, *slices)
    expected = reference.ragged_all_to_all_vjp(ct, operand, *slices)
    np.testing.assert_array_equal(result, np.stack(reference.ragged_all_to_all(operand, output, *slices)))
    np.testing.assert_array_equal(d_operand, np.stack(expected[0]))
    np.testing.assert_array_equal(d_output, np.stack(expected[1]))


# --- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_ranks", "axes"),
    [(4, FLAT), (8, PAIRED), *(pytest.param(ranks, FLAT, marks=pytest.mark.slow) for ranks in (2, 8))],
)
@pytest.mark.parametrize("name", list(patterns(2)))
def test_patterns(num_ranks, axes, name):
    sizes = cut_to_fit(patterns(num_ranks)[name], NUM_IN, NUM_OUT)
    for overlapping in (False, True) if fits_end_to_end(sizes, NUM_IN) else (True,):
        rng = np.random.default_rng(num_ranks)
        slices = lay_out(rng, sizes, NUM_IN, NUM_OUT, overlapping=overlapping)
        check_gradients(num_ranks, axes, slices, rng)


@pytest.mark.parametrize(
    ("num_ranks", "axes"),
    [(4, FLAT), (8, PAIRED), *(pytest.param(ranks, FLAT, marks=pytest.mark.slow) for ranks in (2, 8))],
)
@given(data=st.data())
def test_generated_slices(num_ranks, axes, data):
    """Empty slices, slices that share a start or overlap, gaps in the result: all of it at once."""
    largest = data.draw(st.sampled_from([1, 4, NUM_IN]))
    sizes = cut_to_fit(data.draw(size_matrices(num_ranks, largest)), NUM_IN, NUM_OUT)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**20)))
    overlapping = not fits_end_to_end(sizes, NUM_IN) or data.draw(st.booleans())
    check_gradients(num_ranks, axes, lay_out(rng, sizes, NUM_IN, NUM_OUT, overlapping=overlapping), rng)


@pytest.mark.quick("int8-row_shape1", "bfloat16-row_shape3", "float32-row_shape4")
@pytest.mark.parametrize(
    ("dtype", "row_shape"),
    [(np.int32, ()), (np.int8, (2, 3)), (np.float32, (2, 3)), (jnp.bfloat16, (3,)), (np.float32, (0,))],
)
def test_row_shapes_and_dtypes(dtype, row_shape):
    rng = np.random.default_rng(0)
    sizes = cut_to_fit(rng.integers(0, 8, (4, 4)), NUM_IN, NUM_OUT)
    slices = lay_out(rng, sizes, NUM_IN, NUM_OUT, overlapping=True)
    check_forward(4, FLAT, slices, rng, row_shape=row_shape, dtype=dtype)


@pytest.mark.parametrize(("num_in", "num_out"), [(0, 5), (5, 0), (0, 0)])
def test_no_rows(num_in, num_out):
    rng = np.random.default_rng(0)
    slices = lay_out(rng, np.zeros((4, 4), np.int32), num_in, num_out, overlapping=False)
    check_gradients(4, FLAT, slices, rng, num_in=num_in, num_out=num_out)


def test_one_rank_copies_its_slice():
    rng = np.random.default_rng(0)
    slices = tuple(np.array([[v]], np.int32) for v in (2, 5, 1, 5))
    check_gradients(1, FLAT, slices, rng)


def test_nan_outside_the_slices_goes_nowhere():
    """Rows that are not sent, and cotangents of rows in other places, may hold NaN."""
    operand = np.full((4, NUM_IN, 3), np.nan, np.float32)
    output, ct = (np.full((4, NUM_OUT, 3), np.nan, np.float32) for _ in range(2))
    operand[0, 1:3] = 7.0  # rank 0 sends rows 1-2 to rank 1, where they become rows 0-1
    ct[1, :2] = 5.0
    slices = [np.zeros((4, 4), np.int32) for _ in INTEGERS]
    slices[0][0, 1], slices[1][0, 1], slices[3][1, 0] = 1, 2, 2
    result, d_operand, d_output = jax.device_get(gradient_program(4)(operand, output, ct, *slices))
    np.testing.assert_array_equal(result[1, :2], 7.0)
    assert np.isnan(result[1, 2:]).all()
    np.testing.assert_array_equal(d_operand[0, 1:3], 5.0)
    np.testing.assert_array_equal(np.delete(d_operand[0], [1, 2], axis=0), 0.0)
    np.testing.assert_array_equal(d_operand[1:], 0.0)
    np.testing.assert_array_equal(d_output[1, :2], 0.0)
    assert np.isnan(d_output[1, 2:]).all()


# --- how the result is typed, and what is refused --------------------------------------------------------------------


def into_zeros(operand, *integers):
    return moe_jax.ragged_all_to_all(operand, jnp.zeros((NUM_OUT, 3)), *integers, axis_name=FLAT)


def test_fresh_output_gives_a_varying_result():
    rng = np.random.default_rng(0)
    sizes = cut_to_fit(rng.integers(0, 5, (4, 4)), NUM_IN, NUM_OUT)
    args = (integers(rng, (4, NUM_IN, 3)), *lay_out(rng, sizes, NUM_IN, NUM_OUT, overlapping=False))
    result = jax.jit(per_rank(4, into_zeros))(*args)
    expected = reference.ragged_all_to_all(args[0], np.zeros((4, NUM_OUT, 3), np.float32), *args[1:])
    np.testing.assert_array_equal(result, np.stack(expected))
    flat = [a.reshape(-1, *a.shape[2:]) for a in args]
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(_compat.shard_map(into_zeros, mesh=mesh_for(4), in_specs=P(FLAT), out_specs=P()), *flat)


def test_everything_replicated_still_gives_a_varying_result():
    def body(operand, output, *integers):
        return moe_jax.ragged_all_to_all(operand, output, *integers, axis_name=FLAT)

    args = (np.ones((4, 2), np.float32), np.zeros((8, 2), np.float32), *(np.ones(4, np.int32),) * 4)
    for out_specs, fine in ((P(FLAT), True), (P(), False)):
        mapped = _compat.shard_map(body, mesh=mesh_for(4), in_specs=P(), out_specs=out_specs)
        if fine:
            assert jax.eval_shape(mapped, *args).shape == (32, 2)
        else:
            with pytest.raises(ValueError, match="out_specs"):
                jax.eval_shape(mapped, *args)


def legal_arguments(**changes):
    named = {"operand": np.zeros((4, 3), np.float32), "output": np.zeros((5, 3), np.float32)}
    named |= dict.fromkeys(INTEGERS, np.zeros(2, np.int32))
    return named | changes


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"operand": np.zeros((), np.float32)}, errors.ShapeError, "operand"),
        ({"output": np.zeros(5, np.float32)}, errors.ShapeError, "output"),
        ({"output": np.zeros((5, 4), np.float32)}, errors.ShapeError, "output"),
        ({"output": jnp.zeros((5, 3), jnp.bfloat16)}, errors.DtypeError, "output"),
        *(({name: np.zeros(3, np.int32)}, errors.ShapeError, name) for name in INTEGERS),
        *(({name: np.zeros(2, np.float32)}, errors.DtypeError, name) for name in INTEGERS),
    ],
)
def test_wrong_arguments_are_named(changes, error, names):
    def body():
        return moe_jax.ragged_all_to_all(**legal_arguments(**changes), axis_name=FLAT)

    with pytest.raises(error, match=names):
        jax.eval_shape(_compat.shard_map(body, mesh=mesh_for(2), in_specs=(), out_specs=P(FLAT)))


def test_unbound_axis_is_named():
    with pytest.raises(errors.MeshError, match="'nowhere'"):
        moe_jax.ragged_all_to_all(**legal_arguments(), axis_name="nowhere")


# --- what travels ----------------------------------------------------------------------------------------------------


def chunk_for(num_ranks, num_in):
    return max(1, math.ceil(num_in / (8 * num_ranks)))


def both_schedules(sizes, chunk):
    direct, relay = ragged.wire_rows(jnp.asarray(sizes, jnp.int32), chunk)
    return int(direct), int(relay)


@pytest.mark.parametrize(
    ("sizes", "chunk", "direct", "relay"),
    [
        ([[1, 1], [1, 1]], 1, 2, 6),  # dealer 0 holds both rows for rank 0: the second phase is uneven
        ([[0, 8], [0, 0]], 1, 16, 16),  # 8 rows padded to 8 for both; relayed: 4 + 4 per pair of ranks
        ([[0, 8], [0, 0]], 8, 16, 32),  # the same in chunks of 8
        ([[0, 0], [0, 0]], 4, 0, 0),
        ([[0, 8, 0, 0]] + [[0] * 4] * 3, 1, 32, 16),  # 2 to each dealer and 2 from each
    ],
)
def test_wire_rows_by_hand(sizes, chunk, direct, relay):
    assert both_schedules(sizes, chunk) == (direct, relay)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@hypothesis.settings(max_examples=60)
@given(data=st.data())
def test_wire_rows_follow_the_busiest_rank(num_ranks, data):
    """The cheaper schedule pads to at most twice the rows that the busiest rank sends or receives, plus rounding.

    Rounding: a chunk per peer and phase, and one row per (dealer, source) for splitting every slice W ways.
    """
    sizes = data.draw(size_matrices(num_ranks, data.draw(st.sampled_from([3, 40, 4000]))))
    chunk = data.draw(st.integers(1, 600))
    busiest = max(sizes.sum(axis=0).max(), sizes.sum(axis=1).max())
    direct, relay = both_schedules(sizes, chunk)
    assert direct >= sizes.max() * num_ranks  # a schedule that is too short would lose rows
    assert relay >= busiest
    assert min(direct, relay) <= 2 * busiest + 2 * chunk * num_ranks + num_ranks**2


COUNTED_RANKS, COUNTED_ROWS = 4, 128


@pytest.fixture(scope="module")
def counted():
    """The exchange, and the list to which it adds the rows of every all_to_all of rows that a device executes."""
    wire, all_to_all = [], jax.lax.all_to_all

    def counting(x, *args, **kwargs):
        if x.ndim == 3:  # [W, chunk, features]; the integers that travel ahead have one axis
            jax.debug.callback(lambda: wire.append(x.shape[0] * x.shape[1]))
        return all_to_all(x, *args, **kwargs)

    rows, index = ((COUNTED_ROWS, 2), np.float32), ((COUNTED_RANKS,), np.int32)
    args = [jax.ShapeDtypeStruct((COUNTED_RANKS, *shape), dtype) for shape, dtype in (rows, rows, *(index,) * 4)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged.lax, "all_to_all", counting)
        body = functools.partial(moe_jax.ragged_all_to_all, axis_name=FLAT)
        return jax.jit(per_rank(COUNTED_RANKS, body)).lower(*args).compile(), wire


@pytest.mark.parametrize(
    ("name", "cheaper"),
    [("even", "direct"), ("hot_pair", "relay"), ("permutation", "relay"), ("one_sender", "relay"), ("nothing", None)],
)
def test_executed_rows_are_those_of_the_cheaper_schedule(counted, name, cheaper):
    program, wire = counted
    rng = np.random.default_rng(0)
    sizes = patterns(COUNTED_RANKS, COUNTED_ROWS, COUNTED_ROWS)
    sizes["one_sender"] = np.array([[3, 120, 5, 0], [0, 8, 0, 0], [0] * 4, [0] * 4], np.int32)
    slices = lay_out(rng, sizes[name], COUNTED_ROWS, COUNTED_ROWS, overlapping=False)
    operand, output = (integers(rng, (COUNTED_RANKS, COUNTED_ROWS, 2)) for _ in range(2))
    wire.clear()
    result = program(operand, output, *slices)
    jax.effects_barrier()
    np.testing.assert_array_equal(result, np.stack(reference.ragged_all_to_all(operand, output, *slices)))
    direct, relay = both_schedules(sizes[name], chunk_for(COUNTED_RANKS, COUNTED_ROWS))
    assert cheaper == (None if direct == relay else "direct" if direct < relay else "relay")
    assert sum(wire) == COUNTED_RANKS * min(direct, relay)  # nothing executes beyond the true counts


# --- lowering for hardware that is not here --------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("program", [forward_program, gradient_program])
def test_accelerators_get_the_native_instruction(platform, program):
    rows = [NUM_IN, NUM_OUT] + [NUM_OUT] * (program == gradient_program)  # operand, output, and its cotangent
    args = [jax.ShapeDtypeStruct((4, n, 3), np.float32) for n in rows]
    args += [jax.ShapeDtypeStruct((4, 4), np.int32)] * 4
    traced = program(4).trace(*args)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@ragged_all_to_all") >= (1 if program == forward_program else 2)
    assert "@ragged_all_to_all" not in traced.lower(lowering_platforms=("cpu",)).as_text()
