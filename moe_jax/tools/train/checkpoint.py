"""Checkpoints: one folder for every saved step, written by orbax in the background, of which the last few are kept.

The folder `STEP` holds the arrays of the state, sharded, in `state`, and what they belong to in `run`: the identity of
the run, its position in the data, and a seal. It gets its name when all of it is written. On reading the seal shows
whether anything was damaged since; every process reads what its own devices hold, whatever the mesh was before.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config
from moe_jax.errors import CheckpointError, raise_all
from moe_jax.host.extras import require
from moe_jax.tools.train import peers
from moe_jax.tools.train.seal import find_damage

# These entries of the configuration may change between a checkpoint and the run that resumes it, because none of them
# alters the function that is trained.
_FREE_MOE = ("transport", "backend")
_FREE_TRAIN = ("eval_batches", "log_every", "save_seconds", "save_every", "keep_checkpoints", "sample_bytes")

# What a checkpoint belongs to: each "section.key" of the configuration with its value, and "data" with a description of
# the bytes that the run trains on.
Identity = dict[str, Any]


def identify(config: Config, data: str) -> Identity:
    """The identity of a run. The mesh is no part of the identity: a run may be resumed on another mesh."""
    values = asdict(config)
    del values["mesh"]
    for section, names in (("moe", _FREE_MOE), ("train", _FREE_TRAIN)):
        for name in names:
            del values[section][name]
    flat = {f"{section}.{name}": value for section, entries in values.items() for name, value in entries.items()}
    return {**flat, "data": data}


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      state: the state, on the mesh of the run that resumes.
      step: how many steps were taken.
      position: where the run was in its data, as it was given to `Checkpoints.save`.
    """

    state: Any
    step: int
    position: Any


class Checkpoints:
    """The checkpoints in the folder `path`, of which the last `keep` are kept. Nothing is touched before the first use.

    Raises:
      UnsupportedError: orbax is not installed.
    """

    def __init__(self, path: Path, *, keep: int) -> None:
        require("orbax.checkpoint", "saving checkpoints")
        self._path = path
        self._keep = keep
        self._later: list[int] = []  # steps whose checkpoints are removed when the next one is written
        self._written: int | None = None  # the step that is being written

    @cached_property
    def _manager(self) -> Any:
        from moe_jax.tools.train import manager  # this module imports orbax

        return manager.make_manager(self._path, keep=self._keep)

    def save(self, state: Any, *, step: int, identity: Identity, position: Any = None) -> None:
        """Begins to write `state`, any pytree of arrays, after `step` finished steps, and returns while it is written.

        The caller may change or donate the arrays at once. What was being written before is waited for.

        Args:
          state: the pytree.
          step: how many steps were taken.
          identity: what the checkpoint belongs to.
          position: where the run is in its data, in a form for JSON.

        Raises:
          CheckpointError: this checkpoint, or the one before it, cannot be written. Older ones are untouched.
        """
        from moe_jax.tools.train.manager import items_to_save

        self.wait()
        self._remove_later()
        self._written = step
        run = {"step": step, "identity": identity, "position": position}
        try:
            self._manager.save(step, args=items_to_save(state, run), force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from None

    def poll(self) -> int | None:
        """The step whose checkpoint has been written since the last call of `poll` or `wait`; None: there is none.

        Raises:
          CheckpointError: it could not be written.
        """
        if self._written is None:
            return None
        (busy,) = peers.agree(self._manager.is_saving_in_progress())
        return None if busy else self.wait()

    def wait(self) -> int | None:
        """Waits for the end of what is being written, and then does what `poll` does."""
        if self._written is None:
            return None
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from None
        step, self._written = self._written, None
        return step

    def restore(self, like: Any, *, identity: Identity, step: int | None = None) -> Restored:
        """Reads the checkpoint of `step`, or the last one. Later ones are removed when the next one is written.

        Args:
          like: the structure, shapes, dtypes and shardings that the state must have.
          identity: what the checkpoint must belong to.
          step: the step; None: the last one.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or it belongs to another configuration or other
            data. If it is damaged, the text says which file has changed, and which older checkpoint is whole.
        """
        from moe_jax.tools.train.manager import run_to_restore, state_to_restore

        steps = saved_steps(self._path)
        if not steps:
            raise nothing_saved(self._path, step)
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps))
            raise CheckpointError(f"{self._path}: there is no checkpoint of step {step}; there are those of {there}")
        step = steps[-1] if step is None else step
        folder = self._path / str(step)
        earlier = [old for old in steps if old < step]
        _check_whole(folder, earlier)
        try:
            run = self._manager.restore(step, args=run_to_restore())["run"]
            _check_identity(folder, run["identity"], identity)
            if _leaves(self._manager.item_metadata(step)["state"].tree) != _leaves(like):
                raise CheckpointError(f"{folder}: holds other parameters than this model has; change --out")
            state = self._manager.restore(step, args=state_to_restore(like))["state"]
        except CheckpointError:
            raise
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            # Its files are what was written, so another version of this program or of orbax wrote it.
            raise CheckpointError(
                f"{folder}: cannot be read ({_reason(error)}); change --out to start afresh"
            ) from None
        self._later = [later for later in steps if later > step]
        return Restored(state, run["step"], run["position"])

    def close(self) -> None:
        """Waits for the end of what is being written. It does not say whether that could be written; `wait` does."""
        if "_manager" in self.__dict__:
            self._manager.close()

    def _remove_later(self) -> None:
        for step in self._later if peers.leads() else ():
            shutil.rmtree(self._path / str(step))
        if self._later:
            peers.agree(0)  # no process looks for checkpoints before the first one has removed them
            self._manager.reload()
        self._later = []

    def _unwritten(self, error: Exception) -> CheckpointError:
        """Removes the part that was written, and says what happened."""
        step, self._written = self._written, None
        for path in unfinished(self._path):
            shutil.rmtree(path, ignore_errors=True)
        steps = saved_steps(self._path)
        kept = f"; the one of step {steps[-1]} is still there" if steps else ""
        return CheckpointError(
            f"{self._path / str(step)}: cannot be written ({_reason(error)}){kept}; make room for one checkpoint more "
            f"than train.keep_checkpoints={self._keep}, or change --out"
        )


def saved_steps(path: Path) -> list[int]:
    """The steps whose checkpoints are in the folder `path`, in their order; none where there is no such folder."""
    if not path.is_dir():
        return []
    return sorted(int(entry.name) for entry in path.iterdir() if entry.name.isdecimal() and entry.is_dir())


def nothing_saved(path: Path, step: int | None) -> CheckpointError:
    """The error of a run that should go on from the checkpoint of `step`, or from the last one, where none is."""
    given = "--resume" if step is None else f"--resume-from {step}"
    return CheckpointError(f"{path}: there is no checkpoint here; start without {given}, or pass another --out")


def unfinished(path: Path) -> list[Path]:
    """The part that was being written in the folder `path` when a run was killed. The next run to save removes it."""
    return sorted(path.glob("*.orbax-checkpoint-tmp*"))


def _check_whole(folder: Path, earlier: list[int]) -> None:
    """Raises CheckpointError if the checkpoint is damaged; the text offers the last of the `earlier` that is whole."""
    damage = peers.tell_all(_damage(folder) if peers.leads() else "")  # one process reads all files
    if not damage:
        return
    text = f"{folder}: is damaged or cut short ({damage})"
    for step in reversed(earlier):
        before = folder.with_name(str(step))
        if not _damage(before):
            out = folder.parent.parent
            raise CheckpointError(f"{text}; {before} is whole: go on from it with --out {out} --resume-from {step}")
    raise CheckpointError(f"{text}, and there is no older one that is whole; change --out to start afresh")


def _damage(folder: Path) -> str:
    try:
        return find_damage(folder)
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and dtype of every leaf by its name. Orbax returns other containers, in which names are the same."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (tuple(leaf.shape), np.dtype(leaf.dtype).name)
        for path, leaf in named
    }


def _reason(error: Exception) -> str:
    """Why a file could not be written or read, in a few words. Tensorstore's errors hold the whole request."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r": ([^:\[\]]+) \[os_error_code", str(error))
    return found[1] if found else (str(error).splitlines() or [type(error).__name__])[0][:200]


def _check_identity(path: Path, stored: Identity, expected: Identity) -> None:
    """Raises one error that names every key that differs, with both values."""
    names = [*expected, *(name for name in stored if name not in expected)]
    differences = [
        f"{name} was {_show(stored, name)} and is {_show(expected, name)} now"
        for name in names
        if _show(stored, name) != _show(expected, name)
    ]
    remedy = "belongs to another run; give back the old values, or change --out to start afresh"
    raise_all(differences, f"{path}: {remedy}", CheckpointError)


def _show(identity: Identity, name: str) -> str:
    """The value of a key as TOML writes it, or "nothing" if this identity lacks the key or its value is None."""
    value = identity.get(name)
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)
