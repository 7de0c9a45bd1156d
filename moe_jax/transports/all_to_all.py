"""The transports "padded" and "ragged": every rank sends each rank its rows, and sums are made at the tokens.

They differ in how the exchange moves rows that lie end to end in the outbox. "padded" sends equal blocks where a round
is no longer than ``plan.pair_capacity``, as in the layer, and else chunks of that length; "ragged" sends slices.
"""

import abc
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat, collectives, layout
from moe_jax.collectives.exchange import Blocks, Chunks, Exchange, Receiving, Slices
from moe_jax.derivatives import custom_gradient, take_rows
from moe_jax.plan import Plan
from moe_jax.plan.moments import Held
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
    deliver,
    only_present,
    rows_if,
    summed_slots,
    token_of,
)
from moe_jax.types import pytree

Array = jax.Array


@pytree()
class PairMaps:
    """How rows move when each rank sends rows to each: maps of one round; -1 marks "none".

    Attributes:
      outbox_pair: [S] i32, the pair in each outbox slot.
      pair_outbox: [T, C] i32, the outbox slot of each pair.
      row_inbox: [M] i32, the inbox slot of each row.
      inbox_row: [P * A] i32, the row of each inbox slot.
      exchange: what moves outbox slots to inbox slots.
    """

    outbox_pair: Array
    pair_outbox: Array
    row_inbox: Array
    inbox_row: Array
    exchange: Exchange


class Counted(NamedTuple):
    """What the ranks told each other.

    Attributes:
      recv_counts: [P, W, L] i32, pairs for this rank by source.
      sizes: [P, W, W] i32, lengths of the lists from each rank to each, for each tp rank.
    """

    recv_counts: Array
    sizes: Array


class AllToAll(Transport):
    """What "padded" and "ragged" have in common: everything but the exchange, and how many rows it hands over.

    A subclass says in ``exchange`` what moves the rows. Where that sends fewer rows than ``ep_size * capacity``, it
    says so in ``sent_rows``, from which the plan counts bytes.
    """

    pairwise = True

    @abc.abstractmethod
    def exchange(self, manifest: Any, start: Array | int, capacity: int, plan: Plan) -> Exchange:
        """What moves the rows of a round; the arguments are those of ``open``."""

    # Before a round.

    def count(self, destination, pairs, plan: Plan):
        counts = collectives.gather_counts(pairs.counts.reshape(plan.ep_size, plan.num_local_experts), plan)
        sizes = jnp.sum(counts, axis=-1, dtype=jnp.int32)
        counts = _compat.as_varying(counts, plan.exchange_axes)
        mine = lax.dynamic_index_in_dim(counts, collectives.ep_rank(plan), axis=2, keepdims=False)
        return pairs, Counted(recv_counts=mine, sizes=sizes)

    def longest_list(self, manifest, plan: Plan):
        return jnp.max(manifest.known.sizes)  # all ranks know all of them

    def open_blocks(self, manifest, start, capacity, plan: Plan, *, num_rows):
        return self.open(manifest, start, capacity, plan, num_rows=num_rows, exchange=Blocks())

    def open(self, manifest, start, capacity, plan: Plan, *, num_rows, exchange: Exchange | None = None):
        if exchange is None:
            exchange = self.exchange(manifest, start, capacity, plan)
        compact = not exchange.in_blocks
        # 1. The sender's side: pairs sorted by destination fill the outbox, rank by rank.
        send = layout.send_maps(manifest.pairs, plan.ep_size, start, capacity, compact=compact)
        # 2. The receiver's side: the inbox holds the same lists by source; rows stand by expert, then source.
        counts = manifest.known.recv_counts
        order = manifest.source_order
        receive = layout.receive_maps(counts, start, capacity, compact=compact, num_rows=num_rows, source_order=order)
        maps = PairMaps(
            outbox_pair=send.slot_pair,
            pair_outbox=send.pair_slot.reshape(plan.tokens_per_rank, plan.pairs_per_token),
            row_inbox=receive.row_slot,
            inbox_row=receive.slot_row,
            exchange=exchange,
        )
        return Opened(maps, receive.group_sizes, counts)

    def num_rows(self, maps):
        return maps.row_inbox.shape[0]

    def with_counts(self, known, recv_counts):
        return known._replace(recv_counts=recv_counts)

    def counts_agree(self, recv_counts, manifest, opened_counts, plan: Plan):
        lane = collectives.tp_rank(plan)
        mine = manifest.known.sizes[lane][:, collectives.ep_rank(plan)]
        return jnp.all(jnp.sum(recv_counts[lane], axis=-1) == mine)

    # Out.

    def send(self, tokens, pairs, maps, plan: Plan, *, ordered):
        with jax.named_scope("pack"):
            if tokens is not None:
                tokens = take_rows(tokens, token_of(maps.outbox_pair, plan.pairs_per_token), poison=plan.poison)
            if pairs is not None:
                place = _place_of(maps.outbox_pair, plan)
                pairs = take_rows(lax.collapse(pairs, 0, 2), place, poison=plan.poison)
            outbox, parts = join_some([tokens, pairs])
        with jax.named_scope("exchange"):
            num_slots = maps.inbox_row.shape[0] // plan.tp_size
            inbox, note = maps.exchange.move(outbox, num_slots, plan.ep_axis, plan)
        return deliver(inbox, parts, note, maps, plan, ordered=ordered)

    def inbox_order(self, maps):
        return InboxOrder(maps.row_inbox, maps.inbox_row)

    # Back. A pair that is not present in the round gets a row that may hold anything, and scalars of zero.

    def collect(self, rows, weights, scalars, maps, plan: Plan, *, ordered, recipe):
        del weights  # ``finish`` applies them
        row_slots, scalar_slots = summed_slots([rows, scalars], maps, plan, ordered=ordered)
        # Scalars never come alone: the cotangents of weights stay at the tokens.
        assert rows is not None
        assert row_slots is not None
        with jax.named_scope("exchange"):
            message, parts = join_some([as_sent(row_slots, recipe), scalar_slots])
            returned, note = maps.exchange.back().move(message, maps.outbox_pair.shape[0], plan.ep_axis, plan)
        with jax.named_scope("unpack"):
            returned = take_rows(returned, maps.pair_outbox.T, poison=plan.poison)
            collected, pair_scalars = split_some(returned, parts)
            if scalars is not None:
                pair_scalars = only_present(pair_scalars, self.present(maps, plan))
            if recipe is not None:
                values = as_received(lax.collapse(collected, 0, 2), recipe, rows.shape[1])
                collected = values.reshape(*collected.shape[:2], rows.shape[1])
            return Return(collected, pair_scalars, note)

    def collect_adjoint(self, rows, weights, ct, maps, plan: Plan, *, ordered):
        # d_row(t, c) = ct[c, t], sent as tokens are    # [M, H] from [C, T, H]; weights are not read: d_weights = 0
        ct = ct.astype(plan.dtype)
        d_rows, _ = linear.send(self, plan, ordered, plan.backward_recipe, None, ct, None, maps)
        return d_rows.astype(plan.dtype), jnp.zeros_like(weights)

    def present(self, maps, plan: Plan):
        return maps.pair_outbox >= 0

    def together(self, earlier, collected, maps):
        """Each pair comes back in one round."""
        return jnp.where((maps.pair_outbox >= 0).T[..., None], collected, earlier)

    def total(self, collected, maps):
        present = maps.pair_outbox >= 0
        total = jnp.zeros_like(collected[0], jnp.float32)
        for c in range(collected.shape[0]):
            total = total + rows_if(present[:, c], collected[c])
        return total

    def finish(self, collected, weights, travelled, added):
        if added is None:
            return _weighted_sum(collected, weights, travelled)
        total = jnp.zeros_like(collected[0], jnp.float32)
        for c, rows in enumerate(lax.split(collected, [1] * collected.shape[0], axis=0)):
            term = rows_if(travelled[:, c], rows[0])
            # At most one of the two terms is not zero.
            total = total + weights[:, c, None] * (term + added[c] if c < len(added) else term)
        return total

    # At the edge of ``dispatch``.

    def receiving(self, maps, slots):
        return dataclasses.replace(maps, exchange=Receiving(exchange=maps.exchange, slots=slots))

    def timed(self, maps):
        exchange = maps.exchange.timed()
        return None if exchange is None else dataclasses.replace(maps, exchange=exchange)

    def plain(self, maps):
        return dataclasses.replace(maps, exchange=maps.exchange.plain())

    # What it costs.

    def buffers(self, plan: Plan, capacity):
        slots = plan.ep_size * capacity
        sent = self.sent_rows(plan, capacity)
        inbox = plan.tp_size * slots
        out, back = (row_bytes(name, plan.hidden, plan.dtype) for name in (plan.quant, plan.combine_quant))
        buffers = {"outbox": sent * out, "inbox": inbox * out, "return": plan.num_pairs * back}
        return buffers, sent + 3 * plan.num_pairs + inbox + plan.num_rows(capacity)

    def held(self, plan: Plan, capacity, platform):
        buffers, _ = self.buffers(plan, capacity)
        row = plan.hidden * jnp.dtype(plan.dtype).itemsize
        inbox = plan.ep_size * capacity * row  # of this tp rank
        slots, pairs = plan.tp_size * inbox, plan.num_pairs * row
        returned = self.sent_rows(plan, capacity) * row
        gathered = inbox if plan.tp_size > 1 else 0
        out = buffers["inbox"] + max(buffers["outbox"] + self.chunk_rows(plan, capacity) * row, gathered)
        if capacity > plan.pair_capacity and platform != "gpu":
            # A long inbox is filled bit by bit. XLA:TPU and XLA:CPU make it out of another one, which is empty, and on
            # CPU that stays.
            out = out + buffers["inbox"] if platform == "cpu" else max(out, 2 * buffers["inbox"])
        return Held(
            out=out,
            arrived=slots,
            placed=slots,
            back=max(slots + gathered, inbox + returned),
            returned=returned,
            collected=pairs,
            adjoint=slots,
            sums=0,
            weighed=0,
        )

    def chunk_rows(self, plan: Plan, capacity: int) -> int:
        """Rows that the exchange of a round has in memory between outbox and inbox."""
        return 0

    def steps(self, plan: Plan, size, backward):
        ep, tp, tokens, pairs = plan.ep_axis, plan.tp_axes, plan.tokens_per_rank, plan.num_pairs

        def out(phase, rows, message):
            exchange = Collective("all-to-all", ep, size.sent * message, carries_rows=True)
            gathered = Collective("all-gather", tp, size.slots * message)
            return Step(phase, (exchange, gathered), _pass_out(plan, size, rows, message), launches=2)

        def back(phase, message):
            summed = Collective("reduce-scatter", tp, size.arrived * plan.hidden * size.sum_item)
            exchange = Collective("all-to-all", ep, size.returned * message, carries_rows=True)
            return Step(phase, (summed, exchange), _pass_back(plan, size, message), launches=3)

        found = [
            Step(ROUTE, (Collective("all-gather", plan.exchange_axes, plan.num_experts * WIDE),)),  # counts
            out(DISPATCH, tokens, size.out),
            back(COMBINE, size.back),
        ]
        if backward:  # beside the cotangents of rows, those of pairs and of weights
            beside = 2 * (pairs * size.row + tokens * size.wide)
            found += [Step(COMBINE, (), beside, launches=2), out(COMBINE, pairs, size.ct), back(DISPATCH, size.ct)]
        return found


def _pass_out(plan: Plan, size, rows: int, message: int) -> int:
    """``rows`` as messages to the experts, and in their order there."""
    coded = recoded(size, message, rows) + recoded(size, message, size.arrived)
    moved = (size.sent + size.slots) * message if plan.ep_size > 1 else 0
    gathered = (size.slots + size.arrived) * message if plan.tp_size > 1 else 0
    return coded + 2 * size.sent * message + moved + gathered + 2 * size.arrived * size.row


def _pass_back(plan: Plan, size, message: int) -> int:
    """Rows of products as messages to the tokens, and summed."""
    moved = (size.slots + size.sent) * message if plan.ep_size > 1 else 0
    coded = recoded(size, message, size.slots) + recoded(size, message, plan.num_pairs)
    unpacked = plan.num_pairs * (2 * message + size.row) + plan.tokens_per_rank * size.wide
    return unplaced_bytes(plan, size) + moved + coded + unpacked


class Padded(AllToAll):
    """Equal blocks where a round is short, chunks of its capacity where it is longer."""

    name = "padded"

    def automatic(self, plan: Plan):
        return True

    def exchange(self, manifest, start, capacity, plan: Plan):
        if capacity <= plan.pair_capacity:
            return Blocks()
        return Chunks(sizes=_round_sizes(manifest, start, capacity, plan), chunk=plan.pair_capacity)

    def sent_rows(self, plan: Plan, capacity):
        slots = plan.ep_size * capacity
        return slots if capacity <= plan.pair_capacity else min(slots, plan.num_pairs)

    def chunk_rows(self, plan: Plan, capacity):
        # Blocks for all ranks, and one more behind the slots, which a block that overhangs them is written into.
        return 0 if capacity <= plan.pair_capacity else (plan.ep_size + 1) * plan.pair_capacity


# In larger slices libtpu 0.0.42 refuses a ragged exchange: "not supported in limited ICI routing settings".
_MOST_DEVICES = {"v5e": 16}


class Ragged(AllToAll):
    """Slices of true length in one exchange."""

    name = "ragged"

    def remark(self, plan: Plan):
        most = _MOST_DEVICES.get(plan.hardware.name)
        if most is None or _num_devices(plan) <= most:
            return ""
        return f"the compiler for {plan.hardware.name} refuses a ragged exchange on more than {most} devices"

    def automatic(self, plan: Plan):
        return plan.platform != "cpu" and not self.remark(
            plan
        )  # which has no such instruction, and emulates it by equal blocks

    def source_of_rates(self, machine):
        costly = {"ragged_share": machine.ragged_share < 1, "relayout_passes": machine.relayout_passes > 0}
        return "; ".join(machine.source_of(figure) for figure, counts in costly.items() if counts)

    def exchange(self, manifest, start, capacity, plan: Plan):
        return Slices(sizes=_round_sizes(manifest, start, capacity, plan))

    def sent_rows(self, plan: Plan, capacity):
        return min(plan.ep_size * capacity, plan.num_pairs)

    def even_size(self, plan: Plan, size):
        return size._replace(sent=min(size.sent, plan.num_pairs), returned=min(size.returned, plan.num_pairs))

    def held(self, plan: Plan, capacity, platform):
        held = super().held(plan, capacity, platform)
        # Where chunks of all-to-all stand for the exchange, XLA:CPU has what goes back in four copies.
        copies = 4 if platform == "cpu" else 0
        return held._replace(back=held.back + copies * held.returned)

    def added_steps(self, plan: Plan, size, machine, backward):
        """Passes over the rows at both ends of every exchange between ranks, where they change their layout for it.

        The compilers for v5e and v5p make 7 steps of that for each exchange.
        """
        if plan.ep_size == 1 or not machine.relayout_passes:
            return []
        ends = machine.relayout_passes * 2 * (size.sent + size.slots)
        messages = {DISPATCH: size.out + size.ct * backward, COMBINE: size.back + size.ct * backward}
        launches = 7 * (1 + backward)
        return [Step(phase, (), int(ends * message), launches) for phase, message in messages.items()]

    def wire_share(self, machine):
        return machine.ragged_share


PADDED, RAGGED = Padded(), Ragged()


def _num_devices(plan: Plan) -> int:
    return math.prod(size for _, size in plan.mesh_axes)


def _round_sizes(manifest: Any, start: Array | int, capacity: int, plan: Plan) -> Array:
    """[W, W] i32, rows from each rank to each in a round, of the ranks with this rank's tp rank."""
    lists = lax.dynamic_index_in_dim(manifest.known.sizes, collectives.tp_rank(plan), keepdims=False)
    return jnp.clip(lists - start, 0, capacity)


def _place_of(pair: Array, plan: Plan) -> Array:
    """Where each pair lies in [C * T], -1 for none."""
    # Pair (t, c) has the number t * C + c, and its row lies at c * T + t.
    return jnp.where(pair < 0, -1, pair % plan.pairs_per_token * plan.tokens_per_rank + pair // plan.pairs_per_token)


@custom_gradient
def _weighted_sum(rows: Array, weights: Array, travelled: Array) -> Array:
    """``sum_c weights[t, c] * rows[c, t]`` of those that travelled, c ascending. [C, T, H], [T, C] -> [T, H] fp32."""
    total = jnp.zeros_like(rows[0], jnp.float32)
    for c in range(rows.shape[0]):
        # Rows are masked, not terms: a compiler that makes one operation of product and sum, which rounds once, must do
        # so in every program of the layer, or values would depend on how many rounds there are.
        total = total + weights[:, c, None] * rows_if(travelled[:, c], rows[c])
    return total


def _weighted_sum_backward(operands, ct):
    # d_rows[c, t] = weights[t, c] * ct[t]      # [C, T, H], where (t, c) travelled
    # d_weights[t, c] = <rows[c, t], ct[t]>     # [T, C], where (t, c) travelled
    # JAX's own rule would pad and add a cotangent of all the rows for each c.
    rows, weights, travelled = operands
    # One product for each c: for a single one over [C, T, H] the TPU compiler would first write the weights out in that
    # shape.
    kept = jnp.where(travelled, weights, 0.0)
    d_rows = jnp.stack([(kept[:, c, None] * ct).astype(rows.dtype) for c in range(rows.shape[0])])
    # Rows are masked before the product. If the products were masked instead, the derivative in ct would still read
    # rows that never came, which may hold NaN.
    dots = [jnp.sum(rows_if(travelled[:, c], rows[c]) * ct, axis=-1) for c in range(rows.shape[0])]
    return d_rows, jnp.stack(dots, axis=-1), None


_weighted_sum.defvjp(lambda *operands: (_weighted_sum(*operands), operands), _weighted_sum_backward)
