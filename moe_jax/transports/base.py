"""What a transport is: the object that knows how rows travel to their experts and back.

There is one class in one file for each, and one object of it for all plans: it holds no state. ``transport_of(plan)``
looks it up, and nothing else asks which one it is. What it needs to know in a round, it keeps in *maps* of its own: a
pytree of integers that everybody else only passes on.

A dispatch, round by round::

    known = transport.count(...)                 # the ranks tell each other how many rows will come
    maps  = transport.open(manifest, start, ...) # which row lies where in this round; integers only
    rows  = transport.send(...)                  # outbox -> wire -> inbox -> rows of the experts
    back  = transport.collect(...)               # rows of the experts -> what came back to the tokens
    y     = transport.finish(...)                # the weighted sum over the choices of each token

T tokens per device, C pairs of each token, W expert-parallel and P tensor-parallel ranks, L local experts, M rows of
the experts' input. A pair (t, c) has the number t * C + c; -1 stands for "none" in all maps. Arrays of pairs that have
a width are ordered by choice, then token, [C, T, ...]. A sum over the choices of a token is then a sum of C arrays in
their natural layout, while [T, C, ...] would leave most of a TPU's tiles empty.

To add a transport: write a subclass in a file of its own, ``register_transport`` an object of it, and run
``moe_jax.verify.transport_contract`` on it.
"""

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax import collectives
from moe_jax.derivatives import differentiated_as, take_rows
from moe_jax.errors import InvalidArgumentError, check_type
from moe_jax.hardware import Machine
from moe_jax.layout import PairOrder
from moe_jax.plan import Plan
from moe_jax.plan.moments import Held
from moe_jax.plan.steps import COMBINE, DISPATCH, Step
from moe_jax.plan.transport_table import add_transport, is_taken
from moe_jax.quant.base import Recipe
from moe_jax.quant.message import split_some

Array = jax.Array


class Opened(NamedTuple):
    """One round, as ``Transport.open`` returns it.

    Attributes:
      maps: the transport's own pytree of integers.
      group_sizes: [L] i32, rows of each local expert in this round.
      recv_counts: [P, W, L] i32, pairs for this rank by source, over all rounds.
    """

    maps: Any
    group_sizes: Array
    recv_counts: Array


class Delivery(NamedTuple):
    """What ``Transport.send`` brings to the experts.

    Attributes:
      tokens: [M, F], what the token of each row sent; None if tokens sent nothing.
      pairs: [M, G], what the pair of each row sent; None if pairs sent nothing.
      note: what the exchange has to say, see ``moe_jax.collectives.exchange``; () where it has nothing to say.
    """

    tokens: Array | None
    pairs: Array | None
    note: Any


class Return(NamedTuple):
    """What ``Transport.collect`` brings to the tokens.

    Attributes:
      rows: [C, T, F], or fp32 sums [T, F] of a transport that is not ``pairwise``; None if no rows were given.
      scalars: [C, T, G], zero for pairs of other rounds; None if none were given.
      note: as for ``Delivery``.
    """

    rows: Array | None
    scalars: Array | None
    note: Any


class InboxOrder(NamedTuple):
    """Which inbox slot belongs to which row, where rows are left in their slots; -1 marks "none".

    Attributes:
      row_inbox: [M] i32, the slot of each row.
      inbox_row: [P * A] i32, the row of each slot.
    """

    row_inbox: Array
    inbox_row: Array


class Transport(abc.ABC):
    """How rows travel. Others know nothing of it but the methods below.

    The abstract ones must be written. The bodies of the others fit a transport that is not ``pairwise``, whose
    rows come back as sums.

    Attributes:
      name: the name that plans have for it.
      pairwise: True: each pair of ranks exchanges rows of its own. Every row travels for itself, so that it can be
        quantised with factors of its expert and can be received into a window, and it comes back for itself, so that
        the sum over the choices of a token is made at the token. False: a token travels once for several experts, and
        the rows of a token are summed on their way back.
      takes_row_weights: whether ``collect`` also takes weights [M], one for each row.
    """

    name: ClassVar[str]
    pairwise: ClassVar[bool] = False
    takes_row_weights: ClassVar[bool] = False

    def remark(self, plan: Plan) -> str:
        """What ``describe`` says to somebody who asked for this transport on such a mesh; "" for nothing."""
        return ""

    # What it costs: whole numbers of bytes per device, from sizes alone. Read by ``plan.cost`` and ``Plan.workspace``.

    @abc.abstractmethod
    def buffers(self, plan: Plan, capacity: int) -> tuple[dict[str, int], int]:
        """What a round of ``capacity`` rows per pair of ranks takes: (bytes of buffers by purpose, entries of maps)."""

    def held(self, plan: Plan, capacity: int, platform: str) -> Held:
        """What lies in memory while the rows of a round of ``capacity`` rows per pair of ranks travel.

        ``platform`` says whose compiler places the buffers: "cpu", "gpu", "tpu" or "npu". As written here, every buffer
        is in memory on the way that it is for, and sums come back.
        """
        buffers, _ = self.buffers(plan, capacity)
        back = buffers.get("return", 0)
        arrived, out = buffers.get("inbox", 0), sum(buffers.values()) - back
        wide = 4 * plan.tokens_per_rank * plan.hidden
        return Held(
            out=out,
            arrived=arrived,
            placed=back,
            back=back + wide,
            returned=0,
            collected=wide,
            adjoint=arrived + back,
            sums=0,
            weighed=0,
        )

    @abc.abstractmethod
    def steps(self, plan: Plan, size: Any, backward: bool) -> list[Step]:
        """The steps of a round that move rows, or say where rows go and what they weigh: exchanges and passes.

        The phase of a step is "route", "dispatch" or "combine", see ``moe_jax.plan.steps``. Products are no part of
        them. ``size`` has the extents of a round, see ``moe_jax.plan.size``; ``backward`` says whether to add the
        backward pass.
        """

    def sent_rows(self, plan: Plan, capacity: int) -> int:
        """How many rows the exchange hands over in a round of ``capacity`` rows per pair of ranks."""
        return plan.ep_size * capacity

    def even_size(self, plan: Plan, size: Any) -> Any:
        """``size`` under an even load, for an exchange that follows the true counts."""
        return size

    def automatic(self, plan: Plan) -> bool:
        """Whether ``make_plan(transport="auto")`` may take it for such a mesh and machine."""
        return False

    def source_of_rates(self, machine: Machine) -> str:
        """In words, the sources of the figures of ``machine`` that the two methods below read; "" if there are none."""
        return ""

    def added_steps(self, plan: Plan, size: Any, machine: Machine, backward: bool) -> list[Step]:
        """The steps that the compiler for ``machine`` adds to ``steps``, whose arguments the others are."""
        return []

    def wire_share(self, machine: Machine) -> float:
        """The share of the rate of the link inside a node that exchanges of rows reach; see ``Collective``."""
        return 1.0

    # Before a round: who sends how much to whom, and which row lies where.

    @abc.abstractmethod
    def count(self, destination: Array, pairs: PairOrder, plan: Plan) -> tuple[PairOrder, Any]:
        """The ranks tell each other what ``open`` needs to know.

        Args:
          destination: [T * C] i32, the flat expert slot, rank * L + local expert, of every pair; -1 for none.
          pairs: the same, sorted.
          plan: static.

        Returns:
          (the pairs as ``manifest.pairs`` shall have them, a pytree of integers for ``open``).
        """

    def longest_list(self, manifest: Any, plan: Plan) -> Array:
        """The most rows that any rank of the group sends another in all rounds; the same on all ranks. i32 scalar."""
        return collectives.max_over(jnp.max(jnp.sum(manifest.send_counts, axis=1)), plan.exchange_axes)

    @abc.abstractmethod
    def open(self, manifest: Any, start: Array | int, capacity: int, plan: Plan, *, num_rows: int) -> Opened:
        """The round of the pairs at places [start, start + capacity) of every list; see ``moe_jax.layout`` for lists.

        ``start`` may be traced. ``num_rows`` is M, which must be at least the number of rows that may come.
        """

    @abc.abstractmethod
    def num_rows(self, maps: Any) -> int:
        """M, the number of rows in a round, including rows that may hold anything."""

    def with_counts(self, known: Any, recv_counts: Array) -> Any:
        """``known`` with the caller's counts [P, W, L] in place of those that it holds; unchanged if it holds none."""
        return known

    def counts_agree(self, recv_counts: Array, manifest: Any, opened_counts: Array, plan: Plan) -> Array:
        """Whether counts [P, W, L] from elsewhere are what the ranks told each other. bool scalar."""
        return jnp.all(recv_counts == opened_counts)

    # Out: tokens [T, F] -> rows [M, F].

    @abc.abstractmethod
    def send(self, tokens: Array | None, pairs: Array | None, maps: Any, plan: Plan, *, ordered: bool) -> Delivery:
        """row(t, c) = tokens[t] and pairs[c, t], for every pair of the round, as bits of any dtype.

        Args:
          tokens: [T, F]; None only for a ``pairwise`` transport, where pairs send everything.
          pairs: [C, T, G]; None if they send nothing of their own.
          maps, plan: of the round.
          ordered: True puts everything in the order of the experts; False leaves it in its inbox slot, see
            ``inbox_order``.
        """

    def inbox_order(self, maps: Any) -> InboxOrder | None:
        """The order of rows that are left in their slots; None: rows are picked in order straight away."""
        return None

    # Back: rows [M, F] -> what comes to the tokens.

    @abc.abstractmethod
    def collect(
        self,
        rows: Array | None,
        weights: Array | None,
        scalars: Array | None,
        maps: Any,
        plan: Plan,
        *,
        ordered: bool,
        recipe: Any,
    ) -> Return:
        """Brings rows and scalars back to their tokens: for every pair, or without ``pairwise`` as weighted sums.

        ``y[t] = sum over c of w[t, c] * row(t, c)`` in fp32, c ascending on each rank or node, then over those.

        Args:
          rows: [M, F]; with tp > 1 partial sums, which are added. Rows past the last one may hold anything.
          weights: [T, C] f32, or None for ones; a ``pairwise`` transport leaves them to ``finish``.
          scalars: [M, G] f32, or None.
          maps, plan: of the round.
          ordered: as in ``send``.
          recipe: how rows are rounded on their way; None: not at all.
        """

    @abc.abstractmethod
    def collect_adjoint(
        self, rows: Array, weights: Array, ct: Array, maps: Any, plan: Plan, *, ordered: bool
    ) -> tuple[Array, Array]:
        """The cotangents of rows and weights, from the cotangent of what was collected. Rounding counts as identity."""

    def together(self, earlier: Array, collected: Array, maps: Any) -> Array:
        """Joins what earlier rounds collected with what came back in this one. As written here, both are sums."""
        return earlier + collected

    def total(self, collected: Array, maps: Any) -> Array:
        """The sum with unit weights, over the choices of each token, of what this round collected: fp32 [T, F]."""
        return collected

    def present(self, maps: Any, plan: Plan) -> Array:
        """[T, C] bool, the pairs whose own rows come back to the token in this round; none where sums come back."""
        return jnp.zeros((plan.tokens_per_rank, plan.pairs_per_token), bool)

    def finish(self, collected: Array, weights: Array, travelled: Array, added: list[Array] | None) -> Array:
        """The weighted sum of rows, and of what is added beside them, over the choices of each token, k ascending.

        Args:
          collected: what ``together`` made of all rounds.
          weights: [T, C] f32.
          travelled: [T, C] bool, the pairs whose rows came back in some round.
          added: K arrays [T, H] fp32, what the k-th choice adds beside rows, before weighting; None: nothing.

        Returns:
          [T, H] fp32.
        """
        for k, term in enumerate(added or []):
            collected = collected + weights[:, k, None] * term
        return collected

    # What the edges of ``dispatch`` and ``combine`` ask of a pairwise transport; see ``moe_jax.collectives.exchange``.

    def receiving(self, maps: Any, slots: Array) -> Any:
        """Maps that send into the inbox ``slots`` of a receive window. Their note is what the slots hold afterwards."""
        raise NotImplementedError(f"{self.name} is not pairwise")

    def open_blocks(self, manifest: Any, start: Array | int, capacity: int, plan: Plan, *, num_rows: int) -> Opened:
        """``open`` with equally many slots for each rank, which a stopwatch needs."""
        raise NotImplementedError(f"{self.name} is not pairwise")

    def timed(self, maps: Any) -> Any:
        """Maps that move rows past a stopwatch, and whose note is the time; None where there are no such maps."""
        return None

    def plain(self, maps: Any) -> Any:
        """Maps without a receive window and without a stopwatch."""
        return maps


def register_transport(transport: Transport) -> None:
    """Makes a transport known to ``make_plan(transport=name)``.

    A name means one transport for good, since a plan keeps the name, and must stay the same program. To register the
    same object again does nothing.

    Raises:
      InvalidArgumentError: not a Transport, or the name is "auto" or that of another transport.

    >>> from moe_jax.transports import PADDED, register_transport
    >>> register_transport(PADDED)
    """
    check_type("transport", transport, Transport, "derive a class from moe_jax.transports.Transport and pass an object")
    if transport.name == "auto" or is_taken(transport):
        raise InvalidArgumentError(f"name={transport.name!r} of the transport is taken; choose another word")
    add_transport(transport)


# The end of the way that has inbox slots. ``maps``: has ``row_inbox`` and ``inbox_row``.


def deliver(inbox: Array, parts: Any, note: Any, maps: Any, plan: Plan, *, ordered: bool) -> Delivery:
    """What the exchange brought, with its note, on all tp ranks and, if ``ordered``, in the order of the experts."""
    with jax.named_scope("exchange"):
        inbox = collectives.gather_tp(plan, inbox)
    with jax.named_scope("permute"):
        rows = take_rows(inbox, maps.row_inbox, poison=plan.poison) if ordered else inbox
        token_rows, pair_rows = split_some(rows, parts)
        return Delivery(token_rows, pair_rows, note)


def summed_slots(arrays: list[Array | None], maps: Any, plan: Plan, *, ordered: bool) -> list[Array | None]:
    """Arrays [M, ...] of rows, back in this rank's inbox slots and summed over tp: the adjoint of ``deliver``."""
    with jax.named_scope("unpermute"):
        # Slots that no row came in hold garbage on every tp rank. That is harmless: the reduce-scatter below adds
        # slot i of one tp rank to slot i of the others, so garbage is only added to garbage, and no pair points at it.
        if ordered:
            arrays = [None if x is None else take_rows(x, maps.inbox_row, poison=plan.poison) for x in arrays]
    with jax.named_scope("exchange"):
        return [None if x is None else collectives.reduce_scatter_tp(plan, x) for x in arrays]


# Rows in the form in which they travel.


def as_sent(rows: Array, recipe: Recipe | None) -> Array:
    """Rows [n, H] as they travel: a message of codes and scales, or the rows themselves."""
    return rows if recipe is None else recipe.pack(recipe.quantize(rows))


def as_received(message: Array, recipe: Recipe | None, hidden: int) -> Array:
    """The inverse of ``as_sent``, up to what the recipe loses. Where there is a recipe, rows are fp32."""
    return message if recipe is None else recipe.dequantize(recipe.unpack(message, hidden))


def as_delivered(rows: Array, recipe: Recipe | None) -> Array:
    """Rows as the receiver sees them, in fp32 where there is a recipe. Its rounding counts as identity."""
    if recipe is None:
        return rows

    def encoded(rows):
        return as_received(as_sent(rows, recipe), recipe, rows.shape[1])

    return differentiated_as(lambda rows: rows.astype(jnp.float32), encoded, rows)


# Pairs.


def token_of(pair: Array, pairs_per_token: int) -> Array:
    """The token of each pair, -1 for none."""
    return jnp.where(pair < 0, -1, pair // pairs_per_token)


def by_token(pairs: Array) -> Array:
    """[C, T, G] -> [T, C * G]."""
    return jax.lax.collapse(jnp.swapaxes(pairs, 0, 1), 1)


def pair_weights(combine_weights: Array, plan: Plan) -> Array:
    """[T, K] -> [T, C]: the pair of a shared expert on a rank of its own has weight 1."""
    num_shared = plan.pairs_per_token - plan.top_k
    return jnp.pad(combine_weights, ((0, 0), (0, num_shared)), constant_values=1.0) if num_shared else combine_weights


def only_present(pair_rows: Array, present: Array) -> Array:
    """[C, T, H] with zeros for the pairs that are not ``present`` [T, C]."""
    return jnp.where(present.T[..., None], pair_rows, jnp.zeros((), pair_rows.dtype))


def rows_if(present: Array, rows: Array) -> Array:
    """[T, H] in fp32, with zeros for the rows that are not ``present`` [T]: those may hold anything."""
    return jnp.where(present[:, None], rows.astype(jnp.float32), 0.0)


def partial_sums(rows: Array, pair_row: Array, weights: Array | None) -> Array:
    """``sum_c weights[i, c] * rows[pair_row[i, c]]`` of the pairs that have a row here, c ascending. fp32 [..., F].

    Args:
      rows: [N, F].
      pair_row: [..., C] i32, the row of each pair, -1 for none.
      weights: [..., C] f32, or None for ones; where there is no row they may be anything, NaN included.
    """
    total = jnp.zeros((*pair_row.shape[:-1], rows.shape[1]), jnp.float32)
    for c in range(pair_row.shape[-1]):
        here = pair_row[..., c]
        term = take_rows(rows, here, absent=0).astype(jnp.float32)
        if weights is not None:
            term = jnp.where(here >= 0, weights[..., c], 0.0)[..., None] * term
        total = total + term
    return total


# Costs.


def choices_apart(plan: Plan, size: Any, tokens: int, machine: Machine, backward: bool) -> list[Step]:
    """The steps of ``partial_sums`` beside rows and sum, where the gather of each choice is a pass of its own.

    For GPUs a gather of rows becomes part of the sum. For TPUs the rows of each choice are written and read again, and
    with them the sum so far. By the compiler's prices that is one pass for each choice.
    """
    if machine.platform != "tpu":
        return []
    choices = tokens * plan.pairs_per_token
    sums = Step(COMBINE, (), choices * (2 * size.row + size.wide), launches=2 * plan.pairs_per_token)
    if not backward:
        return [sums]
    return [
        sums,
        sums._replace(phase=DISPATCH),
        Step(COMBINE, (), 2 * choices * size.row, launches=plan.pairs_per_token),
    ]
