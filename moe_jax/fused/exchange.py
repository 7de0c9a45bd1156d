"""The two directions of the fused pair, chunk by chunk, and their adjoints: each is the adjoint of the other.

The rows that one rank exchanges with one expert of another rank form a *block*. A block has two sides. On the *expert
side*, which is the rank that has the expert, rows stand by (local expert, peer), and are multiplied. On the *token
side*, which is the other end, they stand by (peer, expert of that peer). ``compute_then_send`` takes rows from the
expert side to the token side, ``send_then_compute`` takes them the other way. The adjoint of either is the other one
with transposed weights.

The argument ``chunks`` cuts the exchange into groups of peers: the peers of a chunk are the ranks whose distances from
here along the ring lie in one stretch. So in every chunk each rank sends to R / chunks ranks and receives from as many.
Every chunk has buffers of its own. In the compiled program no product therefore depends on the transfer of another
chunk, nor a transfer on the product of a later chunk. All products have operands of the same extent, however many
chunks there are: back ends choose tiles by extent, and equal tiles give equal bits.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat, collectives
from moe_jax.derivatives import custom_gradient, take_rows
from moe_jax.kernels import grouped_outer
from moe_jax.kernels.table import call_kernel
from moe_jax.layout import clip_to_stretch, exclusive_cumsum, map_blocks

Array = jax.Array


class Extents(NamedTuple):
    """What is static about an exchange; hashable.

    Attributes:
      axes: the mesh axes along which ranks exchange.
      num_ranks: R, how many ranks that are.
      backend: the back end of the grouped product.
      transpose: whether the weights are stored transposed.
      chunks: how many groups the peers are cut into.
      token_rows: rows of the token side's buffer.
      expert_rows: rows of the expert side's buffer.
      wire_rows: the most rows of the expert side that any chunk moves; the extent of the buffers of a chunk.
    """

    axes: tuple[str, ...]
    num_ranks: int
    backend: str
    transpose: bool
    chunks: int
    token_rows: int
    expert_rows: int
    wire_rows: int


class Route(NamedTuple):
    """Which rows travel, from where to where; integers only. R ranks, e local experts.

    Attributes:
      group_sizes: [e] rows of each expert in the expert side's buffer.
      expert_starts: [R, e] the first row of each block in the expert side's buffer.
      expert_sizes: [R, e] how many rows of each block travel.
      token_starts: [R] the first row of each peer in the token side's buffer.
      token_sizes: [R] how many rows of each peer travel.
      remote_token_starts: [R] where the rows that peer p exchanges with this rank begin in the token side's buffer of
        p.
      remote_wire_starts: [R] where these rows begin in the wire buffer of p, in the chunk that moves them.
    """

    group_sizes: Array
    expert_starts: Array
    expert_sizes: Array
    token_starts: Array
    token_sizes: Array
    remote_token_starts: Array
    remote_wire_starts: Array


def make_route(
    extents: Extents, expert_counts: Array, token_counts: Array, *, token_limit: bool, expert_limit: bool
) -> Route:
    """The route for the counts of both sides, [R, e] each.

    ``token_limit`` and ``expert_limit`` say that more rows may come to that side than its buffer holds. Then the rows
    that come last, by (source rank, expert), are not sent.
    """
    # 1. How many rows of each block travel. Where a side has a limit, that side cuts its own list off at the end of its
    #    buffer, and tells every peer how many rows it takes from that peer; the peer keeps the first so many of its
    #    list.
    token_sizes, expert_sizes = token_counts, expert_counts
    if token_limit:
        token_sizes = clip_to_stretch(token_counts.ravel(), 0, extents.token_rows)[1].reshape(token_counts.shape)
        expert_sizes = _keep_first(expert_counts, _swap(extents, _sum(token_sizes, axis=1)))
    if expert_limit:
        expert_sizes = clip_to_stretch(expert_counts.ravel(), 0, extents.expert_rows)[1].reshape(expert_counts.shape)
        token_sizes = _keep_first(token_counts, _swap(extents, _sum(expert_sizes, axis=1)))
    # 2. The blocks in the expert side's buffer: a result has only rows that travel, an input lies as it was given.
    held = expert_sizes if expert_limit else expert_counts
    # 3. Where the rows of each peer begin in the wire buffer of its chunk: behind those of the chunk's earlier peers.
    wire_starts = jnp.zeros_like(expert_sizes[:, 0])
    expert_side, _ = _chunk_of_peers(extents)
    for chunk in range(extents.chunks):
        mine = expert_side == chunk
        wire_starts = jnp.where(mine, _wire_starts(jnp.where(mine[:, None], expert_sizes, 0))[:, 0], wire_starts)
    # 4. Both ends of a transfer must be known here, so every rank tells each peer where that peer's rows begin.
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


# These functions have gradients of their own, since JAX's would sum the gradient of the weights chunk by chunk. Here it
# is one product over all rows, whatever the number of chunks.


@functools.partial(custom_gradient, num_static=1)
def compute_then_send(extents: Extents, rows: Array, weight: Array, route: Route, addend: Array | None) -> Array:
    """Multiplies rows [expert_rows, H] by weights [e, H, N], adds the addend [expert_rows, N], sends: [token_rows, N].

    A row of the result at which nothing arrives is zero. Without an addend (None) nothing is added.
    """
    return _compute_then_send(extents, rows, weight, route, addend)


def _compute_forward(extents, rows, weight, route, addend):
    has_addend = None if addend is None else jnp.zeros(0)
    return compute_then_send(extents, rows, weight, route, addend), (rows, weight, route, has_addend)


def _compute_backward(extents, residuals, ct):
    rows, weight, route, has_addend = residuals
    # With S for the send, out = S(rows @ weight + addend). S^T is the send the other way, so
    # arrived = S^T(ct)                               # [expert_rows, N] from [token_rows, N]
    # d_rows = arrived @ weight^T                     # [expert_rows, H] = [expert_rows, N] @ [e, H, N]
    # d_weight[l] = rows[l]^T @ arrived[l]            # [e, H, N] = [expert_rows, H], [expert_rows, N], by expert
    # d_addend = arrived                              # [expert_rows, N]
    d_rows, arrived = send_then_compute(_transposed(extents), ct, weight, route)
    d_weight = _weight_gradient(extents, rows, arrived, weight, route)
    return d_rows, d_weight, None, None if has_addend is None else arrived


compute_then_send.defvjp(_compute_forward, _compute_backward)


@functools.partial(custom_gradient, num_static=1)
def send_then_compute(extents: Extents, rows: Array, weight: Array, route: Route) -> tuple[Array, Array]:
    """Sends the rows [token_rows, H] to their experts and multiplies them there.

    Returns the product [expert_rows, N] and its left operand, the rows as they arrived [expert_rows, H]. Both are zero
    in the rows past what arrives.
    """
    return _send_then_compute(extents, rows, weight, route)


def _send_forward(extents, rows, weight, route):
    product, permuted = send_then_compute(extents, rows, weight, route)
    return (product, permuted), (permuted, weight, route)


def _send_backward(extents, residuals, cts):
    permuted, weight, route = residuals
    ct_product, ct_permuted = cts
    # With S for the send, permuted = S(rows) and product = permuted @ weight, so
    # d_rows = S^T(ct_product @ weight^T + ct_permuted)    # [token_rows, H] from [expert_rows, N], [expert_rows, H]
    # d_weight[l] = permuted[l]^T @ ct_product[l]          # [e, H, N] = [expert_rows, H], [expert_rows, N], by expert
    d_rows = compute_then_send(_transposed(extents), ct_product, weight, route, ct_permuted)
    return d_rows, _weight_gradient(extents, permuted, ct_product, weight, route), None


send_then_compute.defvjp(_send_forward, _send_backward)


# The same with a product of the caller's, for which there is no derivative. Rows may have any form in which a row of
# zeros contributes nothing, and weights may be any pytree.

Multiply = Callable[[Extents, Array, Any, Array], Array]  # (extents, rows, weight, group_sizes) -> [rows, N]


def compute_then_send_by(multiply: Multiply, extents: Extents, rows: Array, weight: Any, route: Route) -> Array:
    """``compute_then_send`` with the caller's product, in whose dtype rows travel."""
    return _compute_then_send(extents, rows, weight, route, multiply=multiply)


def send_then_compute_by(
    multiply: Multiply, extents: Extents, rows: Array, weight: Any, route: Route
) -> tuple[Array, Array]:
    """``send_then_compute`` with the caller's product."""
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
    """The part of a route that belongs to one chunk. R ranks, e local experts.

    Attributes:
      peers: [R, 1] bool, the peers whose blocks this chunk moves on the expert side.
      sizes: [R, e] how many rows each block of the expert side has, zero for other peers.
      starts: [R, e] where each block begins in the wire buffer: by (peer, expert), end to end.
      product: [R, e] where each block begins in the operand of the product: by (expert, peer).
      group_sizes: [e] how many rows each expert has in the operand of the product.
      token_sizes: [R] how many rows the token side exchanges with each peer, zero for other peers.
    """

    peers: Array
    sizes: Array
    starts: Array
    product: Array
    group_sizes: Array
    token_sizes: Array


def _chunks(extents: Extents, route: Route) -> Iterator[_Chunk]:
    expert_side, token_side = _chunk_of_peers(extents)
    for index in range(extents.chunks):
        peers = (expert_side == index)[:, None]
        sizes = jnp.where(peers, route.expert_sizes, 0)
        alone = extents.chunks == 1  # then the expert side's buffer itself is the operand of the product
        yield _Chunk(
            peers=peers,
            sizes=sizes,
            starts=_wire_starts(sizes),
            product=route.expert_starts if alone else _expert_major_starts(sizes),
            group_sizes=route.group_sizes if alone else _sum(sizes, axis=0),
            token_sizes=jnp.where(token_side == index, route.token_sizes, 0),
        )


def _chunk_of_peers(extents: Extents) -> tuple[Array, Array]:
    """[R] the chunk in which this rank's expert side exchanges with each peer, and [R] that of its token side.

    Chunk c of an expert side has the peers that are c * R / chunks or more steps ahead of it along the ring. The token
    side counts the steps from the peer to itself, so that both ends of every transfer find the same chunk.
    """
    me, ranks = lax.axis_index(extents.axes), jnp.arange(extents.num_ranks, dtype=jnp.int32)
    per_chunk = extents.num_ranks // extents.chunks
    return (ranks - me) % extents.num_ranks // per_chunk, (me - ranks) % extents.num_ranks // per_chunk


def _sum(sizes: Array, axis: int) -> Array:
    return jnp.sum(sizes, axis=axis, dtype=jnp.int32)  # without the dtype it is i64 under jax_enable_x64


def _swap(extents: Extents, entries: Array) -> Array:
    """Entry j of every rank goes to rank j: [R, ...] entries for all peers -> [R, ...] the entries for this rank."""
    return collectives.swap_with_peers(_compat.as_varying(entries, extents.axes), extents.axes)


def _keep_first(sizes: Array, totals: Array) -> Array:
    """The part of each block that lies in the first ``totals[p]`` rows of peer p's list. [R, e], [R] -> [R, e]."""
    return clip_to_stretch(sizes, 0, totals[:, None])[1]


def _wire_starts(sizes: Array) -> Array:
    """[R, e] where each block begins if blocks stand by (peer, expert), end to end."""
    return exclusive_cumsum(sizes.ravel()).reshape(sizes.shape)


def _expert_major_starts(sizes: Array) -> Array:
    """[R, e] where each block begins if blocks stand by (expert, peer), end to end."""
    return exclusive_cumsum(sizes.T.ravel()).reshape(sizes.T.shape).T


def _to_product(extents: Extents, rows: Array, chunk: _Chunk, route: Route) -> Array:
    """The rows of the expert side's buffer that belong to a chunk, packed as the operand of its product."""
    if extents.chunks == 1:
        return rows
    index = map_blocks(chunk.product, route.expert_starts, chunk.sizes, extents.expert_rows)
    return take_rows(rows, index, absent=0)


def _assemble(parts: list[Array], starts: Array, extents: Extents, route: Route) -> Array:
    """The expert side's buffer, from blocks that begin at ``starts`` [R, e] in the ``parts`` laid end to end."""
    index = map_blocks(route.expert_starts, starts, route.expert_sizes, extents.expert_rows)
    return take_rows(jnp.concatenate(parts), index, absent=0)


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
    return _compat.as_varying(jnp.zeros(shape, like.dtype), _compat.varying_axes(like))
