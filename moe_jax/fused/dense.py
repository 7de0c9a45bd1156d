"""The dense product ``mm_x @ mm_weight`` that stands beside the exchange and is independent of it."""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax.errors import InvalidArgumentError, MissingArgumentError, check_dtype, check_flag, check_rank, check_shape
from moe_jax.fused.scaled import scaled_dense
from moe_jax.fused.scheme import Operands, check_same_kind, read_operands

Array = jax.Array


def dense(
    x: Array | None,
    weight: Array | None,
    x_scale: Array | None,
    weight_scale: Array | None,
    *,
    transpose: bool,
    grouped: Operands | None,
    grouped_dtype: jnp.dtype,
    out_dtype: jnp.dtype,
) -> Array | None:
    """``x @ weight`` [BS, N2], or None if neither was given.

    Args:
      x, weight, x_scale, weight_scale, transpose: the caller's ``mm_x``, ``mm_weight`` and so on.
      grouped: the scaled operands of the grouped part, whose scales must be of the same kind; None: it has none.
      grouped_dtype: the dtype of the grouped part's rows, which this part must have too if there are no scales.
      out_dtype: the dtype of the result.
    """
    check_flag("transpose_mm_weight", transpose)
    if x is None and weight is None:
        for name, scale in (("mm_x_scale", x_scale), ("mm_weight_scale", weight_scale)):
            if scale is not None:
                raise InvalidArgumentError(f"{name} was given without mm_x and mm_weight; pass them or leave it out")
        if transpose:
            raise InvalidArgumentError("transpose_mm_weight=True needs mm_x and mm_weight; pass them or set it False")
        return None
    if x is None or weight is None:
        missing, given = ("mm_x", "mm_weight") if x is None else ("mm_weight", "mm_x")
        raise MissingArgumentError(f"{missing} is None, but {given} was given; pass both or neither")
    check_rank("mm_x", x, 2, "[BS, H2]")
    check_rank("mm_weight", weight, 2, "[N2, H2]" if transpose else "[H2, N2]")
    scaled = read_operands("mm", x, weight, x_scale, weight_scale, transpose)
    check_same_kind(grouped, scaled)
    if scaled is not None:
        return scaled_dense(scaled, transpose=transpose, out_dtype=out_dtype)
    check_dtype("mm_x", x, (grouped_dtype,), "the dtype of gmm_x: cast one of them")
    check_dtype("mm_weight", weight, (grouped_dtype,), "the dtype of gmm_x: cast one of them")
    axis = 1 if transpose else 0
    check_shape("mm_x", x, (x.shape[0], weight.shape[axis]), f"[BS, H2], H2 as in mm_weight {tuple(weight.shape)}")
    with jax.named_scope("dense"):
        product = lax.dot_general(x, weight, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
    return product.astype(out_dtype)
