"""The exception family: every mistake a person can make is one of these, and also the matching builtin.

Each class carries ``status``, the code that CANN's operators return for the same mistake: 161001 (a required input is
missing), 161002 (dtype), 561002 (shape, value, or a relation between arguments). All texts have one form: the argument,
the value that came, the rule that it broke, and what to do.
"""

import tomllib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class MoEError(Exception):
    """Base of everything that moe_jax raises on purpose.

    Attributes:
      status: the code of the CANN operators for such a mistake.
      rule: the name of the rule that a call of ``moe_jax.aclnn`` breaks; None elsewhere.
      product: the Ascend product that has this rule; None where it holds everywhere.
    """

    status: int = 561002
    rule: str | None = None
    product: str | None = None


class InvalidArgumentError(MoEError, ValueError):
    """A value, or a relation between values, breaks a rule."""


class ShapeError(MoEError, ValueError):
    """An array has the wrong rank or the wrong extent."""


class DtypeError(MoEError, TypeError):
    """An array has a dtype that the operation does not take."""

    status = 161002


class MissingArgumentError(MoEError, TypeError):
    """An argument is required here and was not given."""

    status = 161001


class UnexpectedArgumentError(MoEError, TypeError):
    """An argument was given that the function does not take, or that it takes only by position or only by name."""


class MeshError(MoEError, ValueError):
    """The mesh, its axes or the devices below it do not fit."""


class DeviceInitError(MoEError, RuntimeError):
    """Devices were already initialised, so a setting can no longer take effect."""


class UnsupportedError(MoEError, NotImplementedError):
    """A legal request that this version or this back end cannot serve."""


class MemoryLimitError(MoEError, MemoryError):
    """What was asked for does not fit the memory of the devices."""


class CompilationError(MoEError, RuntimeError):
    """A compiler refuses a program, or ends without a result."""


class ConfigError(MoEError, ValueError):
    """A configuration file is unreadable, or one of its entries breaks a rule."""


class DataError(MoEError, OSError):
    """Training data cannot be read."""


class CheckpointError(MoEError, OSError):
    """A checkpoint is missing, damaged or belongs to another configuration."""


def raise_all(violations: Sequence[str], what: str, error: type[MoEError] = InvalidArgumentError) -> None:
    """Raises one ``error`` that lists all ``violations``; returns where there are none."""
    if not violations:
        return
    if len(violations) == 1:
        raise error(f"{what}: {violations[0]}")
    raise error(f"{what}: {len(violations)} problems:\n" + "\n".join(f"  - {text}" for text in violations))


def suggest(word: Any, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest legal word, and all legal words."""
    known = sorted(known)
    near = get_close_matches(str(word), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"


# Checks of static arguments. The functions ``..._violations`` list what is wrong, so that one error can report several
# mistakes at once.


def count_violations(name: str, value: Any, low: int = 1) -> list[str]:
    """Empty if ``value`` is a whole number of at least ``low``, Python's or NumPy's; a bool is not a number here."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= low:
        return []
    return [f"{name}={_show(value)} must be a whole number of at least {low}"]


def choice_violations(name: str, value: Any, choices: Iterable[str]) -> list[str]:
    """Empty if ``value`` is one of the words ``choices``."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return []
    return [f"{name}={_show(value)} is unknown; {suggest(value, choices)}"]


def flag_violations(name: str, value: Any) -> list[str]:
    """Empty if ``value`` is True or False."""
    return [] if isinstance(value, (bool, np.bool_)) else [f"{name}={_show(value)} must be True or False"]


def check_count(name: str, value: Any, low: int = 1) -> None:
    """Raises unless ``value`` is a whole number of at least ``low``."""
    for text in count_violations(name, value, low):
        raise InvalidArgumentError(text)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    for text in choice_violations(name, value, choices):
        raise InvalidArgumentError(text)


def check_flag(name: str, value: Any) -> None:
    """Raises unless ``value`` is True or False."""
    for text in flag_violations(name, value):
        raise InvalidArgumentError(text)


def check_type(name: str, value: Any, kind: type, remedy: str) -> None:
    """Raises unless ``value`` is a ``kind``; MissingArgumentError where it is None."""
    if not isinstance(value, kind):
        error = MissingArgumentError if value is None else InvalidArgumentError
        raise error(f"{name} is {_describe(value)}, not a {kind.__name__}; {remedy}")


# Checks of arrays.


def check_array(name: str, array: Any, remedy: str = "pass a jax or numpy array") -> None:
    """Raises unless ``array`` is a jax or numpy array: MissingArgumentError for None, DtypeError otherwise."""
    if not isinstance(array, (jax.Array, np.ndarray)):
        error = MissingArgumentError if array is None else DtypeError
        raise error(f"{name} is {_describe(array)}, not an array; {remedy}")


def check_rank(name: str, array: Any, rank: int, layout: str) -> None:
    """Raises ShapeError unless ``array`` has ``rank`` dimensions; ``layout`` names them, e.g. "[T, H]"."""
    check_array(name, array)
    if array.ndim != rank:
        raise ShapeError(f"{name} has shape {array.shape} ({array.ndim} dimensions); expected {rank}: {layout}")


def check_shape(name: str, array: Any, shape: Sequence[int], layout: str, remedy: str = "") -> None:
    """Raises ShapeError unless ``array`` has exactly ``shape``; ``layout`` names its dimensions."""
    check_array(name, array)
    if array.shape != tuple(shape):
        raise ShapeError(f"{name} has shape {array.shape}; expected {tuple(shape)} = {layout}" + _clause(remedy))


def check_dtype(name: str, array: Any, allowed: Iterable[Any], remedy: str = "") -> None:
    """Raises DtypeError unless ``array.dtype`` is one of ``allowed``, or of a kind there such as ``jnp.floating``."""
    check_array(name, array)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in allowed):
        names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in allowed)
        raise DtypeError(f"{name} has dtype {array.dtype}; expected {names}" + _clause(remedy))


def check_mask(name: str, array: Any, shape: Sequence[int], layout: str) -> None:
    """Raises unless ``array`` is boolean and has exactly ``shape``."""
    check_shape(name, array, shape, layout)
    check_dtype(name, array, ("bool",), "cast it with .astype(bool)")


def read_toml(path: Path) -> dict[str, Any]:
    """The table that a TOML file holds; raises ConfigError where there is none."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a TOML file") from None
    except ValueError as error:  # not TOML, not UTF-8, or no possible path
        raise ConfigError(f"{path}: is not valid TOML ({error})") from None


def _clause(remedy: str) -> str:
    return f"; {remedy}" if remedy else ""


def _describe(value: Any) -> str:
    """The class of ``value`` with its article, or None."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _show(value: Any) -> str:
    """The ``repr`` of ``value`` on one line, cut off after 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
