"""Numbers as a person reads them, and lines of a table."""

from collections.abc import Sequence

_UNITS = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def size(count: float) -> str:
    """Bytes in three digits: "1.23 GB"."""
    unit, scale = next(((unit, scale) for unit, scale in _UNITS if abs(count) >= scale), ("B", 1))
    return f"{_three(count / scale)} {unit}" if scale > 1 else f"{count:.0f} B"


def count(number: float) -> str:
    """A large number in three digits: "1.23 T"."""
    return size(number).removesuffix("B").replace("k", "K").strip()


def milliseconds(seconds: float) -> str:
    """Milliseconds in three digits, without the unit."""
    return _three(1e3 * seconds)


def rate(per_second: float) -> str:
    """A number per second, whole where it is large."""
    return f"{per_second:,.0f}" if per_second >= 100 else _three(per_second)


def many(number: int, noun: str) -> str:
    """A number of things: "1 mesh", "3 meshes"."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('sh') else 's'}"


def percent(share: float) -> str:
    """A share in percent, with a digit behind the point where it is small."""
    return f"{100 * share:.0f} %" if abs(share) >= 0.1 else f"{100 * share:.1f} %"


def less(now: float, before: float) -> str:
    """How much less ``now`` is than ``before``, or more: "38 % less"."""
    share = 1 - now / before if before else 0.0
    return f"{percent(abs(share))} {'less' if share >= 0 else 'more'}"


def error(found: float, predicted: float) -> str:
    """By how much ``predicted`` is off what was ``found``, in percent with its sign; "-" where nothing was found."""
    return f"{100 * (predicted / found - 1):+.1f} %" if found else "-"


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line of a table: the first cell to the left, all others to the right of their columns."""
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]).rstrip()


def _three(number: float) -> str:
    """Three digits, without an exponent: "1,234", "123", "12.3", "1.23", "0.0123"."""
    if abs(number) >= 99.95:
        return f"{number:,.0f}"
    text = f"{number:.3g}" if abs(number) < 1 else f"{number:.{1 if abs(number) >= 9.995 else 2}f}"
    return f"{number:.6f}".rstrip("0").rstrip(".") if "e" in text else text
