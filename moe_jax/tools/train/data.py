"""The byte corpus: which bytes are trained on, and which are held out.

Content stays on the disk until it is asked for, so the corpus may be larger than the memory.
"""

import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moe_jax.errors import DataError

HELD_OUT = 0.05
MIN_FILES_TO_SPLIT = 20  # if there are fewer files, the last bytes are held out instead of whole files
# The standard corpus leaves out other people's packages, tests, and tables that were generated rather than written.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"})
BLOCK = 64 * 1024 * 1024  # so many bytes are read at once where the whole corpus is read
_KINDS = {
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class Span:
    """A stretch of a file.

    Attributes:
      path: the file.
      start: the first byte of the stretch, counted from the beginning of the file.
      length: how many bytes it has.
    """

    path: str
    start: int
    length: int

    def read(self, offset: int, length: int) -> bytes:
        """Reads `length` bytes, of which the first is byte `offset` of the span."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start + offset)
                content = file.read(length)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if len(content) != length:
            raise DataError(f"{self.path}: became shorter during the run; leave the data as it is while a run reads it")
        return content


@dataclass(frozen=True)
class Text:
    """Spans of files as one sequence of bytes that stays on the disk.

    Attributes:
      spans: the spans, in the order of their bytes.
    """

    spans: tuple[Span, ...]

    @cached_property
    def _ends(self) -> np.ndarray:
        """Where each span ends in the whole text: the inclusive prefix sums of the lengths, [num_spans] i64."""
        return np.cumsum([span.length for span in self.spans], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.spans else 0

    def read(self, start: int, length: int) -> bytes:
        """Reads `length` bytes, of which the first is byte `start` of the text. They may lie in several files."""
        parts = []
        index = int(np.searchsorted(self._ends, start, side="right"))  # the span that holds byte `start`
        while length > 0:
            span = self.spans[index]
            offset = start - (int(self._ends[index]) - span.length)
            part = span.read(offset, min(length, span.length - offset))
            parts.append(part)
            start, length, index = start + len(part), length - len(part), index + 1
        return b"".join(parts)


@dataclass(frozen=True)
class Corpus:
    """The bytes to train on and the bytes to validate on.

    Attributes:
      train: the training bytes.
      held_out: the validation bytes; none of them is a training byte.
      left_out: names of files and folders that lie below the folder of the corpus and are not read.
    """

    train: Text
    held_out: Text
    left_out: tuple[str, ...] = ()


def load_corpus(path: str | Path | None, seq_len: int) -> Corpus:
    """Finds the bytes of a file, or of all files below a folder, sorted by name; None: of Python's standard library.

    Hidden files and folders, links to folders, and pipes, sockets and devices (reading a pipe could wait for ever) are
    left out. About 5 % of the bytes are held out: whole files that are picked by the hash of their names or, where
    there are only a few files, the last bytes of all. No content is read here.

    Raises:
      DataError: there is nothing to read at the path, or either part is too small for a window of `seq_len` + 1 bytes.
    """
    root = Path(path) if path is not None else Path(sysconfig.get_path("stdlib"))
    names, left_out = _list_files(root, standard_library=path is None)
    sizes = {name: _size(root / name) for name in names}
    total = sum(sizes.values())
    if not total:
        what = f"all {len(names)} files in it are empty" if root.is_dir() else "is empty"
        raise DataError(f"{root}: {what}; give --data a file or folder with text in it")
    train, held_out = _split(root, sizes)
    for name, part in (("training", train), ("held-out", held_out)):
        if len(part) < seq_len + 1:
            raise DataError(
                f"{root}: has {total} bytes, its {name} part has {len(part)} bytes and one window needs {seq_len + 1}; "
                "give more data, or lower model.seq_len"
            )
    return Corpus(train, held_out, tuple(left_out))


def digest(corpus: Corpus, tell: Callable[[str, int, int], None]) -> str:
    """The SHA-256 of the whole content. Calls `tell` with the number of MiB that are read so far and that there are.

    Raises:
      DataError: a file cannot be read, or has become shorter.
    """
    found, done = hashlib.sha256(), 0
    total = len(corpus.train) + len(corpus.held_out)
    for text, separator in ((corpus.train, b"\0"), (corpus.held_out, b"")):
        for start in range(0, len(text), BLOCK):
            block = text.read(start, min(BLOCK, len(text) - start))
            found.update(block)
            done += len(block)
            if BLOCK <= done < total:
                tell("reading the data (MiB)", done >> 20, total >> 20)
        found.update(separator)
    return found.hexdigest()


def _list_files(root: Path, *, standard_library: bool) -> tuple[list[str], list[str]]:
    """Names of the files to read and of what is left out, relative to `root` and sorted; [""] if `root` is a file."""
    mode = _mode(root)
    if stat.S_ISREG(mode):
        return [""], []
    if not stat.S_ISDIR(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file and no folder")
        raise DataError(f"{root}: is {kind}; give --data a file or folder of text")
    names, left_out = [], []
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        skipped = [name for name in subfolders if _is_skipped(name, standard_library)]
        links = [name for name in subfolders if name not in skipped and os.path.islink(os.path.join(folder, name))]
        subfolders[:] = [name for name in subfolders if name not in skipped]
        texts = [name for name in files if _is_text(name, standard_library) and _is_regular(os.path.join(folder, name))]
        relative = Path(folder).relative_to(root)
        names += [(relative / name).as_posix() for name in texts]
        left_out += [(relative / name).as_posix() for name in [*skipped, *links, *(set(files) - set(texts))]]
    if not names:
        remedy = "pass --data with a file or folder" if standard_library else "give --data a folder with files in it"
        besides = f" (only {min(left_out)!r} and the like, which is left out)" if left_out else ""
        raise DataError(f"{root}: holds no files to train on{besides}; {remedy}")
    return sorted(names), [] if standard_library else sorted(left_out)


def _is_skipped(folder: str, standard_library: bool) -> bool:
    return folder.startswith((".", "__pycache__")) or (standard_library and folder in SKIPPED_FOLDERS)


def _is_text(name: str, standard_library: bool) -> bool:
    return name.endswith(".py") if standard_library else not name.startswith(".")


def _is_regular(path: str) -> bool:
    """False for pipes, sockets and devices. A path that cannot be examined passes: reading it tells more."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _mode(root: Path) -> int:
    try:
        return root.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"{root}: there is no such file or folder; give --data a path to text") from None
    except OSError as error:
        raise _unreadable(root, error) from None


def _size(path: Path) -> int:
    """The size of a file. The file is opened for it, so that an unreadable one is reported before the run begins."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise _unreadable(path, error) from None


def _raise(error: OSError) -> None:
    raise _unreadable(error.filename, error) from None


def _unreadable(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); check its permissions")


def _split(root: Path, sizes: dict[str, int]) -> tuple[Text, Text]:
    """Splits the files, given by their names and sizes, into training bytes and held-out bytes; no byte is in both."""
    total = sum(sizes.values())
    spans = {name: Span(str(root / name), 0, size) for name, size in sizes.items() if size}
    if len(sizes) < MIN_FILES_TO_SPLIT:
        return _cut(list(spans.values()), total - int(total * HELD_OUT))
    held_out: set[str] = set()
    room = total * HELD_OUT
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest()):
        if sizes[name] <= room:
            held_out.add(name)
            room -= sizes[name]
    return (
        Text(tuple(span for name, span in spans.items() if name not in held_out)),
        Text(tuple(span for name, span in spans.items() if name in held_out)),
    )


def _cut(spans: list[Span], size: int) -> tuple[Text, Text]:
    """Splits spans into their first `size` bytes and the rest. One span may be divided between the two."""
    before, after = [], []
    for span in spans:
        head = min(size, span.length)
        size -= head
        if head:
            before.append(Span(span.path, span.start, head))
        if head < span.length:
            after.append(Span(span.path, span.start + head, span.length - head))
    return Text(tuple(before)), Text(tuple(after))
