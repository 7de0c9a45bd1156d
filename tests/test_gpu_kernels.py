"""The kernels for GPUs beyond the contract of all back ends: schedules, tiles, JAX's kernels, what compilers say."""

import collections
import functools
import re

import grouped_matmul_contract as contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import needs
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

import moe_jax as moe
from moe_jax import reference
from moe_jax.kernels import gpu, mosaic, table, triton

KINDS = {
    "NVIDIA H100 80GB HBM3": "hopper",
    "NVIDIA H200": "hopper",
    "NVIDIA GH200 480GB": "hopper",
    "NVIDIA B200": "blackwell",
    "NVIDIA GB200": "blackwell",
    "NVIDIA A100-SXM4-80GB": "gpu",
    "NVIDIA GeForce RTX 4090": "gpu",
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_gpu_has_a_back_end_for_everything(kind):
    assert table.resolve_all("gpu", kind) == KINDS[kind]
    assert "Triton" in table.describe_backend(KINDS[kind])


# --- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("sizes", [[0, 5, 33, 0, 16, 1, 0, 0], [0] * 4, [100, 0], [16, 16]])
def test_tiles_cover_every_row_of_every_group_once(sizes, tile):
    num_rows = sum(sizes) + 7
    most = triton.max_tiles(num_rows, len(sizes), tile)
    find = jax.jit(functools.partial(triton._find_tile, jnp.array(sizes), tile))
    covered = []
    for place in range(most):
        group, first, end, is_there = map(int, find(jnp.int32(place)))
        covered += [(group, row) for row in range(first, min(first + tile, end))] if is_there else []
    ends = np.cumsum(sizes)
    assert covered == [(g, row) for g, end in enumerate(ends) for row in range(end - sizes[g], end)]


@pytest.mark.parametrize("row_tiles,column_tiles", [(1, 1), (7, 3), (8, 5), (19, 4)])
def test_every_tile_has_one_program(row_tiles, column_tiles):
    programs = jax.jit(functools.partial(triton._swizzled, row_tiles=row_tiles, column_tiles=column_tiles))
    rows, columns = programs(jnp.arange(row_tiles * column_tiles))
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (r, c) for r in range(row_tiles) for c in range(column_tiles)
    ]
    assert columns[: min(row_tiles, 8)].tolist() == [0] * min(row_tiles, 8)  # one block of columns at a time


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("num_rows,num_groups", [(4096, 4), (16384, 16), (16384, 64), (8192, 64), (128, 32), (5, 1)])
def test_tiles_fit_into_shared_memory_and_waste_little(num_rows, num_groups, itemsize):
    for tiles, of_group in [
        (triton.tiles_of_matmul(num_rows, num_groups, 2048, 768, itemsize), "rows"),
        (triton.tiles_of_outer(num_rows, num_groups, 2048, 768, itemsize), "steps"),
    ]:
        assert tiles.stages * tiles.steps * (tiles.rows + tiles.columns) * itemsize <= 96 * 1024
        assert min(tiles.rows, tiles.columns, tiles.steps) >= 16
        wasted = triton.num_multiplied(num_rows, num_groups, getattr(tiles, of_group)) / num_rows - 1
        assert wasted <= 1 / 8 or getattr(tiles, of_group) == 16


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.quick(
    "bfloat16-False-shape0-group_sizes0", "float32-True-shape1-group_sizes1", "float32-False-shape4-group_sizes4"
)
@pytest.mark.parametrize(
    ("dtype", "transpose_rhs", "shape", "group_sizes"),
    [
        (jnp.bfloat16, False, (300, 130, 140), [131, 0, 150]),  # edges of every axis, two tiles of columns
        (jnp.float32, True, (300, 70, 80), [131, 150]),
        (jnp.float16, True, (1030, 64, 128), [1025]),  # one group in tiles of 128, and nothing but rows to mask
        (jnp.float32, False, (3, 1, 1), [0, 1, 0]),
        (jnp.float32, False, (0, 6, 5), [0, 0]),
        (jnp.bfloat16, False, (37, 0, 5), [30, 7]),
    ],
)
def test_tiles_and_their_edges(dtype, transpose_rhs, shape, group_sizes):
    contract.check("gpu", *contract.operands(0, group_sizes, dtype, transpose_rhs, shape), transpose_rhs)


class Memory:
    """An array in the memory of a GPU: what is outside of it must not be touched, and a result is written once."""

    def __init__(self, array, *, is_result=False):
        self.array, self.dtype = np.array(array), array.dtype
        self.writes = np.zeros(array.shape, int) if is_result else None

    @property
    def at(self):
        return self

    def __getitem__(self, index):
        """(coordinates of a block, broadcast against each other); a scalar has no axis in the block."""
        index = index if isinstance(index, tuple) else (index,)
        spans = [
            np.asarray(i.start + np.arange(i.size) if hasattr(i, "size") and hasattr(i, "start") else i) for i in index
        ]
        if any(span.ndim > 1 for span in spans):  # the caller has given each an axis of its own
            return Block(self, np.broadcast_arrays(*spans))
        axes = sum(span.ndim for span in spans)
        seen = 0
        for place, span in enumerate(spans):
            seen += span.ndim
            spans[place] = span.reshape(-1, *(1,) * (axes - seen)) if span.ndim else span
        return Block(self, np.broadcast_arrays(*spans))


class Block:
    def __init__(self, memory, coordinates):
        self.memory, self.coordinates, self.dtype = memory, coordinates, memory.dtype

    def touched(self, mask):
        mask = np.broadcast_to(True if mask is None else np.asarray(mask), self.coordinates[0].shape)
        inside = tuple(axis[mask] for axis in self.coordinates)
        assert all(
            (0 <= axis).all() and (axis < extent).all()
            for axis, extent in zip(inside, self.memory.array.shape, strict=True)
        )
        return mask, inside

    def load(self, mask=None, other=None):
        mask, inside = self.touched(mask)
        out = np.full(mask.shape, np.nan if other is None else other, self.dtype)
        out[mask] = self.memory.array[inside]
        return jnp.asarray(out)

    def store(self, value, mask=None):
        mask, inside = self.touched(mask)
        self.memory.array[inside] = np.asarray(value)[mask]
        np.add.at(self.memory.writes, inside, 1)


@pytest.fixture
def on_a_strict_gpu(monkeypatch):
    """Programs run one by one in any order, in plain Python, on ``Memory``; what they wrote, and how often, is kept."""
    kept = []

    def kernel(body, name, out, grid, tiles, interpret, input_output_aliases=None):
        def run(*operands):
            outs = out if isinstance(out, tuple) else (out,)
            results = [Memory(np.full(of.shape, np.nan, of.dtype), is_result=True) for of in outs]
            memories = [*map(Memory, operands), *results]
            with jax.disable_jit():
                for number in np.random.default_rng(0).permutation(grid):
                    monkeypatch.setattr(triton.pl, "program_id", lambda axis, number=number: jnp.int32(number))
                    body(*memories)
            kept.extend(results)
            arrays = tuple(jnp.asarray(result.array) for result in results)
            return arrays if isinstance(out, tuple) else arrays[0]

        return run

    monkeypatch.setattr(triton, "_kernel", kernel)
    monkeypatch.setattr(triton.plgpu, "load", lambda block, **masks: block.load(**masks))
    monkeypatch.setattr(triton.plgpu, "store", lambda block, value, **masks: block.store(value, **masks))
    return kept


@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_programs_touch_only_what_is_theirs(on_a_strict_gpu, transpose_rhs):
    """What an interpreter does not see: a store past the edge of a row lands in the next one, and programs race."""
    shape, group_sizes = (43, 18, 70), [19, 0, 1, 17]
    lhs, rhs, sizes, ct = contract.operands(0, group_sizes, jnp.float32, transpose_rhs, shape)
    total = sum(group_sizes)
    added = np.nan_to_num(ct, nan=5)
    for start in (None, added):
        triton.grouped_matmul(lhs, rhs, sizes, start, transpose_rhs=transpose_rhs)
        found = on_a_strict_gpu.pop()
        assert (found.writes[:total] == 1).all() and not found.writes[total:].any()
        expected = reference.grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs)[:total]
        np.testing.assert_array_equal(found.array[:total], expected + (0 if start is None else start[:total]))
    triton.grouped_outer(lhs, ct, sizes, dtype=jnp.dtype("float32"))
    found = on_a_strict_gpu.pop()
    assert (found.writes == 1).all()
    plain = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    np.testing.assert_array_equal(found.array, reference.grouped_matmul_vjp(ct, lhs, plain, sizes)[1])


def test_programs_touch_only_the_slots_of_their_rows(on_a_strict_gpu):
    """Where rows lie in slots, other slots are neither read nor written, nor is anything at the index of no row."""
    shape, group_sizes = (43, 18, 70), [19, 0, 1, 17]
    (num_rows, _, columns), total, num_slots = shape, sum(group_sizes), 50
    lhs, rhs, sizes, ct = contract.operands(0, group_sizes, jnp.float32, False, shape)
    row_slot = np.random.default_rng(0).permutation(num_slots)[:num_rows].astype(np.int32)
    row_slot[total:] = [-1, 2**30, num_slots, 0, -7, 3]
    here = row_slot[:total]

    def in_slots(rows):
        slots = np.full((num_slots, rows.shape[1]), np.nan, rows.dtype)
        slots[here] = rows[:total]
        return slots

    product = reference.grouped_matmul(lhs, rhs, sizes)[:total]
    triton.grouped_matmul(in_slots(lhs), rhs, sizes, None, row_slot, transpose_rhs=False)
    found = on_a_strict_gpu.pop()
    assert (found.writes[:total] == 1).all() and not found.writes[total:].any()
    np.testing.assert_array_equal(found.array[:total], product)
    for start in (None, in_slots(np.nan_to_num(ct, nan=5))):
        triton.grouped_matmul(lhs, rhs, sizes, start, row_slot, transpose_rhs=False, into=num_slots)
        found = on_a_strict_gpu.pop()
        assert found.array.shape == (num_slots, columns)
        assert (found.writes[here] == 1).all() and found.writes.sum() == total * columns
        np.testing.assert_array_equal(found.array[here], product + (0 if start is None else start[here]))
    for slotted, operands in (("lhs", (in_slots(lhs), ct)), ("rhs", (lhs, in_slots(ct)))):
        triton.grouped_outer(*operands, sizes, row_slot, dtype=jnp.dtype("float32"), slotted=slotted)
        found = on_a_strict_gpu.pop()
        assert (found.writes == 1).all()
        np.testing.assert_array_equal(found.array, reference.grouped_matmul_vjp(ct, lhs, rhs, sizes)[1])
    for of_lhs, slots in ((lhs, None), (in_slots(lhs), row_slot)):
        triton.gated_matmul(of_lhs, rhs, 2 * rhs, sizes, None, None, slots, gating=jnp.multiply, keep=True)
        for expected in (2 * product**2, 2 * product, product):
            found = on_a_strict_gpu.pop()
            assert (found.writes[:total] == 1).all() and not found.writes[total:].any()
            np.testing.assert_array_equal(found.array[:total], expected)


@pytest.mark.parametrize(
    "extents,itemsize,fused",
    [
        ((5120, 4, 1024, 1024), 2, (True, True)),  # A, B and C of the benchmark, with the slack of their buffers
        ((20480, 16, 2048, 768), 2, (True, True)),
        ((10240, 8, 7168, 2048), 2, (True, True)),
        ((16384, 2, 4096, 14336), 2, (False, False)),  # wide: copies cost less than products lose
        ((16384, 2, 4096, 14336), 4, (True, True)),  # JAX's kernels take no fp32, so nothing is lost
        ((1024, 16, 4096, 14336), 2, (True, True)),  # nor in small groups
    ],
)
def test_rows_are_copied_where_jaxs_kernels_gain_more(extents, itemsize, fused):
    found = tuple(bool(table.fused_kernels(name, *extents, itemsize)) for name in ("hopper", "blackwell"))
    assert found == fused
    assert table.fused_kernels("gpu", *extents, itemsize) == table.FUSED  # named, it has nothing to lose


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_is_added_to_in_fp32(dtype):
    lhs, rhs, sizes, start = contract.operands(0, [10, 0, 20], dtype, False, (37, 6, 5))
    start = (start + 0.5 if dtype == jnp.float32 else start * 64).astype(dtype)  # sums that bf16 must round
    summed = gpu.GPU.kernels["grouped_matmul"](*map(jnp.asarray, (lhs, rhs, sizes)), transpose_rhs=False, add_to=start)
    product = reference.grouped_matmul(lhs, rhs, sizes)
    np.testing.assert_array_equal(np.asarray(summed)[:30], (product + start)[:30].astype(dtype))


def test_a_batch_of_products():
    cases = [
        contract.operands(seed, sizes, jnp.float32, False)
        for seed, sizes in enumerate([[10, 7, 8, 5, 7], [0, 0, 0, 33, 0]])
    ]
    lhs, rhs, sizes, _ = map(np.stack, zip(*cases, strict=True))
    out = jax.vmap(functools.partial(moe.grouped_matmul, backend="gpu"))(lhs, rhs, sizes)
    for found, case in zip(out, cases, strict=True):
        total = case[2].sum()
        np.testing.assert_array_equal(found[:total], reference.grouped_matmul(*case[:3])[:total])


@pytest.mark.parametrize(
    "dtype,asked,precision",
    [
        ("float32", None, "HIGHEST"),
        ("float32", "tensorfloat32", "HIGH"),
        ("bfloat16", None, "DEFAULT"),
    ],
)
def test_fp32_rows_lose_nothing_unless_jax_is_told_so(dtype, asked, precision):
    """The interpreter always multiplies in fp32, so the product in the kernel is looked at."""
    types = [((37, 6), dtype), ((2, 6, 5), dtype), ((2,), "int32")]
    case = [jax.ShapeDtypeStruct(*array) for array in types]
    with jax.default_matmul_precision(asked):
        jaxpr = jax.make_jaxpr(functools.partial(moe.grouped_matmul, backend="gpu"))(*case)
    assert re.findall(r"precision=([\w']+)", str(jaxpr)) == [repr(asked)]
    product = functools.partial(triton.grouped_matmul, transpose_rhs=False, precision=asked)
    inside = str(jax.make_jaxpr(product)(*case))
    assert set(re.findall(r"Precision\.(\w+)", inside)) == {precision}


def test_kernels_are_lowered_where_numbers_have_64_bits():
    with jax.enable_x64(True):
        assert contract.lowered_text("gpu", "cuda", jnp.bfloat16).count("xla.gpu.triton") == 3


# --- JAX's kernels ---------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def schedule(sizes, tile, num_tiles):
    """JAX's own: (group, first row, end) of each tile; nothing between the last two where a tile has no rows."""

    def of_tile(number):
        info = ragged_dot_mgpu.GroupInfo.create(sizes, tile, number)
        return jnp.stack([info.group_id, info.actual_start, jnp.maximum(info.actual_start, info.actual_end)])

    return jax.vmap(of_tile)(jnp.arange(num_tiles))


def stand_in(lhs, rhs, sizes, *, tile, width, steps, transpose_rhs):
    """What JAX's kernels leave behind, by their own schedule: garbage in every row that no tile claims."""
    lhs, rhs, sizes = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64), jnp.asarray(sizes)
    rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    (num_rows, contracted), (num_groups, _, columns) = lhs.shape, rhs.shape
    assert contracted % steps == 0 and columns % width == 0
    out = np.full((num_rows, columns), np.nan)
    for group, start, end in np.asarray(schedule(sizes, tile, -(-num_rows // tile) + num_groups - 1)):
        out[start:end] = lhs[start:end] @ rhs[group]
    return out


def hopper_stand_in(
    lhs, rhs, *, group_sizes, block_m, block_n, block_k, max_concurrent_steps, grid_block_n, transpose_rhs
):
    assert (rhs.shape[1 if transpose_rhs else 2] // block_n) % grid_block_n == 0
    assert 2 * (max_concurrent_steps * block_k * (block_m + block_n) + block_m * block_n) <= 227 * 1024
    out = stand_in(lhs, rhs, group_sizes, tile=block_m, width=block_n, steps=block_k, transpose_rhs=transpose_rhs)
    return jnp.asarray(out, lhs.dtype)


def blackwell_stand_in(lhs, rhs, group_sizes, config):
    tile, width = 2 * config.tile_m, 2 * config.tile_n
    assert config.collective and lhs.shape[0] % tile == 0 and (rhs.shape[2] // width) % config.grid_tile_width == 0
    out = stand_in(lhs, rhs, group_sizes, tile=tile, width=width, steps=config.tile_k, transpose_rhs=False)
    return jnp.asarray(out, lhs.dtype)


@pytest.mark.quick(
    "hopper-group_sizes0",
    "hopper-group_sizes3",
    "blackwell-group_sizes1",
    "blackwell-group_sizes4",
    "hopper transposed-group_sizes2",
)
@pytest.mark.parametrize(
    "group_sizes", [[512, 0, 512, 900], [0, 0, 0, 1], [0, 0, 0, 0], [6144, 0, 0, 0], [1, 6143, 0, 0]]
)
@pytest.mark.parametrize("kernel", ["hopper", "blackwell", "hopper transposed"])
def test_jaxs_kernels_are_called_as_they_want(monkeypatch, kernel, group_sizes):
    called = []

    def find(module, function, core_count):
        called.append(module)
        return hopper_stand_in if module == "ragged_dot_mgpu" else blackwell_stand_in

    monkeypatch.setattr(mosaic, "find_kernel", find)
    transpose_rhs = kernel == "hopper transposed"
    lhs, rhs, sizes, _ = contract.operands(0, group_sizes, jnp.bfloat16, transpose_rhs, (6144, 128, 256))
    function = mosaic.blackwell_matmul if kernel == "blackwell" else mosaic.hopper_matmul
    out = function(*map(jnp.asarray, (lhs, rhs, sizes)), transpose_rhs=transpose_rhs, precision=None)
    total = sum(group_sizes)
    expected = reference.grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs).astype(out.dtype)
    np.testing.assert_array_equal(np.asarray(out)[:total], expected[:total])
    assert len(called) == 1


FITS = {"shape": (6144, 128, 256), "num_groups": 4, "dtype": "bfloat16", "transpose_rhs": False, "adds": False}


@pytest.mark.parametrize(
    "change,by_hopper,by_blackwell",
    [
        ({}, True, True),
        ({"dtype": "float32"}, False, False),
        ({"shape": (6144, 130, 256)}, False, False),
        ({"shape": (6144, 128, 200)}, False, False),
        ({"shape": (6144, 128, 192)}, True, False),
        ({"shape": (6100, 128, 256)}, True, False),
        ({"shape": (6144, 64, 256)}, False, True),
        ({"num_groups": 64}, False, False),  # as many further tiles as there are rows
        ({"num_groups": 5}, True, False),
        ({"transpose_rhs": True}, True, False),
        ({"adds": True}, False, False),
    ],
)
def test_what_does_not_fit_is_left_to_triton(monkeypatch, change, by_hopper, by_blackwell):
    case = {**FITS, **change}
    (num_rows, contracted, columns), groups = case["shape"], case["num_groups"]
    matrix = (groups, columns, contracted) if case["transpose_rhs"] else (groups, contracted, columns)
    types = [((num_rows, contracted), case["dtype"]), (matrix, case["dtype"]), ((groups,), "int32")]
    types += [((num_rows, columns), case["dtype"])] if case["adds"] else []
    taken = []
    monkeypatch.setattr(mosaic.triton, "grouped_matmul", lambda *operands, **static: taken.append("triton"))

    def found(*operands, **static):
        taken.append("jax")

    monkeypatch.setattr(mosaic, "find_kernel", lambda *names: found)
    for function, fits in ((mosaic.hopper_matmul, by_hopper), (mosaic.blackwell_matmul, by_blackwell)):
        operands = [jax.ShapeDtypeStruct(*array) for array in types]
        function(*operands, transpose_rhs=case["transpose_rhs"], precision=None)
        assert taken.pop() == ("jax" if fits else "triton")


@pytest.mark.parametrize("backend", ["hopper", "blackwell"])
def test_jaxs_kernels_are_lowered_inside_shard_map_where_no_gpu_is(backend):
    mesh = moe.make_mesh(ep=2)
    rows, groups = jax.sharding.PartitionSpec("ep"), jax.sharding.PartitionSpec()
    product = jax.shard_map(
        functools.partial(moe.grouped_matmul, backend=backend), mesh=mesh, in_specs=(rows, groups, rows), out_specs=rows
    )
    types = [((2 * 6144, 128), "bfloat16"), ((4, 128, 256), "bfloat16"), ((8,), "int32")]
    traced = jax.jit(product).trace(*(jax.ShapeDtypeStruct(*array) for array in types))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "ragged_dot_general" not in text
    tile = 128 if backend == "hopper" else 256
    assert f'moe_jax_flops = "{2 * (6144 + 3 * tile) * 128 * 256}"' in text


def test_without_jaxs_kernels_triton_serves_and_says_so(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    backend = gpu._backend("hopper", ("*H100*",), "mosaic.hopper_matmul", "Mosaic")
    assert "lacks the Mosaic kernels" in backend.about
    case = [
        jax.ShapeDtypeStruct(*array)
        for array in [((6144, 128), "bfloat16"), ((4, 128, 256), "bfloat16"), ((4,), "int32")]
    ]
    product = functools.partial(backend.kernels["grouped_matmul"], transpose_rhs=False)
    text = jax.jit(product).trace(*case).lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text and "mosaic" not in text


# --- what the compilers make of it -----------------------------------------------------------------------------------


PRODUCTS = {  # rows, hidden, columns, groups, dtype of one device
    "A": (4096, 1024, 1024, 4, "bfloat16"),
    "B": (16384, 2048, 768, 16, "bfloat16"),
    "C": (8192, 7168, 2048, 8, "bfloat16"),
    "64 experts on one device": (16384, 2048, 768, 64, "bfloat16"),
    "fp32, odd": (4000, 1001, 77, 3, "float32"),
    "fp16, odd": (4000, 1001, 77, 3, "float16"),
}
BY_JAX = {"h100": {"A", "B", "C"}, "h200": {"A", "B", "C"}}  # these products of rows, forward and backward


def calls_by_target(report):
    calls = collections.Counter()
    for kernel in report.kernels:
        calls[kernel.target] += kernel.executions
    return calls


@pytest.mark.compilers
@pytest.mark.parametrize("workload", PRODUCTS)
@pytest.mark.parametrize("gpu_name", ["a100", "h100", "h200", "b200"])
def test_compilers_find_only_the_true_work(gpu_name, workload):
    """At most 1.15 times the flops of the three products, tile padding included; nothing kept beside the results."""
    needs(f"{gpu_name}:8")
    rows, hidden, columns, *_ = PRODUCTS[workload]
    report = moe.compile_for(f"{gpu_name}:8", "target_programs:products", *PRODUCTS[workload])
    true = 3 * 2 * rows * hidden * columns
    assert true <= report.flops <= 1.15 * true and report.temporary_bytes == 0
    by_jax = 2 if workload in BY_JAX.get(gpu_name, ()) else 0
    assert calls_by_target(report) == {
        k: n for k, n in {"mosaic_gpu_v2": by_jax, "__gpu$xla.gpu.triton": 3 - by_jax}.items() if n
    }
    assert all(kernel.flops for kernel in report.kernels)


@pytest.mark.compilers
def test_blackwell_takes_jaxs_kernel_for_large_groups():
    needs("b200:8")
    report = moe.compile_for("b200:8", "target_programs:products", 16384, 1024, 1024, 4, "bfloat16")
    assert calls_by_target(report) == {"mosaic_gpu_v2": 1, "__gpu$xla.gpu.triton": 2}
    assert report.flops <= 1.15 * 3 * 2 * 16384 * 1024**2 and report.temporary_bytes == 0
