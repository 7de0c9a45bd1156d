"""A Pallas kernel as an operation of a program: compiled for the platform it was written for, interpreted elsewhere.

Which platform a program is for is known only when it is lowered. Until then a kernel is one primitive whose inside is
not traced. So a program may hold kernels of any platform, and tracing neither imports Pallas nor pays for kernels that
nobody runs. The kernel itself is a function of one device: inside it no operand is typed as varying over a mesh axis,
since the interpreter's loops want all that they carry to vary alike.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from moe_jax._compat import as_varying, lowering_for, on_one_device, union_of_varying_axes


def kernel_call(
    call: Callable,
    *operands: jax.Array,
    shape: tuple[int, ...],
    dtype,
    platforms: tuple[str, ...],
    others: tuple[tuple[str, Callable], ...] = (),
) -> jax.Array:
    """``call(*operands, interpret=...)``, a ``pallas_call`` with one result, typed as varying wherever an operand does.

    Args:
      call: (*operands, interpret: bool) -> an array.
      shape, dtype: of the result.
      platforms: the platforms that the kernel compiles for, as JAX names them when it lowers: "tpu", "cuda", "rocm".
      others: pairs of a platform and a function of the operands, which does the work there instead of the kernel.

    The operation has no derivative and cannot be batched: call it inside ``custom_gradient`` and ``sequential_vmap``.
    """
    axes = union_of_varying_axes(operands)
    (out_type,) = jax.make_jaxpr(lambda: as_varying(jnp.zeros(shape, dtype), axes))().out_avals
    return _kernel_p.bind(*operands, call=call, out_type=out_type, platforms=platforms, others=others)


def result_type(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The ``out_shape`` of a ``pallas_call`` whose operands vary over the mesh axes that ``like`` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


_kernel_p = Primitive("moe_kernel")
_kernel_p.def_abstract_eval(lambda *operands, call, out_type, platforms, others: out_type)
_kernel_p.def_impl(
    lambda *operands, **static: jax.jit(lambda *operands: _kernel_p.bind(*operands, **static))(*operands)
)


def _lower_for(platform: str | None) -> Callable:
    def lower(context, *values, call, out_type, platforms, others):
        def run(*operands):
            return call(*operands, interpret=platform not in platforms)

        # Kernels count in 32 bits, also where JAX is told to have 64.
        with lowering_for(platform), jax.enable_x64(False):
            alike = {"avals_in": [on_one_device(of) for of in context.avals_in], "avals_out": [on_one_device(out_type)]}
            function = dict(others).get(platform, run)
            return mlir.lower_fun(function, multiple_results=False)(context.replace(**alike), *values)

    return lower


for _platform in ("tpu", "cuda", "rocm"):
    mlir.register_lowering(_kernel_p, _lower_for(_platform), platform=_platform)
mlir.register_lowering(_kernel_p, _lower_for(None))
