"""How rows move: two linear maps, each the other's adjoint on the same handle, and both gathers around a collective.

``send_rows``: token rows [T, H] -> expert rows [M, H], a copy for every pair in the window.
``collect_rows``: expert rows [M, H] -> what came back: [T, C, H] for the exchanging transports; fp32 sums [T, H] for
"allgather", whose sums are made where the experts are. Windows add up; ``finish`` weights and sums what was collected.
C = ``plan.num_copies``: the K choices of a token, and one copy for each shared expert on ranks of its own.
"""

import jax
import jax.numpy as jnp

from moe_jax import _compat, comm
from moe_jax.special import special_term
from moe_jax.types import DispatchHandle, GatherMaps, SpecialTerms

Array = jax.Array


def send_rows(x: Array, handle: DispatchHandle) -> Array:
    """Token rows [T, H] -> expert rows [M, H] of the handle's window; differentiable in ``x``."""
    plan = handle.plan
    x = _compat.as_varying(x, plan.exchange_axes)
    if not plan.num_pairs:  # no device has a token: nothing moves, and no row is written
        return jnp.full_like(x, jnp.nan if plan.poison else 0, shape=(plan.num_rows(1), plan.hidden))
    return _send_rows(x, handle)


def collect_rows(rows: Array, combine_weights: Array, handle: DispatchHandle) -> Array:
    """Expert rows of one window -> what ``finish`` takes; windows add up. Differentiable in both arrays."""
    plan = handle.plan
    rows, combine_weights = _compat.as_varying((rows, combine_weights), plan.exchange_axes)
    if not plan.num_pairs:
        pairs = jnp.zeros_like(combine_weights, dtype=plan.dtype)[..., None] * jnp.ones(plan.hidden, plan.dtype)
        return jnp.sum(pairs, axis=1, dtype=jnp.float32) if plan.transport == "allgather" else pairs
    return _collect_rows(rows, combine_weights, handle)


def copy_weights(combine_weights: Array, plan) -> Array:
    """[T, K] -> [T, num_copies]: a copy to a shared expert on a rank of its own has weight 1."""
    num_shared = plan.num_copies - plan.top_k
    return jnp.pad(combine_weights, ((0, 0), (0, num_shared)), constant_values=1.0) if num_shared else combine_weights


def finish(collected: Array, combine_weights: Array, special: SpecialTerms | None, plan) -> Array:
    """The weighted sum over k, ascending, of rows and of what experts without rows add. -> [T, H] fp32."""
    with jax.named_scope("combine_sum"):
        gathered = plan.transport == "allgather"
        if gathered and special is None:
            return collected
        total = collected if gathered else jnp.zeros_like(collected[:, 0], jnp.float32)
        for k in range(plan.num_copies):
            terms = [] if gathered else [collected[:, k].astype(jnp.float32)]
            terms += [] if special is None or k >= plan.top_k else [special_term(special, k, plan)]
            total = total + combine_weights[:, k, None] * sum(terms)  # at most one of the terms is not zero
        return total


def _sum_over_pairs(pair_rows: Array) -> Array:
    """[T, C, H] -> [T, H] fp32, one k after the other."""
    total = jnp.zeros_like(pair_rows[:, 0], jnp.float32)
    for k in range(pair_rows.shape[1]):
        total = total + pair_rows[:, k].astype(jnp.float32)
    return total


# The two linear maps.


def _pick(rows: Array, index: Array, plan, *, absent: float | None = None) -> Array:
    """``rows[index]``. Where index is -1: ``absent`` if given, NaN under ``plan.poison``, anything otherwise."""
    picked = jnp.take(rows, index, axis=0, mode="clip")
    fill = jnp.nan if absent is None and plan.poison else absent
    if fill is None:
        return picked
    written = (index >= 0).reshape(*index.shape, *(1,) * (picked.ndim - index.ndim))
    return jnp.where(written, picked, jnp.asarray(fill, picked.dtype))


def _scatter(x: Array, handle: DispatchHandle) -> Array:
    """x [T, H] -> rows [M, H]: row(t, k) = x[t]."""
    plan, maps = handle.plan, handle.maps
    if isinstance(maps, GatherMaps):
        with jax.named_scope("exchange"):
            everyone = jax.lax.collapse(comm.gather_tokens(x, plan), 0, 2)
        with jax.named_scope("permute"):
            return _pick(everyone, _token_of(maps.row_pair, plan), plan)
    with jax.named_scope("pack"):
        packed = _pick(x, _token_of(maps.send_pair, plan), plan)
    return _exchange_packed(packed, handle)


def _exchange_packed(packed: Array, handle: DispatchHandle) -> Array:
    """Send slots [S, H] -> rows [M, H]."""
    plan, maps = handle.plan, handle.maps
    with jax.named_scope("exchange"):
        if maps.sizes.size:
            arrived = comm.exchange_compact(packed, maps.sizes, maps.slot_row.shape[0] // plan.tp_size, plan)
        else:
            arrived = comm.exchange_blocks(packed, plan)
        arrived = comm.gather_tp(arrived, plan)
    with jax.named_scope("permute"):
        return _pick(arrived, maps.row_slot, plan)


def _collect(rows: Array, weights: Array | None, handle: DispatchHandle) -> Array:
    """rows [M, H] -> [T, C, H], zero for pairs outside the window; "allgather": fp32 weighted sums [T, H]."""
    plan, maps = handle.plan, handle.maps
    if isinstance(maps, GatherMaps):
        with jax.named_scope("partial_sum"):
            everyone = None if weights is None else comm.gather_tokens(weights, plan)
            partial = _partial_sums(rows, everyone, maps, plan)
        with jax.named_scope("exchange"):
            return comm.reduce_scatter_tokens(partial, plan)
    with jax.named_scope("unpermute"):
        # Slots of the tp ranks are summed, so an unread one may be anything: it only meets its like.
        arrived = _pick(rows, maps.slot_row, plan)
    with jax.named_scope("exchange"):
        arrived = comm.reduce_scatter_tp(arrived, plan)
        if maps.sizes.size:
            packed = comm.exchange_compact(arrived, maps.sizes.T, maps.send_pair.shape[0], plan)
        else:
            packed = comm.exchange_blocks(arrived, plan)
    with jax.named_scope("unpack"):
        return _pick(packed, maps.pair_slot, plan, absent=0)


def _token_of(pair: Array, plan) -> Array:
    return jnp.where(pair < 0, -1, pair // plan.num_copies)


def _partial_sums(rows: Array, weights: Array | None, maps: GatherMaps, plan) -> Array:
    """This rank's share of every token's sum, fp32 [P * W, T, H], one k after the other."""
    total = jnp.zeros((*maps.pair_row.shape[:2], plan.hidden), jnp.float32)
    for k in range(plan.num_copies):
        here = maps.pair_row[..., k]
        term = _pick(rows, here, plan, absent=0).astype(jnp.float32)
        if weights is not None:  # of other pairs the weight may be anything, NaN included
            term = jnp.where(here >= 0, weights[..., k], 0.0)[..., None] * term
        total = total + term
    return total


def _gathered_adjoint(rows: Array, weights: Array, ct: Array, handle: DispatchHandle) -> tuple[Array, Array]:
    """Cotangents of rows and weights where the sums were made at the experts; ct [T, H] fp32."""
    plan, maps = handle.plan, handle.maps
    with jax.named_scope("exchange"):
        everyone = comm.gather_tokens(ct.astype(plan.dtype), plan)  # rounded as rows are when they travel
        all_weights = comm.gather_tokens(weights, plan).ravel()
    with jax.named_scope("permute"):
        scale = _pick(all_weights, maps.row_pair, plan, absent=0)
        d_rows = _pick(jax.lax.collapse(everyone, 0, 2), _token_of(maps.row_pair, plan), plan)
        d_rows = (scale[:, None] * d_rows.astype(jnp.float32)).astype(rows.dtype)
        dots = [
            jnp.sum(
                _pick(rows, maps.pair_row[..., k], plan, absent=0).astype(jnp.float32) * everyone.astype(jnp.float32),
                axis=-1,
            )
            for k in range(plan.num_copies)
        ]
    with jax.named_scope("exchange"):
        return d_rows, comm.reduce_scatter_tokens(jnp.stack(dots, axis=-1), plan)


# Their differentiable forms: each is the other's adjoint.


@jax.custom_vjp
def _send_rows(x, handle):
    return _scatter(x, handle)


def _send_forward(x, handle):
    return _scatter(x, handle), handle


def _send_backward(handle, ct):
    collected = _collect(ct, None, handle)
    total = collected if isinstance(handle.maps, GatherMaps) else _sum_over_pairs(collected)
    return total.astype(ct.dtype), None


_send_rows.defvjp(_send_forward, _send_backward)


@jax.custom_vjp
def _collect_rows(rows, weights, handle):
    return _collect(rows, weights, handle)


def _collect_forward(rows, weights, handle):
    gathered = isinstance(handle.maps, GatherMaps)
    return _collect(rows, weights, handle), (rows if gathered else rows[:0], weights, handle)


def _collect_backward(residuals, ct):
    rows, weights, handle = residuals
    if isinstance(handle.maps, GatherMaps):
        return *_gathered_adjoint(rows, weights, ct, handle), None
    with jax.named_scope("pack"):  # one row per pair: as dispatch, with pairs for tokens
        packed = _pick(jax.lax.collapse(ct, 0, 2), handle.maps.send_pair, handle.plan)
    return _exchange_packed(packed, handle), jnp.zeros_like(weights), None


_collect_rows.defvjp(_collect_forward, _collect_backward)
