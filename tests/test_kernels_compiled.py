"""What the compilers for TPU and GPU make of the experts: the true work, and next to nothing over rows beside it."""

import pytest
from grouped_matmul_contract import WORKLOADS
from helpers import needs

import moe_jax as moe

TPUS = ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"]
GPUS = ["a100:8", "h100:8", "h200:8", "b200:8"]


@pytest.mark.compilers
@pytest.mark.parametrize("name", WORKLOADS)
@pytest.mark.parametrize("target", TPUS)
def test_experts_do_the_true_work_forward_and_backward(target, name):
    """Three products of rows, three back, three sums for weights; padding of tiles is in what kernels declare.

    Beside them memory holds rows as wide as the hidden layer and the tokens, of which the largest with a row for each
    group, [rows, groups * width], would be many times as large.
    """
    needs(target)
    rows, hidden, ffn, groups = WORKLOADS[name]
    report = moe.compile_for(target, "target_programs:experts", rows, hidden, ffn, groups)
    print(f"{name}: flops {report.flops / (18 * rows * hidden * ffn):.3f} of the true ones\n{report}")
    kernels = {kernel.name: kernel for kernel in report.kernels}
    assert {name: kernel.executions for name, kernel in kernels.items()} == {"grouped_matmul": 6, "grouped_outer": 3}
    assert sum(kernel.flops for kernel in report.kernels) == report.flops
    assert 1.0 <= report.flops / (3 * 6 * rows * hidden * ffn) <= 1.15
    assert report.temporary_bytes <= 2 * rows * (8 * ffn + 2 * hidden)
    assert report.work.gathers == report.work.scatters == 0


@pytest.mark.compilers
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("target", GPUS)
def test_gpus_multiply_rows_in_their_slots(target, dtype):
    """Forward two kernels and nothing else; with the backward pass one pass, of the derivative of the activation.

    That pass reads gate, up and the cotangent of hidden, and writes the cotangents of both, and hidden again.
    """
    needs(target)
    (rows, hidden, ffn, groups), itemsize = WORKLOADS["A"], 4 if dtype == "float32" else 2
    for gradient, passes, counts in (
        (False, 0, {"gated_matmul": 1, "grouped_matmul": 1}),
        (True, 6, {"gated_matmul": 1, "grouped_matmul": 4, "grouped_outer": 3}),
    ):
        report = moe.compile_for(target, "target_programs:slots", rows, hidden, ffn, groups, gradient, dtype)
        print(f"{target} {dtype}: flops {report.flops / (6 * rows * hidden * ffn * (1 + 2 * gradient)):.3f}\n{report}")
        assert {kernel.name: kernel.executions for kernel in report.kernels} == counts
        assert 1.0 <= report.flops / (6 * rows * hidden * ffn * (1 + 2 * gradient)) <= 1.15
        assert report.work.gathers == report.work.scatters == 0
        assert report.work.other_bytes <= (passes + 0.01) * rows * ffn * itemsize
