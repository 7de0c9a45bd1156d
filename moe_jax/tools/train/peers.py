"""The processes of one run: how they find each other, and what they agree on. A run of one process has no peers.

All processes do the same in the same order. The first one alone talks to the person, and writes the metrics and the
picture; what only one of them can know, such as that a signal came, is told to all before any of them acts on it.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import numpy as np

from moe_jax import _compat
from moe_jax.errors import InvalidArgumentError, MeshError, MoEError
from moe_jax.mesh import emulate_devices, has_accelerator

TEXT_BYTES = 4096  # the room for a text that the first process tells the others
# A process that has failed ends after so many seconds, even if the others wait for it elsewhere and do not end.
SHUTDOWN_SECONDS = 10


# What Gloo, NCCL and JAX's service say about a process that is gone.
_LOST = re.compile("Gloo|NCCL|[Cc]onnection|[Cc]oordination|[Hh]eartbeat|DEADLINE_EXCEEDED")


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run.

    Attributes:
      coordinator: "HOST:PORT", where the first process listens.
      count: how many processes there are.
      index: the number of this one, from 0.
    """

    coordinator: str
    count: int
    index: int


def parse_place(text: str) -> Place:
    """Reads "HOST:PORT,COUNT,INDEX".

    Raises:
      InvalidArgumentError: the text has another form.
    """
    coordinator, *numbers = text.split(",")
    host, _, port = coordinator.rpartition(":")
    if host and port.isdecimal() and len(numbers) == 2 and all(number.strip().isdecimal() for number in numbers):
        count, index = map(int, numbers)
        if index < count:
            return Place(coordinator, count, index)
    raise InvalidArgumentError(
        f"--distributed {text}: give HOST:PORT,COUNT,INDEX, as in 10.0.0.1:4567,8,0: where the process of index 0 "
        "listens, how many there are, and which this is; or nothing on Slurm, Kubernetes and Cloud TPU"
    )


def join(place: Place | None, *, num_devices: int) -> None:
    """Joins the other processes, which all call this too, before any device is asked for.

    Args:
      place: this process among them; None: Slurm, Kubernetes or Cloud TPU tell.
      num_devices: devices of the mesh, over all processes. Where there is no accelerator, every process emulates its
        part of them.

    Raises:
      MeshError: the mesh does not divide among the processes, or they cannot find each other.
    """
    # JAX's service would take over SIGTERM, which a run answers itself.
    jax.config.update("jax_enable_preemption_service", False)
    arguments = {} if place is None else {
        "coordinator_address": place.coordinator, "num_processes": place.count, "process_id": place.index
    }  # fmt: skip
    try:
        jax.distributed.initialize(**arguments, shutdown_timeout_seconds=SHUTDOWN_SECONDS)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "without HOST:PORT,COUNT,INDEX it needs Slurm, Kubernetes (and the package kubernetes) or Cloud TPU"
        raise MeshError(f"--distributed: the processes did not find each other ({reason}); {remedy}") from None
    count = _compat.process_place()[1]
    if num_devices % count:
        raise MeshError(
            f"the mesh has {num_devices} devices, which {count} processes cannot share evenly; change --mesh"
        )
    if not has_accelerator():
        _keep_stdout_to_python()
        emulate_devices(num_devices // count)
    if len(jax.devices()) != num_devices:
        raise MeshError(
            f"the mesh has {num_devices} devices and the {count} processes have {len(jax.devices())}; change --mesh"
        )


def leads() -> bool:
    """Whether this is the process that talks and writes."""
    return _compat.process_place()[0] == 0


def alone() -> bool:
    return _compat.process_place()[1] == 1


@contextmanager
def notice_losses() -> Iterator[None]:
    """A context that says in a sentence that another process is gone. JAX reports it as a failure of what came next.

    Raises:
      MeshError: another process is gone.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if alone() or isinstance(error, MoEError) or not _LOST.search(str(error)):
            raise
        raise MeshError(
            f"another process of the run has ended or cannot be reached ({str(error).splitlines()[0][:200]}); "
            "what came after the last checkpoint is lost: go on with the same command and --resume"
        ) from None


def agree(*numbers: int) -> tuple[int, ...]:
    """The largest of the values that all processes pass, number by number. All call this at the same place."""
    if alone():
        return numbers
    from jax.experimental import multihost_utils

    return tuple(map(int, np.max(multihost_utils.process_allgather(np.array(numbers)), axis=0)))


def tell_all(text: str) -> str:
    """The value that the first process passes, in all processes. All call this at the same place."""
    if alone():
        return text
    from jax.experimental import multihost_utils

    content = np.zeros(TEXT_BYTES, np.uint8)
    encoded = text.encode(errors="surrogateescape")[:TEXT_BYTES] if leads() else b""
    content[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(content))
    return told.astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="surrogateescape")


def _keep_stdout_to_python() -> None:
    """Lets only Python write to standard output. Gloo, which connects CPU devices, writes lines to it from C++."""
    sys.stdout.flush()
    own = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)
