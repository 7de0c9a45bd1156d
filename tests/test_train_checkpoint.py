"""The checkpoints of a training run: whole or not there, exact on any mesh, and refused where they belong elsewhere."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import moe_jax
from moe_jax.config import load_config, override
from moe_jax.errors import CheckpointError, UnsupportedError
from moe_jax.tools.train.checkpoint import Checkpoints, identify, saved_steps, unfinished
from moe_jax.tools.train.seal import find_damage

ROOT = Path(__file__).parent.parent
IDENTITY = {"data": "some"}


@pytest.fixture
def config():
    return load_config(ROOT / "configs" / "tiny.toml")


@pytest.fixture
def state():
    return {
        "params": {"w": jnp.arange(6.0).reshape(2, 3), "half": jnp.array([1.5, -0.0, jnp.nan], jnp.bfloat16)},
        "moments": (jnp.int32(7), [jnp.ones(3)], ()),
    }


def save(path, state, *steps, keep=2, identity=IDENTITY):
    """Saves the same state after each of the steps."""
    with contextlib.closing(Checkpoints(path, keep=keep)) as checkpoints:
        for step in steps:
            checkpoints.save(state, step=step, identity=identity, position={"next_index": step})
        assert checkpoints.wait() == steps[-1]


def restore(path, like, *, step=None, identity=IDENTITY):
    with contextlib.closing(Checkpoints(path, keep=2)) as checkpoints:
        return checkpoints.restore(like, identity=identity, step=step)


def assert_same(before, after):
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_round_trip_of_the_last_ones(tmp_path, state):
    save(tmp_path / "c", state, 3, 12, 40)
    assert saved_steps(tmp_path / "c") == [12, 40]  # in the order of numbers, and as many as are kept
    assert sorted(os.listdir(tmp_path / "c")) == ["12", "40"]
    for step in (None, 12):
        restored = restore(tmp_path / "c", jax.tree.map(jnp.zeros_like, state), step=step)
        assert restored.step == (step or 40) and restored.position == {"next_index": step or 40}
        assert_same(state, restored.state)


def test_another_mesh_holds_the_same_bits(tmp_path):
    """Saved over ep=8, some of it replicated; read over ep=4 x tp=2, as the next step takes it: donated."""
    values = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)

    def place(mesh, spec):
        shardings = {"experts": NamedSharding(mesh, spec), "dense": NamedSharding(mesh, PartitionSpec())}
        return {name: jax.device_put(values, sharding) for name, sharding in shardings.items()}

    before = place(moe_jax.make_mesh(ep=8), PartitionSpec("ep"))
    like = place(moe_jax.make_mesh(ep=4, tp=2), PartitionSpec("ep", "tp"))
    save(tmp_path / "c", before, 1)
    restored = restore(tmp_path / "c", jax.tree.map(jnp.zeros_like, like)).state
    for name, array in restored.items():
        assert array.sharding == like[name].sharding
        np.testing.assert_array_equal(array, values)
    shardings = {name: array.sharding for name, array in like.items()}
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0, out_shardings=shardings)
    for array in doubled(restored).values():
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, 2 * values[shard.index])


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path):
    """The state is donated to the next step at once; the checkpoint holds what it was."""
    sharding = NamedSharding(moe_jax.make_mesh(ep=8), PartitionSpec())
    state = {"w": jax.device_put(jnp.ones((512, 512)), sharding)}
    double = jax.jit(lambda tree: {"w": 2 * tree["w"]}, donate_argnums=0)
    with contextlib.closing(Checkpoints(tmp_path / "c", keep=3)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state, step=step, identity=IDENTITY)
            state = double(double(state))
            jax.block_until_ready(state)
        assert checkpoints.wait() == 3 and checkpoints.poll() is None
        for step in (1, 2, 3):
            found = checkpoints.restore(state, identity=IDENTITY, step=step).state["w"]
            np.testing.assert_array_equal(found, np.full((512, 512), 4.0 ** (step - 1)))


def test_every_damage_is_named_and_the_one_before_is_offered(tmp_path, state):
    path = tmp_path / "run" / "checkpoints"
    save(path, state, 1, 2)
    files = [file for file in sorted((path / "2").rglob("*")) if file.is_file() and file.stat().st_size]
    sealed = [file for file in files if file.name not in ("_CHECKPOINT_METADATA", "commit_success.txt")]
    assert len(sealed) > 5

    def refuse(name):
        with pytest.raises(CheckpointError, match="checkpoints/2: is damaged or cut short") as caught:
            restore(path, state)
        assert name in str(caught.value)
        offer = f"{path / '1'} is whole: go on from it with --out {path.parent} --resume-from 1"
        assert str(caught.value).endswith(offer)

    for file in sealed:
        name, whole = file.relative_to(path / "2").as_posix(), file.read_bytes()
        listed = "" if name == "run/sha256" else name  # a damaged list names a line of its own
        for position in {0, len(whole) // 2, len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[position] ^= 1
            file.write_bytes(damaged)
            assert find_damage(path / "2"), (name, position)
        refuse(listed)
        file.write_bytes(whole[:-1])
        refuse(listed)
        file.unlink()
        refuse(name)
        file.write_bytes(whole)
    (path / "2" / "state" / "more").write_bytes(b"")
    refuse("state/more")
    (path / "2" / "state" / "more").unlink()
    for file in set(files) - set(sealed):  # what orbax adds when all is written matters to nobody
        file.write_bytes(b"?")
    assert restore(path, state).step == 2
    shutil.rmtree(path / "2" / "state")
    refuse("is missing")
    shutil.rmtree(path / "1" / "run")
    with pytest.raises(CheckpointError, match="2: is damaged .* and there is no older one that is whole"):
        restore(path, state)


def test_going_on_from_an_earlier_one_replaces_the_later(tmp_path, state):
    save(tmp_path / "c", state, 1, 2, 3, keep=5)
    (tmp_path / "c" / "3" / "run" / "metadata").unlink()
    with contextlib.closing(Checkpoints(tmp_path / "c", keep=5)) as checkpoints:
        checkpoints.restore(state, identity=IDENTITY, step=1)
        assert saved_steps(tmp_path / "c") == [1, 2, 3]  # nothing is lost before there is something new
        checkpoints.save({**state, "moments": (jnp.int32(8), [jnp.ones(3)], ())}, step=3, identity=IDENTITY)
        checkpoints.wait()
    assert saved_steps(tmp_path / "c") == [1, 3]
    assert int(restore(tmp_path / "c", state).state["moments"][0]) == 8


def test_missing_checkpoints(tmp_path, state):
    with pytest.raises(CheckpointError, match="there is no checkpoint here; start without --resume"):
        restore(tmp_path / "c", state)
    assert not list(tmp_path.iterdir())
    save(tmp_path / "c", state, 1, 2)
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are those of 1, 2"):
        restore(tmp_path / "c", state, step=5)


def test_missing_orbax_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax", None)
    monkeypatch.delitem(sys.modules, "orbax.checkpoint", raising=False)
    with pytest.raises(UnsupportedError, match=r"saving checkpoints needs orbax.*pip install 'moe_jax\[train\]'"):
        Checkpoints(tmp_path, keep=1)


def test_identity(tmp_path, config, state):
    """Refused where the parameters or any key differ, with every key and both values; the mesh may differ."""
    path = tmp_path / "c"
    save(path, state, 1, identity=identify(config, "1 byte"))
    for same in (override(config, mesh={"ep": 8, "tp": 1}), override(config, train={"log_every": 3})):
        restore(path, state, identity=identify(same, "1 byte"))
    for other in (
        {**state, "moments": (jnp.float32(7), [jnp.ones(3)], ())},
        {**state, "moments": (jnp.int32(7), [jnp.ones(4)], ())},
        {"params": state["params"]},
    ):
        with pytest.raises(CheckpointError, match="c/1: holds other parameters"):
            restore(path, other, identity=identify(config, "1 byte"))

    def refusal(other, data):
        with pytest.raises(CheckpointError, match="c/1: belongs to another run") as caught:
            restore(path, state, identity=identify(other, data))
        return str(caught.value)

    other = override(
        config, train={"seed": 1, "grad_clip": float("inf")}, moe={"capacity_factor": 1.5}, router={"score": "sigmoid"}
    )
    assert refusal(other, "2 bytes").splitlines()[1:] == [
        "  - moe.capacity_factor was nothing and is 1.5 now",
        '  - router.score was "softmax" and is "sigmoid" now',
        "  - train.grad_clip was 1.0 and is Infinity now",
        "  - train.seed was 0 and is 1 now",
        '  - data was "1 byte" and is "2 bytes" now',
    ]
    assert refusal(override(config, moe={"top_k": 1}), "1 byte").endswith(": moe.top_k was 2 and is 1 now")


def test_every_setting_is_either_free_or_refused(config):
    """No key is forgotten: the identity holds all of them but the mesh and those that may change."""
    sections = {"moe": config.moe, "router": config.router, "model": config.model, "train": config.train}
    keys = {f"{name}.{field.name}" for name, section in sections.items() for field in dataclasses.fields(section)}
    names = ("eval_batches", "log_every", "save_seconds", "save_every", "keep_checkpoints", "sample_bytes")
    free = {"moe.transport", "moe.backend"} | {f"train.{name}" for name in names}
    assert set(identify(config, "data")) == keys - free | {"data"}


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """As on a full disk, the system writes no file beyond a few bytes."""
    path, state = tmp_path / "c", {"w": jnp.asarray(np.random.default_rng(0).normal(size=10_000))}
    save(path, state, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.closing(Checkpoints(path, keep=2)) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        try:
            match = "c/2: cannot be written .File too large.; the one of step 1 is still there; make room"
            with pytest.raises(CheckpointError, match=match):
                checkpoints.save(state, step=2, identity=IDENTITY)
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert sorted(os.listdir(path)) == ["1"]  # and the part that was written makes room
        checkpoints.save(state, step=2, identity=IDENTITY)  # somebody made room
        assert checkpoints.wait() == 2
    assert_same(state, restore(path, state).state)


@pytest.mark.slow
def test_kill_while_saving_leaves_the_old_checkpoint(tmp_path):
    """Killed in the middle of the second checkpoint: the first is whole, and what there is of the second is removed."""
    program = (
        "import sys, time, jax.numpy as jnp; from pathlib import Path\n"
        "from moe_jax.tools.train import checkpoint, manager\n"
        "kept = checkpoint.Checkpoints(Path(sys.argv[1]), keep=2)\n"
        "kept.save({'w': jnp.ones(3)}, step=1, identity={'data': 'some'}); kept.wait()\n"
        "manager.write_seal = lambda *_: (print('writing', flush=True), time.sleep(600))\n"
        "kept.save({'w': jnp.ones(3)}, step=2, identity={'data': 'some'}); kept.wait()\n"
    )
    path = tmp_path / "c"
    with subprocess.Popen([sys.executable, "-c", program, path], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert saved_steps(path) == [1] and len(unfinished(path)) == 1
    state = {"w": jnp.ones(3)}
    assert restore(path, state).step == 1
    save(path, state, 2)
    assert sorted(os.listdir(path)) == ["1", "2"]


def test_the_seal_is_what_sha256sum_prints(tmp_path, state):
    save(tmp_path, state, 1)
    subprocess.run(["sha256sum", "--check", "--quiet", "run/sha256"], cwd=tmp_path / "1", check=True)
    assert json.loads((tmp_path / "1" / "run" / "metadata").read_text())["step"] == 1
