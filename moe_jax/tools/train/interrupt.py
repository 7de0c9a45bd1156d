"""Ctrl-C, SIGTERM and SIGHUP: the first signal asks the run to stop where it is safe, a later one ends it at once.

A Python signal handler runs only when the main thread is back in the interpreter, and XLA may compile for minutes
before that. So the Python handlers here do nothing. Instead a thread reads the wake-up socket, to which Python's own
handler in C writes the number of the signal at once.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

# A person types Ctrl-C, a cluster sends SIGTERM before it takes a machine away, a closing terminal sends SIGHUP.
NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}  # Windows lacks SIGHUP
SIGNALS = {getattr(signal, name): shown for name, shown in NAMES.items() if hasattr(signal, name)}
# A terminal, together with a program that passes signals on, often delivers one request twice. That is not a second
# request.
ECHO_SECONDS = 0.5


class Stopped(Exception):
    """Raised where a run that was asked to stop can do so."""


@dataclass
class Interrupt:
    """Whether the run was asked to stop, and what it is doing meanwhile.

    Attributes:
      signum: the number of the signal that asked the run to stop; 0: none has come so far.
      doing: what the run is doing, such as "compiling the step". The answer to the signal quotes it.
    """

    signum: int = 0
    doing: str = "starting"

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal, as shells have it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signum

    def check(self) -> None:
        """Raises Stopped if the run was asked to stop."""
        if self.signum:
            raise Stopped


@contextmanager
def catch_interrupt(say: Callable[[str], None]) -> Iterator[Interrupt]:
    """Within this context the first signal sets `signum` and is answered through `say`; a later one ends the process.

    A signal that the process was started to ignore stays ignored (nohup has SIGHUP ignored), and one whose handler was
    not installed by Python keeps that handler. Signals reach only the main thread; in another one none is caught.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    watcher = threading.Thread(target=_watch, args=(reader, interrupt, say), daemon=True)
    watcher.start()
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    caught = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, _do_nothing) for number in caught}
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()  # this ends the watcher's loop
        watcher.join()
        reader.close()


def _do_nothing(signum: int, frame: object) -> None:
    """Python writes to the wake-up socket only for signals that have a handler of Python's."""


def _watch(reader: socket.socket, interrupt: Interrupt, say: Callable[[str], None]) -> None:
    """Acts on every signal number that arrives, until the other end of `reader` is closed."""
    asked_at = 0.0
    while numbers := reader.recv(64):
        for number in filter(SIGNALS.__contains__, numbers):
            if not interrupt.signum:
                asked_at, interrupt.signum = time.monotonic(), number
                # Where the terminal has closed, as SIGHUP reports, nobody can read the sentence.
                with suppress(OSError, ValueError):
                    say(
                        f"{SIGNALS[number]} while {interrupt.doing}: the run stops as soon as that is done, and keeps "
                        "what it has learnt; a second one leaves at once and saves nothing"
                    )
            elif time.monotonic() - asked_at > ECHO_SECONDS:
                _leave(number)


def _leave(signum: int) -> None:
    """Ends the process from this thread, whatever the main thread is doing."""
    try:
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # shows the cursor again, which a live line has hidden
        os.write(sys.stderr.fileno(), b"moe_jax: left at once; what came after the last checkpoint is lost\n")
    finally:
        os._exit(128 + signum)
