"""The two directions of the fused pair, chunk by chunk, and their adjoints, which are each other.

Every (rank, local expert) pair has two sides. The *expert side* is where the expert lives: rows stand by
(local expert, peer), and are multiplied there. The *token side* is the other end: rows stand by (peer, expert of that
peer). ``compute_then_send`` goes from the expert side to the token side, ``send_then_compute`` the other way, and the
adjoint of either is the other one with transposed weights.

A chunk is a group of peers: the ranks whose distance from here along the ring lies in one stretch. In every chunk each
rank sends to R / chunks ranks and receives from as many. Each has buffers of its own, so that in the compiled program
no product depends on the transfer of another chunk, nor a transfer on the product of a later one. All products, however
many chunks there are, have operands of the same extent: back ends choose tiles by extent, and equal tiles give equal
bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat, collectives
from moe_jax.derivatives import custom_gradient, take_rows
from moe_jax.kernels import grouped_outer
from moe_jax.kernels.table import call_kernel
from moe_jax.layout import clip_to_window, exclusive_cumsum, map_blocks

Array = jax.Array


class Extents(NamedTuple):
    """What is static about an exchange; hashable."""

    axes: tuple[str, ...]
    num_ranks: int
    backend: str
    transpose: bool  # whether the weights are stored transposed
    chunks: int
    token_rows: int  # rows of the token side's buffer
    expert_rows: int  # rows of the expert side's buffer
    wire_rows: int  # most rows of the expert side that one chunk moves


class Route(NamedTuple):
    """Which rows travel, from where to where; integers only. R ranks, e local experts."""

    group_sizes: Array  # [e] rows of each expert in the expert side's buffer
    expert_starts: Array  # [R, e] first row of each block in that buffer
    expert_sizes: Array  # [R, e] rows of each block that travel
    token_starts: Array  # [R] first row of each peer in the token side's buffer
    token_sizes: Array  # [R] rows of each peer that travel
    remote_token_starts: Array  # [R] where each peer's token side keeps its rows from or for this rank
    remote_wire_starts: Array  # [R] where each peer's wire buffer of the chunk does


def make_route(
    extents: Extents, expert_counts: Array, token_counts: Array, *, token_limit: bool, expert_limit: bool
) -> Route:
    """The route for counts [R, e] of both sides.

    ``token_limit`` and ``expert_limit`` say that more rows may come to that side than its buffer holds. Then those that
    come last, by (source rank, expert), stay at home.
    """
    token_sizes, expert_sizes = token_counts, expert_counts
    if token_limit:
        token_sizes = clip_to_window(token_counts.ravel(), 0, extents.token_rows)[1].reshape(token_counts.shape)
        expert_sizes = _keep_first(expert_counts, _swap(extents, _sum(token_sizes, axis=1)))
    if expert_limit:
        expert_sizes = clip_to_window(expert_counts.ravel(), 0, extents.expert_rows)[1].reshape(expert_counts.shape)
        token_sizes = _keep_first(token_counts, _swap(extents, _sum(expert_sizes, axis=1)))
    held = expert_sizes if expert_limit else expert_counts  # a result is compact, an input lies as it was given
    wire_starts = jnp.zeros_like(expert_sizes[:, 0])
    expert_side, _ = _chunk_of_peers(extents)
    for chunk in range(extents.chunks):
        mine = expert_side == chunk
        wire_starts = jnp.where(mine, _wire_starts(jnp.where(mine[:, None], expert_sizes, 0))[:, 0], wire_starts)
    token_starts = exclusive_cumsum(_sum(token_counts, axis=1))
    return Route(
        group_sizes=_sum(held, axis=0),
        expert_starts=_expert_major_starts(held),
        expert_sizes=expert_sizes,
        token_starts=token_starts,
        token_sizes=_sum(token_sizes, axis=1),
        remote_token_starts=_swap(extents, token_starts),
        remote_wire_starts=_swap(extents, wire_starts),
    )


# Not JAX's own transposes: the weights' gradient is one product over all rows, whatever the chunks.


@functools.partial(custom_gradient, num_static=1)
def compute_then_send(extents: Extents, rows: Array, weight: Array, route: Route, addend: Array | None) -> Array:
    """[expert_rows, H] times [e, H, N], plus the addend [expert_rows, N] -> [token_rows, N].

    Rows where nothing arrives are zero.
    """
    return _compute_then_send(extents, rows, weight, route, addend)


def _compute_forward(extents, rows, weight, route, addend):
    has_addend = None if addend is None else jnp.zeros(0)
    return compute_then_send(extents, rows, weight, route, addend), (rows, weight, route, has_addend)


def _compute_backward(extents, residuals, ct):
    rows, weight, route, has_addend = residuals
    # arrived = ct at the rows of the product         # [expert_rows, N]
    # d_rows = arrived @ weight^T                     # [expert_rows, H]
    # d_weight[l] = rows[l]^T @ arrived[l]            # [e, H, N]
    d_rows, arrived = send_then_compute(_transposed(extents), ct, weight, route)
    d_weight = _weight_gradient(extents, rows, arrived, weight, route)
    return d_rows, d_weight, None, None if has_addend is None else arrived


compute_then_send.defvjp(_compute_forward, _compute_backward)


@functools.partial(custom_gradient, num_static=1)
def send_then_compute(extents: Extents, rows: Array, weight: Array, route: Route) -> tuple[Array, Array]:
    """[token_rows, H] -> the product [expert_rows, N] and its left side [expert_rows, H]; zero past what arrives."""
    return _send_then_compute(extents, rows, weight, route)


def _send_forward(extents, rows, weight, route):
    product, permuted = send_then_compute(extents, rows, weight, route)
    return (product, permuted), (permuted, weight, route)


def _send_backward(extents, residuals, cts):
    permuted, weight, route = residuals
    ct_product, ct_permuted = cts
    # d_rows = (ct_product @ weight^T + ct_permuted) at the rows it came from
    # d_weight[l] = permuted[l]^T @ ct_product[l]    # [e, H, N]
    d_rows = compute_then_send(_transposed(extents), ct_product, weight, route, ct_permuted)
    return d_rows, _weight_gradient(extents, permuted, ct_product, weight, route), None


send_then_compute.defvjp(_send_forward, _send_backward)


# Products of another kind: rows in any form of which zeros mean nothing, weights in any pytree. No derivative.

Multiply = Callable[[Extents, Array, Any, Array], Array]  # (extents, rows, weight, group_sizes) -> [rows, N]


def compute_then_send_by(multiply: Multiply, extents: Extents, rows: Array, weight: Any, route: Route) -> Array:
    """As ``compute_then_send`` with the caller's product, in the dtype of which rows travel."""
    return _compute_then_send(extents, rows, weight, route, multiply=multiply)


def send_then_compute_by(
    multiply: Multiply, extents: Extents, rows: Array, weight: Any, route: Route
) -> tuple[Array, Array]:
    """As ``send_then_compute`` with the caller's product."""
    return _send_then_compute(extents, rows, weight, route, multiply=multiply)


def _transposed(extents: Extents) -> Extents:
    return extents._replace(transpose=not extents.transpose)


def _weight_gradient(extents, rows, ct, weight, route):
    left, right = (ct, rows) if extents.transpose else (rows, ct)
    return grouped_outer(left, right, route.group_sizes, backend=extents.backend, dtype=weight.dtype)


def _multiply(extents: Extents, rows: Array, weight: Array, group_sizes: Array) -> Array:
    return call_kernel("grouped_matmul", extents.backend, rows, weight, group_sizes, transpose_rhs=extents.transpose)


def _compute_then_send(
    extents: Extents,
    rows: Array,
    weight: Any,
    route: Route,
    addend: Array | None = None,
    multiply: Multiply = _multiply,
) -> Array:
    # Chunk i writes where the peers of chunk i have their rows, and nowhere else, so one result serves all in turn.
    result = None
    for chunk in _chunks(extents, route):
        with jax.named_scope("product"):
            product = multiply(extents, _to_product(extents, rows, chunk, route), weight, chunk.group_sizes)
            if addend is not None:
                product = product + _to_product(extents, addend, chunk, route)
        if result is None:
            result = _zeros((extents.token_rows, product.shape[1]), product)
        with jax.named_scope("transfer"):
            order = map_blocks(chunk.starts, chunk.product, chunk.sizes, extents.wire_rows)
            result = collectives.ragged_exchange(
                take_rows(product, order, absent=0),
                result,
                chunk.starts[:, 0],
                _sum(chunk.sizes, axis=1),
                route.remote_token_starts,
                chunk.token_sizes,
                axes=extents.axes,
            )
    assert result is not None, "an exchange has at least one chunk"
    return result


def _send_then_compute(
    extents: Extents, rows: Array, weight: Any, route: Route, multiply: Multiply = _multiply
) -> tuple[Array, Array]:
    chunks, wires, products = list(_chunks(extents, route)), [], []
    for chunk in chunks:
        with jax.named_scope("transfer"):
            wire = collectives.ragged_exchange(
                rows,
                _zeros((extents.wire_rows, rows.shape[1]), rows),
                route.token_starts,
                chunk.token_sizes,
                route.remote_wire_starts,
                _sum(chunk.sizes, axis=1),
                axes=extents.axes,
            )
        with jax.named_scope("product"):
            order = map_blocks(chunk.product, chunk.starts, chunk.sizes, extents.expert_rows)
            products.append(multiply(extents, take_rows(wire, order, absent=0), weight, chunk.group_sizes))
        wires.append(wire)
    with jax.named_scope("assemble"):
        # 1. Where each block lies once the buffers of all chunks stand end to end: chunk i begins i buffers later.
        #    Exactly one chunk has the peer of a block, so the others add nothing.
        on_wire = jnp.zeros_like(route.expert_starts)
        in_product = jnp.zeros_like(route.expert_starts)
        for i, c in enumerate(chunks):
            on_wire += jnp.where(c.peers, i * extents.wire_rows + c.starts, 0)
            in_product += jnp.where(c.peers, i * extents.expert_rows + c.product, 0)
        # 2. Both buffers of the expert side, block by block.
        permuted = _assemble(wires, on_wire, extents, route)
        return _assemble(products, in_product, extents, route), permuted


class _Chunk(NamedTuple):
    peers: Array  # [R, 1] bool, whose blocks of the expert side this chunk moves
    sizes: Array  # [R, e] of the expert side's blocks, zero for other peers
    starts: Array  # [R, e] in the wire buffer: by (peer, expert), end to end
    product: Array  # [R, e] in the product's operand: by (expert, peer)
    group_sizes: Array  # [e] rows of the product's operand
    token_sizes: Array  # [R] of the token side, zero for other peers


def _chunks(extents: Extents, route: Route):
    expert_side, token_side = _chunk_of_peers(extents)
    for index in range(extents.chunks):
        peers = (expert_side == index)[:, None]
        sizes = jnp.where(peers, route.expert_sizes, 0)
        alone = extents.chunks == 1  # then the expert side's buffer is the product's operand as it stands
        yield _Chunk(
            peers=peers,
            sizes=sizes,
            starts=_wire_starts(sizes),
            product=route.expert_starts if alone else _expert_major_starts(sizes),
            group_sizes=route.group_sizes if alone else _sum(sizes, axis=0),
            token_sizes=jnp.where(token_side == index, route.token_sizes, 0),
        )


def _chunk_of_peers(extents: Extents) -> tuple[Array, Array]:
    """[R] the chunk in which this rank's expert side exchanges with each peer, and the same for its token side."""
    me, ranks = lax.axis_index(extents.axes), jnp.arange(extents.num_ranks, dtype=jnp.int32)
    per_chunk = extents.num_ranks // extents.chunks
    return (ranks - me) % extents.num_ranks // per_chunk, (me - ranks) % extents.num_ranks // per_chunk


def _sum(sizes: Array, axis: int) -> Array:
    return jnp.sum(sizes, axis=axis, dtype=jnp.int32)  # without, it is i64 under jax_enable_x64


def _swap(extents: Extents, entries: Array) -> Array:
    return collectives.swap_with_peers(_compat.as_varying(entries, extents.axes), extents.axes)


def _keep_first(sizes: Array, totals: Array) -> Array:
    """The part of each block that lies in the first ``totals[p]`` rows of peer p's list. [R, e], [R] -> [R, e]."""
    return clip_to_window(sizes, 0, totals[:, None])[1]


def _wire_starts(sizes: Array) -> Array:
    return exclusive_cumsum(sizes.ravel()).reshape(sizes.shape)


def _expert_major_starts(sizes: Array) -> Array:
    return exclusive_cumsum(sizes.T.ravel()).reshape(sizes.T.shape).T


def _to_product(extents: Extents, rows: Array, chunk: _Chunk, route: Route) -> Array:
    """The chunk's rows of the expert side's buffer, packed as the product's operand."""
    if extents.chunks == 1:
        return rows
    index = map_blocks(chunk.product, route.expert_starts, chunk.sizes, extents.expert_rows)
    return take_rows(rows, index, absent=0)


def _assemble(parts: list[Array], starts: Array, extents: Extents, route: Route) -> Array:
    """The expert side's buffer, from blocks that start at ``starts`` [R, e] in the parts laid end to end."""
    index = map_blocks(route.expert_starts, starts, route.expert_sizes, extents.expert_rows)
    return take_rows(jnp.concatenate(parts), index, absent=0)


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    return _compat.as_varying(jnp.zeros(shape, like.dtype), _compat.varying_axes(like))
