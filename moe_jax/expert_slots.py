"""From what arrived to what goes back: rows picked out of arrival slots, through their experts, and into slots again.

Nothing here communicates. Rows are laid out in one of two ways, which the counts decide at run time: *compact*, group
after group, for any counts; or *equal*, S rows for each expert, zeros where there are fewer, if no expert has more. Then
each projection is one batched product, which some back ends run much faster than a grouped one. S is the even load.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax.experts import batched_product, grouped_product, project_in, project_out
from moe_jax.layout import exclusive_cumsum
from moe_jax.movement import RowOrder, pick

Array = jax.Array


class _Layout(NamedTuple):
    """Where rows lie, and how they are multiplied."""

    row_slot: Array | None  # slot of each row, in the shape of the rows without H; -1 for none; None: rows are slots
    slot_row: Array | None  # [A] row of each slot, as a flat index
    fill: float | None  # of rows without a slot; None: anything
    product: Callable


class _How(NamedTuple):
    """What is static."""

    plan: object
    activation: str
    num_rows: int  # M
    equal_rows: int  # S; 0: always compact


def expert_slots(
    experts: dict[str, Array],
    arrived: Array,
    order: RowOrder | None,
    group_sizes: Array,
    plan,
    *,
    activation: str,
    equal_rows: int,
) -> Array:
    """What the experts make of the rows that arrived, each in the slot that its row came in.

    The backward pass keeps ``arrived`` and the inputs of the activation, and picks and activates again.

    Args:
      experts: w_gate (if gated) and w_up [L, H, F], w_down [L, F, H]; optional b_gate, b_up [L, F], b_down [L, H].
      arrived: [A, H]; slots that no row came in influence nothing.
      order: of the rows; None: they lie in order already, expert by expert from the first slot on.
      group_sizes: [L] i32, rows of each expert.
      plan, activation: static.
      equal_rows: S, rows of an expert in a batched product; 0: there is none.

    Returns:
      [A, H] in the dtype of ``arrived``. Differentiable in ``experts`` and ``arrived``.
    """
    num_rows = arrived.shape[0] if order is None else order.row_slot.shape[0]
    return _expert_slots(_How(plan, activation, num_rows, equal_rows), experts, arrived, order, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_slots(how, experts, arrived, order, group_sizes):
    def run(layout):
        with jax.named_scope("experts"):
            gate, up = project_in(experts, _rows(arrived, layout, how), layout.product)
            return _slots(project_out(experts, gate, up, how.activation, layout.product), layout, how)

    return _in_layout(how, order, group_sizes, run)


def _forward(how, experts, arrived, order, group_sizes):
    def run(layout):
        with jax.named_scope("experts"):
            inner = project_in(experts, _rows(arrived, layout, how), layout.product)
            out = project_out(experts, *inner, how.activation, layout.product)
            return _slots(out, layout, how), jax.tree.map(functools.partial(_kept, how=how), inner)

    out, inner = _in_layout(how, order, group_sizes, run)
    return out, (experts, arrived, order, group_sizes, inner)


def _backward(how, residuals, ct):
    experts, arrived, order, group_sizes, inner = residuals
    of_down = {name: value for name, value in experts.items() if name.endswith("_down")}
    of_inner = {name: value for name, value in experts.items() if name not in of_down}

    def run(layout):
        with jax.named_scope("experts"):
            rows, d_out = _rows(arrived, layout, how), _rows(ct, layout, how)
            kept = jax.tree.map(lambda part: part[: rows[..., 0].size].reshape(*rows.shape[:-1], -1), inner)
            d_down, d_inner = jax.vjp(
                lambda weights, kept: project_out(weights, *kept, how.activation, layout.product), of_down, kept
            )[1](d_out)
            d_of_inner, d_rows = jax.vjp(
                lambda weights, rows: project_in(weights, rows, layout.product), of_inner, rows
            )[1](d_inner)
            return {**d_down, **d_of_inner}, _slots(d_rows, layout, how)

    return *_in_layout(how, order, group_sizes, run), None, None


_expert_slots.defvjp(_forward, _backward)


def _in_layout(how: _How, order: RowOrder | None, group_sizes: Array, run: Callable):
    """``run(layout)`` in the layout that the counts allow."""

    def compact():
        product = functools.partial(grouped_product, group_sizes=group_sizes, backend=how.plan.backend)
        return run(_Layout(*(order or (None, None)), None, product))

    if not how.equal_rows:
        return compact()
    fits = jnp.all(group_sizes <= how.equal_rows)
    return lax.cond(fits, lambda: run(_equal_layout(how, order, group_sizes)), compact)


def _equal_layout(how: _How, order: RowOrder | None, group_sizes: Array) -> _Layout:
    stops = jnp.cumsum(group_sizes)
    starts = exclusive_cumsum(group_sizes)
    place = jnp.arange(how.equal_rows, dtype=jnp.int32)
    row_slot = jnp.where(place < group_sizes[:, None], starts[:, None] + place, -1)  # so far: the compact row
    row = jnp.arange(how.num_rows, dtype=jnp.int32)
    group = _compat.searchsorted(stops, row, side="right")
    equal_row = row + jnp.take(jnp.arange(starts.shape[0]) * how.equal_rows - starts, group, mode="clip")
    slot_row = jnp.where(row < stops[-1], equal_row, -1)
    if order is not None:
        row_slot = jnp.where(row_slot < 0, -1, jnp.take(order.row_slot, row_slot, mode="clip"))
        slot_row = jnp.where(order.slot_row < 0, -1, jnp.take(slot_row, order.slot_row, mode="clip"))
    return _Layout(row_slot, slot_row, 0.0, batched_product)


def _rows(slots: Array, layout: _Layout, how: _How) -> Array:
    return slots if layout.row_slot is None else pick(slots, layout.row_slot, how.plan, absent=layout.fill)


def _slots(rows: Array, layout: _Layout, how: _How) -> Array:
    flat = rows.reshape(-1, rows.shape[-1])
    return flat if layout.slot_row is None else pick(flat, layout.slot_row, how.plan)


def _kept(part: Array, how: _How) -> Array:
    """[..., F] of either layout -> [the longest of both, F]."""
    flat = part.reshape(-1, part.shape[-1])
    length = max(how.num_rows, how.equal_rows * how.plan.num_local_experts)
    return jnp.pad(flat, ((0, length - flat.shape[0]), (0, 0)))
