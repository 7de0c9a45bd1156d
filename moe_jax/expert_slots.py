"""From what arrived to what goes back: rows picked out of arrival slots, through their experts, and into slots again.

Nothing here communicates. Rows lie in one of two layouts, which the counts decide at run time: *compact*, group after
group, for any counts; or *equal*, S rows for each expert, zeros where there are fewer, if no expert has more and most
are there. In the latter each projection is one batched product, which some back ends run much faster than a grouped
one, but which multiplies the zeros too. S is the even load, so the backward pass keeps the rows and inner activations
of an even load, and computes those beyond it again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat, comm
from moe_jax.derivatives import custom_gradient, differentiated_as, take_rows
from moe_jax.experts import activate, batched_product, grouped_product, project_in, project_out
from moe_jax.layout import exclusive_cumsum, searchsorted
from moe_jax.movement import RowOrder, pick, pick_pieces
from moe_jax.plan import Plan

Array = jax.Array
Pieces = tuple[Array, ...]  # of slots, see comm.cut_pieces


class _How(NamedTuple):
    """What is static."""

    plan: Plan
    activation: str
    equal_rows: int  # S; 0: always compact
    num_rows: int  # M
    num_pieces: int  # in which slots come and go
    dtype: Any  # of slots

    @property
    def num_kept(self) -> int:
        """Rows that the backward pass keeps with their inner activations; of the others, at most M - that, the rows."""
        return self.equal_rows * self.plan.num_local_experts or self.num_rows


class _Kept(NamedTuple):
    """What the forward pass leaves for the backward pass, in the layout that it took."""

    rows: Array  # [num_kept, H]
    inner: tuple[Array | None, Array]  # gate and up, [num_kept, F]
    tail: Array  # [M - num_kept, H] the rows that follow in the compact layout


class _Layout(NamedTuple):
    """Where rows lie and how they are multiplied."""

    row_slot: Array | None  # slot of each row, in the shape of the rows without H; -1 for none; None: rows are slots
    slot_row: Array | None  # [A] row of each slot, as a flat index
    fill: float | None  # of rows without a slot; None: anything
    product: Callable
    keep: Callable  # (rows, inner) -> _Kept
    restore: Callable  # (experts, _Kept) -> (rows, inner)


def expert_slots(
    experts: dict[str, Array],
    arrived: Array,
    order: RowOrder | None,
    group_sizes: Array,
    plan: Plan,
    *,
    activation: str,
    equal_rows: int,
) -> Array:
    """What the experts make of the rows that arrived, each in the slot that its row came in.

    Args:
      experts: w_gate (if gated) and w_up [L, H, F], w_down [L, F, H]; optional b_gate, b_up [L, F], b_down [L, H].
      arrived: [A, H]; slots that no row came in influence nothing.
      order: of the rows; None: they lie in order already, expert by expert from the first slot on.
      group_sizes: [L] i32, rows of each expert.
      plan, activation: static.
      equal_rows: S, rows of an expert in a batched product, with S * L at most M; 0: there is none.

    Returns:
      [A, H] in the dtype of ``arrived``. Differentiable in ``experts`` and ``arrived``.
    """
    how = _how(plan, activation, equal_rows, arrived, order)
    return _expert_slots(how, experts, arrived, order, group_sizes)


@functools.partial(custom_gradient, num_static=1)
def _expert_slots(how, experts, arrived, order, group_sizes):
    pieces = comm.cut_pieces(arrived, how.num_pieces)
    made = _in_layout(how, order, group_sizes, lambda layout: _through(how, experts, pieces, layout)[0])
    return comm.join_pieces(made, arrived.dtype)


def _through(how: _How, experts: dict[str, Array], arrived: Pieces, layout: _Layout) -> tuple[Pieces, _Kept]:
    """What the experts make of what arrived, and what the backward pass needs."""
    rows = _rows(arrived, layout, how)
    inner = project_in(experts, rows, layout.product)
    made = project_out(experts, activate(*inner, how.activation), layout.product)
    return _slots(made, layout, how), layout.keep(rows, inner)


def _forward(how, experts, arrived, order, group_sizes):
    made, kept = _whole(_make, how, experts, arrived, order, group_sizes)
    return made, (experts, kept, order, group_sizes)


def _make(how, experts, arrived, order, group_sizes):
    pieces = comm.cut_pieces(arrived, how.num_pieces)
    made, kept = _in_layout(how, order, group_sizes, functools.partial(_through, how, experts, pieces))
    return comm.join_pieces(made, arrived.dtype), kept


def _backward(how, residuals, ct):
    return *_whole(_pull, how, *residuals, ct), None, None


def _pull(how, experts, kept, order, group_sizes, ct):
    pieces = comm.cut_pieces(ct, how.num_pieces)

    def run(layout):
        rows, inner = layout.restore(experts, kept)
        return _gradients(how, experts, rows, inner, pieces, layout)

    d_experts, d_arrived = _in_layout(how, order, group_sizes, run)
    return d_experts, comm.join_pieces(d_arrived, ct.dtype)


def _whole(function: Callable, how: _How, *operands) -> Any:
    """``function(how, *operands)``. Pieces may be bits; what is differentiated has one piece, of numbers."""
    if how.num_pieces == 1:
        return function(how, *operands)
    plain = functools.partial(function, how._replace(num_pieces=1))
    return differentiated_as(plain, functools.partial(function, how), *operands)


def _gradients(how: _How, experts, rows: Array, inner, ct: Pieces, layout: _Layout) -> tuple[dict, Pieces]:
    """Of the experts, and of what arrived, from that of what they made."""
    of_out = {name: value for name, value in experts.items() if name.endswith("_down")}
    of_inner = {name: value for name, value in experts.items() if name not in of_out}
    hidden, pull_hidden = jax.vjp(lambda inner: activate(*inner, how.activation), inner)
    pull_out = jax.vjp(lambda *operands: project_out(*operands, layout.product), of_out, hidden)[1]
    d_of_out, d_hidden = pull_out(_rows(ct, layout, how))
    (d_inner,) = pull_hidden(d_hidden)
    pull_in = jax.vjp(lambda *operands: project_in(*operands, layout.product), of_inner, rows)[1]
    d_of_inner, d_rows = pull_in(d_inner)
    return {**d_of_out, **d_of_inner}, _slots(d_rows, layout, how)


_expert_slots.defvjp(_forward, _backward)


def overflow_slots(
    experts: dict[str, Array],
    arrived: Array,
    order: RowOrder | None,
    group_sizes: Array,
    plan: Plan,
    *,
    activation: str,
) -> Array:
    """As ``expert_slots`` in the compact layout; ``arrived`` itself where no row came."""
    how = _how(plan, activation, 0, arrived, order)

    def run(arrived, experts):
        return _through(how, experts, arrived, _compact(how, order, group_sizes))[0]

    made = _if_any(group_sizes, run, comm.cut_pieces(arrived, how.num_pieces), experts)
    return comm.join_pieces(made, arrived.dtype)


def add_overflow_gradients(
    grads: dict[str, Array],
    experts: dict[str, Array],
    arrived: Array,
    ct: Array,
    order: RowOrder | None,
    group_sizes: Array,
    plan: Plan,
    *,
    activation: str,
) -> tuple[dict[str, Array], Array]:
    """``grads`` of the experts plus those of ``overflow_slots``, and the cotangent of ``arrived``.

    ``ct``: of the result. Where no row came, ``grads`` and ``ct`` themselves. Inner activations are computed again.
    """
    how = _how(plan, activation, 0, arrived, order)

    def run(carry, read):
        (grads, ct), (experts, arrived) = carry, read
        layout = _compact(how, order, group_sizes)
        rows = _rows(arrived, layout, how)
        more, d_arrived = _gradients(how, experts, rows, project_in(experts, rows, layout.product), ct, layout)
        return jax.tree.map(jnp.add, grads, more), d_arrived

    ct, arrived_pieces = (comm.cut_pieces(slots, how.num_pieces) for slots in (ct, arrived))
    grads, d_arrived = _if_any(group_sizes, run, (grads, ct), (experts, arrived_pieces))
    return grads, comm.join_pieces(d_arrived, arrived.dtype)


def _how(plan: Plan, activation: str, equal_rows: int, arrived: Array, order: RowOrder | None) -> _How:
    """``equal_rows`` as for ``expert_slots``. Rows that a recipe turns into messages, or tp ranks sum, are not cut."""
    as_they_are = plan.dispatch_recipe is plan.combine_recipe is plan.backward_recipe is None and plan.tp_size == 1
    num_rows, num_pieces = arrived.shape[0], 1
    if order is not None:
        num_rows, num_pieces = order.row_slot.shape[0], plan.num_pieces if as_they_are else 1
    return _How(plan, activation, equal_rows, num_rows, num_pieces, arrived.dtype)


def _if_any(group_sizes: Array, run: Callable, init: Any, read: Any) -> Any:
    """``run(init, read)`` where there are rows, else ``init``.

    A loop of one turn or none: it works in place, where a conditional would copy what it lets pass.
    """
    with jax.named_scope("experts"):
        init, read = _compat.as_varying((init, read), _compat.union_of_varying_axes((init, read, group_sizes)))
        turns = jnp.any(group_sizes > 0).astype(jnp.int32)
        return lax.fori_loop(0, turns, lambda turn, carry: run(carry, _compat.late(turn, read)), init)


def _in_layout(how: _How, order: RowOrder | None, group_sizes: Array, run: Callable) -> Any:
    """``run(layout)`` in the layout that the counts allow."""
    with jax.named_scope("experts"):
        if not how.equal_rows:
            return run(_compact(how, order, group_sizes))
        fits = jnp.all(group_sizes <= how.equal_rows)
        pays = 3 * jnp.sum(group_sizes) >= 2 * how.equal_rows * how.plan.num_local_experts
        return lax.cond(
            fits & pays, lambda: run(_equal(how, order, group_sizes)), lambda: run(_compact(how, order, group_sizes))
        )


def _compact(how: _How, order: RowOrder | None, group_sizes: Array) -> _Layout:
    def product(sizes):
        return functools.partial(grouped_product, group_sizes=sizes, backend=how.plan.backend)

    def keep(rows, inner):
        front = jax.tree.map(lambda part: part[: how.num_kept], (rows, inner))
        return _Kept(*front, rows[how.num_kept :])

    def restore(weights, kept):
        if how.num_kept == how.num_rows:
            return kept.rows, kept.inner
        past = jnp.maximum(jnp.cumsum(group_sizes) - how.num_kept, 0)
        inner = project_in(weights, kept.tail, product(jnp.diff(past, prepend=0)))
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), (kept.rows, kept.inner), (kept.tail, inner))

    row_slot, slot_row = order or (None, None)
    return _Layout(row_slot, slot_row, None, product(group_sizes), keep, restore)


def _equal(how: _How, order: RowOrder | None, group_sizes: Array) -> _Layout:
    groups, each = how.plan.num_local_experts, how.equal_rows
    stops, starts = jnp.cumsum(group_sizes), exclusive_cumsum(group_sizes)
    place = jnp.arange(each, dtype=jnp.int32)
    row_slot = jnp.where(place < group_sizes[:, None], starts[:, None] + place, -1)  # so far: the compact row
    row = jnp.arange(how.num_rows, dtype=jnp.int32)
    group = searchsorted(stops, row, side="right")
    shift = each * jnp.arange(groups, dtype=jnp.int32) - starts
    slot_row = jnp.where(row < stops[-1], row + jnp.take(shift, group, mode="clip"), -1)
    if order is not None:
        row_slot = take_rows(order.row_slot, row_slot, absent=-1)
        slot_row = take_rows(slot_row, order.slot_row, absent=-1)

    def keep(rows, inner):
        rows, inner = jax.tree.map(lambda part: part.reshape(how.num_kept, part.shape[-1]), (rows, inner))
        return _Kept(rows, inner, jnp.zeros_like(rows, shape=(how.num_rows - how.num_kept, rows.shape[1])))

    def restore(weights, kept):
        del weights
        return jax.tree.map(lambda part: part.reshape(groups, each, part.shape[-1]), (kept.rows, kept.inner))

    return _Layout(row_slot, slot_row, 0.0, batched_product, keep, restore)


def _rows(pieces: Pieces, layout: _Layout, how: _How) -> Array:
    slots = comm.join_pieces(pieces, how.dtype)
    return slots if layout.row_slot is None else pick(slots, layout.row_slot, how.plan, absent=layout.fill)


def _slots(rows: Array, layout: _Layout, how: _How) -> Pieces:
    flat = lax.collapse(rows, 0, rows.ndim - 1)
    if layout.slot_row is None:
        return (flat,)
    return pick_pieces(flat, layout.slot_row, how.plan, how.num_pieces)
