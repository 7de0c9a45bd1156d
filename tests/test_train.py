"""The training job's parts: files, the step, metrics, progress, interrupt."""

import contextlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import warnings

import jax
import jax.numpy as jnp
import matplotlib.text
import numpy as np
import optax
import pytest

import moe_jax
from moe_jax.config import load_config, override
from moe_jax.errors import DataError, UnsupportedError
from moe_jax.host import extras
from moe_jax.host.atomic import atomic_write
from moe_jax.tools import cli
from moe_jax.tools.train import balance, events, loop, model, progress, report, sample, step
from moe_jax.tools.train.folder import open_folder
from moe_jax.tools.train.interrupt import Stopped, catch_interrupt

ROOT = os.path.dirname(os.path.dirname(__file__))


# Files


@contextlib.contextmanager
def room_for(num_bytes):
    """As on a full disk: the system writes no file beyond `num_bytes`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_kill_while_writing_leaves_the_old_file(tmp_path):
    """Killed while the second file is half written; the next run in the folder removes that half."""
    program = (
        "import sys, time, numpy as np; from pathlib import Path; from moe_jax.host import atomic\n"
        "path = Path(sys.argv[1])\n"
        "for content in (b'old', b'new'):\n"
        "    with atomic.atomic_write(path) as file:\n"
        "        file.write(content)\n"
        "        if content == b'new': file.flush(); print('writing', flush=True); time.sleep(600)\n"
    )
    path = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", program, path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2
    with open_folder(tmp_path, "name", resume=False):
        assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_atomic_write_keeps_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"torn")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# The step


@pytest.fixture
def config():
    return load_config(os.path.join(ROOT, "configs", "tiny.toml"))


@pytest.mark.slow
def test_a_step_counts_and_decays_matrices_only(config):
    config = override(
        config,
        mesh={"ep": 1, "tp": 1},
        model={"hidden": 16, "heads": 2, "seq_len": 8, "layers": 1},
        moe={"ffn": 16},
        train={"batch_size": 2, "weight_decay": 0.5},
    )
    decoder = model.build_decoder(config, moe_jax.make_mesh())
    optimizer = step.make_optimizer(config.train)
    state = step.init_state(decoder, optimizer, 0, config)
    run = step.compile_step(decoder, optimizer, config, state)
    batch = jax.device_put(np.zeros((2, 9), np.int32), decoder.over_batch)
    losses = []
    for _ in range(3):
        state, metrics = run(state, batch)
        losses.append(float(metrics.loss))
    assert losses[2] < losses[1] < losses[0]
    counts = [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
    assert counts and set(counts) == {3}
    # Without a gradient, decay alone moves a parameter; norms and the embedding have none.
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    updates, _ = optimizer.update(zeros, optimizer.init(state.params), state.params)
    moved = {name: bool(jnp.any(leaf)) for name, leaf in named_leaves(updates)}
    assert {name for name, does in moved.items() if not does} == {
        "['embedding']['embedding']",
        "['final_norm']['scale']",
        "['blocks']['0']['attention_norm']['scale']",
        "['blocks']['0']['moe_norm']['scale']",
    }


def test_every_loss_of_the_router_has_its_weight(config):
    """A step of plain gradient descent on a model whose losses are its parameters moves each by minus its weight."""
    weights = {"balance_loss": 0.5, "z_loss": 0.25, "sequence_balance_loss": 0.125}
    moe = {**weights, "num_zero_experts": 1, "num_copy_experts": 1}
    config = override(config, moe=moe, model={"seq_len": 8}, train={"batch_size": 1}, mesh={"ep": 1, "tp": 1})
    load = jnp.asarray([[1] * 8 + [4, 8]], jnp.int32)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    none = jnp.zeros((), jnp.int32)

    def logits(params, tokens, where):
        balance, z, sequence_balance = params["losses"]
        stats = model.ModelStats(load, none, none, balance, z, sequence_balance)
        return jnp.zeros((*tokens.shape, 256)), stats

    decoder = types.SimpleNamespace(logits=logits, replicated=one, over_batch=one)
    optimizer = optax.sgd(1.0)
    params = {"blocks": {}, "losses": jnp.asarray([4.0, 5.0, 6.0])}
    state = step.TrainState(params, optimizer.init(params))
    run = step.compile_step(decoder, optimizer, config, state)
    state, metrics = run(state, np.zeros((1, 9), np.int32))
    assert state.params["losses"].tolist() == [3.5, 4.75, 5.875]
    record = loop.make_record(metrics, balance.first_places(config, 1), step=1, tokens_per_s=1.0)
    assert (record["balance"], record["z"], record["sequence_balance"]) == (4.0, 5.0, 6.0)
    assert float(metrics.loss) == pytest.approx(np.log(256))
    # Experts without weights lie on no rank: they are in no load, and their share of the choices stands by itself.
    assert (record["load"], record["weightless"], record["imbalance"]) == ([[1] * 8], 0.6, 1.0)


@pytest.mark.parametrize("weight", [0.0, 0.125])
def test_the_sequences_of_the_balance_loss_are_the_windows(config, monkeypatch, weight):
    asked, call = [], model.MoE.__call__

    def spy(layer, x, **given):
        asked.append(given["sequence_length"])
        return call(layer, x, **given)

    monkeypatch.setattr(model.MoE, "__call__", spy)
    config = override(
        config,
        mesh={"ep": 1, "tp": 1},
        moe={"sequence_balance_loss": weight, "ffn": 8, "num_copy_experts": 2},
        model={"hidden": 16, "heads": 2, "seq_len": 8, "layers": 1},
        train={"batch_size": 2},
    )
    decoder = model.build_decoder(config, moe_jax.make_mesh())
    params = jax.eval_shape(decoder.init, jax.random.key(0))
    _, stats = jax.eval_shape(decoder.logits, params, jax.ShapeDtypeStruct((2, 8), jnp.int32))
    assert asked == [8 if weight else None] and (stats.sequence_balance is not None) == bool(weight)
    assert stats.load.shape == (1, 10)


def named_leaves(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


# Metrics, progress, interrupt, extras


def make_record(step):
    return {
        "step": step,
        "loss": 2.0,
        "tokens_per_s": 1234.5,
        "imbalance": 1.5,
        "rank_imbalance": 1.25,
        "dropped": 3,
        "load": [[1, 2], [3, 0]],
    }


def test_metrics_of_a_resumed_run_replace_later_ones(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(json.dumps(make_record(i)).encode() + b"\n" for i in (1, 2, 3, 4)) + b'{"step": 5, "lo')
    metrics = report.MetricsFile(path, done_steps=2)
    metrics.append({**make_record(3), "loss": 9.0})
    assert [(r["step"], r["loss"]) for r in metrics.records()] == [(1, 2.0), (2, 2.0), (3, 9.0)]
    metrics.close()
    afresh = report.MetricsFile(path, done_steps=0)
    assert afresh.records() == [] and len(path.read_bytes().splitlines()) == 3  # so far nothing was replaced
    afresh.append(make_record(1))
    afresh.close()
    assert len(path.read_bytes().splitlines()) == 1


def test_metrics_keep_validation_losses_and_samples(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        make_record(1),
        {"step": 1, "validation_loss": 2.5},
        {"step": 1, "sample": "\ud800 text\n\ufffd"},
        make_record(2),
        {"step": 2, "rebalanced_before": 1.6, "rebalanced_after": 1.1, "rebalanced_moved_slots": 4},
    ]
    with contextlib.closing(report.MetricsFile(path, done_steps=0)) as metrics:
        for record in records:
            metrics.append(record)
        assert metrics.records() == records
    assert report.MetricsFile(path, done_steps=1).records() == records[:3]


def test_a_full_disk_tears_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(report.MetricsFile(path, done_steps=0)) as metrics:
        metrics.append(make_record(1))
        with room_for(path.stat().st_size + 9), pytest.raises(DataError, match="metrics.jsonl: cannot be written"):
            metrics.append(make_record(2))
        metrics.append(make_record(3))  # somebody made room
        assert [record["step"] for record in metrics.records()] == [1, 3]


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"\xff\xfe",
        b"[" * 100_000,
        b"5",
        b"{}",
        json.dumps(make_record(2) | {"step": "2"}).encode(),
        b'{"step": 2, "validation_loss": "low"}',
        b'{"step": 2, "sample": 5}',
        b'{"step": 2, "rebalanced_moved_slots": 3, "rebalanced_before": 1.5}',
        b'{"sample": "no step"}',
        json.dumps(make_record(2) | {"loss": None}).encode(),
        json.dumps(make_record(2) | {"load": [1, 2]}).encode(),
        json.dumps(make_record(2) | {"load": [[1, 2], [3]]}).encode(),
        json.dumps(make_record(2) | {"load": [[1, 2, 3]]}).encode(),
    ],
)
def test_damaged_metrics(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(make_record(1)).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match="line 2 is not a record"):
        report.MetricsFile(path, done_steps=1)
    report.MetricsFile(path, done_steps=0).close()  # a run that starts afresh does not read them


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("done_steps", [0, 1])
def test_metrics_that_are_no_file(tmp_path, make, done_steps):
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match="metrics.jsonl: is not a file"):
        report.MetricsFile(tmp_path / "metrics.jsonl", done_steps=done_steps)


def test_sample_cannot_steer_the_terminal():
    text = "a\tb\n\x1b[2J\x07\x7f\x9b\r\u202e\xe9\ufffd"
    assert sample.printable(text) == "a\tb\n\\x1b[2J\\x07\\x7f\\x9b\\r\\u202e\xe9\ufffd"


def test_report_is_a_picture(tmp_path, monkeypatch, config):
    path = tmp_path / "report.png"
    texts = []
    draw = matplotlib.text.Text.draw
    monkeypatch.setattr(
        matplotlib.text.Text, "draw", lambda self, *args: texts.append(self.get_text()) or draw(self, *args)
    )
    records = [make_record(1), make_record(2)]
    assert "drew" in report.write_report(path, records, config)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert "sample" not in texts and not any("validation" in text for text in texts)
    results = [{"step": 2, "validation_loss": 1.23456}, {"step": 2, "sample": "if $x_1$:\n\treturn \x1b" + "y" * 5000}]
    with warnings.catch_warnings(action="error"):
        assert "drew" in report.write_report(path, records + results, config)
    assert "validation: 1.235" in texts and "sample" in texts
    (sample,) = {text for text in texts if text.startswith("if $x_1$:\n    return \\x1by")}
    assert sample.endswith("\n...") and max(map(len, sample.splitlines())) <= 110
    assert "no step" in report.write_report(tmp_path / "none.png", [], config) and not (tmp_path / "none.png").exists()
    with room_for(1000):
        assert "was not drawn (File too large)" in report.write_report(tmp_path / "none.png", records, config)


def read_events(folder):
    """All (step, {name: number or text}) in the event files of a folder, and the steps from which each one counts."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found, starts = [], []
    for path in sorted(folder.glob("events.*")):
        content = path.read_bytes()
        while content:  # a record has its length in 8 bytes, 4 bytes of checksum, itself, and 4 bytes more
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            starts += [event.step] if event.HasField("session_log") else []
            values = {v.tag: b"".join(v.tensor.string_val).decode() or v.simple_value for v in event.summary.value}
            found += [(event.step, values)] if values else []
    return found, starts


def test_tensorboard_gets_every_number(tmp_path):
    with contextlib.closing(events.EventFile(tmp_path, done_steps=3)) as file:
        if file.missing:
            pytest.skip("needs tensorboardX")
        assert not list(tmp_path.iterdir())  # nothing is written before there is something to write
        file.append(make_record(4))
        found, starts = read_events(tmp_path)  # at once: a killed run keeps it
        numbers = {"loss": 2.0, "tokens_per_s": 1234.5, "imbalance": 1.5, "rank_imbalance": 1.25, "dropped": 3.0}
        assert starts == [4] and found == [(4, numbers)]
        file.append({"step": 4, "validation_loss": 1.5})
        file.append({"step": 4, "sample": "if x:\n\treturn \ud800"})
        with room_for(100), pytest.raises(DataError, match="the event file cannot be written .File too large"):
            file.append(make_record(5))
    found, _ = read_events(tmp_path)
    assert found[1] == (4, {"validation_loss": 1.5})
    assert found[2] == (4, {"sample/text_summary": "    if x:\n    \treturn ?"})


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    file = events.EventFile(tmp_path, done_steps=0)
    file.append(make_record(1))
    file.close()
    assert file.missing and not list(tmp_path.iterdir())


def test_missing_matplotlib_is_said(tmp_path, monkeypatch, config):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report.write_report(tmp_path / "report.png", [make_record(1)], config)
    assert "matplotlib is not installed" in text and "pip install 'moe_jax[train]'" in text


def test_missing_optax_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(UnsupportedError, match=r"training needs optax.*pip install 'moe_jax\[train\]'"):
        extras.require("optax", "training")


def test_missing_flax_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flax", None)
    assert cli.main(["train", os.path.join(ROOT, "configs", "tiny.toml")]) == 2
    assert "training needs flax, which is not installed; run: pip install 'moe_jax[train]'" in capsys.readouterr().err


def test_broken_package_is_not_taken_for_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        extras.find("broken_package")


def test_missing_rich_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    chosen = progress.make_progress(json_lines=False, log_every=1, num_steps=2)
    assert isinstance(chosen, progress.PlainProgress)
    assert "rich is not installed" in capsys.readouterr().err


def test_plain_progress(capsys):
    shown = progress.PlainProgress(log_every=3, num_steps=8)
    for number in range(1, 9):
        shown.step(make_record(number))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/8", "3/8", "6/8", "8/8"]
    assert lines[0] == "step 1/8  loss 2.0000  1,234 tokens/s  imbalance 1.50  ranks 1.25  dropped 3"


def test_plain_progress_is_not_silent_for_long(capsys, monkeypatch):
    shown = progress.PlainProgress(log_every=100, num_steps=800)
    shown.task("validating", 0, 3)
    shown.task("validating", 1, 3)
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.0)
    shown.task("validating", 2, 3)
    shown.step(make_record(5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["validating 0/3", "validating 2/3"] and lines[2].startswith("step   5/800")


def test_json_progress(capsys):
    shown = progress.JsonProgress()
    shown.step(make_record(1))
    shown.task("validating", 1, 2)
    shown.result("validation", "validation loss 1.500", loss=1.5)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"event": "step", **make_record(1)},
        {"event": "task", "name": "validating", "done": 1, "total": 2},
        {"event": "validation", "loss": 1.5},
    ]


def test_live_progress(capsys):
    shown = progress.LiveProgress(4)
    shown.step(make_record(1))
    shown.note("[bold]a note")
    shown.task("validating", 1, 2)
    shown.result("validation", "validation loss 1.500", loss=1.5)
    shown.close()
    text = capsys.readouterr().out
    assert "[bold]a note" in text and "validation loss 1.500" in text
    assert text.count("imbalance 1.50") == 1  # the last step stays when something else begins


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def terminal():
    """Signals as a terminal leaves them: what `nohup` starts, or a shell in the background, ignores some."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("name", "shown", "code"), [("SIGINT", "Ctrl-C", 130), ("SIGTERM", "SIGTERM", 143), ("SIGHUP", "SIGHUP", 129)]
)
def test_the_first_signal_is_answered_and_stops_where_it_is_safe(terminal, name, shown, code):
    number = getattr(signal, name)
    before, said = signal.getsignal(number), []
    with catch_interrupt(said.append) as interrupt:
        interrupt.check()
        interrupt.doing = "testing"
        signal.raise_signal(number)
        signal.raise_signal(number)  # an echo of the first, as some programs send it
        wait_for(lambda: said)
        assert len(said) == 1 and said[0].startswith(f"{shown} while testing: the run stops as soon as that is done")
        assert interrupt.exit_code == code
        with pytest.raises(Stopped):
            interrupt.check()
    assert signal.getsignal(number) is before and signal.set_wakeup_fd(-1) == -1


def test_an_answer_that_cannot_be_given_stops_the_run_all_the_same():
    def fail(text):
        raise OSError("the terminal is gone")

    with catch_interrupt(fail) as interrupt:
        signal.raise_signal(signal.SIGTERM)
        wait_for(lambda: interrupt.signum)


def test_ignored_signals_stay_ignored(terminal):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_interrupt(print) as interrupt:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGINT)
            wait_for(lambda: interrupt.signum)
            assert interrupt.signum == signal.SIGINT
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_catch_nothing():
    def work():
        with catch_interrupt(print) as interrupt:
            found.append(interrupt.signum)

    found = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [0]


def test_importing_the_library_imports_no_extra():
    extras = "{'flax', 'grain', 'optax', 'orbax', 'rich', 'matplotlib', 'tensorboardX'}"
    code = f"import sys, moe_jax, moe_jax.tools.cli, moe_jax.tools.planner.question; print({extras} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
