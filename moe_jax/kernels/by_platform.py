"""An operation that is another function on each platform, traced only for the platform that a program is lowered for."""

import functools
from collections.abc import Callable

import jax
from jax.custom_batching import sequential_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir

from moe_jax import _compat


def by_platform(name: str, result: Callable, **functions: Callable) -> Callable:
    """A function of arrays that runs what ``functions`` hold for a platform: "cpu", "cuda", "rocm".

    ``jax.lax.platform_dependent`` traces every branch, and with the types that arrays have inside ``shard_map``, which
    JAX's interpreter of kernels cannot take. Here the function stands in the traced program as one operation, and is
    traced when that is lowered, as a function of one device.

    Args:
      name: of the operation.
      result: (*operands, **static) -> ShapeDtypeStruct, from operands of which only the types may be read.
      functions: (*operands, **static) -> array, static arguments being hashable.

    Returns:
      (*operands, **static) -> array, which varies over every mesh axis that an operand varies over. It has no
      derivative. A batch is a loop over its members.
    """
    primitive = Primitive(name)

    @primitive.def_abstract_eval
    def type_of(*operands, **static):
        out = result(*operands, **static)
        return _compat.type_like(operands, out.shape, out.dtype)

    @primitive.def_impl
    def run(*operands, **static):
        return jax.jit(functools.partial(primitive.bind, **static))(*operands)

    for platform, function in functions.items():
        mlir.register_lowering(primitive, functools.partial(_lower, function, platform), platform=platform)

    def call(*operands, **static):
        return sequential_vmap(functools.partial(primitive.bind, **static))(*operands)

    return call


def _lower(function: Callable, platform: str, context, *operands, **static):
    """``function`` in the program, its operands and results being arrays of one device."""
    lower = mlir.lower_fun(functools.partial(function, **static), multiple_results=False)
    with _compat.lowering_for(platform):
        types = (
            [_compat.type_on_one_device(aval) for aval in avals] for avals in (context.avals_in, context.avals_out)
        )
        types_in, types_out = types
        return lower(context.replace(avals_in=types_in, avals_out=types_out), *operands)
