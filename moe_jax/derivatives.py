"""Functions whose backward pass is written by hand, for every mode and order of differentiation.

``jax.custom_vjp`` refuses forward mode, and wants cotangents that vary over exactly the mesh axes of their operands. A
``custom_gradient`` is defined in the same way, by a forward pass and a backward pass. The rest follows from the
backward pass:

- Forward mode. The backward pass is a linear map from the cotangents of the result to those of the operands. Its
  transpose maps the tangents of the operands to those of the result.
- Higher orders. The backward pass is differentiated like any other function, so it must consist of functions that have
  derivatives. Functions of bits and loops of unknown length have none; ``first_order_only`` says so where they are
  needed.

``take_rows`` is the one gather by an index in which -1 means "none".
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike

from moe_jax import _compat
from moe_jax.errors import UnsupportedError

Array = jax.Array
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class custom_gradient(Generic[Arguments, Result]):
    """A function with a backward pass of its own: ``jax.custom_vjp`` for every mode, as the text of this module says.

    Every operand that has a derivative is first typed as varying over all mesh axes over which any operand varies. The
    transpose of that step is a sum over the ranks, so JAX itself sums the cotangents of operands that are replicated.
    Arguments may be given by position or by name, and may have defaults; the two passes get all of them by position.

    Args:
      function: (*static, *operands) -> any pytree.
      num_static: how many of the first arguments are static: hashable values that hold no arrays.

    >>> import jax, jax.numpy as jnp
    >>> from moe_jax.derivatives import custom_gradient
    >>> @custom_gradient
    ... def cube(x):
    ...     return x**3
    >>> cube.defvjp(lambda x: (cube(x), x), lambda x, ct: (3 * x**2 * ct,))
    >>> x = jnp.float32(2.0)
    >>> [float(slope) for slope in (jax.grad(cube)(x), jax.jvp(cube, (x,), (x,))[1], jax.grad(jax.grad(cube))(x))]
    [12.0, 24.0, 12.0]
    """

    def __init__(self, function: Callable[Arguments, Result], num_static: int = 0):
        functools.update_wrapper(self, function)
        self._signature = inspect.signature(function)
        self._num_static = num_static
        self._call = jax.custom_jvp(function, nondiff_argnums=tuple(range(num_static)))
        self._call.defjvp(self._differentiate, symbolic_zeros=True)

    def defvjp(
        self,
        forward: Callable,
        backward: Callable,
        *,
        frozen: Callable[[Any], Any] = lambda out: (),
        refusal: str = "",
    ) -> None:
        """Defines the derivative.

        Args:
          forward: (*static, *operands) -> (result, residuals).
          backward: (*static, residuals, cotangent of the result) -> the cotangents of the operands, None for an operand
            that has none.
          frozen: takes the result and returns those parts of it through which no cotangent may come.
          refusal: the text of the UnsupportedError that is raised if a cotangent comes through such a part.
        """
        self._forward, self._backward = forward, backward
        self._frozen, self._refusal = frozen, refusal

    def __call__(self, *given: Arguments.args, **named: Arguments.kwargs) -> Result:
        bound = self._signature.bind(*given, **named)
        bound.apply_defaults()
        static, operands = bound.args[: self._num_static], bound.args[self._num_static :]
        axes = _compat.union_of_varying_axes(operands)
        operands = jax.tree.map(lambda x: _compat.as_varying(x, axes) if _is_smooth(x) else x, operands)
        return self._call(*static, *operands)

    def _differentiate(self, *args: Any) -> tuple[Any, Any]:
        """The rule of ``jax.custom_jvp``: (*static, primals, tangents) -> (result, its tangent)."""
        *static, primals, tangents = args
        # 1. The result, and what the backward pass needs.
        out, residuals = self._forward(*static, *primals)
        operands, smooth_out = _Smooth(primals), _Smooth(out)
        leaves = jax.tree.leaves(out)
        # 2. The backward pass as a map over flat lists of those leaves that have a derivative.
        frozen = {id(leaf) for leaf in jax.tree.leaves(self._frozen(out))}
        pull = _pull(
            functools.partial(self._backward, *static),
            residuals,
            operands,
            smooth_out,
            smooth_out.select([id(leaf) in frozen for leaf in leaves]),
            self._refusal,
        )
        # 3. Its transpose takes the tangents of the operands to those of the result; other leaves have none.
        moving = [
            ad.zeros_like_aval(of) if isinstance(tangent, SymbolicZero) else tangent
            for tangent, of in zip(operands.select(jax.tree.leaves(tangents)), operands.types, strict=True)
        ]
        found = _linear_p.bind(*map(jnp.asarray, (*jax.tree.leaves(residuals), *moving)), pull=pull)
        others = [SymbolicZero(jax.typeof(leaf).to_tangent_aval()) for leaf in leaves]
        return out, smooth_out.tree.unflatten(smooth_out.merge(found, others))


def first_order_only(function: Callable, reason: str) -> Callable:
    """``function``, which raises UnsupportedError with ``reason`` when it is differentiated."""
    call = jax.custom_jvp(function)

    @call.defjvp
    def refuse(primals, tangents):
        raise UnsupportedError(reason)

    return call


def differentiated_as(plain: Callable, function: Callable, *operands: Any) -> Any:
    """``function(*operands)`` with the derivatives of ``plain``, a function that computes the same in another way."""

    @custom_gradient
    def call(*operands):
        return function(*operands)

    def backward(operands, ct):
        # d_operands = ct @ (d plain / d operands), for those operands that have a derivative.
        leaves, tree = jax.tree.flatten(operands)
        smooth = _Smooth(operands)

        def of_smooth(values):
            out = plain(*tree.unflatten(smooth.merge(values, leaves)))
            return _Smooth(out).select(jax.tree.leaves(out))

        cts = [leaf for leaf in jax.tree.leaves(ct) if leaf.dtype != jax.dtypes.float0]
        (found,) = jax.vjp(of_smooth, smooth.select(leaves))[1](cts)
        return tree.unflatten(smooth.merge(found, [None] * len(leaves)))

    call.defvjp(lambda *operands: (call(*operands), operands), backward)
    return call(*operands)


def without_float0(cotangents: Any) -> Any:
    """``cotangents`` with None in place of those of integers, which have none: so that they can be added and kept."""
    return jax.tree.map(lambda ct: None if ct.dtype == jax.dtypes.float0 else ct, cotangents)


def take_rows(rows: Array, index: Array, *, absent: float | None = None, poison: bool = False) -> Array:
    """``rows[index]`` along the first axis: the one gather by an index in which -1 means "none".

    Args:
      rows: [N, ...].
      index: any shape, i32.
      absent: what stands where the index is -1; None: anything, which nobody may read.
      poison: with ``absent=None``, NaN (or the largest integer) stands there, to prove that nobody reads it.

    Returns:
      [*index.shape, ...]. What stands in for an absent row has no derivative.
    """
    if absent is None and poison:
        absent = poison_of(rows.dtype)
    if not rows.shape[0]:
        absent = 0 if absent is None else absent
        picked = jnp.full_like(rows, absent, shape=(*index.shape, *rows.shape[1:]))
        return _compat.as_varying(picked, _compat.varying_axes(index))
    picked = _take(rows.shape[0], rows, index) if _is_smooth(rows) else jnp.take(rows, index, axis=0, mode="clip")
    if absent is None:
        return picked
    there = (index >= 0).reshape(*index.shape, *(1,) * (picked.ndim - index.ndim))
    return jnp.where(there, picked, jnp.asarray(absent, picked.dtype))


def poison_of(dtype: DTypeLike) -> float | int:
    """The value that ``poison`` puts where nobody may read: NaN, or the largest integer."""
    return jnp.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


@functools.partial(custom_gradient, num_static=1)
def _take(num_rows: int, rows: Array, index: Array) -> Array:
    return jnp.take(rows, index, axis=0, mode="clip")


def _take_backward(num_rows, index, ct):
    """Adds each cotangent to the row that was taken; JAX's own rule would send the cotangent of index -1 to row 0."""
    # d_rows[n] = the sum of ct[i] over all i with index[i] = n    # [N, ...] from [*index.shape, ...]
    target = jnp.where(index < 0, num_rows, index)
    rows = jnp.zeros_like(ct, shape=(num_rows, *ct.shape[index.ndim :]))
    return rows.at[target].add(ct, mode="drop"), None


_take.defvjp(lambda num_rows, rows, index: (_take(num_rows, rows, index), index), _take_backward)


# The linear map from tangents of the operands to those of the result. It is given by its transpose, the backward pass.


def _is_smooth(leaf: Any) -> bool:
    return jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


class _Smooth:
    """Which leaves of a tree have a derivative: those of floats."""

    def __init__(self, tree: Any):
        leaves, self.tree = jax.tree.flatten(tree)
        self.mask = [_is_smooth(leaf) for leaf in leaves]
        self.types = [jax.typeof(leaf).to_tangent_aval() for leaf in self.select(leaves)]

    def select(self, leaves: list) -> list:
        """Those of ``leaves``, one for each leaf of the tree, that have a derivative."""
        return [leaf for leaf, smooth in zip(leaves, self.mask, strict=True) if smooth]

    def merge(self, values: list, others: list) -> list:
        """The inverse of ``select``: ``values`` for the leaves that have a derivative, ``others`` for the rest."""
        of_smooth = iter(values)
        return [next(of_smooth) if smooth else other for smooth, other in zip(self.mask, others, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Pull:
    """A backward pass over flat lists of arrays. It is static: it holds no array itself.

    Attributes:
      call: (residuals, cotangents of the result) -> cotangents of the operands.
      num_residuals: how many residuals there are.
      operand_types, out_types: the types of the operands and of the parts of the result that have a derivative.
      frozen: for each of these parts of the result, whether no cotangent may come through it.
      refusal: what is said if one does.
    """

    call: Callable
    num_residuals: int
    operand_types: list
    out_types: list
    frozen: list[bool]
    refusal: str

    def split(self, values):
        """The operands of the primitive -> (the residuals, the tangents behind them)."""
        return list(values[: self.num_residuals]), list(values[self.num_residuals :])

    def apply(self, *values):
        """(residuals, tangents of the operands) -> tangents of the result: the transpose of ``call``."""
        residuals, tangents = self.split(values)
        zeros = [ad.zeros_like_aval(of) for of in self.out_types]
        return jax.vjp(lambda cts: self.call(residuals, cts), zeros)[1](tangents)[0]


def _pull(backward: Callable, residuals: Any, operands: _Smooth, out: _Smooth, frozen: list, refusal: str) -> _Pull:
    leaves, residual_tree = jax.tree.flatten(residuals)

    def call(residuals, cts):
        no_ct = [np.zeros((), jax.dtypes.float0)] * len(out.mask)
        ct = out.tree.unflatten(out.merge(cts, no_ct))
        found = []
        by_operand = backward(residual_tree.unflatten(residuals), ct)
        for tree, cotangent in zip(operands.tree.children(), by_operand, strict=True):
            found += [None] * tree.num_leaves if cotangent is None else tree.flatten_up_to(cotangent)
        return [_as_cotangent(ct, of) for ct, of in zip(operands.select(found), operands.types, strict=True)]

    return _Pull(call, len(leaves), operands.types, out.types, frozen, refusal)


def _as_cotangent(ct: Array | None, of: Any) -> Array:
    if ct is None:
        return ad.zeros_like_aval(of)
    assert (ct.shape, ct.dtype) == (of.shape, of.dtype), (ct, of)
    return _compat.as_varying(ct, of.manual_axis_type.varying)


_linear_p = Primitive("moe_linear")
_linear_p.multiple_results = True
_linear_p.def_impl(lambda *values, pull: pull.apply(*values))
_linear_p.def_abstract_eval(lambda *values, pull: pull.out_types)
mlir.register_lowering(_linear_p, mlir.lower_fun(lambda *values, pull: pull.apply(*values), multiple_results=True))


def _transpose_linear(cts, *values, pull):
    for ct, frozen in zip(cts, pull.frozen, strict=True):
        if frozen and type(ct) is not ad.Zero:
            raise UnsupportedError(pull.refusal)
    residuals, tangents = pull.split(values)
    found = pull.call(residuals, [ad.instantiate_zeros(ct) for ct in cts])
    wanted = [ct if ad.is_undefined_primal(of) else None for ct, of in zip(found, tangents, strict=True)]
    return [None] * len(residuals) + wanted


def _differentiate_linear(primals, tangents, *, pull):
    """The derivative of the linear map y = L(r) t, which depends on the residuals r and maps the tangents t.

    dy = L(r) dt + (d L(r) t / d r) dr. The first term is the map itself; the second is found by differentiating the
    backward pass in its residuals.
    """
    out = _linear_p.bind(*primals, pull=pull)
    residuals, _ = pull.split(primals)
    by_residual, mapped = pull.split(tangents)
    terms = []
    if any(type(t) is not ad.Zero for t in mapped):
        terms.append(_linear_p.bind(*residuals, *map(ad.instantiate_zeros, mapped), pull=pull))
    live = [i for i, t in enumerate(by_residual) if type(t) is not ad.Zero and t.dtype != jax.dtypes.float0]
    if live:

        def of_live(*values):
            moved = dict(zip(live, values, strict=True))
            return pull.apply(*(moved.get(i, value) for i, value in enumerate(primals)))

        terms.append(jax.jvp(of_live, [primals[i] for i in live], [by_residual[i] for i in live])[1])
    return out, [sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)]


def _batch_linear(values, axes, *, pull):
    """The rule for ``jax.vmap``: the linear map of a batch, whose backward pass is the given one under ``jax.vmap``."""
    # 1. The batch comes first in every operand that has one; tangents without one are repeated.
    size = next(value.shape[axis] for value, axis in zip(values, axes, strict=True) if axis is not None)
    values = [v if axis is None else jnp.moveaxis(v, axis, 0) for v, axis in zip(values, axes, strict=True)]
    residual_axes, tangent_axes = pull.split([None if axis is None else 0 for axis in axes])
    residuals, tangents = pull.split(values)
    tangents = [
        jnp.broadcast_to(t, (size, *t.shape)) if axis is None else t
        for t, axis in zip(tangents, tangent_axes, strict=True)
    ]
    # 2. The backward pass of the batch.
    batched = _Pull(
        jax.vmap(pull.call, in_axes=(residual_axes, 0), axis_size=size),
        pull.num_residuals,
        [_batched_type(of, size) for of in pull.operand_types],
        [_batched_type(of, size) for of in pull.out_types],
        pull.frozen,
        pull.refusal,
    )
    out = _linear_p.bind(*residuals, *tangents, pull=batched)
    return out, [0] * len(out)


def _batched_type(of: Any, size: int) -> Any:
    return jax.typeof(jnp.broadcast_to(ad.zeros_like_aval(of), (size, *of.shape)))


ad.primitive_transposes[_linear_p] = _transpose_linear
ad.primitive_jvps[_linear_p] = _differentiate_linear
batching.primitive_batchers[_linear_p] = _batch_linear
