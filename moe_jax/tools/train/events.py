"""The numbers of a run as TensorBoard reads them: an event file in the folder of the run, beside `metrics.jsonl`.

`tensorboard --logdir runs` shows all runs. Events are written as they come, without a thread of their own: one that
fails would be noticed by nobody.
"""

import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from moe_jax.errors import DataError
from moe_jax.host.extras import find

PACKAGE = "tensorboardX"


class EventFile:
    """Writes records of the metrics as events. Without tensorboardX it writes nothing; `missing` then says so.

    A resumed run writes a file of its own, which tells TensorBoard to forget the steps that the run takes again.
    """

    def __init__(self, folder: Path, *, done_steps: int) -> None:
        self._folder = folder
        self._done_steps = done_steps
        self._writer: Any = None
        self.missing = find(PACKAGE) is None

    def append(self, record: dict[str, Any]) -> None:
        """Adds every number of a record of the metrics under its name, and a sample as text.

        Raises:
          DataError: the file cannot be written.
        """
        if self.missing:
            return
        # Not an import statement: protobuf makes its classes when it is imported, so that no checker knows them.
        Summary = import_module(f"{PACKAGE}.proto.summary_pb2").Summary
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if isinstance(value, (int, float)) and name != "step"
        ]
        if "sample" in record:
            # TensorBoard reads Markdown, in which an indented text is shown as it is.
            lines = record["sample"].encode(errors="replace").decode().splitlines()
            indented = "\n".join(f"    {line}" for line in lines)
            values += import_module(f"{PACKAGE}.summary").text("sample", indented).value
        try:
            self._write(step=record["step"], summary=Summary(value=values))
        except OSError as error:
            raise DataError(
                f"{self._folder}: the event file cannot be written ({error.strerror}); make room, or change --out"
            ) from None

    def close(self) -> None:
        if self._writer is not None:
            with suppress(OSError):  # what could not be written was an error before
                self._writer.close()

    def _write(self, **fields: Any) -> None:
        pb = import_module(f"{PACKAGE}.proto.event_pb2")
        if self._writer is None:
            self._writer = import_module(f"{PACKAGE}.event_file_writer").EventsWriter(str(self._folder / "events"))
            start = pb.SessionLog(status=pb.SessionLog.START)
            self._writer.write_event(pb.Event(wall_time=time.time(), step=self._done_steps + 1, session_log=start))
        self._writer.write_event(pb.Event(wall_time=time.time(), **fields))
        self._writer.flush()
