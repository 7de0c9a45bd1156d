"""What a plan says about memory, beside what compilers said of the same programs, and what it advises."""

import dataclasses
import math
from pathlib import Path

import compiled_memory
import jax
import jax.numpy as jnp
import pytest
from helpers import needs
from jax.sharding import AbstractMesh, AxisType

import moe_jax as moe
from moe_jax.errors import InvalidArgumentError, MemoryLimitError, UnsupportedError
from moe_jax.hardware import MACHINES, find_machine
from moe_jax.plan.memory import OPTIMIZERS, _changes, _resized

WITHIN = 0.10
# Programs so small that the whole of them lies in the 128 MiB of fast memory of a v5e, whose copies count in its peak.
# And v5e gathers the rows of all tokens for two sums over choices at once, where v5p makes one sum after the other.
OUTSIDE = {
    "v5e:2x4 C backward bfloat16 bfloat16 allgather ep=8,tp=1": 0.18,
    "v5e:2x4 A forward bfloat16 bfloat16 padded ep=8,tp=1": 0.19,
    "v5e:2x4 A backward bfloat16 bfloat16 padded ep=8,tp=1": 0.13,
}
FACTS = {compiled_memory.name_of(fact): fact for fact in compiled_memory.facts()}


def mesh_of(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def plan_of(mesh, tokens=64, **options):
    sizes = {"tokens_per_rank": tokens, "hidden": 32, "num_experts": 16, "top_k": 2, "dtype": "bfloat16"}
    return moe.make_plan(mesh, **{**sizes, "transport": "padded", **options})


def predicted(fact):
    """What the plan says of the program that was compiled; some were with a router in fp32 beside narrower experts."""
    call = "dispatch" if fact["program"] == "dispatch" else "layer"
    memory = compiled_memory.plan_of(fact).memory(
        compiled_memory.WORKLOADS[fact["workload"]][2],
        param_dtype=fact["param_dtype"],
        hardware=fact["target"].split(":")[0],
        call=call,
        chunks=fact["chunks"],
        weigh_inputs=fact["weigh_inputs"],
    )
    program = memory.backward if fact["program"] == "backward" else memory.forward
    if fact["router"] == fact["param_dtype"] or call == "dispatch":
        return program
    plan, narrow = memory.plan, jnp.dtype(fact["param_dtype"]).itemsize
    numbers = plan.hidden * plan.num_ids
    return dataclasses.replace(
        program,
        arguments=program.arguments + (4 - narrow) * numbers,
        results=program.results + (4 - narrow) * numbers * (fact["program"] == "backward"),
        temporaries=program.temporaries - 4 * numbers,  # nothing is cast
    )


@pytest.mark.parametrize("name", FACTS)
def test_a_program_takes_what_its_compiler_said(name):
    """Within 10 %; arguments and results, which are arrays of known sizes, within a thousandth."""
    fact, program, error = FACTS[name], predicted(FACTS[name]), error_of(name)
    assert abs(error) <= OUTSIDE.get(name, WITHIN), f"{program} is {error:+.1%} of {fact}"
    known = fact["argument"] + fact["output"]
    assert math.isclose(program.arguments + program.results, known, rel_tol=1e-3)


def test_exceptions_are_exceptions():
    """What is listed as outside is there, and is outside."""
    for name, most in OUTSIDE.items():
        assert WITHIN < abs(error_of(name)) <= most


def error_of(name):
    return predicted(FACTS[name]).total / compiled_memory.total(FACTS[name]) - 1


def table():
    """Markdown: the errors by target and mesh, and of the temporaries alone."""
    lines = [
        "| target | mesh | programs | mean | largest | within 10 % | the largest is |",
        "|---|---|---|---|---|---|---|",
    ]
    meshes = dict.fromkeys((fact["target"], compiled_memory.mesh_of(fact)) for name, fact in FACTS.items())
    for target, mesh in meshes:
        names = [n for n, f in FACTS.items() if f["target"] == target and compiled_memory.mesh_of(f) == mesh]
        errors = {name: error_of(name) for name in names}
        worst = max(errors, key=lambda name: abs(errors[name]))
        mean = sum(map(abs, errors.values())) / len(errors)
        within = sum(abs(error) <= WITHIN for error in errors.values())
        lines.append(
            f"| {target} | {mesh.replace(',', ', ')} | {len(names)} | {mean:.1%} | {errors[worst]:+.1%} | {within} | "
            f"{' '.join(worst.split()[1:-1])}{', weighed' * FACTS[worst]['weigh_inputs']} |"
        )
    for seen, words in ((True, "those that the moments were written down from"), (False, "those that were kept out")):
        errors = [abs(error_of(name)) for name, fact in FACTS.items() if fact["seen"] is seen]
        within = sum(error <= WITHIN for error in errors)
        lines.append(
            f"| {words} | | {len(errors)} | {sum(errors) / len(errors):.1%} | {max(errors):.1%} | {within} | |"
        )
    return "\n".join(lines)


def test_the_document_has_these_errors():
    text = (Path(__file__).parents[1] / "docs" / "planner.md").read_text()
    assert table() in text, f"docs/planner.md should have this table:\n{table()}"


@pytest.mark.compilers
@pytest.mark.parametrize("name", ["h100:8 A forward bfloat16 bfloat16 padded ep=8,tp=1"])
def test_the_compiler_still_says_so(name):
    needs("h100:8")
    now = compiled_memory.measured(FACTS[name])
    assert math.isclose(compiled_memory.total(now), compiled_memory.total(FACTS[name]), rel_tol=0.02)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "mesh,axes", [({"ep": 4, "tp": 1}, ()), ({"ep": 2, "tp": 2}, ()), ({"dp": 2, "ep": 2, "tp": 1}, ("dp",))]
)
def test_state_follows_the_parameters(mesh, axes, activation):
    """Weights are those of ``abstract_params`` on one device; gradients are as large; an optimiser has fp32."""
    mesh = mesh_of(**mesh)
    plan = plan_of(mesh, num_shared_experts=1, param_axes=axes)
    shapes = moe.abstract_params(mesh, plan, moe.RouterConfig(), ffn=48, activation=activation).values()
    parameters = sum(math.prod(of.sharding.shard_shape(of.shape)) for of in shapes)
    for optimizer, numbers in {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}.items():
        memory = plan.memory(48, activation=activation, layers=3, optimizer=optimizer)
        assert (memory.weights, memory.gradients) == (3 * 4 * parameters, 3 * 4 * parameters)
        assert memory.optimizer == 3 * 4 * numbers * parameters
    narrow = {"activation": activation, "param_dtype": "bfloat16"}
    shapes = moe.abstract_params(mesh, plan, moe.RouterConfig(), ffn=48, **narrow).values()
    memory = plan.memory(48, optimizer="none", **narrow)
    assert memory.weights == sum(math.prod(of.sharding.shard_shape(of.shape)) * of.dtype.itemsize for of in shapes)
    assert (memory.gradients, memory.optimizer, memory.activations, memory.backward) == (0, 0, 0, None)


@pytest.mark.parametrize(
    "options,layer",
    [
        ({}, {}),
        ({"num_shared_experts": 1}, {"activation": "gelu"}),
        ({"num_shared_experts": 1}, {"activation": "relu2_gated"}),
        ({"transport": "allgather", "dtype": "float32"}, {"activation": "clamped_swiglu"}),
        ({}, {"weigh_inputs": True}),
        pytest.param({"transport": "allgather", "dtype": "float32"}, {"weigh_inputs": True}, marks=pytest.mark.slow),
        pytest.param({}, {"weigh_inputs": True, "chunks": 2}, marks=pytest.mark.slow),
        pytest.param({"transport": "hierarchy"}, {"chunks": 2}, marks=pytest.mark.slow),
        pytest.param({"num_shared_experts": 2}, {}, marks=pytest.mark.slow),
    ],
)
def test_kept_activations_are_the_residuals(options, layer):
    """What JAX keeps of the forward pass for the backward pass, but for parameters; with remat the input alone."""
    mesh = AbstractMesh((4, 1), ("ep", "tp"), axis_types=(AxisType.Auto, AxisType.Auto))
    hidden, ffn = 512, 768
    plan = plan_of(mesh, hidden=hidden, **options)
    _, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=ffn, **layer)
    activation = {name: value for name, value in layer.items() if name == "activation"}
    params = moe.abstract_params(mesh, plan, moe.RouterConfig(), ffn=ffn, **activation)
    params = {name: jax.ShapeDtypeStruct(of.shape, of.dtype) for name, of in params.items()}
    x = jax.ShapeDtypeStruct((4 * 64, hidden), plan.dtype)
    residuals = jax.eval_shape(lambda params, x: jax.vjp(apply, params, x, has_aux=True)[1], params, x)
    # Parameters are among them, as they are or with a copy for each device, which varies.
    weights = {math.prod(of.shape) for of in params.values()} | {4 * math.prod(of.shape) for of in params.values()}
    narrow = plan.dtype != "float32"
    kept = [
        of
        for of in jax.tree.leaves(residuals)
        if math.prod(of.shape) not in weights or (narrow and of.dtype == x.dtype)
    ]
    found = sum(math.prod(of.shape) * of.dtype.itemsize for of in kept) / 4
    memory = plan.memory(ffn, layers=5, **layer)
    assert math.isclose(memory.activations, 5 * found, rel_tol=0.01)
    input_bytes = 64 * hidden * x.dtype.itemsize
    assert plan.memory(ffn, layers=5, remat=True, **layer).activations == 5 * input_bytes


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_layer_more_adds_what_it_keeps(optimizer, remat):
    """The largest moment has the temporaries of one layer, and what all of them keep."""
    one, *more = (
        plan_of(mesh_of(ep=4, tp=1)).memory(48, layers=n, optimizer=optimizer, remat=remat) for n in (1, 2, 7)
    )
    each = one.weights + one.gradients + one.optimizer + one.activations
    assert [memory.peak - one.peak for memory in more] == [each, 6 * each]
    if optimizer != "none" and not remat:  # one layer keeps nothing that its own backward pass does not count
        assert one.peak == one.backward.total + one.optimizer


@pytest.mark.parametrize("transport", ["padded", "ragged", "allgather", "hierarchy"])
def test_dispatch_alone_holds_the_worst_skew(transport):
    """Its rows are those of every rank, and grow with ep, where those of the layer stay."""
    found = {}
    for ep in (4, 8):
        plan = plan_of(mesh_of(node=2, ep=ep // 2, tp=1), transport=transport)
        memory = plan.memory(48, call="dispatch", hardware="h100")
        assert memory.forward.results == 2 * ep * 64 * 2 * 32 and memory.backward is None
        assert memory.peak == memory.forward.total and memory.weights == 0
        found[ep] = memory.receive, plan.memory(48, hardware="h100").receive
    if transport != "allgather":  # which brings all tokens to all ranks in either
        assert found[8][0] == 2 * found[4][0] and found[8][1] < 1.5 * found[4][1]


LARGE = {"tokens": 4096, "hidden": 7168, "num_experts": 256, "top_k": 8}


def large(**options):
    return plan_of(mesh_of(ep=16, tp=1), **{**LARGE, **options})


@pytest.mark.parametrize(
    "layers,options,machine,word",
    [
        (5, {}, "h100", "fits"),
        (20, {"param_dtype": "bfloat16", "optimizer": "sgd"}, "h100", "remat=True"),
        (8, {"remat": True}, "h100", "ep=32"),
        (40, {}, "h100", "remat=True and ep=128"),
        (12, {"param_dtype": "bfloat16", "optimizer": "none"}, "v5e", "ep=32"),
    ],
)
def test_the_smallest_change_fits(layers, options, machine, word):
    """The change is named in words, and a plan with it fits; smaller ones do not."""
    memory = large().memory(2048, layers=layers, hardware=machine, **options)
    words = memory.smallest_change()
    assert word in words
    assert memory.fits() == (words == "it fits")
    if memory.fits():
        memory.check_fits()
        return
    with pytest.raises(MemoryLimitError, match=f"GB per device, and one of {machine} has .* GB; it fits with {word}"):
        memory.check_fits()
    if word.startswith("ep="):
        changed = plan_of(mesh_of(ep=int(word[3:]), tp=1), **LARGE)
        assert changed.memory(2048, layers=layers, hardware=machine, **options).fits()


@pytest.mark.parametrize("before", [{"ep": 4, "tp": 1}, {"ep": 1, "tp": 1}, {"ep": 2, "tp": 2}])
@pytest.mark.parametrize("tokens", [16, 4096])
def test_a_change_is_the_plan_that_would_be_made(before, tokens):
    """With the capacity that ``make_plan`` would give it, up to a row, since the advice must hold for that plan."""
    plan = plan_of(mesh_of(**before), tokens=tokens)
    changes = {
        "ep_size": plan_of(mesh_of(ep=2 * before["ep"], tp=before["tp"]), tokens=tokens),
        "tp_size": plan_of(mesh_of(ep=before["ep"], tp=2 * before["tp"]), tokens=tokens),
        "tokens_per_rank": plan_of(mesh_of(**before), tokens=tokens // 2),
    }
    for name, made in changes.items():
        changed = _resized(plan, **{name: getattr(made, name)})
        assert abs(changed.pair_capacity - made.pair_capacity) <= 1, name


def test_smaller_changes_come_first():
    """Twice as many ranks with remat is less than four times as many without."""
    memory = large().memory(2048, layers=8, hardware="h100")
    words = [change.words(memory) for change in _changes(memory)]
    assert words[0] == "remat=True" and len(set(words)) == len(words)
    order = ["capacity_factor=1.0", "ep=32", "remat=True and ep=32", "ep=64", "remat=True and ep=64"]
    assert [word for word in words if word in order] == order


def test_what_no_change_helps():
    memory = large().memory(2048, layers=10**6, hardware="v5e")
    assert "makes it fit: take a smaller model" in memory.smallest_change()
    with pytest.raises(MemoryLimitError, match="none of remat=True"):
        memory.check_fits()
    assert isinstance(MemoryLimitError("x"), MemoryError)  # as Python calls it


def test_another_machine_may_have_more():
    memory = large().memory(2048, layers=8, hardware="h100")
    assert not memory.fits() and memory.fits("b200") and memory.fits(MACHINES["b200"])
    larger = dataclasses.replace(find_machine("h100"), memory_bytes=memory.peak)
    assert memory.fits(larger) and not memory.fits(dataclasses.replace(larger, memory_bytes=memory.peak - 1))


def test_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
    assert large().memory(2048, layers=3).peak


@pytest.mark.parametrize(
    "wrong,words",
    [
        ({"optimizer": "adamm"}, "optimizer='adamm' is unknown; did you mean 'adam'"),
        ({"call": "combine"}, "call='combine' is unknown"),
        ({"layers": 0}, "layers=0"),
        ({"param_dtype": "int8"}, "param_dtype='int8'"),
        ({"remat": 1}, "remat=1 must be True or False"),
        ({"chunks": 3}, "chunks=3 does not divide tokens_per_rank=64"),
        ({"activation": "elu"}, "activation='elu'"),
        ({"hardware": "h1000"}, "hardware='h1000'"),
    ],
)
def test_wrong_arguments_are_named(wrong, words):
    with pytest.raises(InvalidArgumentError, match=words):
        plan_of(mesh_of(ep=4, tp=1)).memory(48, **wrong)


def test_ranks_of_shared_experts_are_for_dispatch():
    plan = plan_of(mesh_of(ep=4, tp=1), num_experts=12, num_shared_experts=1, num_shared_ranks=1)
    with pytest.raises(UnsupportedError, match="call='dispatch'"):
        plan.memory(48)
    assert plan.memory(48, call="dispatch").forward.results == 2 * 4 * 64 * 2 * 32
