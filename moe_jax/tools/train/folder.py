"""The folder of a run: how it is chosen, which files it holds, and what keeps other runs from overwriting it."""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from moe_jax.errors import CheckpointError, DataError, MoEError
from moe_jax.host.atomic import remove_unfinished
from moe_jax.tools.train import peers
from moe_jax.tools.train.checkpoint import nothing_saved, saved_steps

RUNS = Path("runs")


class _BusyError(CheckpointError):
    """Another process holds the folder."""


@dataclass(frozen=True)
class RunFolder:
    """The folder in which a run keeps its files.

    Attributes:
      path: the folder.
      note: a sentence on why this folder was chosen, for the person who started the run; empty where that is plain.
    """

    path: Path
    note: str = ""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.png"

    @property
    def how_to_resume(self) -> str:
        return f"go on with --out {self.path} --resume"


@contextmanager
def share_folder(out: str | Path | None, name: str, *, resume: bool, step: int | None = None) -> Iterator[RunFolder]:
    """Does what `open_folder` does in the first process of a run; the others get the folder that it chose.

    Raises:
      CheckpointError: as for `open_folder`; in other processes, whatever failed in the first one.
    """
    with ExitStack() as stack:
        if peers.leads():
            try:
                folder = stack.enter_context(open_folder(out, name, resume=resume, step=step))
            except MoEError:
                peers.tell_all("")
                raise
            peers.tell_all(str(folder.path))
        else:
            path = peers.tell_all("")
            if not path:
                raise CheckpointError("the first process of the run found no folder for it, and says why")
            folder = RunFolder(Path(path))
        yield folder


@contextmanager
def open_folder(out: str | Path | None, name: str, *, resume: bool, step: int | None = None) -> Iterator[RunFolder]:
    """Makes the folder of a run if it does not exist, and locks it against other runs until the context ends.

    Args:
      out: the folder. It must hold a checkpoint if the run is resumed, and none if the run is new.
      name: without `out`, a new run takes the first of the folders `runs/NAME`, `runs/NAME-2`, `runs/NAME-3`, ... that
        is empty, and a resumed run takes the one of these folders whose checkpoint was saved last.
      resume: whether the run goes on from a checkpoint.
      step: the step of that checkpoint; None: the last one.

    Raises:
      CheckpointError: the checkpoint to resume is missing, or there is one that a new run would replace, or another
        run is at work there.
      DataError: the folder cannot be made.
    """
    with ExitStack() as stack:
        if out is None and not resume:
            folder = _claim_first_free(name, stack)
        else:
            folder = _checked(Path(out), resume, step) if out is not None else _last_saved(name, step)
            stack.enter_context(_claim(folder.path))
        remove_unfinished(folder.metrics, folder.report)
        yield folder


def _checked(path: Path, resume: bool, step: int | None) -> RunFolder:
    """The folder that the person named, after checking that it holds a checkpoint, or none, as the run needs."""
    folder = RunFolder(path)
    exists = bool(saved_steps(folder.checkpoints))
    if resume and not exists:
        raise nothing_saved(folder.checkpoints, step)
    if exists and not resume:
        raise CheckpointError(
            f"{path}: holds a run, which a new one would replace; add --resume to go on with it, or pass another --out"
        )
    if folder.metrics.exists() and not resume:
        return RunFolder(path, f"{folder.metrics} is of a run that never saved a checkpoint, and will be replaced")
    return folder


def _last_saved(name: str, step: int | None) -> RunFolder:
    """The folder whose checkpoint is the youngest, among those that runs called `name` take without --out."""
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    paths = [path for path in (RUNS.iterdir() if RUNS.is_dir() else ()) if pattern.fullmatch(path.name)]
    folders = [folder for folder in map(RunFolder, paths) if saved_steps(folder.checkpoints)]
    if not folders:
        raise nothing_saved(RUNS / name, step)
    return max(folders, key=_saved_at)


def _saved_at(folder: RunFolder) -> int:
    """The time at which the last checkpoint of a run was written, in ns."""
    return (folder.checkpoints / str(saved_steps(folder.checkpoints)[-1])).stat().st_mtime_ns


def _claim_first_free(name: str, stack: ExitStack) -> RunFolder:
    """Finds an empty folder for a new run and locks it. Closing `stack` ends the lock."""
    for number in count(1):
        path = RUNS / (name if number == 1 else f"{name}-{number}")
        if path.exists() and not path.is_dir():
            continue
        with ExitStack() as attempt, suppress(_BusyError):
            attempt.enter_context(_claim(path))
            if not any(path.iterdir()):
                stack.push(attempt.pop_all())
                note = f"{RUNS / name} holds an earlier run (--resume goes on with the last one)" if number > 1 else ""
                return RunFolder(path, note)
    raise AssertionError("count() never ends")


@contextmanager
def _claim(path: Path) -> Iterator[None]:
    """Makes the folder and locks it. At the end, a folder that was made here and is still empty is removed."""
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be made ({error.strerror}); pass --out a folder you may write") from None
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise DataError(f"{path}: you may not write here; pass --out a folder you may write")
    try:
        with _lock(path):
            yield
    finally:
        if created:
            with suppress(OSError):  # the folder is not empty: the run left something in it
                path.rmdir()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Locks the folder against other processes. When a process ends, even by a kill, the system ends its locks."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise _BusyError(f"{path}: another run is at work here; wait for its end, or pass another --out") from None
    except OSError:
        pass  # some network file systems have no locks: two runs can then not be kept apart
    try:
        yield
    finally:
        os.close(handle)
