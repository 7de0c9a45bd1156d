"""The route of "allgather": every rank sees every token; each token's sum is made where its experts are."""

import jax
import jax.numpy as jnp

from moe_jax import collectives
from moe_jax.derivatives import differentiated_as
from moe_jax.quant.message import join_some, split_some
from moe_jax.transports.picking import Moves, as_delivered, as_received, as_sent, by_token, pick, token_of
from moe_jax.types import GatherMaps

Array = jax.Array


def scatter(
    tokens: Array | None, pairs: Array | None, maps: GatherMaps, plan
) -> tuple[Array | None, Array | None, None]:
    """As ``exchange.scatter``: tokens [T, F] -> [M, F], pairs [C, T, G] -> [M, G]."""
    with jax.named_scope("exchange"):
        message, parts = join_some([tokens, None if pairs is None else by_token(pairs)])
        everyone = jax.lax.collapse(collectives.gather_tokens(message, plan), 0, 2)
        all_tokens, all_pairs = split_some(everyone, parts)
    with jax.named_scope("permute"):
        if tokens is not None:
            all_tokens = pick(all_tokens, token_of(maps.row_pair, plan), plan)
        if pairs is not None:
            all_pairs = pick(all_pairs.reshape(-1, pairs.shape[2]), maps.row_pair, plan)
        return all_tokens, all_pairs, None


def collect(
    rows: Array, weights: Array | None, maps: GatherMaps, plan, *, recipe=None, scalars: Array | None = None
) -> tuple[Array, Array | None]:
    """Rows [M, H] -> fp32 weighted sums [T, H], of rows as a ``recipe`` leaves them; scalars [M, G] -> [C, T, G]."""
    with jax.named_scope("partial_sum"):
        everyone = None if weights is None else collectives.gather_tokens(weights, plan)
        partial = _partial_sums(as_received(as_sent(rows, recipe), recipe, rows.shape[1]), everyone, maps, plan)
    with jax.named_scope("exchange"):
        total = collectives.reduce_scatter_tokens(partial, plan)
        if scalars is None:
            return total, None
        summed = collectives.reduce_scatter_tokens(pick(scalars, maps.pair_row, plan, absent=0), plan)
        return total, jnp.swapaxes(summed, 0, 1)


def together(collected: Array, more: Array, maps: GatherMaps) -> Array:
    """Sums of other windows and of this one."""
    del maps
    return collected + more


def total(collected: Array, maps: GatherMaps) -> Array:
    """As ``exchange.total``: the sums themselves."""
    del maps
    return collected


def collect_adjoint(rows: Array, weights: Array, ct: Array, plan, moves: Moves) -> tuple[Array, Array]:
    """Cotangents of rows and weights from that of the sums, ct [T, H] fp32.

    ``d_row(t, k) = w[t, k] * ct[t]`` and ``d_w[t, k] = <ct[t], row(t, k)>``.
    """
    maps, rows = moves.maps, as_delivered(rows, plan.combine_recipe)
    with jax.named_scope("exchange"):
        everyone = _everyone(ct.astype(plan.dtype), plan, moves.recipe)  # rounded as rows are when they travel
        flat = jax.lax.collapse(everyone, 0, 2)
        everyone = everyone.astype(jnp.float32)
        all_weights = collectives.gather_tokens(weights, plan).ravel()
    with jax.named_scope("permute"):
        scale = pick(all_weights, maps.row_pair, plan, absent=0)
        d_rows = pick(flat, token_of(maps.row_pair, plan), plan)
        d_rows = (scale[:, None] * d_rows.astype(jnp.float32)).astype(plan.dtype)
        dots = [
            jnp.sum(pick(rows, maps.pair_row[..., k], plan, absent=0).astype(jnp.float32) * everyone, axis=-1)
            for k in range(plan.num_copies)
        ]
    with jax.named_scope("exchange"):
        return d_rows, collectives.reduce_scatter_tokens(jnp.stack(dots, axis=-1), plan)


def _everyone(ct: Array, plan, recipe) -> Array:
    """[T, H] of each device -> [P * W, T, H] of all, as a recipe leaves them."""

    def encoded(ct):
        everyone = collectives.gather_tokens(as_sent(ct, recipe), plan)
        flat = as_received(jax.lax.collapse(everyone, 0, 2), recipe, plan.hidden)
        return flat.reshape(*everyone.shape[:2], plan.hidden)

    if recipe is None:
        return collectives.gather_tokens(ct, plan)
    return differentiated_as(lambda ct: collectives.gather_tokens(ct.astype(jnp.float32), plan), encoded, ct)


def _partial_sums(rows: Array, weights: Array | None, maps: GatherMaps, plan) -> Array:
    """This rank's share of every token's sum, fp32 [P * W, T, H], one k after the other."""
    total = jnp.zeros((*maps.pair_row.shape[:2], rows.shape[1]), jnp.float32)
    for k in range(plan.num_copies):
        here = maps.pair_row[..., k]
        term = pick(rows, here, plan, absent=0).astype(jnp.float32)
        if weights is not None:  # of other pairs the weight may be anything, NaN included
            term = jnp.where(here >= 0, weights[..., k], 0.0)[..., None] * term
        total = total + term
    return total
