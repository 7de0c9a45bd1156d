"""The profile of a few steps of a run, which `train --profile` asks for."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from moe_jax.errors import DataError

SKIPPED, TRACED = 1, 3  # steps: the first one also pays for what happens once


def make_profile_folder(path: str | Path) -> Path:
    """Makes the folder before anything takes time.

    Raises:
      DataError: it cannot be made or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"profile={str(path)!r} cannot be made ({error.strerror}); give another folder") from None
    if not os.access(path, os.W_OK):
        raise DataError(f"profile={str(path)!r} cannot be written; give another folder")
    return path


class StepTrace:
    """Writes a trace of `jax.profiler` of ``TRACED`` steps, after ``SKIPPED`` ones, or of all where there are no more.

    Every operation carries the path of `named_scope` that it was made in, such as "exchange" within "moe". On CPUs it
    stands in the program that the trace holds, to which the name of an event refers.

    Args:
      folder: where to write; None: no trace.
      num_steps: so many steps will be taken.
      tell: is called with a sentence when the trace is written.
    """

    def __init__(self, folder: Path | None, num_steps: int, tell: Callable[[str], None]) -> None:
        self._folder, self._tell = folder, tell
        self._ahead = SKIPPED if num_steps > SKIPPED else 0
        self._traced: list[int] = []
        self._is_open = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Stands around the step with this number."""
        if self._folder is not None and self._ahead == 0 and not self._traced:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python would be most of the file
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._is_open = True
        self._ahead = max(0, self._ahead - 1)
        if not self._is_open:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield
        self._traced.append(number)
        if len(self._traced) == TRACED:
            self.close()

    def close(self) -> None:
        """Ends and writes the trace, if one is open."""
        if not self._is_open:
            return
        self._is_open = False
        jax.profiler.stop_trace()
        if self._traced:
            self._tell(f"wrote a profile of steps {self._traced[0]} to {self._traced[-1]} into {self._folder}")
