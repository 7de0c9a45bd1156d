"""Rows on their way to the experts, differentiably: the adjoint of what ``collect`` does with unit weights.

``send_rows``: token rows [T, H] -> expert rows [M, H], a copy for every pair of the round.
"""

import dataclasses
import functools
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.derivatives import custom_gradient, take_rows
from moe_jax.plan import Plan
from moe_jax.quant import QTensor, Recipe
from moe_jax.quant.message import join, join_some, split, split_some
from moe_jax.transports import linear
from moe_jax.transports.base import Transport, only_present, pair_weights
from moe_jax.types import DispatchHandle

Array = jax.Array


class CodedRows(NamedTuple):
    """Rows of a quantised wire. Their codes and scales are constants to JAX; ``dequantized`` makes rows of all three.

    Attributes:
      values: [M, V], the codes.
      scale: [M, S], their scales.
      gradient: [M, H] zeros in ``plan.dtype``, through which the gradient of the rows flows.
    """

    values: Array
    scale: Array
    gradient: Array


_Rows = TypeVar("_Rows")


class Sent(NamedTuple, Generic[_Rows]):
    """What has come to the experts.

    Attributes:
      rows: [M, H] in ``plan.dtype``, or CodedRows where the plan quantises; of ``send_as_is`` a tuple of arrays.
      weights: [M] f32, the combine weight of each row; None if no weights were given.
      tags: [M, G] i32; None if no tags were given.
      note: what the exchange has to say, see ``moe_jax.collectives.exchange``.
    """

    rows: _Rows
    weights: Array | None
    tags: Array | None
    note: Any


def send_smoothed(
    transport: Transport,
    x: Array,
    handle: DispatchHandle,
    *,
    smooth: Array | None,
    weights: Array | None,
    tags: Array | None = None,
) -> Sent[Array | CodedRows]:
    """``send_rows`` as the plan quantises, with smoothing factors that may differ from expert to expert.

    Args:
      transport, x, handle, weights, tags: as for ``send_rows``.
      smooth: f32 factors that multiply the rows before they are quantised: [1], [H], or [R, H] with a row for each
        expert, in the order of ``smooth_rows``; or None.
    """
    recipe = handle.plan.dispatch_recipe
    if smooth is None or smooth.ndim == 1 or transport.pairwise:
        return send_rows(transport, recipe, True, x, handle, smooth, weights, tags)
    # With such a transport a token travels once for all its experts, and the rank of each expert smooths and quantises.
    factor = smooth_rows(handle)[..., None]
    tags = factor if tags is None else jnp.concatenate([factor, tags], axis=-1)
    sent = send_rows(transport, None, True, x, handle, weights=weights, tags=tags)
    row, tags = sent.tags[:, 0], sent.tags[:, 1:] if sent.tags.shape[1] > 1 else None
    return sent._replace(rows=_quantize_rows(recipe, sent.rows, _row_factors(smooth, row, handle)), tags=tags)


def carry_rows(
    transport: Transport, x: Array, handle: DispatchHandle, num_rows: int, *, smooth: Array | None = None
) -> Array:
    """Zeros [num_rows, H] that carry the gradient of rows that ``send_smoothed`` has sent.

    The forward pass moves nothing. The backward pass takes cotangents back as that of ``send_smoothed`` does.
    """
    plan = handle.plan
    if smooth is None or smooth.ndim == 1 or transport.pairwise:
        return _carry(transport, num_rows, x, smooth, handle)
    row = smooth_rows(handle).T[..., None].astype(jnp.float32)
    rows, row = linear.send(transport, plan, True, None, x, None, row, handle.maps)
    factors = _row_factors(smooth, row[:, 0].astype(jnp.int32), handle)
    return _quantize_rows(plan.dispatch_recipe, rows, factors).gradient


def dequantized(rows: Array | CodedRows, plan: Plan) -> Array:
    """The rows [M, H] in ``plan.dtype`` as the experts see them: x, times its smoothing factors if any, but rounded."""
    if not isinstance(rows, CodedRows):
        return rows
    assert plan.dispatch_recipe is not None, "rows are coded by the plan's recipe"
    values = plan.dispatch_recipe.dequantize(QTensor(values=rows.values, scale=rows.scale)).astype(plan.dtype)
    return _attach(jax.lax.stop_gradient(values), rows.gradient)


def _row_factors(smooth: Array, row: Array, handle: DispatchHandle) -> Array:
    """[M, H] the factors of every row that came, zeros elsewhere. ``row`` [M] says which row of ``smooth`` it takes."""
    written = jnp.arange(row.shape[0]) < jnp.sum(handle.group_sizes)
    return take_rows(smooth, jnp.where(written, row, -1), absent=0)


def smooth_rows(handle: DispatchHandle) -> Array:
    """[T, C] i32 the row of [R, H] smoothing factors that every pair takes; -1 where no routed expert is.

    Without ranks for shared experts, the row of expert e is e; with them, shared expert s has row s, and e row Ns + e.
    """
    plan = handle.plan
    num_shared = plan.pairs_per_token - plan.top_k
    ids = handle.expert_ids
    routed = jnp.where((ids >= 0) & (ids < plan.num_experts), num_shared + ids, -1)
    shared = jnp.broadcast_to(jnp.arange(num_shared, dtype=jnp.int32), (ids.shape[0], num_shared))
    return jnp.concatenate([routed, _compat.as_varying(shared, _compat.varying_axes(ids))], axis=1)


# The differentiable forms.


@functools.partial(custom_gradient, num_static=3)
def send_rows(
    transport: Transport,
    recipe: Recipe | None,
    ordered: bool,
    x: Array,
    handle: DispatchHandle,
    smooth: Array | None = None,
    weights: Array | None = None,
    tags: Array | None = None,
) -> Sent[Array | CodedRows]:
    """Sends every pair of the handle's round to its row, with all that belongs to it in one message.

    Args:
      transport: of the handle's plan.
      recipe: how rows are quantised; None: they travel as they are.
      ordered: False leaves the rows in their inbox slots, see ``Transport.inbox_order``.
      x: [T, H].
      handle: of the round.
      smooth: as for ``send_smoothed``; a row for each expert only if the transport is ``pairwise``.
      weights: [T, K] f32.
      tags: [T, C, G] i32, carried along.

    Returns:
      Sent. Differentiable in x, smooth and weights.
    """
    plan = handle.plan
    # 1. What each token sends. Where each pair has factors of its own, the pairs send instead.
    tokens, own_messages = x, None
    with jax.named_scope("quantize"):
        if recipe is not None and smooth is not None and smooth.ndim == 2:
            factors = take_rows(smooth, smooth_rows(handle).T.ravel())
            message = recipe.pack(recipe.quantize(jnp.tile(x, (plan.pairs_per_token, 1)), smooth=factors))
            tokens, own_messages = None, message.reshape(plan.pairs_per_token, x.shape[0], message.shape[1])
        elif recipe is not None:
            tokens = recipe.pack(recipe.quantize(x, smooth=smooth))
    pairs, held = join_some([own_messages, *_of_pairs(weights, tags, plan)])
    # 2. To the rows.
    rows, pair_rows, note = transport.send(tokens, pairs, handle.maps, plan, ordered=ordered)
    # 3. What arrived with each row.
    own_messages, row_weights, row_tags = split_some(pair_rows, held)
    row_weights = None if row_weights is None else row_weights[:, 0]
    message: Any = own_messages if tokens is None else rows
    if recipe is None:
        return Sent(message, row_weights, row_tags, note)
    q = recipe.unpack(message, plan.hidden)
    gradient = jnp.zeros_like(q.values, shape=(q.values.shape[0], plan.hidden), dtype=plan.dtype)
    return Sent(CodedRows(q.values, q.scale, gradient), row_weights, row_tags, note)


def _of_pairs(weights: Array | None, tags: Array | None, plan: Plan) -> list[Array | None]:
    """Weights [T, K] and tags [T, C, G] in the order of pairs: [C, T, 1] and [C, T, G]."""
    weights = None if weights is None else pair_weights(weights, plan).T[..., None]
    return [weights, None if tags is None else jnp.swapaxes(tags, 0, 1)]


def _send_forward(transport, recipe, ordered, x, handle, smooth, weights, tags):
    sent = send_rows(transport, recipe, ordered, x, handle, smooth, weights, tags)
    kept = dataclasses.replace(handle, maps=transport.plain(handle.maps))  # nobody times the exchange of cotangents
    return sent, (x if smooth is not None else x[:0], smooth, weights, kept)


def _send_backward(transport, recipe, ordered, residuals, ct):
    # With s[c, t] the smoothing factors of a pair, ones without any:
    # d_x[t] = sum over the pairs c of t of s[c, t] * ct at the row of (t, c)    # [T, H] from [M, H]
    # d_smooth = sum over the pairs that take a factor of x[t] * ct at their row    # [1], [H] or [R, H]
    # d_weights[t, c] = ct_weights at the row of (t, c)    # [T, K] from [M]
    x, smooth, weights, handle = residuals
    plan, maps = handle.plan, handle.maps
    scalars = None if weights is None else ct.weights[:, None]
    ct_rows = ct.rows.gradient if isinstance(ct.rows, CodedRows) else ct.rows
    collected, d_weights = linear.collect(transport, plan, ordered, plan.backward_recipe, ct_rows, scalars, maps)
    d_weights = None if weights is None else d_weights[: plan.top_k, :, 0].T
    d_smooth = None
    if smooth is not None and smooth.ndim == 2:
        row = smooth_rows(handle).T
        collected = only_present(collected.astype(jnp.float32), transport.present(maps, plan))
        products = jax.lax.collapse(collected * x.astype(jnp.float32), 0, 2)
        target = jnp.where(row < 0, smooth.shape[0], row).ravel()
        d_smooth = jnp.zeros_like(smooth).at[target].add(products, mode="drop")
        collected = collected * take_rows(smooth, row)
    total = transport.total(collected, maps)
    if smooth is not None and smooth.ndim == 1:
        products = jnp.sum(total * x.astype(jnp.float32), axis=0)
        d_smooth = products if smooth.shape[0] == plan.hidden else jnp.sum(products)[None]
        total = total * smooth
    return total.astype(plan.dtype), None, d_smooth, d_weights, None


_CODES = (
    "a gradient was asked for through the codes or scales of quantised rows, which are constants: rounding has no "
    "useful derivative. Compute with the rows of moe_jax.dequantize(dispatched), or of moe_jax.aclnn.dequantize(sent, "
    "...), whose gradient passes straight through the rounding; or put jax.lax.stop_gradient around codes and scales, "
    "also where they are results of a jax.custom_vjp of yours, which fills in zeros for results that nothing uses"
)


def _codes_of(rows: Array | CodedRows) -> tuple[Array, ...]:
    """Those parts of rows that are constants to JAX."""
    return (rows.values, rows.scale) if isinstance(rows, CodedRows) else ()


send_rows.defvjp(_send_forward, _send_backward, frozen=lambda sent: _codes_of(sent.rows), refusal=_CODES)


@functools.partial(custom_gradient, num_static=2)
def _carry(transport, num_rows, x, smooth, handle):
    return jnp.zeros_like(x, shape=(num_rows, x.shape[1]))


def _carry_forward(transport, num_rows, x, smooth, handle):
    return _carry(transport, num_rows, x, smooth, handle), (x if smooth is not None else x[:0], smooth, None, handle)


def _carry_backward(transport, num_rows, residuals, ct):
    # d_x [T, H] and d_smooth from ct [num_rows, H]: those of ``_send_backward``
    d_x, _, d_smooth, *_ = _send_backward(transport, None, True, residuals, Sent(ct, None, None, None))
    return d_x, d_smooth, None


_carry.defvjp(_carry_forward, _carry_backward)


@functools.partial(custom_gradient, num_static=1)
def _quantize_rows(recipe, rows, factors):
    q = recipe.quantize(rows, smooth=factors)
    return CodedRows(q.values, q.scale, jnp.zeros_like(rows))


def _quantize_forward(recipe, rows, factors):
    return _quantize_rows(recipe, rows, factors), (rows, factors)


def _quantize_backward(recipe, residuals, ct):
    rows, factors = residuals
    # d_rows = ct * factors, d_factors = ct * rows    # [M, H], ct that of what carries the gradient
    ct = ct.gradient.astype(jnp.float32)
    written = jnp.any(factors != 0, axis=1, keepdims=True)  # other rows may hold anything
    d_factors = jnp.where(written, ct * rows.astype(jnp.float32), 0.0)
    return (ct * factors).astype(rows.dtype), d_factors


_quantize_rows.defvjp(_quantize_forward, _quantize_backward, frozen=_codes_of, refusal=_CODES)


@functools.partial(custom_gradient, num_static=1)
def send_as_is(
    transport: Transport,
    tokens: tuple[Array, ...],
    handle: DispatchHandle,
    weights: Array | None = None,
    tags: Array | None = None,
) -> Sent[tuple[Array, ...]]:
    """Arrays [T, n] of any dtypes to the rows [M, n] of their pairs, bit by bit, in one message.

    Weights and tags are as for ``send_rows``. Differentiable in floats.
    """
    message, parts = join(tokens)
    pairs, held = join_some(_of_pairs(weights, tags, handle.plan))
    rows, pair_rows, note = transport.send(message, pairs, handle.maps, handle.plan, ordered=True)
    assert rows is not None, "every token sends its arrays"
    row_weights, row_tags = split_some(pair_rows, held)
    return Sent(tuple(split(rows, parts)), None if row_weights is None else row_weights[:, 0], row_tags, note)


def _as_is_forward(transport, tokens, handle, weights, tags):
    kept = dataclasses.replace(handle, maps=transport.plain(handle.maps))
    return send_as_is(transport, tokens, handle, weights, tags), (tokens, weights, kept)


def _as_is_backward(transport, residuals, ct):
    # d_tokens[i][t] = sum over the pairs c of t of ct[i] at the row of (t, c)    # [T, n_i] from [M, n_i], of floats
    # d_weights[t, c] = ct_weights at the row of (t, c)    # [T, K] from [M]
    tokens, weights, handle = residuals
    plan = handle.plan
    floats = [jnp.issubdtype(part.dtype, jnp.floating) for part in tokens]
    columns = [part.astype(jnp.float32) for part, is_float in zip(ct.rows, floats, strict=True) if is_float]
    columns = columns or [jnp.zeros_like(handle.group_sizes, shape=(len(ct.rows[0]), 1), dtype=jnp.float32)]
    rows = jnp.concatenate(columns, axis=1)
    scalars = None if weights is None else ct.weights[:, None]
    collected, d_weights = linear.collect(transport, plan, True, None, rows, scalars, handle.maps)
    total = transport.total(collected, handle.maps)
    d_tokens, start = [], 0
    for part, is_float in zip(tokens, floats, strict=True):
        width = part.shape[1] if is_float else 0
        d_tokens.append(total[:, start : start + width].astype(part.dtype) if is_float else None)
        start += width
    return tuple(d_tokens), None, None if weights is None else d_weights[: plan.top_k, :, 0].T, None


send_as_is.defvjp(_as_is_forward, _as_is_backward)


@jax.custom_jvp
def _attach(rows, carrier):
    """``rows`` with the derivative of ``carrier``."""
    return rows


@_attach.defjvp
def _attach_jvp(primals, tangents):
    return primals[0], tangents[1]
