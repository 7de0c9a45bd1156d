"""The packages of the `train` extra: imported only when training runs, with one clear sentence where one is missing."""

from importlib import import_module
from types import ModuleType

from moe_jax.errors import UnsupportedError

REMEDY = "run: pip install 'moe_jax[train]'"


def require(name: str, purpose: str) -> ModuleType:
    """The module `name`; raises UnsupportedError, saying what it is needed for, where it is not installed."""
    module = find(name)
    if module is None:
        raise UnsupportedError(f"{purpose} needs {name.partition('.')[0]}, which is not installed; {REMEDY}")
    return module


def find(name: str) -> ModuleType | None:
    """The module `name`, or None where its package is not installed; any other import failure is raised as it is."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        return None
