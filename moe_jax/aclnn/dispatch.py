"""MoeDistributeDispatch, under CANN's names."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import _compat, collectives
from moe_jax.aclnn import workspace
from moe_jax.aclnn import world as worlds
from moe_jax.aclnn.calls import operator
from moe_jax.aclnn.results import DispatchOutput, TimedDispatchOutput, WindowDispatchOutput
from moe_jax.aclnn.rules_exchange import DISPATCH
from moe_jax.collectives.rendezvous import keep_where
from moe_jax.derivatives import differentiated_as
from moe_jax.kernels import FLOAT_DTYPES
from moe_jax.recovery.window import Window, check_window, fresh_sources, received
from moe_jax.transports import CodedRows, Sent, Stopwatch, add_waited, send_as_is, send_smoothed, transport_of
from moe_jax.transports.manifest import open_round
from moe_jax.types import DispatchHandle

Array = jax.Array


@operator(DISPATCH, workspace.dispatch)
@_compat.vary_as_operands()
def moe_distribute_dispatch_v4(
    x: Array,
    expert_ids: Array,
    scales: Array | None = None,
    x_active_mask: Array | None = None,
    expert_scales: Array | None = None,
    elastic_info: Array | None = None,
    performance_info: Array | None = None,
    *,
    group_ep: Any,
    ep_world_size: int,
    moe_expert_num: int,
    group_tp: Any = "",
    tp_world_size: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str | None = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: Any = None,
    window: Window | None = None,
) -> DispatchOutput | TimedDispatchOutput | WindowDispatchOutput:
    """Sends a copy of each active token to each of its experts. Call it per shard, inside ``shard_map``.

    Parameters are CANN's, and ``y_dtype`` is the dtype of quantised rows (None: the mode's own). A group name is a mesh
    axis name, or a tuple of them (for "hierarchy": the axis of nodes, then that of the ranks of a node), and the index
    along that axis is the rank. ``scales`` are the same on all ranks.

    Nothing is changed in place. Given ``performance_info``, the result has its new value as a further field. The same
    holds for ``window``, the receive window that CANN keeps in the communicator: pass what ``make_receive_window``, or
    the last dispatch or buffer reset returned, and donate it. Pairs for a rank whose window is at another step are not
    sent; combine makes NaN of what waits for them, unless ``elastic_info`` has removed one of the two ranks.

    Returns:
      DispatchOutput. expand_scales are differentiable, and so is expand_x where it is not quantised. Where it is, the
      rows of ``moe_jax.aclnn.dequantize`` are differentiable instead.

    Raises:
      As ``moe_distribute_dispatch_v4_get_workspace_size`` with product=None; MeshError: a group is not bound here.

    Source: aclnnMoeDistributeDispatchV4.
    """
    given = locals()
    recipe = worlds.dispatch_recipe(quant_mode, y_dtype)
    # Rows that are quantised already are treated as plain rows, and pass through unchanged.
    ready = str(x.dtype) not in FLOAT_DTYPES or (scales is not None and quant_mode == 0)
    world = worlds.make_world(given, x, dtype="float32" if ready else str(x.dtype), quant=recipe)
    plan = world.plan
    if window is not None:
        check_window(window, plan.ep_size)
    arrays = (x, expert_ids, scales, x_active_mask, expert_scales, elastic_info, window, performance_info)
    arrays = _compat.as_varying_alike(arrays, plan.exchange_axes)
    run = functools.partial(_dispatch, world, ready, expert_token_nums_type)
    if plan.num_pairs:
        return run(*arrays)
    # No device has a token. XLA rejects a program that communicates and has none but empty inputs: say it outright.
    zeros = _compat.as_varying(jax.tree.map(jnp.zeros_like, jax.eval_shape(run, *arrays)), plan.exchange_axes)
    kept = {"window": window, "performance_info": performance_info}
    return zeros._replace(**{name: value for name, value in kept.items() if name in zeros._fields})


def _dispatch(
    world: worlds.World,
    ready: bool,
    nums_type: int,
    x: Array,
    expert_ids: Array,
    scales: Array | None,
    mask: Array | None,
    weights: Array | None,
    table: Array | None,
    window: Window | None,
    performance_info: Array | None,
) -> DispatchOutput | TimedDispatchOutput | WindowDispatchOutput:
    """Dispatch of checked arrays. ``ready``: rows are quantised already, or travel with scales of their own."""
    plan, timed = world.plan, performance_info is not None
    # 1. Who sends how many rows to whom, and the maps of a single round in which all of them travel.
    fresh = None if window is None else fresh_sources(window.step, plan.ep_axis)
    manifest = worlds.make_manifest(world, expert_ids, mask, table, fresh=fresh, timed=timed)
    transport = transport_of(plan)
    opener = Stopwatch(transport) if timed else transport
    handle = open_round(opener, manifest, 0, plan.max_pair_rows, plan, num_rows=world.num_rows)
    # 2. CANN's counts, and the triple that travels with each row.
    ledger = worlds.Ledger(plan, table)
    tags = _tags(handle, ledger, table)
    # 3. The rows, into the window where there is one.
    out = handle
    if window is not None:
        out = dataclasses.replace(handle, maps=transport.receiving(handle.maps, window.data))
    if ready:
        tokens = (x,) if scales is None else (x, scales.reshape(scales.shape[0], -1))
        sent = send_as_is(transport, tokens, out, weights=weights, tags=tags)
        rows, row_scales = sent.rows[0], None if scales is None else sent.rows[1].reshape(-1, *scales.shape[1:])
    else:
        sent = send_smoothed(transport, x, out, smooth=scales, weights=weights, tags=tags)
        rows, row_scales, _ = sent.rows if isinstance(sent.rows, CodedRows) else (sent.rows, None, None)
    # 4. What arrived, as CANN lays it out.
    result = _written(rows, row_scales, sent, handle, world, nums_type, ledger)
    if window is not None:
        window = received(window, sent.note, handle, plan.max_pair_rows)
        return WindowDispatchOutput(*result, window=window, num_stale=manifest.stats.num_stale)
    if performance_info is None:
        return result
    waited = manifest.known.waited + sent.note
    return TimedDispatchOutput(*result, performance_info=add_waited(performance_info, waited))


def _tags(handle: DispatchHandle, ledger: worlds.Ledger, table: Array | None) -> Array:
    """The logical source rank, the token and the k of every pair, [B, K + shared experts, 3] i32."""
    plan = handle.plan
    me = collectives.ep_rank(plan)
    logical = me if table is None else jnp.argsort(ledger.order)[me].astype(jnp.int32)
    shape = (plan.tokens_per_rank, plan.pairs_per_token)
    rank = jnp.broadcast_to(logical, shape).astype(jnp.int32)
    token, copy = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return jnp.stack(_compat.as_varying((rank, token, copy), plan.exchange_axes), axis=-1)


def _written(
    arrived: Array,
    scale: Array | None,
    sent: Sent,
    handle: DispatchHandle,
    world: worlds.World,
    nums_type: int,
    ledger: worlds.Ledger,
) -> DispatchOutput:
    """CANN's outputs, with zeros where nothing arrived."""
    assert sent.tags is not None, "rows of this facade travel with their triples"
    plan, capacity = world.plan, world.capacity
    row = jnp.arange(world.num_rows)
    num_rows = jnp.sum(handle.group_sizes)
    lanes = jnp.sum(handle.recv_counts, axis=(1, 2), dtype=jnp.int32)  # by tp rank
    own = row[:capacity] < lanes[collectives.tp_rank(plan)]

    def rows(array: Array, written: Array) -> Array:
        written, zero = written.reshape(-1, *(1,) * (array.ndim - 1)), _zero(array.dtype)

        def select(array: Array) -> Array:
            return jnp.where(written, array, zero)

        if array.dtype.name.startswith("float8"):  # codes and exponents must keep every bit, also those of NaN
            return differentiated_as(select, lambda array: keep_where(written, array, zero), array)
        return select(array)

    triples = rows(sent.tags[:capacity], own)
    assist = jnp.pad(triples.ravel(), (0, capacity * 125))
    nums = handle.group_sizes
    if nums_type == 0:
        nums = jnp.where(jnp.arange(nums.shape[0]) < ledger.num_slots, jnp.cumsum(nums), 0)
    weights = sent.weights
    if scale is not None and scale.ndim == 2 and scale.shape[1] == 0:
        scale = None  # a static scale does not travel
    if scale is not None and plan.quant in ("int8", "fp8_e4m3", "fp8_e5m2"):
        scale = scale[:, 0]
    if weights is not None:
        weights = rows(weights[:capacity], own & (triples[:, 2] < plan.top_k))
    return DispatchOutput(
        expand_x=rows(arrived, row < num_rows),
        dynamic_scales=None if scale is None else rows(scale, row < num_rows),
        assist_info_for_combine=assist,
        expert_token_nums=nums.astype(jax.dtypes.canonicalize_dtype("int64")),
        ep_recv_counts=ledger.running_sums(handle.recv_counts).ravel(),
        tp_recv_counts=lanes if plan.tp_size > 1 else None,
        expand_scales=weights,
    )


def _zero(dtype: np.dtype) -> Array:
    """Zero in a dtype. E8M0, the dtype of exponents, has no zero, and gets the byte 0."""
    if dtype.name == "float8_e8m0fnu":
        return jax.lax.bitcast_convert_type(jnp.zeros((), jnp.uint8), dtype)
    return jnp.zeros((), dtype)
