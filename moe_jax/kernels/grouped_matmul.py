"""The public grouped matrix product: checks, gradients, and the call through the back-end table."""

import functools

import jax
import jax.numpy as jnp

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
) -> jax.Array:
    """Multiplies consecutive groups of rows with one matrix each.

    ``out[m] = lhs[m] @ rhs[g]`` for the group g that row m is in; accumulated in fp32, rounded once to ``lhs.dtype``.
    Rows at or past ``sum(group_sizes)`` may hold anything, NaN included: they influence nothing, forward or backward,
    and their own results are unspecified.

    Args:
      lhs: [M, H] fp32, bf16 or fp16.
      rhs: G >= 1 matrices [G, H, N], or [G, N, H] if ``transpose_rhs``; the dtype of ``lhs``.
      group_sizes: [G] i32, rows per group, each >= 0, in order; their sum is at most M.
      backend: a registered back end; several joined by "+", of which the first that has a kernel serves it; or "auto":
        the one for the platform that the program is lowered for.
      transpose_rhs: whether ``rhs`` holds transposed matrices.

    Returns:
      [M, N] in ``lhs.dtype``. Differentiable in ``lhs`` and ``rhs``, in both modes and to any order.

    Raises:
      ShapeError, DtypeError: an argument does not have the shape or dtype above.
      MissingArgumentError: an array is None.
      InvalidArgumentError, UnsupportedError: the back end is unknown, or lacks this kernel.

    >>> grouped_matmul(jnp.ones((3, 2)), jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), jnp.array([1, 2]))
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
    check_backend(backend)
    operands = [jnp.asarray(a) for a in (lhs, rhs, group_sizes)]  # a kernel may index with a traced integer
    return _grouped_matmul(backend, bool(transpose_rhs), *operands)


def grouped_outer(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, backend: str, dtype: str) -> jax.Array:
    """The gradient of ``grouped_matmul`` in its matrices: ``out[g] = lhs[rows of g]^T @ rhs[rows of g]``.

    Args:
      lhs, rhs: [M, H] and [M, N].
      group_sizes, backend: as for ``grouped_matmul``.
      dtype: of the result.

    Returns:
      [G, H, N]. Differentiable in ``lhs`` and ``rhs``.
    """
    return _grouped_outer(backend, str(dtype), lhs, rhs, group_sizes)


@functools.partial(custom_gradient, num_static=2)
def _grouped_matmul(backend, transpose_rhs, lhs, rhs, group_sizes):
    return call_kernel("grouped_matmul", backend, lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)


def _forward(backend, transpose_rhs, lhs, rhs, group_sizes):
    return _grouped_matmul(backend, transpose_rhs, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _backward(backend, transpose_rhs, residuals, ct):
    lhs, rhs, group_sizes = residuals
    # d_lhs = ct @ rhs^T                 # [M, H] = [M, N] @ [G, N, H]
    d_lhs = _grouped_matmul(backend, not transpose_rhs, ct, rhs, group_sizes)
    # d_rhs[g] = lhs[g]^T @ ct[g]        # [G, H, N], or [G, N, H] if transpose_rhs
    left, right = (ct, lhs) if transpose_rhs else (lhs, ct)
    return d_lhs, grouped_outer(left, right, group_sizes, backend=backend, dtype=rhs.dtype), None


_grouped_matmul.defvjp(_forward, _backward)


@functools.partial(custom_gradient, num_static=2)
def _grouped_outer(backend, dtype, lhs, rhs, group_sizes):
    return call_kernel("grouped_outer", backend, lhs, rhs, group_sizes, dtype=jnp.dtype(dtype))


def _outer_forward(backend, dtype, lhs, rhs, group_sizes):
    return _grouped_outer(backend, dtype, lhs, rhs, group_sizes), (lhs, rhs, group_sizes)


def _outer_backward(backend, dtype, residuals, ct):
    lhs, rhs, group_sizes = residuals
    ct = ct.astype(lhs.dtype)
    # d_lhs[m] = ct[g] @ rhs[m]          # [M, H] = [M, N] @ [G, N, H]
    d_lhs = _grouped_matmul(backend, True, rhs, ct, group_sizes)
    # d_rhs[m] = lhs[m] @ ct[g]          # [M, N] = [M, H] @ [G, H, N]
    return d_lhs, _grouped_matmul(backend, False, lhs, ct, group_sizes), None


_grouped_outer.defvjp(_outer_forward, _outer_backward)
