"""Dispatch: tokens become rows at their experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moe_jax import _compat, collectives
from moe_jax.errors import (
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    UnsupportedError,
    check_array,
    check_dtype,
    check_mask,
    check_rank,
    check_shape,
    check_type,
)
from moe_jax.plan import Plan
from moe_jax.quant.message import Part
from moe_jax.recovery.window import Window, fresh_sources, make_window, received
from moe_jax.transports import (
    CodedRows,
    Stopwatch,
    add_waited,
    check_performance_info,
    dequantized,
    send_smoothed,
    transport_of,
)
from moe_jax.transports.manifest import count_pairs, open_round, read_table
from moe_jax.types import Dispatched

Array = jax.Array


@_compat.vary_as_operands()
def dispatch(
    x: Array,
    expert_ids: Array,
    plan: Plan,
    *,
    combine_weights: Array | None = None,
    smooth_scales: Array | None = None,
    token_mask: Array | None = None,
    rank_table: Array | None = None,
    window: Window | None = None,
    performance_info: Array | None = None,
) -> Dispatched:
    """Sends a copy of every token to each of its experts. Call it per shard, inside ``shard_map``.

    Rows come out by local expert, then source tp rank, then source ep rank, then token * K + k: the same rows, bit for
    bit, on every transport. Rows at or past ``sum(group_sizes)`` may hold anything and must not be read. With tp > 1
    all tp ranks of an ep rank get the rows of all of them. Repeated ids in a row are distinct pairs. With
    ``plan.num_shared_ranks``, the copy for shared expert s counts as k = K + s, and lies in slot 0 of its rank.

    With ``plan.quant``, rows travel as codes with their scales, in one message; ``dequantize`` makes rows of them.

    Args:
      x: [T, H] in ``plan.dtype``.
      expert_ids: [T, K] i32; -1 = this pair goes nowhere. Ids of zero, copy and constant experts (from E on) send no
        row; ids beyond them go nowhere and are counted in ``stats.num_invalid``.
      plan: the static plan. With overflow="dropless" M holds the worst skew, T * K * ep * tp rows: ep times a
        balanced load. (A round of ``moe_layer`` holds a balanced load and some slack, and further rounds the rest.)
        ``plan.workspace("dispatch")`` says how many bytes that are. With "drop" M holds ``plan.pair_capacity`` rows per
        pair of ranks, as in the layer.
      combine_weights: [T, K] f32 that travel with the rows and come out as ``row_weights``.
      smooth_scales: f32 factors of the rows before they are quantised: [1], [H], or [E, H], a row per expert; with
        shared experts on ranks of their own [Ns + E, H], those first. The same on all ranks. "int8_static" needs it.
      token_mask: [T] or [T, K] bool; false = the token, or the pair, goes nowhere.
      rank_table: [4 + 2 * ep] i32, who is left; see ``make_rank_table``. Then expert ids count the experts of the ranks
        that are left, and rows come by logical source rank. Removed ranks send and get nothing.
      window: what ``make_receive_window`` returned, or the last dispatch; donate it. Arrivals are written into it. A
        pair for a rank whose window is at another step is not sent, and counted in ``stats.num_stale``. Slots past
        what ``window.counts`` says may hold what older steps left.
      performance_info: [W] int, to which the microseconds are added that this rank waited for each source: the
        exchange then goes to one peer after the other, with the host's clock in between. Or [2, W], for both parts of
        it: until the source was ready, and while rows travelled. For "padded" and "ragged".

    Returns:
      Dispatched, varying over the plan's ep and tp axes: ``out_specs=P(("ep", "tp"))``. An axis of size 1 may be left
      out of ``in_specs`` and ``out_specs``: ``P("ep")`` for both without tensor parallelism. Differentiable in ``x``,
      ``combine_weights`` and ``smooth_scales``, in both modes and to any order; rounding counts as identity. The
      adjoint sends cotangents back (as ``plan.backward_quant`` says) and sums them in fp32. Codes and scales of
      quantised rows, and a window, are constants: forward mode says 0, and a cotangent that comes to float ones is
      refused (UnsupportedError).

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError: an argument does not fit the plan.
      UnsupportedError: the transport cannot serve it.
      MeshError: not called inside ``shard_map`` over the plan's axes.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> from jax.sharding import PartitionSpec as P
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> mesh = moe.make_mesh(ep=2)
    >>> plan = moe.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=4, top_k=2, dtype="float32")
    >>> count = lambda x, ids: moe.dispatch(x, ids, plan).group_sizes
    >>> run = jax.jit(jax.shard_map(count, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    >>> run(jnp.ones((8, 8)), jnp.zeros((8, 2), jnp.int32))  # 4 tokens on each rank; both choices of each are expert 0
    Array([16,  0,  0,  0], dtype=int32)

    Source: MoeDistributeDispatchV4, row order of its expandX.
    """
    _check_dispatch(x, expert_ids, plan, token_mask)
    _check_options(plan, combine_weights, smooth_scales, rank_table, window, performance_info)
    arrays = (x, expert_ids, combine_weights, smooth_scales, token_mask, rank_table, window, performance_info)
    arrays = _compat.as_varying_alike(arrays, plan.exchange_axes)
    if plan.num_pairs:
        return _dispatch(plan, *arrays)
    # No device has a token. XLA rejects a program that communicates and has none but empty inputs: say it outright.
    shapes = jax.eval_shape(functools.partial(_dispatch, plan), *arrays)
    zeros = _compat.as_varying(jax.tree.map(jnp.zeros_like, shapes), plan.exchange_axes)
    return dataclasses.replace(zeros, window=window, performance_info=performance_info)


def _dispatch(
    plan: Plan, x, expert_ids, combine_weights, smooth_scales, token_mask, rank_table, window, performance_info
):
    transport, fresh = transport_of(plan), None
    counter = transport if performance_info is None else Stopwatch(transport)
    # 1. Which pairs travel, and where their rows will lie.
    if window is not None:
        fresh = fresh_sources(window.step, plan.ep_axis)
    manifest = count_pairs(counter, expert_ids, plan, token_mask=token_mask, rank_table=rank_table, fresh=fresh)
    handle = open_round(counter, manifest, 0, plan.dispatch_capacity, plan)
    # 2. The rows.
    out = handle
    if window is not None:
        out = dataclasses.replace(handle, maps=transport.receiving(handle.maps, window.data))
    sent = send_smoothed(transport, x, out, smooth=smooth_scales, weights=combine_weights)
    x, scales, gradient = sent.rows if isinstance(sent.rows, CodedRows) else (sent.rows, None, None)
    # 3. What is kept from step to step.
    if window is not None:
        window = received(window, sent.note, handle, plan.dispatch_capacity)
    if performance_info is not None:
        performance_info = add_waited(performance_info, manifest.known.waited + sent.note)
    return Dispatched(
        x=x,
        scales=scales,
        group_sizes=handle.group_sizes,
        handle=dataclasses.replace(handle, maps=transport.plain(handle.maps)),
        stats=manifest.stats,
        row_weights=sent.weights,
        gradient=gradient,
        window=window,
        performance_info=performance_info,
    )


def dequantize(dispatched: Dispatched) -> Array:
    """The rows [M, H] of a dispatch in ``plan.dtype``: ``x`` itself, or what its codes and scales stand for.

    About the tokens, times their smoothing factors if any. Differentiable: the cotangent passes to the tokens (and to
    the factors) as if nothing had been rounded.

    Raises:
      InvalidArgumentError: not what ``dispatch`` returned.
    """
    check_type("dispatched", dispatched, Dispatched, "pass what dispatch returned")
    if dispatched.scales is None or dispatched.gradient is None:  # both are there where the wire is quantised
        return dispatched.x
    return dequantized(CodedRows(dispatched.x, dispatched.scales, dispatched.gradient), dispatched.handle.plan)


def make_receive_window(plan: Plan, *, with_weights: bool = False) -> Window:
    """An empty window for ``dispatch(..., window=)`` on one device; ``with_weights`` if it is given combine_weights.

    >>> import moe_jax as moe
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> plan = moe.make_plan(moe.make_mesh(ep=2), tokens_per_rank=4, hidden=8, num_experts=4, top_k=2)
    >>> moe.make_receive_window(plan).data.shape  # 2 choices of 4 tokens from each of 2 ranks, 8 numbers each
    (16, 8)
    """
    check_type("plan", plan, Plan, "build one with moe_jax.make_plan(...)")
    part = _message_part(plan, with_weights)
    return make_window(plan.ep_size * plan.dispatch_capacity, part.width, part.dtype, plan.ep_size)


def _message_part(plan: Plan, with_weights: bool) -> Part:
    """What one row of the exchange holds."""
    recipe = plan.dispatch_recipe
    rows = Part(plan.hidden, plan.dtype) if recipe is None else Part(recipe.row_bytes(plan.hidden), "uint8")
    return Part(rows.num_bytes + 4, "uint8") if with_weights else rows


def _check_dispatch(x, expert_ids, plan: Plan, token_mask):
    check_type("plan", plan, Plan, "build one with moe_jax.make_plan(...)")
    collectives.check_axes(plan)
    check_rank("x", x, 2, "[T, H]")
    remedy = "T and H are fixed by the plan; mask what is not there with token_mask, or make another plan"
    check_shape("x", x, (plan.tokens_per_rank, plan.hidden), "[T, H]", remedy)
    check_dtype("x", x, (plan.dtype,), "the plan's dtype: cast x, or make a plan with dtype=...")
    check_shape("expert_ids", expert_ids, (plan.tokens_per_rank, plan.top_k), "[T, K]")
    check_dtype("expert_ids", expert_ids, ("int32",), "cast it with .astype(jnp.int32)")
    if token_mask is not None:
        check_array("token_mask", token_mask)
        pairs = (plan.tokens_per_rank, plan.top_k)
        check_mask("token_mask", token_mask, pairs if token_mask.ndim == 2 else pairs[:1], "[T], or [T, K] for pairs")


def _check_options(plan: Plan, combine_weights, smooth_scales, rank_table, window, performance_info):
    if combine_weights is not None:
        check_shape("combine_weights", combine_weights, (plan.tokens_per_rank, plan.top_k), "[T, K]")
        check_dtype("combine_weights", combine_weights, ("float32",), "cast it with .astype(jnp.float32)")
    _check_smooth(plan, smooth_scales)
    if rank_table is not None:
        read_table(rank_table, plan)  # raises
    for name, value in (("window", window), ("performance_info", performance_info)):
        if value is not None and not transport_of(plan).pairwise:
            raise UnsupportedError(f"{name}: transport={plan.transport!r} has no exchange between pairs of ranks")
    if performance_info is not None:
        check_performance_info(performance_info, plan)
    if window is None:
        return
    check_type("window", window, Window, "make one with make_receive_window(plan)")
    if performance_info is not None:
        raise UnsupportedError("window and performance_info: a timed exchange writes no window; give one of them")
    part = _message_part(plan, combine_weights is not None)
    layout_text = "[W * capacity, message]: make_receive_window(plan, with_weights=...) has them"
    check_shape("window.data", window.data, (plan.ep_size * plan.dispatch_capacity, part.width), layout_text)
    check_dtype("window.data", window.data, (part.dtype,), layout_text)


def _check_smooth(plan: Plan, smooth_scales):
    recipe = plan.dispatch_recipe
    if smooth_scales is None:
        if recipe is not None and recipe.needs_smooth:
            raise MissingArgumentError(f"smooth_scales is missing: quant={plan.quant!r} multiplies by it")
        return
    if recipe is None or not recipe.takes_smooth:
        raise InvalidArgumentError(f"smooth_scales was given, but quant={plan.quant!r} takes none; leave it out")
    check_array("smooth_scales", smooth_scales)
    rows = plan.pairs_per_token - plan.top_k + plan.num_experts
    legal = [(1,), (plan.hidden,), (rows, plan.hidden)]
    if smooth_scales.shape not in legal:
        raise ShapeError(
            f"smooth_scales has shape {smooth_scales.shape}; expected one of {legal}: a number, a row, or a row for "
            "each expert, those of shared experts on ranks of their own first"
        )
    check_dtype("smooth_scales", smooth_scales, ("float32",), "cast it with .astype(jnp.float32)")
