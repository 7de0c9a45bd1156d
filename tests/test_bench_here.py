"""The prepared list for a lent device: it says what it found, goes on after what fails, and knows peaks by name."""

import json

import numpy as np
import pytest

import moe_jax as moe
from moe_jax.errors import InvalidArgumentError, UnsupportedError
from moe_jax.hardware import GPUS, PEAKS, peak_of
from moe_jax.kernels import table, xla
from moe_jax.tools.bench import here
from moe_jax.tools.cli import main

TINY = here.Workload(name="tiny", tokens=32, hidden=64, ffn=32, num_experts=4, top_k=2)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """Runs a list of steps instead of the prepared one; gives the exit code and the rows."""

    def run(*steps, **options):
        monkeypatch.setattr(here, "make_steps", lambda mesh: list(steps))
        code = here.run(json_path=str(tmp_path / "rows"), **options)
        return code, rows_of(tmp_path / "rows")

    return run


def step(name, rows=(), error=None, seconds=1.0):
    def run():
        yield from rows
        if error is not None:
            raise error

    return here.Step(name=name, seconds=seconds, run=run)


@pytest.mark.slow
def test_products_are_checked_and_timed(listed, capsys):
    """Real rows of one back end, on the device of the tests; every row names it."""
    device = moe.make_mesh().devices.flat[0]
    code, rows = listed(
        step("products", here.product_checks("xla", "bfloat16", [(20, 8, 6)])),
        step("times", here._product_times(device, TINY, "xla")),
    )
    assert code == 0 and {row["device"] for row in rows} == {device.device_kind}
    (check,) = (row for row in rows if row["event"] == "check")
    assert check["passed"] and check["cases"] == 4 and check["worst"] == 0
    times = [row for row in rows if row["event"] == "time"]
    assert [row["what"] for row in times] == ["products x @ w", "products ct @ w^T", "products x^T @ ct"]
    for row in times:
        assert row["flops"] == 2 * 64 * 64 * 32 and row["least_bytes"] == 2 * (64 * 64 + 4 * 64 * 32 + 64 * 32)
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"]["median"])
        assert row["share_of_peak"] is None  # of a CPU
    text = capsys.readouterr().out
    assert text.startswith("moe_jax bench on cpu (cpu), JAX ") and "about 0 minutes, at most 9" in text
    assert "tiny       products x^T @ ct" in text and "no peak known" in text
    assert text.splitlines()[-1].startswith("all is well; ") and text.splitlines()[-1].endswith(" s on cpu")


def test_what_fails_is_a_row_and_the_rest_goes_on(listed, capsys):
    bad = here._check("a law", "a subject", [0.0, float("nan")], 1.0)
    good = here._check("a law", "another", [0.0], 0.0)
    code, rows = listed(
        step("dies", [good], RuntimeError("CUDA_ERROR")),
        step("refuses", error=UnsupportedError("not on this device")),
        step("wrong", [bad]),
        step("long", [good], seconds=1e9),
        step("last", [good]),
    )
    assert code == 1
    told = [row for row in rows if row["event"] not in ("step", "here")]
    found = [(row["event"], row.get("what", row.get("subject"))) for row in told]
    assert found[:4] == [("check", "another"), ("failed", "dies"), ("refused", "refuses"), ("check", "a subject")]
    assert found[4:] == [("left out", "long"), ("check", "another"), ("end", None)]
    assert rows[-1]["good"] is False and not bad["passed"]
    text = capsys.readouterr().out
    for line in ("dies: failed: RuntimeError: CUDA_ERROR", "refuses: refused: not on this device", "FAILED", "NOT all"):
        assert line in text


@pytest.mark.parametrize("steps", [[step("refuses", error=UnsupportedError("no"))], [step("long", seconds=1e9)]])
def test_a_refusal_is_no_failure_and_what_is_left_out_is(listed, steps):
    assert listed(*steps)[0] == (steps[0].name == "long")


@pytest.mark.parametrize("kernel", ["grouped_matmul", "grouped_outer"])
def test_a_wrong_product_fails_and_has_no_time(monkeypatch, kernel):
    """In the check of the laws, and at the sizes that are timed."""
    good = {"grouped_matmul": xla.grouped_matmul, "grouped_outer": xla.grouped_outer}
    bad = {**good, kernel: lambda *operands, **static: good[kernel](*operands, **static) * 1.25}
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))
    moe.register_backend(moe.Backend(name="wrong", kernels=bad))
    assert "wrong" in here.backends_for("cpu")
    (law,) = here.product_checks("wrong", "float32", [(20, 8, 6)])
    assert not law["passed"] and law["worst"] > 0
    rows = list(here._product_times(moe.make_mesh().devices.flat[0], TINY, "wrong"))
    failed = [row for row in rows if row["event"] == "check"]
    assert len(failed) == (2 if kernel == "grouped_matmul" else 1) and not any(row["passed"] for row in failed)
    assert len(rows) == 3


def test_the_list_takes_the_back_ends_that_are_registered(monkeypatch):
    monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))
    kernels = {"grouped_matmul": xla.grouped_matmul, "grouped_outer": xla.grouped_outer}
    moe.register_backend(moe.Backend(name="for_gpus", platforms=("gpu",), kernels=kernels))
    moe.register_backend(moe.Backend(name="moves_only", platforms=("gpu",), transports={"padded": lambda *a: a}))
    assert "for_gpus" in here.backends_for("gpu") and "xla" in here.backends_for("gpu")
    assert not {"moves_only", "cpu"} & set(here.backends_for("gpu")) and "for_gpus" not in here.backends_for("cpu")
    names = [step.name for step in here.make_steps(moe.make_mesh())]
    assert len(set(names)) == len(names)
    for words in ("products xla float16", "layer bfloat16 fp8_e4m3", "layer times C", "product times 128 rows cpu"):
        assert words in names


def test_the_sizes_are_the_ones_that_were_asked_for():
    """A, B and C are an eighth of the experts and the rows of a device; then 4096 and 128 rows of 16 experts."""
    sizes = {w.name: (w.hidden, w.ffn, w.num_experts, w.top_k, w.tokens) for w in here.WORKLOADS}
    whole = {"A": (1024, 1024, 32, 4, 1024), "B": (2048, 768, 128, 8, 2048), "C": (7168, 2048, 64, 8, 1024)}
    assert {name: sizes[name] for name in whole} == {n: (h, f, e // 8, k, t) for n, (h, f, e, k, t) in whole.items()}
    for rows in (4096, 128):
        hidden, ffn, experts, top_k, tokens = sizes[f"{rows} rows"]
        assert (hidden, ffn, experts, top_k * tokens) == (7168, 2048, 16, rows)


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(here, "make_steps", lambda mesh: [step("nothing")])
    assert main(["bench", "--target", "here"]) == 0
    assert main(["bench", "--target", "here", "--json", "-"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["event"] for line in lines[-3:]] == ["here", "step", "end"]
    for options in (["--workloads", "W1"], ["--repeats", "3"], ["--quick"], ["--max-seconds", "9"], ["some.toml"]):
        assert main(["bench", *options, "--target", "here"]) == 2
        assert "does not go with --target here" in capsys.readouterr().err
    with pytest.raises(InvalidArgumentError, match="cannot be written"):
        here.run(json_path="/no/such/folder/rows")


@pytest.mark.slow
def test_the_whole_list_in_small(monkeypatch, tmp_path):
    monkeypatch.setattr(here, "WORKLOADS", here.WORKLOADS[-1:])
    assert here.run(json_path=str(tmp_path / "rows"), max_seconds=1e9) == 0
    rows = rows_of(tmp_path / "rows")
    checks = [row for row in rows if row["event"] == "check"]
    assert len(checks) == 3 * 2 + 3 * 3 + 3 and all(row["passed"] for row in checks)
    times = {(row["what"], row["backend"]) for row in rows if row["event"] == "time"}
    assert len(times) == 2 * 2 + 3 * 2 and ("layer, forward + backward", "cpu") in times


@pytest.mark.slow
def test_a_layer_that_is_wrong_has_no_time(monkeypatch):
    """Of the forward pass; the limit keeps its own."""
    monkeypatch.setattr(here, "_seconds_per_call", lambda program: [1.0])
    wrong = here.WrongResult("the layer is off")

    def refuse(setting, results):
        raise wrong

    monkeypatch.setattr(here, "check_layer", refuse)
    rows = list(here._layer_times(moe.make_mesh(), TINY))
    assert [row["event"] for row in rows] == ["time", "check", "time", "check"]
    assert rows[1]["reason"] == "the layer is off" and not rows[1]["passed"]


def test_peaks_by_the_name_that_jax_gives_a_device():
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA B200": "b200", "NVIDIA A100-SXM4-80GB": "a100",
        "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
    }  # fmt: skip
    for kind, name in names.items():
        assert peak_of(kind) is PEAKS[name]
    for kind in ("cpu", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090", "TPU v4"):
        assert peak_of(kind) is None
    for name, gpu in GPUS.items():
        assert PEAKS[name].memory == gpu.memory_bandwidth and PEAKS[name].source
        units = gpu.core_count * gpu.fpus_per_core * gpu.clock_rate_ghz * 2e9  # a multiplication and an addition
        assert PEAKS[name].flops32 == pytest.approx(units, rel=0.02) and np.isfinite(PEAKS[name].flops16)
