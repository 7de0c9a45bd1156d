"""The bench command: its workloads are what they say, its baselines are right, and nothing wrong gets a time."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mesh_of

import moe_jax as moe
from moe_jax import reference
from moe_jax.hlo.contract import hlo_contract
from moe_jax.quant import recipe
from moe_jax.tools.bench import check, estimate, measure, programs, report, timing
from moe_jax.tools.bench.baselines import all_experts_layer, dense_limit, minimal_layer, one_hot_layer
from moe_jax.tools.bench.workloads import WORKLOADS, Workload, expert_ids, rows_that_leave
from moe_jax.tools.cli import main

TINY = Workload(name="tiny", tokens=8, hidden=16, ffn=12, num_experts=8, top_k=2)
TOLERANCE = 1e-5  # fp32 against float64, relative to the largest entry
CONFIG = """
[mesh]
ep = 2
[moe]
num_experts = 4
top_k = 2
ffn = 8
transport = "padded"
[model]
layers = 1
hidden = 8
heads = 2
seq_len = 16
[train]
steps = 50
batch_size = 4
"""


def setting_of(ep, tp, workload=TINY, quant="none"):
    return programs.make_setting(workload, mesh_of(ep, tp), "float32", quant)


def assert_close(got, expected):
    got, scale = np.asarray(got, np.float64), np.abs(expected).max()
    assert got.shape == expected.shape and np.abs(got - expected).max() <= TOLERANCE * scale


def wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_choice_of_a_token_is_another_expert(name):
    ids = expert_ids(WORKLOADS[name], 8 * WORKLOADS[name].tokens, 8)
    assert ids.min() >= 0 and ids.max() < WORKLOADS[name].num_experts
    assert all(len(set(row)) == WORKLOADS[name].top_k for row in ids.tolist())


@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W4"])
def test_balanced_is_balanced_for_experts_and_for_pairs_of_ranks(name):
    workload, ranks = WORKLOADS[name], 8
    ids = expert_ids(workload, ranks * workload.tokens, ranks)
    load = np.bincount(ids.ravel(), minlength=workload.num_experts)
    assert set(load) == {ids.size // workload.num_experts}
    for device in range(ranks):
        mine = ids[device * workload.tokens : (device + 1) * workload.tokens] // (workload.num_experts // ranks)
        assert set(np.bincount(mine.ravel(), minlength=ranks)) == {workload.tokens * workload.top_k // ranks}


def test_zipf_has_the_stated_exponent():
    """One choice per token: frequencies within 5 standard deviations of (e + 1)^-1.2."""
    workload = dataclasses.replace(WORKLOADS["W5"], top_k=1)
    num_tokens = 100_000
    load = np.bincount(expert_ids(workload, num_tokens, 8).ravel(), minlength=32)
    weights = np.array([1 / math.pow(e + 1, 1.2) for e in range(32)])
    expected = num_tokens * weights / weights.sum()
    assert np.all(np.abs(load - expected) <= 5 * np.sqrt(expected))


def test_one_rank_gets_everything_evenly():
    ids = expert_ids(WORKLOADS["W6"], 8 * 1024, 8)
    assert list(np.bincount(ids.ravel())) == [8 * 1024] * 4  # rank 0 holds experts 0 to 3


@pytest.mark.parametrize("ep,tp", [(4, 2), (2, 1), (1, 2)])
@pytest.mark.parametrize("pattern", ["balanced", "zipf", "one rank"])
def test_rows_that_leave(ep, tp, pattern):
    workload, leaving = dataclasses.replace(TINY, pattern=pattern), 0
    plan, _, _ = programs.make_layer(workload, mesh_of(ep, tp), "float32", "none")
    ids = expert_ids(workload, 8 * ep * tp, ep)
    for device in range(ep * tp):
        for token in range(8):
            for expert in ids[device * 8 + token]:
                leaving += expert // (8 // ep) != device // tp
    assert rows_that_leave(ids, plan) == leaving / (ep * tp)


BASELINE_MESHES = [(4, 2), pytest.param(2, 1, marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.quick("gelu-4-2-minimal_layer")
@pytest.mark.parametrize("make", [minimal_layer, one_hot_layer, all_experts_layer])
@pytest.mark.parametrize("activation,ep,tp", [("gelu", 4, 2), ("swiglu", 2, 1)])
def test_baselines_equal_the_reference(make, ep, tp, activation):
    setting = setting_of(ep, tp, dataclasses.replace(TINY, activation=activation))
    data = setting.data
    apply = make(setting.mesh, setting.plan, activation)
    (y, dropped), (d_params, d_x) = jax.jit(programs.with_backward(apply))(data.params, data.x, data.ct)
    params, x, ct = wide((data.params, data.x, data.ct))
    options = {"top_k": 2, "activation": activation}
    expected, routing = reference.moe_layer(params, x, moe.RouterConfig(), **options)
    ct_params, ct_x = reference.moe_layer_vjp(params, x, ct, moe.RouterConfig(), **options)
    assert np.array_equal(np.sort(routing.expert_ids), np.sort(data.ids)) and int(dropped) == 0
    assert_close(y, expected)
    assert_close(d_x, ct_x)
    assert set(d_params) == set(ct_params)
    for name in ct_params:
        assert_close(d_params[name], ct_params[name])


@pytest.mark.slow
@pytest.mark.parametrize("ep,tp", BASELINE_MESHES)
def test_one_hot_drops_what_does_not_fit(ep, tp):
    """Per device and expert the first 2 * T * K / E pairs stay, all first choices before the second ones."""
    setting = setting_of(ep, tp, dataclasses.replace(TINY, pattern="zipf"))
    data, kept = setting.data, np.zeros((len(setting.data.ids), 2), bool)
    params, x = wide((data.params, data.x))
    _, routing = reference.moe_layer(params, x, moe.RouterConfig(), top_k=2)
    for device in range(ep * tp):
        used = [0] * 8
        for k in range(2):
            for t in range(device * 8, device * 8 + 8):
                expert = routing.expert_ids[t, k]
                kept[t, k] = used[expert] < 4
                used[expert] += 1
    y, dropped = jax.jit(one_hot_layer(setting.mesh, setting.plan, "swiglu"))(data.params, data.x)
    assert int(dropped) == np.count_nonzero(~kept) > 0
    expected = np.zeros(x.shape)
    for t, k in np.argwhere(kept):
        weights = {name: params[name][routing.expert_ids[t, k]] for name in ("w_gate", "w_up", "w_down")}
        expected[t] += routing.combine_weights[t, k] * reference.expert_ffn(x[t : t + 1], weights, "swiglu")[0]
    assert_close(y, expected)


@pytest.mark.slow
def test_the_minimal_layer_counts_what_has_no_room():
    """All 2 x 8 pairs of each of 4 devices go to rank 0, and as many rows as a pair of ranks moves arrive."""
    setting = setting_of(4, 1, dataclasses.replace(TINY, pattern="one rank"))
    apply = minimal_layer(setting.mesh, setting.plan, "swiglu")
    dropped = jax.jit(apply)(setting.data.params, setting.data.x)[1]
    assert int(dropped) == 4 * (16 - setting.plan.pair_capacity) > 0


@pytest.mark.slow
@pytest.mark.parametrize("ep,tp", BASELINE_MESHES)
def test_dense_limit_is_every_experts_product(ep, tp):
    setting = setting_of(ep, tp)
    data, mesh = setting.data, setting.mesh
    forward, backward = map(jax.jit, dense_limit(mesh, setting.plan, "swiglu"))
    y, (d_params, d_rows) = wide(backward(data.params, data.rows, data.ct_rows))
    assert_close(forward(data.params, data.rows), y)
    params, rows, ct = wide((data.params, data.rows, data.ct_rows))
    width = 12 // tp
    assert rows.shape[:3] == (ep * tp, 8 // ep, ep * tp * 8 * 2 // 8)
    for device, local in np.ndindex(*rows.shape[:2]):
        expert, part = device // tp * (8 // ep) + local, slice(device % tp * width, (device % tp + 1) * width)
        weights = {"w_gate": params["w_gate"][expert][:, part], "w_up": params["w_up"][expert][:, part]}
        weights["w_down"] = params["w_down"][expert][part]
        assert_close(y[device, local], reference.expert_ffn(rows[device, local], weights, "swiglu"))
        ct_rows, cts = reference.expert_ffn_vjp(ct[device, local], rows[device, local], weights, "swiglu")
        assert_close(d_rows[device, local], ct_rows)
        for name, expected in cts.items():
            assert_close(d_params[name][device, local], expected)


def test_dense_limit_has_no_collectives():
    setting = setting_of(4, 2)
    limit = dense_limit(setting.mesh, setting.plan, "swiglu")
    for function, arguments in zip(limit, ((), (setting.data.ct_rows,)), strict=True):
        found = hlo_contract(jax.jit(function), setting.data.params, setting.data.rows, *arguments)
        assert not found.collectives
        assert found.flops >= setting.limit_flops * (3 if arguments else 1)


@pytest.mark.slow
def test_wrong_results_are_refused():
    setting = setting_of(2, 1)
    data = setting.data
    y, stats = jax.jit(setting.apply)(data.params, data.x)
    check.check_layer(setting, (y, stats))
    with pytest.raises(check.WrongResult, match="differ in y by"):
        check.check_layer(setting, (1.001 * y, stats))
    with pytest.raises(check.WrongResult, match="not those of the workload"):
        check.check_layer(setting, (y, dataclasses.replace(stats, load=jnp.roll(stats.load, 1) + jnp.arange(8))))
    with pytest.raises(check.WrongResult, match="dropped 3 pairs"):
        check.check_layer(setting, (y, dataclasses.replace(stats, num_dropped=jnp.int32(3))))
    limit = jax.jit(dense_limit(setting.mesh, setting.plan, "swiglu")[0])(data.params, data.rows)
    check.check_limit(setting, limit)
    for wrong in (1.001 * limit, limit * jnp.nan):
        with pytest.raises(check.WrongResult, match="dense limit"):
            check.check_limit(setting, wrong)


@pytest.mark.slow
def test_a_wrong_gradient_is_refused_and_drops_are_no_error():
    setting = setting_of(2, 1)
    setting = dataclasses.replace(setting, contenders=(programs.ONE_HOT,))
    program = {p.name: p for p in programs.compile_programs(setting, "forward + backward")}[programs.ONE_HOT]
    (y, dropped), (d_params, d_x) = right = program.run()
    assert check.check_agreement(setting, program, right, right) is None
    wrong = (y, dropped), (d_params | {"w_up": 1.01 * d_params["w_up"]}, d_x)
    words = "one-hot capacity and the layer differ in the gradient of w_up by 1.0e-02"
    with pytest.raises(check.WrongResult, match=words):
        check.check_agreement(setting, program, right, wrong)
    note = check.check_agreement(setting, program, right, ((y, jnp.int32(5)), wrong[1]))
    assert note == f"5 of {2 * 8 * 2} pairs dropped"


def test_tolerances_widen_with_the_wire():
    assert check.tolerance("float32", "none") == 1e-4 < check.tolerance("bfloat16", "none")
    assert check.tolerance("float32", "int8") < check.tolerance("float32", "mx_e4m3") == 0.2


def test_quotients_and_rounds():
    order = []
    seconds = timing.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "a", "b", "b"] * 3 and [len(values) for values in seconds.values()] == [3, 3]
    assert timing.quotient([2.0, 4.0, 9.0], [1.0, 1.0, 3.0]) == {"median": 3.0, "low": 2.5, "high": 3.5}
    assert timing.quotient([6.0], [1.0, 2.0, 3.0])["median"] == 3.0


def test_estimates_by_hand():
    """At 1 flop a second the limit takes 2 * 3 * 8 * 2 * 16 * 12 s a device forward, three times that with backward."""
    limit, common = 2 * 3 * 8 * 2 * 16 * 12, {"repeats": 2, "pace": 1.0}
    alone = estimate.estimate_seconds(TINY, 1, (), max_seconds=1e9, **common)
    compiling = 3 * (1 + 6)
    assert alone == pytest.approx(compiling + 6 * (1 + 3) * (1 + 1.5) * limit)
    more = estimate.estimate_seconds(TINY, 1, ("all experts",), max_seconds=1e9, **common)
    assert more - alone == pytest.approx(3 * 6 + 6 * (1 + 3) * 4 * limit)  # 8 experts instead of 2
    assert estimate.estimate_seconds(TINY, 1, ("all experts",), max_seconds=1, **common) == alone + 3 * 6
    once = dataclasses.replace(TINY, num_experts=800)  # 400 times the limit
    assert estimate.estimate_seconds(once, 1, ("all experts",), max_seconds=1e9, **common) == pytest.approx(
        alone + 3 * 6 + (1 + 3) * 400 * limit
    )
    assert [estimate.words(seconds) for seconds in (41.2, 150.0)] == ["about 41 s", "about 2 min"]


@pytest.mark.slow
def test_minima_by_hand():
    """ep=2, balanced: half the 16 pairs of a device leave. 16 hidden, 12 ffn; 16 rows arrive, 4 experts x 4."""
    setting = setting_of(2, 1, quant="int8")
    forward, both = (measure.minima(setting, phase) for phase in programs.PASSES)
    row = recipe("int8", "float32").row_bytes(16)
    assert forward == {"wire_bytes": 8 * 2 * row, "temporary_bytes": 16 * (16 + 12) * 4, "collectives": 2}
    assert both["wire_bytes"] == 8 * (2 * row + 2 * 16 * 4) and both["collectives"] == 4
    assert both["temporary_bytes"] == 16 * (16 + 2 * 12) * 4
    assert measure.minima(setting_of(1, 1), "forward")["wire_bytes"] == 0


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(CONFIG)
    return path


@pytest.mark.slow
def test_the_command(config, tmp_path, capsys, monkeypatch):
    """Rows are printed as soon as a pass is timed: those of the first stand there when the second is compiled."""
    compile_programs, seen = measure.compile_programs, []

    def watched(setting, phase):
        seen.append(capsys.readouterr())
        yield from compile_programs(setting, phase)

    monkeypatch.setattr(measure, "compile_programs", watched)
    out = tmp_path / "out.jsonl"
    drawn = tmp_path / "bench.png"
    assert main(["bench", str(config), "--repeats", "2", "--json", str(out), "--picture", str(drawn)]) == 0
    before, between = (captured.out for captured in seen)
    assert "about" in before and "config  32 tokens" in before and "of the dense limit" not in before
    assert between.count("of the dense limit") == 1 and between.startswith("  forward\n")
    seen.append(capsys.readouterr())
    printed, progress = ("".join(texts) for texts in zip(*seen, strict=True))
    header, record = map(json.loads, out.read_text().splitlines())
    assert printed.endswith(f"\ndrew {drawn}\n") and drawn.read_bytes().startswith(b"\x89PNG")
    assert f"; {estimate.words(header['estimated_seconds'])}\n" in printed.splitlines(keepends=True)[0]
    assert header["event"] == "bench" and header["repeats"] == 2 and header["mesh"] == {"ep": 2, "tp": 1}
    assert record["workload"] == "config" and record["tokens_per_device"] == 4 * 16 // 2
    assert (record["transport"], record["dtype"], record["num_rounds"]) == ("padded", "float32", 1)
    assert set(record["phases"]) == set(programs.PASSES)
    for phase in record["phases"].values():
        assert 0 < phase["limit_over_layer"]["low"] <= phase["limit_over_layer"]["high"]
        assert set(phase["speedups"]) == set(programs.BASELINES)
        assert all(len(values) == 2 and min(values) > 0 for values in phase["seconds"].values())
        assert set(phase["seconds"]) == set(phase["contracts"]) == {"dense limit", "layer", *programs.BASELINES}
        assert phase["wire_bytes"] >= phase["minimum"]["wire_bytes"] > 0
        assert phase["contracts"]["dense limit"]["wire_bytes"] == 0
    assert record["phases"]["forward"]["minimum"]["wire_bytes"] == 32 * 8 * 4 * 2  # half of 64 pairs, fp32, two ways
    assert "of the dense limit" in printed and "faster than ragged_dot" in printed
    assert "collectives (minimum)" in printed and "(2)" in printed and "instructions (dense limit, minimal)" in printed
    assert "checked all experts, forward + backward" in progress


@pytest.mark.slow
def test_against_other_transports(config, capsys):
    """The layer's own is not compared with itself."""
    assert main(["bench", str(config), "--repeats", "2", "--against", "padded,allgather,one-hot capacity"]) == 0
    printed, progress = capsys.readouterr()
    assert "faster than allgather" in printed and "faster than one-hot capacity" in printed
    assert "faster than padded" not in printed and "faster than ragged_dot" not in printed
    assert "checked allgather, forward + backward" in progress and "the layer's transport was the fastest in" in printed


def test_transports_in_words():
    def record(name, **medians):
        quotients = {name: {"median": m, "low": m - 0.1, "high": m + 0.1} for name, m in medians.items()}
        phases = {"forward + backward": {"speedups": quotients | {"ragged_dot": None}}}
        return {"workload": name, "dtype": "float32", "quant": "none", "transport": "padded", "phases": phases}

    records = [record("W1", allgather=1.5, ragged=1.25), record("W2", allgather=0.75, ragged=0.5), record("W3")]
    assert report.describe_transports(records).splitlines() == [
        "the layer's transport was the fastest in 1 of 2, forward + backward",
        "  W2 float32 none: ragged took 0.5 (0.4 to 0.6) of the time of padded",
    ]


@pytest.mark.slow
def test_json_on_standard_output_and_a_quantised_wire(config, capsys):
    arguments = ["--repeats", "1", "--quant", "fp8_e4m3", "--dtype", "bfloat16", "--max-seconds", "1e-9", "--json", "-"]
    assert main(["bench", str(config), *arguments]) == 0
    _, record = map(json.loads, capsys.readouterr().out.splitlines())
    assert (record["dtype"], record["quant"]) == ("bfloat16", "fp8_e4m3")
    for phase in record["phases"].values():
        assert phase["speedups"] == dict.fromkeys(programs.BASELINES)
        assert all("not run: " in phase["notes"][name] for name in programs.BASELINES)
        assert set(phase["seconds"]) == {"dense limit", "layer"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "words"),
    [({"SLOW": 0, "SLOW_SECONDS": 0}, "1 run: slower than 0 layers"), ({"HEAVY": 0}, "1 run: takes 0 GiB of memory")],
)
def test_slow_and_heavy_baselines_are_run_once_and_said_so(limits, words, config, monkeypatch, capsys):
    for name, value in limits.items():
        monkeypatch.setattr(measure, name, value)
    assert main(["bench", str(config), "--repeats", "3", "--json", "-"]) == 0
    _, record = map(json.loads, capsys.readouterr().out.splitlines())
    for phase in record["phases"].values():
        assert {name: len(values) for name, values in phase["seconds"].items()} == {
            "dense limit": 3, "layer": 3, "minimal": 1, "ragged_dot": 1, "one-hot capacity": 1, "all experts": 1,
        }  # fmt: skip
        assert all(words in phase["notes"][name] for name in programs.BASELINES)


@pytest.mark.slow
def test_no_times_for_a_wrong_result(config, monkeypatch, capsys):
    def wrong_layer(*arguments):
        apply = all_experts_layer(*arguments)

        def run(params, x):
            y, dropped = apply(params, x)
            return 1.01 * y, dropped

        return run

    monkeypatch.setattr(programs, "all_experts_layer", wrong_layer)
    assert main(["bench", str(config), "--repeats", "1", "--against", "all experts", "--json", "-"]) == 1
    output, progress = capsys.readouterr()
    assert [json.loads(line)["event"] for line in output.splitlines()] == ["bench", "wrong"]
    assert "no times: all experts and the layer differ in y by 1.0e-02" in progress


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workloads", "W1,W9"], "workloads='W9' is unknown"),
        (["--dtype", "float8"], "dtype='float8' is unknown"),
        (["--quant", "int9"], "quant='int9' is unknown; did you mean 'int8'?"),
        (["--against", "allgater"], "against='allgater' is unknown; did you mean 'allgather'?"),
        (["--repeats", "0"], "repeats=0 must be a whole number of at least 1"),
        (["--repeats", "few"], "invalid int value: 'few'"),
        (["--max-seconds", "0"], "max_seconds=0.0 must be above zero"),
        (["--mesh", "ep=x"], "gives ep the extent 'x'"),
        (["--mesh", "ep=3", "--workloads", "W1"], "num_experts=16 is not divisible by ep=3"),
        (["--mesh", "ep=1,tp=3", "--workloads", "W1"], "ffn=1024 must be divisible by tp=3"),
        (["--json", "absent/out.json"], "json='absent/out.json' cannot be written"),
        (["absent.toml"], "absent.toml: cannot be read"),
    ],
)
def test_bad_input(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    output, text = capsys.readouterr()
    assert output == "" and text.startswith("moe_jax: error: ") and words in text and text.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("hidden = 8", "hidden = 4\n", "num_experts=8 exceeds model.hidden=4"),
        ("ffn = 8", "ffn = 8\nnum_shared_experts = 1", "num_shared_experts=1, and bench times routed experts only"),
        ("ffn = 8", "ffn = 8\nweigh_inputs = true", "weigh_inputs are nothing that bench times"),
    ],
)
def test_configurations_that_cannot_be_steered(config, old, new, words, capsys):
    config.write_text(CONFIG.replace(old, new).replace("num_experts = 4", "num_experts = 8"))
    assert main(["bench", str(config)]) == 2
    text = capsys.readouterr().err
    assert words in text and text.count("\n") == 1


def test_a_configuration_without_a_model(config, capsys):
    config.write_text("[moe]\nnum_experts = 4\ntop_k = 2\nffn = 8\n")
    assert main(["bench", str(config)]) == 2
    assert "has no [model] section; bench needs model.hidden" in capsys.readouterr().err
