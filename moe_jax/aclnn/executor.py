"""What a first phase returns: the operator with everything static bound, ready for the arrays."""

import dataclasses
import importlib
from typing import Any

from moe_jax.aclnn.arguments import stand_in
from moe_jax.aclnn.limits import canonical
from moe_jax.errors import (
    DtypeError,
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    UnexpectedArgumentError,
    UnsupportedError,
    suggest,
)


@dataclasses.dataclass(frozen=True)
class Executor:
    """One checked call of an operator of ``moe_jax.aclnn``. Holds no array, and is hashable.

    A traced ``local_rank_id`` is the exception: it binds the executor to the program that is being traced.

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
          InvalidArgumentError: an array that was not among the checked ones.
          UnexpectedArgumentError: an array without its name, or a part of the C++ call that no function here has,
            such as a stream or an output.
          MissingArgumentError: an array that was, and is not given.
          ShapeError, DtypeError: an array is not like the one that was checked.
          UnsupportedError: ``moe_jax.aclnn`` has the checks of this operator, but not the operator.
        """
        if by_position:
            raise UnexpectedArgumentError(
                f"the executor of {self.operator_name} takes arrays by name, and {len(by_position)} came without; pass "
                f"{', '.join(f'{name}=' for name, _, _ in self.arrays)}"
            )
        arrays = {name: array for name, array in arrays.items() if array is not None}
        self._check(arrays)
        aclnn = importlib.import_module("moe_jax.aclnn")
        operator = getattr(aclnn, self.operator_name, None)
        if operator is None:
            raise UnsupportedError(f"moe_jax.aclnn cannot run {self.operator_name}; it only checks its calls")
        return operator(**arrays, **dict(self.attributes))

    def _check(self, arrays):
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
