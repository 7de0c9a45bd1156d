"""The seal of a checkpoint: a list with the SHA-256 of each of its files, by which any damage is noticed.

It is `run/sha256` in the folder of the checkpoint, in the form of the program `sha256sum`: `sha256sum -c run/sha256`,
run in that folder, says the same.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

SEAL = "run/sha256"
# The file that orbax adds after the seal. It is empty, and no array is read by it.
_UNSEALED = ("commit_success.txt",)


def write_seal(checkpoint: Path, folder: Path) -> None:
    """Lists the files of `checkpoint` in `folder`, which becomes its folder "run" when the checkpoint is whole."""
    (folder / Path(SEAL).name).write_text(_list_files(checkpoint))


def find_damage(checkpoint: Path) -> str:
    """What is wrong with the files of a checkpoint; empty if every file is there as it was written.

    Raises:
      OSError: a file cannot be read.
    """
    try:
        listed = set((checkpoint / SEAL).read_bytes().splitlines(keepends=True))
    except (FileNotFoundError, NotADirectoryError):
        return f"{SEAL} is missing"
    found = set(_list_files(checkpoint).encode().splitlines(keepends=True))
    if listed == found:
        return ""
    # A line that is only on one side names a file that was changed, removed or added, or is damaged itself.
    lost = sorted(line.decode(errors="replace").rstrip("\n")[66:] for line in listed - found)
    added = sorted(line.decode().rstrip("\n")[66:] for line in found - listed)
    name = (lost or added)[0]
    return f"{name} is not what {SEAL} says" if (checkpoint / name).exists() and name else f"{name!r} is missing"


def _list_files(checkpoint: Path) -> str:
    return "".join(sorted(f"{_sha256(path)}  {name}\n" for name, path in _files(checkpoint)))


def _files(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    """The names and paths of the files of all items. An item that is being written has a suffix, which names lack."""
    for item in checkpoint.iterdir():
        for path in item.rglob("*") if item.is_dir() else ():
            name = f"{item.name.partition('.')[0]}/{path.relative_to(item).as_posix()}"
            if path.is_file() and name != SEAL and path.name not in _UNSEALED:
                yield name, path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
