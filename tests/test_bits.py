"""Rows between ranks keep their bits and their size, and gradients of what gathers them are the transposes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of, over_mesh, small_integers

import moe_jax as moe
from moe_jax import collectives
from moe_jax.collectives.bits import gather_bits, swap_bits

A, H = 3, 40  # rows and width of a block
MESHES = [(8, 1), (4, 2), (2, 4)]
AXES = [("ep",), ("tp", "ep")]  # one axis, and a group that is flattened tp first
NARROW = ["bfloat16", "float16"]


def group_size(ep, tp, axes):
    return {("ep",): ep, ("tp",): tp, ("tp", "ep"): ep * tp}[axes]


def in_groups(loop, data, axes):
    """``loop`` over the ranks of each group [G, ...], in the order of ``axes``, of data [ep, tp, ...]."""
    ep, tp = data.shape[:2]
    if axes == ("tp",):
        return np.stack([loop(group) for group in data])
    groups = data.swapaxes(0, 1).reshape(-1, group_size(ep, tp, axes), *data.shape[2:])
    results = np.stack([loop(group) for group in groups])
    return results.reshape(tp, ep, *results.shape[2:]).swapaxes(0, 1)


def swapped(group):
    result = np.zeros_like(group)
    for sender in range(len(group)):
        for receiver in range(len(group)):
            result[receiver, sender] = group[sender, receiver]
    return result


def gathered(group):
    return np.stack([group for _ in group])


def gathered_transposed(cts):
    """A rank's rows went to all, and from each a cotangent comes back."""
    result = np.zeros(cts.shape[1:], cts.dtype)
    for sender in range(len(cts)):
        for receiver in range(len(cts)):
            result[sender] += cts[receiver, sender]
    return result


def every_bit_pattern(rng, dtype, shape):
    """Bits at random, the telling ones among them: NaNs with payloads, quiet or not, both zeros, subnormals, ends."""
    if np.dtype(dtype).itemsize != 2:
        return rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize)).astype(np.uint8).view(dtype)[..., 0]
    infinity = int(np.asarray(np.inf, dtype).view(np.uint16))
    telling = [0x0000, 0x0001, 0x0003, infinity - 1, infinity, infinity + 1, infinity + 5, 0x7FFF]
    telling = np.array(telling + [bits | 0x8000 for bits in telling], np.uint16)
    bits = rng.integers(0, 2**16, shape).astype(np.uint16)
    bits[..., : len(telling)] = telling
    return bits.view(dtype)


def swap(axes):
    return lambda blocks: swap_bits(axes, blocks.dtype)(blocks)


def gather(axes, tiled=False):
    return lambda rows: gather_bits(axes, rows.dtype, tiled=tiled)(rows)


@pytest.mark.quick("4-2-('tp', 'ep')", "2-4-('ep',)")
@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("ep,tp", MESHES)
def test_every_bit_arrives(ep, tp, axes):
    rng, mesh = np.random.default_rng([ep, tp]), mesh_of(ep, tp)
    for dtype in map(jnp.dtype, [*NARROW, "float32", "int8"]):
        rows = every_bit_pattern(rng, dtype, (ep, tp, A, H))
        blocks = every_bit_pattern(rng, dtype, (ep, tp, group_size(ep, tp, axes), A, H))
        everyone = in_groups(gathered, rows, axes)
        for move, data, expected in (
            (swap(axes), blocks, in_groups(swapped, blocks, axes)),
            (gather(axes), rows, everyone),
            (gather(axes, tiled=True), rows, everyone.reshape(ep, tp, -1, H)),
        ):
            got = np.asarray(jax.jit(over_mesh(mesh, move))(data))
            assert got.dtype == expected.dtype and got.shape == expected.shape
            assert got.tobytes() == expected.tobytes(), (move, dtype)


@pytest.mark.parametrize("dtype", [*NARROW, "float32"])
def test_gradients_are_the_transposes(dtype):
    ep, tp = 4, 2
    rng, mesh = np.random.default_rng(2), mesh_of(ep, tp)
    plan = moe.make_plan(mesh, tokens_per_rank=A, hidden=H, num_experts=8, top_k=2, dtype=dtype)
    for gather, axes, tiled in (
        (collectives.gather_tokens, ("tp", "ep"), False),
        (collectives.gather_tp, ("tp",), True),
    ):
        rows = small_integers(rng, (ep, tp, A, H)).astype(jnp.dtype(dtype))
        ct = small_integers(rng, (ep, tp, group_size(ep, tp, axes), A, H)).astype(jnp.dtype(dtype))
        given = ct.reshape(ep, tp, -1, H) if tiled else ct

        def pulled(gather, rows, ct):
            return jax.vjp(functools.partial(gather, plan), rows)[1](ct)[0]

        got = jax.jit(over_mesh(mesh, functools.partial(pulled, gather)))(rows, given)
        expected = in_groups(gathered_transposed, ct, axes)
        assert got.dtype == expected.dtype, axes
        np.testing.assert_array_equal(np.asarray(got, np.float32), expected.astype(np.float32), err_msg=str(axes))


def operand_bytes(move, shape, dtype):
    """What a device hands over to each collective of the compiled program, on 4 x 2 devices."""
    data = jax.ShapeDtypeStruct((4, 2, *shape), dtype)
    found = moe.hlo_contract(over_mesh(mesh_of(4, 2), move), data)
    return [(collective.op, collective.operand_bytes) for collective in found.collectives]


@pytest.mark.parametrize("dtype,size", [("bfloat16", 2), ("float16", 2), ("float32", 4), ("int8", 1)])
def test_bytes_of_an_entry(dtype, size):
    """Nothing is widened on the way; a sum of cotangents may be."""
    block = A * H * size
    assert operand_bytes(swap(("ep",)), (4, A, H), dtype) == [("all-to-all", 4 * block)]
    assert operand_bytes(gather(("ep",)), (A, H), dtype) == [("all-gather", block)]
    assert operand_bytes(gather("tp", tiled=True), (A, H), dtype) == [("all-gather", block)]


@pytest.mark.parametrize("platform,integers", [("cpu", True), ("tpu", False), ("cuda", False)])
def test_16_bit_rows_are_integers_on_cpus_alone(platform, integers):
    """Where no compiler widens them, a change to integers would be a copy of all rows, there and back."""
    blocks = jax.ShapeDtypeStruct((4, 2, 4, A, H), "bfloat16")
    for move in (swap(("ep",)), gather(("ep",))):
        traced = jax.jit(over_mesh(mesh_of(4, 2), move)).trace(blocks)
        assert ("bitcast_convert" in traced.lower(lowering_platforms=(platform,)).as_text()) == integers


@pytest.mark.parametrize("poison", [False, True])
def test_nobody_fills_what_an_exchange_overwrites(poison):
    """The buffer of a ragged exchange is left as it is, or is NaN to prove that nobody reads more than came."""
    mesh = mesh_of(4, 2)
    sizes = {"tokens_per_rank": 8, "hidden": H, "num_experts": 8, "top_k": 2, "dtype": "bfloat16"}
    plan = moe.make_plan(mesh, **sizes, transport="ragged", backend="xla", poison=poison)
    slices = collectives.Slices(sizes=jnp.full((4, 4), 2, jnp.int32))
    exchange = over_mesh(mesh, lambda rows: slices.move(rows, 12, plan.ep_axis, plan)[0])
    rows = jax.ShapeDtypeStruct((4, 2, 8, H), "bfloat16")
    text = jax.jit(exchange).trace(rows).lower(lowering_platforms=("tpu",)).as_text()
    assert ("AllocateBuffer" in text) != poison
    assert ("0x7FC0" in text) == poison and text.count(f"-> tensor<12x{H}xbf16>") >= 1
