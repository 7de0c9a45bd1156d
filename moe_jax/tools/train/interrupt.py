"""Ctrl-C, SIGTERM and SIGHUP as data: the first asks the run to stop where it is safe, a later one leaves at once.

A Python signal handler runs only when the main thread is back in the interpreter, and XLA may compile for minutes
before it is. So the handlers do nothing, and a thread reads the wake-up socket that Python's C handler
writes to at once.
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

# What a person types, what a cluster sends before it takes a machine away, what a terminal sends when it closes.
NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP"}  # Windows lacks SIGHUP
SIGNALS = {getattr(signal, name): shown for name, shown in NAMES.items() if hasattr(signal, name)}
# A terminal and a program that passes signals on often deliver one request twice; that is not a second request.
ECHO_SECONDS = 0.5


class Stopped(Exception):
    """The run was asked to stop, and has come to a place where it can."""


@dataclass
class Interrupt:
    """Whether the run was asked to stop, and what it is doing meanwhile.

    Attributes:
      signum: the signal that asked; 0: none so far.
      doing: what the run is doing, as in "compiling the step": for the answer to whoever asks it to stop.
    """

    signum: int = 0
    doing: str = "starting"

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells count: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.signum

    def check(self) -> None:
        """Raises Stopped if the run was asked to stop."""
        if self.signum:
            raise Stopped


@contextmanager
def catch_interrupt(say: Callable[[str], None]) -> Iterator[Interrupt]:
    """Within this context the first signal sets `signum`, and `say` gets a sentence; a later one ends the process.

    A signal that the process was started to ignore stays ignored (nohup ignores SIGHUP), and what a program
    around Python handles stays with it. Signals reach only the main thread; in another one nothing is caught.
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
        writer.close()  # which ends the watcher
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
                with suppress(OSError, ValueError):  # the terminal may be gone: that is what SIGHUP says
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
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")  # shows the cursor, which a live line hides
        os.write(sys.stderr.fileno(), b"moe_jax: left at once; what came after the last checkpoint is lost\n")
    finally:
        os._exit(128 + signum)
