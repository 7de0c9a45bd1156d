"""The size of the layer's program, and its bytes beside those that must move. Programs are made, none is run."""

import collections
import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from helpers import TRANSPORTS, mesh_of
from jax.sharding import AbstractMesh

import moe_jax as moe
from moe_jax.hlo.contract import COLLECTIVES, Contract, contract_of
from moe_jax.tools.bench.baselines import minimal_layer
from moe_jax.tools.bench.programs import PASSES, make_layer, with_backward
from moe_jax.tools.bench.workloads import WORKLOADS

FORWARD, BOTH = PASSES


def layer_arguments(plan, init, num_devices):
    """Shapes of params, x and the cotangent of y."""
    params = jax.eval_shape(init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((plan.tokens_per_rank * num_devices, plan.hidden), plan.dtype)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, plan.dtype), params), x, x


# --- the lowered program ----------------------------------------------------------------------------------------------

_FUNCTION = re.compile(r'^\s*func\.func .*?@"?([^"(]+)')
_CALL = re.compile(r'\bcall @"?([^"(]+)')
_OPERATION = re.compile(r'^\s+%\S+ = "?([\w.]+)')


def operations(text):
    """Counter of the operations of a StableHLO program, with every call replaced by what it calls.

    Functions that come out alike are written once, and which do depends on the sizes.
    """
    own, calls, name = collections.defaultdict(collections.Counter), collections.defaultdict(list), None
    for line in text.splitlines():
        if found := _FUNCTION.search(line):
            name = found[1]
        elif found := _CALL.search(line):
            calls[name].append(found[1])
        elif found := _OPERATION.search(line):
            own[name][found[1]] += 1

    @functools.cache
    def expanded(name):
        return sum(map(expanded, calls[name]), own[name])

    return expanded("main")


def test_operations_by_hand():
    @jax.jit
    def inner(x):
        return jnp.sin(jnp.sin(x))

    found = operations(jax.jit(lambda x: inner(inner(x)) * x).lower(1.0).as_text())
    assert found == {"stablehlo.sine": 4, "stablehlo.multiply": 1}


def lowered(platform, **sizes):
    """Operations of both passes of the layer, for devices that need not be there; nodes=2: twice ``ep`` ranks."""
    extents = {name: sizes.pop(name) for name in ("nodes", "ep") if name in sizes} | {"tp": 1}
    mesh = AbstractMesh(tuple(extents.values()), tuple(name.removesuffix("s") for name in extents))
    plan = moe.make_plan(mesh, top_k=4, **sizes)
    init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=32)
    given = layer_arguments(plan, init, mesh.size)
    with jax.sharding.use_abstract_mesh(mesh):  # which JAX wants where axes are Explicit, the default of newer JAX
        traced = jax.jit(with_backward(apply)).trace(*given)
        return operations(traced.lower(lowering_platforms=(platform,)).as_text())


@pytest.mark.quick("padded")
@pytest.mark.parametrize("transport", [*TRANSPORTS, "hierarchy"])
def test_lowered_program_grows_with_nothing(transport):
    """The same operations for 2, 16 and 64 ranks, 256 and 1024 tokens, 256 and 512 experts.

    None is so small that an extent becomes 1: JAX spares the broadcasts of such.
    """
    sizes = {"ep": 16, "tokens_per_rank": 1024, "num_experts": 512}
    sizes |= {"nodes": 2} if transport == "hierarchy" else {}
    sizes |= {"hidden": 512, "dtype": "float32", "transport": transport}
    expected = lowered("cpu", **sizes)
    assert expected["stablehlo.while"] and expected["stablehlo.dot_general"]
    for change in ({"ep": 64, "tokens_per_rank": 256, "num_experts": 256}, {"ep": 2}):
        assert lowered("cpu", **(sizes | change)) == expected, change


def test_bookkeeping_has_no_loop():
    """On an accelerator every turn of a binary search is a few launches, each dearer than all that it looks for."""
    sizes = {"ep": 8, "tokens_per_rank": 64, "hidden": 32, "num_experts": 32, "dtype": "bfloat16"}
    found = lowered("tpu", **sizes, transport="padded", overflow="drop", backend="xla")
    assert found["stablehlo.while"] == 0 < found["stablehlo.sort"]


# --- the compiled program ---------------------------------------------------------------------------------------------

_WORK = re.compile(rf" ({'|'.join(COLLECTIVES)}|dot|custom-call|sort|gather|scatter|while|conditional)(?:-start)?\(")


class Compiled(NamedTuple):
    work: collections.Counter  # of the instructions above
    contract: Contract


@functools.cache
def compiled(name, phase, *, ep=8, tp=1, dtype="float32", quant="none", overflow="dropless"):
    """The layer of a workload, its rows in equal blocks. XLA does all but optimise machine code, which nobody needs."""
    workload = dataclasses.replace(WORKLOADS[name], options=(("transport", "padded"), ("overflow", overflow)))
    plan, init, apply = make_layer(workload, mesh_of(ep, tp), dtype, quant)
    *operands, ct = layer_arguments(plan, init, ep * tp)
    run, operands = (apply, operands) if phase == FORWARD else (with_backward(apply), [*operands, ct])
    program = jax.jit(run).lower(*operands).compile(compiler_options={"xla_backend_optimization_level": 0})
    return Compiled(collections.Counter(_WORK.findall(program.as_text())), contract_of(program))


@pytest.mark.slow
def test_compiled_program_does_no_more_for_more_ranks():
    few, many = compiled("W2", BOTH, ep=2).work, compiled("W2", BOTH).work
    assert few == many and min(many[op] for op in ("all-to-all", "dot", "sort", "while")) > 0


@pytest.mark.slow
@pytest.mark.parametrize("phase", PASSES)
def test_instructions_beside_a_minimal_layer(phase):
    """Twice those of a layer that a person writes by hand, which drops what one round has no room for."""
    workload = dataclasses.replace(WORKLOADS["W1"], options=(("transport", "padded"),))
    mesh = mesh_of(8, 1)
    plan, init, _ = make_layer(workload, mesh, "float32", "none")
    apply, (*operands, ct) = minimal_layer(mesh, plan, workload.activation), layer_arguments(plan, init, 8)
    run, operands = (apply, operands) if phase == FORWARD else (with_backward(apply), [*operands, ct])
    lowered = jax.jit(run).lower(*operands)
    minimal = contract_of(lowered.compile(compiler_options={"xla_backend_optimization_level": 0})).num_instructions
    assert 1000 < compiled("W1", phase).contract.num_instructions <= 2.1 * minimal


@pytest.mark.slow
@pytest.mark.quick("forward")
@pytest.mark.parametrize("phase", PASSES)
def test_skew_takes_no_more_memory(phase):
    """W6 sends all tokens of W2 to one rank.

    Routes are data, so its program is W2's, and that holds little more than one without further rounds, which serves
    the balanced load alone.
    """
    balanced, skewed = WORKLOADS["W2"], WORKLOADS["W6"]
    assert dataclasses.replace(skewed, name="W2", pattern="balanced") == balanced
    any_skew, one_round = compiled("W2", phase).contract, compiled("W2", phase, overflow="drop").contract
    assert any_skew.count("all-to-all", in_loop=True) > 0 == one_round.count("all-to-all", in_loop=True)
    assert any_skew.temporary_bytes <= 1.35 * one_round.temporary_bytes


@pytest.mark.slow
@pytest.mark.quick("W1-forward", "W2-forward", "W2-forward + backward")
@pytest.mark.parametrize("phase", PASSES)
@pytest.mark.parametrize("name", ["W1", "W2", "W3"])
def test_equal_blocks_send_little_more_than_the_rows(name, phase):
    """Of T * K rows of a device 7 / 8 leave it, and as many come back; cotangents likewise. All bytes sent count."""
    workload, sends = WORKLOADS[name], {FORWARD: 2, BOTH: 4}[phase]
    rows = sends * workload.tokens * workload.top_k * 7 // 8 * workload.hidden * 4
    assert rows <= compiled(name, phase).contract.inline_wire_bytes <= 1.6 * rows


@pytest.mark.slow
def test_int8_halves_the_wire():
    """Codes, scales, counts and all: at most 0.55 of what bf16 sends."""
    plain, coded = (compiled("W2", FORWARD, dtype="bfloat16", quant=quant).contract for quant in ("none", "int8"))
    assert 0 < coded.inline_wire_bytes <= 0.55 * plain.inline_wire_bytes
