"""Keeps freed memory of the host between runs, as accelerators keep theirs, and gives it back before it runs out."""

import ctypes
import sys
from collections.abc import Callable

import jax

HEAVY = 0.25  # contenders that need more than this share of the free memory are run once
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of mallopt, from malloc.h


def keep_freed_memory() -> bool:
    """Makes the C library keep what is freed; call it before the first device query. Returns whether that worked.

    XLA allocates a program's temporaries anew in every run. GPU and TPU take them from a pool; on Linux buffers of
    32 MiB and more come from the kernel and go back to it, and all emulated devices hold theirs at once where they
    communicate. Touching fresh pages then costs more than the exchange itself, up to four times as much.
    """
    mallopt = _c_function("mallopt")
    return bool(mallopt) and all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_ARENA_MAX, 1)])


def give_back_freed_memory() -> None:
    """Gives freed memory that was kept back to the operating system, where that is possible."""
    malloc_trim = _c_function("malloc_trim")
    if malloc_trim:
        malloc_trim(0)


def free_bytes() -> int | None:
    """How much memory emulated devices can still take; None if it is unknown, or devices have their own memory."""
    if jax.default_backend() != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def _c_function(name: str) -> Callable | None:
    """A function of the GNU C library; None where there is no such library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
