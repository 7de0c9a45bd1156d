"""All-to-all of unequal slices: jax.lax.ragged_all_to_all's calling convention, on any back end, with right gradients.

TPU and GPU run the native instruction. Elsewhere two schedules of plain all_to_alls stand in for it, both in chunks
whose number follows the true counts and is the same on all ranks:

- *direct*: every chunk moves up to ``chunk`` rows from each rank to each. Each rank sends W times the largest slice.
- *relay*: each rank first deals its rows out evenly to all ranks, and these pass them on (Valiant's two-phase
  routing). Each rank sends the largest total that any rank sends, plus the largest that any rank receives, however
  uneven single slices are: at most twice what the busiest rank must move anyway, but for rounding (up to W + 1 chunks
  for small slices).

The cheaper one is chosen at run time.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from moe_jax import _compat
from moe_jax.collectives.bits import swap_bits
from moe_jax.derivatives import custom_gradient, take_rows
from moe_jax.errors import ShapeError, check_dtype, check_rank, check_shape
from moe_jax.kernels.table import find_transport
from moe_jax.layout import exclusive_cumsum, map_blocks

Array = jax.Array

NATIVE = ("cuda", "rocm", "tpu")  # the platforms that have jax.lax.ragged_all_to_all, as lowerings call them
_CHUNKS_PER_SLICE = 8  # chunks of a slice of an evenly spread operand, so that the last one pads it by 1/8 at most


@_compat.vary_as_operands()
def ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: str | tuple[str, ...],
) -> Array:
    """Sends a slice of ``operand`` to every rank, into a place of its ``output`` that the sender names.

    Rank i sends ``operand[input_offsets[j] : input_offsets[j] + send_sizes[j]]`` to rank j, where it becomes
    ``result[output_offsets[j] : output_offsets[j] + send_sizes[j]]``. Rows that nobody writes keep ``output``.
    Input slices may overlap (a row may go to several ranks). Slices that are not empty must not overlap in the result.
    Differentiable in ``operand`` (cotangents of overlapping slices add up) and ``output`` (zero where a row came in),
    in both modes and to any order.

    Args:
      operand: [N, ...] rows to send.
      output: [M, ...] in ``operand.dtype``; what unwritten rows hold.
      input_offsets: [W] i32, the first row of each slice in ``operand``.
      send_sizes: [W] i32, rows for each rank.
      output_offsets: [W] i32, the first row of this rank's slice in *the receiver's* result.
      recv_sizes: [W] i32, rows from each rank: what the sender has in its ``send_sizes`` for this rank.
      axis_name: one mesh axis, or several that are flattened in that order.

    Returns:
      [M, ...], varying over ``axis_name``.

    Raises:
      ShapeError, DtypeError: an argument does not have the shape or dtype above.
      MissingArgumentError, InvalidArgumentError: an array is None; ``axis_name`` is no name or tuple of names.
      MeshError: ``axis_name`` is not bound here.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> from jax.sharding import PartitionSpec as P
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> sizes = jnp.array([1, 2, 1, 2], jnp.int32)  # of 2 ranks: each sends 1 row to rank 0 and 2 to rank 1
    >>> starts, lands = jnp.array([0, 1, 0, 1], jnp.int32), jnp.array([0, 0, 1, 2], jnp.int32)
    >>> received = jnp.array([1, 1, 2, 2], jnp.int32)
    >>> send = lambda rows, *ints: moe.ragged_all_to_all(rows, jnp.zeros(4), *ints, axis_name="ep")
    >>> run = jax.jit(jax.shard_map(send, mesh=moe.make_mesh(ep=2), in_specs=P("ep"), out_specs=P("ep")))
    >>> run(jnp.arange(6.0), starts, sizes, lands, received)
    Array([0., 3., 0., 0., 1., 2., 4., 5.], dtype=float32)

    Source: the calling convention of jax.lax.ragged_all_to_all; L. G. Valiant, A Scheme for Fast Parallel
    Communication, SIAM J. Comput. 11 (1982), for the relay.
    """
    axes = _compat.bound_axes(axis_name)
    num_ranks = lax.axis_size(axes)
    check_dtype("operand", operand, (jnp.number, jnp.bool_))
    if operand.ndim < 1:
        raise ShapeError("operand is a scalar; expected [N, ...]")
    check_rank("output", output, operand.ndim, "[M, ...], the rank of operand")
    check_shape("output", output, (output.shape[0], *operand.shape[1:]), "[M, ...], rows as in operand")
    check_dtype("output", output, (operand.dtype,), "the dtype of operand")
    integers = {
        "input_offsets": input_offsets,
        "send_sizes": send_sizes,
        "output_offsets": output_offsets,
        "recv_sizes": recv_sizes,
    }
    for name, value in integers.items():
        check_shape(name, value, (num_ranks,), f"[W], one per rank of {'*'.join(axes)}")
        check_dtype(name, value, ("int32",), "cast it with .astype(jnp.int32)")
    return ragged_exchange(operand, output, *integers.values(), axes=axes)


def ragged_exchange(operand: Array, output: Array, *integers: Array, axes: tuple[str, ...]) -> Array:
    """``ragged_all_to_all`` of checked operands. The result varies over ``axes`` and as the operands do."""
    return _ragged(axes, *_compat.as_varying_alike((operand, output, *integers), axes))


@functools.partial(custom_gradient, num_static=1)
def _ragged(axes, operand, output, input_offsets, send_sizes, output_offsets, recv_sizes):
    move = find_transport("ragged", "auto") or portable_ragged_all_to_all
    return move(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, axis_name=axes)


def _ragged_forward(axes, operand, output, *integers):
    return _ragged(axes, operand, output, *integers), (_extent(operand), integers)


def _ragged_backward(axes, residuals, ct):
    extent, integers = residuals
    # d_operand: every row of ct goes back to where it came from; the slices that it was read from add up.
    d_operand = _returned(axes, len(extent), ct, *integers)
    # d_output = ct where no row came in    # [M, ...]
    received = _covered(lax.all_to_all(integers[2], axes, 0, 0, tiled=True), integers[3], ct.shape[0])
    d_output = jnp.where(jnp.expand_dims(received, range(1, ct.ndim)), jnp.zeros((), ct.dtype), ct)
    return d_operand, d_output, None, None, None, None


_ragged.defvjp(_ragged_forward, _ragged_backward)


@functools.partial(custom_gradient, num_static=2)
def _returned(axes, num_rows, ct, input_offsets, send_sizes, output_offsets, recv_sizes):
    """The adjoint of the exchange in its operand: rows [M, ...] of the result back to [num_rows, ...]."""
    arrival_offsets = lax.all_to_all(output_offsets, axes, 0, 0, tiled=True)  # where the rows that came here start
    return_offsets = lax.all_to_all(input_offsets, axes, 0, 0, tiled=True)  # where they were at their senders
    into = _compat.as_varying(jnp.zeros((num_rows, *ct.shape[1:]), ct.dtype), _compat.varying_axes(ct))
    return _accumulating(axes, ct, into, arrival_offsets, recv_sizes, return_offsets, send_sizes, input_offsets)


def _returned_forward(axes, num_rows, ct, *integers):
    return _returned(axes, num_rows, ct, *integers), (_extent(ct), integers)


def _returned_backward(axes, num_rows, residuals, ct):
    # d_ct = ct, every row sent the way of the exchange again    # [M, ...] from [num_rows, ...]
    extent, integers = residuals
    empty = jnp.zeros_like(ct, shape=(len(extent), *ct.shape[1:]))
    # Rows of ``ct`` that no slice reaches were constants: the exchange sends none of them.
    return _ragged(axes, ct, empty, *integers), None, None, None, None


_returned.defvjp(_returned_forward, _returned_backward)


def _extent(rows: Array) -> Array:
    """A residual that keeps the number of rows, and nothing else of them."""
    return jnp.zeros((len(rows), 0))


def _covered(starts: Array, sizes: Array, length: int) -> Array:
    """Which of ``length`` rows lie in some slice: +1 at starts, -1 at ends, summed; slices may overlap or be empty."""
    steps = jnp.zeros(length + 1, jnp.int32).at[starts].add(1, mode="drop").at[starts + sizes].add(-1, mode="drop")
    return jnp.cumsum(steps)[:length] > 0


def _accumulating(axes, operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, arrival_offsets):
    """The exchange into zeros, in which rows that several ranks write add up; where there are such, rank after rank."""
    starts, sizes = arrival_offsets, recv_sizes
    ends = starts + sizes
    touching = (starts[:, None] < ends) & (starts < ends[:, None]) & (sizes[:, None] > 0) & (sizes > 0)
    overlap = jnp.sum(touching) > jnp.sum(sizes > 0)
    num_ranks = sizes.shape[0]

    def send(peer_shift):
        """Sends only the slices from each rank i to rank i + shift, or all slices for a shift of -1."""
        me, ranks = lax.axis_index(axes), jnp.arange(num_ranks)
        out = jnp.where((peer_shift < 0) | (ranks == (me + peer_shift) % num_ranks), send_sizes, 0)
        came = jnp.where((peer_shift < 0) | (ranks == (me - peer_shift) % num_ranks), recv_sizes, 0)
        return portable_ragged_all_to_all(operand, output, input_offsets, out, output_offsets, came, axis_name=axes)

    return lax.cond(
        lax.pmax(overlap.astype(jnp.int32), axes) > 0,
        lambda: lax.fori_loop(0, num_ranks, lambda shift, total: total + send(shift), output),
        lambda: send(-1),
    )


def portable_ragged_all_to_all(
    operand: Array,
    output: Array,
    input_offsets: Array,
    send_sizes: Array,
    output_offsets: Array,
    recv_sizes: Array,
    *,
    axis_name: tuple[str, ...],
) -> Array:
    """The exchange without gradients: native on GPU and TPU, chunks of all_to_all elsewhere."""
    operands = (operand, output, input_offsets, send_sizes, output_offsets, recv_sizes)
    # A batch is a loop over its members: JAX's own rule for a batch fails where all members have the same sizes.
    native = sequential_vmap(functools.partial(lax.ragged_all_to_all, axis_name=axis_name))
    emulated = functools.partial(_emulated, axes=axis_name)
    return lax.platform_dependent(*operands, **dict.fromkeys(NATIVE, native), default=emulated)


def _emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axes):
    del recv_sizes  # they are among the gathered send_sizes of all ranks
    if not operand.size or not output.size:
        return output
    sizes = lax.all_gather(send_sizes, axes)
    arrival_offsets = lax.all_to_all(output_offsets, axes, 0, 0, tiled=True)
    num_ranks, num_rows = sizes.shape[0], operand.shape[0]
    chunk = max(1, math.ceil(num_rows / (num_ranks * _CHUNKS_PER_SLICE)))
    direct_rows, relay_rows = wire_rows(sizes, chunk)
    relayable = jnp.max(jnp.sum(sizes, axis=1)) <= num_rows  # false where slices of the operand overlap
    flat = operand.reshape(num_rows, -1), output.reshape(output.shape[0], -1)
    result = lax.cond(
        relayable & (relay_rows < direct_rows),
        lambda: _relayed(*flat, sizes, input_offsets, arrival_offsets, axes, chunk),
        lambda: chunked_all_to_all(*flat, sizes, input_offsets, arrival_offsets, axes, chunk=chunk),
    )
    return result.reshape(output.shape)


def wire_rows(sizes: Array, chunk: int) -> tuple[Array, Array]:
    """Rows that each rank puts on the wire, padding included: (direct, relay).

    Args:
      sizes: [W, W] rows from each rank to each.
      chunk: rows per pair of ranks and all_to_all.
    """
    num_ranks = sizes.shape[0]

    def padded(largest):
        return (largest + chunk - 1) // chunk * chunk * num_ranks

    first, second = _relay_sizes(sizes)
    return padded(jnp.max(sizes)), padded(jnp.max(first)) + padded(jnp.max(second))


def chunked_all_to_all(
    operand: Array,
    output: Array,
    sizes: Array,
    input_offsets: Array,
    arrival_offsets: Array,
    axes: tuple[str, ...],
    *,
    chunk: int,
    all_to_all: Callable | None = None,
) -> Array:
    """The direct schedule: slices of [N, F] go into [M, F], ``chunk`` rows of each slice in each all_to_all.

    Args:
      sizes: [W, W] rows from each rank to each, the same everywhere.
      input_offsets: [W] first row of the slice for each rank.
      arrival_offsets: [W] first row of the result for each source.
      all_to_all: (blocks [W, chunk, F], axes) -> the same; None: JAX's.
    """
    num_ranks, num_out = sizes.shape[0], output.shape[0]
    if not operand.shape[0] or not num_out:
        return output
    arriving = sizes[:, lax.axis_index(axes)]
    inner = jnp.arange(chunk, dtype=jnp.int32)

    def exchange(step, result):
        rows = input_offsets[:, None] + step * chunk + inner
        sent = take_rows(operand, rows.ravel()).reshape(num_ranks, chunk, -1)
        received = all_to_all(sent, axes) if all_to_all else swap_bits(axes, sent.dtype)(sent)

        def place(source, result):
            first = arrival_offsets[source] + step * chunk
            kept = lax.dynamic_slice_in_dim(result, first, chunk)
            mine = (step * chunk + inner < arriving[source])[:, None]
            return lax.dynamic_update_slice_in_dim(result, jnp.where(mine, received[source], kept), first, 0)

        return lax.fori_loop(0, num_ranks, place, result)

    margin = jnp.zeros((chunk, output.shape[1]), output.dtype)  # so that the last slice's chunk is never shifted back
    result = jnp.concatenate([output, _compat.as_varying(margin, _compat.varying_axes(output))])
    return lax.fori_loop(0, (jnp.max(sizes) + chunk - 1) // chunk, exchange, result)[:num_out]


def _dealt_before(index: Array, dealer: Array, num_ranks: int) -> Array:
    """How many of the numbers 0 .. index - 1 are dealt to ``dealer``, where number f goes to rank f mod W."""
    return (index - dealer + num_ranks - 1) // num_ranks


def _relay_blocks(sizes: Array) -> tuple[Array, Array]:
    """For every (dealer k, source i, destination j): the stretch [lo, hi) of source i's hand at k that goes on to j."""
    num_ranks = sizes.shape[0]
    start = exclusive_cumsum(sizes)
    dealer = jnp.arange(num_ranks, dtype=jnp.int32)[:, None, None]
    return _dealt_before(start, dealer, num_ranks), _dealt_before(start + sizes, dealer, num_ranks)


def _relay_sizes(sizes: Array) -> tuple[Array, Array]:
    """[W, W] rows from each rank to each in the first and in the second phase of the relay."""
    num_ranks = sizes.shape[0]
    dealer = jnp.arange(num_ranks, dtype=jnp.int32)
    first = _dealt_before(jnp.sum(sizes, axis=1)[:, None], dealer, num_ranks)  # [source, dealer]
    low, high = _relay_blocks(sizes)
    return first, jnp.sum(high - low, axis=1)  # [dealer, destination]


def _relayed(operand, output, sizes, input_offsets, arrival_offsets, axes, chunk):
    """The relay schedule, with the same result as ``chunked_all_to_all``."""
    num_ranks, num_out = sizes.shape[0], output.shape[0]
    hand = math.ceil(operand.shape[0] / num_ranks)  # the most rows that one rank deals to another
    me, ranks = lax.axis_index(axes), jnp.arange(num_ranks, dtype=jnp.int32)
    first, second = _relay_sizes(sizes)
    low, high = _relay_blocks(sizes)
    send_start = exclusive_cumsum(sizes[me])

    def empty(num_rows):
        rows = jnp.zeros((num_rows, operand.shape[1]), operand.dtype)
        return _compat.as_varying(rows, _compat.varying_axes(operand))

    # 1. Deal: my rows, numbered f by destination, lie at [f mod W, f div W]; hand k goes to rank k.
    row_of = map_blocks(send_start, input_offsets, sizes[me], num_ranks * hand)
    dealt = take_rows(operand, row_of.reshape(hand, num_ranks).T.ravel())
    held = chunked_all_to_all(dealt, empty(num_ranks * hand), first, ranks * hand, ranks * hand, axes, chunk=chunk)

    # 2. Pass on: by destination, then source; a block is a stretch of one source's hand.
    block_size = (high - low)[me].T  # [destination, source]
    target = ranks * hand + low[me].T
    block_start = exclusive_cumsum(second[me])[:, None] + exclusive_cumsum(block_size)
    order = map_blocks(block_start, target, block_size, num_ranks * hand)
    starts = exclusive_cumsum(second[:, me])
    passed = chunked_all_to_all(
        take_rows(held, order), empty(num_out), second, exclusive_cumsum(second[me]), starts, axes, chunk=chunk
    )

    # 3. Place: row p of source i has the number f = start + p. It came from dealer f mod W, which sent its rows by
    #    source.
    flat_start = ranks * (num_out + 1)  # an address that keeps source and position apart
    address = map_blocks(arrival_offsets, flat_start, sizes[:, me], num_out)
    source, position = address // (num_out + 1), address % (num_out + 1)
    source = jnp.maximum(source, 0)
    number = exclusive_cumsum(sizes)[source, me] + position
    dealer = number % num_ranks
    before = exclusive_cumsum(jnp.take(high - low, me, axis=2))[dealer, source]  # rows of earlier sources
    slot = starts[dealer] + before + number // num_ranks - low[dealer, source, me]
    return jnp.where((address >= 0)[:, None], take_rows(passed, slot), output)
