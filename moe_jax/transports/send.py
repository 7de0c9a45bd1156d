"""Rows on their way to the experts, differentiably: the adjoint of what ``collecting`` does with unit weights.

``send_rows``: token rows [T, H] -> expert rows [M, H], a copy for every pair in the window.
C = ``plan.num_copies``: the K choices of a token, and one copy for each shared expert on ranks of its own.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.derivatives import custom_gradient, take_rows
from moe_jax.quant import QTensor
from moe_jax.quant.message import join, join_some, split, split_some
from moe_jax.transports import all_to_all, linear
from moe_jax.transports.picking import copy_weights, only_present
from moe_jax.transports.routes import ROUTES, RowOrder
from moe_jax.types import Arrival, DispatchHandle, ExchangeMaps

Array = jax.Array


class Sent(NamedTuple):
    """Rows at their experts. Quantised ones are constants to JAX: their gradient flows through ``rows``."""

    rows: Array  # [M, H] in ``plan.dtype``; zeros where the rows are quantised
    values: Array | None  # [M, V] codes of quantised rows
    scale: Array | None  # [M, S] their scales
    weights: Array | None  # [M] f32, the combine weight of each row
    tags: Array | None  # [M, G] i32
    arrival: Arrival | None


def send_rows(
    x: Array,
    handle: DispatchHandle,
    *,
    smooth: Array | None = None,
    weights: Array | None = None,
    tags: Array | None = None,
    buffer: Array | None = None,
    timed: bool = False,
    order: RowOrder | None = None,
) -> Sent:
    """Sends every pair of the handle's window to its row, with all that belongs to it in one message.

    Args:
      x: [T, H].
      handle: of the window.
      smooth: f32 [1], [H] or [R, H], factors of the rows before they are quantised, R by ``smooth_rows``.
      weights: [T, K] f32.
      tags: [T, C, G] i32, carried along.
      buffer, timed: as for ``all_to_all.scatter``.
      order: of ``arrival_order``, to leave the rows in their arrival slots; None: they are put in order. Without
        factors by expert.

    Returns:
      Sent. Differentiable in x, smooth and weights.
    """
    plan = handle.plan
    operands = (x, smooth, weights, tags, buffer)
    x, smooth, weights, tags, buffer = _compat.as_varying(operands, plan.exchange_axes)
    if not plan.num_pairs:  # no device has a token: nothing moves, and no row is written
        return _nothing(x, weights, tags, plan)
    by_expert = smooth is not None and smooth.ndim == 2
    if not by_expert or isinstance(handle.maps, ExchangeMaps):
        return _send(timed, x, smooth, weights, tags, buffer, handle, ordered=order is None)
    # Here a token travels once for all its experts, and each expert's rank smooths and quantises its own copy.
    factor = smooth_rows(handle)[..., None]
    tags = factor if tags is None else jnp.concatenate([factor, tags], axis=-1)
    sent = _send(timed, x, None, weights, tags, buffer, handle, quantised=False)
    row, tags = sent.tags[:, 0], sent.tags[:, 1:] if sent.tags.shape[1] > 1 else None
    rows, values, scale = _quantize_rows(plan.dispatch_recipe, sent.rows, _row_factors(smooth, row, handle))
    return sent._replace(rows=rows, values=values, scale=scale, tags=tags)


def carry_rows(x: Array, handle: DispatchHandle, num_rows: int, *, smooth: Array | None = None) -> Array:
    """Zeros [num_rows, H] with the gradient of the rows of ``send_rows(x, handle, smooth=smooth)``, sent before.

    Moves nothing, but a backward pass does.
    """
    plan = handle.plan
    x, smooth = _compat.as_varying((x, smooth), plan.exchange_axes)
    if smooth is None or smooth.ndim == 1 or isinstance(handle.maps, ExchangeMaps):
        return _carry(num_rows, x, smooth, handle)
    row = smooth_rows(handle).T[..., None].astype(jnp.float32)
    rows, row = linear.send(x, None, row, handle.maps, plan, ordered=True, recipe=None)
    return _quantize_rows(plan.dispatch_recipe, rows, _row_factors(smooth, row[:, 0].astype(jnp.int32), handle))[0]


def send_as_is(
    tokens: tuple[Array, ...],
    handle: DispatchHandle,
    *,
    weights: Array | None = None,
    tags: Array | None = None,
    buffer: Array | None = None,
    timed: bool = False,
) -> tuple[tuple[Array, ...], Array | None, Array | None, Arrival | None]:
    """Arrays [T, n] of any dtypes to the rows [M, n] of their copies, bit by bit, in one message.

    Returns:
      (the arrays, weights [M], tags, arrival) as ``send_rows`` has them. Differentiable in floats.
    """
    operands = _compat.as_varying((tokens, weights, tags, buffer), handle.plan.exchange_axes)
    return _send_as_is(timed, *operands, handle)


def dequantized(sent: Sent, plan) -> Array:
    """The rows [M, H] in ``plan.dtype`` as the experts see them: about x, or x times its smoothing factors."""
    if sent.values is None:
        return sent.rows
    recipe = plan.dispatch_recipe
    rows = recipe.dequantize(QTensor(values=sent.values, scale=sent.scale)).astype(plan.dtype)
    return _attach(jax.lax.stop_gradient(rows), sent.rows)


def _row_factors(smooth: Array, row: Array, handle: DispatchHandle) -> Array:
    """The factors of every row that came, given the row of ``smooth`` that each takes; zeros elsewhere. [M, H]."""
    written = jnp.arange(row.shape[0]) < jnp.sum(handle.group_sizes)
    return take_rows(smooth, jnp.where(written, row, -1), absent=0)


def smooth_rows(handle: DispatchHandle) -> Array:
    """[T, C] i32 the row of [R, H] smoothing factors that every pair takes; -1 where no routed expert is.

    Without ranks for shared experts, the row of expert e is e; with them, shared expert s has row s, and e row Ns + e.
    """
    plan = handle.plan
    num_shared = plan.num_copies - plan.top_k
    ids = handle.expert_ids
    routed = jnp.where((ids >= 0) & (ids < plan.num_experts), num_shared + ids, -1)
    shared = jnp.broadcast_to(jnp.arange(num_shared, dtype=jnp.int32), (ids.shape[0], num_shared))
    return jnp.concatenate([routed, _compat.as_varying(shared, _compat.varying_axes(ids))], axis=1)


def _nothing(x: Array, weights: Array | None, tags: Array | None, plan) -> Sent:
    """No device has a token."""
    num_rows, recipe = plan.num_rows(1), plan.dispatch_recipe
    fill = jnp.nan if plan.poison and recipe is None else 0

    def empty(width, dtype):
        return jnp.full_like(x, 0, shape=(num_rows, *width), dtype=dtype)

    return Sent(
        rows=jnp.full_like(x, fill, shape=(num_rows, plan.hidden)),
        values=None if recipe is None else empty(recipe.values_shape(plan.hidden), recipe.values_dtype),
        scale=None if recipe is None else empty(recipe.scale_shape(plan.hidden), recipe.scale_dtype),
        weights=None if weights is None else empty((), jnp.float32),
        tags=None if tags is None else empty(tags.shape[2:], jnp.int32),
        arrival=None,
    )


# The differentiable forms.


class _How(NamedTuple):
    """What is static about sending."""

    timed: bool
    quantised: bool
    ordered: bool


def _send(timed, *operands, quantised: bool = True, ordered: bool = True) -> Sent:
    return _send_with(_How(timed=timed, quantised=quantised, ordered=ordered), *operands)


@functools.partial(custom_gradient, num_static=1)
def _send_with(how, x, smooth, weights, tags, buffer, handle):
    plan = handle.plan
    recipe = plan.dispatch_recipe if how.quantised else None
    tokens, copies = x, None
    with jax.named_scope("quantize"):
        if recipe is not None and smooth is not None and smooth.ndim == 2:  # each copy has factors of its own
            factors = take_rows(smooth, smooth_rows(handle).T.ravel())
            message = recipe.pack(recipe.quantize(jnp.tile(x, (plan.num_copies, 1)), smooth=factors))
            tokens, copies = None, message.reshape(plan.num_copies, x.shape[0], message.shape[1])
        elif recipe is not None:
            tokens = recipe.pack(recipe.quantize(x, smooth=smooth))
    per_pair = [copies, *_of_pairs(weights, tags, plan)]
    pairs, held = (None, None) if all(part is None for part in per_pair) else join_some(per_pair)
    options = {"buffer": buffer, "timed": how.timed} if buffer is not None or how.timed else {}
    options |= {} if how.ordered else {"ordered": False}
    rows, pair_rows, arrival = ROUTES[type(handle.maps)].scatter(tokens, pairs, handle.maps, plan, **options)
    copies, row_weights, row_tags = (None, None, None) if held is None else split_some(pair_rows, held)
    row_weights = None if weights is None else row_weights[:, 0]
    message = copies if tokens is None else rows
    if recipe is None:
        return Sent(message, None, None, row_weights, row_tags, arrival)
    q = recipe.unpack(message, plan.hidden)
    return Sent(_carrier(q, plan), q.values, q.scale, row_weights, row_tags, arrival)


def _of_pairs(weights: Array | None, tags: Array | None, plan) -> list[Array | None]:
    """Weights [T, K] and tags [T, C, G] as they belong to pairs: [C, T, 1] and [C, T, G]."""
    weights = None if weights is None else copy_weights(weights, plan).T[..., None]
    return [weights, None if tags is None else jnp.swapaxes(tags, 0, 1)]


def _carrier(q: QTensor, plan) -> Array:
    return jnp.zeros_like(q.values, shape=(q.values.shape[0], plan.hidden), dtype=plan.dtype)


def _send_forward(how, x, smooth, weights, tags, buffer, handle):
    sent = _send_with(how, x, smooth, weights, tags, buffer, handle)
    return sent, (x if smooth is not None else x[:0], smooth, weights, tags, buffer, handle)


def _send_backward(how, residuals, ct):
    x, smooth, weights, _, _, handle = residuals
    plan = handle.plan
    scalars = None if weights is None else ct.weights[:, None]
    options = {"ordered": how.ordered, "recipe": plan.backward_recipe}
    # With unit weights: d_x[t] = sum over the pairs c of t of ct at the row of (t, c), times its factors.
    collected, d_weights = linear.collect(ct.rows, scalars, handle.maps, plan, **options)
    d_weights = None if weights is None else d_weights[: plan.top_k, :, 0].T
    if smooth is not None and smooth.ndim == 2:
        row = smooth_rows(handle).T
        collected = only_present(collected.astype(jnp.float32), all_to_all.present(handle.maps))
        products = jax.lax.collapse(collected * x.astype(jnp.float32), 0, 2)
        target = jnp.where(row < 0, smooth.shape[0], row).ravel()
        d_smooth = jnp.zeros_like(smooth).at[target].add(products, mode="drop")
        collected = collected * take_rows(smooth, row)
    total = ROUTES[type(handle.maps)].total(collected, handle.maps)
    if smooth is None:
        d_smooth = None
    elif smooth.ndim == 1:
        products = jnp.sum(total * x.astype(jnp.float32), axis=0)
        d_smooth = products if smooth.shape[0] == plan.hidden else jnp.sum(products)[None]
        total = total * smooth
    return total.astype(plan.dtype), d_smooth, d_weights, None, None, None


_CODES = (
    "a gradient was asked for through the codes or scales of quantised rows, which are constants: rounding has no "
    "useful derivative. Compute with the rows of moe_jax.dequantize(dispatched), or of moe_jax.aclnn.dequantize(sent, "
    "...), whose gradient passes straight through the rounding; or put jax.lax.stop_gradient around codes and scales, "
    "also where they are results of a jax.custom_vjp of yours, which fills in zeros for results that nothing uses"
)
_send_with.defvjp(_send_forward, _send_backward, frozen=lambda sent: (sent.values, sent.scale), refusal=_CODES)


@functools.partial(custom_gradient, num_static=1)
def _carry(num_rows, x, smooth, handle):
    return jnp.zeros_like(x, shape=(num_rows, x.shape[1]))


def _carry_forward(num_rows, x, smooth, handle):
    return _carry(num_rows, x, smooth, handle), (x if smooth is not None else x[:0], smooth, None, None, None, handle)


def _carry_backward(num_rows, residuals, ct):
    how = _How(timed=False, quantised=True, ordered=True)
    d_x, d_smooth, *_ = _send_backward(how, residuals, Sent(ct, *[None] * 5))
    return d_x, d_smooth, None


_carry.defvjp(_carry_forward, _carry_backward)


@functools.partial(custom_gradient, num_static=1)
def _quantize_rows(recipe, rows, factors):
    q = recipe.quantize(rows, smooth=factors)
    return jnp.zeros_like(rows), q.values, q.scale


def _quantize_forward(recipe, rows, factors):
    return _quantize_rows(recipe, rows, factors), (rows, factors)


def _quantize_backward(recipe, residuals, cts):
    rows, factors = residuals
    ct = cts[0].astype(jnp.float32)  # of the carrier; d_rows = ct * factors, d_factors = ct * rows
    written = jnp.any(factors != 0, axis=1, keepdims=True)  # other rows may hold anything
    d_factors = jnp.where(written, ct * rows.astype(jnp.float32), 0.0)
    return (ct * factors).astype(rows.dtype), d_factors


_quantize_rows.defvjp(_quantize_forward, _quantize_backward, frozen=lambda out: out[1:], refusal=_CODES)


@functools.partial(custom_gradient, num_static=1)
def _send_as_is(timed, tokens, weights, tags, buffer, handle):
    plan = handle.plan
    message, parts = join(tokens)
    per_pair = _of_pairs(weights, tags, plan)
    pairs, held = (None, None) if all(part is None for part in per_pair) else join_some(per_pair)
    options = {"buffer": buffer, "timed": timed} if buffer is not None or timed else {}
    rows, pair_rows, arrival = ROUTES[type(handle.maps)].scatter(message, pairs, handle.maps, plan, **options)
    row_weights, row_tags = (None, None) if held is None else split_some(pair_rows, held)
    return tuple(split(rows, parts)), None if weights is None else row_weights[:, 0], row_tags, arrival


def _as_is_forward(timed, tokens, weights, tags, buffer, handle):
    return _send_as_is(timed, tokens, weights, tags, buffer, handle), (tokens, weights, handle)


def _as_is_backward(timed, residuals, cts):
    tokens, weights, handle = residuals
    plan = handle.plan
    floats = [jnp.issubdtype(part.dtype, jnp.floating) for part in tokens]
    columns = [ct.astype(jnp.float32) for ct, is_float in zip(cts[0], floats, strict=True) if is_float]
    columns = columns or [jnp.zeros_like(handle.group_sizes, shape=(len(cts[0][0]), 1), dtype=jnp.float32)]
    rows = jnp.concatenate(columns, axis=1)
    scalars = None if weights is None else cts[1][:, None]
    collected, d_weights = linear.collect(rows, scalars, handle.maps, plan, ordered=True, recipe=None)
    total = ROUTES[type(handle.maps)].total(collected, handle.maps)
    d_tokens, start = [], 0
    for part, is_float in zip(tokens, floats, strict=True):
        width = part.shape[1] if is_float else 0
        d_tokens.append(total[:, start : start + width].astype(part.dtype) if is_float else None)
        start += width
    return tuple(d_tokens), None if weights is None else d_weights[: plan.top_k, :, 0].T, None, None, None


_send_as_is.defvjp(_as_is_forward, _as_is_backward)


@jax.custom_jvp
def _attach(rows, carrier):
    """``rows``, which move as ``carrier`` does."""
    return rows


@_attach.defjvp
def _attach_jvp(primals, tangents):
    return primals[0], tangents[1]
