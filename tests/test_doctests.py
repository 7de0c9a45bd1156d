"""The examples in docstrings do what they say."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import _compat

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(moe_jax.__path__, "moe_jax.")
    if not name.startswith(("moe_jax.tools.train", "moe_jax.tools.cli", "moe_jax.__main__"))
]
SLOW = {
    "moe_jax.fused.api",
    "moe_jax.layer.combine",
    "moe_jax.layer.dispatch",
}  # without jit: every operation is compiled alone


def _globals():
    mesh = moe_jax.make_mesh(ep=2)
    plan = moe_jax.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=4, top_k=2, dtype="float32")
    names = {name: getattr(moe_jax, name) for name in moe_jax.__all__}
    return {**names, "moe_jax": moe_jax, "jax": jax, "jnp": jnp, "np": np, "mesh": mesh, "plan": plan,
            "x": jnp.ones((8, 8)), "shard_map": _compat.shard_map, "P": jax.sharding.PartitionSpec}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODULES])
def test_doctests(name):
    module = importlib.import_module(name)
    lacking = {key: value for key, value in _globals().items() if not hasattr(module, key)}
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, extraglobs=lacking, optionflags=options).failed == 0


def test_there_are_some():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 8
