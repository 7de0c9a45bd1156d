"""What a compiled program contains, read off the optimised HLO: its collectives with their bytes, scatters, memory.

It is for tests of your own training step: ``assert_hlo_contract`` fails when an exchange, a scatter or a buffer too
many crept into the program. All figures are per device and per execution of an instruction: an instruction that stands
in a loop counts once, and is marked.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moe_jax._compat import jitted
from moe_jax.errors import InvalidArgumentError, UnsupportedError, check_choice, check_count, check_flag
from moe_jax.hlo.text import COLLECTIVES, Instruction, Program, is_float, num_bytes, shapes

_LARGEST = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction.

    ``wire_bytes`` are what leaves a device, with G devices in a group: all-to-all and reduce-scatter (G - 1) / G of the
    operand, all-gather G - 1 times the operand, all-reduce 2 (G - 1) / G of it (reduce-scatter, then all-gather),
    collective-permute all of it (nothing where every device sends to itself), ragged-all-to-all at most (G - 1) / G of
    it: how much of it is used is data.

    Attributes:
      op: the instruction: "all-to-all", "all-gather", ...
      operand_bytes: what a device hands over.
      wire_bytes: what leaves it.
      group_size: G, devices that talk to each other.
      is_float: whether floats travel.
      in_loop: whether it stands inside the body of a while loop.
    """

    op: str
    operand_bytes: int
    wire_bytes: int
    group_size: int
    is_float: bool
    in_loop: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """The result of one instruction that is held in memory.

    Attributes:
      name: the name of the instruction.
      shape: its type as in f32[8,4]; a tuple has several.
      bytes: its size.
    """

    name: str
    shape: str
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """What one compiled program does, per device.

    Attributes:
      collectives: its exchanges between devices, one by one.
      float_scatters, int_scatters: scatters of floats and of integers.
      temporary_bytes: memory beside arguments and results, as the compiler planned it. This and the next three are None
        where only the text of the program is known.
      argument_bytes, output_bytes: the bytes of the arguments, and of the results.
      alias_bytes: the bytes of those results that lie in the memory of donated arguments.
      flops: XLA's estimate, in which a loop of unknown length counts as one turn. None where the back end makes no
        estimate.
      largest_buffers: the largest results of instructions that are held in memory.
      num_instructions: the number of all instructions, those inside fusions included.
    """

    collectives: tuple[Collective, ...]
    float_scatters: int
    int_scatters: int
    temporary_bytes: int | None
    argument_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    flops: float | None
    largest_buffers: tuple[Buffer, ...]
    num_instructions: int

    def count(self, op: str, *, in_loop: bool | None = None) -> int:
        """How many instructions ``op`` there are; ``in_loop``: only those inside loops, or only those outside."""
        check_choice("op", op, COLLECTIVES)
        return sum(c.op == op and in_loop in (None, c.in_loop) for c in self.collectives)

    @property
    def counts(self) -> dict[str, int]:
        """The number of each collective that occurs."""
        return dict(collections.Counter(c.op for c in self.collectives))

    @property
    def operand_bytes(self) -> int:
        """The bytes that a device hands over to all collectives."""
        return sum(c.operand_bytes for c in self.collectives)

    @property
    def wire_bytes(self) -> int:
        """The bytes that leave a device in all collectives; see ``Collective``."""
        return sum(c.wire_bytes for c in self.collectives)

    @property
    def inline_wire_bytes(self) -> int:
        """The bytes that leave a device in collectives outside loops."""
        return sum(c.wire_bytes for c in self.collectives if not c.in_loop)

    def as_dict(self) -> dict[str, Any]:
        """All fields and sums as a dict that JSON can hold."""
        sums = {name: getattr(self, name) for name in ("counts", "operand_bytes", "wire_bytes", "inline_wire_bytes")}
        return {**dataclasses.asdict(self), **sums}

    def __str__(self) -> str:
        rows = collections.Counter((c.op, c.in_loop, c.operand_bytes, c.wire_bytes) for c in self.collectives)
        lines = [f"collectives   {len(self.collectives)}, {self.wire_bytes:,} B leave the device"]
        for (op, in_loop, handed, left), count in sorted(rows.items()):
            place = "in a loop" if in_loop else "inline"
            lines.append(f"  {count} x {op} {place}: {handed:,} B handed over, {left:,} B leave the device")
        lines += [
            f"scatters      {self.float_scatters} of floats, {self.int_scatters} of integers",
            (
                f"memory        temporary {_show(self.temporary_bytes)} B, arguments {_show(self.argument_bytes)} B, "
                f"results {_show(self.output_bytes)} B, shared by both {_show(self.alias_bytes)} B"
            ),
            f"flops         {_show(self.flops)}",
            f"instructions  {self.num_instructions}",
            "largest       " + ", ".join(f"{b.name} {b.shape} {b.bytes:,} B" for b in self.largest_buffers),
        ]
        return "\n".join(lines)


def hlo_contract(fn: Callable, *args: Any, **kwargs: Any) -> Contract:
    """Compiles ``fn`` for these arguments, runs nothing, and reports what the program contains.

    Args:
      fn: jitted (its shardings and donations are kept) or plain.
      args, kwargs: arrays or ``jax.ShapeDtypeStruct``s, with their shardings.

    Raises:
      InvalidArgumentError: ``fn`` cannot be called.
      UnsupportedError: the back end tells nothing about its programs.

    >>> import jax, moe_jax as moe
    >>> moe.hlo_contract(jax.jit(lambda x: x @ x), jax.ShapeDtypeStruct((4, 4), "float32")).counts
    {}
    """
    if not callable(fn):
        raise InvalidArgumentError(f"fn={fn!r} cannot be called; pass a function, jitted or not")
    return contract_of(jitted(fn).lower(*args, **kwargs).compile())


def assert_hlo_contract(
    fn: Callable | Contract | str,
    *args: Any,
    collectives: Mapping[str, int] | None = None,
    max_temporary_bytes: int | None = None,
    no_float_scatter: bool = False,
    max_wire_bytes: int | None = None,
) -> Contract:
    """Raises unless the program of ``fn`` keeps to all the rules given; returns its ``Contract``.

    Args:
      fn, args: as in ``hlo_contract``; bind keyword arguments of ``fn`` with ``functools.partial``. Instead of a
        function, without args: what ``hlo_contract`` or ``compile_for`` found, or the text of an optimised HLO module.
      collectives: exactly how many there are of each, inline and in loops together: {"all-to-all": 4, "all-gather": 0}.
        Those not named are free.
      max_temporary_bytes, max_wire_bytes: limits of ``Contract.temporary_bytes`` and ``Contract.wire_bytes``.
      no_float_scatter: whether scatters of floats are forbidden. Some back ends turn small scatters into loops; they
        are not seen.

    Raises:
      AssertionError: names every broken rule with what was found.
      InvalidArgumentError: a rule is not as above, or it needs more than the text of a program and only that was given.

    >>> import jax.numpy as jnp, moe_jax as moe
    >>> found = moe.assert_hlo_contract(jnp.sin, jnp.ones(8), collectives={"all-to-all": 0}, no_float_scatter=True)
    >>> found.wire_bytes
    0
    """
    expected = dict(collectives or {})
    for op, count in expected.items():
        check_choice("collectives", op, COLLECTIVES)
        check_count(f"collectives[{op!r}]", count, low=0)
    limits = {"temporary_bytes": max_temporary_bytes, "wire_bytes": max_wire_bytes}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    for name, limit in limits.items():
        check_count(f"max_{name}", limit, low=0)
    check_flag("no_float_scatter", no_float_scatter)
    found = _found(fn, args)
    if max_temporary_bytes is not None and found.temporary_bytes is None:
        raise InvalidArgumentError(
            f"max_temporary_bytes={max_temporary_bytes}: the text of a program does not say what memory it takes; pass "
            "the function, or what compile_for reports"
        )
    broken = [
        f"collectives[{op!r}]={count}, found {found.count(op)} ({found.count(op, in_loop=True)} of them in loops)"
        for op, count in expected.items()
        if found.count(op) != count
    ]
    broken += [
        f"max_{name}={limit:,}, found {getattr(found, name):,}"
        for name, limit in limits.items()
        if getattr(found, name) > limit
    ]
    if no_float_scatter and found.float_scatters:
        broken.append(f"no_float_scatter, found {found.float_scatters}")
    if broken:
        raise AssertionError("the compiled program breaks its contract: " + "; ".join(broken) + f"\n{found}")
    return found


def _found(fn: Callable | Contract | str, args: tuple) -> Contract:
    if not isinstance(fn, (Contract, str)):
        return hlo_contract(fn, *args)
    if args:
        raise InvalidArgumentError(f"args={args!r}: a {type(fn).__name__} takes none; they belong to a function")
    return fn if isinstance(fn, Contract) else Contract(**contract_fields(fn))


def contract_of(compiled: jax.stages.Compiled) -> Contract:
    """The contract of a program that is compiled already: what ``jitted.lower(...).compile()`` gives."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if not text or memory is None:
        raise UnsupportedError("this back end gives no text or no memory analysis of its programs; use another one")
    return Contract(**contract_fields(text, memory_fields(memory), estimated_flops(compiled)))


def memory_fields(memory: Any) -> dict[str, int]:
    """What a compiled program's ``memory_analysis()`` says, by the names of ``Contract``."""
    kinds = {"temporary": "temp", "argument": "argument", "output": "output", "alias": "alias"}
    return {f"{ours}_bytes": int(getattr(memory, f"{theirs}_size_in_bytes")) for ours, theirs in kinds.items()}


def estimated_flops(compiled: jax.stages.Compiled) -> float | None:
    """XLA's own estimate; None where the back end makes none."""
    costs = compiled.cost_analysis() or {}
    return (costs[0] if isinstance(costs, list) else costs).get("flops")


def contract_fields(text: str, memory: Mapping[str, int] | None = None, flops: float | None = None) -> dict[str, Any]:
    """The fields of ``Contract`` for the text of an optimised HLO module.

    Raises:
      InvalidArgumentError: the text is not that of a module.
    """
    program = Program(text)
    if not program.entry:
        raise InvalidArgumentError(
            f"text={text[:60]!r}... has no entry computation; pass the optimised HLO that compiled.as_text() gives"
        )
    instructions = list(program.instructions())
    scatters = [is_float(i.type) for i in instructions if i.op == "scatter"]
    held = [Buffer(name=i.name, shape=shapes(i.type), bytes=num_bytes(i.type)) for i in instructions if i.is_held]
    unknown: dict[str, int | None] = dict.fromkeys(("temporary_bytes", "argument_bytes", "output_bytes", "alias_bytes"))
    return {
        **unknown,
        **(memory or {}),
        "collectives": tuple(filter(None, (_collective(program, i) for i in instructions))),
        "float_scatters": sum(scatters),
        "int_scatters": len(scatters) - sum(scatters),
        "flops": flops,
        "largest_buffers": tuple(sorted(held, key=lambda b: -b.bytes)[:_LARGEST]),
        "num_instructions": len(instructions),
    }


def _show(number: float | None) -> str:
    return "unknown" if number is None else f"{number:,.0f}"


def _collective(program: Program, instruction: Instruction) -> Collective | None:
    types = program.handed_over(instruction)
    if types is None:
        return None
    op = instruction.op.removesuffix("-start")
    handed, group = sum(map(num_bytes, types)), _group_size(instruction.attributes, program.num_devices)
    return Collective(
        op=op,
        operand_bytes=handed,
        wire_bytes=_wire_bytes(op, handed, group, instruction.attributes),
        group_size=group,
        is_float=any(map(is_float, types)),
        in_loop=instruction.in_loop,
    )


def _group_size(attributes: str, num_devices: int) -> int:
    """How many devices take part in a collective together.

    Two groups of two devices are written {{0,1},{2,3}} or [2,2]<=[4], and one group of all devices is {}. JAX 0.12
    writes mesh['ep'=4,'tp'=2] {'ep'} for two groups of four. If only a part of an axis takes part, the size of that
    part stands behind the axis, as in {'ep':(1)2}.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if counted:
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^{}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return num_devices


def _wire_bytes(op: str, handed: int, group: int, attributes: str) -> int:
    if op == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", attributes.split("source_target_pairs=")[-1].split("}}")[0] + "}")
        return handed if any(source != target for source, target in pairs) else 0
    factor = {"all-gather": group, "all-reduce": 2}.get(op, 1)
    return factor * handed * (group - 1) // group
