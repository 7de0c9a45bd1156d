"""Writing files so that each appears whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """The path of an empty temporary file, which replaces `path` if the block succeeds and is removed if it fails.

    A reader, or a run killed at any moment, sees either the old content of `path` or the new one.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_prefix(path))
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
    _sync_folder(path.parent)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """As `atomic_path`, with the temporary file open for writing."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def append_line(file: FileIO, line: bytes) -> None:
    """Adds ``line`` at the end of a file that is open for appending, unbuffered: whole, or not at all.

    It is one write, so a killed run tears at most the last line of the file.

    Raises:
      OSError: there is no room for it.
    """
    end = file.tell()
    if file.write(line) != len(line):
        file.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def remove_unfinished(*paths: Path) -> None:
    """Removes the temporary files of killed processes that were writing `paths`.

    Nobody else may be writing one of `paths` meanwhile: their temporary file would be removed, too.
    """
    for path in paths:
        for temporary in path.parent.iterdir():
            if temporary.name.startswith(_prefix(path)):
                with suppress(OSError):
                    temporary.unlink()


def _prefix(path: Path) -> str:
    return f".{path.name}-"


def _umask() -> int:
    """The permission bits that new files do not get. The system tells them only to a process that sets them."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Writes the folder's new entry to the disk, so that a rename survives a crash, where a folder can be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
