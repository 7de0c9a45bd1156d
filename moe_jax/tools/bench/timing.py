"""Times of several programs in one process. They run in turn, so that other work of the machine slows all alike."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)

SLOW = 20.0  # contenders that are this many times slower than the layer, and slower than SLOW_SECONDS, are run once
SLOW_SECONDS = 1.0


def seconds_of(run: Callable[[], object]) -> float:
    """How long ``run`` takes; ``run`` itself waits for its results."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(runs: Mapping[Key, Callable[[], object]], repeats: int) -> dict[Key, list[float]]:
    """Seconds of each run in each of ``repeats`` rounds; a round runs everything in turn.

    Each turn runs twice, and the second run counts: the first one pays for the caches and pages that the program before
    it left behind.
    """
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            run()
            seconds[key].append(seconds_of(run))
    return seconds


def quotient(above: list[float], below: list[float]) -> dict[str, float]:
    """The median and the quartiles of the quotients of all rounds; of the medians, if numbers of rounds differ."""
    if len(above) == len(below):
        values = np.asarray(above) / np.asarray(below)
    elif len(above) == 1:
        values = above[0] / np.asarray(below)
    else:
        values = np.asarray([np.median(above) / np.median(below)])
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"median": float(middle), "low": float(low), "high": float(high)}
