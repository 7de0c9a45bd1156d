"""Pictures for reports: what is in them is what was measured or predicted, read off the axes and not off pixels."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from moe_jax.config import BalanceConfig, load_config
from moe_jax.hardware import MACHINES
from moe_jax.plan.wire import wire_bytes
from moe_jax.tools import drawing
from moe_jax.tools.bench.picture import draw_times
from moe_jax.tools.cli import main
from moe_jax.tools.planner.figures import predict
from moe_jax.tools.planner.meshes import read_mesh
from moe_jax.tools.planner.plan_picture import draw_plan
from moe_jax.tools.planner.question import Terms, ask
from moe_jax.tools.train import report
from moe_jax.tools.train.profile import StepTrace, make_profile_folder

TINY = Path(__file__).parent.parent / "configs" / "tiny.toml"
CONFIG = """
[moe]
num_experts = 64
top_k = 2
ffn = 1024
[model]
layers = 3
hidden = 512
heads = 4
seq_len = 512
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(CONFIG)
    return "small.toml"


def question(path, mesh, hardware="h100", **terms):
    machine = MACHINES[hardware]
    return ask(load_config(path), path, machine, read_mesh(mesh, machine), Terms(**terms))


def texts(figure):
    """Everything that a person reads in the figure."""
    import matplotlib.text

    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


# The plan.


@pytest.mark.parametrize(
    ("mesh", "hardware"),
    [
        ("ep=64", "h100"),
        ("ep=16,tp=2,dp=2", "h100"),
        ("ep=8,dp=8", "h100"),
        ("ep=16,tp=2", "v5p"),
        ("ep=1,dp=3", "h100"),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_bytes_of_all_pairs_are_those_of_the_phases(path, mesh, hardware, backward):
    """Of each device, over the others of its node and over those elsewhere; nobody sends to itself."""
    asked = question(path, mesh, hardware)
    plan, moe_config = asked.plan(), asked.config.moe
    cost = plan.cost(moe_config.ffn)["forward + backward" if backward else "forward"]
    sent, nodes = wire_bytes(plan, moe_config.ffn, backward=backward, most=1000)
    near = nodes[:, None] == nodes
    assert len(nodes) == asked.mesh.num_devices and not np.diag(sent).any()
    for part, phases in ((near, "inside_bytes"), (~near, "between_bytes")):
        expected = sum(getattr(phase, phases) for phase in cost.phases)
        np.testing.assert_allclose((sent * part).sum(1), expected, rtol=1e-9)
    first, _ = wire_bytes(plan, moe_config.ffn, backward=backward, most=3)
    np.testing.assert_array_equal(first, sent[:3, :3])


def test_shared_experts_count_with_their_own_width(tmp_path):
    (tmp_path / "shared.toml").write_text(
        CONFIG.replace("ffn = 1024", "ffn = 1024\nnum_shared_experts = 1\nshared_ffn = 64")
    )
    asked = question(str(tmp_path / "shared.toml"), "ep=4")
    plan, widths = asked.plan(), asked.config.moe.widths
    sent, _ = wire_bytes(plan, **widths, backward=True, most=4)
    inside = sum(phase.inside_bytes for phase in plan.cost(**widths)["forward + backward"].phases)
    np.testing.assert_allclose(sent.sum(1), inside, rtol=1e-9)
    assert sent.sum() < wire_bytes(plan, 1024, backward=True, most=4)[0].sum()


def test_replicas_exchange_gradients_alone(path):
    """Two groups of 8 on a node each: in the forward pass rows stay in a group, and only statistics leave it."""
    asked = question(path, "ep=8,dp=2")
    plan = asked.plan()
    forward, both = (wire_bytes(plan, 1024, backward=b, most=16)[0] for b in (False, True))
    assert forward[0, 1:8].min() > 1000 * forward[0, 8:].max() > 0
    weights = 3 * 8 * 512 * 1024 * 4  # of 8 experts; a sum over two moves all of them once
    assert both[0, 8] > weights > both[0, 9]


def test_the_plan_in_a_picture(path):
    asked = question(path, "ep=16")
    found = predict(asked)
    figure = draw_plan(asked, path, asked.plan(), found)
    time_axes, memory_axes, wire_axes, _ = figure.axes
    for axes, wanted in (
        (time_axes, [1e3 * found["time"][name]["seconds"] for name in found["passes"]]),
        (memory_axes, [found["memory"][key]["peak"] / 1e9 for key in ("one", "all")]),
    ):
        np.testing.assert_allclose([sum(part[i].get_width() for part in axes.containers) for i in (0, 1)], wanted)
    assert [part.get_label() for part in time_axes.containers] == list(found["time"]["forward"]["phases"])
    (limit,) = memory_axes.lines
    assert limit.get_xdata()[0] == pytest.approx(MACHINES["h100"].memory_bytes / 1e9)
    sent, _ = wire_bytes(asked.plan(), 1024, backward=True, most=16)
    np.testing.assert_allclose(wire_axes.images[0].get_array().filled(0), sent / 1e6)
    assert {line.get_ydata()[0] for line in wire_axes.lines} == {0, 7.5} and len(wire_axes.lines) == 2
    said = "\n".join(texts(figure))
    for word in ("small.toml, ep=16,nodes=2 on h100", "3 layers", "wire, forward + backward, even load", "other nodes"):
        assert word in said
    assert "TOO LARGE" not in said


def test_what_is_too_large_is_said_in_the_picture(path):
    asked = question(path, "ep=1", optimizer="none", layers=1)
    found = predict(asked)
    found["memory"]["one"]["fits"] = False
    figure = draw_plan(asked, path, asked.plan(), found)
    said = "\n".join(texts(figure))
    assert "TOO LARGE" in said and "wire, forward, even load" in said and "forward + backward" not in said
    assert not figure.axes[2].images[0].get_array().count()  # one device sends nothing


def test_plan_writes_the_picture_that_is_asked_for(path, tmp_path, capsys):
    assert main(["plan", path, "--mesh", "ep=8", "--hardware", "h100", "--picture", "out.svg", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["picture"] == "out.svg"
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("picture", "words"),
    [("plan.jpg", "must end in .png, .svg, .pdf"), ("absent/plan.png", "cannot be written"), (".png", "must end in")],
)
@pytest.mark.parametrize("command", [["plan", "--mesh", "ep=8", "--hardware", "h100"], ["bench"]])
def test_a_picture_that_cannot_be_is_refused_first(path, command, picture, words, capsys):
    assert main([command[0], path, *command[1:], "--picture", picture]) == 2
    output, text = capsys.readouterr()
    assert output == "" and words in text and text.count("\n") == 1


def test_a_picture_needs_matplotlib(path, monkeypatch, capsys):
    monkeypatch.setattr("moe_jax.host.extras.find", lambda name: None)
    assert main(["plan", path, "--mesh", "ep=8", "--hardware", "h100", "--picture", "out.png"]) == 2
    output, text = capsys.readouterr()
    assert output == "" and "a picture needs matplotlib" in text


# The bench.


def record_of(name, quotients):
    """A workload as ``measure`` returns it; the layer takes 10 ms forward and 30 ms with the backward pass."""
    phases = {}
    for phase, scale in (("forward", 1), ("forward + backward", 3)):
        seconds = {key: [scale * q * t for t in (0.008, 0.010, 0.014)] for key, q in quotients.items() if q}
        others = {key: q and {"median": q} for key, q in quotients.items() if key not in ("layer", "dense limit")}
        limit = {"median": quotients["dense limit"]}
        phases[phase] = {"seconds": seconds, "speedups": others, "limit_over_layer": limit}
    sizes = {"tokens_per_device": 1024, "hidden": 512, "top_k": 4, "num_experts": 32, "ffn": 1024}
    how = {"dtype": "float32", "quant": "none", "transport": "padded"}
    return {"workload": name, **sizes, **how, "phases": phases}


def test_the_bench_in_a_picture():
    quotients = {"layer": 1, "dense limit": 0.8, "minimal": 0.9, "all experts": None}
    header = {"mesh": {"ep": 8, "tp": 1}, "platform": "cpu", "jax": "0.10.2"}
    figure = draw_times([record_of("W1", quotients), record_of("W3", quotients)], header)
    for axes, name in zip(figure.axes, ("W1", "W3"), strict=True):
        assert axes.get_title().startswith(f"{name}: 1024 tokens per device x 512, top 4 of 32")
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == ["dense limit", "layer", "minimal", "all experts"]
        widths = [bar.get_width() for bars in axes.containers for bar in bars]
        expected = [1e3 * scale * 0.01 * q for scale in (1, 3) for q in (0.8, 1, 0.9, 0)]
        np.testing.assert_allclose(widths, expected)
        quartiles = [line.get_xdata() for line in axes.lines]
        np.testing.assert_allclose(quartiles[1], [9, 12])
        said = [text.get_text() for text in axes.texts]
        assert said.count("not run") == 2 and "10 ms" in said and "27 ms, 0.9 x the layer" in said
    said = texts(figure)
    assert "moe_jax bench: ep=8, tp=1, cpu, JAX 0.10.2" in said and {"forward", "forward + backward"} <= set(said)


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    figure = drawing.new_figure(1, 1)
    drawing.save_asked(figure, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(drawing.DataError, match="give another file"):
        drawing.save_asked(figure, tmp_path / "absent" / "a.png")


# A training run.


def step_of(step, load=((1, 2, 3, 2), (4, 4, 0, 0))):
    values = {"loss": 10.0 - step, "imbalance": 2.0, "rank_imbalance": 1.5}
    values |= {"dropped": step % 2, "rounds": 1, "tokens_per_s": 100.0 * step}
    return {"step": step, **values, "load": [list(layer) for layer in load]}


def test_a_run_in_a_picture():
    records = [step_of(step) for step in range(3, 9)]  # a resumed run whose first steps are gone
    records += [{"step": 5, "validation_loss": 5.5}, {"step": 8, "validation_loss": 2.5}, {"step": 8, "sample": "some"}]
    figure = report.draw_run("tiny-2", records, load_config(TINY))
    loss, load, _, *curves, sample = figure.axes
    measured, smoothed, validation = (line.get_xydata().tolist() for line in loss.lines)
    assert measured == smoothed == [[step, 10 - step] for step in range(3, 9)]  # a line stays as it is
    assert validation == [[5, 5.5], [8, 2.5]]
    image = load.images[0].get_array()
    np.testing.assert_array_equal(image[:, 0], [0.5, 1, 1.5, 1, 2, 2, 0, 0])
    assert image.shape == (8, 6) and (image == image[:, :1]).all()
    assert load.images[0].get_extent()[:2] == [2.5, 8.5] and {axes.get_xlim() for axes in (loss, load, *curves)} == {
        (2.5, 8.5)
    }
    found = {axes.get_title(): axes.lines[0].get_ydata().tolist() for axes in curves}
    assert found == {
        "fullest expert / mean load": [2.0] * 6,
        "fullest rank / mean load": [1.5] * 6,
        "dropped pairs": [1, 0] * 3,
        "rounds": [1] * 6,
        "tokens / s": [100.0 * step for step in range(3, 9)],
    }
    assert sample.texts[0].get_text() == "some"
    said = "\n".join(texts(figure))
    for words in ("tiny-2\ntop 2 of 8 experts", "mesh ep=4,tp=2", "16 x 64 tokens a step", "validation: 2.500"):
        assert words in said


def test_moves_of_experts_are_in_the_picture():
    """An arrow from before to after stands before the first step that was taken with the new places."""
    records = [step_of(step) for step in range(1, 6)]
    moves = [(3, 1.6, 1.1), (5, 1.4, 1.2)]
    for place, before, after in moves:
        values = {"rebalanced_before": before, "rebalanced_after": after, "rebalanced_moved_slots": 4}
        records.insert(place, {"step": place, **values})
    config = load_config(TINY)
    config = dataclasses.replace(config, balance=BalanceConfig(num_redundant=4, every=2))
    figure = report.draw_run("run", records, config)
    (axes,) = (axes for axes in figure.axes if axes.get_title() == "fullest rank / mean load")
    measured, _, *marks = (line.get_xydata().tolist() for line in axes.lines)
    assert measured == [[step, 1.5] for step in range(1, 6)]
    assert marks[1::2] == [[[place - 0.5, before], [place - 0.5, after]] for place, before, after in moves]
    arrows = [(arrow.xyann, arrow.xy) for arrow in axes.texts]
    assert arrows == [((place - 0.5, before), (place - 0.5, after)) for place, before, after in moves]
    assert any("top 2 of 8 experts, moving every 2 steps among 12 slots" in text for text in texts(figure))


def test_a_long_run_has_a_column_for_some_steps(monkeypatch):
    monkeypatch.setattr(report, "MAX_COLUMNS", 2)
    loads = [[[4, 0]], [[4, 0]], [[0, 4]], [[2, 2]], [[0, 4]]]
    figure = report.draw_run("run", [step_of(i, load) for i, load in enumerate(loads, 1)], load_config(TINY))
    np.testing.assert_allclose(figure.axes[1].images[0].get_array(), [[2, 2 / 6], [0, 10 / 6]])  # steps 1, 2 and 3 to 5


def test_smoothing_is_the_mean_of_a_window_without_a_lag():
    values = np.random.default_rng(0).normal(size=700)
    found = report.smooth(values)
    assert found[0] == values[0] and found[1] == pytest.approx(values[:3].mean())
    assert found[300] == pytest.approx(values[293:308].mean()) and found[-2] == pytest.approx(values[-3:].mean())
    assert report.smooth([3.0]) == [3.0]


# The profile of a run.


def scopes_in(folder):
    """The paths of `named_scope` of the operations in a trace, and the steps that are marked in it."""
    (path,) = folder.rglob("*.xplane.pb")
    names = re.findall(rb"jit\([\w]+\)/([\w()/]+)", path.read_bytes())
    events = (e for p in jax.profiler.ProfileData.from_file(str(path)).planes for line in p.lines for e in line.events)
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    return {part for name in names for part in re.split(r"[/()]", name.decode())}, sorted(steps)


@pytest.mark.parametrize(("num_steps", "traced"), [(9, [12, 13, 14]), (3, [12, 13]), (1, [11])])
def test_a_profile_has_the_names_of_phases(tmp_path, num_steps, traced):
    said = []

    @jax.jit
    def step(x):
        with jax.named_scope("dispatch"):
            return x @ x

    step(np.eye(4, dtype=np.float32))
    with contextlib.closing(StepTrace(make_profile_folder(tmp_path / "new"), num_steps, said.append)) as trace:
        for number in range(11, 11 + num_steps):
            with trace.step(number):
                step(np.eye(4, dtype=np.float32)).block_until_ready()
    scopes, steps = scopes_in(tmp_path / "new")
    assert "dispatch" in scopes and steps == traced
    assert said == [f"wrote a profile of steps {traced[0]} to {traced[-1]} into {tmp_path / 'new'}"]


def test_without_a_folder_nothing_is_traced(monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: pytest.fail("a trace was begun"))
    with contextlib.closing(StepTrace(None, 3, pytest.fail)) as trace:
        for number in (1, 2, 3):
            with trace.step(number):
                pass


def test_a_profile_that_cannot_be_written_is_refused_first(path, capsys):
    Path("file").write_text("")
    assert main(["train", str(TINY), "--data", path, "--profile", "file/profile"]) == 2
    assert "profile='file/profile' cannot be made" in capsys.readouterr().err
