"""The command line: its commands from end to end, and exit code 2 with one sentence for every kind of bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint
import pytest
from jax.experimental.compilation_cache import compilation_cache

import moe_jax
from moe_jax.config import MeshConfig
from moe_jax.errors import DataError
from moe_jax.tools.cli import main
from moe_jax.tools.train import loop
from moe_jax.tools.train.batches import TrainBatches
from moe_jax.tools.train.checkpoint import saved_steps

ROOT = Path(__file__).parent.parent
MINIATURE = """
[mesh]
ep = 4
tp = 2
[moe]
num_experts = 8
top_k = 2
ffn = 32
[model]
layers = 1
hidden = 16
heads = 2
seq_len = 16
[train]
steps = 20
batch_size = 8
learning_rate = 1e-2
warmup_steps = 4
eval_batches = 2
sample_bytes = 0
"""


SAMPLING = MINIATURE.replace("sample_bytes = 0", "sample_bytes = 4")
BALANCED = SAMPLING + "[balance]\nnum_redundant = 4\nevery = 1\nthreshold = 0\ndecay = 0.5\nmode = 'token'\n"
MESH = ("--mesh", "ep=2")
TWO_LAYERS = MINIATURE.replace("layers = 1", "layers = 2")


@pytest.fixture(autouse=True, scope="module")
def compile_once(tmp_path_factory):
    """Programs that several tests share are compiled once: what everybody runs trains on MESH alone."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # or JAX goes on writing to the folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a miniature configuration and some text to train on; runs without --out are kept there too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini.toml").write_text(MINIATURE)
    (tmp_path / "text").write_bytes(Path(__file__).read_bytes())
    return tmp_path


def train(folder, capsys, *options):
    """Runs `train --json` on the miniature in this process; returns what it printed, by event."""
    code = main(["train", str(folder / "mini.toml"), "--data", str(folder / "text"), "--json", *map(str, options)])
    events: dict[str, list] = {"code": code}
    for line in capsys.readouterr().out.splitlines():
        record = json.loads(line)
        events.setdefault(record["event"], []).append(record)
    return events


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """A run of one step on what ``folder`` holds, for tests of what a run finds in its place; each takes a copy."""
    place = tmp_path_factory.mktemp("one_step")
    (place / "mini.toml").write_text(MINIATURE)
    (place / "text").write_bytes(Path(__file__).read_bytes())
    files = ["mini.toml", "--data", "text", "--out", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", *files, *MESH, "--steps", "1", "--json"]) == 0
    return place / "run"


def last_step(run):
    return saved_steps(run / "checkpoints")[-1]


def read_checkpoint(run):
    """All bits of the last checkpoint by the name of the leaf, and what else it holds."""
    path = run / "checkpoints" / str(last_step(run))
    arrays = orbax.checkpoint.StandardCheckpointer().restore(path / "state")
    leaves = {jax.tree_util.keystr(p): np.asarray(x).tobytes() for p, x in jax.tree_util.tree_leaves_with_path(arrays)}
    return leaves, (path / "run" / "metadata").read_text()


def names_in(run):
    """What a run keeps, but for the event file, whose name has the time and the host in it."""
    return sorted(path.name for path in run.iterdir() if not path.name.startswith("events.out.tfevents."))


def read_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_training_learns_and_leaves_a_report(folder, capsys):
    (folder / "mini.toml").write_text(SAMPLING)
    events = train(folder, capsys, *MESH, "--out", folder / "run")
    assert events["code"] == 0
    losses = [record["loss"] for record in events["step"]]
    assert len(losses) == 20 and abs(losses[0] - np.log(256)) < 0.3 and losses[-1] < losses[0] - 0.5
    assert abs(events["validation"][0]["loss"] - losses[-1]) < 0.5
    assert len(events["sample"][0]["text"]) >= 4
    assert names_in(folder / "run") == ["checkpoints", "metrics.jsonl", "report.png"]
    *written, validation, sample = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    assert written == [{k: v for k, v in record.items() if k != "event"} for record in events["step"]]
    assert validation == {"step": 20, "validation_loss": events["validation"][0]["loss"]}
    assert sample == {"step": 20, "sample": events["sample"][0]["text"]}
    tasks = [(task["name"], task["done"]) for task in events["task"]]
    assert tasks == [
        ("making the parameters", 0),
        ("compiling the step", 0),
        ("compiling the validation", 0),
        *(("validating", done) for done in range(2)),
        ("compiling the sampler", 0),
        *(("sampling", done) for done in range(4)),
        ("drawing the report", 0),
    ]
    for record in written:
        assert record["dropped"] == 0
        assert [sum(load) for load in record["load"]] == [8 * 16 * 2]  # every token went to top_k experts


@pytest.mark.slow
def test_a_profile_of_a_run_has_the_phases_of_the_layer(folder, capsys):
    events = train(folder, capsys, *MESH, "--out", folder / "run", "--profile", folder / "profile", "--steps", 5)
    assert events["code"] == 0
    assert f"wrote a profile of steps 2 to 4 into {folder / 'profile'}" in [note["text"] for note in events["note"]]
    (path,) = (folder / "profile").rglob("*.xplane.pb")
    scopes = re.findall(rb"[/(](\w+)(?=[/)])", path.read_bytes())
    phases = "attention moe route layout pack exchange experts unpack combine_sum optimizer"
    assert {*phases.encode().split()} <= {*scopes}


@pytest.mark.quick("without_sample")
@pytest.mark.parametrize("text", [MINIATURE, SAMPLING, BALANCED], ids=["without_sample", "with_sample", "balanced"])
def test_resume_is_bit_exact(folder, capsys, text):
    (folder / "mini.toml").write_text(text)
    through = train(folder, capsys, *MESH, "--out", folder / "through", "--steps", 6)
    train(folder, capsys, *MESH, "--out", folder / "stopped", "--steps", 3)
    resumed = train(folder, capsys, *MESH, "--out", folder / "stopped", "--steps", 6, "--resume")
    assert [(r["step"], r["loss"]) for r in resumed["step"]] == [(r["step"], r["loss"]) for r in through["step"][3:]]
    assert resumed["validation"] == through["validation"] and resumed.get("sample") == through.get("sample")
    assert ("sample" in resumed) == (text != MINIATURE)
    assert read_checkpoint(folder / "through") == read_checkpoint(folder / "stopped")
    if text == BALANCED:
        moves = [[(r["step"], r["moved_slots"]) for r in run["rebalanced"]] for run in (through, resumed)]
        assert 3 in dict(moves[1]) and moves[0][-len(moves[1]) :] == moves[1] and len(moves[0]) > len(moves[1])
        files = [(folder / name / "metrics.jsonl").read_text() for name in ("through", "stopped")]
        written = [[r for r in map(json.loads, text.splitlines()) if "rebalanced_after" in r] for text in files]
        assert written[0] == written[1] and [r["step"] - 1 for r in written[0]] == [place for place, _ in moves[0]]
    if text == SAMPLING:
        again = train(folder, capsys, *MESH, "--out", folder / "stopped", "--steps", 6, "--resume")
        assert "step" not in again and again["validation"] == through["validation"]


@pytest.mark.slow
def test_selection_bias_moves_and_bfloat16_trains(folder, capsys):
    text = (MINIATURE + 'dtype = "bfloat16"\n[router]\nscore = "sigmoid"\nselection_bias = true\n').replace(
        "ffn = 32", "ffn = 32\nbalance_loss = 0\nbias_update_rate = 0.05\nnum_shared_experts = 1"
    )
    (folder / "mini.toml").write_text(text)
    moved = train(folder, capsys, "--mesh", "ep=2")
    (folder / "mini.toml").write_text(text.replace("0.05", "0.0"))
    still = train(folder, capsys, "--mesh", "ep=2")
    assert moved["step"][-1]["loss"] < moved["step"][0]["loss"] - 0.5
    late = [np.mean([record["imbalance"] for record in run["step"][10:]]) for run in (moved, still)]
    assert late[0] < late[1]


@pytest.mark.slow
def test_experts_without_weights_train(folder, capsys):
    """With a selection bias of their own, and beside experts that move; no rank is loaded by them."""
    text = MINIATURE.replace("ffn = 32", "ffn = 32\nnum_zero_experts = 1\nnum_copy_experts = 2")
    text += '[router]\nscore = "sigmoid"\nselection_bias = true\n[balance]\nevery = 5\n'
    (folder / "mini.toml").write_text(text)
    steps = train(folder, capsys, "--mesh", "ep=2", "--steps", 8)["step"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(0 < record["weightless"] < 1 and record["rank_imbalance"] < 2 for record in steps)


@pytest.mark.slow
def test_seed_changes_the_run(folder, capsys):
    def loss(seed):
        return train(folder, capsys, "--mesh", "ep=1", "--steps", 2, "--seed", seed)["step"][1]["loss"]

    assert loss(0) == loss(0) != loss(1)


@pytest.mark.slow
def test_every_mesh_trains_alike(folder, capsys):
    """The first 20 losses agree to 1e-4 relative in float32, whatever the mesh."""
    (folder / "mini.toml").write_text(TWO_LAYERS)
    meshes = ("ep=1,tp=1", "ep=8", "ep=4,tp=2", "ep=2,tp=4", "ep=4,nodes=2,dp=2")
    losses = [[r["loss"] for r in train(folder, capsys, "--mesh", mesh)["step"]] for mesh in meshes]
    for mesh, values in zip(meshes, losses, strict=True):
        np.testing.assert_allclose(values, losses[0], rtol=1e-4, err_msg=mesh)


@pytest.mark.slow
def test_runs_without_out_are_kept_apart(folder, capsys):
    """Run twice, nothing is lost and nothing refused; --resume goes on with the last one."""
    saved = [train(folder, capsys, *MESH, "--steps", steps)["saved"][0] for steps in (1, 2)]
    assert [(event["step"], event["path"]) for event in saved] == [
        (1, "runs/mini/checkpoints/1"),
        (2, "runs/mini-2/checkpoints/2"),
    ]
    events = train(folder, capsys, *MESH, "--steps", 3, "--resume")
    assert [record["step"] for record in events["step"]] == [3]
    assert any("resuming runs/mini-2 after step 2" in note["text"] for note in events["note"])


@pytest.mark.slow
def test_a_diverging_run_stops_and_keeps_its_last_checkpoint(folder, capsys):
    (folder / "mini.toml").write_text(MINIATURE.replace("1e-2", "1e30") + "save_every = 1\n")
    code = main(["train", str(folder / "mini.toml"), "--data", str(folder / "text"), "--out", "run", "--mesh", "ep=1"])
    text = capsys.readouterr().err
    assert code == 2 and "at step 2; lower train.learning_rate=1e+30" in text
    assert text.endswith("the checkpoint of step 1 is kept\n")
    assert last_step(folder / "run") == 1


def test_a_new_run_never_replaces_one_and_a_refused_resume_names_the_key(one_step, folder, capsys):
    shutil.copytree(one_step, folder / "run")
    before = read_files(folder / "run")
    arguments = ["train", "mini.toml", "--data", "text", *MESH, "--out", "run"]
    assert main(arguments) == 2
    assert "run: holds a run, which a new one would replace; add --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--seed", "7"]) == 2
    assert "train.seed was 0 and is 7 now" in capsys.readouterr().err
    assert read_files(folder / "run") == before


def test_data_that_fails_during_a_run_costs_no_step(folder, capsys, monkeypatch):
    """The parameters are whole when a batch cannot be read, or a line not be written: they are saved first."""

    def read_batch(batches, step):
        if step == 2:
            raise DataError("text: became shorter during the run")
        return honest(batches, step)

    honest = TrainBatches.__getitem__
    monkeypatch.setattr(TrainBatches, "__getitem__", read_batch)
    assert train(folder, capsys, *MESH)["saved"][-1]["step"] == 2
    assert last_step(folder / "runs" / "mini") == 2
    assert (folder / "runs" / "mini" / "report.png").exists()


@contextmanager
def start(folder, *options, **keywords):
    """The miniature in a process of its own, on one device, with JSON lines into a pipe; a failing test ends it."""
    command = [sys.executable, "-m", "moe_jax", "train", "mini.toml", "--data", "text", "--mesh", "ep=1", "--json"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    keywords = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "text": True, **keywords}
    with subprocess.Popen([*command, *options], **keywords) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def until(process, **wanted):
    """Reads JSON lines up to the first that has these values, and returns that one."""
    for line in process.stdout:
        record = json.loads(line)
        if wanted.items() <= record.items():
            return record
    raise AssertionError(f"the run ended without {wanted}")


@pytest.mark.slow
def test_sigterm_saves_and_ends(folder):
    """As a cluster sends it; SIGINT and SIGHUP take the same way."""
    with start(folder, "--steps", "100000") as process:
        until(process, step=3)
        process.send_signal(signal.SIGTERM)
        answer = until(process, event="note")["text"]
        *_, last = map(json.loads, process.stdout)
    assert answer.startswith("SIGTERM while taking step ")
    assert process.returncode == 143 and last["event"] == "interrupted" and last["step"] >= 3
    assert last_step(folder / "runs" / "mini") == last["step"]


@pytest.mark.slow
def test_a_killed_run_loses_only_what_came_after_the_last_save(folder):
    """kill -9 cannot be caught; the run saves by time, and goes on from there."""
    (folder / "mini.toml").write_text(MINIATURE + "save_seconds = 0.2\n")
    with start(folder, "--steps", "5000") as process:
        until(process, event="saved")
        saved = until(process, event="saved")["step"]
        process.kill()
    step = last_step(folder / "runs" / "mini")
    assert step >= saved > 1
    with start(folder, "--steps", str(step + 1), "--resume") as process:
        records = list(map(json.loads, process.stdout))
    assert process.returncode == 0
    assert [record["step"] for record in records if record["event"] == "step"] == [step + 1]
    written = map(json.loads, (folder / "runs" / "mini" / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in written if "loss" in record] == list(range(1, step + 2))


@pytest.mark.slow
def test_a_signal_while_compiling_is_answered_and_a_second_one_leaves_at_once(folder, monkeypatch):
    """Twelve layers take much longer to compile, with all optimisations, than the seconds that are allowed here."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    (folder / "mini.toml").write_text(MINIATURE.replace("layers = 1", "layers = 12"))
    with start(folder, stderr=subprocess.PIPE) as process:
        until(process, name="compiling the step")
        time.sleep(3)  # tracing is over: XLA has the main thread
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        answer = until(process, event="note")["text"]
        assert answer.startswith("Ctrl-C while compiling the step: the run stops as soon as that is done")
        assert "a second one leaves at once" in answer and time.monotonic() - begin < 3
        time.sleep(0.7)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert time.monotonic() - begin < 3
        assert process.returncode == 130
        assert process.stdout.read() == ""  # no step, and no word of an orderly end
        assert "left at once" in process.stderr.read()


def test_a_reader_that_leaves_costs_no_step(folder, capsys, monkeypatch):
    """Standard output is a pipe here, and its other end is closed after the second step."""

    def put_batch(run, rows):
        if run.done_steps == 2:
            os.close(reader)
        return honest(run, rows)

    reader, writer = os.pipe()
    honest = loop.Run.batch
    monkeypatch.setattr(loop.Run, "batch", put_batch)
    with os.fdopen(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert main(["train", "mini.toml", "--data", "text", "--json", *MESH]) == 141
    assert capsys.readouterr().err == "moe_jax: stopped: whoever read standard output has closed it\n"
    assert 2 <= last_step(folder / "runs" / "mini") < 20


@pytest.mark.slow
def test_a_process_whose_reader_leaves_ends_orderly(folder):
    with start(folder, "--steps", "100000", stderr=subprocess.PIPE) as process:
        until(process, step=2)
        process.stdout.close()
        process.wait(timeout=60)
        assert process.stderr.read() == "moe_jax: stopped: whoever read standard output has closed it\n"
    assert process.returncode == 141
    assert last_step(folder / "runs" / "mini") >= 2


@pytest.mark.quick("validating-1")
@pytest.mark.parametrize(("task", "done"), [("validating", 1), ("sampling", 1)])
def test_a_signal_after_the_last_step(folder, capsys, monkeypatch, task, done):
    """Validating and sampling are given up, in this process; the steps are saved by then."""

    def tell(job, name, *values):
        if (name, values[:1]) == (task, (done,)):
            signal.raise_signal(signal.SIGTERM)
            while not job.interrupt.signum:
                time.sleep(0.01)
        honest(job, name, *values)

    honest = loop.Job.tell
    monkeypatch.setattr(loop.Job, "tell", tell)
    if task == "sampling":
        (folder / "mini.toml").write_text(SAMPLING)
    events = train(folder, capsys, *MESH, "--steps", 2)
    assert events["code"] == 143 and events["interrupted"] == [{"event": "interrupted", "step": 2}]
    assert ("validation" in events) == (task == "sampling") and "sample" not in events
    assert last_step(folder / "runs" / "mini") == 2


@pytest.mark.slow
def test_plain_output_ends_with_loss_and_sample(tmp_path):
    """As a person calls it: devices are emulated without being asked for, and the run is kept."""
    command = [sys.executable, "-m", "moe_jax", "train", TINY, "--steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert "8 devices" in lines[1]
    assert any(line.startswith("the run is kept in runs/tiny: a checkpoint every 300 s") for line in lines)
    assert any(line.startswith(("step   1/1", "step 1/1")) for line in lines)
    assert any(line.startswith("validation loss 5.") for line in lines) and "sample:" in lines
    assert all(c.isprintable() or c in "\n\t" for c in done.stdout)  # an untrained model speaks all bytes
    assert names_in(tmp_path / "runs" / "tiny") == ["checkpoints", "metrics.jsonl", "report.png"]


def test_plan(capsys):
    assert main(["plan", str(ROOT / "configs" / "deepseek_v3.toml"), "--describe"]) == 0
    text = capsys.readouterr().out
    assert "ep=32 over node*ep" in text and "512 per device x 7168 bfloat16, top 8 of 256" in text
    assert text.count("flops; ") == 2 and "bound by" in text
    assert main(["plan", str(ROOT / "configs" / "tiny.toml"), "--mesh", "ep=2", "--dtype", "bfloat16", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["ep_size"], values["tp_size"], values["dtype"]) == (2, 1, "bfloat16")
    assert sum(values["workspace"].values()) > 0
    assert values["dispatch_workspace"]["rows"] > values["workspace"]["rows"]
    projections = 2 * 3 * values["tokens_per_rank"] * values["top_k"] * values["hidden"] * 256  # ffn of tiny.toml
    forward = values["cost"]["forward"]
    assert forward["flops"] - forward["router_flops"] == projections
    tokens = values["tokens_per_rank"]
    assert main(["plan", str(ROOT / "configs" / "tiny.toml"), "--tokens-per-rank", str(tokens + 1), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_rank"] == tokens + 1


def test_verify_passes_its_arguments_on(monkeypatch):
    calls = []
    fake = types.SimpleNamespace(run=lambda mesh, backend, json_lines: calls.append((mesh, backend, json_lines)) or 1)
    monkeypatch.setitem(sys.modules, "moe_jax.verify", fake)
    monkeypatch.setattr(moe_jax, "verify", fake, raising=False)
    assert main(["verify"]) == 1
    assert main(["verify", "--mesh", "ep=2,dp=2", "--backend", "mine", "--json"]) == 1
    assert calls == [(None, "auto", False), (MeshConfig(ep=2, dp=2), "mine", True)]


TINY = str(ROOT / "configs" / "tiny.toml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: CONFIG"),
        (["train", TINY, "--step", "3"], "unrecognized arguments: --step 3"),
        (["train", TINY, "--steps", "many"], "invalid int value: 'many'"),
        (["train", TINY, "--steps", "0"], "steps=0 must be at least 1"),
        (["train", TINY, "--seed", "-1"], "seed=-1 must be at least 0"),
        (["train", TINY, "--resume"], "runs/tiny: there is no checkpoint here; start without --resume, or"),
        (["train", TINY, "--resume-from", "7"], "here; start without --resume-from 7, or pass another --out"),
        (["train", TINY, "--resume-from", "7", "--out", "mine"], "here; start without --resume-from 7, or pass"),
        (["train", TINY, "--data", "/dev/null"], "/dev/null: is a character device; give --data a file or folder"),
        (["train", TINY, "--mesh", "ep=4,node=2"], "names the axis 'node'; did you mean 'nodes'?"),
        (["train", TINY, "--mesh", "ep=3"], "train.batch_size=16 must be a multiple of the 3 devices"),
        (["train", "absent.toml"], "absent.toml: cannot be read"),
        (["train", TINY, "--data", "absent.txt"], "absent.txt: there is no such file or folder"),
        (["train", TINY, "--out", TINY], "tiny.toml: cannot be made"),
        (["train", str(ROOT / "configs" / "mixtral_8x7b.toml")], "no [train] section"),
        (["plan", TINY, "--mesh", "ep=16"], "num_experts=8 is not divisible by ep=16"),
        (["plan", TINY, "--tokens-per-rank", "-1"], "tokens_per_rank=-1"),
        (["plan", TINY, "--dtype", "float8"], "invalid choice: 'float8'"),
        (["verify", "--mesh", "4x2"], "names the axis '4x2'"),
        (["bench", "--workloads", "W7"], "workloads='W7' is unknown"),
        (["bench", "--mesh", "ep=3"], "num_experts=16 is not divisible by ep=3"),
    ],
)
def test_bad_input(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output, text = capsys.readouterr()
    assert output == ""
    assert text.startswith("moe_jax: error: ") and words in text
    assert text.count("\n") == 1 and text.endswith("\n")
    assert not list(tmp_path.iterdir())


def test_resume_without_a_checkpoint(folder, capsys):
    arguments = ["train", str(folder / "mini.toml"), "--data", str(folder / "text"), "--out", str(folder), "--resume"]
    assert main(arguments) == 2
    assert "checkpoints: there is no checkpoint here" in capsys.readouterr().err


def test_resume_beside_damaged_metrics(one_step, folder, capsys):
    shutil.copytree(one_step, folder / "run")
    (folder / "run" / "metrics.jsonl").write_text("{}\n")
    arguments = ["train", str(folder / "mini.toml"), "--data", str(folder / "text"), "--out", str(folder / "run")]
    assert main([*arguments, *MESH, "--steps", "2", "--resume"]) == 2
    text = capsys.readouterr().err
    assert "metrics.jsonl: line 1 is not a record" in text and text.count("\n") == 1


def test_a_process_reports_bad_input_without_a_traceback():
    command = [sys.executable, "-m", "moe_jax", "plan", os.devnull]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"moe_jax: error: {os.devnull}: section 'moe' is missing; add it\n"


def test_help(capsys):
    for command in ([], ["train"], ["verify"], ["plan"], ["sweep"], ["bench"]):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        words = ["train", "verify", "plan", "sweep", "bench"] if not command else ["--mesh", "--json"]
        assert all(word in text for word in words)
