"""Experts without weights of their own: zero, copy and constant experts. They cost no row and no exchange.

Their ids follow those of the routed experts: zero experts in [E, E + Z), copy experts in the next Cp ids, constant
experts in the next Cc. A pair (t, k) with such an id adds, times its combine weight:

    zero    0
    copy    x[t]
    const   a1 * x[t] + a2 * v[c]

where, for alphas of shape [Cc], ``a1 = alpha1[c], a2 = alpha2[c]``; and for alphas of shape [Cc, H], ``(a1, a2) =
softmax(<alpha1[c], x[t]>, <alpha2[c], x[t]>)``. All in fp32.

Source: MoeDistributeCombineV4 (LongCat-Flash uses copy experts as its "zero-computation" ones).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InvalidArgumentError, MissingArgumentError, check_array, check_dtype, check_rank, check_shape
from moe_jax.plan import Plan
from moe_jax.types import pytree

Array = jax.Array


class Constants(NamedTuple):
    """The parameters of constant experts; all are None where the plan has none.

    Attributes:
      alpha1: [Cc], the weight of the token; or [Cc, H], whose product with it becomes a weight by softmax.
      alpha2: the same for the vector.
      v: [Cc, H], the vectors.
    """

    alpha1: Array | None
    alpha2: Array | None
    v: Array | None


@pytree()
class WeightlessTerms:
    """What zero, copy and constant experts add, before it is weighted; fp32.

    Attributes:
      expert_ids: [T, K] i32, the choices that count, -1 for others.
      x: [T, H], the tokens.
      gate_x: [T, Cc], the weight of x for each constant expert; None without constant experts.
      gate_v: [T, Cc], the weight of the vector of each; None likewise.
      v: [Cc, H], the vectors; None likewise.
    """

    expert_ids: Array
    x: Array
    gate_x: Array | None
    gate_v: Array | None
    v: Array | None


def weightless_terms(expert_ids: Array, x: Array | None, constants: Constants, plan: Plan) -> WeightlessTerms | None:
    """What ``weightless_term`` reads, from checked arguments; None where the plan has no weightless experts.

    Args:
      expert_ids: [T, K] i32, -1 for pairs that do not count.
      x: [T, H] in ``plan.dtype``, the tokens; read with copy or constant experts only.
      constants: in ``plan.dtype``.
      plan: static.
    """
    if not plan.num_copy_experts + plan.num_const_experts:
        return None
    assert x is not None
    wide = x.astype(jnp.float32)
    if constants.alpha1 is None or constants.alpha2 is None or constants.v is None:
        return WeightlessTerms(expert_ids=expert_ids, x=wide, gate_x=None, gate_v=None, v=None)
    alpha1, alpha2, v = (array.astype(jnp.float32) for array in (constants.alpha1, constants.alpha2, constants.v))
    gate_x, gate_v = _gates(wide, alpha1, alpha2)
    return WeightlessTerms(expert_ids=expert_ids, x=wide, gate_x=gate_x, gate_v=gate_v, v=v)


def weightless_term(terms: WeightlessTerms, k: int, plan: Plan) -> Array:
    """What the k-th choice of each token adds before weighting, fp32 [T, H]; zero where it is a routed expert."""
    # 1. The ids of each kind follow each other, copy experts first.
    first_copy = plan.num_experts + plan.num_zero_experts
    first_const = first_copy + plan.num_copy_experts
    ids = terms.expert_ids[:, k]
    is_copy = (ids >= first_copy) & (ids < first_const)
    if terms.gate_x is None or terms.gate_v is None or terms.v is None:
        return jnp.where(is_copy[:, None], terms.x, 0.0)
    # 2. One row of ones and zeros per token stands for an index, because its adjoint is a product and not a scatter.
    chosen = (ids[:, None] - first_const == jnp.arange(plan.num_const_experts)).astype(jnp.float32)
    # 3. A copy expert takes all of x, and a constant one takes its gates' shares of x and of its vector.
    of_x = is_copy.astype(jnp.float32) + jnp.sum(chosen * terms.gate_x, axis=1)
    of_v = jnp.matmul(chosen * terms.gate_v, terms.v, precision=jax.lax.Precision.HIGHEST)
    is_any = is_copy | (ids >= first_const) & (ids < plan.num_ids)
    return jnp.where(is_any[:, None], of_x[:, None] * terms.x + of_v, 0.0)


def _gates(x: Array, alpha1: Array, alpha2: Array) -> tuple[Array, Array]:
    """(a1, a2), each [T, Cc]."""
    if alpha1.ndim == 1:
        shape = (x.shape[0], alpha1.shape[0])
        return jnp.broadcast_to(alpha1, shape), jnp.broadcast_to(alpha2, shape)
    scores = [jnp.matmul(x, alpha.T, precision=jax.lax.Precision.HIGHEST) for alpha in (alpha1, alpha2)]
    gate_x, gate_v = jax.nn.softmax(jnp.stack(scores), axis=0)
    return gate_x, gate_v


def check_weightless(x: Array | None, constants: Constants, plan: Plan) -> None:
    """Raises unless ``x`` and ``constants`` are what the weightless experts of ``plan`` read, and no more is given.

    Raises:
      MissingArgumentError, InvalidArgumentError: an array is missing, or given where no expert reads it.
      ShapeError, DtypeError: an array does not have its shape, or is not in ``plan.dtype``.
    """
    alpha1, alpha2, v = constants
    _check_needed("x", x, plan.num_copy_experts + plan.num_const_experts, "copy or constant experts")
    for name, value in (("const_alpha1", alpha1), ("const_alpha2", alpha2), ("const_v", v)):
        _check_needed(name, value, plan.num_const_experts, "constant experts")
    if x is not None:
        check_shape("x", x, (plan.tokens_per_rank, plan.hidden), "[T, H]")
        check_dtype("x", x, (plan.dtype,), "the plan's dtype")
    if alpha1 is None or alpha2 is None:
        return
    for name, alpha in (("const_alpha1", alpha1), ("const_alpha2", alpha2)):
        check_array(name, alpha)
        layout = "[Cc] (plain) or [Cc, H] (softmax gate)"
        if alpha.ndim != 1:
            check_rank(name, alpha, 2, layout)
        check_shape(name, alpha, (plan.num_const_experts, plan.hidden)[: alpha.ndim], layout)
        check_dtype(name, alpha, (plan.dtype,), "the plan's dtype")
    check_shape("const_alpha2", alpha2, alpha1.shape, "the shape of const_alpha1")
    check_shape("const_v", v, (plan.num_const_experts, plan.hidden), "[Cc, H]")
    check_dtype("const_v", v, (plan.dtype,), "the plan's dtype")


def _check_needed(name: str, value: Array | None, num_readers: int, readers: str) -> None:
    if value is None and num_readers:
        raise MissingArgumentError(f"{name} is missing: the plan has {num_readers} {readers}, which read it")
    if value is not None and not num_readers:
        raise InvalidArgumentError(f"{name} was given, but the plan has no {readers} to read it; leave it out")
