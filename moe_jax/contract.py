"""What a compiled program contains: its collectives with their bytes, scatters, memory. Read off the optimised HLO.

For tests of one's own step: ``assert_hlo_contract`` fails when an exchange, a scatter or a buffer too many crept in.
All figures are per device and per execution of an instruction: one that stands in a loop counts once, and is marked.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from moe_jax.errors import InvalidArgumentError, UnsupportedError, check_choice, check_count, check_flag

COLLECTIVES = (
    "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "ragged-all-to-all",
)  # fmt: skip
_LARGEST = 5
_ALIASES = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLEES = re.compile(r"\b([a-z_]+)=(\{(?:%[\w.\-]+(?:, )?)+\}|%[\w.\-]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction. ``wire_bytes`` are what leaves a device, with G devices in a group:

    all-to-all and reduce-scatter (G - 1) / G of the operand, all-gather G - 1 times the operand, all-reduce 2 (G - 1) /
    G of it (reduce-scatter, then all-gather), collective-permute all of it (nothing where every device sends to
    itself), ragged-all-to-all at most (G - 1) / G of it: how much of it is used is data.

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
      name: of the instruction.
      shape: as in f32[8,4]; a tuple has several.
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
      temporary_bytes: memory beside arguments and results, as the compiler planned it.
      argument_bytes, output_bytes: of the arguments and the results.
      alias_bytes: of results that lie in the memory of donated arguments.
      flops: XLA's estimate; a loop of unknown length counts once. None: the back end gives none.
      largest_buffers: the largest results of instructions that are held in memory.
      num_instructions: all of them, those inside fusions included.
    """

    collectives: tuple[Collective, ...]
    float_scatters: int
    int_scatters: int
    temporary_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
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
        """What a device hands over to all collectives."""
        return sum(c.operand_bytes for c in self.collectives)

    @property
    def wire_bytes(self) -> int:
        """What leaves a device; see ``Collective``."""
        return sum(c.wire_bytes for c in self.collectives)

    @property
    def inline_wire_bytes(self) -> int:
        """What leaves a device outside loops."""
        return sum(c.wire_bytes for c in self.collectives if not c.in_loop)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; the sums too."""
        sums = {name: getattr(self, name) for name in ("counts", "operand_bytes", "wire_bytes", "inline_wire_bytes")}
        return {**dataclasses.asdict(self), **sums}

    def __str__(self) -> str:
        rows = collections.Counter((c.op, c.in_loop, c.operand_bytes, c.wire_bytes) for c in self.collectives)
        lines = [f"collectives   {len(self.collectives)}, {self.wire_bytes:,} B leave the device"]
        for (op, in_loop, handed, left), count in sorted(rows.items()):
            place = "in a loop" if in_loop else "inline"
            lines.append(f"  {count} x {op} {place}: {handed:,} B handed over, {left:,} B leave the device")
        flops = "unknown" if self.flops is None else f"{self.flops:,.0f}"
        lines += [
            f"scatters      {self.float_scatters} of floats, {self.int_scatters} of integers",
            f"memory        temporary {self.temporary_bytes:,} B, arguments {self.argument_bytes:,} B, "
            f"results {self.output_bytes:,} B, shared by both {self.alias_bytes:,} B",
            f"flops         {flops}",
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

    >>> hlo_contract(jax.jit(lambda x: x @ x), jax.ShapeDtypeStruct((4, 4), "float32")).counts
    {}
    """
    if not callable(fn):
        raise InvalidArgumentError(f"fn={fn!r} cannot be called; pass a function, jitted or not")
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    return contract_of(jitted.lower(*args, **kwargs).compile())


def assert_hlo_contract(
    fn: Callable,
    *args: Any,
    collectives: Mapping[str, int] | None = None,
    max_temporary_bytes: int | None = None,
    no_float_scatter: bool = False,
    max_wire_bytes: int | None = None,
) -> Contract:
    """Raises unless the program of ``fn`` keeps to all the rules given; returns its ``Contract``.

    Args:
      fn, args: as in ``hlo_contract``; bind keyword arguments of ``fn`` with ``functools.partial``.
      collectives: exactly how many there are of each, inline and in loops together: {"all-to-all": 4, "all-gather": 0}.
        Those not named are free.
      max_temporary_bytes, max_wire_bytes: limits of ``Contract.temporary_bytes`` and ``Contract.wire_bytes``.
      no_float_scatter: whether scatters of floats are forbidden. Some back ends turn small scatters into loops; they
        are not seen.

    Raises:
      AssertionError: names every broken rule with what was found.
      InvalidArgumentError: a rule is not as above.

    >>> assert_hlo_contract(jnp.sin, x, collectives={"all-to-all": 0}, no_float_scatter=True).wire_bytes
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
    found = hlo_contract(fn, *args)
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


def contract_of(compiled: jax.stages.Compiled) -> Contract:
    """The contract of a program that is compiled already: what ``jitted.lower(...).compile()`` gives."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if not text or memory is None:
        raise UnsupportedError("this back end gives no text or no memory analysis of its programs; use another one")
    costs = compiled.cost_analysis() or {}
    costs = costs[0] if isinstance(costs, list) else costs
    program = _Program(text)
    instructions = list(program.instructions())
    scatters = [_is_float(i.type) for i in instructions if i.op == "scatter"]
    held = [Buffer(name=i.name, shape=_shapes(i.type), bytes=_bytes(i.type)) for i in instructions if i.is_held]
    return Contract(
        collectives=tuple(filter(None, map(program.collective, instructions))),
        float_scatters=sum(scatters),
        int_scatters=len(scatters) - sum(scatters),
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        flops=costs.get("flops"),
        largest_buffers=tuple(sorted(held, key=lambda b: -b.bytes)[:_LARGEST]),
        num_instructions=len(instructions),
    )


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    computation: str = ""
    in_loop: bool = False
    is_fused: bool = False

    @property
    def is_held(self) -> bool:
        return not self.is_fused and self.op not in _ALIASES

    def callees(self) -> Iterator[tuple[str, bool, bool]]:
        """(computation, whether it is a loop's, whether its results stay in registers)."""
        for key, names in _CALLEES.findall(self.attributes):
            fused = self.op == "fusion" or (key == "to_apply" and self.op != "call")
            for name in _NAME.findall(names):
                yield name, self.op == "while", fused


class _Program:
    """The text of an HLO module as instructions by computation."""

    def __init__(self, text: str):
        header = text.split("\n", 1)[0]
        extents = [re.search(rf"{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
        self.num_devices = math.prod(int(found[1]) for found in extents if found)
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = current = ""
        for line in text.splitlines():
            if line.endswith("{") and " -> " in line and not line.startswith(" "):
                current = _NAME.search(line)[1]
                self.computations[current] = {}
                self.entry = current if line.startswith("ENTRY") else self.entry
            elif current and line.startswith("  ") and " = " in line:
                instruction = _parse(line, current)
                self.computations[current][instruction.name] = instruction

    def instructions(self) -> Iterator[_Instruction]:
        """All that can be reached from the entry; a computation that several call, once, as outside loops if any is."""
        seen, waiting = set(), [(False, False, self.entry)]
        while waiting:
            waiting.sort(reverse=True)
            in_loop, fused, name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            for instruction in self.computations.get(name, {}).values():
                yield dataclasses.replace(instruction, in_loop=in_loop, is_fused=fused)
                for callee, loops, fuses in instruction.callees():
                    waiting.append((in_loop or loops, fused or fuses, callee))

    def collective(self, instruction: _Instruction) -> Collective | None:
        op = instruction.op.removesuffix("-start")
        if op not in COLLECTIVES:
            return None
        names = instruction.operands
        if op == "ragged-all-to-all":  # operand, output, and four arrays of integers
            names = names[:1]
        types = [self.computations[instruction.computation][name].type for name in names]
        handed, group = sum(map(_bytes, types)), _group_size(instruction.attributes, self.num_devices)
        return Collective(
            op=op,
            operand_bytes=handed,
            wire_bytes=_wire_bytes(op, handed, group, instruction.attributes),
            group_size=group,
            is_float=any(map(_is_float, types)),
            in_loop=instruction.in_loop,
        )


def _parse(line: str, computation: str) -> _Instruction:
    """``%name = type op(operands), attributes``."""
    name, rest = line.split(" = ", 1)
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = start + _closing(rest[start:])
    operands = tuple(_NAME.findall(rest[start:stop]))
    name = name.split()[-1].lstrip("%")
    return _Instruction(name, kind, rest[:start], operands, rest[stop + 1 :], computation)


def _closing(text: str) -> int:
    """Where the parenthesis that opens ``text`` is closed."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return place.start()
    return len(text) - 1


def _bytes(kind: str) -> int:
    return sum(_bits(dtype) * math.prod(_extents(shape)) // 8 for dtype, shape in _ARRAY.findall(kind))


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)  # token and opaque have no size
    return int(found[1]) if found else 0


def _extents(shape: str) -> list[int]:
    return [int(extent.lstrip("<=")) for extent in shape.split(",") if extent]


def _shapes(kind: str) -> str:
    return " ".join(f"{dtype}[{shape}]" for dtype, shape in _ARRAY.findall(kind))


def _is_float(kind: str) -> bool:
    return any(dtype[0] in "fbc" for dtype, _ in _ARRAY.findall(kind))


def _group_size(attributes: str, num_devices: int) -> int:
    """Devices that take part together; {{0,1},{2,3}} and [2,2]<=[4] are two groups of two, {} is one of all."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    return int(counted[1]) if counted else num_devices


def _wire_bytes(op: str, handed: int, group: int, attributes: str) -> int:
    if op == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", attributes.split("source_target_pairs=")[-1].split("}}")[0] + "}")
        return handed if any(source != target for source, target in pairs) else 0
    factor = {"all-gather": group, "all-reduce": 2}.get(op, 1)
    return factor * handed * (group - 1) // group
