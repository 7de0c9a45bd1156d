"""How a function becomes an operator of this package: its call is bound by names, checked, and only then made.

Arrays come by position or by name, in CANN's order; attributes come by name. Results are returned, a group is a mesh
axis, and the index along that axis is the rank. So a call that passes an output or a rank id, as the C++ call does, is
refused with these words.
"""

import dataclasses
import functools
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec, TypeVar

from moe_jax.aclnn.check import check
from moe_jax.aclnn.rules import Call, Rules
from moe_jax.errors import MissingArgumentError, UnexpectedArgumentError, suggest
from moe_jax.hardware.ascend import VERSIONS, lacking, newest_of

P = ParamSpec("P")
R = TypeVar("R")
FIRST_PHASE = "_get_workspace_size"  # what the name of an operator's first phase ends with

# Parameters of the C++ calls that no function here has, and what takes their place.
_STAND_INS = {
    "ep_rank_id": "the rank is the index along the mesh axis of group_ep",
    "tp_rank_id": "the rank is the index along the mesh axis of group_tp",
    "workspace": "JAX allocates the memory of a program itself",
    "workspace_size": "the first phase returns it",
    "executor": "the first phase returns it, and it is called with the arrays",
    "stream": "there are no streams, and what needs a value waits for it",
    "expand_idx": "since V2 this is assist_info_for_combine",
}


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator of this package.

    Attributes:
      name: its name, in snake_case.
      function: what runs once a call has been checked.
      parameters: the parameters of its newest version, which has all of them.
      rules: the rules by which its calls are checked.
      num_bytes: the bytes of workspace of a legal call.
    """

    name: str
    function: Callable[..., Any]
    parameters: Mapping[str, inspect.Parameter]
    rules: Rules
    num_bytes: Callable[[Call], int]

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays: those that may come by position, and a few that come by name."""
        by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = tuple(name for name, one in self.parameters.items() if one.kind is by_position)
        return (*names, *(name for name in self.rules.more_arrays if name not in names))

    @property
    def needs(self) -> tuple[str, ...]:
        """The arrays and attributes that have no default."""
        required = [name for name, one in self.parameters.items() if one.default is inspect.Parameter.empty]
        return tuple(name for name in required if name not in self.rules.not_needed)

    def call(self, given: Mapping[str, Any]) -> Call:
        """The call with the arguments ``given``, checked; arguments that are not given have their defaults.

        ``given`` may also hold the two parameters of a first phase, ``product`` and ``hccl_buffsize``.
        """
        empty = inspect.Parameter.empty
        defaults = {name: None if one.default is empty else one.default for name, one in self.parameters.items()}
        arguments = {**defaults, "product": None, "hccl_buffsize": 200, **given}
        product = arguments.pop("product")
        for name in ("comm_alg", "group_tp"):
            if name in arguments and arguments[name] is None:  # CANN's null string
                arguments[name] = ""
        arrays = {name: arguments.pop(name) for name in self.arrays}
        call = Call(self.name, product, arrays, arguments)
        check(call, self.rules, self.parameters, self.needs)
        return call


def operator(rules: Rules, num_bytes: Callable[[Call], int]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function an operator: ``rules`` say which calls are legal, and ``num_bytes`` what workspace they take."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        definition = Operator(function.__name__, function, parameters, rules, num_bytes)
        return functools.wraps(function)(_checked(definition, parameters))

    return decorate


def version(name: str, newest: Callable[..., R]) -> Callable[..., R]:
    """The earlier version ``name`` of the operator ``newest``, which lacks some of its parameters."""
    whole, lacks, new = inspect.signature(newest), lacking(name), operator_of(newest)
    signature = whole.replace(parameters=[one for one in whole.parameters.values() if one.name not in lacks])
    old = dataclasses.replace(new, name=name)
    cann = "aclnn" + "".join(part.capitalize() for part in name.split("_"))
    listed = ", ".join(f"``{one}``" for one in lacks)
    text = f"``{new.name}`` without {listed}, otherwise the same.\n\n    Source: {cann}.\n    "
    return named(_checked(old, signature.parameters), name, signature, text)


def operator_of(function: Callable[..., Any]) -> Operator:
    """The parameters and rules of a function that is an operator."""
    return vars(function)["operator"]


def _checked(definition: Operator, parameters: Mapping[str, inspect.Parameter]) -> Callable[..., Any]:
    """A function that binds each call to ``parameters``, checks it, and makes it."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        given = bind(definition.name, parameters, args, kwargs)
        definition.call(given)
        return definition.function(**given)

    vars(checked)["operator"] = definition
    return checked


def named(function: Callable[..., R], name: str, signature: inspect.Signature, text: str) -> Callable[..., R]:
    """``function`` as a public function of this package, with a name, a signature and a docstring of its own."""
    function.__name__ = function.__qualname__ = name
    function.__module__ = "moe_jax.aclnn"
    function.__doc__ = text
    function.__annotations__ = {one.name: one.annotation for one in signature.parameters.values()}
    function.__annotations__["return"] = signature.return_annotation
    vars(function)["__signature__"] = signature
    return function


def signature_checked(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which raises a MoEError where its arguments do not fit its signature."""
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(**bind(function.__name__, parameters, args, kwargs))  # pyright: ignore[reportCallIssue]

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


def stand_in(operator: str, parameters: Collection[str], name: str) -> str | None:
    """What takes the place of the argument ``name`` of a C++ call here; None where no such call has it."""
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
    function = getattr(importlib.import_module("moe_jax.aclnn"), newest_of(operator), None)
    returned: Any = inspect.signature(function).return_annotation if function else None
    for output in typing.get_args(returned) or (returned,):
        for field in getattr(output, "_fields", ()):
            if _bare(field) == _bare(name):
                return f"outputs are returned, this one as {output.__name__}.{field}; leave it out"
    return None


def _snake_case(name: str) -> str:
    """``expandXOut`` and ``expand_x_out`` -> ``expand_x_out``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _bare(name: str) -> str:
    return name.removesuffix("_optional").removesuffix("_out")
