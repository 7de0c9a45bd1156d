"""Faults for a rehearsal: ranks and links that are late on purpose, by sleeps of the host."""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.collectives.exchange import TimedBlocks
from moe_jax.collectives.rendezvous import hold, probe
from moe_jax.errors import InvalidArgumentError
from moe_jax.transports.all_to_all import Padded

Array = jax.Array

_FAULT = re.compile(r"(?:(compute|receiver|sender):(\d+)|link:(\d+)-(\d+))=(.*)")
_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(us|ms|s)")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclasses.dataclass(frozen=True)
class Delays:
    """By how many seconds something is late.

    Attributes:
      compute: [R], each rank, before it dispatches.
      travel: [R, R], each block, by the rank that it comes to and the one that it comes from.
    """

    compute: np.ndarray
    travel: np.ndarray


def parse_duration(name: str, text: str) -> float:
    """The seconds of "20ms", "1.5 s" or "300us"; raises InvalidArgumentError for anything else."""
    found = _DURATION.fullmatch(text.strip())
    if not found:
        raise InvalidArgumentError(f"{name}: {text!r} is no time; write a number and a unit, as in 300us, 20ms or 1.5s")
    return float(found[1]) * _UNITS[found[2]]


def parse_faults(texts: Sequence[str], num_ranks: int) -> Delays:
    """The delays of "compute:3=20ms", "receiver:3=20ms", "sender:3=20ms" and "link:1-5=20ms"; they add up.

    Raises:
      InvalidArgumentError: a text has another form, or names a rank that is not there.
    """
    delays = Delays(np.zeros(num_ranks), np.zeros((num_ranks, num_ranks)))
    for text in texts:
        found = _FAULT.fullmatch(text.strip())
        if not found:
            raise InvalidArgumentError(
                f"--inject {text!r} is no fault; write compute:3=20ms, receiver:3=20ms, sender:3=20ms or link:1-5=20ms"
            )
        kind, *ranks = found[1] or "link", *(int(rank) for rank in found.group(2, 3, 4) if rank)
        seconds = parse_duration(f"--inject {text}", found[5])
        for rank in ranks:
            if rank >= num_ranks:
                raise InvalidArgumentError(
                    f"--inject {text!r} names rank {rank}; the mesh has the ranks 0 to {num_ranks - 1}"
                )
        if ranks[:1] * 2 == ranks:
            raise InvalidArgumentError(f"--inject {text!r}: a rank has no link to itself; name two ranks")
        if kind == "compute":
            delays.compute[ranks[0]] += seconds
        elif kind == "receiver":
            delays.travel[ranks[0]] += seconds
        else:  # a sender is late to all, a link to one
            delays.travel[ranks[1:] or slice(None), ranks[0]] += seconds
    return delays


def delayed(tree: Any, seconds: Array) -> Any:
    """``tree`` after so many ``seconds`` of sleep on the host, once it is there."""

    def sleep(seconds, _):
        time.sleep(float(seconds))
        return np.int32(0)

    slept = jax.pure_callback(sleep, jax.ShapeDtypeStruct((), jnp.int32), seconds, probe(tree))
    return hold(tree, slept)


class LateBlocks(Padded):
    """The transport "padded", whose timed exchange has blocks that are late."""

    name = "rehearsal"

    def __init__(self, travel: np.ndarray, axes: tuple[str, ...]):
        """``travel`` is that of ``Delays``, over the ranks along ``axes``."""
        self._late = TimedBlocks(on_arrival=self._wait)
        self._seconds, self._axes = travel.astype(np.float32), axes

    def timed(self, maps):
        plain = super().timed(maps)
        return None if plain is None else dataclasses.replace(plain, exchange=self._late)

    def _wait(self, block: Array, source: Array) -> Array:
        return delayed(block, jnp.asarray(self._seconds)[lax.axis_index(self._axes), source])
