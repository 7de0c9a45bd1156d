"""Runs a program in several processes of one jax.distributed job, over loopback."""

import socket
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

_PRELUDE = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", {devices})
jax.distributed.initialize("127.0.0.1:{port}", {count}, {index}, initialization_timeout=60, shutdown_timeout_seconds=5)
PROCESS = {index}
"""


class Finished(NamedTuple):
    """How one process ended."""

    returncode: int | None  # None: it was still running and was killed
    output: str  # stdout and stderr


def run_processes(program: str, count: int, *, devices: int = 1, seconds: float = 120, wait_for=None) -> list[Finished]:
    """Runs ``program``, which knows its own number as PROCESS, in ``count`` processes of ``devices`` CPU devices each.

    Returns when the processes numbered in ``wait_for`` (all of them by default) have ended or the time is over; those
    that still run are killed, whatever happens.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children, files = [], []
    try:
        for index in range(count):
            prelude = _PRELUDE.format(devices=devices, port=port, count=count, index=index)
            files.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 - read and closed when the process has ended
            command = [sys.executable, "-c", prelude + program]
            children.append(subprocess.Popen(command, stdout=files[-1], stderr=subprocess.STDOUT))
        deadline = time.monotonic() + seconds
        awaited = [children[index] for index in (range(count) if wait_for is None else wait_for)]
        while time.monotonic() < deadline and any(child.poll() is None for child in awaited):
            time.sleep(0.05)
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    texts = []
    for file in files:
        with file:
            file.seek(0)
            texts.append(file.read())
    return [Finished(code, text) for code, text in zip(codes, texts, strict=True)]
