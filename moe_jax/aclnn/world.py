"""From CANN's parameters to the library's: plans, masks, windows and the counts that are passed on."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from moe_jax import _compat, collectives
from moe_jax.layout import searchsorted
from moe_jax.plan import Plan, make_plan
from moe_jax.transports import Stopwatch, transport_of
from moe_jax.transports.manifest import Manifest, count_pairs, read_table, source_order

Array = jax.Array

_FP8 = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
# CANN's algorithms differ in how rows move, and so do the transports; those of the fullmesh kind give the same bits.
_TRANSPORTS = {
    "": "padded",
    "fullmesh": "padded",
    "fullmesh_v1": "padded",
    "fullmesh_v2": "ragged",
    "hierarchy": "hierarchy",
}
_COMBINE_RECIPES = {0: "none", 2: "int8_group8", 3: "mx_e5m2", 4: "mx_e4m3"}


def dispatch_recipe(quant_mode: int, y_dtype: Any) -> str:
    """The name of the recipe of a quant_mode and an output dtype; None = the mode's own."""
    if quant_mode == 0:
        return "none"
    if quant_mode == 1:
        return "int8_static"
    word = str(jnp.dtype(y_dtype).name) if y_dtype is not None else "int8" if quant_mode == 2 else "float8_e4m3fn"
    if word == "int8":
        return "int8"
    kind = _FP8.get(word, "e2m1")
    return {2: f"fp8_{kind}", 3: f"fp8_{kind}_group128", 4: f"mx_{kind}", 5: f"mx_clip_{kind}"}[quant_mode]


@dataclasses.dataclass(frozen=True)
class World:
    """What is decided about one call before it runs.

    Attributes:
      plan: of the exchange.
      capacity: A, enough rows for any rank. With two tp ranks as many rows of the peer follow.
    """

    plan: Plan
    capacity: int

    @property
    def num_rows(self) -> int:
        """Rows of expand_x."""
        return self.capacity * self.plan.tp_size


def make_world(given: Mapping[str, Any], rows: Array, *, dtype: str, quant: str = "none") -> World:
    """The plan of one call, and its capacity. Group names are mesh axes that are bound, whose index is the rank.

    Args:
      given: the arguments of the operator by name. Dispatch and combine name the attributes of their exchange alike,
        and those are read here; ``comm_quant_mode`` is combine's alone.
      rows: [.., H] that travel, as ``dtype``.
      quant: the recipe of dispatched rows.

    Raises:
      MeshError: a group is not bound here.
    """
    (tokens, top_k), hidden = given["expert_ids"].shape, rows.shape[1]
    ep_size, tp_size = given["ep_world_size"], max(given["tp_world_size"], 1)
    ep_axes = _compat.bound_axes(given["group_ep"], "group_ep")
    tp_axes = _compat.bound_axes(given["group_tp"], "group_tp") if tp_size > 1 else ()
    plan = make_plan(
        AbstractMesh((ep_size, tp_size), ("ep", "tp")),
        tokens_per_rank=tokens,
        hidden=hidden,
        num_experts=given["moe_expert_num"],
        top_k=top_k,
        dtype=dtype,
        num_shared_experts=given["shared_expert_num"] if given["shared_expert_rank_num"] else 0,
        num_shared_ranks=given["shared_expert_rank_num"],
        num_zero_experts=given["zero_expert_num"],
        num_copy_experts=given["copy_expert_num"],
        num_const_experts=given["const_expert_num"],
        quant=quant,
        combine_quant=_COMBINE_RECIPES[given.get("comm_quant_mode", 0)],
        transport=_TRANSPORTS[given["comm_alg"] or ""],
    )
    tp_axis = tp_axes[0] if tp_axes else None
    plan = dataclasses.replace(plan, ep_axis=ep_axes, tp_axis=tp_axis, token_axes=(*ep_axes, *tp_axes))
    most = given["global_bs"] // ep_size if given["global_bs"] else tokens
    return World(plan, most * ep_size * min(plan.num_local_experts, top_k))


def as_pair_mask(x_active_mask: Array | None, expert_ids: Array) -> Array | None:
    """The mask that ``dispatch`` takes. A mask [B] with n trues, wherever they are, makes tokens 0 to n - 1 active."""
    if x_active_mask is None or x_active_mask.ndim == 2:
        return x_active_mask
    return jnp.arange(expert_ids.shape[0]) < jnp.sum(x_active_mask)


def active_tokens(x_active_mask: Array | None, expert_ids: Array, plan: Plan, elastic_info: Array | None) -> Array:
    """[B] bool, the tokens whose rows combine writes; none on a rank that was removed."""
    mask = as_pair_mask(x_active_mask, expert_ids)
    active = jnp.ones(len(expert_ids), bool) if mask is None else mask if mask.ndim == 1 else jnp.any(mask, axis=1)
    if elastic_info is None:
        return active
    return active & (read_table(elastic_info, plan).logical[collectives.ep_rank(plan)] >= 0)


def make_manifest(
    world: World,
    expert_ids: Array,
    x_active_mask: Array | None,
    elastic_info: Array | None,
    *,
    recv_counts: Array | None = None,
    fresh: Array | None = None,
    timed: bool = False,
) -> Manifest:
    """What one call ships. With two tp ranks, the rows of this rank come before those of the peer."""
    plan = world.plan
    transport = transport_of(plan)
    counter = Stopwatch(transport) if timed else transport
    mask = as_pair_mask(x_active_mask, expert_ids)
    manifest = count_pairs(counter, expert_ids, plan, token_mask=mask, rank_table=elastic_info, fresh=fresh)
    if recv_counts is not None:
        manifest = manifest._replace(known=transport.with_counts(manifest.known, recv_counts))
    if plan.tp_size == 1:
        return manifest
    # In the library rows stand by tp rank, then by logical rank. Here those of this tp rank come first.
    order = manifest.source_order
    lanes = jnp.arange(plan.tp_size * plan.ep_size, dtype=jnp.int32) if order is None else order
    lanes = jnp.roll(lanes.reshape(plan.tp_size, plan.ep_size), -collectives.tp_rank(plan), axis=0)
    return manifest._replace(source_order=lanes.ravel())


class Ledger:
    """CANN's running sums of received rows, made from counts by (tp rank, source, expert) and turned back into them.

    CANN numbers the ranks that take part, W' of W, by their logical rank, and its vector has W' entries for each
    expert: entry e is about expert e // W' and logical source e % W'. Without ``elastic_info`` all W ranks take part.
    What belongs to one tp rank is called a *lane* here.

    Attributes:
      plan: of the call.
      num_sources: W', i32.
      order: [W] i32, the ranks by logical rank; those that were removed come last.
      num_slots: the experts of this rank, i32: L, 1 for a shared expert, 0 on a rank that was removed.
    """

    def __init__(self, plan: Plan, elastic_info: Array | None):
        me = collectives.ep_rank(plan)
        self.plan = plan
        if elastic_info is None:
            self.num_sources, self.order = jnp.int32(plan.ep_size), jnp.arange(plan.ep_size, dtype=jnp.int32)
            self.num_slots = jnp.where(me < plan.num_shared_ranks, 1, plan.num_local_experts)
            return
        table = read_table(elastic_info, plan)
        mine = table.logical[me]
        self.num_sources, self.order = table.world_size, source_order(table, plan)[: plan.ep_size]
        slots = jnp.where(mine < table.num_shared_ranks, 1, plan.num_local_experts)
        self.num_slots = jnp.where(mine < 0, 0, slots)

    def running_sums(self, recv_counts: Array) -> Array:
        """[P, W, L] -> [P, L * W], the lane of this tp rank first; entries that CANN does not write are zero."""
        plan = self.plan
        # 1. By expert, then by logical source: [L, W] sums over all rows that come no later. Removed ranks sent
        #    nothing, so the sums of one expert end with that of its last source.
        sums = [jnp.cumsum(lane[self.order].T.ravel()).reshape(-1, plan.ep_size) for lane in recv_counts]
        # 2. Entry e is that of expert e // W' and source e % W'. Past the last expert there are none.
        expert, source = self._entries()
        last = plan.num_local_experts - 1
        flat = [jnp.where(expert < self.num_slots, lane[jnp.minimum(expert, last), source], 0) for lane in sums]
        # 3. So far the tp ranks stand in their order; in CANN's vector this rank comes first.
        return jnp.roll(jnp.stack(flat).astype(jnp.int32), -collectives.tp_rank(plan), axis=0)

    def counts(self, running_sums: Array) -> Array:
        """The inverse: [P, L * W], the lane of this tp rank first -> [P, W, L]."""
        plan = self.plan
        # 1. Put the tp ranks in their order again.
        lanes = jnp.roll(running_sums, collectives.tp_rank(plan), axis=0)
        # 2. The difference of an entry and the one before it is a count. Entries past the last expert hold no count.
        expert, _ = self._entries()
        sizes = jnp.where(expert < self.num_slots, jnp.diff(lanes, axis=1, prepend=0), 0)
        # 3. The count of expert l and logical source s is entry l * W' + s; sources from W' on sent nothing.
        source = jnp.arange(plan.ep_size)
        index = jnp.arange(plan.num_local_experts)[:, None] * self.num_sources + source
        by_logical = jnp.where(source < self.num_sources, jnp.take(sizes, index, axis=1, mode="clip"), 0)  # [P, L, W]
        # 4. Sources by rank: argsort inverts the permutation ``order``.
        return by_logical.transpose(0, 2, 1)[:, jnp.argsort(self.order)].astype(jnp.int32)

    def source_of_row(self, own_sums: Array, num_rows: int) -> Array:
        """[num_rows] i32: the logical source of every row of this rank, from its running sums [L * W].

        Row j belongs to the first entry whose sum exceeds j. Entries past the last expert count as infinite: the search
        needs an ascending vector, and so never passes them. Past the last row the result may be anything.
        """
        expert, _ = self._entries()
        sums = jnp.where(expert < self.num_slots, own_sums, jnp.iinfo(jnp.int32).max)
        entry = searchsorted(sums, jnp.arange(num_rows, dtype=jnp.int32), side="right")
        return entry % self.num_sources

    def _entries(self) -> tuple[Array, Array]:
        """The (expert, logical source) of each entry of a vector of running sums."""
        entry = jnp.arange(self.plan.num_local_experts * self.plan.ep_size, dtype=jnp.int32)
        return entry // self.num_sources, entry % self.num_sources
