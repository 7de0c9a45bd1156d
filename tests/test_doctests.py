"""The examples in docstrings do what they say when they are pasted into a shell: they see only what they import."""

import doctest
import importlib
import pkgutil

import pytest

import moe_jax

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(moe_jax.__path__, "moe_jax.")
    if not name.startswith(("moe_jax.tools.train", "moe_jax.tools.cli", "moe_jax.__main__"))
]
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples(name: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), globs={})
    return [test for test in found if test.examples]


# These compile for long, and what they show is tested by itself in what everybody runs.
SLOW = ("moe_jax.fused.api", "moe_jax.interop.nnx", "moe_jax.verify.backend", "moe_jax.verify.contract")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODULES if examples(name)],
)
def test_doctests(name):
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for test in examples(name):
        runner.run(test)
    assert runner.summarize().failed == 0


def test_the_first_functions_that_people_meet_have_one():
    for function in (moe_jax.make_mesh, moe_jax.make_plan, moe_jax.moe_on_mesh, moe_jax.dispatch, moe_jax.combine):
        assert ">>>" in function.__doc__, function.__name__
