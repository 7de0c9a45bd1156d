"""Packages of the extras, which need not be installed: they are imported when they are used, or a sentence says why."""

from importlib import import_module
from types import ModuleType

from moe_jax.errors import UnsupportedError


def remedy(extra: str) -> str:
    """How somebody gets the packages of an extra, for the end of a sentence."""
    return f"run: pip install 'moe_jax[{extra}]'"


REMEDY = remedy("train")


def require(name: str, purpose: str, extra: str = "train") -> ModuleType:
    """Imports the module `name`; if it is not installed, raises UnsupportedError, which says what it is needed for."""
    module = find(name)
    if module is None:
        raise UnsupportedError(f"{purpose} needs {name.partition('.')[0]}, which is not installed; {remedy(extra)}")
    return module


def find(name: str) -> ModuleType | None:
    """Imports the module `name`; None if its package is not installed. Any other failure of the import is raised."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        return None
