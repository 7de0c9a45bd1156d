"""What the person sees while training: a live line on a terminal, plain lines elsewhere, JSON lines on request."""

import json
import sys
from typing import Any, Protocol

from moe_jax.train.extras import REMEDY, find

Record = dict[str, Any]


class Progress(Protocol):
    """Receives what happens. `step` gets every step's record, `note` a sentence, `result` a final outcome."""

    def step(self, record: Record) -> None: ...

    def note(self, text: str) -> None: ...

    def result(self, event: str, sentence: str, /, **values: Any) -> None: ...

    def close(self) -> None: ...


def make_progress(*, json_lines: bool, log_every: int, num_steps: int) -> Progress:
    """JSON lines if asked for; else a live line where standard output is a terminal; else a line every `log_every`."""
    if json_lines:
        return JsonProgress()
    if not sys.stdout.isatty():
        return PlainProgress(log_every, num_steps)
    if find("rich") is None:
        print(f"rich is not installed, so progress comes as plain lines; {REMEDY}", file=sys.stderr)
        return PlainProgress(log_every, num_steps)
    return LiveProgress(num_steps)


def describe(record: Record, num_steps: int) -> str:
    """One line: step, loss, speed, imbalance (largest load of an expert over the mean load), dropped copies."""
    return (
        f"step {record['step']:>{len(str(num_steps))}}/{num_steps}  loss {record['loss']:.4f}  "
        f"{record['tokens_per_s']:,.0f} tokens/s  imbalance {record['imbalance']:.2f}  dropped {record['dropped']}"
    )


class JsonProgress:
    """One JSON object per line on standard output: every step, note and result."""

    def step(self, record: Record) -> None:
        self._print({"event": "step", **record})

    def note(self, text: str) -> None:
        self._print({"event": "note", "text": text})

    def result(self, event: str, sentence: str, /, **values: Any) -> None:
        self._print({"event": event, **values})

    def close(self) -> None:
        """Nothing is held open."""

    def _print(self, values: Record) -> None:
        print(json.dumps(values), flush=True)


class PlainProgress:
    """Lines on standard output: every `log_every`-th step, the first and the last."""

    def __init__(self, log_every: int, num_steps: int) -> None:
        self._log_every = log_every
        self._num_steps = num_steps

    def step(self, record: Record) -> None:
        if record["step"] in (1, self._num_steps) or record["step"] % self._log_every == 0:
            print(describe(record, self._num_steps), flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)

    def result(self, event: str, sentence: str, /, **values: Any) -> None:
        print(sentence, flush=True)

    def close(self) -> None:
        """Nothing is held open."""


class LiveProgress:
    """A bar with the current step's numbers that is redrawn in place; notes and results scroll above it."""

    def __init__(self, num_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._num_steps = num_steps
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(highlight=False))
        self._task = self._bar.add_task("compiling", total=num_steps)
        self._bar.start()

    def step(self, record: Record) -> None:
        self._bar.update(self._task, completed=record["step"], description=describe(record, self._num_steps))

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False)

    def result(self, event: str, sentence: str, /, **values: Any) -> None:
        self.close()
        self._bar.console.print(sentence, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()
