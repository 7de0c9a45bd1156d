"""What a person sees of a run: a live line on a terminal, plain lines elsewhere, and JSON lines on request."""

import json
import os
import sys
import time
from typing import Any, Protocol

from moe_jax.errors import DataError
from moe_jax.host.extras import REMEDY, find
from moe_jax.tools.train import peers

Record = dict[str, Any]
SILENT_SECONDS = 20.0  # while anything moves, a plain line is printed at least this often


class Progress(Protocol):
    """Shows what happens. The thread that trains and the thread that watches for signals call it.

    `step` is called with the record of every step; `task` with the name of anything else that takes time, and with how
    much of it is done where that is known; `note` with a sentence; `result` with an outcome.
    """

    def step(self, record: Record) -> None: ...

    def task(self, name: str, done: int = 0, total: int | None = None) -> None: ...

    def note(self, text: str) -> None: ...

    def result(self, event: str, sentence: str, /, **values: Any) -> None: ...

    def close(self) -> None: ...


def make_progress(*, json_lines: bool, log_every: int, num_steps: int) -> Progress:
    """Chooses JSON lines if asked for, otherwise a live line on a terminal, otherwise lines every `log_every` steps.

    Of several processes the first one alone talks.
    """
    if not peers.leads():
        return SilentProgress()
    if json_lines:
        return JsonProgress()
    if not sys.stdout.isatty():
        return PlainProgress(log_every, num_steps)
    if find("rich") is None:
        print(f"rich is not installed, so progress comes as plain lines; {REMEDY}", file=sys.stderr)
        return PlainProgress(log_every, num_steps)
    return LiveProgress(num_steps)


def describe(record: Record, num_steps: int) -> str:
    """One line: step, loss, speed, the largest load of an expert and of a rank over the mean, and dropped pairs."""
    return (
        f"step {record['step']:>{len(str(num_steps))}}/{num_steps}  loss {record['loss']:.4f}  "
        f"{record['tokens_per_s']:,.0f} tokens/s  imbalance {record['imbalance']:.2f}  "
        f"ranks {record['rank_imbalance']:.2f}  dropped {record['dropped']}"
    )


def _describe_task(name: str, done: int, total: int | None) -> str:
    return name if total is None else f"{name} {done}/{total}"


def _print_line(text: str) -> None:
    """Writes a line and its end by one call, so that lines of two threads do not mix.

    Raises:
      BrokenPipeError: nobody reads standard output any more.
      DataError: the line cannot be written for another reason.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except OSError as error:
        # From here on lines go to the null device. Otherwise the next line would stop the run before it has saved, and
        # Python would fail when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise DataError(f"standard output: cannot be written ({error.strerror}); make room, or redirect it") from None


class SilentProgress:
    """Shows nothing."""

    def step(self, record: Record) -> None:
        """Nothing is shown."""

    def task(self, name: str, done: int = 0, total: int | None = None) -> None:
        """Nothing is shown."""

    def note(self, text: str) -> None:
        """Nothing is shown."""

    def result(self, event: str, sentence: str, /, **values: Any) -> None:
        """Nothing is shown."""

    def close(self) -> None:
        """Nothing is held open."""


class JsonProgress:
    """One JSON object per line on standard output: every step, task, note and result."""

    def step(self, record: Record) -> None:
        self._print({"event": "step", **record})

    def task(self, name: str, done: int = 0, total: int | None = None) -> None:
        self._print({"event": "task", "name": name, "done": done, "total": total})

    def note(self, text: str) -> None:
        self._print({"event": "note", "text": text})

    def result(self, event: str, sentence: str, /, **values: Any) -> None:
        self._print({"event": event, **values})

    def close(self) -> None:
        """Nothing is held open."""

    def _print(self, values: Record) -> None:
        _print_line(json.dumps(values))


class PlainProgress:
    """Prints lines on standard output.

    There is one for every `log_every`-th step, the first and the last, one for the start of every task, and one more
    wherever nothing was said for SILENT_SECONDS.
    """

    def __init__(self, log_every: int, num_steps: int) -> None:
        self._log_every = log_every
        self._num_steps = num_steps
        self._task = ""
        self._printed_at = time.monotonic()

    def step(self, record: Record) -> None:
        regular = record["step"] in (1, self._num_steps) or record["step"] % self._log_every == 0
        if regular or self._was_silent():
            self._print(describe(record, self._num_steps))

    def task(self, name: str, done: int = 0, total: int | None = None) -> None:
        if name != self._task or self._was_silent():
            self._print(_describe_task(name, done, total))
        self._task = name

    def note(self, text: str) -> None:
        self._print(text)

    def result(self, event: str, sentence: str, /, **values: Any) -> None:
        self._print(sentence)

    def close(self) -> None:
        """Nothing is held open."""

    def _was_silent(self) -> bool:
        return time.monotonic() - self._printed_at > SILENT_SECONDS

    def _print(self, text: str) -> None:
        self._printed_at = time.monotonic()
        _print_line(text)


class LiveProgress:
    """Redraws a bar for what is under way in place. Lines that are to stay scroll above the bar."""

    def __init__(self, num_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._num_steps = num_steps
        self._last_step = ""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=10), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(highlight=False), transient=True)
        self._name = "starting"
        self._row = self._bar.add_task(self._name, total=None)
        self._bar.start()

    def step(self, record: Record) -> None:
        self._last_step = describe(record, self._num_steps)
        self._show("step", self._last_step, record["step"], self._num_steps)

    def task(self, name: str, done: int = 0, total: int | None = None) -> None:
        self._keep_last_step()
        self._show(name, _describe_task(name, done, total), done, total)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def result(self, event: str, sentence: str, /, **values: Any) -> None:
        self.note(sentence)

    def close(self) -> None:
        self._bar.stop()
        self._keep_last_step()

    def _show(self, name: str, description: str, done: int, total: int | None) -> None:
        if name != self._name:
            # The time that is left is then estimated from this task alone.
            self._bar.reset(self._row, total=total, completed=done)
        self._name = name
        self._bar.update(self._row, completed=done, total=total, description=description)

    def _keep_last_step(self) -> None:
        if self._last_step:
            self.note(self._last_step)
        self._last_step = ""
