"""Several processes of one training run: how they find each other, start, agree and end; and the job files."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from moe_jax.config import load_config, parse_mesh
from moe_jax.errors import InvalidArgumentError, MeshError, UnsupportedError
from moe_jax.tools import cli
from moe_jax.tools.train import launch, peers
from moe_jax.tools.train.checkpoint import saved_steps

ROOT = Path(__file__).parent.parent


def test_places():
    assert peers.parse_place("10.0.0.1:4567,8,0") == peers.Place("10.0.0.1:4567", 8, 0)
    for wrong in (
        "",
        "host",
        "host:1",
        "host:1,2",
        "host:1,2,2",
        "host:port,2,0",
        ":1,2,0",
        "host:1,2,-1",
        "host:1,2,0,0",
    ):
        with pytest.raises(InvalidArgumentError, match="give HOST:PORT,COUNT,INDEX, as in"):
            peers.parse_place(wrong)


def test_one_process_agrees_with_itself():
    assert peers.leads() and peers.alone()
    assert peers.agree(3, 0) == (3, 0) and peers.tell_all("runs/\u00e4") == "runs/\u00e4"


def test_a_process_that_is_gone_is_noticed(monkeypatch):
    def lose(error):
        with peers.notice_losses():
            raise error

    reset = "UNKNOWN: Gloo AllGather failed: Connection reset by peer\nand more"
    with pytest.raises(ValueError, match="^UNKNOWN"):
        lose(ValueError(reset))  # there is no other process
    monkeypatch.setattr(peers, "alone", lambda: False)
    with pytest.raises(
        MeshError, match="another process .* reset by peer.; .* go on with the same command and --resume"
    ):
        lose(ValueError(reset))
    with pytest.raises(ValueError, match="^a fault of ours$"):
        lose(ValueError("a fault of ours"))
    with pytest.raises(InvalidArgumentError):
        lose(InvalidArgumentError("Connection=3 must be 4"))


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs three processes, each of which is `script`, a shell script that knows its number as $index."""

    def run(script):
        program = tmp_path / "python"
        program.write_text(f'#!/bin/sh\nfor last; do :; done\nindex=${{last##*,}}\necho "$@" > $0.$index\n{script}\n')
        program.chmod(0o755)
        return launch.run_processes(["train", "tiny.toml", "--resume"], 3)

    monkeypatch.setattr(launch.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(launch, "has_accelerator", lambda: False)
    return run


def test_processes_get_the_arguments_and_their_place(start, tmp_path, capfd):
    assert start("echo I am $index; echo error $index >&2") == 0
    words = [(tmp_path / f"python.{index}").read_text().split() for index in range(3)]
    assert all(line[:-1] == ["-m", "moe_jax", "train", "tiny.toml", "--resume", "--distributed"] for line in words)
    places = [peers.parse_place(line[-1]) for line in words]
    assert [(place.count, place.index) for place in places] == [(3, 0), (3, 1), (3, 2)]
    assert len({place.coordinator for place in places}) == 1
    assert capfd.readouterr() == ("I am 0\n", "error 0\n")  # the others are not heard


@pytest.mark.parametrize(
    ("death", "code", "how"), [("kill -9 $$", 137, "was killed by signal 9"), ("exit 3", 3, "ended with code 3")]
)
def test_when_one_dies_the_others_are_ended(start, capfd, death, code, how):
    begin = time.monotonic()
    assert start(f"if [ $index = 1 ]; then echo why >&2; {death}; fi; exec sleep 60") == code
    assert time.monotonic() - begin < 10
    assert capfd.readouterr().err == f"moe_jax: process 1 of 3 {how}, and the others were ended: why\n"


def test_what_the_first_process_says_is_not_said_again(start, capfd):
    assert start("if [ $index = 0 ]; then echo wrong >&2; exit 2; fi; exec sleep 60") == 2
    assert capfd.readouterr().err == "wrong\n"


def test_signals_are_passed_on(start, capfd):
    """All save and leave by themselves, with the code of the signal."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert start("trap 'exit 143' TERM; for i in 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9; do sleep 0.2; done") == 143
    assert capfd.readouterr() == ("", "")


def test_an_accelerator_is_not_shared(monkeypatch):
    monkeypatch.setattr(launch, "has_accelerator", lambda: True)
    with pytest.raises(UnsupportedError, match="--processes shares emulated CPU devices.*JAX_PLATFORMS=cpu"):
        launch.run_processes([], 2)


def test_the_command_line_passes_its_own_arguments_on(monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "run_processes", lambda arguments, count: calls.append((arguments, count)) or 7)
    tiny = str(ROOT / "configs" / "tiny.toml")
    assert cli.main(["train", "--processes", "2", tiny, "--resume"]) == 7
    assert cli.main(["train", tiny, "--seed", "3", "--processes=4"]) == 7
    assert calls == [(["train", tiny, "--resume"], 2), (["train", tiny, "--seed", "3"], 4)]


def trained_by(text):
    """The arguments of `python -m moe_jax` in a job file, as its own parser takes them."""
    command = re.search(r"python -m moe_jax (.*?)\n", text.replace("\\\n", " ") + "\n")[1]
    command = re.sub(r"\$\(.*?\)|\$RESUME", "--resume", command).replace("$OUT", "out")
    return cli._make_parser().parse_args(shlex.split(command))


def assert_trains(arguments, num_devices):
    assert arguments.distributed is True and arguments.resume and arguments.out and arguments.data
    mesh, config = parse_mesh(arguments.mesh), load_config(ROOT / arguments.config)
    assert mesh.num_devices == num_devices and config.train.batch_size % num_devices == 0


def test_the_slurm_file():
    path = ROOT / "examples" / "slurm_train.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.MULTILINE))
    assert {"nodes", "ntasks-per-node", "gpus-per-node", "time", "requeue"} <= set(options)
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # JAX gives a process of Slurm one device
    assert options["signal"].startswith("TERM@")
    assert text.index("#SBATCH --output") < text.index("\nOUT=")  # Slurm reads options up to the first command
    assert_trains(trained_by(text), int(options["nodes"]) * int(options["gpus-per-node"]))


def test_the_kubernetes_file():
    parts = {
        part["kind"]: part for part in yaml.safe_load_all((ROOT / "examples" / "kubernetes_train.yaml").read_text())
    }
    job, pod = parts["Job"]["spec"], parts["Job"]["spec"]["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    # What jax.distributed.initialize() needs: names of the pods, and leave to read about them.
    service = parts["Service"]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": parts["Job"]["metadata"]["name"]}
    assert pod["serviceAccountName"] == parts["ServiceAccount"]["metadata"]["name"]
    binding = parts["RoleBinding"]
    assert binding["roleRef"]["name"] == parts["Role"]["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": pod["serviceAccountName"]}]
    readable = {resource for rule in parts["Role"]["rules"] for resource in rule["resources"]}
    assert readable == {"pods", "services", "jobs"}
    (container,) = pod["containers"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert_trains(trained_by(container["args"][0]), job["completions"] * gpus)


MINIATURE = """
[mesh]
ep = 2
[moe]
num_experts = 4
top_k = 2
ffn = 16
[model]
layers = 1
hidden = 16
heads = 2
seq_len = 8
[train]
steps = 5000
batch_size = 4
warmup_steps = 4
eval_batches = 1
sample_bytes = 0
save_every = 2
[balance]
num_redundant = 2
every = 2
threshold = 0
decay = 0
mode = "token"
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """Two processes; SIGTERM reaches one of them, and both save; one process goes on from there as if it had begun.

    Experts move in both, and so from one process to the other.
    """
    (tmp_path / "mini.toml").write_text(MINIATURE)
    (tmp_path / "text").write_bytes(Path(__file__).read_bytes())
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "moe_jax", "train", "mini.toml", "--data", "text", "--json"]

    def events(*options):
        done = subprocess.run([*command, *options], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    with subprocess.Popen(
        [*command, "--out", "two", "--processes", "2"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE
    ) as process:
        try:
            records = []
            for line in process.stdout:
                records.append(json.loads(line))
                if records[-1].get("step") == 5:
                    psutil.Process(process.pid).children()[-1].terminate()
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 143 and records[-1]["event"] == "interrupted"
    last = records[-1]["step"]
    assert 5 <= last < 5000 and saved_steps(tmp_path / "two" / "checkpoints")[-1] == last
    resumed = events("--out", "two", "--resume", "--steps", str(last + 2))
    alone = events("--out", "one", "--steps", str(last + 2))
    losses = [[record["loss"] for record in run if record["event"] == "step"] for run in (records + resumed, alone)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)  # sums over devices go another way
    moves = [[record["step"] for record in run if record["event"] == "rebalanced"] for run in (records, resumed, alone)]
    assert moves[0] and moves[0] + moves[1] == moves[2]
    ends = [next(record["loss"] for record in run if record["event"] == "validation") for run in (resumed, alone)]
    np.testing.assert_allclose(*ends, rtol=1e-5)
    assert {"checkpoints", "metrics.jsonl", "report.png"} <= set(os.listdir(tmp_path / "two"))
