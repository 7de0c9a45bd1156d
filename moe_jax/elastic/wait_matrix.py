"""Who waits for whom: from the waits of many steps to the rank, the receiver or the link that is slow."""

import dataclasses
import numbers
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import DtypeError, InvalidArgumentError, ShapeError, check_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Straggler:
    """What stands out, and by how much; ``str`` of it says so in a sentence.

    Attributes:
      kind: "compute": the source is ready late, and every rank waits for it. "receiver": every block comes to the
        receiver late. "sender": every block of the source arrives late. "link": the blocks of the source come late to
        the receiver alone.
      source: the rank that is waited for; None for "receiver".
      receiver: the rank that waits; None for "compute" and "sender".
      microseconds: how long one waits there in a step, the median over steps.
      typical: how long one waits elsewhere: the same of the other ranks or links, the median over them.
      share: in which share of the steps it stands out.
    """

    kind: str
    source: int | None = None
    receiver: int | None = None
    microseconds: float
    typical: float
    share: float

    def __str__(self) -> str:
        long, typical = in_words(self.microseconds), in_words(self.typical)
        seen = "in all steps" if self.share == 1 else f"in {self.share:.0%} of the steps"
        if self.kind == "compute":
            return (
                f"slow compute on rank {self.source}: the others wait {long} until it is ready, and {typical} for "
                f"another rank, {seen}"
            )
        if self.kind == "receiver":
            return (
                f"slow receiver {self.receiver}: each block takes {long} to come to rank {self.receiver}, and "
                f"{typical} to come to another, {seen}"
            )
        if self.kind == "sender":
            return (
                f"slow sender {self.source}: each block of rank {self.source} takes {long} to arrive, and {typical} of "
                f"another, {seen}"
            )
        return (
            f"slow link {self.source}-{self.receiver}: blocks of rank {self.source} take {long} to come to rank "
            f"{self.receiver} alone, and {typical} on another link, {seen}"
        )


def find_stragglers(
    ready: Any, travel: Any, *, warm_up: int = 2, at_least: float = 500.0, times: float = 2.0, share: float = 0.75
) -> list[Straggler]:
    """The ranks and links that are slow, by the waits of many steps: what stands out from the others of its kind.

    Of both arrays, entry [s, j, i] is what rank j waited for rank i in step s, in microseconds: row j of a step is what
    ``dispatch(..., performance_info=)`` counted on rank j, given as [2, W].

    - Rank i computes slowly if most other ranks wait for it until it is ready. That a rank waits for all others says
      nothing about it but that it came early.
    - Rank j receives slowly if at least three quarters of what travels to it is late; rank i sends slowly if the same
      holds of what it sends. With two ranks there is no telling, and each is a link.
    - A link is slow if what travels over it is late by more than half of what its two ends add to every block.

    Late means, in a ``share`` of the steps, ``at_least`` microseconds longer than the median of the other ranks or
    links, and ``times`` times as long as they take in all but a quarter of the steps. In fewer than a dozen steps some
    of it may be chance.

    Args:
      ready: [S, R, R] numbers, not negative: the time until rank i was ready. The diagonal is not read.
      travel: [S, R, R] likewise: the time that its blocks travelled.
      warm_up: how many of the first steps are left out.
      at_least, times, share: what is late, as above; share is above 0 and at most 1. A smaller share finds what is slow
        now and then, and more that is chance.

    Returns:
      What is slow, the longest wait beyond the typical one first; empty if nothing stands out.

    Raises:
      ShapeError, DtypeError: the arrays are not as above.
      InvalidArgumentError: a number is negative or not finite, or out of its range; or no step is left.

    >>> import numpy as np, moe_jax as moe
    >>> ready, travel = np.full((10, 4, 4), 300.0), np.full((10, 4, 4), 200.0)
    >>> ready[:, :, 2] += 20_000  # every rank waits 20 ms longer for rank 2
    >>> travel[:, 3, 0] += 5_000  # from rank 0 to rank 3
    >>> for straggler in moe.find_stragglers(ready, travel):
    ...     print(straggler)
    slow compute on rank 2: the others wait 20.3 ms until it is ready, and 0.3 ms for another rank, in all steps
    slow link 0-3: blocks of rank 0 take 5.2 ms to come to rank 3 alone, and 0.2 ms on another link, in all steps
    """
    ready, travel = check_waits("ready", ready), check_waits("travel", travel)
    if ready.shape != travel.shape:
        raise ShapeError(f"ready has shape {ready.shape} and travel {travel.shape}; both must be of the same steps")
    check_count("warm_up", warm_up, low=0)
    if warm_up >= len(ready):
        raise InvalidArgumentError(f"warm_up={warm_up} leaves none of {len(ready)} steps; measure more")
    for name, value, low in (("at_least", at_least, 0), ("times", times, 1)):
        if not _is_number(value) or not low <= value < np.inf:
            raise InvalidArgumentError(f"{name}={value!r} must be a number of at least {low}")
    if not _is_number(share) or not 0 < share <= 1:
        raise InvalidArgumentError(f"share={share!r} must be a number above 0 and at most 1")
    rule = _Rule(at_least, times, share)
    ready, travel = ready[warm_up:], travel[warm_up:]
    found = _slow_ranks("compute", _over_others(ready, 0.5, "higher", axis=1), rule)
    if ready.shape[1] > 2:
        found += _slow_ranks("receiver", _over_others(travel, 0.25, "lower", axis=2), rule)
        found += _slow_ranks("sender", _over_others(travel, 0.25, "lower", axis=1), rule)
    found += _slow_links(travel, found, rule)
    return sorted(found, key=lambda one: one.typical - one.microseconds)


def check_waits(name: str, waits: Any) -> np.ndarray:
    """``waits`` as an array of float64; raises unless they are [S, R, R] finite numbers, none of them negative."""
    try:
        waits = np.asarray(waits)
    except ValueError:  # lists of several lengths
        raise ShapeError(f"{name} is no array, but lists of several lengths; expected [S, R, R]") from None
    if waits.ndim != 3 or not len(waits) or waits.shape[1] != waits.shape[2] or waits.shape[1] < 2:
        raise ShapeError(
            f"{name} has shape {waits.shape}; expected [S, R, R], S steps of R ranks, at least one and two: stack the "
            "rows of all ranks"
        )
    if not np.issubdtype(waits.dtype, np.integer) and not np.issubdtype(waits.dtype, np.floating):
        raise DtypeError(f"{name} has dtype {waits.dtype}; expected numbers, the microseconds of each wait")
    if not np.isfinite(waits).all() or (waits < 0).any():
        raise InvalidArgumentError(f"{name} has a negative number, or one that is not finite; a wait is at least 0")
    return waits.astype(np.float64)


def in_words(microseconds: float) -> str:
    """A time as people say it: "85 us", "19.8 ms", "2.0 s"."""
    if microseconds < 100:
        return f"{microseconds:.0f} us"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.1f} s"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class _Rule(NamedTuple):
    """When something is late, as ``find_stragglers`` says."""

    at_least: float
    times: float
    share: float


class _Late(NamedTuple):
    """One of N series that stands out, by its number."""

    number: int
    microseconds: float
    typical: float
    share: float


def _over_others(waits: np.ndarray, quantile: float, method: Any, *, axis: int) -> np.ndarray:
    """[S, R, R] -> [S, R]: a quantile over ``axis``, the diagonal left out."""
    steps, ranks, _ = waits.shape
    others = ~np.eye(ranks, dtype=bool)
    rows = (waits if axis == 2 else waits.swapaxes(1, 2))[:, others].reshape(steps, ranks, ranks - 1)
    return np.quantile(rows, quantile, axis=2, method=method)


def _stand_out(series: np.ndarray, rule: _Rule, more: np.ndarray | float = 0.0) -> list[_Late]:
    """Those of [S, N] series that are late in enough steps, and by ``more`` [N] if that is more than the rule says."""
    medians = np.median(series, axis=0)
    typical, seldom_more = (_median_of_others(values) for values in (medians, np.quantile(series, 0.75, axis=0)))
    bound = np.maximum(rule.times * seldom_more, typical + np.maximum(rule.at_least, more))
    shares = np.mean(series >= bound, axis=0)
    late = np.flatnonzero((shares >= rule.share) & (series.max(0) > 0))
    return [_Late(int(n), float(medians[n]), float(typical[n]), float(shares[n])) for n in late]


def _median_of_others(values: np.ndarray) -> np.ndarray:
    """[N] -> [N]: the median of all values but this one."""
    order = np.argsort(values)
    place = np.empty_like(order)
    place[order] = np.arange(len(values))
    ascending = np.append(values[order], np.nan)
    # Without the value at its place, the k-th of the others is the k-th of all before it, and the next one behind it.
    middle = ((len(values) - 2) // 2, (len(values) - 1) // 2)
    low, high = (np.where(k < place, ascending[k], ascending[k + 1]) for k in middle)
    return (low + high) / 2


def _slow_ranks(kind: str, series: np.ndarray, rule: _Rule) -> list[Straggler]:
    """The ranks whose [S, R] series stand out; they are what is waited for, or in the case of a receiver what waits."""
    receives = kind == "receiver"
    return [
        Straggler(
            kind=kind,
            source=None if receives else late.number,
            receiver=late.number if receives else None,
            microseconds=late.microseconds,
            typical=late.typical,
            share=late.share,
        )
        for late in _stand_out(series, rule)
    ]


def _slow_links(travel: np.ndarray, found: list[Straggler], rule: _Rule) -> list[Straggler]:
    """Links that are slow beyond what a slow receiver and a slow sender add to each of theirs."""
    left, at_ends = travel.copy(), np.zeros(travel.shape[1:])
    for one in found:
        if one.kind == "compute":
            continue
        cells = (one.receiver, slice(None)) if one.kind == "receiver" else (slice(None), one.source)
        left[:, *cells] -= one.microseconds - one.typical
        at_ends[cells] += one.microseconds - one.typical
    receivers, sources = np.nonzero(~np.eye(len(at_ends), dtype=bool))
    late = _stand_out(np.maximum(left, 0)[:, receivers, sources], rule, at_ends[receivers, sources] / 2)
    return [
        Straggler(
            kind="link",
            source=int(sources[one.number]),
            receiver=int(receivers[one.number]),
            microseconds=one.microseconds,
            typical=one.typical,
            share=one.share,
        )
        for one in late
    ]
