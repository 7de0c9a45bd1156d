"""The packages of the `train` extra. They are imported when training runs; one sentence reports a missing one."""

from importlib import import_module
from types import ModuleType

from moe_jax.errors import UnsupportedError

REMEDY = "run: pip install 'moe_jax[train]'"


def require(name: str, purpose: str) -> ModuleType:
    """Imports the module `name`; if it is not installed, raises UnsupportedError, which says what it is needed for."""
    module = find(name)
    if module is None:
        raise UnsupportedError(f"{purpose} needs {name.partition('.')[0]}, which is not installed; {REMEDY}")
    return module


def find(name: str) -> ModuleType | None:
    """Imports the module `name`; None if its package is not installed. Any other failure of the import is raised."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        return None
