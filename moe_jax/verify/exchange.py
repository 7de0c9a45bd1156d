"""The laws of an exchange: dispatch and combine on one transport, and the ragged all-to-all, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import reference
from moe_jax.collectives import ragged_all_to_all
from moe_jax.layer.combine import combine
from moe_jax.layer.dispatch import dispatch
from moe_jax.verify.cases import HIDDEN, PATTERNS, TOKENS, TOP_K, deviation, expert_ids, integers, make_case_plan, over


def ragged_deviations(mesh: Mesh) -> list[float]:
    num_ranks, num_peers = mesh.size // mesh.shape["tp"], mesh.shape["tp"]
    axes = tuple(axis for axis in mesh.axis_names if axis != "tp")
    rows = 6 * num_ranks
    run = over(mesh, lambda *args: ragged_all_to_all(*args, axis_name=axes))
    rng, found = np.random.default_rng(2), []
    for highest in (3, 6, 1):
        sizes = rng.integers(0, highest + 1, (num_ranks, num_ranks))
        inputs, outputs = np.cumsum(sizes, 1) - sizes, np.cumsum(sizes, 0) - sizes
        operand, output = integers(rng, num_ranks, rows, 3), integers(rng, num_ranks, rows, 3)
        arguments = (operand, output, inputs, sizes, outputs, sizes.T)
        expected = reference.ragged_all_to_all(*arguments)
        per_peer = [np.repeat(a[:, None], num_peers, 1) for a in arguments]
        got = run(*(a.astype(np.int32) if a.dtype.kind == "i" else a for a in per_peer))
        found.append(deviation(got, np.repeat(np.stack(expected)[:, None], num_peers, 1)))
    return found


class Exchange:
    """Dispatch and combine on one transport, on small integers, compared with the float64 oracle."""

    def __init__(self, mesh: Mesh, transport: str, backend: str):
        self.ranks, self.peers = mesh.size // mesh.shape["tp"], mesh.shape["tp"]
        self.plan = make_case_plan(mesh, transport, backend)
        self.program = over(mesh, self._shard)
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
        ids = expert_ids(pattern, rng, lead, plan.num_experts)
        mask = rng.random(lead) < 0.6 if pattern == "masked" else np.ones(lead, bool)
        x, ct_y, weights = integers(rng, *lead, HIDDEN), integers(rng, *lead, HIDDEN), integers(rng, *lead, TOP_K)
        # 1. The oracle says which rows each device gets. Rows past them have NaN as their cotangent.
        want = reference.dispatch(x, ids, num_experts=plan.num_experts, token_mask=mask)
        totals = want.group_sizes.sum(-1)
        ct_rows = integers(rng, self.ranks, self.peers, plan.num_rows(plan.num_pairs), HIDDEN)
        ct_rows[np.arange(ct_rows.shape[2]) >= totals[..., None]] = np.nan
        # 2. The program gives both results and all gradients.
        got = [np.asarray(a) for a in self.program(x, ids, weights, mask, ct_rows, ct_y)]
        sent, sizes, y, d_x, d_rows, d_weights, returned = got

        def written(rows):
            return [[rows[w, p, : totals[w, p]] for p in range(self.peers)] for w in range(self.ranks)]

        def ranked(rows, expected):
            pairs = (
                (a, b)
                for got, want in zip(written(rows), expected, strict=True)
                for a, b in zip(got, want, strict=True)
            )
            return max(deviation(a, b) for a, b in pairs)

        # 3. Each of them beside the oracle.
        want_rows, want_weights = reference.combine_vjp(ct_y, want.rows, weights, want)
        self._add("dispatch = oracle", deviation(sizes, want.group_sizes), ranked(sent, want.rows))
        self._add("combine = oracle", deviation(y, reference.combine(want.rows, weights, want)))
        self._add(
            "gradients of both = oracle",
            deviation(d_x, reference.dispatch_vjp(written(ct_rows), want, TOKENS)),
            ranked(d_rows, want_rows),
            deviation(d_weights, want_weights),
        )
        # 4. The two sides of the adjoint law, over the whole mesh.
        sides = sum(
            float(np.sum(a * b))
            for s, c in zip(written(sent), written(ct_rows), strict=True)
            for a, b in zip(s, c, strict=True)
        )
        self.inner_products.append(abs(sides - float(np.sum(x * returned))))
        self.rows.append(np.concatenate([a.ravel() for row in written(sent) for a in row]))

    def _add(self, law: str, *deviations: float) -> None:
        self.deviations.setdefault(law, []).append(float(np.max(deviations)))


def same_bits(sent: dict[str, list[np.ndarray]]) -> list[float]:
    first, *others = sent.values()
    return [
        float(np.count_nonzero(a.view(np.int32) != b.view(np.int32)))
        for other in others
        for a, b in zip(first, other, strict=True)
    ]
