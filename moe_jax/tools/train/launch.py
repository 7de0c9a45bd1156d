"""`--processes N`: starts the processes of one run on this machine, and ends them together."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO

from moe_jax.errors import UnsupportedError, check_count
from moe_jax.mesh import has_accelerator
from moe_jax.tools.train.interrupt import SIGNALS

# When one process has failed, the others have so many seconds to end with messages of their own before they are killed.
GRACE_SECONDS = 5.0


def run_processes(arguments: Sequence[str], count: int) -> int:
    """Runs `python -m moe_jax ARGUMENTS --distributed ...` in `count` processes, which talk over loopback.

    The first process writes to the standard output and error of this one. Signals are passed on to all. When one
    process fails or is killed, the others are ended, and a message says which one it was.

    Returns:
      The exit code of the first process, or that of the one that failed first.

    Raises:
      UnsupportedError: the machine has an accelerator, which the processes would not know how to share.
    """
    check_count("--processes", count)
    if has_accelerator():
        raise UnsupportedError(
            "--processes shares emulated CPU devices among processes, and this machine has an accelerator; set "
            "JAX_PLATFORMS=cpu to emulate all the same, or start each process with --distributed HOST:PORT,COUNT,INDEX"
        )
    with ExitStack() as stack:
        children: list[subprocess.Popen] = []
        stack.callback(_kill, children)  # whatever happens, no child is left
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        stack.enter_context(_pass_signals_on(children))
        port = _free_port()
        for index in range(count):
            place = f"127.0.0.1:{port},{count},{index}"
            command = [sys.executable, "-m", "moe_jax", *arguments, "--distributed", place]
            silent = {} if index == 0 else {"stdout": subprocess.DEVNULL, "stderr": errors[index]}
            children.append(subprocess.Popen(command, **silent))
        failed = _await(children)
        if failed is None:
            return 0
        code = _exit_code(children[failed])
        if failed and code not in {128 + number for number in SIGNALS}:
            how = f"was killed by signal {code - 128}" if children[failed].returncode < 0 else f"ended with code {code}"
            words = _last_line(errors[failed])
            print(f"moe_jax: process {failed} of {count} {how}, and the others were ended{words}", file=sys.stderr)
        return code


def _await(children: list[subprocess.Popen]) -> int | None:
    """Waits until all have ended, or for a while after one has failed; returns the first that failed."""
    failed, deadline = None, float("inf")
    while any(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
        if failed is None:
            failed = next((index for index, child in enumerate(children) if child.poll()), None)
            deadline = float("inf") if failed is None else time.monotonic() + GRACE_SECONDS
    return failed if failed is not None else next((i for i, child in enumerate(children) if child.returncode), None)


def _exit_code(child: subprocess.Popen) -> int:
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""


def _kill(children: list[subprocess.Popen]) -> None:
    for child in children:
        child.kill()
        child.wait()


@contextmanager
def _pass_signals_on(children: list[subprocess.Popen]) -> Iterator[None]:
    """Passes every signal on to all children. A terminal sends Ctrl-C to them too; they count two at once as one."""

    def pass_on(signum: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                os.kill(child.pid, signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, pass_on) for number in caught}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
