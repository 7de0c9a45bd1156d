"""The public grouped matrix product: checks, gradients, and the call through the back-end table."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.derivatives import custom_gradient
from moe_jax.errors import ShapeError, check_dtype, check_flag, check_rank, check_shape
from moe_jax.kernels.table import call_kernel, check_backend

FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def grouped_matmul(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    backend: str = "auto",
    transpose_rhs: bool = False,
    add_to: jax.Array | None = None,
) -> jax.Array:
    """Multiplies consecutive groups of rows with one matrix each.

    ``out[m] = lhs[m] @ rhs[g]`` for the group g that row m is in, plus ``add_to[m]``; accumulated in fp32, rounded once
    to ``lhs.dtype``. Only where a back end cannot accumulate (see ``Backend``), a product that is added to something is
    rounded once before that, too.
    Rows at or past ``sum(group_sizes)`` may hold anything, NaN included: they influence nothing, forward or backward,
    and their own results are unspecified.

    Args:
      lhs: [M, H] fp32, bf16 or fp16.
      rhs: G >= 1 matrices [G, H, N], or [G, N, H] if ``transpose_rhs``; the dtype of ``lhs``.
      group_sizes: [G] i32, rows per group, each >= 0, in order; their sum is at most M.
      backend: a registered back end; several joined by "+", of which the first that has a kernel serves it; or "auto":
        the one for the platform that the program is lowered for.
      transpose_rhs: whether ``rhs`` holds transposed matrices.
      add_to: [M, N] in ``lhs.dtype``, what the product is added to; None: nothing.

    Returns:
      [M, N] in ``lhs.dtype``. Differentiable in ``lhs``, ``rhs`` and ``add_to``, in both modes and to any order.

    Raises:
      ShapeError, DtypeError: an argument does not have the shape or dtype above.
      MissingArgumentError: an array is None.
      InvalidArgumentError, UnsupportedError: the back end is unknown, or lacks this kernel.

    >>> import jax.numpy as jnp, moe_jax as moe
    >>> moe.grouped_matmul(jnp.ones((3, 2)), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), jnp.array([1, 2]))
    Array([[1., 1.],
           [2., 2.],
           [2., 2.]], dtype=float32)
    """
    check_flag("transpose_rhs", transpose_rhs)
    check_rank("lhs", lhs, 2, "[M, H]")
    check_rank("rhs", rhs, 3, "[G, H, N], or [G, N, H] with transpose_rhs=True")
    check_dtype("lhs", lhs, FLOAT_DTYPES)
    check_dtype("rhs", rhs, (lhs.dtype,), "the dtype of lhs: cast one of them")
    if not rhs.shape[0]:
        raise ShapeError(f"rhs has shape {rhs.shape}; expected at least one matrix: [G, H, N], G > 0")
    check_dtype("group_sizes", group_sizes, ("int32",), "cast it with .astype(jnp.int32)")
    check_shape("group_sizes", group_sizes, rhs.shape[:1], "[G], one size per matrix of rhs")
    contracted, layout = (rhs.shape[2], "[M, N]") if transpose_rhs else (rhs.shape[1], "[M, H]")
    check_shape("lhs", lhs, (lhs.shape[0], contracted), f"{layout}, the contracted axis of rhs {tuple(rhs.shape)}")
    columns = rhs.shape[1 if transpose_rhs else 2]
    if add_to is not None:
        check_shape("add_to", add_to, (lhs.shape[0], columns), "[M, N], the shape of the result")
        check_dtype("add_to", add_to, (lhs.dtype,), "the dtype of lhs: cast one of them")
    check_backend(backend)
    # A kernel may index with a traced integer.
    operands = [None if a is None else jnp.asarray(a) for a in (lhs, rhs, group_sizes, add_to)]
    return _grouped_matmul(backend, bool(transpose_rhs), None, *operands)


def grouped_outer(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    *,
    backend: str | tuple[str, ...],
    dtype: Any,
    row_slot: jax.Array | None = None,
    slotted: str = "",
) -> jax.Array:
    """The gradient of ``grouped_matmul`` in its matrices: ``out[g] = lhs[rows of g]^T @ rhs[rows of g]``.

    Args:
      lhs, rhs: [M, H] and [M, N].
      group_sizes: as for ``grouped_matmul``.
      backend: as for ``grouped_matmul``, or the registrations of a plan.
      dtype: of the result.
      row_slot: [M] i32: the rows of one operand [A, ...] lie in slots, see ``Backend``; None: no rows do.
      slotted: "lhs" or "rhs", the operand whose rows lie in slots.

    Returns:
      [G, H, N]. Differentiable in ``lhs`` and ``rhs``.
    """
    return _grouped_outer(backend, str(dtype), slotted, lhs, rhs, group_sizes, row_slot)


def _product(backend, transpose_rhs, into, lhs, rhs, group_sizes, add_to=None, row_slot=None):
    """One product. With ``row_slot`` the rows of ``lhs`` lie in slots; or with ``into``, those of the result."""
    if row_slot is None:
        return call_kernel("grouped_matmul", backend, lhs, rhs, group_sizes, add_to=add_to, transpose_rhs=transpose_rhs)
    slots = {"row_slot": row_slot, "into": into}
    operands = (lhs, rhs, group_sizes)
    return call_kernel("slot_matmul", backend, *operands, add_to=add_to, transpose_rhs=transpose_rhs, **slots)


_grouped_matmul = custom_gradient(_product, num_static=3)


def _forward(backend, transpose_rhs, into, lhs, rhs, group_sizes, add_to=None, row_slot=None):
    added = None if add_to is None else ()  # the backward pass only asks whether there was one, so no array is kept
    out = _grouped_matmul(backend, transpose_rhs, into, lhs, rhs, group_sizes, add_to, row_slot)
    return out, (lhs, rhs, group_sizes, added, row_slot)


def _backward(backend, transpose_rhs, into, residuals, ct):
    lhs, rhs, group_sizes, added, row_slot = residuals
    # Below stand rows in their order. Where those of lhs lie in slots, d_lhs does as well; where those of the result
    # do, ct does.
    # d_lhs = ct @ rhs^T                 # [M, H] = [M, N] @ [G, N, H]
    back_into, slotted = _adjoint_slots(lhs, row_slot, into)
    d_lhs = _grouped_matmul(backend, not transpose_rhs, back_into, ct, rhs, group_sizes, None, row_slot)
    # d_rhs[g] = lhs[g]^T @ ct[g]        # [G, H, N], or [G, N, H] if transpose_rhs
    left, right = (ct, lhs) if transpose_rhs else (lhs, ct)
    if transpose_rhs and slotted:
        slotted = {"lhs": "rhs", "rhs": "lhs"}[slotted]
    d_rhs = grouped_outer(
        left, right, group_sizes, backend=backend, dtype=rhs.dtype, row_slot=row_slot, slotted=slotted
    )
    # d_add_to = ct                      # [M, N]
    return d_lhs, d_rhs, None, None if added is None else ct, None


_grouped_matmul.defvjp(_forward, _backward)


def _adjoint_slots(lhs: jax.Array, row_slot: jax.Array | None, into: int | None) -> tuple[int | None, str]:
    """For the adjoint: (``into`` of the product that makes d_lhs, which operand of ``lhs^T ct`` lies in slots)."""
    if row_slot is None:
        return None, ""
    return (lhs.shape[0], "lhs") if into is None else (None, "rhs")


@functools.partial(custom_gradient, num_static=2)
def grouped_matmuls(
    backend: str | tuple[str, ...],
    into: int | None,
    lhs: jax.Array,
    matrices: tuple[jax.Array, ...],
    biases: tuple[jax.Array | None, ...],
    group_sizes: jax.Array,
    row_slot: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """``grouped_matmul`` of the same rows with each of several matrices, each plus the bias of the row's group.

    Nothing is checked here. Rows at or past ``sum(group_sizes)`` influence nothing, forward or backward.

    Args:
      backend: the registrations that a plan keeps, or a name as for ``grouped_matmul``.
      into: None, or with ``row_slot`` A: the results are [A, N], each row in its slot.
      lhs: [M, H]; with ``row_slot`` and without ``into`` [A, H], each row in its slot.
      matrices: [G, H, N] each, which may differ in N, in the dtype of ``lhs``.
      biases: [G, N] in that dtype, or None, for each of the matrices.
      group_sizes: [G] i32.
      row_slot: [M] i32, the slot of each row; None: rows lie in order. Only some back ends can read or write slots:
        ``table.fused_kernels`` says which.

    Returns:
      [M, N] for each of the matrices.
    """
    products = []
    for rhs, bias in zip(matrices, biases, strict=True):
        product = _product(backend, False, into, lhs, rhs, group_sizes, None, row_slot)
        if bias is not None:
            # A bias is the product of a row's 1 with the bias of its group, so a kernel that accumulates adds it in the
            # same pass over the rows.
            slots = None if into is None else row_slot
            ones = _ones(lhs, row_slot)
            product = _product(backend, False, into, ones, bias[:, None, :], group_sizes, product, slots)
        products.append(product)
    return tuple(products)


def _ones(rows: jax.Array, row_slot: jax.Array | None) -> jax.Array:
    """[M, 1] ones that vary over the mesh axes of ``rows``; M is the length of ``row_slot``, or else of ``rows``."""
    num_rows = (rows if row_slot is None else row_slot).shape[0]
    return _compat.as_varying(jnp.ones((num_rows, 1), rows.dtype), _compat.varying_axes(rows))


def _matmuls_forward(backend, into, lhs, matrices, biases, group_sizes, row_slot=None):
    out = grouped_matmuls(backend, into, lhs, matrices, biases, group_sizes, row_slot)
    return out, (lhs, matrices, biases, group_sizes, row_slot)


def _matmuls_backward(backend, into, residuals, cts):
    lhs, matrices, biases, group_sizes, row_slot = residuals
    # Below stand rows in their order. Where those of lhs lie in slots, d_lhs does as well; where those of the results
    # do, their cotangents do.
    # d_lhs = sum_i ct_i @ rhs_i^T       # [M, H] = [M, N_i] @ [G, N_i, H]
    # Each product is added to what the one before it left, so that no pass over the rows remains for the additions.
    d_lhs = None
    back_into, slotted = _adjoint_slots(lhs, row_slot, into)
    for ct, rhs in zip(cts, matrices, strict=True):
        d_lhs = _grouped_matmul(backend, True, back_into, ct, rhs, group_sizes, d_lhs, row_slot)
    # d_rhs_i[g] = lhs[g]^T @ ct_i[g]    # [G, H, N_i] = [H, M] @ [M, N_i], over the rows of g
    outer = functools.partial(grouped_outer, group_sizes=group_sizes, backend=backend, dtype=lhs.dtype)
    d_matrices = tuple(outer(lhs, ct, row_slot=row_slot, slotted=slotted) for ct in cts)
    # d_bias_i[g] = 1^T @ ct_i[g]        # [G, N_i]; this sum reads no row past the last one, as a plain sum would
    of_cts: dict[str, Any] = {} if into is None else {"row_slot": row_slot, "slotted": "rhs"}
    d_biases = tuple(
        None if bias is None else outer(_ones(lhs, row_slot), ct, **of_cts)[:, 0]
        for bias, ct in zip(biases, cts, strict=True)
    )
    return d_lhs, d_matrices, d_biases, None, None


grouped_matmuls.defvjp(_matmuls_forward, _matmuls_backward)


@functools.partial(custom_gradient, num_static=3)
def gated_matmul(
    backend: str | tuple[str, ...],
    gating: Callable[[jax.Array, jax.Array], jax.Array],
    keep: bool,
    lhs: jax.Array,
    matrices: tuple[jax.Array, jax.Array],
    biases: tuple[jax.Array | None, ...],
    group_sizes: jax.Array,
    row_slot: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """``gating`` of the two results of ``grouped_matmuls``, in one kernel of a back end that has such a kernel.

    Args:
      gating: (gate, up) -> the result, entry by entry; it is differentiated by JAX.
      keep: whether the two products are results as well.
      others: as for ``grouped_matmuls`` without ``into``; biases for both matrices, or None for both.

    Returns:
      (hidden [M, N],), or (gate, up, hidden) if ``keep``.
    """
    more = {"gate_bias": biases[0], "up_bias": biases[1], "row_slot": row_slot}
    return call_kernel("gated_matmul", backend, lhs, *matrices, group_sizes, gating=gating, keep=keep, **more)


def _gated_forward(backend, gating, keep, lhs, matrices, biases, group_sizes, row_slot=None):
    products = gated_matmul(backend, gating, True, lhs, matrices, biases, group_sizes, row_slot)
    return products if keep else products[2:], (products[:2], lhs, matrices, biases, group_sizes, row_slot)


def _gated_backward(backend, gating, keep, residuals, cts):
    # d_product_i = d gating / d product_i * ct      # [M, N], plus the cotangent of the product if it is a result
    # The rest is the backward pass of ``grouped_matmuls``.
    products, *operands = residuals
    d_products = jax.vjp(gating, *products)[1](cts[-1])
    if keep:
        d_products = tuple(map(jnp.add, d_products, cts[:2]))
    return _matmuls_backward(backend, None, operands, d_products)


gated_matmul.defvjp(_gated_forward, _gated_backward)


@functools.partial(custom_gradient, num_static=3)
def _grouped_outer(backend, dtype, slotted, lhs, rhs, group_sizes, row_slot=None):
    if row_slot is None:
        return call_kernel("grouped_outer", backend, lhs, rhs, group_sizes, dtype=jnp.dtype(dtype))
    slots = {"row_slot": row_slot, "slotted": slotted}
    return call_kernel("slot_outer", backend, lhs, rhs, group_sizes, dtype=jnp.dtype(dtype), **slots)


def _outer_forward(backend, dtype, slotted, lhs, rhs, group_sizes, row_slot=None):
    operands = (lhs, rhs, group_sizes, row_slot)
    return _grouped_outer(backend, dtype, slotted, *operands), operands


def _outer_backward(backend, dtype, slotted, residuals, ct):
    lhs, rhs, group_sizes, row_slot = residuals
    ct = ct.astype(lhs.dtype)
    # Below stand rows in their order. The cotangent of the operand whose rows lie in slots lies in slots as well.
    into_lhs, into_rhs = (of.shape[0] if slotted == name else None for name, of in (("lhs", lhs), ("rhs", rhs)))
    # d_lhs[m] = ct[g] @ rhs[m]          # [M, H] = [M, N] @ [G, N, H]
    d_lhs = _grouped_matmul(backend, True, into_lhs, rhs, ct, group_sizes, None, row_slot)
    # d_rhs[m] = lhs[m] @ ct[g]          # [M, N] = [M, H] @ [G, H, N]
    return d_lhs, _grouped_matmul(backend, False, into_rhs, lhs, ct, group_sizes, None, row_slot), None, None


_grouped_outer.defvjp(_outer_forward, _outer_backward)
