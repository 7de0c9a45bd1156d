"""How the functions of this package take arguments, and what stands for those of a C++ call that they do not have.

Arrays come by position or by name, in the reference's order; attributes come by name. Results are returned, a group is
a mesh axis, and its index is the rank: who passes an output or a rank id, as the C++ call does, is told so.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.aclnn.results import OUTPUTS
from moe_jax.errors import MissingArgumentError, UnexpectedArgumentError, suggest
from moe_jax.hardware.ascend import VERSIONS, lacking, newest_of

FIRST_PHASE = "_get_workspace_size"  # what the name of an operator's first phase ends with

# Parameters of the C++ calls that no function here has, and what stands for them.
_STAND_INS = {
    "ep_rank_id": "the rank is the index along the mesh axis of group_ep",
    "tp_rank_id": "the rank is the index along the mesh axis of group_tp",
    "workspace": "JAX allocates the memory of a program itself",
    "workspace_size": "the first phase returns it",
    "executor": "the first phase returns it, and it is called with the arrays",
    "stream": "there are no streams, and what needs a value waits for it",
    "expand_idx": "since V2 this is assist_info_for_combine",
}


def signature_checked(function: Callable) -> Callable:
    """``function``, which raises a MoEError where its arguments do not fit its signature."""
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args, **kwargs):
        return function(**bind(function.__name__, parameters, args, kwargs))

    return checked


def bind(
    function: str, parameters: Mapping[str, inspect.Parameter], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of one call by the names of ``parameters``, without defaults.

    Raises:
      UnexpectedArgumentError: a name that is not among them, a name given twice, or too many without names.
      MissingArgumentError: a parameter without a default was not given.
    """
    by_position = [name for name, one in parameters.items() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(args) > len(by_position):
        raise UnexpectedArgumentError(
            f"{function} takes at most {len(by_position)} arguments by position, {by_position[0]} to "
            f"{by_position[-1]}, and {len(args)} came; pass attributes by name, and no rank ids or outputs"
        )
    for name in kwargs:
        if name not in parameters:
            why = stand_in(function.removesuffix(FIRST_PHASE), parameters, name) or suggest(name, parameters)
            raise UnexpectedArgumentError(f"{name} was given, but {function} does not take it: {why}")
    for name in by_position[: len(args)]:
        if name in kwargs:
            raise UnexpectedArgumentError(f"{name} was given to {function} by position and by name; give it once")
    given = dict(zip(by_position, args, strict=False)) | dict(kwargs)
    for name, one in parameters.items():
        if one.default is inspect.Parameter.empty and name not in given:
            raise MissingArgumentError(f"{name} was not given, but {function} needs it; pass it")
    return given


def with_fewer_parameters(
    name: str,
    function: Callable,
    without: tuple[str, ...],
    call: Callable[[Mapping[str, Any]], Any],
    text: str,
    returns: Any = None,
) -> Callable:
    """A function ``name`` with the signature of ``function`` but for some parameters, which passes arguments on.

    ``text`` is its docstring; ``returns`` is what it returns, where that is something else.
    """
    whole = inspect.signature(function)
    kept = [parameter for parameter in whole.parameters.values() if parameter.name not in without]
    signature = whole.replace(parameters=kept, return_annotation=returns or whole.return_annotation)

    def version(*args, **kwargs):
        return call(bind(name, signature.parameters, args, kwargs))

    version.__name__ = version.__qualname__ = name
    version.__module__ = __package__
    version.__signature__ = signature
    version.__annotations__ = {parameter.name: parameter.annotation for parameter in kept}
    version.__annotations__["return"] = signature.return_annotation
    version.__doc__ = text
    return version


def stand_in(operator: str, parameters: Mapping[str, Any], name: str) -> str | None:
    """What stands for the argument ``name`` of a C++ call, which ``operator`` lacks; None where it is unknown there."""
    name = _snake_case(name)
    if name in parameters:
        return f"here it is {name}"
    later = [v for v, version in VERSIONS.items() if version.newest == newest_of(operator)] + [newest_of(operator)]
    if name in lacking(operator):
        return f"{next(version for version in later if name not in lacking(version))} does"
    if name in _STAND_INS:
        return f"{_STAND_INS[name]}; leave it out"
    if name.removesuffix("_optional") in parameters:
        return f"here it is {name.removesuffix('_optional')}"
    for output in OUTPUTS.get(newest_of(operator), ()):
        field = next((field for field in output._fields if _bare(field) == _bare(name)), None)
        if field is not None:
            return f"outputs are returned, this one as {output.__name__}.{field}; leave it out"
    return None


def _snake_case(name: str) -> str:
    """``expandXOut`` and ``expand_x_out`` -> ``expand_x_out``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _bare(name: str) -> str:
    return name.removesuffix("_optional").removesuffix("_out")
