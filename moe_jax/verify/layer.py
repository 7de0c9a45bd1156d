"""The laws of the whole layer on one transport, against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax import reference
from moe_jax.config import RouterConfig
from moe_jax.layer.on_mesh import moe_on_mesh
from moe_jax.verify.cases import PATTERNS, TOP_K, deviation, expert_ids, make_case_plan


class Layer:
    """The whole layer on one transport, on random data, compared with the float64 oracle.

    ``options`` are those of ``make_plan``. Parameters and tokens are rounded to the plan's dtype before either side
    sees them, except for the router, which is always fp32.
    """

    def __init__(self, mesh: Mesh, transport: str, backend: str, *, ffn: int = 8, **options):
        self.plan = make_case_plan(
            mesh, transport, backend, **{"num_shared_experts": 1, "capacity_factor": 1.0, **options}
        )
        self.num_tokens = self.plan.tokens_per_rank * mesh.size
        self.router = RouterConfig()
        self.init, apply = moe_on_mesh(mesh, self.plan, self.router, ffn=ffn * mesh.shape["tp"], use_bias=True)

        def loss(params, x, mask, ct):
            y, stats = apply(params, x, mask)
            loss = jnp.sum(y.astype(jnp.float32) * ct) + 0.1 * stats.losses["balance"] + 0.01 * stats.losses["z"]
            return loss, (y, stats)

        self.program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        self.cases = []

    def _run(self) -> list[tuple]:
        """(arguments, results) for every pattern. Bumps in x, which the router reads off, decide the routes."""
        if not self.cases:
            rng = np.random.default_rng(4)
            params = {name: 0.5 * np.asarray(value) for name, value in self.init(jax.random.key(0)).items()}
            experts, hidden = self.plan.num_experts, self.plan.hidden
            if experts <= hidden:
                params["router"][:experts] += 1.5 * np.eye(experts, dtype=np.float32)
            params = {name: value if name == "router" else self._rounded(value) for name, value in params.items()}
            for pattern in PATTERNS:
                ids = expert_ids(pattern, rng, (self.num_tokens,), experts)
                x = 0.3 * rng.normal(size=(self.num_tokens, hidden))
                for k in range(TOP_K):
                    x[np.arange(self.num_tokens), ids[:, k] % hidden] += 3.0 - 0.5 * k
                mask = rng.random(self.num_tokens) < 0.6 if pattern == "masked" else np.ones(self.num_tokens, bool)
                ct = self._rounded(rng.normal(size=x.shape)).astype(np.float32)
                arguments = (params, self._rounded(x), mask, ct)
                self.cases.append((arguments, self.program(*arguments)))
        return self.cases

    def _rounded(self, array: np.ndarray) -> np.ndarray:
        return np.asarray(array, jnp.dtype(self.plan.dtype))

    def values(self) -> list[float]:
        found = []
        for (params, x, mask, _), ((_, (y, stats)), _) in self._run():
            want, routing = reference.moe_layer(_wide(params), _wide(x), self.router, top_k=TOP_K, token_mask=mask)
            losses = [deviation(stats.losses[name], routing.losses[name], relative=True) for name in ("balance", "z")]
            found.append(float(np.max([deviation(y, want, relative=True), *losses])))
        return found

    def gradients(self) -> list[float]:
        found = []
        for (params, x, mask, ct), (_, (d_params, d_x)) in self._run():
            want_params, want_x = reference.moe_layer_vjp(
                _wide(params), _wide(x), ct, self.router, top_k=TOP_K, token_mask=mask, ct_balance=0.1, ct_z=0.01
            )
            each = [deviation(d_params[name], want_params[name], relative=True) for name in want_params]
            found.append(float(np.max([deviation(d_x, want_x, relative=True), *each])))
        return found

    def counts(self) -> list[float]:
        found = []
        for (params, x, mask, _), ((_, (_, stats)), _) in self._run():
            _, routing = reference.moe_layer(_wide(params), _wide(x), self.router, top_k=TOP_K, token_mask=mask)
            found.append(deviation(stats.load, routing.load) + float(stats.num_dropped))
        return found

    def repeated(self) -> list[float]:
        found = []
        for arguments, results in self._run():
            pairs = zip(jax.tree.leaves(results), jax.tree.leaves(self.program(*arguments)), strict=True)
            found.append(float(sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)))
        return found


def _wide(tree):
    """All arrays in float64, as the oracle computes; NumPy by itself does not widen bf16."""
    return jax.tree.map(lambda array: np.asarray(array, np.float64), tree)
