"""`python -m moe_jax stragglers`: every fault that is put into the exchange is found, and what a person reads."""

import json

import numpy as np
import pytest

from moe_jax import errors
from moe_jax.elastic.wait_matrix import find_stragglers
from moe_jax.tools.cli import main
from moe_jax.tools.stragglers.faults import parse_duration, parse_faults
from moe_jax.tools.stragglers.picture import draw_waits, heat_map
from moe_jax.tools.train.launch import run_processes

LEAST = "50ms"


def rehearse(capsys, *faults, mesh="ep=8", steps=6, options=()):
    """Times so many steps with ``faults``; what was printed as JSON, and what was found.

    So few steps, on cores that others use too, would find something slow by chance, but nothing of many milliseconds.
    """
    injected = [word for fault in faults for word in ("--inject", fault)]
    measured = ["stragglers", "--mesh", mesh, "--steps", str(steps), "--at-least", LEAST]
    assert main([*measured, "--json", *injected, *options]) == 0
    record = json.loads(capsys.readouterr().out)
    return record, {(one["kind"], one["source"], one["receiver"]) for one in record["stragglers"]}


def test_three_faults_at_once(capsys, tmp_path):
    """Of each kind one; the file that is written says the same when it is read again."""
    file = str(tmp_path / "waits.json")
    faults = ("compute:2=150ms", "receiver:3=100ms", "link:0-1=200ms")
    record, found = rehearse(capsys, *faults, mesh="ep=4", options=("--out", file))
    assert found == {("compute", 2, None), ("receiver", None, 3), ("link", 0, 1)}, record
    late = {one["kind"]: one["microseconds"] for one in record["stragglers"]}
    assert late["compute"] > 120_000 and late["receiver"] > 200_000 and late["link"] > 400_000  # two blocks in a step
    assert (record["event"], record["ranks"], record["steps"], record["warm_up"]) == ("stragglers", 4, 4, 2)
    assert record["files"] == [file]
    assert main(["stragglers", "--from", file, "--at-least", LEAST, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record | {"files": []}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "found", "mesh"),
    [
        ("compute:7=150ms", ("compute", 7, None), "ep=8"),
        ("receiver:3=100ms", ("receiver", None, 3), "ep=8"),
        ("sender:0=100ms", ("sender", 0, None), "ep=8"),
        ("link:1-5=150ms", ("link", 1, 5), "ep=8,nodes=2"),
    ],
)
def test_each_fault_alone(capsys, fault, found, mesh):
    record, names = rehearse(capsys, fault, mesh=mesh)
    assert names == {found}, record


@pytest.mark.slow
def test_several_processes(capfd):
    """The first one prints what all of them waited."""
    faults = ["--inject", "compute:3=300ms", "--inject", "link:0-2=300ms"]
    assert (
        run_processes(["stragglers", "--mesh", "ep=4", "--steps", "5", "--at-least", LEAST, "--json", *faults], 2) == 0
    )
    (record,) = map(json.loads, capfd.readouterr().out.splitlines())
    found = {(one["kind"], one["source"], one["receiver"]) for one in record["stragglers"]}
    assert found == {("compute", 3, None), ("link", 0, 2)}, record


@pytest.mark.slow
def test_the_layer_of_a_configuration(capsys, tmp_path):
    path = tmp_path / "layer.toml"
    path.write_text(
        "[mesh]\nep = 4\n[moe]\nnum_experts = 8\ntop_k = 2\nffn = 32\nactivation = 'gelu'\n[model]\nlayers = 1\n"
        "hidden = 16\nheads = 2\nseq_len = 16\n"
    )
    assert main(["stragglers", str(path), "--steps", "4", "--at-least", LEAST, "--inject", "sender:1=150ms"]) == 0
    assert "slow sender 1:" in capsys.readouterr().out


# What a person reads, of waits from a file.

READY = np.zeros((3, 4, 4))
READY[:, :, 2] = [900, 20_000, 0, 19_000]
TRAVEL = np.full((3, 4, 4), 400.0)
TRAVEL[:, 1, 0] = 7_000
TEXT = """\
four ranks: 2 steps, after 1 that are left out
How long each rank (row) waited for each other one (column) in a step, median over steps:

        0  1  2  3
rank 0  ·     ░░
rank 1  ▓▓ ·  ██
rank 2        ·
rank 3        ██ ·
blank below 0.8 ms, ░ from 0.8 ms, ▒ from 2.1 ms, ▓ from 5.7 ms, █ from 15.3 ms

slow compute on rank 2: the others wait 19.0 ms until it is ready, and 0 us for another rank, in all steps
slow link 0-1: blocks of rank 0 take 7.0 ms to come to rank 1 alone, and 0.4 ms on another link, in all steps
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "waits.json"
    path.write_text(json.dumps({"where": "four ranks", "ready": READY.tolist(), "travel": TRAVEL.tolist()}))
    return path


def test_map_and_verdict(file, capsys):
    assert main(["stragglers", "--from", str(file), "--warm-up", "1", "--picture", "waits.png"]) == 0
    assert capsys.readouterr().out == TEXT + "wrote waits.png\n"
    assert (file.parent / "waits.png").read_bytes().startswith(b"\x89PNG")


def test_a_machine_on_which_nothing_stands_out(file, capsys):
    file.write_text(json.dumps({"ready": (0 * READY).tolist(), "travel": (0 * READY + 300).tolist()}))
    assert main(["stragglers", "--from", str(file)]) == 0
    text = capsys.readouterr().out
    assert "no rank and no link stands out: ranks wait 0.3 ms for each other, and 0.3 ms at most" in text
    assert not set("░▒▓█") & set(text.split("blank")[0]) and text.startswith(f"{file}: 1 steps")


def test_map_of_many_ranks():
    """One character for each of 30 ranks, whose numbers stand digit below digit."""
    waits = np.full((30, 30), 100.0)
    waits[:, 12] = 9_000
    waits[7] += 800
    lines = heat_map(waits).splitlines()
    assert lines[0] == f"{'':8}{' ' * 10}{'1' * 10}{'2' * 10}" and lines[1] == f"{'':8}{'0123456789' * 3}"
    assert lines[2 + 12] == f"rank 12 {'':12}·"
    assert lines[2 + 7] == f"rank 7  {'▒' * 7}·{'▒' * 4}█{'▒' * 17}" and lines[2] == f"rank 0  ·{'':11}█"
    assert len(lines) == 2 + 30 + 1 and max(map(len, lines[:-1])) == 38


def test_the_picture_has_both_parts():
    figure = draw_waits(READY[0], TRAVEL[0], "four ranks", find_stragglers(READY, TRAVEL))
    for axes, part in zip(figure.axes, (READY[0], TRAVEL[0]), strict=False):
        shown = axes.images[0].get_array()
        off = ~np.eye(4, dtype=bool)
        np.testing.assert_allclose(shown[off], np.maximum(part, 1)[off] / 1e3)
        assert np.ma.getmaskarray(shown)[~off].all()
    assert "slow compute on rank 2" in figure.get_suptitle()


# What is read.


def test_faults_add_up():
    delays = parse_faults(["compute:1=20ms", "compute:1=1 s", "receiver:0=2ms", "sender:2=300us", "link:2-0=1.5ms"], 3)
    np.testing.assert_allclose(delays.compute, [0, 1.02, 0])
    np.testing.assert_allclose(delays.travel, [[2e-3, 2e-3, 3.8e-3], [0, 0, 3e-4], [0, 0, 3e-4]])
    for text in ("20", "ms", "-1ms", "1e3ms", "20 min"):
        with pytest.raises(errors.InvalidArgumentError, match="is no time; write a number and a unit"):
            parse_duration("--at-least", text)


BAD = [
    (["--inject", "compute=20ms"], "compute=20ms"),
    (["--inject", "node:1=20ms"], "write compute:3=20ms"),
    (["--inject", "compute:8=20ms"], "names rank 8; the mesh has the ranks 0 to 7"),
    (["--inject", "link:1-1=20ms"], "no link to itself"),
    (["--inject", "link:1-9=20ms"], "names rank 9"),
    (["--inject", "compute:1=20"], "'20' is no time"),
    (["--at-least", "fast"], "--at-least: 'fast' is no time"),
    (["--steps", "0"], "--steps=0"),
    (["--steps", "2"], "--warm-up 2 leaves none of --steps 2"),
    (["--warm-up", "-1"], "--warm-up=-1"),
    (["--mesh", "ep=4,tp=2"], "as in --mesh ep=8"),
    (["--mesh", "ep=1"], "the mesh has one rank"),
    (["--picture", "waits.txt"], "must end in .png"),
    (["--out", "nowhere/waits.json"], "--out='nowhere/waits.json' cannot be written"),
    (["--from", "none.json"], "none.json: cannot be read"),
    (["--from", "waits.json", "--steps", "3"], "--steps does not go with --from"),
    (["--from", "waits.json", "--inject", "compute:1=20ms"], "--inject does not go with --from"),
    (["--from", "waits.json", "--mesh", "ep=8"], "--mesh does not go with --from"),
    (["--from", "waits.json", "--out", "again.json"], "--out does not go with --from"),
    (["layer.toml"], "no [model] section"),
    (["transport.toml"], "transport='hierarchy' has no exchange between pairs of ranks"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_bad_input_is_one_sentence(file, capsys, arguments, named):
    layer = "[mesh]\nep = 8\n[moe]\nnum_experts = 8\ntop_k = 2\nffn = 32\n"
    model = "[model]\nlayers = 1\nhidden = 16\nheads = 2\nseq_len = 16\n"
    (file.parent / "layer.toml").write_text(layer)
    (file.parent / "transport.toml").write_text(f"{layer}transport = 'hierarchy'\n{model}")
    before = set(file.parent.iterdir())
    assert main(["stragglers", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error
    assert set(file.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nonsense", "holds no waits"),
        ("[]", "holds no waits"),
        ('{"ready": [[[0, 1], [1, 0]]]}', "no 'travel'"),
        ('{"ready": [[0, 1], [1, 0]], "travel": [[0, 1], [1, 0]]}', "ready has shape (2, 2)"),
        ('{"ready": [[[0, 1], [1, 0]]], "travel": [[[0, -1], [1, 0]]]}', "travel has a negative number"),
        ('{"ready": [[[0, "x"], [1, 0]]], "travel": [[[0, 1], [1, 0]]]}', "ready has dtype"),
        ('{"ready": [[[0, 1], [1]]], "travel": [[[0, 1], [1, 0]]]}', "holds no waits"),
    ],
)
def test_a_file_that_holds_something_else(file, capsys, text, named):
    file.write_text(text)
    assert main(["stragglers", "--from", str(file), "--warm-up", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error and "pass what --out wrote" in error
