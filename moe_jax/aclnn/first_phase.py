"""The host-side first phase of every operator, made from the operator's own signature.

``<operator>_get_workspace_size`` takes the keywords of its operator, as arrays, NumPy arrays or
``jax.ShapeDtypeStruct`` s of one rank; it checks them in CANN's order (null pointers, dtypes, everything else) and
returns

- the bytes of the operator's buffers on one rank (the module ``workspace`` says what is counted), and
- an executor, which runs the operator inside ``shard_map`` on arrays like those that were checked,

or raises a ``MoEError`` whose ``status`` is CANN's code: 161001 (something is missing), 161002 (a dtype),
561002 (a shape, a value, a relation). ``product`` says whose limits hold: "a2", "a3", "a5", or None, with which only
what is impossible everywhere is refused. ``hccl_buffsize`` is the size in MB of a communicator's buffer there. A
parameter without a value is None. Group names are names of mesh axes, or tuples of them; where these are bound, as
inside ``shard_map``, their sizes must be those that the call says.

>>> import jax
>>> from moe_jax import aclnn
>>> x, ids = jax.ShapeDtypeStruct((8, 512), "bfloat16"), jax.ShapeDtypeStruct((8, 4), "int32")
>>> sizes = dict(group_ep="ep", ep_world_size=8, moe_expert_num=32)
>>> num_bytes, executor = aclnn.moe_distribute_dispatch_v4_get_workspace_size(x, ids, **sizes)
>>> num_bytes
298656
>>> aclnn.moe_distribute_dispatch_v4_get_workspace_size(x, ids, **sizes, product="a3")
Traceback (most recent call last):
moe_jax.errors.ShapeError: x with shape (8, 512): 512 = H, the hidden size, must be in [1024, 8192] on a3; ...
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from jax.core import Tracer

from moe_jax.aclnn.calls import FIRST_PHASE, bind, named, operator_of, stand_in
from moe_jax.aclnn.rules import canonical
from moe_jax.errors import (
    DtypeError,
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    UnexpectedArgumentError,
    suggest,
)
from moe_jax.hardware.ascend import lacking, newest_of

_OF_THE_PHASE = [
    inspect.Parameter("product", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=str | None),
    inspect.Parameter("hccl_buffsize", inspect.Parameter.KEYWORD_ONLY, default=200, annotation=int),
]


@dataclasses.dataclass(frozen=True)
class Executor:
    """One checked call of an operator of ``moe_jax.aclnn``. Holds no array, and is hashable.

    The exception is a traced ``local_rank_id``, which binds the executor to the program that is being traced.

    Attributes:
      operator_name: the function of ``moe_jax.aclnn`` that it calls.
      attributes: (name, value) of each argument that is no array.
      arrays: (name, shape, dtype) of each array that was checked.
    """

    operator_name: str
    attributes: tuple[tuple[str, Any], ...]
    arrays: tuple[tuple[str, tuple[int, ...], str], ...]

    def __call__(self, /, *by_position: Any, **arrays: Any) -> Any:
        """Runs the operator inside ``shard_map`` on arrays like those that were checked; None = not given.

        Raises:
          InvalidArgumentError: an array is given that was not among the checked ones.
          UnexpectedArgumentError: an array comes without its name, or something of the C++ call that no function here
            has, such as a stream or an output.
          MissingArgumentError: an array that was checked is not given.
          ShapeError, DtypeError: an array is not like the one that was checked.
        """
        if by_position:
            raise UnexpectedArgumentError(
                f"the executor of {self.operator_name} takes arrays by name, and {len(by_position)} came without; pass "
                f"{', '.join(f'{name}=' for name, _, _ in self.arrays)}"
            )
        arrays = {name: array for name, array in arrays.items() if array is not None}
        self._check(arrays)
        operator = getattr(importlib.import_module("moe_jax.aclnn"), self.operator_name)
        return operator(**arrays, **dict(self.attributes))

    def _check(self, arrays: dict[str, Any]) -> None:
        names = [name for name, _, _ in self.arrays]
        for name, array in arrays.items():
            why = None if name in names else stand_in(self.operator_name, names, name)
            if why is not None:
                raise UnexpectedArgumentError(f"{name} was given, but the executor does not take it: {why}")
            if name not in names:
                came = f"an array of shape {getattr(array, 'shape', '?')}"
                raise InvalidArgumentError(
                    f"{name}={came} was not given to {self.operator_name}_get_workspace_size; {suggest(name, names)}"
                )
        for name, shape, dtype in self.arrays:
            array = arrays.get(name)
            if array is None:
                raise MissingArgumentError(f"{name} is None, but it was checked with shape {shape}; pass it")
            if not (hasattr(array, "shape") and hasattr(array, "dtype")):
                raise DtypeError(f"{name}={array!r} is no array; pass a jax or numpy array")
            if tuple(array.shape) != shape:
                raise ShapeError(f"{name} has shape {tuple(array.shape)}; it was checked with {shape}; check again")
            if canonical(array.dtype) != canonical(dtype):
                raise DtypeError(f"{name} has dtype {array.dtype}; it was checked with {dtype}; check again")


def first_phase_of(function: Callable[..., Any]) -> Callable[..., tuple[int, Executor]]:
    """The first phase of the operator ``function``. No parameter is required by Python, and there are two more."""
    operator, signature = operator_of(function), inspect.signature(function)
    taken = set(signature.parameters)
    name, newest = operator.name + FIRST_PHASE, newest_of(operator.name)
    signature = signature.replace(
        parameters=[*(_optional(one, operator.arrays) for one in signature.parameters.values()), *_OF_THE_PHASE],
        return_annotation=tuple[int, Executor],
    )

    def first_phase(*args: Any, **kwargs: Any) -> tuple[int, Executor]:
        call = operator.call(bind(name, signature.parameters, args, kwargs))
        given = {key: value for key, value in call.attributes.items() if key in taken and value is not None}
        attributes = tuple((key, _static(value)) for key, value in given.items())
        arrays = tuple((key, call.shape(key), call.dtype(key)) for key in call.arrays if call.given(key))
        return int(operator.num_bytes(call)), Executor(operator.name, attributes, arrays)

    names = ", ".join(f"``{one}``" for one in lacking(operator.name))
    older = f"\n\n    Those are the arguments of ``{newest}`` without {names}." if names else ""
    text = f"""The first phase of ``{operator.name}``: a call is checked on the host, without running it.

    The arguments are the operator's own, arrays or their shapes. ``product`` says whose limits hold, and
    ``hccl_buffsize`` is the size of a communicator's buffer in MB.{older}

    Returns:
      The bytes of workspace on one rank, and the executor.

    Raises:
      MoEError: its ``status`` is CANN's code, and its text names the parameter, the value and the rule.
    """
    return named(first_phase, name, signature, text)


def _optional(parameter: inspect.Parameter, arrays: tuple[str, ...]) -> inspect.Parameter:
    """The parameter of an operator as its first phase takes it: it may be left out, and shapes may stand for arrays."""
    annotation = Any if parameter.name in arrays else parameter.annotation
    if parameter.default is not inspect.Parameter.empty:
        return parameter.replace(annotation=annotation)
    return parameter.replace(default=None, annotation=annotation if annotation is Any else annotation | None)


def _static(value: Any) -> Any:
    """``value`` in a hashable form, unless it is traced: lists and arrays of counts become tuples."""
    if hasattr(value, "tolist") and not isinstance(value, Tracer):
        value = value.tolist()
    return tuple(_static(item) for item in value) if isinstance(value, (list, tuple)) else value
