"""What every call of the facade keeps to, whatever its arguments; the generators of calls ask it of each.

1. What the first phase without a product refuses, the operator refuses with the same status, and the reverse.
2. What the first phase of a product accepts, its executor runs, and every output of every rank equals the oracle.
3. Nothing but a ``MoEError`` with one of the reference's statuses is ever raised.
"""

import inspect
from typing import Any

import jax
import numpy as np

from moe_jax import aclnn
from moe_jax.aclnn.first_phase import Executor
from moe_jax.errors import MoEError

STATUSES = (161001, 161002, 561002)


class Broken(AssertionError):
    """A call that breaks one of the laws."""


def outcome(function) -> Any:
    """What it returns, or the status of its refusal; anything else that is raised breaks the third law."""
    try:
        return function()
    except MoEError as error:
        if error.status not in STATUSES:
            raise Broken(f"status {error.status} of {error!r} is none of {STATUSES}") from error
        return error.status
    except Exception as error:
        raise Broken(f"raised {type(error).__name__}: {_one_line(error)}") from error


def phases(operator: str, arrays: dict[str, Any], attributes: dict[str, Any], product: str | None) -> Executor | int:
    """The executor of a call for ``product``, or the status of its refusal. To be traced where the operator can run.

    Asks the first law: of the arrays, of their shapes alone, and of the operator itself, all without a product.
    """
    first, run = getattr(aclnn, f"{operator}_get_workspace_size"), getattr(aclnn, operator)
    needed = [name for name, given in inspect.signature(run).parameters.items() if given.default is given.empty]
    arrays = {name: None for name in needed if name not in attributes} | arrays  # what is left out is a null pointer
    shapes = {name: jax.tree.map(_shape, array) for name, array in arrays.items()}
    anywhere = outcome(lambda: first(**arrays, **attributes))
    found = {
        "from shapes": outcome(lambda: first(**shapes, **attributes)),
        "the operator": outcome(lambda: run(**arrays, **attributes)),
    }
    refused = _refusal(anywhere)
    for name, result in found.items():
        if _refusal(result) != refused:
            raise Broken(f"{operator}: the first phase says {refused}, {name} {_refusal(result)}")
    if product is not None:
        anywhere = outcome(lambda: first(**arrays, **attributes, product=product, hccl_buffsize=10**6))
        if refused and not _refusal(anywhere):
            raise Broken(f"{operator}: refused with {refused} for no product, and accepted on {product}")
    return _refusal(anywhere) or anywhere[1]


def lower(program: Any, drawn: Any) -> jax.stages.Lowered:
    """A jitted ``program``, lowered; what is raised meanwhile breaks the third law, if it is not ``Broken`` already."""
    return _traced(lambda: program.lower(drawn))


def trace(program: Any, drawn: Any) -> None:
    """``lower`` for the first and the third law alone: nothing is lowered or compiled."""
    _traced(lambda: program.trace(drawn))


def _traced(function) -> Any:
    try:
        return function()
    except Broken:
        raise
    except Exception as error:
        raise Broken(f"tracing raised {type(error).__name__}: {_one_line(error)}") from error


def same(got: Any, want: np.ndarray, name: str) -> None:
    """Raises unless both have the same numbers, and those of one byte the same bits."""
    got = np.asarray(got).reshape(want.shape)
    if got.dtype.itemsize == 1 and got.dtype != bool:
        got, want = got.view(np.uint8), want.view(np.uint8)
    wrong = got != want
    if got.dtype.kind not in "biu":
        wrong &= ~(np.isnan(np.asarray(got, np.float64)) & np.isnan(np.asarray(want, np.float64)))
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0].tolist())
        raise Broken(f"{name}{list(place)} is {got[place]} and should be {want[place]} ({wrong.sum()} such)")


def _one_line(error: Exception) -> str:
    """The beginning of an error's text."""
    return " ".join(str(error).split())[:300]


def _refusal(result):
    return result if isinstance(result, int) else None


def _shape(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
