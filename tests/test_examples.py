"""Every example runs as its first lines say; and what docs/coming_from_cann.md names is there."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limit_registry import OPERATORS

import moe_jax as moe
from moe_jax import aclnn, errors, quant, types
from moe_jax.aclnn import world
from moe_jax.recovery import window

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAMPLES = [path for path in EXAMPLES if path.name.startswith("cann_")]


@pytest.mark.quick("experts_of_your_own.py", "weightless_experts.py")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_runs(path):
    assert f"Run: python examples/{path.name}" in path.read_text()
    assert _run(path)


def test_samples_call_in_two_phases():
    text = "\n".join(path.read_text() for path in SAMPLES)
    assert len(SAMPLES) == 5  # a document each
    for operator in (
        "moe_distribute_dispatch_v2",
        "moe_distribute_dispatch_v3",
        "moe_distribute_dispatch_v4",
        "moe_distribute_combine_v2",
        "moe_distribute_combine_v4",
        "moe_distribute_combine_add_rms_norm",
        "moe_update_expert",
        "distribute_barrier",
        "moe_distribute_buffer_reset",
        "grouped_mat_mul_allto_allv",
    ):
        assert f"aclnn.{operator}_get_workspace_size(" in text, operator
        assert f"aclnn.{operator}(" not in text, operator


@pytest.mark.slow
def test_grouped_matmul_sample_in_full():
    """Some 7 GB."""
    assert "full size" in _run(ROOT / "examples" / "cann_grouped_matmul_all_to_allv.py", "--full")


def _run(path, *arguments):
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _environment():
    """This process's, with the checkout on the path: an example imports moe_jax as a user's program does."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# The tables of docs/coming_from_cann.md.


def _tables():
    """Per table its rows, each a list of cells."""
    text = (ROOT / "docs" / "coming_from_cann.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        yield rows[0], rows[2:]


def _table(head):
    (rows,) = [rows for cells, rows in _tables() if cells[: len(head)] == head]
    return rows


def _code(cell):
    return re.findall(r"`([^`]*)`", cell)


def _snake(name):
    """camelCase -> snake_case; a digit begins no word, but that the reference's alphas are numbered."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=mm)(?=[XY])|(?<=X)(?=Scale|Quant)", "_", name).lower()
    return re.sub(r"(?<=alpha)(?=\d)", "_", name)


def _operators():
    return list(OPERATORS)


def _parameters(*functions):
    return {name for function in functions for name in inspect.signature(function).parameters}


def test_cann_page_names_every_operator():
    rows = _table(["CANN", "`moe_jax.aclnn`", "core"])
    assert sorted(name for row in rows for name in _code(row[1])) == sorted(_operators())
    for row in rows:
        assert all(name in moe.__all__ for name in _code(row[2])), row
        facade = [name.replace("_", "") for name in _code(row[1])]
        assert facade in ([], row[0].lower().split(", ")), row


def test_cann_page_names_every_parameter():
    named = {_snake(name) for row in _table(["CANN", "core"]) for name in _code(row[0])}
    there = _parameters(*(getattr(aclnn, name) for name in _operators())) - {"window"}  # a parameter only here
    assert there - named == set()
    absent = {"ep_rank_id", "tp_rank_id"}  # the axis index
    outputs = {name for result in vars(aclnn.results).values() for name in getattr(result, "_fields", ())}
    receivable = {"dst_rank", "rank_num"}  # of operators that only the core has
    assert named - there - absent - outputs - receivable - {"const_expert_alpha_1, ..."} == set()


def test_cann_page_names_what_the_core_has():
    fields = {name for kind in (types.Dispatched, window.Window) for name in kind.__dataclass_fields__}
    rows = _table(["CANN", "`moe_jax.aclnn`", "core"])
    functions = [getattr(moe, name) for row in rows for name in _code(row[2])]
    known = fields | _parameters(moe.make_plan, *functions) | set(moe.__all__) | {"moe_jax.aclnn"}
    known |= {"", "fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy", "padded", "ragged"}
    known |= {"balance", "ep", "tp", "node"}
    for row in _table(["CANN", "core"]):
        for text in _code(row[1]):
            words = [word.split("=")[0].strip('() "') for word in text.split(", ")]
            assert all(word in known | {"token"} for word in words), row


def test_cann_page_pairs_quant_modes_with_recipes():
    y_dtypes = {"int8": "int8", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn"}
    rows = _table(["`quantMode`"])
    for mode, recipes, *_ in rows:
        assert _code(recipes)[0] == world.dispatch_recipe(int(mode), None)
        for recipe in _code(recipes):
            assert recipe in quant.NAMES
            (y_dtype,) = [dtype for part, dtype in y_dtypes.items() if part in recipe] or [None]
            assert world.dispatch_recipe(int(mode), y_dtype) == recipe
    assert {int(mode): _code(recipe)[0] for *_, mode, recipe in rows if mode} == world._COMBINE_RECIPES


def test_cann_page_pairs_codes_with_exceptions():
    for code, kinds in _table(["code"]):
        for name in _code(kinds):
            assert getattr(errors, name).status == int(code)
