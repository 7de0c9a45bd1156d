"""The exception family: every mistake a person can make is one of these, and also the matching builtin.

Each class carries ``status``, the code that the reference operators return for the same mistake:
161001 (a required input is missing), 161002 (dtype), 561002 (shape, value, or a relation between arguments).
Texts follow one form: argument, value that came, rule that it broke, what to do.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np


class MoEError(Exception):
    """Base of everything that moe_jax raises on purpose."""

    status = 561002


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


class MeshError(MoEError, ValueError):
    """The mesh, its axes or the devices below it do not fit."""


class DeviceInitError(MoEError, RuntimeError):
    """Devices were already initialised, so a setting can no longer take effect."""


class UnsupportedError(MoEError, NotImplementedError):
    """A legal request that this version or this back end cannot serve."""


class ConfigError(MoEError, ValueError):
    """A configuration file is unreadable, or one of its entries breaks a rule."""


class DataError(MoEError, OSError):
    """Training data cannot be read."""


class CheckpointError(MoEError, OSError):
    """A checkpoint is missing, damaged or belongs to another configuration."""


def raise_all(violations: Sequence[str], what: str, error: type[MoEError] = InvalidArgumentError) -> None:
    """Raises one ``error`` that lists every entry of ``violations``; returns when there are none."""
    if not violations:
        return
    if len(violations) == 1:
        raise error(f"{what}: {violations[0]}")
    raise error(f"{what}: {len(violations)} problems:\n" + "\n".join(f"  - {text}" for text in violations))


def suggest(word: str, known: Iterable[str]) -> str:
    """A clause naming the legal words, the nearest one first: for texts about unknown names."""
    known = sorted(known)
    near = get_close_matches(str(word), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(known)}"


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise InvalidArgumentError(f"{name}={value!r} is unknown; {suggest(value, choices)}")


def check_rank(name: str, array: Any, rank: int, layout: str) -> None:
    """Raises ShapeError unless ``array`` has ``rank`` dimensions; ``layout`` names them, e.g. "[T, H]"."""
    if len(np.shape(array)) != rank:
        raise ShapeError(
            f"{name} has shape {tuple(np.shape(array))} ({len(np.shape(array))} dimensions); expected {rank}: {layout}"
        )


def check_shape(name: str, array: Any, shape: Sequence[int], layout: str, remedy: str = "") -> None:
    """Raises ShapeError unless ``array`` has exactly ``shape``; ``layout`` names its dimensions."""
    if tuple(np.shape(array)) != tuple(shape):
        tail = f"; {remedy}" if remedy else ""
        raise ShapeError(f"{name} has shape {tuple(np.shape(array))}; expected {tuple(shape)} = {layout}{tail}")


def check_dtype(name: str, array: Any, allowed: Iterable[Any], remedy: str = "") -> None:
    """Raises DtypeError unless ``array.dtype`` is one of ``allowed``."""
    allowed = [np.dtype(a) for a in allowed]
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        raise DtypeError(f"{name} is a {type(array).__name__}, not an array; pass a jax or numpy array")
    if np.dtype(dtype) not in allowed:
        tail = f"; {remedy}" if remedy else ""
        raise DtypeError(f"{name} has dtype {dtype}; expected {' or '.join(str(a) for a in allowed)}{tail}")
