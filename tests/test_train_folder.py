"""The folder of a run: a new run never costs an older one its work."""

import os
import subprocess
import sys

import pytest

from moe_jax.errors import CheckpointError
from moe_jax.tools.train.folder import open_folder

ROOT = os.path.dirname(os.path.dirname(__file__))


@pytest.fixture
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(path):
    (path / "checkpoints" / "7").mkdir(parents=True)


def test_a_new_run_takes_the_first_empty_folder(inside):
    for expected in ("runs/tiny", "runs/tiny-2", "runs/tiny-3"):
        with open_folder(None, "tiny", resume=False) as folder:
            assert str(folder.path) == expected and bool(folder.note) == (expected != "runs/tiny")
            folder.metrics.write_bytes(b"")
    (inside / "runs" / "other").write_bytes(b"a file")
    with open_folder(None, "other", resume=False) as folder:
        assert str(folder.path) == "runs/other-2"
    assert not folder.path.exists()  # the run left nothing in it


def test_resume_takes_what_was_saved_last(inside):
    with (
        pytest.raises(CheckpointError, match="runs/tiny: there is no checkpoint here"),
        open_folder(None, "tiny", resume=True),
    ):
        pass
    for age, name in enumerate(("tiny-2", "tiny-10", "tiny", "tiny-other", "tinyer")):
        begin(inside / "runs" / name)
        os.utime(inside / "runs" / name / "checkpoints" / "7", (age, age))
    (inside / "runs" / "tiny-11" / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    with open_folder(None, "tiny", resume=True) as folder:
        assert str(folder.path) == "runs/tiny"


def test_a_named_folder_is_never_overwritten(tmp_path):
    begin(tmp_path / "run")
    with (
        pytest.raises(CheckpointError, match="run: holds a run, which a new one would replace; add --resume"),
        open_folder(tmp_path / "run", "tiny", resume=False),
    ):
        pass
    with (
        pytest.raises(CheckpointError, match="there is no checkpoint here"),
        open_folder(tmp_path / "other", "tiny", resume=True),
    ):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    (tmp_path / "run" / "checkpoints" / "7").rename(tmp_path / "run" / "metrics.jsonl")
    with open_folder(tmp_path / "run", "tiny", resume=False) as folder:
        assert "metrics.jsonl is of a run that never saved" in folder.note


def test_two_runs_do_not_share_a_folder(inside):
    """The lock is the process's own, so the other run is another process; it ends without a word of goodbye."""
    program = (
        "import time; from moe_jax.tools.train.folder import open_folder\n"
        "with open_folder(None, 'tiny', resume=False): print('locked', flush=True); time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with open_folder(None, "tiny", resume=False) as folder:
            assert str(folder.path) == "runs/tiny-2"
        with (
            pytest.raises(CheckpointError, match="runs/tiny: another run is at work here"),
            open_folder("runs/tiny", "tiny", resume=False),
        ):
            pass
        process.kill()
    with open_folder(None, "tiny", resume=False) as folder:
        assert str(folder.path) == "runs/tiny"
