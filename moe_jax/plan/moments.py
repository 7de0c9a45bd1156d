"""The moments of a layer's programs: which arrays lie in the memory of one device at the same time, on each platform.

They were read off buffer assignments and live ranges of compiled programs. What a fusion never writes is not there, and
an array that nobody reads any more has given its place to the next.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from moe_jax.activations import Choice, activation_of
from moe_jax.kernels.table import fused_kernels
from moe_jax.plan.transport_table import transport_of

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

WIDE = 4  # bytes of an integer, of a number of a sum, and of a number in an optimiser's state
LANES = {"tpu": 128}  # numbers that the last axis of an array is filled up to


class Held(NamedTuple):
    """Bytes that lie in the memory of one device while the rows of a round travel, as their transport says.

    Attributes:
      out: while rows leave and arrive.
      arrived: what arrived, until rows are put in the order of the experts.
      placed: what the rows that the experts made are put into before they leave.
      back: while that leaves, and comes back to the tokens.
      returned: what came back, until it is put at the tokens.
      collected: what is kept at the tokens for the sum over the choices of each.
      adjoint: beside rows and their cotangents, what lies there in the backward pass of a round.
      sums: of all ranks' tokens, where they are made on every rank.
      weighed: the rows of all ranks' tokens for every choice, and their sums, where both lie there at once.
    """

    out: int
    arrived: int
    placed: int
    back: int
    returned: int
    collected: int
    adjoint: int
    sums: int
    weighed: int


class Sizes(NamedTuple):
    """Bytes of the arrays of one pass of the layer over one chunk of the tokens.

    Attributes:
      rows: [M, H], in the order of the experts.
      column: [M, F], what one projection makes.
      inner: what the activation reads, [M, F] of each projection into the hidden width.
      weight: [L, H, F], one projection's weights, in the dtype of the rows.
      projections: how many of them an expert has.
      tokens: [T, H] in the dtype of the rows.
      wide: [T, H] in fp32.
      held: what rows of the transport take while they travel, see ``Held``.
      loops: whether further rounds may follow the first, so that there are loops.
      narrow: whether the rows have 16 bits.
      cast: whether weights are cast to the dtype of the rows.
      fused: whether kernels read and write rows in their slots, and activate them too, see ``kernels.table``.
      unweighed: [M, H], rows as they came, where weights multiply what experts are given; 0 elsewhere.
    """

    rows: int
    column: int
    inner: int
    weight: int
    projections: int
    tokens: int
    wide: int
    held: Held
    loops: bool
    narrow: bool
    cast: bool
    fused: bool
    unweighed: int

    @classmethod
    def of(
        cls, plan: "Plan", ffn: int, activation: Choice, param_dtype: str, platform: str, *, weigh_inputs: bool = False
    ) -> "Sizes":
        item = jnp.dtype(plan.dtype).itemsize
        lanes = LANES.get(platform, 1)
        hidden, columns = _filled(plan.hidden, lanes), _filled(ffn // plan.tp_size, lanes)
        num_rows = plan.num_rows(plan.pair_capacity)
        projections = 3 if activation_of(activation).gated else 2
        held = transport_of(plan).held(plan, plan.pair_capacity, platform) if plan.exchanges else _held_alone(plan)
        in_slots = plan.exchanges and not held.sums and platform == plan.platform
        extents = num_rows, plan.num_local_experts, plan.hidden, ffn // plan.tp_size
        return cls(
            rows=num_rows * hidden * item,
            column=num_rows * columns * item,
            inner=(projections - 1) * num_rows * columns * item,
            weight=plan.num_local_experts * hidden * columns * item,
            projections=projections,
            tokens=plan.tokens_per_rank * hidden * item,
            wide=plan.tokens_per_rank * hidden * WIDE,
            held=held,
            loops=plan.exchanges and plan.max_rounds > 1,
            narrow=item < WIDE,
            cast=jnp.dtype(param_dtype) != jnp.dtype(plan.dtype),
            fused=in_slots and bool(fused_kernels(plan.kernels, *extents, item)),
            unweighed=num_rows * hidden * item * weigh_inputs,
        )


def forward(s: Sizes, platform: str) -> Iterator[tuple[int, str]]:
    """The moments of a round, each the bytes that lie in memory then, with what was collected in earlier rounds."""
    held, kept = s.held, s.held.collected if s.loops else 0
    casts = s.projections * s.weight if s.cast else 0
    yield kept + held.out, "rows on their way to the experts"
    if s.unweighed:
        yield kept + held.arrived + s.unweighed, "rows multiplied by their weights"
    if s.fused:
        yield kept + casts + held.arrived + s.column, "the first products of the experts, and the activation"
        yield kept + casts + s.column + held.placed, "the last product of the experts"
    else:
        yield kept + held.arrived + s.rows, "rows put in the order of the experts"
        yield kept + casts + s.rows + s.inner, "the first products of the experts"
        yield kept + casts + s.inner + s.column, "the activation"
        yield kept + casts + s.column + s.rows, "the last product of the experts"
        yield kept + s.rows + held.placed, "rows put where they leave from"
    yield kept + held.back, "rows on their way back"
    yield kept + held.returned + held.collected, "rows at their tokens"
    yield kept + held.weighed, "rows weighted and summed"
    if platform == "cpu":
        # XLA:CPU multiplies in fp32, so it keeps wide copies of weights and rows, and it fills every result with zeros
        # before a loop writes it.
        wide = 2 * s.projections * s.weight if s.narrow else 0
        rows = 3 * s.rows if s.narrow else 2 * s.rows
        yield held.collected + wide + rows + s.inner + s.column, "the products of the experts"
        yield wide + s.rows + s.inner + held.back, "rows on their way back"


def backward(s: Sizes, platform: str) -> Iterator[tuple[int, str]]:
    """The moments of a forward and a backward pass, each the bytes that lie in memory beside arguments and results.

    Gradients of parameters are not in them: they lie in the results. Nor are rows as they came, without their weights,
    which stay throughout.
    """
    held, kept = s.held, kept_bytes(s)
    base = s.wide + s.tokens  # the cotangent that all rounds read, and the router's part of that of the tokens
    casts = s.projections * s.weight if s.cast else 0
    for size, moment in forward(s, platform):
        yield kept - s.held.collected * s.loops + size, f"forward, kept rows beside it: {moment}"
    if platform == "tpu":  # where the backward pass begins before the further rounds of the forward pass
        yield kept + s.rows + s.column + held.out, "forward, cotangents beside it: rows on their way to the experts"
    yield base + kept + held.back, "the cotangents of rows on their way to the experts"
    both = 2 * s.rows + held.adjoint
    yield base + casts + both + 2 * s.inner, "the backward pass of the activation"
    if s.loops:  # where the first round writes its gradients into the results, further ones make and add theirs
        more = s.weight * (2 if s.cast else 1)
        yield base + more + both + s.inner + s.column, "the gradient of the experts' weights in a further round"
    if held.sums:  # those that came out of the experts, and of cotangents, beside the rows that they are made of
        yield 4 * s.rows + s.inner + s.column + 2 * held.sums, "the sums of the cotangents of the tokens"
    if held.weighed:
        yield s.tokens + 3 * s.rows + held.weighed, "the gradient of the weights of choices"
    if platform == "cpu":
        wide = 2 * s.projections * s.weight if s.narrow else 0
        rows = held.adjoint + (7 * s.rows if s.narrow else 4 * s.rows)
        gradients = s.projections * s.weight if s.loops else 0  # of a further round
        size = gradients + wide + rows + s.inner + s.column + 2 * s.wide + kept
        yield size, "the gradients of the experts"


def kept_bytes(s: Sizes) -> int:
    """What one layer keeps from its forward to its backward pass, but for parameters, its input and ``unweighed``."""
    return s.rows + s.inner + s.held.collected


def _held_alone(plan: "Plan") -> Held:
    """Of a device that holds all experts: rows are gathered from the tokens, and come back by choice."""
    pairs = plan.num_pairs * plan.hidden * jnp.dtype(plan.dtype).itemsize
    return Held(out=0, arrived=0, placed=0, back=0, returned=0, collected=pairs, adjoint=0, sums=0, weighed=0)


def _filled(extent: int, lanes: int) -> int:
    """The extent of a last axis, filled up to whole tiles."""
    return -(-extent // lanes) * lanes
