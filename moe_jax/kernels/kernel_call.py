"""A Pallas kernel as an operation of a program: compiled on the platform that it is for, interpreted elsewhere.

Which platform a program is for is known only when it is lowered. Until then a kernel is one primitive whose inside is
not traced. So a program may hold kernels of any platform, and tracing neither imports Pallas nor pays for kernels that
nobody runs. The kernel itself is a function of one device: inside it no operand is typed as varying over a mesh axis,
since the interpreter's loops want all that they carry to vary alike.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.typing import DTypeLike

from moe_jax._compat import as_varying, lowering_for, on_one_device, union_of_varying_axes


def kernel_call(
    call: Callable,
    *operands: jax.Array,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    platforms: tuple[str, ...],
    others: tuple[tuple[str, Callable], ...] = (),
    num_results: int | None = None,
) -> Any:
    """``call(*operands, interpret=...)``, a ``pallas_call``; its results are typed as varying wherever an operand does.

    Args:
      call: (*operands, interpret: bool) -> an array, or a tuple of ``num_results`` of them.
      shape, dtype: of each result.
      platforms: the platforms that the kernel compiles for, as JAX names them when it lowers: "tpu", "cuda", "rocm".
      others: pairs of a platform and a function of the operands, which replaces the kernel on that platform.

    The operation has no derivative and cannot be batched: call it inside ``custom_gradient`` and ``sequential_vmap``.
    """
    axes = union_of_varying_axes(operands)
    (out_type,) = jax.make_jaxpr(lambda: as_varying(jnp.zeros(shape, dtype), axes))().out_avals
    found = _kernel_p.bind(
        *operands, call=call, out_types=(out_type,) * (num_results or 1), platforms=platforms, others=others
    )
    return found[0] if num_results is None else tuple(found)


def result_type(shape: tuple[int, ...], dtype: DTypeLike, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The ``out_shape`` of a ``pallas_call`` whose operands vary over the mesh axes that ``like`` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


_kernel_p = Primitive("moe_kernel")
_kernel_p.multiple_results = True
_kernel_p.def_abstract_eval(lambda *operands, call, out_types, platforms, others: out_types)
_kernel_p.def_impl(
    lambda *operands, **static: jax.jit(lambda *operands: _kernel_p.bind(*operands, **static))(*operands)
)


def _lower_for(platform: str | None) -> Callable:
    def lower(context, *values, call, out_types, platforms, others):
        function = dict(others).get(platform, functools.partial(call, interpret=platform not in platforms))

        def run(*operands):
            found = function(*operands)
            return found if isinstance(found, tuple) else (found,)

        # Kernels have 32-bit integers, also where JAX is told to use 64 bits.
        with lowering_for(platform), jax.enable_x64(False):
            avals = {"avals_in": context.avals_in, "avals_out": out_types}
            alike = {name: [on_one_device(of) for of in types] for name, types in avals.items()}
            return mlir.lower_fun(run, multiple_results=True)(context.replace(**alike), *values)

    return lower


for _platform in ("tpu", "cuda", "rocm"):
    mlir.register_lowering(_kernel_p, _lower_for(_platform), platform=_platform)
mlir.register_lowering(_kernel_p, _lower_for(None))
