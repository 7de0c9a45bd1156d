"""Combine: expert rows back at their tokens, weighted and summed; alone, or with residual and RMSNorm."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from moe_jax import _compat, collectives
from moe_jax.errors import InvalidArgumentError, check_dtype, check_rank, check_shape, check_type
from moe_jax.layer.weightless import Constants, WeightlessTerms, check_weightless, weightless_term, weightless_terms
from moe_jax.plan import Plan
from moe_jax.transports import add_waited, check_performance_info, collect_rows, transport_of
from moe_jax.transports.base import Transport, pair_weights
from moe_jax.types import DispatchHandle

Array = jax.Array


@_compat.vary_as_operands("rows")
def combine(
    rows: Array,
    combine_weights: Array,
    handle: DispatchHandle,
    *,
    x: Array | None = None,
    const_alpha1: Array | None = None,
    const_alpha2: Array | None = None,
    const_v: Array | None = None,
    shared_x: Array | None = None,
    performance_info: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Brings expert rows back to their tokens and sums them with weights. Call it per shard, inside ``shard_map``.

    ``y[t] = sum_k combine_weights[t, k] * row(t, k) + shared_x[t]`` in fp32, rounded once. The exchanging transports
    add in ascending k, so a token's result does not depend on the other tokens; "allgather" adds within each rank in
    ascending k and then over ranks. With tp > 1 the rows of the tp ranks are partial sums and are added first.
    Pairs that went nowhere contribute nothing, whatever their weight. Rows of shared experts on ranks of their own are
    added after the K choices, with weight 1.

    Args:
      rows: [M, H] expert outputs in the order of ``dispatch``; those past ``sum(group_sizes)`` are not read.
      combine_weights: [T, K] f32.
      handle: from ``dispatch``.
      x: [T, H] in ``plan.dtype``, the tokens; required with copy or constant experts.
      const_alpha1, const_alpha2: [Cc] or [Cc, H], const_v: [Cc, H], in ``plan.dtype``; required with constant experts.
        ``moe_jax.layer.weightless`` says what they mean.
      shared_x: [T, H] in ``plan.dtype``, added with weight 1 before rounding: what shared experts made of the tokens.
      performance_info: [W] or [2, W] int, to which the microseconds are added that this rank waited for each rank's
        rows, as in ``dispatch``, whose handle must come from a call with it.

    Returns:
      [T, H] in ``plan.dtype``. Differentiable in every float array, in both modes and to any order. With
      ``performance_info``, the pair of both. Over a mesh axis of size 1 it is typed as the tokens' arrays are, wherever
      the experts are.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError, MeshError: as for ``dispatch``.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> from jax.sharding import PartitionSpec as P
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> mesh = moe.make_mesh(ep=2)
    >>> plan = moe.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=4, top_k=2, dtype="float32")
    >>> def there_and_back(x, ids):
    ...     sent = moe.dispatch(x, ids, plan)
    ...     return moe.combine(sent.x, jnp.full(ids.shape, 0.5), sent.handle)
    >>> run = jax.jit(jax.shard_map(there_and_back, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    >>> x = jnp.arange(64.0).reshape(8, 8)
    >>> y = run(x, jnp.zeros((8, 2), jnp.int32))
    >>> bool((y == x).all())
    True

    Source: MoeDistributeCombineV4.
    """
    constants = Constants(const_alpha1, const_alpha2, const_v)
    total, waited = combine_sum(rows, combine_weights, handle, shared_x, performance_info, x, constants)
    y = total.astype(handle.plan.dtype)
    return y if waited is None else (y, waited)


@_compat.vary_as_operands("rows")
def combine_add_rms_norm(
    rows: Array,
    combine_weights: Array,
    handle: DispatchHandle,
    residual: Array,
    gamma: Array,
    *,
    eps: float = 1e-6,
    x: Array | None = None,
    const_alpha1: Array | None = None,
    const_alpha2: Array | None = None,
    const_v: Array | None = None,
    shared_x: Array | None = None,
) -> tuple[Array, Array, Array]:
    """``combine``, plus the residual, and its RMSNorm, in one pass over the rows. Per shard, inside ``shard_map``.

    With ``total[t] = sum_k combine_weights[t, k] * row(t, k) + shared_x[t] + residual[t]`` in fp32:
    ``x = round(total)``; ``rstd = 1 / sqrt(mean_h(total^2) + eps)``, of the unrounded total;
    ``y = round(round(total * rstd) * gamma)``.

    Args:
      rows, combine_weights, handle, x, const_alpha1, const_alpha2, const_v, shared_x: as for ``combine``.
      residual: [T, H] in ``plan.dtype``.
      gamma: [H] in ``plan.dtype``.
      eps: added to the mean square; finite and at least 0.

    Returns:
      (y [T, H] in ``plan.dtype``, rstd [T] f32, x [T, H] in ``plan.dtype``). Differentiable in everything but eps.

    Raises:
      As for ``combine``; InvalidArgumentError for a negative or infinite ``eps``.

    Source: MoeDistributeCombineAddRmsNormV2.
    """
    constants = Constants(const_alpha1, const_alpha2, const_v)
    total, _ = combine_sum(rows, combine_weights, handle, shared_x, None, x, constants)
    plan = handle.plan
    check_shape("residual", residual, (plan.tokens_per_rank, plan.hidden), "[T, H]")
    check_dtype("residual", residual, (plan.dtype,), "the plan's dtype")
    check_shape("gamma", gamma, (plan.hidden,), "[H]")
    check_dtype("gamma", gamma, (plan.dtype,), "the plan's dtype")
    return normalize(total, residual, gamma, eps, plan.dtype)


def normalize(total: Array, residual: Array, gamma: Array, eps: float, dtype: str) -> tuple[Array, Array, Array]:
    """(y, rstd, x) of ``combine_add_rms_norm`` from the combined sums, fp32 [T, H]."""
    number = isinstance(eps, numbers.Real) and not isinstance(eps, bool)
    if not number or not 0 <= eps < float("inf"):
        raise InvalidArgumentError(f"eps={eps!r} must be finite and at least 0; 1e-6 is usual")
    with jax.named_scope("add_rms_norm"):
        total = total + residual.astype(jnp.float32)
        rstd = 1.0 / jnp.sqrt(jnp.mean(jnp.square(total), axis=-1) + eps)
        scaled = (total * rstd[:, None]).astype(dtype)
        y = (scaled.astype(jnp.float32) * gamma.astype(jnp.float32)).astype(dtype)
    return y, rstd, total.astype(dtype)


def combine_sum(
    rows: Array,
    combine_weights: Array,
    handle: DispatchHandle,
    shared_x: Array | None,
    performance_info: Array | None,
    x: Array | None,
    constants: Constants,
    *,
    row_weights: Array | None = None,
) -> tuple[Array, Array | None]:
    """The sums of both operators before rounding, fp32 [T, H], and the new ``performance_info``.

    ``row_weights``: [M], taken for the rows instead of ``combine_weights``, and summed over the tp ranks; only for a
    transport that ``takes_row_weights``.
    """
    _check(rows, combine_weights, handle, shared_x, performance_info)
    plan = handle.plan
    if not plan.num_pairs:  # no device has a token; see ``dispatch``
        return jnp.zeros_like(combine_weights, shape=(0, plan.hidden)), performance_info
    check_weightless(x, constants, plan)
    terms = weightless_terms(handle.expert_ids, x, constants, plan)
    given = (rows, combine_weights, handle, shared_x, row_weights, terms)
    given = _compat.as_varying_alike(given, plan.exchange_axes)  # ``dispatch`` types without axes of size 1
    rows, combine_weights, handle, shared_x, row_weights, terms = given
    transport = transport_of(plan)
    # The weight of a pair that contributes nothing may be anything, NaN included.
    weights = pair_weights(combine_weights, plan)
    travelled = transport.present(handle.maps, plan)
    contributes = jnp.pad(handle.expert_ids >= plan.num_experts, ((0, 0), (0, plan.pairs_per_token - plan.top_k)))
    contributes |= travelled
    timed = handle
    if performance_info is not None:
        timed = dataclasses.replace(handle, maps=transport.timed(handle.maps))
    weights_of_rows = weights if row_weights is None else row_weights
    collected, note = collect_rows(transport, ordered=True, rows=rows, weights=weights_of_rows, handle=timed)
    if performance_info is not None:
        performance_info = add_waited(performance_info, note)
    total = finish(transport, collected, jnp.where(contributes, weights, 0.0), travelled, terms, plan)
    return total if shared_x is None else total + shared_x.astype(jnp.float32), performance_info


def finish(
    transport: Transport, collected: Array, weights: Array, travelled: Array, terms: WeightlessTerms | None, plan: Plan
) -> Array:
    """The weighted sum over k, ascending, of the rows that were collected and of what weightless experts add.

    Args:
      transport: of the plan.
      collected: what ``collect_rows`` gave, of all rounds together.
      weights: [T, C] f32.
      travelled: [T, C] bool, the pairs that were collected in some round; others hold anything.
      terms: of ``weightless_terms``.
      plan: static.

    Returns:
      [T, H] fp32.
    """
    with jax.named_scope("combine_sum"):
        added = None if terms is None else [weightless_term(terms, k, plan) for k in range(plan.top_k)]
        return transport.finish(collected, weights, travelled, added)


def _check(rows, combine_weights, handle, shared_x, performance_info):
    check_type("handle", handle, DispatchHandle, "pass the .handle that dispatch returned")
    plan, transport = handle.plan, transport_of(handle.plan)
    collectives.check_axes(plan)
    check_rank("rows", rows, 2, "[M, H]")
    check_shape("rows", rows, (transport.num_rows(handle.maps), plan.hidden), "[M, H], the extent that dispatch gave")
    check_dtype("rows", rows, (plan.dtype,), "the plan's dtype")
    check_shape("combine_weights", combine_weights, (plan.tokens_per_rank, plan.top_k), "[T, K]")
    check_dtype("combine_weights", combine_weights, ("float32",), "cast it with .astype(jnp.float32)")
    if shared_x is not None:
        check_shape("shared_x", shared_x, (plan.tokens_per_rank, plan.hidden), "[T, H]")
        check_dtype("shared_x", shared_x, (plan.dtype,), "the plan's dtype")
    if performance_info is None:
        return
    check_performance_info(performance_info, plan)
    if plan.num_pairs and transport.timed(handle.maps) is None:
        raise InvalidArgumentError(
            "performance_info was given to combine, but not to the dispatch that made the handle; give it to both"
        )
