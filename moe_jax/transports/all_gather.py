"""The transport "allgather": every rank sees every token; each token's sum is made where its experts are."""

import jax
import jax.numpy as jnp

from moe_jax import collectives, layout
from moe_jax.derivatives import differentiated_as, take_rows
from moe_jax.plan import Plan
from moe_jax.plan.layer_steps import rounds_step
from moe_jax.plan.moments import Held
from moe_jax.plan.size import WIDE, recoded, row_bytes
from moe_jax.plan.steps import COMBINE, DISPATCH, ROUTE, Collective, Step
from moe_jax.quant.message import join_some, split_some
from moe_jax.transports.base import (
    Delivery,
    Opened,
    Return,
    Transport,
    as_delivered,
    as_received,
    as_sent,
    by_token,
    choices_apart,
    partial_sums,
    token_of,
)
from moe_jax.types import pytree

Array = jax.Array


@pytree()
class GatherMaps:
    """How rows are picked when every rank sees every token: maps of one round; -1 marks "none".

    Attributes:
      row_pair: [M] i32, the pair of each row, as source * T * C + pair.
      pair_row: [P * W, T, C] i32, the row of each pair of each source.
    """

    row_pair: Array
    pair_row: Array


class AllGather(Transport):
    """Rows are picked in order straight from the tokens: there are no inbox slots, and ``ordered`` changes nothing."""

    name = "allgather"

    def automatic(self, plan: Plan):
        return True

    def count(self, destination, pairs, plan: Plan):
        """[P, W, T * C] the destinations of all ranks' pairs."""
        everyone = collectives.gather_tokens(plan, destination)
        return pairs, everyone.reshape(plan.tp_size, plan.ep_size, plan.num_pairs)

    def open(self, manifest, start, capacity, plan: Plan, *, num_rows):
        me, num_local = collectives.ep_rank(plan), plan.num_local_experts
        order = manifest.source_order
        picked = layout.gather_maps(
            manifest.known, me, num_local, start, capacity, num_rows=num_rows, source_order=order
        )
        pair_row = picked.pair_row.reshape(plan.tp_size * plan.ep_size, plan.tokens_per_rank, plan.pairs_per_token)
        maps = GatherMaps(row_pair=picked.row_pair, pair_row=pair_row)
        return Opened(maps, picked.group_sizes, picked.recv_counts)

    def num_rows(self, maps):
        return maps.row_pair.shape[0]

    def send(self, tokens, pairs, maps, plan: Plan, *, ordered):
        with jax.named_scope("exchange"):
            message, parts = join_some([tokens, None if pairs is None else by_token(pairs)])
            everyone = jax.lax.collapse(collectives.gather_tokens(plan, message), 0, 2)
            all_tokens, all_pairs = split_some(everyone, parts)
        with jax.named_scope("permute"):
            if tokens is not None:
                all_tokens = take_rows(all_tokens, token_of(maps.row_pair, plan.pairs_per_token), poison=plan.poison)
            if pairs is not None:
                all_pairs = take_rows(all_pairs.reshape(-1, pairs.shape[2]), maps.row_pair, poison=plan.poison)
            return Delivery(all_tokens, all_pairs, ())

    def collect(self, rows, weights, scalars, maps, plan: Plan, *, ordered, recipe):
        assert rows is not None  # scalars alone are for transports that send them with weights
        with jax.named_scope("partial_sum"):
            everyone = None if weights is None else collectives.gather_tokens(plan, weights)
            rows = as_received(as_sent(rows, recipe), recipe, rows.shape[1])
            partial = partial_sums(rows, maps.pair_row, everyone)
        with jax.named_scope("exchange"):
            total = collectives.reduce_scatter_tokens(plan, partial)
            if scalars is None:
                return Return(total, None, ())
            summed = collectives.reduce_scatter_tokens(plan, take_rows(scalars, maps.pair_row, absent=0))
            return Return(total, jnp.swapaxes(summed, 0, 1), ())

    def collect_adjoint(self, rows, weights, ct, maps, plan: Plan, *, ordered):
        # d_row(t, c) = w[t, c] * ct[t]        # [M, H] from ct [T, H] fp32
        # d_w[t, c] = <ct[t], row(t, c)>       # [T, C], each rank's share summed over the ranks
        rows = as_delivered(rows, plan.combine_recipe)
        with jax.named_scope("exchange"):
            everyone = _everyone(ct.astype(plan.dtype), plan)  # rounded as rows are when they travel
            flat = jax.lax.collapse(everyone, 0, 2)
            everyone = everyone.astype(jnp.float32)
            all_weights = collectives.gather_tokens(plan, weights).ravel()
        with jax.named_scope("permute"):
            scale = take_rows(all_weights, maps.row_pair, absent=0)
            d_rows = take_rows(flat, token_of(maps.row_pair, plan.pairs_per_token), poison=plan.poison)
            d_rows = (scale[:, None] * d_rows.astype(jnp.float32)).astype(plan.dtype)
            dots = [
                jnp.sum(take_rows(rows, maps.pair_row[..., c], absent=0).astype(jnp.float32) * everyone, axis=-1)
                for c in range(plan.pairs_per_token)
            ]
        with jax.named_scope("exchange"):
            return d_rows, collectives.reduce_scatter_tokens(plan, jnp.stack(dots, axis=-1))

    # What it costs.

    def buffers(self, plan: Plan, capacity):
        tokens = plan.tp_size * plan.ep_size * plan.tokens_per_rank
        out = row_bytes(plan.quant, plan.hidden, plan.dtype)
        buffers = {"inbox": tokens * out, "return": tokens * plan.hidden * WIDE}
        return buffers, 2 * tokens * plan.top_k + plan.num_rows(capacity)

    def held(self, plan: Plan, capacity, platform):
        tokens = plan.tp_size * plan.ep_size * plan.tokens_per_rank
        row, wide = plan.hidden * jnp.dtype(plan.dtype).itemsize, plan.hidden * WIDE
        buffers, _ = self.buffers(plan, capacity)
        return Held(
            out=buffers["inbox"] + plan.tokens_per_rank * row,
            arrived=buffers["inbox"],
            placed=buffers["return"],
            back=buffers["return"] + plan.tokens_per_rank * wide,
            returned=0,
            collected=plan.tokens_per_rank * wide,
            adjoint=tokens * (row + wide),
            sums=buffers["return"],
            # XLA:TPU gathers the rows of all choices first, where others read them inside of what they make.
            weighed=tokens * (plan.pairs_per_token * row + wide) if platform == "tpu" else 0,
        )

    def steps(self, plan: Plan, size, backward):
        axes, pairs = plan.exchange_axes, plan.num_pairs * WIDE
        tokens, everyone = plan.tokens_per_rank, size.everyone * plan.pairs_per_token
        of_pairs = Collective("all-gather", axes, pairs)  # destinations, and then weights

        def out(phase, message):
            gathered = Collective("all-gather", axes, tokens * message)
            return Step(phase, (gathered,), _pass_out(plan, size, message), launches=1)

        def back(phase, message):
            summed = Collective("reduce-scatter", axes, size.everyone * size.wide)
            return Step(phase, (summed,), _pass_back(plan, size, message), launches=1)

        found = [rounds_step(plan), Step(ROUTE, (of_pairs,)), out(DISPATCH, size.out)]
        found += [Step(COMBINE, (of_pairs,)), back(COMBINE, size.back)]
        if backward:
            # Of every choice of every token, <row, cotangent>; their sums go back as the gradients of the weights.
            dots = tokens * (size.wide + size.row) + 2 * size.arrived * size.row + everyone * (size.row + size.wide)
            summed = Collective("reduce-scatter", axes, plan.ep_size * plan.tp_size * pairs)
            found += [out(COMBINE, size.ct), Step(COMBINE, (summed,), dots, launches=3), back(DISPATCH, size.ct)]
        return found

    def added_steps(self, plan: Plan, size, machine, backward):
        return choices_apart(plan, size, size.everyone, machine, backward)


def _pass_out(plan: Plan, size, message: int) -> int:
    """Tokens as messages to all ranks, and rows picked out of them."""
    coded = recoded(size, message, plan.tokens_per_rank) + recoded(size, message, size.arrived)
    moved = (plan.tokens_per_rank + size.everyone) * message if plan.ep_size * plan.tp_size > 1 else 0
    return coded + moved + 2 * size.arrived * message


def _pass_back(plan: Plan, size, message: int) -> int:
    """Rows of products summed for all tokens, and the sums of the ranks added."""
    sums = size.everyone * (plan.pairs_per_token * size.row + size.wide)
    moved = (size.everyone + plan.tokens_per_rank) * size.wide if plan.ep_size * plan.tp_size > 1 else 0
    return 2 * recoded(size, message, size.arrived) + sums + moved


ALL_GATHER = AllGather()


def _everyone(ct: Array, plan: Plan) -> Array:
    """[T, H] of each device -> [P * W, T, H] of all, as the recipe of cotangents leaves them."""
    recipe = plan.backward_recipe

    def encoded(ct):
        everyone = collectives.gather_tokens(plan, as_sent(ct, recipe))
        flat = as_received(jax.lax.collapse(everyone, 0, 2), recipe, plan.hidden)
        return flat.reshape(*everyone.shape[:2], plan.hidden)

    if recipe is None:
        return collectives.gather_tokens(plan, ct)
    return differentiated_as(lambda ct: collectives.gather_tokens(plan, ct.astype(jnp.float32)), encoded, ct)
