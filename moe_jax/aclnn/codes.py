"""Makes rows that have a gradient of the codes of a quantised dispatch. CANN has no such operator."""

from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.aclnn import world as worlds
from moe_jax.aclnn.calls import operator_of, signature_checked
from moe_jax.aclnn.dispatch import moe_distribute_dispatch_v4
from moe_jax.aclnn.results import DispatchOutput, TimedDispatchOutput, WindowDispatchOutput
from moe_jax.errors import InvalidArgumentError, check_shape
from moe_jax.transports import CodedRows, carry_rows, dequantized, transport_of
from moe_jax.transports.manifest import open_round

Array = jax.Array


@signature_checked
@_compat.vary_as_operands("sent")
def dequantize(
    sent: DispatchOutput | TimedDispatchOutput | WindowDispatchOutput,
    x: Array,
    expert_ids: Array,
    scales: Array | None = None,
    x_active_mask: Array | None = None,
    elastic_info: Array | None = None,
    *,
    group_ep: Any,
    ep_world_size: int,
    moe_expert_num: int,
    quant_mode: int,
    group_tp: Any = "",
    tp_world_size: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    comm_alg: str | None = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: Any = None,
) -> Array:
    """The rows that ``expand_x`` and ``dynamic_scales`` of a quantised dispatch stand for. Call it per shard.

    These rows equal the tokens up to rounding, times their smoothing factors if there are any, and are zero where no
    row was written. The rows come from ``sent``; the gradient goes to ``x`` and ``scales`` as if nothing had been
    rounded, as it does from ``moe_jax.dequantize``.

    Args:
      sent: what ``moe_distribute_dispatch_v4`` returned.
      x, expert_ids, ..., y_dtype: what it was given; ``quant_mode`` is 1 to 5. What changes no row (expert_scales,
        performance_info, window, expert_token_nums_type, expert_shard_type) is not asked for.

    Returns:
      [P * A, H] in the dtype of ``x``. Differentiable in ``x`` and ``scales``.

    Raises:
      InvalidArgumentError: ``sent`` is no result of a dispatch, or quant_mode=0, with which nothing is quantised. As
      ``moe_distribute_dispatch_v4`` otherwise.
    """
    given = dict(locals())
    del given["sent"]
    if not isinstance(sent, DispatchOutput | TimedDispatchOutput | WindowDispatchOutput):
        raise InvalidArgumentError(f"sent is a {type(sent).__name__}; pass what moe_distribute_dispatch_v4 returned")
    operator_of(moe_distribute_dispatch_v4).call(given)
    if quant_mode == 0:
        raise InvalidArgumentError("quant_mode=0 quantises nothing: compute with sent.expand_x, which has a gradient")
    recipe = worlds.dispatch_recipe(quant_mode, y_dtype)
    world = worlds.make_world(given, x, dtype=str(x.dtype), quant=recipe)
    plan, recipe = world.plan, world.plan.dispatch_recipe
    assert recipe is not None, "quant_mode is 1 to 5 here"
    check_shape(
        "sent.expand_x", sent.expand_x, (world.num_rows, *recipe.values_shape(plan.hidden)), "that of this dispatch"
    )
    arrays = (x, expert_ids, scales, x_active_mask, elastic_info)
    x, expert_ids, scales, mask, table = _compat.as_varying(arrays, plan.exchange_axes)
    if not plan.num_pairs:
        return jnp.zeros_like(x, shape=(world.num_rows, plan.hidden))
    recv_counts = worlds.Ledger(plan, table).counts(sent.ep_recv_counts.reshape(plan.tp_size, -1))
    manifest = worlds.make_manifest(world, expert_ids, mask, table, recv_counts=recv_counts)
    handle = open_round(transport_of(plan), manifest, 0, plan.max_pair_rows, plan, num_rows=world.num_rows)
    gradient = carry_rows(transport_of(plan), x, handle, world.num_rows, smooth=scales)
    scale = sent.dynamic_scales
    if scale is None:  # a static scale does not travel with the rows
        scale = jnp.zeros_like(gradient, shape=(world.num_rows, 0), dtype=recipe.scale_dtype)
    scale = scale.reshape(world.num_rows, -1)
    return dequantized(CodedRows(sent.expand_x, scale, gradient), plan)
