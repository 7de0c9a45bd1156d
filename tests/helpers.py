"""What many tests share: meshes, routing patterns, how to run a per-shard function over them, how to read programs.

Arrays over all ranks have the leading axes [W, P] (ep, tp), as in ``moe_jax.reference``. What the tests of one part
share stands in ``*_cases.py`` and ``*_laws.py``; no test file imports from another.
"""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax import _compat
from moe_jax.errors import UnsupportedError
from moe_jax.targets.target import find_target

MESHES = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (2, 4)]
TRANSPORTS = ["padded", "ragged", "allgather"]
# Every mesh, and with the other transports those where most differs: for the layer, where the tests of dispatch and
# combine hold the same on every mesh with every transport.
MANY_WORLDS = [
    *((ep, tp, "padded") for ep, tp in MESHES),
    *((ep, tp, "ragged") for ep, tp in ((2, 1), (8, 1), (4, 2))),
    *((ep, tp, "allgather") for ep, tp in ((8, 1), (4, 2), (2, 4))),
]
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


def over_mesh(mesh, function, axes=("ep", "tp")):
    """``function`` per shard over arrays with one leading dimension for each of ``axes``, which it does not see.

    An entry of ``axes`` is an axis of the mesh or a tuple of several. Every argument and result is split over them.
    """
    spec, first, new = P(*axes), (0,) * len(axes), (None,) * len(axes)

    def shard(*args):
        args = jax.tree.map(lambda a: a[first], args)
        return jax.tree.map(lambda a: a[new], function(*args))

    return _compat.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)


def over_ep(function, mesh=None):
    """``function`` per shard over arrays [W, ...], split over all axes of a mesh: of 8 ranks, if none is given."""
    mesh = mesh or mesh_of(8, 1)
    return over_mesh(mesh, function, (mesh.axis_names,))


def mesh_for(num_ranks, axes="x"):
    """A mesh of so many devices with the one axis "x", or with both ``axes`` ("ep", "tp"), tp being 2."""
    if axes == "x":
        return _compat.auto_mesh(np.array(jax.devices()[:num_ranks]), ("x",))
    return moe.make_mesh(ep=num_ranks // 2, tp=2)


def per_rank(num_ranks, body, axes="x"):
    """``body`` per shard over arrays [R, ...] of such a mesh, whose leading axis it does not see."""
    return over_mesh(mesh_for(num_ranks, axes), body, (axes,))


def mesh_of(ep: int, tp: int):
    return moe.make_mesh(ep=ep, tp=tp)


def needs(target):
    """Skips where the target's compiler is not installed."""
    try:
        find_target(target).check_installed()
    except UnsupportedError as error:
        pytest.skip(str(error))


DEFINITION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (?:\([^=]*\)|\S+) ([\w\-]+)\((.*)$")


def entry_graph(function, *args):
    """(root, name -> (op, operands)) of the entry computation of the optimised program."""
    text = jax.jit(function).lower(*args).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    nodes, root = {}, None
    for line in entry.splitlines():
        found = DEFINITION.match(line)
        if found:
            is_root, name, op, rest = found.groups()
            nodes[name] = op, re.findall(r"%([\w.\-]+)", rest.split(")")[0])
            root = name if is_root else root
    return root, nodes


def behind(start, nodes):
    """Every instruction that ``start`` depends on."""
    seen, todo = set(), [start]
    while todo:
        for operand in nodes[todo.pop()][1]:
            if operand in nodes and operand not in seen:
                seen.add(operand)
                todo.append(operand)
    return seen
