"""What the compilers for TPU and GPU make of the layer, in exact figures; skipped without the compilers.

Workloads A, B and C on eight devices, and A64 on one that holds all 64 experts; see ``moe_jax.tools.bench.facts``. A
few are for every run of the tests that need compilers; all others are slow as well.
"""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from helpers import mesh_of, needs
from jax.sharding import AbstractMesh

import moe_jax as moe
from moe_jax import reference
from moe_jax.hlo.text import array_extents
from moe_jax.tools.bench import facts
from moe_jax.tools.bench.baselines import minimal_layer
from moe_jax.tools.bench.programs import PASSES
from moe_jax.tools.cli import main

FORWARD, BOTH = PASSES
TPUS, GPUS = ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"], ["h100:8", "b200:8"]
ALONE = ["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "h100:1", "b200:1"]
CASES = [(target, name) for target in (*TPUS, *GPUS) for name in ("A", "B", "C")] + [
    (target, "A64") for target in ALONE
]

FEW = [("v5e:2x4", "A"), ("v5p:2x2x2", "B"), ("h100:8", "A"), ("v5e:1x1", "A64"), ("h100:1", "A64")]

# Million priced cycles of all that neither multiplies nor communicates, forward and with the backward pass.
CYCLES = {
    ("v5e:2x4", "A"): (0.27, 0.62),
    ("v5p:2x2x2", "A"): (0.25, 0.44),
    ("v5e:2x4", "B"): (0.87, 2.45),
    ("v5p:2x2x2", "B"): (0.50, 1.26),
    ("v5p:2x2x2", "C"): (0.57, 1.69),
}
TEMPORARY_MB = {"B": 977, "C": 2396}  # with the backward pass, on TPUs
# Times the bytes of the rows, on GPUs, forward, with routing and bookkeeping: rows gathered on either side of the
# exchange, and summed. Nothing passes over rows at the experts but the products.
GPU_BYTES = 6.0
INSTRUCTIONS = {"cpu:8": 2.1, "v5p:2x2x2": 2.0, "h100:8": 2.0}  # times those of the minimal layer

compiled = functools.cache(facts.facts_of)


def programs(cases):
    """(target, workload) for ``parametrize``, each with its mark."""
    few, others = [pytest.mark.compilers], [pytest.mark.compilers, pytest.mark.slow]
    return [pytest.param(*case, marks=few if case in FEW else others) for case in cases]


def layer_of(target, name, phase, what=facts.OURS):
    """(Facts, TargetReport) of a program that is compiled once for all tests."""
    needs(target)
    return compiled(target, name, phase, what)


def plan_of_facts(target, name):
    """The plan of a program of ``layer_of``, for its machine."""
    mesh = AbstractMesh((8, 1), ("ep", "tp"))
    workload = facts.WORKLOADS[name]
    return moe.make_plan(
        mesh,
        tokens_per_rank=workload.tokens,
        hidden=workload.hidden,
        num_experts=workload.num_experts,
        top_k=workload.top_k,
        dtype=facts.DTYPE,
        transport="padded",
        hardware=target.split(":")[0],
    )


@pytest.mark.parametrize("phase", PASSES)
@pytest.mark.parametrize("target,name", programs(CASES))
def test_products_multiply_the_rows_that_are_routed(target, name, phase):
    """Router and padding of tiles included, which is at most 15 %; products are not dense over all experts.

    Kernels declare the most that the borders of groups can add; of 64 groups of 64 rows that is more on TPUs.
    """
    found, report = layer_of(target, name, phase)
    most = 1.3 if name == "A64" and report.platform == "tpu" else 1.15
    assert found.routed_flops <= found.flops <= most * found.routed_flops, str(found)
    assert not report.float_scatters


@pytest.mark.parametrize("phase", PASSES)
@pytest.mark.parametrize("target,name", programs(CASES))
def test_no_buffer_of_rows_times_groups(target, name, phase):
    """As masks of rows by group would be; the weights themselves may be larger than rows are."""
    _, report = layer_of(target, name, phase)
    sizes = facts.WORKLOADS[name]
    groups = sizes.num_experts // report.num_devices
    weights = sorted((groups, sizes.hidden, sizes.ffn))
    largest = sizes.tokens * sizes.top_k * groups * min(sizes.hidden, sizes.ffn)
    for buffer in report.largest_buffers:
        extents = array_extents(buffer.shape)
        is_weights = sorted(n for n in extents if n > 1) == weights
        assert is_weights or math.prod(extents) < largest, buffer


@pytest.mark.parametrize("target,name", programs(CYCLES))
def test_cycles_beside_products(target, name):
    for phase, most in zip(PASSES, CYCLES[target, name], strict=True):
        found, _ = layer_of(target, name, phase)
        assert found.other_cycles <= most * 1e6, str(found)


@pytest.mark.parametrize("target,name", programs((target, name) for target in TPUS for name in TEMPORARY_MB))
def test_temporaries(target, name):
    found, _ = layer_of(target, name, BOTH)
    assert found.temporary_bytes <= TEMPORARY_MB[name] * 1e6, str(found)


@pytest.mark.parametrize("target,name", programs(case for case in CASES if case[0][0] in "hb"))
def test_bytes_beside_products_on_gpus(target, name):
    found, _ = layer_of(target, name, FORWARD)
    assert found.other_bytes <= GPU_BYTES * found.row_bytes, str(found)


@pytest.mark.parametrize("passes,phase", list(enumerate(PASSES)))
@pytest.mark.parametrize("target,name", programs(case for case in CASES if case[0] == "h100:8"))
def test_a_plan_counts_what_the_products_of_a_gpu_touch(target, name, passes, phase):
    """Bytes that kernels read and write, where they activate too: those of a plan, for slots that are all full."""
    _, report = layer_of(target, name, phase)
    plan, workload = plan_of_facts(target, name), facts.WORKLOADS[name]
    cost = plan.cost(workload.ffn)[phase]
    found = {step.name: step.traffic_bytes for step in cost.phases}
    weights = 3 * plan.num_local_experts * workload.hidden * workload.ffn
    casts = (1 + passes) * weights * (4 + 2)  # of parameters in fp32, and these are narrow
    touched = found["products"] - casts - (1 + 2 * passes) * 2 * weights
    full = touched * plan.num_rows(plan.pair_capacity) / plan.num_pairs + (1 + 2 * passes) * 2 * weights
    assert report.work.product_bytes == pytest.approx(full + found["route"], rel=0.03)
    inner = plan.num_pairs * workload.ffn * 2
    assert found["activation"] == 6 * inner * passes  # one pass of the derivative alone: three read, three written


@pytest.mark.parametrize("target,name", programs(case for case in CASES if case[0] == "h100:8"))
def test_a_plan_counts_the_passes_of_a_gpu_over_rows(target, name):
    """Forward: each side of the exchange, and the sum. A plan counts a token as often as a pair reads it."""
    found, _ = layer_of(target, name, FORWARD)
    plan, workload = plan_of_facts(target, name), facts.WORKLOADS[name]
    row, slots = 2 * workload.hidden, plan.num_rows(plan.pair_capacity)
    phases = {step.name: step.traffic_bytes for step in plan.cost(workload.ffn)["forward"].phases}
    exchanged, read_again = 2 * 2 * slots * row, (slots - workload.tokens) * row
    counted = phases["dispatch"] + phases["combine"] + phases["activation"] - exchanged - read_again
    assert counted == pytest.approx(found.other_bytes, rel=0.1)


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("cpu:8", marks=pytest.mark.slow),
        pytest.param("v5p:2x2x2", marks=[pytest.mark.compilers, pytest.mark.slow]),
        pytest.param("h100:8", marks=pytest.mark.compilers),
    ],
)
def test_little_more_to_compile_than_a_layer_by_hand(target):
    for phase in PASSES:
        ours, minimal = (layer_of(target, "A", phase, what)[0] for what in (facts.OURS, facts.MINIMAL))
        assert ours.num_instructions <= INSTRUCTIONS[target] * minimal.num_instructions, f"{ours}\n{minimal}"


@pytest.mark.parametrize("phase", PASSES)
@pytest.mark.parametrize("target,name", programs((target, "A64") for target in ALONE))
def test_one_device_has_nothing_of_an_exchange(target, name, phase):
    """Rows are gathered twice forward and twice backward, and their places sorted once; no loop is of data's length."""
    found, report = layer_of(target, name, phase)
    assert not report.collectives and not report.uncounted_loops
    gathered = found.row_bytes * (2 if phase == FORWARD else 4)
    assert gathered <= found.gather_bytes <= 1.01 * gathered


# --- the instruments --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_minimal_layer_is_one():
    """Equal to the float64 oracle where nothing is dropped; what is dropped is counted."""
    mesh = mesh_of(4, 1)
    sizes = {"tokens_per_rank": 8, "hidden": 16, "num_experts": 8, "top_k": 2, "dtype": "float32"}
    x = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    for factor in (4.0, 0.25):
        plan = moe.make_plan(mesh, **sizes, capacity_factor=factor)
        init, _ = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=8)
        params = init(jax.random.key(0))
        y, dropped = jax.jit(minimal_layer(mesh, plan, "swiglu"))(params, x)
        want, routing = reference.moe_layer(jax.tree.map(np.asarray, params), x, moe.RouterConfig(), top_k=2)
        by_pair = np.array([np.bincount(ids.ravel() // 2, minlength=4) for ids in routing.expert_ids.reshape(4, -1)])
        assert int(dropped) == np.maximum(by_pair - plan.pair_capacity, 0).sum()
        assert (np.abs(y - want).max() <= 1e-5 * np.abs(want).max()) == (factor == 4.0)


def test_the_table_by_hand():
    one = facts.Facts(
        target="v5e:2x4", workload="A", phase=FORWARD, what=facts.OURS, routed_flops=100, flops=110, row_bytes=10,
        other_bytes=35, other_cycles=1_250_000, gather_bytes=3_000_000, temporary_bytes=7_000_000,
        num_instructions=1500, compile_seconds=12.3, uncounted_loops=1,
    )  # fmt: skip
    both = dataclasses.replace(one, phase=BOTH, flops=120, temporary_bytes=9_000_000)
    by_hand = dataclasses.replace(one, target="h100:8", what=facts.MINIMAL, other_cycles=None)
    lines = facts.table([one, both, by_hand]).splitlines()
    assert lines[2] == "| v5e:2x4 | A | 1.10 / 1.20 | 1.25 | 3.5 | 3 | 7 / 9 | 1,500 | 12 |"
    assert lines[3] == "| h100:8 | A, minimal | 1.10 | - | 3.5 | 3 | 7 | 1,500 | 12 |"
    assert len({line.count("|") for line in lines}) == 1
    assert "1.10 x routed flops, 1.25 M other cycles, 3.5 x rows other bytes" in str(one)


@pytest.mark.parametrize(
    "options,text",
    [
        (["--target", "v9"], "target='v9' is unknown"),
        (["--target", "cpu:1", "--workloads", "W1"], "workloads='W1'"),
        (["--target", "cpu:1", "--against", "one-hot capacity"], "against='one-hot capacity'"),
        (["--target", "cpu:1", "--quick"], "--quick does not go with --target cpu:1"),
    ],
)
def test_bad_options_are_named(options, text, capsys):
    assert main(["bench", *options]) == 2
    assert text in capsys.readouterr().err
