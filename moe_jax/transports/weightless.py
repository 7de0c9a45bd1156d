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

import jax
import jax.numpy as jnp

from moe_jax.errors import InvalidArgumentError, MissingArgumentError, check_array, check_dtype, check_rank, check_shape
from moe_jax.plan import Plan
from moe_jax.types import SpecialTerms

Array = jax.Array


def special_terms(
    expert_ids: Array,
    plan: Plan,
    *,
    x: Array | None,
    const_alpha1: Array | None,
    const_alpha2: Array | None,
    const_v: Array | None,
) -> SpecialTerms | None:
    """Checks the arguments and computes what ``special_term`` reads; None where the plan has no such expert.

    Args:
      expert_ids: [T, K] i32, -1 for pairs that do not count.
      plan: static.
      x: [T, H] in ``plan.dtype``, the tokens; required with copy or constant experts.
      const_alpha1, const_alpha2: [Cc] or [Cc, H], const_v: [Cc, H], in ``plan.dtype``; required with constant experts.

    Raises:
      MissingArgumentError, InvalidArgumentError: an array is missing, or given where no expert reads it.
      ShapeError, DtypeError: an array does not have the shape or dtype above.
    """
    constants = {"const_alpha1": const_alpha1, "const_alpha2": const_alpha2, "const_v": const_v}
    _check_needed("x", x, plan.num_copy_experts + plan.num_const_experts, "copy or constant experts")
    for name, value in constants.items():
        _check_needed(name, value, plan.num_const_experts, "constant experts")
    if x is None:
        return None
    check_shape("x", x, (plan.tokens_per_rank, plan.hidden), "[T, H]")
    check_dtype("x", x, (plan.dtype,), "the plan's dtype")
    wide = x.astype(jnp.float32)
    if not plan.num_const_experts:
        return SpecialTerms(expert_ids=expert_ids, x=wide, gate_x=None, gate_v=None, v=None)
    assert const_alpha1 is not None and const_alpha2 is not None and const_v is not None, "checked above"
    _check_constants(plan, const_alpha1, const_alpha2, const_v)
    gate_x, gate_v = _gates(wide, const_alpha1.astype(jnp.float32), const_alpha2.astype(jnp.float32))
    return SpecialTerms(expert_ids=expert_ids, x=wide, gate_x=gate_x, gate_v=gate_v, v=const_v.astype(jnp.float32))


def special_term(terms: SpecialTerms, k: int, plan: Plan) -> Array:
    """What the k-th choice of each token adds before weighting, fp32 [T, H]; zero where it is a routed expert."""
    first_copy = plan.num_experts + plan.num_zero_experts
    first_const = first_copy + plan.num_copy_experts
    ids = terms.expert_ids[:, k]
    is_copy = (ids >= first_copy) & (ids < first_const)
    if terms.v is None or terms.gate_x is None or terms.gate_v is None:
        return jnp.where(is_copy[:, None], terms.x, 0.0)
    # One row of ones and zeros per token instead of an index: its adjoint is a product, not a scatter.
    chosen = (ids[:, None] - first_const == jnp.arange(plan.num_const_experts)).astype(jnp.float32)
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


def _check_needed(name: str, value: Array | None, num_readers: int, readers: str) -> None:
    if value is None and num_readers:
        raise MissingArgumentError(f"{name} is missing: the plan has {num_readers} {readers}, which read it")
    if value is not None and not num_readers:
        raise InvalidArgumentError(f"{name} was given, but the plan has no {readers} to read it; leave it out")


def _check_constants(plan: Plan, const_alpha1: Array, const_alpha2: Array, const_v: Array) -> None:
    count, hidden = plan.num_const_experts, plan.hidden
    for name, alpha in (("const_alpha1", const_alpha1), ("const_alpha2", const_alpha2)):
        check_array(name, alpha)
        if alpha.ndim != 1:
            check_rank(name, alpha, 2, "[Cc] (plain) or [Cc, H] (softmax gate)")
        check_shape(name, alpha, (count, hidden)[: alpha.ndim], "[Cc] (plain) or [Cc, H] (softmax gate)")
        check_dtype(name, alpha, (plan.dtype,), "the plan's dtype")
    check_shape("const_alpha2", const_alpha2, const_alpha1.shape, "the shape of const_alpha1")
    check_shape("const_v", const_v, (count, hidden), "[Cc, H]")
    check_dtype("const_v", const_v, (plan.dtype,), "the plan's dtype")
