"""The training job's parts that need no step: data, checkpoints, metrics, progress, interrupt."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.config import load_config, override
from moe_jax.errors import CheckpointError, DataError, UnsupportedError
from moe_jax.train import checkpoint, data, extras, model, progress, report, sample, step
from moe_jax.train.atomic import atomic_write
from moe_jax.train.interrupt import catch_interrupt

ROOT = os.path.dirname(os.path.dirname(__file__))
SHAPE = {"batch_size": 4, "seq_len": 16}


def write_files(folder, num_files, size=400):
    """Files of `size` bytes; each holds its own byte value only, so a window tells which file it came from."""
    for i in range(num_files):
        (folder / f"{i:03d}.txt").write_bytes(bytes([i]) * size)


# Data


def test_standard_library_is_the_default():
    corpus = data.load_corpus(None, 128)
    share = len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out))
    assert len(corpus.train) > 1_000_000 and 0.04 < share <= 0.05
    assert b"import " in corpus.train.tobytes() and b"import " in corpus.held_out.tobytes()
    assert corpus.digest == data.load_corpus(None, 128).digest


def test_whole_files_are_held_out(tmp_path):
    write_files(tmp_path, 60)
    corpus = data.load_corpus(tmp_path, 16)
    trained, held_out = set(corpus.train.tolist()), set(corpus.held_out.tolist())
    assert len(held_out) == 3 and trained | held_out == set(range(60)) and not trained & held_out
    assert corpus.train.tolist() == sorted(corpus.train.tolist())  # the files come in the order of their names


def test_tail_of_a_single_file_is_held_out(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)) * 10)
    corpus = data.load_corpus(path, 16)
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == path.read_bytes()
    assert len(corpus.held_out) == 100


def test_hidden_files_are_left_out_and_size_is_capped(tmp_path, monkeypatch):
    write_files(tmp_path, 3)
    (tmp_path / ".hidden").write_bytes(b"\xff" * 400)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_bytes(b"\xfe" * 400)
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    corpus = data.load_corpus(tmp_path, 16)
    assert len(corpus.train) + len(corpus.held_out) == 1000
    assert set(corpus.train.tolist()) == {0, 1, 2}


def test_digest_follows_content(tmp_path):
    write_files(tmp_path, 4)
    before = data.load_corpus(tmp_path, 16).digest
    (tmp_path / "001.txt").write_bytes(b"\x07" * 400)
    assert data.load_corpus(tmp_path, 16).digest != before


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    (tmp_path / "text").write_bytes(np.random.default_rng(0).bytes(5000))
    corpus = data.load_corpus(tmp_path, 16)
    batch = data.train_batch(corpus, seed=3, step=7, **SHAPE)
    assert batch.shape == (4, 17) and batch.dtype == np.int32
    np.testing.assert_array_equal(batch, data.train_batch(corpus, seed=3, step=7, **SHAPE))
    assert (batch != data.train_batch(corpus, seed=3, step=8, **SHAPE)).any()
    assert (batch != data.train_batch(corpus, seed=4, step=7, **SHAPE)).any()
    for row in batch:
        assert row.astype(np.uint8).tobytes() in corpus.train.tobytes()


def test_eval_windows_span_the_held_out_bytes(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 20)
    corpus = data.load_corpus(tmp_path, 16)
    batches = [data.eval_batch(corpus, index=i, num_batches=3, **SHAPE) for i in range(3)]
    assert batches[0][0].tolist() == corpus.held_out[:17].tolist()
    assert batches[-1][-1].tolist() == corpus.held_out[-17:].tolist()


def test_smallest_corpus(tmp_path):
    (tmp_path / "text").write_bytes(b"x" * 340)  # 17 bytes held out: exactly one window
    corpus = data.load_corpus(tmp_path, 16)
    assert data.eval_batch(corpus, index=0, num_batches=1, **SHAPE).shape == (4, 17)
    (tmp_path / "text").write_bytes(b"x" * 339)
    with pytest.raises(DataError, match="held-out part has 16 bytes and one window needs 17"):
        data.load_corpus(tmp_path, 16)


def test_bad_data(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        data.load_corpus(tmp_path / "absent", 16)
    with pytest.raises(DataError, match="holds no files"):
        data.load_corpus(tmp_path, 16)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    with pytest.raises(DataError, match="dangling: cannot be read"):
        data.load_corpus(tmp_path, 16)


def test_what_is_no_file_is_left_out(tmp_path):
    """A pipe that nobody writes to would be read for ever."""
    write_files(tmp_path, 3)
    os.mkfifo(tmp_path / "pipe")
    corpus = data.load_corpus(tmp_path, 16)
    assert len(corpus.train) + len(corpus.held_out) == 1200
    with pytest.raises(DataError, match="no such file or folder"):
        data.load_corpus(tmp_path / "pipe", 16)


# Checkpoints


@pytest.fixture
def config():
    return load_config(os.path.join(ROOT, "configs", "tiny.toml"))


@pytest.fixture
def state():
    return {
        "params": {"w": jnp.arange(6.0).reshape(2, 3), "half": jnp.array([1.5, -0.0, jnp.nan], jnp.bfloat16)},
        "count": jnp.int32(7),
        "empty": jnp.zeros((0, 4)),
    }


def test_checkpoint_round_trip(tmp_path, config, state):
    path, identity = tmp_path / "c", checkpoint.identify(config, "data")
    checkpoint.save(path, state, step=12, identity=identity)
    restored, step = checkpoint.restore(path, jax.tree.map(jnp.zeros_like, state), identity=identity)
    assert step == checkpoint.read_step(path) == 12
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert before.dtype == after.dtype and before.shape == after.shape and before.sharding == after.sharding
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_every_damage_is_noticed(tmp_path, config, state):
    path, identity = tmp_path / "c", checkpoint.identify(config, "data")
    checkpoint.save(path, state, step=1, identity=identity)
    whole = path.read_bytes()
    for position in (0, 9, 40, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged or cut short|is not a moe_jax checkpoint"):
            checkpoint.restore(path, state, identity=identity)
    for length in (0, 7, 8, 20, 39, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged or cut short|is not a moe_jax checkpoint"):
            checkpoint.restore(path, state, identity=identity)


def test_missing_checkpoint(tmp_path, config, state):
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        checkpoint.restore(tmp_path / "c", state, identity=checkpoint.identify(config, "data"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.restore(tmp_path, state, identity=checkpoint.identify(config, "data"))


def test_identity(tmp_path, config, state):
    path, identity = tmp_path / "c", checkpoint.identify(config, "data")
    checkpoint.save(path, state, step=1, identity=identity)
    for same in (override(config, mesh={"ep": 8, "tp": 1}), override(config, train={"log_every": 3})):
        checkpoint.restore(path, state, identity=checkpoint.identify(same, "data"))
    for section, change in (("train", {"seed": 1}), ("moe", {"top_k": 1}), ("router", {"scale": 2.0})):
        other = override(config, **{section: change})
        with pytest.raises(CheckpointError, match="another configuration"):
            checkpoint.restore(path, state, identity=checkpoint.identify(other, "data"))
    with pytest.raises(CheckpointError, match="trained on other data"):
        checkpoint.restore(path, state, identity=checkpoint.identify(config, "other"))
    with pytest.raises(CheckpointError, match="other parameters"):
        checkpoint.restore(path, {**state, "count": jnp.float32(7)}, identity=identity)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, config, state, monkeypatch):
    path, identity = tmp_path / "c", checkpoint.identify(config, "data")
    checkpoint.save(path, state, step=1, identity=identity)

    def fail(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="cannot be written .No space left"):
        checkpoint.save(path, state, step=2, identity=identity)
    assert checkpoint.read_step(path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


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
    state = step.init_state(decoder, optimizer, seed=0)
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
        "['embedding']", "['final_norm']", "['blocks'][0]['attention_norm']", "['blocks'][0]['moe_norm']"
    }  # fmt: skip


def named_leaves(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


# Metrics, progress, interrupt, extras


def make_record(step):
    return {
        "step": step,
        "loss": 2.0,
        "tokens_per_s": 1234.5,
        "imbalance": 1.5,
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
    report.MetricsFile(path, done_steps=0).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"\xff\xfe",
        b"[" * 100_000,
        b"5",
        b"{}",
        json.dumps(make_record(2) | {"step": "2"}).encode(),
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


def test_report_is_a_picture(tmp_path):
    path = tmp_path / "report.png"
    assert "wrote" in report.write_report(path, [make_record(1), make_record(2)])
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert "no step" in report.write_report(tmp_path / "none.png", []) and not (tmp_path / "none.png").exists()


def test_missing_matplotlib_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = report.write_report(tmp_path / "report.png", [make_record(1)])
    assert "matplotlib is not installed" in text and "pip install 'moe_jax[train]'" in text


def test_missing_optax_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(UnsupportedError, match=r"training needs optax.*pip install 'moe_jax\[train\]'"):
        extras.require("optax", "training")


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
    assert lines[0] == "step 1/8  loss 2.0000  1,234 tokens/s  imbalance 1.50  dropped 3"


def test_json_progress(capsys):
    shown = progress.JsonProgress()
    shown.step(make_record(1))
    shown.result("validation", "validation loss 1.500", loss=1.5)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"event": "step", **make_record(1)}, {"event": "validation", "loss": 1.5}]


def test_live_progress(capsys):
    shown = progress.LiveProgress(4)
    shown.step(make_record(1))
    shown.note("[bold]a note")
    shown.result("validation", "validation loss 1.500", loss=1.5)
    text = capsys.readouterr().out
    assert "[bold]a note" in text and "validation loss 1.500" in text and "imbalance 1.50" in text


def test_second_interrupt_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with catch_interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_importing_the_library_imports_no_extra():
    code = "import sys, moe_jax, moe_jax.cli; print({'optax', 'rich', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
