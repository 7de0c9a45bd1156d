"""Contracts of compiled programs, against programs whose collectives and bytes a person can count."""

import json

import jax
import jax.numpy as jnp
import pytest
from helpers import mesh_of
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import _compat
from moe_jax.hlo.contract import COLLECTIVES, assert_hlo_contract, hlo_contract

ROWS, WIDTH = 8, 4  # of each device, fp32
BYTES = ROWS * WIDTH * 4
X = jax.ShapeDtypeStruct((8 * ROWS, WIDTH), "float32")


def program(function, ep=8, tp=1):
    """``function`` over [ROWS, WIDTH] of each device."""
    spec = P(("ep", "tp"))
    return _compat.shard_map(function, mesh=mesh_of(ep, tp), in_specs=spec, out_specs=spec)


def exchange(x):
    return lax.all_to_all(x, "ep", 0, 0, tiled=True)


def exchange_in_a_loop(x):
    return lax.fori_loop(0, jnp.int32(x[0, 0]), lambda _, x: exchange(2 * x), exchange(x))


ONE_COLLECTIVE = [
    (exchange, "all-to-all", BYTES, BYTES * 7 // 8),
    (lambda x: lax.all_gather(x, "ep", tiled=True)[:ROWS], "all-gather", BYTES, BYTES * 7),
    (lambda x: _compat.as_varying(lax.psum(x, "ep"), ("ep",)), "all-reduce", BYTES, 2 * BYTES * 7 // 8),
    (lambda x: lax.psum_scatter(x, "ep", tiled=True), "reduce-scatter", BYTES, BYTES * 7 // 8),
    (lambda x: lax.ppermute(x, "ep", [(i, (i + 1) % 8) for i in range(8)]), "collective-permute", BYTES, BYTES),
]


@pytest.mark.parametrize("function,op,handed,left", ONE_COLLECTIVE, ids=[row[1] for row in ONE_COLLECTIVE])
def test_bytes_of_one_collective(function, op, handed, left):
    found = hlo_contract(program(function), X)
    assert found.counts == {op: 1} and found.count(op, in_loop=False) == 1 and found.count(op, in_loop=True) == 0
    assert (found.operand_bytes, found.wire_bytes, found.inline_wire_bytes) == (handed, left, left)
    assert found.collectives[0].group_size == 8 and found.collectives[0].is_float
    assert found.argument_bytes == BYTES


@pytest.mark.parametrize("ep,tp", [(4, 2), (2, 4)])
def test_groups_are_those_of_the_axis(ep, tp):
    found = hlo_contract(program(exchange, ep, tp), X)
    assert found.collectives[0].group_size == ep
    assert found.wire_bytes == BYTES * (ep - 1) // ep


@pytest.mark.parametrize(
    "written,size",
    [
        ("{{0,2},{1,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("{}", 8),
        ("mesh['ep'=4,'tp'=2] {'ep'}", 4),
        ("mesh['ep'=4,'tp'=2] {'tp'}", 2),
        ("mesh['ep'=4,'tp'=2] {'ep','tp'}", 8),
        ("mesh['ep'=4,'tp'=2] {'ep':(2)2,'tp'}", 4),
    ],
)
def test_groups_as_the_versions_of_xla_write_them(written, size):
    text = f"""HloModule m, num_partitions=8

ENTRY %main (p: f32[64]) -> f32[64] {{
  %p = f32[64]{{0}} parameter(0)
  ROOT %a = f32[64]{{0}} all-to-all(%p), channel_id=1, replica_groups={written}, dimensions={{0}}
}}
"""
    (found,) = assert_hlo_contract(text).collectives
    assert (found.group_size, found.wire_bytes) == (size, 256 * (size - 1) // size)


def test_a_collective_in_a_loop_counts_once_and_is_marked():
    found = hlo_contract(program(exchange_in_a_loop), X)
    assert found.count("all-to-all") == 2 and found.count("all-to-all", in_loop=True) == 1
    assert found.wire_bytes == 2 * found.inline_wire_bytes == 2 * BYTES * 7 // 8
    assert "1 x all-to-all in a loop" in str(found) and "1 x all-to-all inline" in str(found)


def test_a_collective_in_a_branch_is_inline():
    def either(x):
        return lax.cond(lax.psum(x[0, 0], "ep") > 0, exchange, lambda x: x + 1, x)

    found = hlo_contract(program(either), X)
    assert found.count("all-to-all", in_loop=False) == 1


def test_scatters_of_floats_and_of_integers():
    def scatter(x, at):
        return jnp.zeros((16, WIDTH)).at[at].add(x), jnp.zeros(16, jnp.int32).at[at].set(at)

    found = hlo_contract(scatter, jnp.ones((ROWS, WIDTH)), jnp.arange(ROWS))
    assert (found.float_scatters, found.int_scatters) == (1, 1)
    assert not found.collectives and not found.wire_bytes


def test_memory_flops_and_the_largest_buffer():
    def products(a, b):
        return jnp.tanh(a @ b) @ b

    a, b = jax.ShapeDtypeStruct((64, 32), "float32"), jax.ShapeDtypeStruct((32, 32), "float32")
    found = hlo_contract(products, a, b)
    assert found.argument_bytes == 4 * (64 * 32 + 32 * 32) and found.output_bytes == 4 * 64 * 32
    assert found.flops >= 2 * 2 * 64 * 32 * 32
    assert found.largest_buffers[0].shape == "f32[64,32]" and found.largest_buffers[0].bytes == 4 * 64 * 32
    assert found.temporary_bytes >= 4 * 64 * 32
    assert found.num_instructions >= 4


def test_shardings_and_donations_are_kept():
    mesh = mesh_of(4, 2)
    spread = jax.ShapeDtypeStruct((8, 16), "float32", sharding=NamedSharding(mesh, P(("ep", "tp"))))
    found = hlo_contract(jax.jit(lambda x: x + 1, donate_argnums=0), spread)
    assert found.argument_bytes == found.output_bytes == found.alias_bytes == 16 * 4
    assert hlo_contract(lambda x, *, by: x * by, jnp.ones(4), by=jnp.ones(4)).argument_bytes == 32


def test_as_dict_is_json():
    found = hlo_contract(program(exchange), X)
    values = json.loads(json.dumps(found.as_dict()))
    assert values["counts"] == {"all-to-all": 1} and values["wire_bytes"] == found.wire_bytes
    assert values["collectives"][0]["operand_bytes"] == BYTES


@pytest.mark.quick("True")
@pytest.mark.parametrize("gradient", [False, True])
def test_the_layer(gradient):
    """Two exchanges of rows inline, four with the backward pass, and one of counts. No float is scattered."""
    mesh, tokens = mesh_of(8, 1), 32
    sizes = {"tokens_per_rank": tokens, "hidden": 16, "num_experts": 16, "top_k": 2, "dtype": "float32"}
    plan = moe.make_plan(mesh, **sizes, transport="padded", capacity_factor=8.0)  # one window holds everything
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=24)
    run = jax.grad(lambda p, x: jnp.sum(apply(p, x)[0]), (0, 1)) if gradient else apply
    params = jax.eval_shape(init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((8 * tokens, 16), "float32")
    found = assert_hlo_contract(run, params, x, collectives={"all-gather": 1}, no_float_scatter=True)
    rows = [c for c in found.collectives if c.op == "all-to-all" and c.is_float]
    counts = [c for c in found.collectives if c.op in ("all-to-all", "all-gather") and not c.is_float]
    assert len(rows) == (4 if gradient else 2) and {c.operand_bytes for c in rows} == {8 * tokens * 2 * 16 * 4}
    assert [c.operand_bytes for c in counts] == [16 * 4]
    assert not any(c.in_loop for c in found.collectives)


def test_every_broken_rule_is_named():
    def wasteful(x):
        at = jnp.int32(x[:, 0])
        return exchange_in_a_loop(x) + jnp.zeros((ROWS, WIDTH)).at[at].add(x)

    run = program(wasteful)
    assert_hlo_contract(run, X, collectives={"all-to-all": 2}, max_wire_bytes=2 * BYTES * 7 // 8)
    with pytest.raises(AssertionError) as caught:
        assert_hlo_contract(
            run,
            X,
            collectives={"all-to-all": 1, "all-gather": 0, "all-reduce": 3},
            max_temporary_bytes=1,
            max_wire_bytes=2 * BYTES * 7 // 8 - 1,
            no_float_scatter=True,
        )
    text = str(caught.value)
    assert "collectives['all-to-all']=1, found 2 (1 of them in loops)" in text
    assert "collectives['all-reduce']=3, found 0" in text and "collectives['all-gather']" not in text
    assert "max_temporary_bytes=1, found" in text and "no_float_scatter, found 1" in text
    assert f"max_wire_bytes={2 * BYTES * 7 // 8 - 1}, found {2 * BYTES * 7 // 8}" in text


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"collectives": {"alltoall": 1}}, "'all-to-all'?"),
        ({"collectives": {"all-to-all": -1}}, "must be a whole number of at least 0"),
        ({"max_wire_bytes": 1.5}, "max_wire_bytes=1.5"),
        ({"max_temporary_bytes": -1}, "max_temporary_bytes=-1"),
        ({"no_float_scatter": 1}, "no_float_scatter=1 must be True or False"),
    ],
)
def test_bad_rules(rules, words):
    with pytest.raises(moe.errors.InvalidArgumentError) as caught:
        assert_hlo_contract(jnp.sin, jnp.ones(2), **rules)
    assert words in str(caught.value)


def test_what_cannot_be_called():
    with pytest.raises(moe.errors.InvalidArgumentError, match="cannot be called"):
        hlo_contract(3)
    with pytest.raises(moe.errors.InvalidArgumentError, match="unknown"):
        hlo_contract(jnp.sin, jnp.ones(2)).count("psum")
    assert len(set(COLLECTIVES)) == 6


HAND_WRITTEN = """HloModule m, num_partitions=4, replica_count=2

%async (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(8,128)} parameter(0)
  ROOT %inner = f32[8]{0} all-to-all(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (x: f32[8], i: s32[4]) -> f32[8] {
  %x = f32[8]{0:T(8,128)S(1)} parameter(0)
  %i = s32[4]{0} parameter(1)
  %start = ((f32[8]{0}), f32[8]{0}, u32[]) async-start(%x), calls=%async
  %y = f32[8]{0} async-done(%start)
  %gather-start = (bf16[2]{0}, bf16[16]{0}) all-gather-start(%x), replica_groups={}, dimensions={0}
  %gather-done = bf16[16]{0} all-gather-done(%gather-start)
  %out = f32[16]{0} broadcast(%y)
  %ragged = f32[16]{0} ragged-all-to-all(%x, %out, %i, %i, %i, /*index=5*/%i), replica_groups={{0,1},{2,3}}
  ROOT %self = f32[8]{0} collective-permute(%y), source_target_pairs={{0,0},{1,1}}
}
"""


class _Compiled:
    """Stands for a program of another platform: async pairs, tiled layouts, iota groups."""

    def as_text(self):
        return HAND_WRITTEN

    def memory_analysis(self):
        names = ("temp", "argument", "output", "alias")
        return type("Memory", (), {f"{name}_size_in_bytes": 0 for name in names})

    def cost_analysis(self):
        return None


def test_text_of_other_platforms():
    from moe_jax.hlo.contract import contract_of

    found = contract_of(_Compiled())
    assert found.counts == {"all-to-all": 1, "all-gather": 1, "ragged-all-to-all": 1, "collective-permute": 1}
    wire = {c.op: (c.group_size, c.operand_bytes, c.wire_bytes) for c in found.collectives}
    assert wire["all-to-all"] == (4, 32, 24)
    assert wire["all-gather"] == (8, 32, 32 * 7)
    assert wire["ragged-all-to-all"] == (2, 32, 16)
    assert wire["collective-permute"][1:] == (32, 0)
    assert found.flops is None and "unknown" in str(found)
