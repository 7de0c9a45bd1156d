"""The text of an optimised HLO module, taken apart: its instructions by computation, their types, what they call.

XLA prints one instruction a line, ``%name = type op(operands), attributes``, in computations, one of which is the
entry.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

ALIASES = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier")
COLLECTIVES = (
    "all-to-all", "all-gather", "all-reduce", "reduce-scatter", "collective-permute", "ragged-all-to-all",
)  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLEES = re.compile(r"\b([a-z_]+)=(\{(?:%[\w.\-]+(?:, )?)+\}|%[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, type, op: the name of the result, the type of the result, and the operation that makes it.
      inside: the text between the parentheses; ``operands`` are the names in it.
      attributes: the text behind the parentheses.
      computation: the name of the computation that it stands in.
      is_root: whether its result is the result of that computation.
      in_loop: whether it stands in the body or the condition of a while loop.
      is_fused: whether its result stays in registers and never reaches memory.
    """

    name: str
    type: str
    op: str
    inside: str
    attributes: str
    computation: str = ""
    is_root: bool = False
    in_loop: bool = False
    is_fused: bool = False

    @property
    def operands(self) -> tuple[str, ...]:
        return tuple(_NAME.findall(self.inside))

    @property
    def is_held(self) -> bool:
        """Whether the result has memory of its own. The result of a "-start" counts with that of its "-done"."""
        return not self.is_fused and self.op not in ALIASES and not self.op.endswith("-start")

    def attribute(self, name: str) -> str:
        """The words in the braces, or the one word, behind ``name=``; empty where there is none."""
        found = re.search(rf"\b{name}=(?:\{{([^{{}}]*)\}}|([^\s,]+))", self.attributes)
        return (found[1] or found[2] or "") if found else ""

    def callees(self) -> Iterator[tuple[str, bool, bool]]:
        """The computations that it calls: (name, whether it is a loop, whether the results stay in registers)."""
        for key, names in _CALLEES.findall(self.attributes):
            fused = self.op == "fusion" or (key == "to_apply" and self.op != "call")
            for name in _NAME.findall(names):
                yield name, self.op == "while", fused


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction at one place of the call tree, and how often the program gets there.

    Attributes:
      instruction: which one.
      times: the product of the trip counts of the loops around it. A loop of unknown length counts as one turn.
      is_uncounted: whether it stands inside such a loop of unknown length.
      is_fused: whether its result never reaches memory when it is executed at this place.
    """

    instruction: Instruction
    times: int
    is_uncounted: bool
    is_fused: bool


class Program:
    """The text of an HLO module as instructions by computation."""

    def __init__(self, text: str):
        header = text.split("\n", 1)[0]
        extents = [re.search(rf"{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
        self.num_devices = math.prod(int(found[1]) for found in extents if found)
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = current = ""
        for line in text.split("\n"):
            if line.endswith("{") and " -> " in line and not line.startswith(" "):
                current = _NAME.findall(line)[0]
                self.computations[current] = {}
                self.entry = current if line.startswith("ENTRY") else self.entry
            elif current and line.startswith("  ") and " = " in line:
                instruction = _parse(line, current)
                self.computations[current][instruction.name] = instruction

    def instructions(self) -> Iterator[Instruction]:
        """All instructions that can be reached from the entry.

        Those of a computation with several callers come once. They count as outside loops if any of the callers is.
        """
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

    def type_of(self, instruction: Instruction, operand: str) -> str:
        """The type of one of the operands of an instruction."""
        return self.computations[instruction.computation][operand].type

    def result_type(self, instruction: Instruction) -> str:
        """The type of an instruction's result. That of a "-start" has operands and context too, which are left out."""
        if not instruction.op.endswith("-start") or instruction.op == "all-reduce-start":
            return instruction.type
        kind = instruction.type
        for operand in instruction.operands:
            kind = kind.replace(self.type_of(instruction, operand), "", 1)
        return re.sub(r"[su]32\[\](\{[^{}]*\})?", "", kind)

    def handed_over(self, instruction: Instruction) -> list[str] | None:
        """The types of the arrays that a device hands over to a collective; None if this is no collective."""
        op = instruction.op.removesuffix("-start")
        if op not in COLLECTIVES:
            return None
        # Behind the operand of a ragged-all-to-all stand its output and four arrays of integers.
        names = instruction.operands[: 1 if op == "ragged-all-to-all" else None]
        return [self.type_of(instruction, name) for name in names]

    def executions(self, weigh: Callable[[Instruction], int], computation: str = "") -> Iterator[Execution]:
        """Everything that one call of ``computation`` (the entry if that is empty) executes.

        Loops count by their trip counts. Only one branch of a conditional runs, and here it is the heaviest: the one
        whose instructions have the largest sum of ``weigh``.
        """
        weighed = functools.cache(lambda name: sum(e.times * weigh(e.instruction) for e in walk(name, 1, False, False)))

        def walk(name: str, times: int, uncounted: bool, fused: bool) -> Iterator[Execution]:
            for instruction in self.computations.get(name, {}).values():
                yield Execution(instruction, times, uncounted, fused)
                if instruction.op == "while":
                    trips = self.trip_count(instruction)
                    inner = (times if trips is None else times * trips, uncounted or trips is None, fused)
                    for callee, _, _ in instruction.callees():
                        yield from walk(callee, *inner)
                elif instruction.op == "conditional":
                    branches = [callee for callee, _, _ in instruction.callees() if callee in self.computations]
                    yield from walk(max(branches, key=weighed), times, uncounted, fused)
                elif instruction.op in ("fusion", "call") or instruction.op.endswith("-start"):
                    for callee, _, fuses in instruction.callees():
                        yield from walk(callee, times, uncounted, fused or fuses)

        return walk(computation or self.entry, 1, False, False)

    def trip_count(self, loop: Instruction) -> int | None:
        """How often the body of a while loop runs; None if that is not a constant.

        XLA writes the number into the text if it knows it, but the TPU compiler does not. There it is found from the
        counter of the loop. A counter is an element of the tuple that the loop carries: it starts at a constant, the
        body adds a constant to it, and the condition asks whether it is less than a constant.
        """
        # 1. What XLA says itself.
        said = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if said:
            return int(said[1])
        body, condition = (self.computations.get(loop.attribute(key).lstrip("%"), {}) for key in ("body", "condition"))
        # 2. The condition must be ``counter < bound``, and the body must make the tuple of the next turn.
        test, result = _root(condition), _root(body)
        if test is None or test.op != "compare" or result is None or result.op != "tuple":
            return None
        if test.attribute("direction") != "LT" or len(test.operands) != 2:
            return None
        # 3. The counter is element ``index`` of the tuple: its first value, its bound, and what the body adds to it.
        index = _element(condition, test.operands[0])
        first = self._initial(loop, index)
        bound = _constant(condition, test.operands[1])
        if bound is None:  # the bound may be an element of the tuple that the body passes on unchanged
            element = _element(condition, test.operands[1])
            unchanged = element is not None and _element(body, result.operands[element]) == element
            bound = self._initial(loop, element) if unchanged else None
        step = self._step(body, result, index)
        # 4. ceil((bound - first) / step) turns.
        if first is None or bound is None or step is None or step <= 0:
            return None
        return max(0, -(-(bound - first) // step))

    def _initial(self, loop: Instruction, index: int | None) -> int | None:
        """The constant that element ``index`` of a loop's tuple starts with; None if it starts with anything else."""
        around = self.computations[loop.computation]
        start = around.get(loop.operands[0])
        if index is None or start is None or start.op != "tuple":
            return None
        return _constant(around, start.operands[index])

    def _step(self, body: dict[str, Instruction], result: Instruction, index: int | None) -> int | None:
        """The constant that a loop's body adds to element ``index`` of its tuple; None if it does anything else."""
        added = None if index is None else body.get(result.operands[index])
        if added is None or added.op != "add" or len(added.operands) != 2:
            return None
        left, right = added.operands
        if _element(body, left) != index:
            left, right = right, left
        return _constant(body, right) if _element(body, left) == index else None


def _root(computation: dict[str, Instruction]) -> Instruction | None:
    return next((instruction for instruction in computation.values() if instruction.is_root), None)


def _through_copies(computation: dict[str, Instruction], name: str) -> Instruction | None:
    found = computation.get(name)
    while found is not None and found.op in ("copy", "bitcast", "convert"):
        found = computation.get(found.operands[0])
    return found


def _constant(computation: dict[str, Instruction], name: str) -> int | None:
    found = _through_copies(computation, name)
    if found is None or found.op != "constant" or not re.fullmatch(r"-?\d+", found.inside):
        return None
    return int(found.inside)


def _element(computation: dict[str, Instruction], name: str) -> int | None:
    """Which element of the computation's argument, a tuple, has the name ``name``; None if it is no such element."""
    found = _through_copies(computation, name)
    if found is None or found.op != "get-tuple-element" or computation[found.operands[0]].op != "parameter":
        return None
    return int(found.attribute("index"))


def _parse(line: str, computation: str) -> Instruction:
    """The instruction on a line ``%name = type op(operands), attributes`` of ``computation``."""
    name, rest = line.split(" = ", 1)
    end = closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = start + closing(rest[start:])
    words = name.split()
    return Instruction(
        name=words[-1].lstrip("%"),
        type=kind,
        op=rest[:start],
        inside=rest[start + 1 : stop],
        attributes=rest[stop + 1 :],
        computation=computation,
        is_root=words[0] == "ROOT",
    )


def closing(text: str) -> int:
    """Where the parenthesis that opens ``text`` is closed."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if not depth:
            return place.start()
    return len(text) - 1


def num_bytes(kind: str, *, without_space: bool = False) -> int:
    """The bytes of all arrays in a type.

    ``without_space`` leaves out arrays whose layout puts them into a memory space S(n) of their own, such as fast
    memory.
    """
    return sum(
        _bits(dtype) * math.prod(extents(shape)) // 8
        for dtype, shape, layout in _ARRAY.findall(kind)
        if not (without_space and "S(" in layout)
    )


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)  # token and opaque have no size
    return int(found[1]) if found else 0


def extents(shape: str) -> list[int]:
    """The extents in a text such as "8,<=4": [8, 4]."""
    return [int(extent.lstrip("<=")) for extent in shape.split(",") if extent]


def array_extents(kind: str) -> list[int]:
    """The extents of a type's first array."""
    found = _ARRAY.search(kind)
    return extents(found[2]) if found else []


def shapes(kind: str) -> str:
    """A type without its layouts, as in f32[8,4]."""
    return " ".join(f"{dtype}[{shape}]" for dtype, shape, _ in _ARRAY.findall(kind))


def is_float(kind: str) -> bool:
    """Whether any array of a type holds floats."""
    return any(dtype[0] in "fbc" for dtype, _, _ in _ARRAY.findall(kind))
