"""What the checks share: data made from a seed, deviations, and functions over a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from moe_jax import _compat
from moe_jax.plan import Plan, make_plan

TOKENS, HIDDEN, TOP_K = 8, 16, 2
PATTERNS = ("random", "skewed", "one rank", "masked")


def deviation(got: Any, expected: Any, *, relative: bool = False) -> float:
    """Largest deviation; relative: to the largest expected entry. Infinite for another shape."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        return float("inf")
    scale = max(np.abs(expected).max(initial=0.0), 1e-6) if relative else 1.0
    return float(np.abs(got - expected).max(initial=0.0) / scale)


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-4, 5, shape).astype(np.float32)


def over(mesh: Mesh, function: Callable) -> Callable:
    """``function`` per device over arrays [W, P, ...]."""
    experts = tuple(axis for axis in mesh.axis_names if axis != "tp")

    def shard(*args):
        outputs = function(*jax.tree.map(lambda a: a[0, 0], args))
        return jax.tree.map(lambda a: a[None, None], outputs)

    spec = PartitionSpec(experts, "tp")
    return jax.jit(_compat.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec))


def expert_ids(pattern: str, rng: np.random.Generator, lead: tuple[int, ...], num_experts: int) -> np.ndarray:
    """[*lead, K] expert ids, distinct for each token."""
    weights = np.ones(num_experts)
    if pattern == "skewed":
        weights = 1.0 / np.arange(1, num_experts + 1) ** 1.5
    if pattern == "one rank":
        weights[TOP_K:] = 0
    rows = int(np.prod(lead))
    chosen = [rng.choice(num_experts, TOP_K, replace=False, p=weights / weights.sum()) for _ in range(rows)]
    return np.stack(chosen).reshape(*lead, TOP_K).astype(np.int32)


def make_case_plan(mesh: Mesh, transport: str, backend: str, **options) -> Plan:
    """A small plan that poisons all that nobody may read. ``options`` of ``make_plan`` replace sizes and dtype."""
    ranks = mesh.size // mesh.shape["tp"]
    sizes = {"tokens_per_rank": TOKENS, "hidden": HIDDEN, "num_experts": ranks * max(2, -(-4 // ranks)), "top_k": TOP_K}
    given = {**sizes, "dtype": "float32", "transport": transport, "backend": backend, "poison": True, **options}
    return make_plan(mesh, **given)
