"""What one call of a compiled program costs, from the text of its HLO: products, memory traffic, kernels, cycles.

All figures are per device. A loop counts by its trip count. Where the compiler does not know the trip count, one turn
of the loop is kept apart, in a ``Work`` of its own. Of the branches of a conditional, the one with the most products
counts.
"""

import collections
import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from jax.experimental.xla_metadata import set_xla_metadata

from moe_jax.hlo.text import ALIASES, Execution, Instruction, Program, array_extents, num_bytes

# Custom calls that only tell the compiler something, and run nothing.
_ANNOTATIONS = (
    "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "AssumeGatherIndicesInBound", "AllocateBuffer",
    "annotate_device_placement", "MoveToDevice", "MoveToHost", "PinToDevice", "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
)  # fmt: skip
_NO_TRAFFIC = (*ALIASES, "constant", "partition-id", "replica-id", "after-all", "iota")
# The path of an operation holds named scopes, and words that JAX itself adds to it or wraps around them. These are the
# words of JAX.
_STRUCTURE = re.compile(
    r"pjit|while|body|cond|closed_call|call_exported|shard_map|checkpoint|remat\w*|branch_\d+_fun|core_call|scan|"
    r"custom_\w+_call\w*|.*->.*|platform_index|switch|jit\(.*\)|pallas_call|run_state|fori_loop|eval_jaxpr"
)
_WRAPPED = re.compile(r"(jvp|transpose|vmap|rematted_computation)\((.*)\)")
NO_SCOPE = "(no scope)"
_FLOPS = "moe_jax_flops"
# Kernels for TPU carry Pallas's cost estimate. JAX drops it from those for GPU, so ours carry an attribute.
_DECLARED = rf'"cost_estimate":\{{"flops":"(\d+)"|\b{_FLOPS}="(\d+)"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that the compiler calls by name: Pallas, Triton, Mosaic, or a library's.

    Attributes:
      name: the name that its author gave it.
      target: the target of the custom call: tpu_custom_call, __gpu$xla.gpu.triton, ...
      executions: how often it runs.
      in_uncounted_loop: whether it stands in a loop of unknown length, of which ``executions`` count one turn.
      flops: the flops of all executions, as the kernel declares them; None where it declares none.
    """

    name: str
    target: str
    executions: int
    in_uncounted_loop: bool
    flops: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The work that a part of a program does, per device.

    Attributes:
      flops: two for each multiplication of a product, plus what kernels declare.
      bytes_accessed: bytes read from memory and written to it; on TPU only those of the main memory.
      collective_bytes: bytes handed over to collectives.
      cycles: the TPU compiler's own estimates, summed; None on other platforms.
      scope_cycles: the same by named scope, largest first.
      flops_by_op: the flops of dot, of convolution, and of each kernel.
      gathers, scatters: how many are executed.
      other_bytes, other_cycles: the part of ``bytes_accessed`` and ``cycles`` that belongs neither to collectives nor
        to anything that multiplies (products, fusions around one, and kernels that declare flops).
      product_bytes: the part of ``bytes_accessed`` that belongs to what multiplies.
      gather_bytes: the bytes of what gathers take out, counted once. (The TPU compiler prices no gather of rows.)
      unpriced: on TPU, the executions of instructions without an estimate, by name.
    """

    flops: int
    bytes_accessed: int
    collective_bytes: int
    cycles: int | None
    scope_cycles: tuple[tuple[str, int], ...]
    flops_by_op: tuple[tuple[str, int], ...]
    gathers: int
    scatters: int
    other_bytes: int
    other_cycles: int | None
    product_bytes: int
    gather_bytes: int
    unpriced: tuple[tuple[str, int], ...]


def declare_flops(flops: int) -> contextlib.AbstractContextManager:
    """A context around the call of a kernel: notes what the kernel multiplies, so that ``flops_of`` finds it."""
    return set_xla_metadata(**{_FLOPS: str(flops)})


class Costs(NamedTuple):
    """What ``work_of`` finds in a program.

    Attributes:
      certain: the work that surely runs.
      per_turn: the work of one turn of each loop whose trip count the compiler does not know.
      kernels: the custom calls that run something.
      uncounted_loops: those loops of unknown length, each as its name and its scope.
    """

    certain: Work
    per_turn: Work
    kernels: tuple[Kernel, ...]
    uncounted_loops: tuple[str, ...]


def work_of(program: Program, *, has_fast_memory: bool) -> Costs:
    """The work of one call of ``program``.

    ``has_fast_memory``: whether memory spaces of their own lie on the chip, as on TPU, so that access to them makes no
      traffic.
    """
    executions = list(program.executions(lambda i: flops_of(program, i) or 0))
    traffic = _Traffic(program, has_fast_memory)
    certain, per_turn = (
        _sum(program, [e for e in executions if e.is_uncounted is uncounted], traffic) for uncounted in (False, True)
    )
    loops = tuple(
        f"{e.instruction.name} {scope_of(e.instruction) or NO_SCOPE}"
        for e in executions
        if e.instruction.op == "while" and program.trip_count(e.instruction) is None
    )
    return Costs(certain, per_turn, tuple(_kernels(program, executions)), loops)


def _sum(program: Program, executions: list[Execution], traffic: "_Traffic") -> Work:
    flops, scopes, ops, unpriced = collections.Counter(), collections.Counter(), collections.Counter(), []
    moved = handed = other_bytes = other_cycles = product_bytes = gathered = 0
    for execution in executions:
        instruction, times = execution.instruction, execution.times
        # 1. What an instruction computes counts wherever it stands, inside fusions too.
        products = flops_of(program, instruction)
        if products:
            name = kernel_name(instruction) if instruction.op == "custom-call" else instruction.op
            flops[name] += times * products
        ops[instruction.op] += times
        gathered += times * num_bytes(instruction.type) if instruction.op == "gather" else 0
        if execution.is_fused:
            continue
        # 2. Memory and time belong to what runs by itself: a fused instruction is part of its fusion.
        types = program.handed_over(instruction)
        multiplies = _multiplies(program, instruction)
        is_other = types is None and not multiplies
        touched = times * traffic.of(instruction)
        moved += touched
        other_bytes += touched * is_other
        product_bytes += touched * multiplies
        handed += times * sum(map(num_bytes, types or ()))
        priced = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if priced:
            scopes[_scope(program, instruction)] += times * int(priced[1])
            other_cycles += times * int(priced[1]) * is_other
        elif _runs(instruction):
            unpriced.append((instruction, times))
    # 3. Only the TPU compiler prices instructions. What it left out is named.
    is_priced = traffic.has_fast_memory
    names = collections.Counter()
    for instruction, times in unpriced if is_priced else ():
        names[_plain_name(instruction)] += times
    return Work(
        flops=sum(flops.values()),
        bytes_accessed=moved,
        collective_bytes=handed,
        cycles=sum(scopes.values()) if is_priced else None,
        scope_cycles=_largest_first(scopes) if is_priced else (),
        flops_by_op=_largest_first(flops),
        gathers=ops["gather"],
        scatters=ops["scatter"],
        other_bytes=other_bytes,
        other_cycles=other_cycles if is_priced else None,
        product_bytes=product_bytes,
        gather_bytes=gathered,
        unpriced=_largest_first(names),
    )


def _largest_first(counter: collections.Counter) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def flops_of(program: Program, instruction: Instruction) -> int | None:
    """Two for each multiplication of a product, or what a kernel declares; None if an instruction is neither."""
    if instruction.op == "dot":
        return _dot_flops(program, instruction, instruction.attribute("lhs_contracting_dims"))
    if instruction.op == "convolution":
        return _convolution_flops(program, instruction)
    if instruction.op == "custom-call":
        declared = re.search(_DECLARED, instruction.attributes)
        if declared:
            return int(declared[1] or declared[2])
        contracted = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', instruction.attributes)
        if contracted:  # a library's product: cuBLAS, oneDNN
            return _dot_flops(program, instruction, contracted[1].replace('"', ""))
    return None


def _multiplies(program: Program, instruction: Instruction) -> bool:
    """Whether an instruction is a product, or a fusion that holds one."""
    if instruction.op != "fusion":
        return bool(flops_of(program, instruction))
    inside = program.computations[instruction.attribute("calls").lstrip("%")].values()
    return any(_multiplies(program, inner) for inner in inside)


def _dot_flops(program: Program, instruction: Instruction, contracted: str) -> int:
    lhs = array_extents(program.type_of(instruction, instruction.operands[0]))
    return 2 * math.prod(array_extents(instruction.type)) * math.prod(lhs[int(d)] for d in contracted.split(",") if d)


def _convolution_flops(program: Program, instruction: Instruction) -> int:
    """Two flops for each multiplication of a convolution that meets no padding.

    The TPU compiler writes every dot as a convolution. A batch of the dot becomes a dimension whose window fits in one
    place only.
    """
    operands, result = instruction.attribute("dim_labels").split("->")  # such as b01f_01io->b01f
    labels = (*operands.split("_"), result)  # one letter or number per dimension of lhs, rhs and the result
    lhs, rhs = (array_extents(program.type_of(instruction, name)) for name in instruction.operands)
    out = array_extents(instruction.type)
    windows = _windows(instruction, sum(label.isdigit() for label in labels[0]))
    places = 1
    for number, window in enumerate(windows):
        size, taps, places_out = (
            extents[word.index(str(number))] for extents, word in zip((lhs, rhs, out), labels, strict=True)
        )
        places *= _places(size, taps, places_out, *window)
    groups = int(instruction.attribute("batch_group_count") or 1)
    batch, feature = lhs[labels[0].index("b")] // groups, out[labels[2].index("f")]
    return 2 * places * batch * feature * rhs[labels[1].index("i")]


def _windows(instruction: Instruction, dimensions: int) -> list[tuple[int, int, int, int]]:
    """(stride, padding before, dilation of lhs, dilation of rhs) of each spatial dimension."""
    words = dict(word.split("=") for word in instruction.attribute("window").split() if "=" in word)
    defaults = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
    columns = [
        words[name].split("x") if name in words else [default] * dimensions for name, default in defaults.items()
    ]
    return [(int(s), int(p.split("_")[0]), int(a), int(b)) for s, p, a, b in zip(*columns, strict=True)]


def _places(size: int, window: int, out: int, stride: int, before: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """How many (result, window element) pairs read an element of the operand, not padding or a gap of a dilation."""
    if (stride, before, lhs_dilate) == (1, 0, 1) and window * rhs_dilate - rhs_dilate + out <= size:
        return window * out
    last = (size - 1) * lhs_dilate
    return sum(
        0 <= at <= last and at % lhs_dilate == 0
        for result in range(out)
        for at in range(result * stride - before, result * stride - before + window * rhs_dilate, rhs_dilate)
    )


class _Traffic:
    """The bytes that an instruction reads from memory and writes to it.

    Where an operation takes a part out of an array, as a gather or a slice does, the bytes of that part count. Where it
    changes an array in place, the bytes that it changes count.
    """

    def __init__(self, program: Program, has_fast_memory: bool):
        self.program, self.has_fast_memory = program, has_fast_memory

    def of(self, instruction: Instruction) -> int:
        op = instruction.op
        if op in _NO_TRAFFIC or op.endswith(("-done", "-update")) or op == "async-start":
            return 0
        if op == "custom-call" and instruction.attribute("custom_call_target").strip('"') in _ANNOTATIONS:
            return 0
        read = sum(self._read(instruction, place) for place in range(len(instruction.operands)))
        return read + self._written(instruction)

    def _bytes(self, kind: str) -> int:
        return num_bytes(kind, without_space=self.has_fast_memory)

    def _operand_bytes(self, instruction: Instruction, place: int) -> int:
        return self._bytes(self.program.type_of(instruction, instruction.operands[place]))

    def _read(self, instruction: Instruction, place: int) -> int:
        """Bytes that ``instruction`` reads of one of its operands."""
        whole = self._operand_bytes(instruction, place)
        if not whole:
            return 0
        if place == 0 and instruction.op.removesuffix("-start") in ("slice", "dynamic-slice", "gather"):
            return min(whole, num_bytes(self.program.result_type(instruction)))
        if place == 0 and instruction.op in ("dynamic-update-slice", "scatter"):
            return 0 if instruction.op == "dynamic-update-slice" else self._updates(instruction)
        if instruction.op == "fusion":
            inner = self.program.computations[instruction.attribute("calls").lstrip("%")]
            parameter = next(i for i in inner.values() if i.op == "parameter" and i.inside == str(place))
            return min(whole, self._read_inside(inner, parameter.name, whole))
        return whole

    def _read_inside(self, inner: dict[str, Instruction], name: str, whole: int) -> int:
        """Bytes that a fused computation reads of a value that lies in memory."""
        total = 0
        for user in inner.values():
            for place in [place for place, operand in enumerate(user.operands) if operand == name]:
                if user.op == "bitcast":
                    total += self._read_inside(inner, user.name, whole)
                elif place == 0 and user.op in ("slice", "dynamic-slice", "gather"):
                    total += num_bytes(user.type)
                elif place == 0 and user.op == "dynamic-update-slice":
                    total += 0
                elif place == 0 and user.op == "scatter":
                    total += self._updates(user)
                elif user.op == "fusion":
                    nested = self.program.computations[user.attribute("calls").lstrip("%")]
                    parameter = next(i for i in nested.values() if i.op == "parameter" and i.inside == str(place))
                    total += self._read_inside(nested, parameter.name, whole)
                else:
                    return whole
        return total

    def _updates(self, scatter: Instruction) -> int:
        """Bytes of the rows that a scatter adds to; its operands are arrays, indices, and as many updates."""
        arrays = (len(scatter.operands) - 1) // 2
        return sum(num_bytes(self.program.type_of(scatter, name)) for name in scatter.operands[arrays + 1 :])

    def _written(self, instruction: Instruction) -> int:
        whole = self._bytes(self.program.result_type(instruction))
        return min(whole, self._changed(instruction, whole)) if whole else 0

    def _changed(self, instruction: Instruction, whole: int) -> int:
        if instruction.op == "dynamic-update-slice":
            return num_bytes(self.program.type_of(instruction, instruction.operands[1]))
        if instruction.op == "scatter":
            return self._updates(instruction)
        if instruction.op in ("fusion", "bitcast"):
            inner = self.program.computations[
                instruction.attribute("calls").lstrip("%") if instruction.op == "fusion" else instruction.computation
            ]
            root = next((i for i in inner.values() if i.is_root), None)
            if instruction.op == "bitcast":
                root = inner.get(instruction.operands[0])
            if root is not None and root.op in ("dynamic-update-slice", "scatter", "fusion", "bitcast"):
                return self._changed(root, whole)
        return whole


def _runs(instruction: Instruction) -> bool:
    """Whether an instruction outside fusions is one that the device spends time on."""
    op = instruction.op
    if op in _NO_TRAFFIC or op.endswith(("-done", "-update")):
        return op == "iota"
    return op != "custom-call" or instruction.attribute("custom_call_target").strip('"') not in _ANNOTATIONS


def _kernels(program: Program, executions: list[Execution]) -> Iterator[Kernel]:
    found = collections.defaultdict(list)
    for execution in executions:
        instruction = execution.instruction
        if instruction.op == "custom-call" and _runs(instruction):
            target = instruction.attribute("custom_call_target").strip('"')
            found[kernel_name(instruction), target, execution.is_uncounted].append(execution)
    for (name, target, uncounted), group in sorted(found.items()):
        flops = [(e.times, flops_of(program, e.instruction)) for e in group]
        yield Kernel(
            name=name,
            target=target,
            executions=sum(times for times, _ in flops),
            in_uncounted_loop=uncounted,
            flops=None if None in [each for _, each in flops] else sum(times * each for times, each in flops),
        )


def kernel_name(instruction: Instruction) -> str:
    """The name that a kernel got from its author. Pallas puts it into the path, a compiler into the instruction."""
    name = _plain_name(instruction)
    path = re.search(r'\bop_name="([^"]*)"', instruction.attributes)
    words = path[1].split("/") if path else []
    if name in ("pallas_call", "mpmd_map") and len(words) > 1 and "(" not in words[-2]:
        return words[-2]
    return instruction.attribute("custom_call_target").strip('"') if name == "custom-call" else name


def _plain_name(instruction: Instruction) -> str:
    return re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", instruction.name)


def scope_of(instruction: Instruction) -> str | None:
    """The named scopes around an operation, outermost first, as in "dispatch/exchange"; empty where there are none.

    What belongs to a backward pass ends in " (backward)". None: the compiler made the operation itself.
    """
    path = re.search(r'\bop_name="([^"]*)"', instruction.attributes)
    if not path or "/" not in path[1]:
        return None
    words, backward = [], False
    for part in path[1].split("/")[:-1]:
        word = part
        while wrapped := _WRAPPED.fullmatch(word):
            backward, word = backward or wrapped[1] == "transpose", wrapped[2]
        if word and not _STRUCTURE.fullmatch(word) and word not in words[-1:]:
            words.append(word)
    return "/".join(words) + " (backward)" * (backward and bool(words))


def _scope(program: Program, instruction: Instruction) -> str:
    """The scope that an operation counts in.

    An operation that the compiler made counts in the scope of most operations that it fuses, or else in that of its
    largest operand.
    """
    computation = program.computations[instruction.computation]
    found: Instruction | None = instruction
    while found is not None:
        scope = scope_of(found)
        if scope is not None:
            return scope or NO_SCOPE
        inside = program.computations.get(found.attribute("calls").lstrip("%"), {}).values()
        scopes = collections.Counter(filter(None, map(scope_of, inside)))
        if scopes:
            return scopes.most_common(1)[0][0]
        sources = [computation[name] for name in found.operands if name in computation]
        found = max(sources, key=lambda source: num_bytes(source.type), default=None)
    return NO_SCOPE
