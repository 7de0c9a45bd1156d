"""`python -m moe_jax eplb`: reads loads, says the gain that its files hold, and writes nothing where it cannot."""

import json

import numpy as np
import pytest

import moe_jax as moe
from moe_jax.tools import eplb
from moe_jax.tools.cli import main

LOADS = [[100, 1, 1, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5, 5, 5]]


@pytest.fixture
def loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "loads.json"
    path.write_text(json.dumps(LOADS))
    return path


def test_says_what_it_gains_and_writes_it_down(loads, capsys):
    assert main(["eplb", str(loads), "--ranks", "4", "--redundant", "4", "--out", "placed"]) == 0
    text = capsys.readouterr().out
    folder = loads.parent / "placed"
    placement = moe.Placement.from_json((folder / "placement.json").read_text())
    assert (placement.num_ranks, placement.num_physical_experts, placement.replica_counts[0, 0]) == (4, 12, 4)
    assert json.loads((folder / "tables.json").read_text()) == placement.table().tolist()
    assert (folder / "load.png").read_bytes().startswith(b"\x89PNG")
    # In order, the rank of expert 0 has 101 of 108 in the first layer, and all ranks have the same in the second.
    worst, mean = 101 / 27, (101 / 27 + 1) / 2
    assert f"{mean:.3f}" in text and f"{worst:.3f}" in text
    assert f"{moe.expected_imbalance(np.array(LOADS), placement).max():.3f}" in text
    assert "most replicas: 4, of expert 0 in layer 0" in text


def test_json_and_one_layer(loads, capsys):
    loads.write_text(json.dumps(LOADS[0]))
    assert main(["eplb", str(loads), "--ranks", "2", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["before"] == [103 / 54] and record["after"] == [103 / 54]  # no better way without replicas
    assert (record["event"], record["layers"], record["redundant"]) == ("eplb", 1, 0) and len(record["files"]) == 3


def test_metrics_of_a_run(loads, capsys):
    """Steps are summed; other records are passed over, and half a line at the end of a run that is under way."""
    steps = [{"step": s, "loss": 1.0, "load": (s * np.array(LOADS)).tolist()} for s in (1, 2, 3)]
    lines = [*steps, {"step": 3, "validation_loss": 2.0}, {"step": 3, "sample": "x"}]
    metrics = loads.parent / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + json.dumps(steps[0])[:30])
    after = []
    for options in ([], ["--steps", "1"]):
        assert main(["eplb", str(metrics), "--ranks", "4", "--redundant", "4", "--json", *options]) == 0
        after.append(json.loads(capsys.readouterr().out)["after"])
    assert main(["eplb", str(loads), "--ranks", "4", "--redundant", "4", "--json"]) == 0
    assert after == [json.loads(capsys.readouterr().out)["after"]] * 2


@pytest.mark.parametrize(
    ("text", "arguments", "named"),
    [
        (None, ["--ranks", "4"], "cannot be read"),
        ("{}", ["--ranks", "4"], "holds no list"),
        ("[[1, 2], [3]]", ["--ranks", "1"], "holds no loads"),
        ("nonsense", ["--ranks", "4"], "holds no loads"),
        ("[1, 2, 3, 4]", ["--ranks", "3"], "--ranks=3 does not divide the 4 slots"),
        (
            "[1, 2, 3, 4]",
            ["--ranks", "3", "--redundant", "1"],
            "--redundant=1; every rank has as many slots: pass --red",
        ),
        ("[1, 2, 3, 4]", ["--ranks", "0"], "--ranks=0"),
        ("[1, 2, 3, 4]", ["--ranks", "2", "--groups", "3"], "--groups=3 does not divide the 4 experts"),
        ("[1, 2, 3, 4]", ["--ranks", "2", "--groups", "0"], "--groups=0"),
        ("[1, 2, 3, 4]", ["--ranks", "2", "--groups", "4", "--nodes", "4"], "--nodes=4 does not divide --ranks=2"),
        ("[1, 2, 3, 4]", ["--ranks", "2", "--nodes", "-1"], "--nodes=-1"),
        ("[1, 2, 3, 4]", ["--ranks", "2", "--redundant", "-2"], "--redundant=-2"),
        ("[1, 2, 3, 4]", ["--ranks", "2", "--steps", "2"], "--steps"),
        ("[1, -2, 3, 4]", ["--ranks", "2"], "loads.json: load[1] is -2.0"),
        ("[]", ["--ranks", "2"], "loads.json: load has shape (0,)"),
        ("[1, 2, 3, 4]", ["--ranks", "2", "--out", "loads.json"], "cannot be written"),
        ("[1, 2, 3, 4]", [], "--ranks"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(loads, capsys, text, arguments, named):
    loads.unlink() if text is None else loads.write_text(text)
    assert main(["eplb", str(loads), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error
    assert "num_" not in error  # a person gave options, and no arguments of rebalance
    assert {path.name for path in loads.parent.iterdir()} <= {"loads.json"}


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "redundant"), [(2, 1), (2, 2), (6, 2)])
def test_sizes_are_refused_where_rebalance_refuses_them(loads, capsys, ranks, redundant, groups, nodes):
    load, legal = np.arange(1, 5), True
    try:
        sizes = {"num_ranks": ranks, "num_groups": groups, "num_nodes": nodes}
        moe.rebalance(load, num_physical_experts=len(load) + redundant, **sizes)
    except moe.errors.InvalidArgumentError:
        legal = False
    loads.write_text(json.dumps(load.tolist()))
    options = {"--ranks": ranks, "--redundant": redundant, "--groups": groups, "--nodes": nodes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eplb, "find", lambda name: None)  # no picture
        code = main(["eplb", str(loads), *(str(word) for option in options.items() for word in option)])
    assert code == (0 if legal else 2) and "num_" not in capsys.readouterr().err


def test_lines_without_loads(loads, capsys):
    metrics = loads.parent / "metrics.jsonl"
    metrics.write_text('{"step": 1, "sample": "x"}\n')
    assert main(["eplb", str(metrics), "--ranks", "4"]) == 2
    assert "no line has a load" in capsys.readouterr().err
