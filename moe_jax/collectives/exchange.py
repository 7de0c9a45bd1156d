"""The exchanges: what moves rows from outbox slots to inbox slots, between the ranks along some axes.

An exchange is a pytree of integers, made for one round: a transport keeps it in its maps and asks nothing about it. It
has no derivative of its own; the functions that send and collect rows with it have one. All exchanges move rows [S, F]
to slots [A, F], and return a *note* beside them: what the exchange has to say, or ``()`` where it has nothing to say.

- ``Blocks``: every rank has equally many slots for each rank. One all_to_all.
- ``Chunks``: rows lie end to end. As many all_to_alls of chunks as the longest list needs.
- ``Slices``: rows lie end to end. One ragged_all_to_all.
- ``TimedBlocks``: blocks, one peer after the other; its note is how long this rank waited for each.
- ``Receiving``: another exchange, into slots that were there before; its note is all the slots.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from moe_jax import _compat
from moe_jax._compat import group_size
from moe_jax.collectives.bits import swap_bits, unwritten
from moe_jax.collectives.ragged import chunked_all_to_all, portable_ragged_all_to_all
from moe_jax.collectives.stopwatch import timed_all_to_all
from moe_jax.kernels.table import find_transport
from moe_jax.layout import exclusive_cumsum
from moe_jax.types import pytree

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

Array = jax.Array


class Exchange(abc.ABC):
    """What moves the rows of one round.

    Attributes:
      in_blocks: whether the outbox has equally many slots for each rank; if not, rows lie end to end.
    """

    in_blocks: ClassVar[bool]

    @abc.abstractmethod
    def move(
        self, rows: Array, num_slots: int, axes: tuple[str, ...], plan: "Plan", *, into: Array | None = None
    ) -> tuple[Array, Any]:
        """[S, F] rows for the ranks along ``axes``, those for rank 0 first -> ([A, F] by source, the note).

        Args:
          rows: [S, F].
          num_slots: A, static.
          axes: mesh axes, outermost first.
          plan: its back end may bring an exchange of its own.
          into: [A, F], the contents of slots to which no row comes; None: they may hold anything.
        """

    @abc.abstractmethod
    def back(self) -> "Exchange":
        """The exchange that takes the rows back to where they came from."""

    def plain(self) -> "Exchange":
        """The same exchange without a note."""
        return self

    def timed(self) -> "Exchange | None":
        """The same exchange with a stopwatch; None where rows do not lie in blocks."""
        return None


@pytree()
class Blocks(Exchange):
    """S = A = R * C, C slots for each of the R ranks."""

    in_blocks = True

    def move(self, rows, num_slots, axes, plan: "Plan", *, into=None):
        num_ranks = group_size(axes)
        if num_ranks == 1:
            return rows, ()
        blocks = rows.reshape(num_ranks, rows.shape[0] // num_ranks, rows.shape[1])
        swap = find_transport("padded", plan.kernels)
        moved = swap(blocks, axes) if swap else swap_bits(axes, blocks.dtype)(blocks)
        return moved.reshape(rows.shape), ()  # every slot is written, whatever ``into`` held

    def back(self):
        return self

    def timed(self):
        return TimedBlocks()


@pytree(static=("chunk",))
class Chunks(Exchange):
    """Rows lie end to end, and a chunk of each list travels at a time.

    Attributes:
      sizes: [R, R] i32, rows from each rank to each, the same everywhere.
      chunk: static, rows of each list that one all_to_all moves. The largest of ``sizes`` says how many chunks there
        are.
    """

    sizes: Array
    chunk: int

    in_blocks = False

    def move(self, rows, num_slots, axes, plan: "Plan", *, into=None):
        me = lax.axis_index(axes)
        moved = chunked_all_to_all(
            rows,
            _slots(rows, num_slots, into, plan),
            self.sizes,
            exclusive_cumsum(self.sizes[me]),
            exclusive_cumsum(self.sizes[:, me]),
            axes,
            chunk=self.chunk,
            all_to_all=find_transport("padded", plan.kernels),
        )
        return moved, ()

    def back(self):
        return dataclasses.replace(self, sizes=self.sizes.T)


@pytree()
class Slices(Exchange):
    """Rows lie end to end, and travel in one ragged exchange.

    Attributes:
      sizes: as for ``Chunks``.
    """

    sizes: Array

    in_blocks = False

    def move(self, rows, num_slots, axes, plan: "Plan", *, into=None):
        me = lax.axis_index(axes)
        send, come = self.sizes[me], self.sizes[:, me]
        first = jnp.cumsum(self.sizes, axis=0) - self.sizes  # [source, destination] inbox slot
        exchange = find_transport("ragged", plan.kernels) or portable_ragged_all_to_all
        slots = _slots(rows, num_slots, into, plan)
        return exchange(rows, slots, exclusive_cumsum(send), send, first[me], come, axis_name=axes), ()

    def back(self):
        return dataclasses.replace(self, sizes=self.sizes.T)


@pytree(static=("on_arrival",))
class TimedBlocks(Exchange):
    """``Blocks``, one peer after the other; the note is [2, R] i32, the microseconds of ``timed_all_to_all``.

    Attributes:
      on_arrival: as for ``timed_all_to_all``.
    """

    on_arrival: Callable[[Array, Array], Array] | None = None

    in_blocks = True

    def move(self, rows, num_slots, axes, plan: "Plan", *, into=None):
        num_ranks = group_size(axes)
        moved, waited = timed_all_to_all(rows.reshape(num_ranks, -1, rows.shape[1]), axes, self.on_arrival)
        return moved.reshape(rows.shape), waited

    def back(self):
        return self

    def plain(self):
        return Blocks()


@pytree()
class Receiving(Exchange):
    """Another exchange, whose rows are written into slots that exist already. The note is all of these slots.

    Attributes:
      exchange: the other exchange.
      slots: [A, F], what the slots hold before the exchange.
    """

    exchange: Exchange
    slots: Array

    in_blocks = False  # the layout of the slots has been chosen by now

    def move(self, rows, num_slots, axes, plan: "Plan", *, into=None):
        moved, _ = self.exchange.move(rows, num_slots, axes, plan, into=self.slots)
        return moved, moved

    def back(self):
        return self.exchange.back()

    def plain(self):
        return self.exchange


def _slots(rows: Array, num_slots: int, into: Array | None, plan: "Plan") -> Array:
    """[A, F]: ``into``, or slots that must be written before they are read."""
    slots = unwritten(num_slots, rows, plan) if into is None else into
    return _compat.as_varying(slots, _compat.varying_axes(rows))
