"""Generators shared by the tests: meshes, routing patterns, and how to run a per-shard function over them.

Arrays over all ranks have the leading axes [W, P] (ep, tp), as in ``moe_jax.reference``.
"""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import _compat

MESHES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (2, 4)]
TRANSPORTS = ["padded", "ragged", "allgather"]
# Of the tests that everybody runs; the slow ones take every mesh with every transport.
FEW_WORLDS = [(1, 1, "padded"), (8, 1, "padded"), *((4, 2, transport) for transport in TRANSPORTS)]
# For the layer, where other tests that everybody runs hold the same of dispatch and combine on every transport.
MOSTLY_PADDED = ["padded", *(pytest.param(transport, marks=pytest.mark.slow) for transport in TRANSPORTS[1:])]
PATTERNS = ["balanced", "random", "zipf", "one_rank", "empty_experts", "masked", "none"]


def expert_ids(pattern: str, rng: np.random.Generator, shape: tuple, num_experts: int, ep: int) -> np.ndarray:
    """[..., K] ids, distinct within a row; "masked" mixes in -1, "none" is all -1."""
    *lead, top_k = shape
    rows = int(np.prod(lead))
    weights = np.ones(num_experts)
    if pattern == "none" or not rows:
        return np.full(shape, -1, np.int32)
    if pattern == "balanced":
        start = np.arange(rows) * top_k
        return ((start[:, None] + np.arange(top_k)) % num_experts).reshape(shape).astype(np.int32)
    if pattern == "zipf":
        weights = 1.0 / np.arange(1, num_experts + 1) ** 1.5
    if pattern == "one_rank":  # the whole load on the first rank, or on as few as hold top_k experts
        weights[max(num_experts // ep, top_k) :] = 0
    if pattern == "empty_experts" and num_experts - 3 >= top_k:
        weights[rng.choice(num_experts, 3, replace=False)] = 0
    weights = weights / weights.sum()
    ids = np.stack([rng.choice(num_experts, top_k, replace=False, p=weights) for _ in range(rows)])
    ids = ids.reshape(shape).astype(np.int32)
    if pattern == "masked":
        ids[rng.random(shape) < 0.4] = -1
    return ids


def small_integers(rng: np.random.Generator, shape: tuple, dtype=np.float32) -> np.ndarray:
    """Whole numbers of at most 4 in size: every sum in these tests is exact."""
    return rng.integers(-4, 5, shape).astype(dtype)


def over_mesh(mesh, function):
    """``function`` per shard over arrays [W, P, ...]; every argument and result is split over ("ep", "tp")."""
    spec = P("ep", "tp")

    def shard(*args):
        args = jax.tree.map(lambda a: a[0, 0], args)
        return jax.tree.map(lambda a: a[None, None], function(*args))

    return _compat.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)


def mesh_of(ep: int, tp: int):
    return moe.make_mesh(ep=ep, tp=tp)
