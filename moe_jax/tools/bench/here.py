"""For a device that is here for minutes: whether everything is right on it, and how near it comes to its peak.

The list of checks and times is prepared, so that one command answers both questions. Checks come first: grouped
products of every back end that serves the device, recipes of the wire, and the layer with all its gradients, each
beside the float64 oracle. Then come the times, at sizes that people train and serve. Rows are printed as they come; a
step that fails is a row too, and the others go on. On a CPU, which has no peak to be near to, extents are a 16th, and
the list tests itself.
"""

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import _compat
from moe_jax.errors import UnsupportedError
from moe_jax.hardware import peak_of
from moe_jax.kernels import backend_names, grouped_matmul, grouped_outer, resolve_backend
from moe_jax.mesh import ensure_devices, make_mesh
from moe_jax.parameters import weights_of
from moe_jax.tools.bench.check import WrongResult, check_layer, check_limit, tolerance
from moe_jax.tools.bench.command import emit, open_lines
from moe_jax.tools.bench.programs import LAYER, LIMIT, PASSES, Program, compile_programs, make_setting
from moe_jax.tools.bench.workloads import Workload
from moe_jax.verify.cases import deviation
from moe_jax.verify.kernels import fused_deviations, grouped_matmul_deviations, recipe_deviations
from moe_jax.verify.layer import Layer

MAX_SECONDS = 540.0  # a step that would not end in time is left out
DTYPES = ("bfloat16", "float32", "float16")
RECIPES = ("fp8_e4m3", "mx_e4m3", "int8")
# The dtype of rows, and the recipe by which they travel both ways.
LAYERS = (("bfloat16", "none"), ("bfloat16", "fp8_e4m3"), ("float32", "none"))
EXTENTS = ((20, 8, 6), (300, 200, 136), (512, 256, 384))  # M rows, H, N: small, uneven, whole tiles
RIGHT = "no time for a wrong result"
BATCH_SECONDS, REPEATS = 0.05, 7  # a time is a mean over as many calls as take so long; so many times are taken


def _workload(name: str, tokens: int, hidden: int, ffn: int, num_experts: int, top_k: int) -> Workload:
    return Workload(name=name, tokens=tokens, hidden=hidden, ffn=ffn, num_experts=num_experts, top_k=top_k)


# A, B and C are what one of eight devices holds and multiplies: its eighth of 32, 128 and 64 experts, with as many rows
# as its own tokens make, which in balance is as many as it gets from all devices. The last two are 16 experts of the
# size of DeepSeek-V3's, with the rows of a training step and of a decoding step.
WORKLOADS = (
    _workload("A", 1024, 1024, 1024, 4, 4),
    _workload("B", 2048, 2048, 768, 16, 8),
    _workload("C", 1024, 7168, 2048, 8, 8),
    _workload("4096 rows", 512, 7168, 2048, 16, 8),
    _workload("128 rows", 16, 7168, 2048, 16, 8),
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Some rows of the list.

    Attributes:
      name: what it checks or times.
      seconds: about how long it takes, most of which is compilation. It is an estimate: nobody has measured it on a
        GPU.
      run: makes the rows, one after the other.
    """

    name: str
    seconds: float
    run: Callable[[], Iterator[Row]]


def run(*, json_path: str | None = None, max_seconds: float = MAX_SECONDS) -> int:
    """Checks and times the first device that JAX shows. Returns the exit code.

    Args:
      json_path: a file for JSON lines; "-": standard output, instead of the table.
      max_seconds: steps that would end later, by their estimates, are left out.

    Returns:
      0, or 1 if a check failed, a step died, or one was left out.

    Raises:
      InvalidArgumentError: ``json_path`` cannot be written.
    """
    ensure_devices(1)
    mesh, start = make_mesh(), time.monotonic()
    device = mesh.devices.flat[0]
    steps = make_steps(mesh)
    header = {"platform": device.platform, "jax": jax.__version__, "steps": len(steps)}
    header |= {"estimated_seconds": sum(step.seconds for step in steps), "max_seconds": max_seconds}
    with contextlib.ExitStack() as stack:
        lines = open_lines(json_path, stack)

        def show(row: Row) -> None:
            row = {**row, "device": device.device_kind}
            emit(row, lines)
            if lines is not sys.stdout:
                print(_describe(row), flush=True)

        show({"event": "here", **header})
        good = True
        for step in steps:
            if time.monotonic() - start + step.seconds > max_seconds:
                show({"event": "left out", "what": step.name, "reason": f"would end after {max_seconds:.0f} s"})
                good = False
                continue
            began = time.monotonic()
            try:
                for row in step.run():
                    show(row)
                    good &= row.get("passed", True)
            except UnsupportedError as error:  # a back end that says that it does not serve this
                show({"event": "refused", "what": step.name, "reason": str(error)})
            except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises: the other steps go on
                show({"event": "failed", "what": step.name, "reason": f"{type(error).__name__}: {error}"})
                good = False
            show({"event": "step", "what": step.name, "seconds": time.monotonic() - began})
        show({"event": "end", "seconds": time.monotonic() - start, "good": good})
    return 0 if good else 1


def make_steps(mesh: Mesh) -> list[Step]:
    """The list for the one device of ``mesh``. What matters most comes first, since the list may be cut short."""
    device = mesh.devices.flat[0]
    small = device.platform == "cpu"
    backends = backends_for(device.platform)
    extents = EXTENTS[:1] if small else EXTENTS
    workloads = [_small(workload) for workload in WORKLOADS] if small else WORKLOADS
    products = [
        Step(name=f"products {b} {dtype}", seconds=12, run=lambda b=b, d=dtype: product_checks(b, d, extents))
        for dtype, b in itertools.product(DTYPES, backends)
    ]
    layers = [
        Step(name=f"layer {dtype} {wire}", seconds=25, run=lambda d=dtype, w=wire: layer_checks(mesh, d, w, small))
        for dtype, wire in LAYERS
    ]
    recipes = Step(name="recipes", seconds=15, run=recipe_checks)
    layer_times = [
        Step(name=f"layer times {w.name}", seconds=35, run=lambda w=w: _layer_times(mesh, w)) for w in workloads
    ]
    product_times = [
        Step(name=f"product times {w.name} {b}", seconds=6, run=lambda w=w, b=b: _product_times(device, w, b))
        for w, b in itertools.product(workloads, backends)
    ]
    first = len(backends)  # the products in bf16 come first, those in other dtypes later
    return [*products[:first], *layers, *layer_times, *product_times, recipes, *products[first:]]


def backends_for(platform: str) -> list[str]:
    """The registered back ends with grouped products that serve ``platform``, or any platform."""
    found = []
    for name in backend_names():
        try:
            served = {p for kernel in ("grouped_matmul", "grouped_outer") for p in _platforms(kernel, name)}
        except UnsupportedError:
            continue  # it has transports alone
        if platform in served or not served:
            found.append(name)
    return found


def _platforms(kernel: str, name: str) -> tuple[str, ...]:
    return resolve_backend(kernel, name).platforms


def _small(workload: Workload) -> Workload:
    sizes = {name: max(1, getattr(workload, name) // 16) for name in ("tokens", "hidden", "ffn")}
    return dataclasses.replace(workload, **sizes)


# --- checks -----------------------------------------------------------------------------------------------------------


def product_checks(backend: str, dtype: str, extents: Sequence[tuple[int, int, int]]) -> Iterator[Row]:
    """Whether grouped products and their gradients are exact, at each of ``extents``."""
    for sizes in extents:
        found = grouped_matmul_deviations(backend, dtype, sizes)
        subject = f"{backend} {dtype} {' x '.join(map(str, sizes))}"
        yield _check("grouped matmul and gradients = oracle", subject, found, 0.0)
        fused = fused_deviations(backend, dtype, sizes)
        if fused is not None:
            yield _check("rows in slots, and activated = oracle", subject, fused, 0.0)


def recipe_checks() -> Iterator[Row]:
    """Whether rows on the quantised wire are right to the bit."""
    for name in RECIPES:
        yield _check("codes, scales and rows = oracle", name, recipe_deviations(name), 0.0)


def layer_checks(mesh: Mesh, dtype: str, wire: str, small: bool) -> Iterator[Row]:
    """Whether the layer and its gradients are right, with rows in ``dtype`` that travel both ways as ``wire``."""
    sizes = {} if small else {"tokens_per_rank": 64, "hidden": 256, "num_experts": 8, "ffn": 128}
    limit, subject = tolerance(dtype, wire), f"{dtype}, wire {wire}"
    precision = "highest" if dtype == "float32" else "default"
    with jax.default_matmul_precision(precision):
        layer = Layer(mesh, "auto", "auto", dtype=dtype, quant=wire, combine_quant=wire, **sizes)
        yield _check("layer = oracle", subject, layer.values(), limit)
        yield _check("every gradient of the layer = oracle", subject, layer.gradients(), limit)
        yield _check("nothing dropped, every choice counted", subject, layer.counts(), 0.0)


def _check(law: str, subject: str, deviations: list[float], limit: float) -> Row:
    worst = float(np.max(deviations))  # np.max keeps NaN, and NaN is no success
    row = {"event": "check", "law": law, "subject": subject, "cases": len(deviations)}
    return {**row, "worst": worst, "limit": limit, "passed": bool(worst <= limit)}


# --- times ------------------------------------------------------------------------------------------------------------


def _layer_times(mesh: Mesh, workload: Workload) -> Iterator[Row]:
    """Times of the layer and of the dense limit in bf16, once their results are right."""
    setting = make_setting(workload, mesh, "bfloat16", "none", ())
    weights = sum(value.nbytes for value in weights_of("experts", setting.data.params).values())
    for program in itertools.chain.from_iterable(compile_programs(setting, phase) for phase in PASSES):
        forward = program.phase == PASSES[0]
        results = program.run()
        try:
            if program.name == LIMIT:
                check_limit(setting, results if forward else results[0])
            elif program.name == LAYER:
                check_layer(setting, results if forward else results[0])
        except WrongResult as error:
            row = {"event": "check", "law": RIGHT, "subject": f"{workload.name} {program.name}"}
            yield {**row, "reason": str(error), "passed": False}
            continue
        del results
        # In the forward pass weights are read once, and tokens are read and written. In the backward pass weights are
        # read again and their gradients written, and tokens likewise.
        least_bytes = (weights + 2 * setting.data.x.nbytes) * (1 if forward else 3)
        flops = setting.limit_flops * (1 if forward else 3)
        what = f"{program.name}, {program.phase}"
        row = _time(mesh.devices.flat[0], workload, what, setting.plan.backend, "bfloat16", flops, least_bytes, program)
        yield {**row, "compile_seconds": program.compile_seconds}


def _product_times(device: _compat.Device, workload: Workload, backend: str) -> Iterator[Row]:
    """Times of the three grouped products with the experts' first matrix, in bf16, in even groups, on one back end."""
    rows, groups = workload.tokens * workload.top_k, workload.num_experts
    h, f, dtype = workload.hidden, workload.ffn, jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((rows, h), (groups, h, f), (rows, f))
    x, w, ct = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    sizes = np.diff(np.arange(groups + 1) * rows // groups).astype(np.int32)
    programs = {
        "x @ w": (lambda a, b, s: grouped_matmul(a, b, s, backend=backend), (x, w)),
        "ct @ w^T": (lambda a, b, s: grouped_matmul(a, b, s, backend=backend, transpose_rhs=True), (ct, w)),
        "x^T @ ct": (lambda a, b, s: grouped_outer(a, b, s, backend=backend, dtype="bfloat16"), (x, ct)),
    }
    flops, least_bytes = 2.0 * rows * h * f, 2 * sum(math.prod(shape) for shape in shapes)
    for what, (function, operands) in programs.items():
        start = time.perf_counter()
        program = _Timed(jax.jit(function).lower(*operands, sizes).compile(), (*operands, jnp.asarray(sizes)))
        seconds = time.perf_counter() - start
        worst = _spot_deviation(what, program.compiled(*program.arguments), x, w, ct, sizes)
        if not worst <= tolerance("bfloat16", "none"):  # false for NaN
            yield _check(RIGHT, f"{workload.name} {backend} {what}", [worst], tolerance("bfloat16", "none"))
            continue
        row = _time(device, workload, f"products {what}", backend, "bfloat16", flops, least_bytes, program)
        yield {**row, "compile_seconds": seconds}


def _spot_deviation(what: str, got: jax.Array, x: jax.Array, w: jax.Array, ct: jax.Array, sizes: np.ndarray) -> float:
    """How far a row, or a column of the gradient, of the first group with rows and of the last is from float64."""
    filled, starts, found = np.flatnonzero(sizes), np.cumsum(sizes) - sizes, []
    for g in (filled[0], filled[-1]):
        row, group = starts[g], slice(starts[g], starts[g] + sizes[g])
        if what == "x @ w":
            pair = got[row], _wide(x[row]) @ _wide(w[g])
        elif what == "ct @ w^T":
            pair = got[row], _wide(ct[row]) @ _wide(w[g]).T
        else:
            pair = got[g, :, 0], _wide(x[group]).T @ _wide(ct[group, 0])
        found.append(deviation(*pair, relative=True))
    return float(np.max(found))  # np.max keeps NaN


def _wide(array: jax.Array) -> np.ndarray:
    return np.asarray(array, np.float64)


@dataclasses.dataclass(frozen=True)
class _Timed:
    """A program that is timed: ``compiled`` is called with ``arguments``."""

    compiled: Callable
    arguments: tuple[Any, ...]


def _time(
    device: _compat.Device,
    workload: Workload,
    what: str,
    backend: str,
    dtype: str,
    flops: float,
    least_bytes: float,
    program: Program | _Timed,
) -> Row:
    """A row with the median time of ``program``, and its shares of the device's peaks in flops and bytes."""
    seconds = _seconds_per_call(program)
    median, peak = float(np.median(seconds)), peak_of(device.device_kind)
    sizes = {"rows": workload.tokens * workload.top_k, "hidden": workload.hidden, "ffn": workload.ffn}
    return {
        "event": "time",
        "workload": workload.name,
        **sizes,
        "num_experts": workload.num_experts,
        "what": what,
        "backend": backend,
        "dtype": dtype,
        "seconds": {"median": median, "low": min(seconds), "high": max(seconds)},
        "flops": flops,
        "flops_per_second": flops / median,
        "share_of_peak": flops / median / peak.flops16 if peak else None,
        "least_bytes": least_bytes,
        "share_of_memory_peak": least_bytes / median / peak.memory if peak else None,
    }


def _seconds_per_call(program: Program | _Timed) -> list[float]:
    """Means over calls that are queued one behind the other, so that the host's work between two does not count."""

    def batch(calls: int) -> float:
        start = time.perf_counter()
        result = program.compiled(*program.arguments)
        for _ in range(calls - 1):
            result = program.compiled(*program.arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    batch(1)
    calls = max(1, min(200, math.ceil(BATCH_SECONDS / batch(1))))
    return [batch(calls) for _ in range(REPEATS)]


# --- words ------------------------------------------------------------------------------------------------------------


def _describe(row: Row) -> str:
    """A row of the table."""
    kind = row["event"]
    if kind == "here":
        text = (
            f"moe_jax bench on {row['device']} ({row['platform']}), JAX {row['jax']}: {row['steps']} steps, about "
            f"{row['estimated_seconds'] / 60:.0f} minutes, at most {row['max_seconds'] / 60:.0f}"
        )
        return f"{text}; a CPU takes extents of a 16th, and its times say nothing" if row["platform"] == "cpu" else text
    if kind == "check":
        verdict = "ok" if row["passed"] else "FAILED"
        if "reason" in row:
            return f"{row['law']:<42} {row['subject']:<36} {verdict}: {row['reason']}"
        figures = f"{row['cases']:>2} cases, worst {row['worst']:.1e}, limit {row['limit']:.0e}"
        return f"{row['law']:<42} {row['subject']:<36} {figures}  {verdict}"
    if kind == "time":
        what = f"{row['workload']:<10} {row['what']:<32} {row['backend']:<10} {row['dtype']}"
        if row["share_of_peak"] is None:
            shares = "no peak known"
        else:
            shares = f"{row['share_of_peak']:.1%} of its peak, {row['share_of_memory_peak']:.1%} of its memory's"
        figures = f"{1e3 * row['seconds']['median']:9.3f} ms {row['flops_per_second'] / 1e9:9,.0f} GFLOP/s"
        return f"{what} {figures}  {shares}"
    if kind == "end":
        verdict = "all is well" if row["good"] else "NOT all is well, see above"
        return f"{verdict}; {row['seconds']:.0f} s on {row['device']}"
    if kind == "step":
        return f"  ({row['what']}: {row['seconds']:.0f} s)"
    return f"{row['what']}: {kind}: {row['reason']}"
