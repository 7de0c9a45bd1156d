"""Memory of the host: kept between runs, as accelerators keep theirs."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of mallopt, malloc.h


def keep_freed_memory() -> bool:
    """Makes the C library keep what is freed; call it before the first device query. Returns whether it could.

    XLA allocates a program's temporaries anew in every run. GPU and TPU take them from a pool; on Linux buffers of
    32 MiB and more come from the kernel and go back to it, and all emulated devices hold theirs at once where they
    communicate. Touching fresh pages then costs more than the exchange itself, up to four times as much.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not the GNU C library
        return False
    return all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_ARENA_MAX, 1)])
