"""Checks this installation on the devices that are there: laws, and comparisons with the float64 oracle.

Every case is made from a fixed seed. Data are small integers where a result must be exact, so that the limit is 0.
Rows and slots that nobody writes are poisoned with NaN, so that a check fails if one of them is read.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from moe_jax import quant
from moe_jax.config import MeshConfig
from moe_jax.kernels import check_backend
from moe_jax.mesh import ensure_devices, has_accelerator, make_mesh
from moe_jax.verify.backend import LAWS, BackendContractError, dtypes_of, hold
from moe_jax.verify.exchange import Exchange, ragged_deviations, same_bits
from moe_jax.verify.kernels import recipe_deviations
from moe_jax.verify.layer import Layer

TRANSPORTS = ("padded", "ragged", "allgather")

# The limits are for fp32 against float64, relative to the largest entry of an array, with products at the highest
# precision of the back end.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table.

    Attributes:
      law: what was checked.
      subject: the transport or back end that was checked.
      cases: how many cases were checked.
      worst: the largest deviation.
      limit: the largest deviation that passes.
      seconds: how long it took.
      note: what is wrong, where a law of a back end says so.
    """

    law: str
    subject: str
    cases: int
    worst: float
    limit: float
    seconds: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.worst <= self.limit)  # false for NaN


def run(mesh_config: MeshConfig | None = None, backend: str = "auto", json_lines: bool = False) -> int:
    """Runs all checks and prints a line for each. Returns the exit code: 0 if all passed, 1 otherwise.

    Args:
      mesh_config: None: all accelerators that are there as ep, or 8 emulated CPU devices as ep=4, tp=2.
      backend: a back end that is registered, or that an installed package offers by the entry-point group
        "moe_jax.backends"; or "auto". Every law of ``moe_jax.verify.backend`` that applies to it is a line.
      json_lines: print JSON lines instead of a table.

    Raises:
      InvalidArgumentError, MeshError: an unknown back end, or too few devices.
    """
    check_backend(backend)
    mesh = _mesh(mesh_config)
    device = mesh.devices.flat[0]
    if not json_lines:
        print(f"moe_jax verify: {dict(mesh.shape)} on {mesh.size} {device.platform} device(s), {backend=}")
        print(f"{'law':<44} {'subject':<17} {'cases':>5} {'worst':>9} {'limit':>7} {'s':>6}")
    checks = []
    with jax.default_matmul_precision("highest"):
        for check in _checks(mesh, backend):
            checks.append(check)
            _show(check, json_lines)
    failed = [check for check in checks if not check.passed]
    cases = sum(check.cases for check in checks)
    if json_lines:
        print(json.dumps({"event": "summary", "checks": len(checks), "cases": cases, "failed": len(failed)}))
    elif failed:
        print(f"{len(failed)} of {len(checks)} checks FAILED: do not trust results from this installation")
    else:
        print(f"all {len(checks)} checks passed ({cases} generated cases)")
    return 1 if failed else 0


def _mesh(config: MeshConfig | None) -> Mesh:
    if config is None:
        config = MeshConfig(ep=4, tp=2) if not has_accelerator() else MeshConfig(ep=len(jax.devices()))
    ensure_devices(config.num_devices)
    return make_mesh(ep=config.ep, tp=config.tp, nodes=config.nodes, dp=config.dp)


def _show(check: Check, json_lines: bool) -> None:
    if json_lines:
        print(json.dumps({"event": "check", "passed": check.passed, **dataclasses.asdict(check)}), flush=True)
        return
    verdict = "ok" if check.passed else "FAILED"
    print(
        f"{check.law:<44} {check.subject:<17} {check.cases:>5} {check.worst:>9.1e} {check.limit:>7.0e} "
        f"{check.seconds:>6.1f}  {verdict}" + (f"\n{check.note}" if check.note else ""),
        flush=True,
    )


def _checks(mesh: Mesh, backend: str) -> Iterator[Check]:
    for law in LAWS:
        if check := _of_backend(law, backend):
            yield check
    for name in quant.NAMES[1:]:
        yield _timed("codes, scales and rows = oracle", name, 0.0, lambda name=name: recipe_deviations(name))
    transports = (*TRANSPORTS, "hierarchy") if "node" in mesh.shape else TRANSPORTS
    if "dp" not in mesh.shape:  # the oracle knows no replicas
        yield _timed("ragged all-to-all = oracle", "ragged", 0.0, lambda: ragged_deviations(mesh))
        sent = {}
        for transport in transports:
            errors = Exchange(mesh, transport, backend)
            for law in ("dispatch = oracle", "combine = oracle", "gradients of both = oracle"):
                yield _timed(law, transport, 0.0, lambda law=law, errors=errors: errors.of(law))
            yield _timed("<dispatch x, y> = <x, combine y>", transport, 0.0, errors.adjoint)
            sent[transport] = errors.rows
        yield _timed("dispatch: same bits on every transport", "all", 0.0, lambda: same_bits(sent))
    for transport in transports:
        layer = Layer(mesh, transport, backend)
        yield _timed("layer = oracle", transport, TOLERANCE, layer.values)
        yield _timed("every gradient of the layer = oracle", transport, TOLERANCE, layer.gradients)
        yield _timed("nothing dropped, every choice counted", transport, 0.0, layer.counts)
        yield _timed("two runs: same bits", transport, 0.0, layer.repeated)


def _of_backend(law: str, backend: str) -> Check | None:
    """The line of a law of back ends, over every dtype that it looks at; None where the law does not apply."""
    start, cases, worst, notes = time.perf_counter(), 0, 0.0, []
    for dtype in dtypes_of(law):
        try:
            cases += hold(law, backend, dtype) or 0
        except BackendContractError as error:
            cases, worst = cases + error.num_cases, float(np.max([worst, error.worst]))
            notes.append(str(error))
    if not cases:
        return None
    seconds, name = time.perf_counter() - start, "back end: " + law.replace("_", " ")
    return Check(law=name, subject=backend, cases=cases, worst=worst, limit=0.0, seconds=seconds, note="\n".join(notes))


def _timed(law: str, subject: str, limit: float, deviations: Callable[[], list[float]]) -> Check:
    start = time.perf_counter()
    found = deviations()
    worst = float(np.max(found)) if found else float("nan")  # np.max keeps NaN; without a case nothing is proved
    seconds = time.perf_counter() - start
    return Check(law=law, subject=subject, cases=len(found), worst=worst, limit=limit, seconds=seconds)
