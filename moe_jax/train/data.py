"""The byte corpus: which bytes are trained on, which are held out, and the batch of every step.

A batch is a pure function of (corpus, seed, step): there is no reader state, so a resumed run sees the same bytes.
"""

import hashlib
import os
import stat
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_jax.errors import DataError

MAX_BYTES = 32 * 1024 * 1024
HELD_OUT = 0.05
MIN_FILES_TO_SPLIT = 20  # below this many files the tail of the bytes is held out, not whole files
# Not in the standard corpus: other people's packages, tests, and tables that are generated rather than written.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"})


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes to validate on, each one uint8 array; `digest` names the content."""

    train: np.ndarray  # [num_train_bytes] uint8
    held_out: np.ndarray  # [num_held_out_bytes] uint8
    digest: str


def load_corpus(path: str | Path | None, seq_len: int) -> Corpus:
    """Reads a file, a folder (all its files, sorted by name) or, for None, Python's own standard library.

    Hidden files are left out, and so is what is no file: reading a pipe could wait for ever.

    About 5 % of the bytes are held out: whole files, picked by the hash of their names, or the tail of few files.

    Raises:
      DataError: the path cannot be read, or either part is too small for one window of `seq_len` + 1 bytes.
    """
    root = Path(path) if path is not None else Path(sysconfig.get_path("stdlib"))
    files = _list_files(root, standard_library=path is None)
    texts = _read_files(root, files)
    train, held_out = _split(texts)
    for name, part in (("training", train), ("held-out", held_out)):
        if len(part) < seq_len + 1:
            raise DataError(
                f"{root}: the {name} part has {len(part)} bytes and one window needs {seq_len + 1}; "
                "give more data, or lower model.seq_len"
            )
    digest = hashlib.sha256(train + b"\0" + held_out).hexdigest()
    return Corpus(np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8), digest)


def train_batch(corpus: Corpus, *, seed: int, step: int, batch_size: int, seq_len: int) -> np.ndarray:
    """The windows of `step`, drawn uniformly with replacement: [batch_size, seq_len + 1] i32."""
    starts = np.random.default_rng([seed, step]).integers(0, len(corpus.train) - seq_len, batch_size)
    return _windows(corpus.train, starts, seq_len)


def eval_batch(corpus: Corpus, *, index: int, num_batches: int, batch_size: int, seq_len: int) -> np.ndarray:
    """Batch `index` of `num_batches`; windows lie evenly over the held-out bytes: [batch_size, seq_len + 1] i32."""
    starts = np.linspace(0, len(corpus.held_out) - seq_len - 1, num_batches * batch_size).astype(np.int64)
    return _windows(corpus.held_out, starts[index * batch_size : (index + 1) * batch_size], seq_len)


def _windows(data: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    return data[starts[:, None] + np.arange(seq_len + 1)].astype(np.int32)


def _list_files(root: Path, *, standard_library: bool) -> list[str]:
    """Names of the files below `root`, relative to it, sorted; [""] where `root` is itself a file."""
    if root.is_file():
        return [""]
    if not root.is_dir():
        raise DataError(f"{root}: there is no such file or folder; give --data a path to text")
    names = []
    for folder, subfolders, files in os.walk(root, onerror=_raise_unreadable):
        subfolders[:] = [name for name in subfolders if not _is_skipped(name, standard_library)]
        relative = Path(folder).relative_to(root)
        texts = [name for name in files if _is_text(name, standard_library)]
        names += [(relative / name).as_posix() for name in texts if _is_regular(os.path.join(folder, name))]
    if not names:
        remedy = "pass --data with a file or folder" if standard_library else "give --data a folder with files in it"
        raise DataError(f"{root}: holds no files to train on; {remedy}")
    return sorted(names)


def _is_skipped(folder: str, standard_library: bool) -> bool:
    return folder.startswith((".", "__pycache__")) or (standard_library and folder in SKIPPED_FOLDERS)


def _is_text(name: str, standard_library: bool) -> bool:
    return name.endswith(".py") if standard_library else not name.startswith(".")


def _is_regular(path: str) -> bool:
    """False for pipes, sockets and devices. What cannot be asked passes: reading it gives the better error."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None


def _read_files(root: Path, names: list[str]) -> dict[str, bytes]:
    """Content by name, in order, up to MAX_BYTES in all; what lies beyond is left out."""
    texts: dict[str, bytes] = {}
    room = MAX_BYTES
    for name in names:
        if room <= 0:
            break
        try:
            with open(root / name, "rb") as file:
                texts[name] = file.read(room)
        except OSError as error:
            _raise_unreadable(error)
        room -= len(texts[name])
    return texts


def _split(texts: dict[str, bytes]) -> tuple[bytes, bytes]:
    """(training bytes, held-out bytes); no byte is in both."""
    total = sum(map(len, texts.values()))
    if len(texts) < MIN_FILES_TO_SPLIT:
        joined = b"".join(texts.values())
        cut = total - int(total * HELD_OUT)
        return joined[:cut], joined[cut:]
    held_out: set[str] = set()
    room = total * HELD_OUT
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest()):
        if len(texts[name]) <= room:
            held_out.add(name)
            room -= len(texts[name])
    return (
        b"".join(text for name, text in texts.items() if name not in held_out),
        b"".join(text for name, text in texts.items() if name in held_out),
    )
