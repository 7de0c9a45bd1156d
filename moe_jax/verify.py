"""Checks this installation on the devices that are there: laws, and the float64 reference.

Every case is generated from a fixed seed. Data are small integers where a result must be exact (limit 0); unwritten
rows and slots are poisoned with NaN, so one that leaks makes its check fail.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from moe_jax import _compat, reference
from moe_jax.combine import combine
from moe_jax.comm import ragged_all_to_all
from moe_jax.config import MeshConfig, RouterConfig
from moe_jax.dispatch import dispatch
from moe_jax.errors import check_choice
from moe_jax.kernels import backend_names, grouped_matmul
from moe_jax.mesh import ensure_devices, has_accelerator, make_mesh
from moe_jax.on_mesh import moe_on_mesh
from moe_jax.plan import Plan, make_plan

TOKENS, HIDDEN, TOP_K = 8, 16, 2
TRANSPORTS = ("padded", "ragged", "allgather")
PATTERNS = ("random", "skewed", "one rank", "masked")

# fp32 against float64, relative to the largest entry of an array; products at the back end's highest precision.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table."""

    law: str
    subject: str  # the transport or back end that was checked
    cases: int
    worst: float  # largest deviation; 0 where results must be equal
    limit: float
    seconds: float

    @property
    def passed(self) -> bool:
        return bool(self.worst <= self.limit)  # false for NaN


def run(mesh_config: MeshConfig | None = None, backend: str = "auto", json_lines: bool = False) -> int:
    """Runs all checks and prints a line for each. Returns the exit code: 0 if all passed, 1 otherwise.

    Args:
      mesh_config: None: all accelerators that are there as ep, or 8 emulated CPU devices as ep=4, tp=2.
      backend: a registered back end, or "auto".
      json_lines: print JSON lines instead of a table.

    Raises:
      InvalidArgumentError, MeshError: an unknown back end, or too few devices.
    """
    check_choice("backend", backend, ["auto", *backend_names()])
    mesh = _mesh(mesh_config)
    device = mesh.devices.flat[0]
    if not json_lines:
        print(f"moe_jax verify: {dict(mesh.shape)} on {mesh.size} {device.platform} device(s), {backend=}")
        print(f"{'law':<44} {'subject':<10} {'cases':>5} {'worst':>9} {'limit':>7} {'s':>6}")
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
        f"{check.law:<44} {check.subject:<10} {check.cases:>5} {check.worst:>9.1e} {check.limit:>7.0e} "
        f"{check.seconds:>6.1f}  {verdict}",
        flush=True,
    )


def _checks(mesh: Mesh, backend: str) -> Iterator[Check]:
    yield _timed("grouped matmul and gradients = reference", backend, 0.0, lambda: _grouped_matmul(backend))
    if mesh.size == mesh.shape["ep"] * mesh.shape["tp"]:  # the reference knows no other axes
        yield _timed("ragged all-to-all = reference", "ragged", 0.0, lambda: _ragged(mesh))
        sent = {}
        for transport in TRANSPORTS:
            errors = _Exchange(mesh, transport, backend)
            for law in ("dispatch = reference", "combine = reference", "gradients of both = reference"):
                yield _timed(law, transport, 0.0, lambda law=law, errors=errors: errors.of(law))
            yield _timed("<dispatch x, y> = <x, combine y>", transport, 0.0, errors.adjoint)
            sent[transport] = errors.rows
        yield _timed("dispatch: same bits on every transport", "all", 0.0, lambda: _same_bits(sent))
    for transport in TRANSPORTS:
        layer = _Layer(mesh, transport, backend)
        yield _timed("layer = reference", transport, TOLERANCE, layer.values)
        yield _timed("every gradient of the layer = reference", transport, TOLERANCE, layer.gradients)
        yield _timed("nothing dropped, every choice counted", transport, 0.0, layer.counts)
        yield _timed("two runs: same bits", transport, 0.0, layer.repeated)


def _timed(law: str, subject: str, limit: float, deviations: Callable[[], list[float]]) -> Check:
    start = time.perf_counter()
    found = deviations()
    worst = float(np.max(found)) if found else float("nan")  # np.max keeps NaN; no case at all is no proof
    seconds = time.perf_counter() - start
    return Check(law=law, subject=subject, cases=len(found), worst=worst, limit=limit, seconds=seconds)


def _deviation(got, expected, *, relative: bool = False) -> float:
    """Largest deviation; relative: to the largest expected entry. Infinite for another shape."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        return float("inf")
    scale = max(np.abs(expected).max(initial=0.0), 1e-6) if relative else 1.0
    return float(np.abs(got - expected).max(initial=0.0) / scale)


def _integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(np.float32)


def _over(mesh: Mesh, function: Callable) -> Callable:
    """``function`` per device over arrays [W, P, ...]."""
    experts = tuple(axis for axis in mesh.axis_names if axis != "tp")

    def shard(*args):
        outputs = function(*jax.tree.map(lambda a: a[0, 0], args))
        return jax.tree.map(lambda a: a[None, None], outputs)

    spec = PartitionSpec(experts, "tp")
    return jax.jit(_compat.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec))


def _grouped_matmul(backend: str) -> list[float]:
    rng, found = np.random.default_rng(1), []
    for sizes in ([5, 0, 9, 2], [0, 0, 0, 0], [0, 20, 0, 0], [1, 1, 1, 17]):
        lhs, rhs, ct = _integers(rng, 20, 8), _integers(rng, 4, 8, 6), _integers(rng, 20, 6)
        total, sizes = sum(sizes), np.array(sizes, np.int32)
        lhs[total:] = np.nan
        ct[total:] = np.nan
        product, pull = jax.vjp(lambda a, b, s=sizes: grouped_matmul(a, b, jnp.asarray(s), backend=backend), lhs, rhs)
        d_lhs, d_rhs = pull(jnp.asarray(ct))
        want_lhs, want_rhs = reference.grouped_matmul_vjp(ct, lhs, rhs, sizes)
        expected = reference.grouped_matmul(lhs, rhs, sizes)
        pairs = ((product[:total], expected[:total]), (d_lhs[:total], want_lhs[:total]), (d_rhs, want_rhs))
        found.append(max(_deviation(*pair) for pair in pairs))
    return found


def _ragged(mesh: Mesh) -> list[float]:
    num_ranks, num_peers = mesh.size // mesh.shape["tp"], mesh.shape["tp"]
    axes = tuple(axis for axis in mesh.axis_names if axis != "tp")
    rows = 6 * num_ranks
    run = _over(mesh, lambda *args: ragged_all_to_all(*args, axis_name=axes))
    rng, found = np.random.default_rng(2), []
    for highest in (3, 6, 1):
        sizes = rng.integers(0, highest + 1, (num_ranks, num_ranks))
        inputs, outputs = np.cumsum(sizes, 1) - sizes, np.cumsum(sizes, 0) - sizes
        operand, output = _integers(rng, num_ranks, rows, 3), _integers(rng, num_ranks, rows, 3)
        arguments = (operand, output, inputs, sizes, outputs, sizes.T)
        expected = reference.ragged_all_to_all(*arguments)
        per_peer = [np.repeat(a[:, None], num_peers, 1) for a in arguments]
        got = run(*(a.astype(np.int32) if a.dtype.kind == "i" else a for a in per_peer))
        found.append(_deviation(got, np.repeat(np.stack(expected)[:, None], num_peers, 1)))
    return found


def _expert_ids(pattern: str, rng: np.random.Generator, lead: tuple[int, ...], num_experts: int) -> np.ndarray:
    """[*lead, K], distinct in a row."""
    weights = np.ones(num_experts)
    if pattern == "skewed":
        weights = 1.0 / np.arange(1, num_experts + 1) ** 1.5
    if pattern == "one rank":
        weights[TOP_K:] = 0
    rows = int(np.prod(lead))
    chosen = [rng.choice(num_experts, TOP_K, replace=False, p=weights / weights.sum()) for _ in range(rows)]
    return np.stack(chosen).reshape(*lead, TOP_K).astype(np.int32)


def _plan(mesh: Mesh, transport: str, backend: str, **options) -> Plan:
    ranks = mesh.size // mesh.shape["tp"]
    return make_plan(
        mesh,
        tokens_per_rank=TOKENS,
        hidden=HIDDEN,
        num_experts=ranks * max(2, -(-4 // ranks)),
        top_k=TOP_K,
        dtype="float32",
        transport=transport,
        backend=backend,
        poison=True,
        **options,
    )


class _Exchange:
    """dispatch and combine on one transport, on integers, compared with the reference."""

    def __init__(self, mesh: Mesh, transport: str, backend: str):
        self.ranks, self.peers = mesh.size // mesh.shape["tp"], mesh.shape["tp"]
        self.plan = _plan(mesh, transport, backend)
        self.program = _over(mesh, self._shard)
        self.deviations: dict[str, list[float]] = {}
        self.inner_products: list[float] = []
        self.rows: list[np.ndarray] = []

    def _shard(self, x, ids, weights, mask, ct_rows, ct_y):
        sent, pull_sent = jax.vjp(lambda x: dispatch(x, ids, self.plan, token_mask=mask).x, x)
        handle = dispatch(x, ids, self.plan, token_mask=mask).handle
        y, pull_y = jax.vjp(lambda rows, weights: combine(rows, weights, handle), sent, weights)
        returned = combine(ct_rows, jnp.ones_like(weights), handle)
        return sent, handle.group_sizes, y, pull_sent(ct_rows)[0], *pull_y(ct_y), returned

    def of(self, law: str) -> list[float]:
        """Deviations of one law; the first call runs all cases."""
        if not self.deviations:
            rng = np.random.default_rng(3)
            for pattern in PATTERNS:
                self._case(pattern, rng)
        return self.deviations[law]

    def adjoint(self) -> list[float]:
        """<dispatch x, y> - <x, combine y> with unit weights, both sums over the whole mesh."""
        return self.inner_products

    def _case(self, pattern: str, rng: np.random.Generator) -> None:
        lead, plan = (self.ranks, self.peers, TOKENS), self.plan
        ids = _expert_ids(pattern, rng, lead, plan.num_experts)
        mask = rng.random(lead) < 0.6 if pattern == "masked" else np.ones(lead, bool)
        x, ct_y, weights = _integers(rng, *lead, HIDDEN), _integers(rng, *lead, HIDDEN), _integers(rng, *lead, TOP_K)
        want = reference.dispatch(x, ids, num_experts=plan.num_experts, token_mask=mask)
        totals = want.group_sizes.sum(-1)
        ct_rows = _integers(rng, self.ranks, self.peers, plan.num_rows(plan.num_pairs), HIDDEN)
        ct_rows[np.arange(ct_rows.shape[2]) >= totals[..., None]] = np.nan
        got = [np.asarray(a) for a in self.program(x, ids, weights, mask, ct_rows, ct_y)]
        sent, sizes, y, d_x, d_rows, d_weights, returned = got

        def written(rows):
            return [[rows[w, p, : totals[w, p]] for p in range(self.peers)] for w in range(self.ranks)]

        def ranked(rows, expected):
            pairs = ((a, b) for got, want in zip(written(rows), expected) for a, b in zip(got, want))
            return max(_deviation(a, b) for a, b in pairs)

        want_rows, want_weights = reference.combine_vjp(ct_y, want.rows, weights, want)
        self._add("dispatch = reference", _deviation(sizes, want.group_sizes), ranked(sent, want.rows))
        self._add("combine = reference", _deviation(y, reference.combine(want.rows, weights, want)))
        self._add(
            "gradients of both = reference",
            _deviation(d_x, reference.dispatch_vjp(written(ct_rows), want, TOKENS)),
            ranked(d_rows, want_rows),
            _deviation(d_weights, want_weights),
        )
        sides = sum(float(np.sum(a * b)) for s, c in zip(written(sent), written(ct_rows)) for a, b in zip(s, c))
        self.inner_products.append(abs(sides - float(np.sum(x * returned))))
        self.rows.append(np.concatenate([a.ravel() for row in written(sent) for a in row]))

    def _add(self, law: str, *deviations: float) -> None:
        self.deviations.setdefault(law, []).append(float(np.max(deviations)))


def _same_bits(sent: dict[str, list[np.ndarray]]) -> list[float]:
    first, *others = sent.values()
    return [
        float(np.count_nonzero(a.view(np.int32) != b.view(np.int32))) for other in others for a, b in zip(first, other)
    ]


class _Layer:
    """The whole layer on one transport, random data, compared with the reference."""

    def __init__(self, mesh: Mesh, transport: str, backend: str):
        self.plan = _plan(mesh, transport, backend, num_shared_experts=1, capacity_factor=1.0)
        self.num_tokens = TOKENS * mesh.size
        self.router = RouterConfig()
        self.init, apply = moe_on_mesh(mesh, self.plan, self.router, ffn=8 * mesh.shape["tp"], use_bias=True)

        def loss(params, x, mask, ct):
            y, stats = apply(params, x, mask)
            return jnp.sum(y * ct) + 0.1 * stats.losses["balance"] + 0.01 * stats.losses["z"], (y, stats)

        self.program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        self.cases = []

    def _run(self) -> list[tuple]:
        """(arguments, results) of every pattern; routes are steered through bumps in x that the router reads off."""
        if not self.cases:
            rng = np.random.default_rng(4)
            params = {name: 0.5 * np.asarray(value) for name, value in self.init(jax.random.key(0)).items()}
            experts = self.plan.num_experts
            if experts <= HIDDEN:
                params["router"][:experts] += 1.5 * np.eye(experts, dtype=np.float32)
            for pattern in PATTERNS:
                ids = _expert_ids(pattern, rng, (self.num_tokens,), experts)
                x = 0.3 * rng.normal(size=(self.num_tokens, HIDDEN))
                for k in range(TOP_K):
                    x[np.arange(self.num_tokens), ids[:, k] % HIDDEN] += 3.0 - 0.5 * k
                mask = rng.random(self.num_tokens) < 0.6 if pattern == "masked" else np.ones(self.num_tokens, bool)
                ct = rng.normal(size=x.shape)
                arguments = (params, x.astype(np.float32), mask, ct.astype(np.float32))
                self.cases.append((arguments, self.program(*arguments)))
        return self.cases

    def values(self) -> list[float]:
        found = []
        for (params, x, mask, _), ((_, (y, stats)), _) in self._run():
            want, routing = reference.moe_layer(params, x, self.router, top_k=TOP_K, token_mask=mask)
            losses = [_deviation(stats.losses[name], routing.losses[name], relative=True) for name in ("balance", "z")]
            found.append(float(np.max([_deviation(y, want, relative=True), *losses])))
        return found

    def gradients(self) -> list[float]:
        found = []
        for (params, x, mask, ct), (_, (d_params, d_x)) in self._run():
            want_params, want_x = reference.moe_layer_vjp(
                params, x, ct, self.router, top_k=TOP_K, token_mask=mask, ct_balance=0.1, ct_z=0.01
            )
            each = [_deviation(d_params[name], want_params[name], relative=True) for name in want_params]
            found.append(float(np.max([_deviation(d_x, want_x, relative=True), *each])))
        return found

    def counts(self) -> list[float]:
        found = []
        for (params, x, mask, _), ((_, (_, stats)), _) in self._run():
            _, routing = reference.moe_layer(params, x, self.router, top_k=TOP_K, token_mask=mask)
            found.append(_deviation(stats.load, routing.load) + float(stats.num_dropped))
        return found

    def repeated(self) -> list[float]:
        found = []
        for arguments, results in self._run():
            pairs = zip(jax.tree.leaves(results), jax.tree.leaves(self.program(*arguments)))
            found.append(float(sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)))
        return found
