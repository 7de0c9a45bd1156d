"""`sweep.jsonl`: one line for each row of a sweep, kept so that an interrupted sweep goes on where it was."""

import json
from io import FileIO
from pathlib import Path
from typing import Any

from moe_jax.errors import DataError
from moe_jax.host.atomic import append_line, atomic_write

Row = dict[str, Any]
PREDICTED, COMPILED, RUN = "predicted", "compiled", "run"  # where the figures of a row come from
SOURCES = (PREDICTED, COMPILED, RUN)


class RowsFile:
    """The rows of all sweeps that were kept in one file.

    A row is identified by its source and by everything that was asked. So rows of other questions are left alone, and
    none of them is taken for an answer to this one. A row that holds an error is no answer: it is computed again.

    Attributes:
      torn: whether the file ended in half a line, as a killed run leaves it. The first write drops that half.

    Raises:
      DataError: the file cannot be read, or a whole line of it is no such row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows, self.torn = _read(path)
        self._file: FileIO | None = None

    def find(self, source: str, asked: dict[str, Any]) -> Row | None:
        """The row of this source that answers exactly this question; the last one, where there are several."""
        wanted = plain(asked)
        found = (row for row in reversed(self._rows) if row["source"] == source and row["asked"] == wanted)
        return next((row for row in found if "error" not in row), None)

    def add(self, row: Row) -> None:
        """Adds a row at the end of the file, whole or not at all.

        Raises:
          DataError: the file cannot be written.
        """
        row = plain(row)
        try:
            if self._file is None:
                self._file = self._open()
            append_line(self._file, _line(row))
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written ({error.strerror}); make room, or change --out") from None
        self._rows.append(row)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> FileIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self.torn:  # the file with its whole lines alone
            with atomic_write(self._path) as file:
                file.writelines(_line(row) for row in self._rows)
        return self._path.open("ab", buffering=0)


def plain(value: Any) -> Any:
    """``value`` as it comes back from a file: lists for tuples, and text for the keys of tables."""
    return json.loads(json.dumps(value))


def _line(row: Row) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _read(path: Path) -> tuple[list[Row], bool]:
    """All whole rows, and whether half a line follows."""
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], False
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions, or change --out") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        row = None
        try:
            row = json.loads(line)
            whole = row["source"] in SOURCES and isinstance(row["asked"], dict)
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if not whole:
            raise DataError(f"{path}: line {number} is not a row of a sweep; remove the file or change --out")
        rows.append(row)
    return rows, bool(last)
