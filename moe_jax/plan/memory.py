"""Will it fit: what one device holds at the largest moment of the layer, of all layers, and of ``dispatch`` alone.

The programs are those of ``moe_on_mesh`` and ``dispatch``. ``moments`` says what lies in memory at the same time while
they run, and the transport says it of rows while they travel (``Transport.held``). Tests compare all of it with the
compilers' own figures, in ``tests/data/compiled_memory.json``.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.activations import Choice, activation_of, check_activation
from moe_jax.errors import (
    InvalidArgumentError,
    MemoryLimitError,
    UnsupportedError,
    check_choice,
    check_count,
    check_flag,
)
from moe_jax.hardware import Machine, find_machine
from moe_jax.kernels import FLOAT_DTYPES
from moe_jax.parameters import TABLE
from moe_jax.plan.checks import check_shared, width_of_shared
from moe_jax.plan.moments import WIDE, Sizes, backward, forward, kept_bytes
from moe_jax.plan.size import balanced_rows
from moe_jax.plan.transport_table import transport_of

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

CALLS = ("layer", "dispatch")
OPTIMIZERS = {"none": 0, "sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}  # fp32 numbers kept for each parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """The arguments of ``Plan.memory``, which says more of each.

    Attributes:
      ffn: the width of an expert.
      activation: that of the experts.
      layers: layers that are in memory together.
      optimizer: whose state is kept.
      param_dtype: of the parameters.
      remat: whether a layer is computed again in the backward pass.
      call: "layer" or "dispatch".
      chunks: parts in which the tokens pass.
      hardware: the machine; None: the plan's.
      shared_ffn, shared_activation: of the shared expert; None: as for ``moe_on_mesh``.
      weigh_inputs: whether weights multiply what experts are given.
    """

    ffn: int
    activation: Choice
    layers: int
    optimizer: str
    param_dtype: str
    remat: bool
    call: str
    chunks: int
    hardware: Machine | str | None
    shared_ffn: int | None
    shared_activation: Choice | None
    weigh_inputs: bool

    @property
    def activation_of_shared(self) -> Choice:
        """That of the shared expert."""
        return self.activation if self.shared_activation is None else self.shared_activation

    def width_of_shared(self, plan: "Plan") -> int:
        """The width of the shared expert of ``plan``; 0 where there is none."""
        return width_of_shared(plan, self.ffn, self.shared_ffn)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program on one device, in bytes, as ``jax.stages.Compiled.memory_analysis`` counts.

    Attributes:
      arguments: parameters, tokens and, with the backward pass, the cotangent of the result.
      results: what the program returns; with the backward pass gradients too.
      temporaries: everything else, at the largest moment.
      moment: what happens then.
    """

    arguments: int
    results: int
    temporaries: int
    moment: str

    @property
    def total(self) -> int:
        """What the program needs to run."""
        return self.arguments + self.results + self.temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What one device holds, in bytes.

    ``peak`` is the largest moment: in training everything that is kept for all layers, and the backward pass of one; in
    inference the weights of all layers and the forward pass of one; of ``dispatch`` alone the call itself. Attention,
    embeddings, dense layers and what the runtime takes for itself are not in it.

    Attributes:
      machine: whose compiler places the arrays.
      plan: of the layer.
      call: "layer" or "dispatch".
      layers: how many layers ``weights``, ``gradients``, ``optimizer`` and ``activations`` are of.
      weights: parameters.
      gradients: of the parameters, in their dtype; 0 in inference.
      optimizer: the optimiser's state.
      activations: what the layers keep from their forward to their backward passes; with ``remat`` their inputs alone.
      receive: the receive buffers of one layer, into which rows from all ranks come.
      forward: the program of one layer's forward pass, or of the call of ``dispatch``.
      backward: the program of one layer's forward and backward pass; None in inference and for ``dispatch``.
      peak: the largest moment.
      moment: what happens then.
      question: what these are the answer to.
    """

    machine: Machine
    plan: "Plan"
    call: str
    layers: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    receive: int
    forward: Program
    backward: Program | None
    peak: int
    moment: str
    question: Question = dataclasses.field(repr=False)

    def fits(self, machine: Machine | str | None = None) -> bool:
        """Whether the largest moment fits the memory of a device of ``machine``; None: of the one that was asked for.

        A name or a path finds another machine, whose memory alone is read.
        """
        return self.peak <= _machine(machine, self.machine).memory_bytes

    def check_fits(self, machine: Machine | str | None = None) -> None:
        """Raises MemoryLimitError where it does not fit; the text names the smallest change that would do.

        Nothing is compiled for that.
        """
        found = _machine(machine, self.machine)
        if not self.fits(found):
            raise self.refusal(found, self.smallest_change(found))

    def smallest_change(self, machine: Machine | str | None = None) -> str:
        """In words the first of the small changes after which it fits; "it fits" where it does.

        Tried are ``remat=True``, a capacity factor of 1, more chunks, a larger ep, a larger tp and fewer tokens, twice
        as many of each before four times as many, and each by itself before the same with ``remat=True`` beside it.
        The plan's transport is kept; "auto" may take another one after the change, and with it other memory.
        """
        found = _machine(machine, self.machine)
        return "it fits" if self.fits(found) else smallest_change(self, found, lambda change: change.memory)

    def refusal(self, machine: Machine, change: str) -> MemoryLimitError:
        """What says that it does not fit ``machine``, and that ``change`` would help."""
        return MemoryLimitError(
            f"{self.moment} takes {self.peak / 1e9:.2f} GB per device, and one of {machine.name} has "
            f"{machine.memory_bytes / 1e9:.2f} GB; {change}"
        )


def plan_memory(plan: "Plan", asked: Question) -> Memory:
    """``Plan.memory``: checks the arguments, and counts."""
    check_choice("call", asked.call, CALLS)
    check_count("ffn", asked.ffn, low=0)
    check_activation(asked.activation)
    check_shared(plan, asked.shared_ffn, asked.shared_activation)
    check_count("layers", asked.layers)
    check_choice("optimizer", asked.optimizer, OPTIMIZERS)
    check_choice("param_dtype", asked.param_dtype, FLOAT_DTYPES)
    check_flag("remat", asked.remat)
    check_flag("weigh_inputs", asked.weigh_inputs)
    check_count("chunks", asked.chunks)
    if asked.ffn % plan.tp_size:
        raise InvalidArgumentError(f"ffn={asked.ffn} must be divisible by tp={plan.tp_size}")
    if plan.tokens_per_rank % asked.chunks:
        raise InvalidArgumentError(
            f"chunks={asked.chunks} does not divide tokens_per_rank={plan.tokens_per_rank}; take a divisor"
        )
    machine = _machine(asked.hardware, plan.hardware)
    if asked.call == "dispatch":
        return _of_dispatch(plan, machine, asked)
    if plan.num_shared_ranks:
        raise UnsupportedError(
            f"num_shared_ranks={plan.num_shared_ranks}: the layer computes shared experts beside the exchange, and "
            "its memory is that of a plan with num_shared_ranks=0; call='dispatch' has that of the operator"
        )
    return _of_layer(plan, machine, asked)


def _machine(asked: Machine | str | None, default: Machine) -> Machine:
    """The machine of a name, a path or itself; None: ``default``."""
    if asked is None:
        return default
    return asked if isinstance(asked, Machine) else find_machine(asked)


def _parameter_extents(plan: "Plan", asked: Question) -> dict[str, int]:
    """The number of parameters on one device, by the name of each that the layer always has."""
    facts = {
        "gated": activation_of(asked.activation).gated,
        "shared_gated": activation_of(asked.activation_of_shared).gated,
        "shared": plan.num_shared_experts > 0,
        "constants": plan.num_const_experts > 0,
    }
    hold = {fact for fact, holds in facts.items() if holds}
    extents = {
        "ids": plan.num_ids,
        "hidden": plan.hidden,
        "router_hidden": plan.hidden,
        "expert_hidden": plan.hidden // plan.num_param_shards,
        "experts": plan.num_local_experts,
        "ffn": asked.ffn // plan.tp_size,
        "shared_ffn": asked.width_of_shared(plan),
        "constants": plan.num_const_experts,
    }
    return {
        row.name: math.prod(extents[dim] for dim in row.dims) for row in TABLE if row.needs <= hold and not row.optional
    }


def _of_layer(plan: "Plan", machine: Machine, asked: Question) -> Memory:
    """The memory of ``asked.layers`` layers."""
    ffn, layers, chunks = asked.ffn, asked.layers, asked.chunks
    extents = _parameter_extents(plan, asked)
    item = jnp.dtype(asked.param_dtype).itemsize
    # 1. What all layers keep.
    one_layer = sum(extents.values()) * item
    train = asked.optimizer != "none"
    chunk = _chunk_of(plan, chunks)
    s = Sizes.of(chunk, ffn, asked.activation, asked.param_dtype, machine.platform, weigh_inputs=asked.weigh_inputs)
    shared = plan.tokens_per_rank * asked.width_of_shared(plan) * jnp.dtype(plan.dtype).itemsize
    kept = _kept(plan, asked, s)
    # 2. The programs of one layer. Chunks keep what they keep side by side, and while one is multiplied, the next one
    #    travels. Each makes gradients of all weights, which are added in the end.
    tokens = plan.tokens_per_rank * plan.hidden * jnp.dtype(plan.dtype).itemsize
    stats = WIDE * (plan.num_ids + 8)
    router = 4 * WIDE * plan.tokens_per_rank * plan.num_ids + _router_cast(plan, asked) + _integers(plan)
    travelling = s.held.out if chunks > 1 else 0
    # Weights of which a device holds a part are there whole for as long as a layer runs, and so are their gradients.
    gathered = s.projections * s.weight if plan.num_param_shards > 1 else 0
    others = (chunks - 1) * s.held.collected + travelling + router + gathered
    temporaries, moment = max(forward(s, machine.platform))
    forward_program = Program(
        arguments=one_layer + tokens, results=tokens + stats, temporaries=temporaries + others, moment=moment
    )
    backward_program = None
    if train:
        gradients = s.projections * s.weight if chunks > 1 else 0
        others = max((chunks - 1) * kept_bytes(s) + travelling, gradients) + router + _projections(asked) * shared
        others += 2 * gathered + chunks * s.unweighed
        temporaries, moment = max(backward(s, machine.platform))
        backward_program = Program(
            arguments=one_layer + 2 * tokens,
            results=one_layer + 2 * tokens + stats,
            temporaries=temporaries + others,
            moment=moment,
        )
    # 3. The largest moment: the backward pass of the last layer, while all others still keep theirs.
    state = layers * sum(extents.values()) * WIDE * OPTIMIZERS[asked.optimizer]
    weights, gradients = layers * one_layer, layers * one_layer * train
    activations = layers * kept * train
    if backward_program is None:
        peak = weights + forward_program.total - one_layer
        moment = f"inference of {layers} layers ({forward_program.moment})"
    else:
        before = activations - kept * (not asked.remat)
        peak = weights + gradients + state + before + backward_program.total - 2 * one_layer
        moment = f"training of {layers} layers ({backward_program.moment})"
    return Memory(
        machine=machine,
        plan=plan,
        call=asked.call,
        layers=layers,
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=activations,
        receive=s.held.arrived,
        forward=forward_program,
        backward=backward_program,
        peak=peak,
        moment=moment,
        question=asked,
    )


def _of_dispatch(plan: "Plan", machine: Machine, asked: Question) -> Memory:
    """The memory of one call of ``dispatch``, which has room for the worst skew."""
    row = plan.hidden * jnp.dtype(plan.dtype).itemsize
    held = transport_of(plan).held(plan, plan.dispatch_capacity, machine.platform)
    results = plan.num_rows(plan.dispatch_capacity) * row
    program = Program(
        arguments=plan.tokens_per_rank * (row + WIDE * plan.top_k),
        results=results,
        temporaries=held.out + _integers(plan),
        moment="rows on their way to the experts",
    )
    return Memory(
        machine=machine,
        plan=plan,
        call="dispatch",
        layers=1,
        weights=0,
        gradients=0,
        optimizer=0,
        activations=0,
        receive=held.arrived,
        forward=program,
        backward=None,
        peak=program.total,
        moment=f"dispatch alone ({program.moment})",
        question=asked,
    )


def _kept(plan: "Plan", asked: Question, s: Sizes) -> int:
    """What one layer keeps from its forward to its backward pass: the residuals of its rules, but for parameters."""
    tokens, item = plan.tokens_per_rank, jnp.dtype(plan.dtype).itemsize
    inputs = tokens * plan.hidden * item
    if asked.remat:
        return inputs
    # The router reads tokens in fp32. A transport that sums rows on their way back keeps them for the gradient of the
    # weights of choices.
    router = WIDE * tokens * (plan.num_ids + 8 * plan.top_k + plan.hidden * s.narrow) + _router_cast(plan, asked)
    rows = asked.chunks * (kept_bytes(s) + s.rows * (plan.exchanges and not transport_of(plan).pairwise))
    if asked.weigh_inputs:  # a row and its weight are multiplied in fp32, and both are kept so
        chunk = _chunk_of(plan, asked.chunks)
        weights = chunk.num_rows(chunk.pair_capacity)
        rows += asked.chunks * (s.unweighed * (2 if s.narrow else 1) + WIDE * weights) + 2 * WIDE * tokens * plan.top_k
    # The shared expert is differentiated by JAX, which keeps every step of the activation.
    width = asked.width_of_shared(plan)
    shared = tokens * width * (_steps_bytes(asked.activation_of_shared) + item)
    casts = _projections(asked) * plan.hidden * width * item if s.cast else 0
    return inputs + router + rows + shared + casts + _integers(plan)


def _projections(asked: Question) -> int:
    """How many projections the shared expert has."""
    return 3 if activation_of(asked.activation_of_shared).gated else 2


def _steps_bytes(activation: Choice) -> int:
    """Bytes that JAX keeps of each entry that goes through the activation: its steps, but no scalars."""
    function, gated, _ = activation_of(activation)
    inputs = [jax.ShapeDtypeStruct((1, 2), jnp.float32)] * (2 if gated else 1)
    kept = jax.eval_shape(lambda *inputs: jax.vjp(function, *inputs)[1], *inputs)
    return sum(array.dtype.itemsize for array in jax.tree.leaves(kept) if array.shape)


def _integers(plan: "Plan") -> int:
    """What layouts of a round of the layer take."""
    return plan.workspace()["integers"]


def _router_cast(plan: "Plan", asked: Question) -> int:
    """The router's parameters in fp32, in which it computes, where they are something else."""
    return 0 if asked.param_dtype == "float32" else WIDE * plan.hidden * plan.num_ids


def _chunk_of(plan: "Plan", chunks: int) -> "Plan":
    """The plan of one chunk of the tokens."""
    return dataclasses.replace(
        plan, tokens_per_rank=plan.tokens_per_rank // chunks, pair_capacity=-(-plan.pair_capacity // chunks)
    )


# Changes that may help.


class Change(NamedTuple):
    """One thing that may be changed, and perhaps remat beside it.

    Attributes:
      name: "remat", "capacity_factor", "chunks", "ep", "tp" or "tokens_per_rank".
      value: what it becomes.
      memory: afterwards, on the plan with its transport and the order of its axes kept.
    """

    name: str
    value: float
    memory: Memory

    def words(self, before: Memory) -> str:
        """What is other than ``before``: "remat=True and ep=128"."""
        beside = self.name != "remat" and self.memory.question.remat and not before.question.remat
        return f"{'remat=True and ' if beside else ''}{self.name}={self.value}"


def smallest_change(before: Memory, machine: Machine, memory_of: Callable[[Change], Memory | None]) -> str:
    """``Memory.smallest_change``, where ``memory_of`` says what a change comes to; None: it cannot be made."""
    for change in _changes(before):
        after = memory_of(change)
        if after is not None and after.fits(machine):
            return f"it fits with {change.words(before)}: {after.peak / 1e9:.2f} GB"
    return (
        "none of remat=True, capacity_factor=1.0, more chunks, a larger ep or tp and fewer tokens, by a factor of "
        "up to 64, makes it fit: take a smaller model, or a machine with more memory"
    )


def _changes(memory: Memory) -> Iterator[Change]:
    """What could be changed: smaller changes first."""
    plan, asked = memory.plan, memory.question
    questions = [asked]
    if memory.backward is not None and not asked.remat:
        questions.append(dataclasses.replace(asked, remat=True))
        yield Change("remat", True, plan_memory(plan, questions[-1]))
    for factor in (1, 2, 4, 8, 16, 32, 64):
        for question in questions:
            yield from _single_changes(plan, question, factor)


def _single_changes(plan: "Plan", asked: Question, factor: int) -> Iterator[Change]:
    """Those of one thing by ``factor``; by 1, that which changes no size."""
    if factor == 1:
        balanced = math.ceil(balanced_rows(plan.tokens_per_rank, plan.top_k, plan.ep_size, plan.num_shared_ranks))
        if 0 < balanced < plan.pair_capacity:
            even = dataclasses.replace(plan, pair_capacity=balanced)
            yield Change("capacity_factor", 1.0, plan_memory(even, asked))
        return
    if asked.call == "layer" and plan.tokens_per_rank % (factor * asked.chunks) == 0:
        more = dataclasses.replace(asked, chunks=factor * asked.chunks)
        yield Change("chunks", more.chunks, plan_memory(plan, more))
    if plan.num_shared_ranks == 0 and plan.num_experts % (factor * plan.ep_size) == 0:
        wider = _resized(plan, ep_size=factor * plan.ep_size)
        yield Change("ep", wider.ep_size, plan_memory(wider, asked))
    if plan.tp_axis is not None and asked.ffn % (factor * plan.tp_size) == 0:
        wider = _resized(plan, tp_size=factor * plan.tp_size)
        yield Change("tp", wider.tp_size, plan_memory(wider, asked))
    if plan.tokens_per_rank >= factor * asked.chunks and plan.tokens_per_rank % (factor * asked.chunks) == 0:
        fewer = _resized(plan, tokens_per_rank=plan.tokens_per_rank // factor)
        yield Change("tokens_per_rank", fewer.tokens_per_rank, plan_memory(fewer, asked))


def _resized(plan: "Plan", **sizes: int) -> "Plan":
    """``plan`` with other sizes, and as much slack in its capacity: by proportion, and by what chance needs."""
    resized = dataclasses.replace(plan, **sizes)
    before, after = (balanced_rows(p.tokens_per_rank, p.top_k, p.ep_size, p.num_shared_ranks) for p in (plan, resized))
    capacity = math.ceil(plan.pair_capacity * after / before) if before else 1
    if not plan.exchanges:  # all rows were there, so it had no slack
        capacity = math.ceil(1.25 * after)
    if not plan.exchanges or plan.pair_capacity >= before + 4 * math.sqrt(before):
        capacity = max(capacity, math.ceil(after + 4 * math.sqrt(after)))
    if not resized.exchanges:
        capacity = resized.max_pair_rows
    return dataclasses.replace(resized, pair_capacity=max(1, min(capacity, resized.max_pair_rows)))
