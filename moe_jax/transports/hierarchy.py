"""The transport "hierarchy": a token travels to each node once, and one sum comes back from each node.

Out: rank i of a node sends a token once to rank i of every node that one of its experts lives on, and that rank sends
it on to the ranks of these experts, inside its node. Back: the same rank weights and adds the rows of all choices of a
token on its node, and one partial sum per token and node goes back. W = N * R ranks, R on each of N nodes, numbered
node by node; rows have the order of every other transport: (local expert, tp rank, source rank, token, choice).

Addresses: a *node outbox* slot is a row of the buffer that goes to other nodes (B for each), a *node inbox* slot a row
of the one that comes from them; slot b of the block from node n is there what slot b of the block for this node is to
its sender. An *outbox* slot is a row of the buffer that goes to the ranks of this node (D for each where blocks are of
equal size), an *inbox* slot a row of what comes from them, a *row* one of the experts' input.

Extents hold the worst skew of a round of ``capacity`` rows per pair of ranks, repeated destinations included:
B = min(T, R * capacity) and D = N * min(capacity, T * C). With the rounds of the layer, blocks inside the node are as
long as those of the padded transport, W * capacity rows in all. A round longer than ``plan.pair_capacity``, such as
that of a dropless ``dispatch``, travels inside the node end to end, in chunks that follow the true counts; its inbox
still has R * D = W * T * C rows, a P-th of the M rows that the caller asks for.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat, collectives, layout
from moe_jax.collectives.exchange import Blocks, Chunks, Exchange
from moe_jax.derivatives import take_rows
from moe_jax.plan import Plan
from moe_jax.plan.layer_steps import rounds_step
from moe_jax.plan.size import WIDE, recoded, row_bytes, unplaced_bytes
from moe_jax.plan.steps import COMBINE, DISPATCH, ROUTE, Collective, Step
from moe_jax.quant.message import join_some, split_some
from moe_jax.transports import linear
from moe_jax.transports.base import (
    InboxOrder,
    Opened,
    Return,
    Transport,
    as_received,
    as_sent,
    by_token,
    choices_apart,
    deliver,
    partial_sums,
    summed_slots,
    token_of,
)
from moe_jax.types import pytree

Array = jax.Array


@pytree()
class HierarchyMaps:
    """How rows move when a token travels to each node once: maps of one round; -1 marks "none".

    Attributes:
      node_outbox_token: [N * B] i32, the token in each node outbox slot.
      token_node_outbox: [T, N] i32, the node outbox slot of each token for each node.
      outbox_pair: [S] i32, node inbox slot * C + c in each outbox slot; S = R * D for blocks, at most that otherwise.
      pair_outbox: [N * B, C] i32, the outbox slot of each choice of the token in each node inbox slot.
      row_inbox: [M] i32, the inbox slot of each row.
      inbox_row: [P * R * D] i32, the row of each inbox slot.
      exchange: what moves outbox slots to inbox slots, between the ranks of this node.
    """

    node_outbox_token: Array
    token_node_outbox: Array
    outbox_pair: Array
    pair_outbox: Array
    row_inbox: Array
    inbox_row: Array
    exchange: Exchange


class Hierarchy(Transport):
    """Two legs: between the ranks of equal index on all nodes, and between the ranks of one node."""

    name = "hierarchy"
    takes_row_weights = True

    def automatic(self, plan: Plan):
        return plan.num_nodes > 1

    def remark(self, plan: Plan):
        alone = "the mesh spans one node, so nothing crosses to another: padded does the same with less"
        return alone if plan.num_nodes == 1 else ""

    def count(self, destination, pairs, plan: Plan):
        """[T, C] the destinations of this rank's pairs: ``open`` exchanges what it needs of them."""
        return pairs, destination.reshape(plan.tokens_per_rank, plan.pairs_per_token)

    def open(self, manifest, start, capacity, plan: Plan, *, num_rows):
        order = manifest.source_order
        return open_hierarchy(manifest.known, start, capacity, plan, num_rows=num_rows, source_order=order)

    def num_rows(self, maps):
        return maps.row_inbox.shape[0]

    def send(self, tokens, pairs, maps, plan: Plan, *, ordered):
        # 1. Across: one message of each token for each node.
        with jax.named_scope("pack"):
            message, parts = join_some([tokens, None if pairs is None else by_token(pairs)])
            leaving = take_rows(message, maps.node_outbox_token, poison=plan.poison)
        with jax.named_scope("exchange"):
            crossed = _exchange_across(leaving, plan)
            node_tokens, node_pairs = split_some(crossed, parts)
        # 2. Inside: the message once for each expert of the token on this node.
        with jax.named_scope("pack"):
            if tokens is not None:
                # An outbox slot holds node inbox slot * C + c, so that slot is found as the token of a pair is.
                node_inbox_slot = token_of(maps.outbox_pair, maps.pair_outbox.shape[1])
                node_tokens = take_rows(node_tokens, node_inbox_slot, poison=plan.poison)
            if pairs is not None:
                node_pairs = take_rows(node_pairs.reshape(-1, pairs.shape[2]), maps.outbox_pair, poison=plan.poison)
            outbox, parts = join_some([node_tokens, node_pairs])
        # 3. To the ranks of this node, and in the order of the experts.
        with jax.named_scope("exchange"):
            num_slots = maps.inbox_row.shape[0] // plan.tp_size
            inbox, note = maps.exchange.move(outbox, num_slots, _inside(plan), plan)
        return deliver(inbox, parts, note, maps, plan, ordered=ordered)

    def inbox_order(self, maps):
        return InboxOrder(maps.row_inbox, maps.inbox_row)

    def collect(self, rows, weights, scalars, maps, plan: Plan, *, ordered, recipe):
        """``y[t] = sum over nodes of round(sum over the choices c on that node of w[t, c] * row(t, c))``, fp32 [T, F].

        Products and both sums in fp32, choices and nodes ascending; ``round`` is to ``plan.dtype``, the dtype in which
        partial sums travel, and with a recipe what that leaves of it. With tp > 1 the rows of the tp ranks are partial
        sums, and are added first, in their own dtype. Scalars [M, G] -> [C, T, G], added over tp alone. Weights of
        shape [M] stand beside the rows and are added over tp too: of each row one tp rank holds the weight, the others
        zero. They go without scalars, and with rows that are in order. Rows may be None where there are scalars.

        Source: the layered combine kernels of MoeDistributeCombine, without their fp16 special case.
        """
        # 1. Inside: rows, and what stands beside them, back in the outbox slots that they left, summed over tp.
        beside_rows = weights is not None and weights.ndim == 1
        slots = [rows, weights[:, None] if weights is not None and beside_rows else scalars]
        slots = summed_slots(slots, maps, plan, ordered=ordered)
        with jax.named_scope("exchange"):
            message, held = join_some(slots)
            returned, note = maps.exchange.back().move(message, maps.outbox_pair.shape[0], _inside(plan), plan)
            node_rows, node_scalars = split_some(returned, held)
        # 2. The weights of the pairs, where their rows are.
        node_weights = None
        if beside_rows:
            node_weights = take_rows(node_scalars[:, 0], maps.pair_outbox, absent=0)
        elif weights is not None:
            with jax.named_scope("exchange"):
                leaving = take_rows(weights, maps.node_outbox_token, poison=plan.poison)
                node_weights = _exchange_across(leaving, plan)
        # 3. Across: one partial sum of each token from each node, rounded to ``plan.dtype``.
        message = flat = None
        with jax.named_scope("partial_sum"):
            if rows is not None:
                partial = partial_sums(node_rows, maps.pair_outbox, node_weights).astype(plan.dtype)
                # The barrier keeps XLA from dropping the narrow type where nothing is exchanged.
                message = as_sent(lax.optimization_barrier(partial), recipe)
            if scalars is not None:
                flat = lax.collapse(take_rows(node_scalars, maps.pair_outbox, absent=0), 1)
        with jax.named_scope("exchange"):
            packed, parts = join_some([message, flat])
            returned, returned_scalars = split_some(_exchange_across(packed, plan), parts)
        # 4. At the tokens: the sum over the nodes.
        with jax.named_scope("combine_sum"):
            total = pair_scalars = None
            if rows is not None:
                values = as_received(returned, recipe, rows.shape[1])
                total = partial_sums(values, maps.token_node_outbox, None)
            if scalars is not None:
                summed = partial_sums(returned_scalars, maps.token_node_outbox, None)
                pair_scalars = jnp.swapaxes(summed.reshape(len(summed), -1, scalars.shape[1]), 0, 1)
            return Return(total, pair_scalars, note)

    def collect_adjoint(self, rows, weights, ct, maps, plan: Plan, *, ordered):
        # d_row(t, c) = w[t, c] * ct[t]     # [M, H] on every tp rank, from ct [T, H] fp32
        # d_w[t, c] = <ct[t], row(t, c)>    # [T, C], or [M] for weights beside the rows; the row summed over tp
        # The cotangent of a token travels to each node once, as a row in ``plan.dtype``; products and sums are fp32.
        beside_rows, recipe = weights.ndim == 1, plan.backward_recipe
        scalars = None if beside_rows else weights.T[..., None]
        row_ct, row_weight = linear.send(self, plan, ordered, recipe, ct.astype(plan.dtype), None, scalars, maps)
        row_ct = row_ct.astype(jnp.float32)
        with jax.named_scope("dot"):
            dots = jnp.sum(rows.astype(jnp.float32) * row_ct, axis=-1, keepdims=True)
        if not beside_rows:
            _, d_weights = linear.collect(self, plan, ordered, recipe, None, dots, maps)
            return (row_weight * row_ct).astype(rows.dtype), d_weights[..., 0].T
        both = jnp.concatenate([dots, weights[:, None]], axis=1)
        # The rows and the weights of the tp ranks are partial sums. Ranks may order rows differently, but not slots, so
        # slots are added up.
        if plan.tp_size > 1:
            slots = collectives.sum_over(take_rows(both, maps.inbox_row, absent=0), plan.tp_axes)
            both = take_rows(_compat.as_varying(slots, plan.exchange_axes), maps.row_inbox, absent=0)
        d_weights = jnp.where(maps.row_inbox >= 0, both[:, 0], 0.0)
        return (both[:, 1:] * row_ct).astype(rows.dtype), d_weights

    # What it costs.

    def buffers(self, plan: Plan, capacity):
        slots, rows = plan.ep_size * capacity, plan.num_rows(capacity)
        node_slots = plan.num_nodes * min(plan.tokens_per_rank, plan.ep_size // plan.num_nodes * capacity)
        sent = min(slots, node_slots * plan.pairs_per_token) if capacity > plan.pair_capacity else slots
        row = plan.hidden * jnp.dtype(plan.dtype).itemsize
        out, back = (row_bytes(name, plan.hidden, plan.dtype) for name in (plan.quant, plan.combine_quant))
        inbox = plan.tp_size * slots
        buffers = {
            "node_slots": 2 * node_slots * out,
            "outbox": sent * out,
            "inbox": inbox * out,
            "return": sent * row + node_slots * (WIDE * plan.hidden + back),
        }
        integers = node_slots * (1 + plan.pairs_per_token) + plan.tokens_per_rank * plan.num_nodes + sent + inbox + rows
        return buffers, integers

    def held(self, plan: Plan, capacity, platform):
        buffers, _ = self.buffers(plan, capacity)
        held = super().held(plan, capacity, platform)
        return held._replace(placed=held.arrived, adjoint=held.arrived + buffers["node_slots"] // 2)

    def steps(self, plan: Plan, size, backward):
        across, inside, tp = _across(plan), _inside(plan), plan.tp_axes
        counts, entries = plan.num_experts * WIDE, plan.pairs_per_token * WIDE  # entries: of a token
        of_pairs = Collective("all-to-all", across, size.node_slots * entries)  # destinations, and then weights

        def out(phase, message, beside_token, beside_row):
            bytes_inside = message + beside_row
            collectives = (
                Collective("all-to-all", across, size.node_slots * (message + beside_token), carries_rows=True),
                Collective("all-to-all", inside, size.sent * bytes_inside, carries_rows=True),
                Collective("all-gather", tp, size.slots * bytes_inside),
            )
            return Step(phase, collectives, _pass_out(plan, size, message), launches=3)

        def back(phase, message):
            collectives = (
                Collective("reduce-scatter", tp, size.arrived * plan.hidden * size.sum_item),
                Collective("all-to-all", inside, size.slots * size.row, carries_rows=True),
                Collective("all-to-all", across, size.node_slots * message, carries_rows=True),
            )
            return Step(phase, collectives, _pass_back(plan, size, message), launches=4)

        exchanged = (Collective("all-to-all", plan.ep_axis, counts), Collective("all-gather", tp, counts), of_pairs)
        found = [rounds_step(plan), Step(ROUTE, exchanged), out(DISPATCH, size.out, 0, 0)]
        found += [Step(COMBINE, (of_pairs,)), back(COMBINE, size.back)]
        if not backward:
            return found
        # Cotangents of rows travel with the weights. Of every row that arrived, <row, cotangent> is the cotangent of
        # its weight, and goes back by itself.
        dots = plan.tokens_per_rank * (size.wide + size.row) + 4 * size.arrived * size.row
        scalars = (
            Collective("reduce-scatter", tp, size.arrived * WIDE),
            Collective("all-to-all", inside, size.slots * WIDE),
            Collective("all-to-all", across, size.node_slots * entries),
        )
        found += [out(COMBINE, size.ct, entries, WIDE), Step(COMBINE, scalars, dots, launches=5)]
        return [*found, back(DISPATCH, size.ct)]

    def added_steps(self, plan: Plan, size, machine, backward):
        return choices_apart(plan, size, size.node_slots, machine, backward)


def _pass_out(plan: Plan, size, message: int) -> int:
    """Tokens as messages to the nodes, inside them to the experts, and in their order there."""
    coded = recoded(size, message, plan.tokens_per_rank) + recoded(size, message, size.arrived)
    packed = 2 * size.sent * message + 4 * size.node_slots * message
    moved = (size.sent + size.slots) * message if plan.ep_size > 1 else 0
    gathered = (size.slots + size.arrived) * message if plan.tp_size > 1 else 0
    return coded + packed + moved + gathered + 2 * size.arrived * size.row


def _pass_back(plan: Plan, size, message: int) -> int:
    """Rows of products inside their node, summed there, and the sums of the nodes added."""
    inside = 2 * size.slots * size.row if plan.ep_size > plan.num_nodes else 0
    sums = size.node_slots * (plan.pairs_per_token * size.row + size.wide + 3 * message)
    return unplaced_bytes(plan, size) + inside + sums + plan.tokens_per_rank * (plan.num_nodes * message + size.wide)


HIERARCHY = Hierarchy()


def _exchange_across(rows: Array, plan: Plan) -> Array:
    """[N * B, F]: block m of B slots goes to node m; block n of the result came from node n."""
    return Blocks().move(rows, len(rows), _across(plan), plan)[0]


def _across(plan: Plan) -> tuple[str, ...]:
    """The axes between ranks of equal index on all nodes; none where the mesh has no axis of nodes."""
    return plan.ep_axis[:-1]


def _inside(plan: Plan) -> tuple[str, ...]:
    """The axis between the ranks of one node."""
    return plan.ep_axis[-1:]


# The maps. Integers only.


def open_hierarchy(
    destination: Array,
    start: Array | int,
    capacity: int,
    plan: Plan,
    *,
    num_rows: int,
    source_order: Array | None = None,
) -> Opened:
    """The maps of the pairs at places [start, start + capacity) of every list; see ``layout`` for lists and rounds.

    Two exchanges of integers: counts between all ranks, destinations between nodes; a third one inside the node, of
    R numbers, where rows travel end to end.

    Args:
      destination: [T, C] i32 flat expert slot, rank * L + local expert, of every pair, or -1.
      start: first place, may be traced.
      capacity: places, static.
      plan: names the axes and sizes.
      num_rows: M, static row capacity, at least the rows that may come: P * W * capacity always are enough.
      source_order: as for ``layout.receive_maps``.
    """
    destination = _compat.as_varying(destination, plan.exchange_axes)
    (tokens, pairs_per_token), num_local = destination.shape, plan.num_local_experts
    num_nodes = collectives.group_size(_across(plan))
    per_node = plan.ep_size // num_nodes
    compact = capacity > plan.pair_capacity
    # 1. The pairs of this round, and the tokens that must travel to each node for them.
    with jax.named_scope("layout"):
        pairs = layout.sort_pairs(destination.ravel(), plan.ep_size * num_local)
        chosen = layout.send_maps(pairs, plan.ep_size, start, capacity, compact=True)
        chosen = jnp.where(chosen.pair_slot.reshape(destination.shape) >= 0, destination, -1)
        node = jnp.where(chosen >= 0, chosen // (per_node * num_local), -1)
        node_outbox_token, token_node_outbox = _node_outbox_maps(node, num_nodes, min(tokens, per_node * capacity))
        leaving = _destinations_by_node(chosen, node, node_outbox_token, num_nodes, per_node * num_local)
    # 2. Counts between all ranks; and with each token, where its pairs go on the node that it travels to.
    with jax.named_scope("exchange_counts"):
        recv_counts = collectives.exchange_counts(pairs.counts.reshape(plan.ep_size, num_local), plan)
        crossed = collectives.swap_with_peers(leaving, _across(plan)) if _across(plan) else leaving
    # 3. The outbox for the ranks of this node, filled like that of any all-to-all; the counts say what arrives.
    with jax.named_scope("layout"):
        block = num_nodes * min(capacity, tokens * pairs_per_token)
        inner_pairs = layout.sort_pairs(crossed.ravel(), per_node * num_local)
        inner = layout.send_maps(inner_pairs, per_node, 0, block, compact=compact)
        _, arriving = layout.clip_to_stretch(recv_counts, start, capacity)
        row_inbox, inbox_row = _receive_maps(arriving, num_nodes, block, num_rows, source_order, compact=compact)
    exchange = Blocks()
    if compact:
        sizes = collectives.gather_sizes(inner.sizes, _inside(plan))
        exchange = Chunks(sizes=sizes, chunk=num_nodes * plan.pair_capacity)
    maps = HierarchyMaps(
        node_outbox_token=node_outbox_token,
        token_node_outbox=token_node_outbox,
        outbox_pair=inner.slot_pair,
        pair_outbox=inner.pair_slot.reshape(-1, pairs_per_token),
        row_inbox=row_inbox,
        inbox_row=inbox_row,
        exchange=exchange,
    )
    return Opened(maps, jnp.sum(arriving, axis=(0, 1), dtype=jnp.int32), recv_counts)


def _node_outbox_maps(node: Array, num_nodes: int, block: int) -> tuple[Array, Array]:
    """Node outbox slots, by node and then token: ([N * B] the token in each slot, [T, N] the slot of each token).

    Args:
      node: [T, C] the node of each pair, or -1.
      num_nodes: N.
      block: B, at least the tokens that any node gets.
    """
    tokens, length = node.shape[0], num_nodes * block
    every_node = jnp.arange(num_nodes, dtype=jnp.int32)
    # 1. Which tokens each node needs, for one choice or several: [T, N].
    wanted = jnp.zeros((tokens, num_nodes), bool)
    for c in range(node.shape[1]):
        wanted |= node[:, c, None] == every_node
    # 2. The tokens of a node fill its block in ascending order: the slot of a token counts the wanted ones before it.
    place = jnp.cumsum(wanted, axis=0, dtype=jnp.int32) - 1
    token_slot = jnp.where(wanted, every_node * block + place, -1)
    # 3. The inverse. A slot belongs to one token at most; what is not wanted is written past the end, and so dropped.
    token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], token_slot.shape)
    target = jnp.where(wanted, token_slot, length)
    return jnp.full(length, -1, jnp.int32).at[target].set(token, mode="drop"), token_slot


def _destinations_by_node(
    chosen: Array, node: Array, node_outbox_token: Array, num_nodes: int, slots_per_node: int
) -> Array:
    """[N, B, C] where the pairs of each node outbox slot go: the place among the expert slots of that node, or -1."""
    if not chosen.shape[0]:
        return jnp.zeros_like(chosen, shape=(num_nodes, 0, chosen.shape[1]))
    token = node_outbox_token.reshape(num_nodes, -1)
    # 1. The pairs of the token in a slot that go to the node of this slot; its other pairs go elsewhere.
    target = jnp.arange(num_nodes, dtype=jnp.int32)[:, None, None]
    there = take_rows(node, token, absent=-1) == target
    # 2. Their flat expert slots, counted from the first one of the node.
    return jnp.where(there, take_rows(chosen, token) - target * slots_per_node, -1)


def _receive_maps(
    sizes: Array, num_nodes: int, block: int, num_rows: int, source_order: Array | None, *, compact: bool
) -> tuple[Array, Array]:
    """Where inbox slots become rows: (row_inbox [M], inbox_row [P * R * D]).

    What rank i of this node passes on stands by (local expert, source node), and is one block for each of them: the
    pairs of source (n, i) for that expert, in order. Counts alone say where a block lies on both sides.

    Args:
      sizes: [P, W, L] of the blocks, by source and local expert.
      num_nodes, block, num_rows: N, D and M.
      source_order: [P * W] as for ``layout.receive_maps``.
      compact: True: what comes from the ranks of the node lies end to end; False: each has D slots.
    """
    num_tp, num_ranks, num_local = sizes.shape
    per_node = num_ranks // num_nodes

    def by_slot(blocks):
        """[P, W, L] -> [P, R, L * N]: the blocks that each rank of the node passes on, in order."""
        split = blocks.reshape(num_tp, num_nodes, per_node, num_local)
        return split.transpose(0, 2, 3, 1).reshape(num_tp, per_node, num_local * num_nodes)

    # 1. The list that each rank of this node passes on, and where it begins in the inbox.
    lists = by_slot(sizes)
    if compact:
        from_rank = jnp.sum(lists, axis=-1, dtype=jnp.int32)
        bases = layout.exclusive_cumsum(from_rank)
    else:
        bases = jnp.broadcast_to(jnp.arange(per_node, dtype=jnp.int32) * block, (num_tp, per_node))
    bases = bases + jnp.arange(num_tp, dtype=jnp.int32)[:, None] * (per_node * block)
    # 2. Where each block begins in the inbox: the blocks of a list stand end to end. Then the order of ``sizes``.
    starts = (bases[..., None] + layout.exclusive_cumsum(lists)).reshape(num_tp, per_node, num_local, num_nodes)
    slot_start = starts.transpose(0, 3, 1, 2).reshape(sizes.shape)
    # 3. Where each block begins among the rows; then inbox slots and rows are looked up both ways.
    row_start = layout.row_starts(sizes, source_order)
    return (
        layout.map_blocks(row_start, slot_start, sizes, num_rows),
        layout.map_blocks(slot_start, row_start, sizes, num_tp * per_node * block),
    )
