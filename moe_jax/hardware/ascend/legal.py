"""The vocabulary of the tables: what a quantity may be, and what one operator takes on one product."""

import dataclasses
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, TypeVar

from moe_jax.hardware.ascend.buffers import Sizes

T = TypeVar("T")
# Dtypes that belong together.
HALVES = ("float16", "bfloat16")
FLOATS = ("float32", "bfloat16", "float16")
FP8 = ("float8_e4m3fn", "float8_e5m2")
FP4 = ("float4_e2m1fn", "uint8")  # uint8 holds two values per byte
E8M0 = ("float8_e8m0fnu", "uint8")  # uint8 holds the byte of the exponent

NOTHING: Mapping[str, Any] = MappingProxyType({})


def _nothing() -> Any:
    return dataclasses.field(default_factory=lambda: NOTHING)


@dataclasses.dataclass(frozen=True)
class Interval:
    """Evenly spaced legal numbers.

    Attributes:
      low: the least of them, if it is a multiple of ``step``.
      high: the largest, likewise; None: there is no end.
      step: all legal numbers are multiples of it.
    """

    low: int
    high: int | None = None
    step: int = 1

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is legal."""
        return self.low <= value and (self.high is None or value <= self.high) and value % self.step == 0

    def nearest(self, value: Any) -> int:
        """The legal value nearest to ``value``, and the lower one where two are as near."""
        first = -(-self.low // self.step) * self.step
        below = max(value // self.step * self.step, first)
        if self.high is not None:
            below = min(below, self.high // self.step * self.step)
        above = below + self.step
        return above if self.allows(above) and above - value < abs(value - below) else below

    def __str__(self):
        end = f"at least {self.low}" if self.high is None else f"in [{self.low}, {self.high}]"
        return end if self.step == 1 else f"a multiple of {self.step} {end}"


@dataclasses.dataclass(frozen=True)
class Choices:
    """A short list of legal numbers or words.

    Attributes:
      values: the legal ones.
    """

    values: tuple[Any, ...]

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is legal."""
        return value in self.values

    def nearest(self, value: Any) -> Any:
        """The legal number next to ``value``, or the legal word most like it."""
        if isinstance(value, str):
            words = [word for word in self.values if word]
            return (get_close_matches(value, words, n=1) or [self.values[0]])[0]
        return min(self.values, key=lambda legal: abs(legal - value))

    def __str__(self):
        shown = [repr(value) for value in self.values]
        return shown[0] if len(shown) == 1 else f"one of {', '.join(shown)}"


Legal = Interval | Choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one operator takes on one product, or on any of them (``everywhere``).

    Attributes:
      values: what is legal for each quantity. A quantity is an attribute, or follows from the arguments, as the rules
        of ``moe_jax.aclnn`` say under its name.
      dtypes: what is legal for each array; "y_dtype:2" stands for the dtype of the output in quant_mode 2.
      absent: optional arrays that it does not take.
      why: for an array of ``absent``, the reason, where there is more to say.
      required: optional arrays that it cannot do without.
      buffer: the bytes that HCCL_BUFFSIZE must hold.
      variants: other limits for some values of comm_alg.
    """

    values: Mapping[str, Legal] = _nothing()
    dtypes: Mapping[str, tuple[str, ...]] = _nothing()
    absent: tuple[str, ...] = ()
    why: Mapping[str, str] = _nothing()
    required: tuple[str, ...] = ()
    buffer: Callable[[Sizes], int] | None = None
    variants: Mapping[str, "Limits"] = _nothing()

    def but(
        self,
        *,
        values: Mapping[str, Legal | None] = NOTHING,
        dtypes: Mapping[str, tuple[str, ...] | None] = NOTHING,
        **others: Any,
    ) -> "Limits":
        """These limits with some replaced; None takes a limit away."""
        return dataclasses.replace(
            self, values=_merged(self.values, values), dtypes=_merged(self.dtypes, dtypes), **others
        )

    def under(self, comm_alg: Any) -> "Limits":
        """The limits in force with ``comm_alg``."""
        return self.variants.get(comm_alg, self) if isinstance(comm_alg, str) else self


def _merged(old: Mapping[str, T], new: Mapping[str, T | None]) -> dict[str, T]:
    return {name: legal for name, legal in {**old, **new}.items() if legal is not None}
