"""The architecture as a test: who may import whom, who may call a collective, what an import may touch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_jax

ROOT = Path(moe_jax.__file__).parent

# A module imports only from the lines above its own; modules and packages of one line do not know each other.
LAYERS = [
    {"errors"},
    {"_compat", "parameters", "host"},
    {"hlo", "derivatives", "activations"},
    {"config", "types", "reference", "layout", "quant", "hardware"},
    {"mesh", "kernels", "elastic", "targets"},
    {"plan", "collectives"},
    {"recovery", "balance"},
    {"transports"},
    {"layer", "fused"},
    {"interop"},
    {"verify", "aclnn"},
    {"testing"},
    {"__init__"},  # the public names; what follows uses them as any user does
    {"tools"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
COLLECTIVES = {
    "psum", "pmax", "pmin", "pmean", "ppermute", "pshuffle", "all_gather", "all_to_all", "psum_scatter",
    "ragged_all_to_all", "pbroadcast",
}  # fmt: skip
CORE_MAY_IMPORT = {"jax", "numpy"} | set(sys.stdlib_module_names)
EXTRAS = {
    "tools": {"flax", "grain", "optax", "orbax", "rich", "matplotlib"},
    "kernels": {"tokamax"},
    "interop": {"flax", "safetensors"},
    "testing": {"pytest"},
}

FILES = sorted(ROOT.rglob("*.py"))


def unit(path: Path) -> str:
    """The line of LAYERS that a file belongs to: its package, or its own name."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path):
    """Every module that a file imports, as dotted names; ``from moe_jax import module`` counts as the module.

    What a file imports for its annotations alone, in an ``if TYPE_CHECKING:``, does not count: it never runs.
    """
    tree = ast.parse(path.read_text())
    checked = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    unseen = {id(inner) for node in checked for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = node.module == "moe_jax" and alias.name in LEVEL
                yield f"moe_jax.{alias.name}" if inner else node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path):
    mine = unit(path)
    assert mine in LEVEL, f"{mine} has no place in LAYERS: give it one"
    for name in imported(path):
        if name.split(".")[0] != "moe_jax":
            continue
        theirs = name.split(".")[1] if "." in name else "__init__"
        if theirs != mine:
            assert LEVEL[theirs] < LEVEL[mine], f"{path.name} imports {name}, which is not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies(path):
    allowed = CORE_MAY_IMPORT | EXTRAS.get(unit(path), set()) | {"moe_jax"}
    for name in imported(path):
        assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
    if unit(path) == "reference":
        assert not any(name.split(".")[0] == "jax" for name in imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_one_package_calls_collectives(path):
    if unit(path) == "collectives":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            base = node.func.value
            is_lax = getattr(base, "id", getattr(base, "attr", None)) == "lax"
            assert not (is_lax and node.func.attr in COLLECTIVES), f"{path.name}:{node.lineno} calls {node.func.attr}"


def test_one_module_makes_files_appear_whole():
    """A file that is synced, and replaces another one, is written by ``host/atomic.py``; so is a temporary one."""
    names = {path.relative_to(ROOT).as_posix() for path in FILES if re.search(r"fsync|mkstemp", path.read_text())}
    assert names == {"host/atomic.py"}


def test_every_plan_has_its_type():
    """A reader, and an editor, can follow each parameter ``plan`` to what it holds."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):  # a lambda cannot say types
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                bare = [argument for argument in arguments if argument.arg == "plan" and argument.annotation is None]
                assert not bare, f"{path.name}:{node.lineno} {node.name}: plan has no type"


def bound_names(tree: ast.Module):
    """The names that a module has when it was imported, each with the module that it was imported from, if any."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node.module) for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, None
        elif isinstance(node, ast.Assign):
            yield from ((target.id, None) for target in node.targets if isinstance(target, ast.Name))


def test_no_name_hides_a_module():
    """Wherever there is a file or folder x in a package, ``package.x`` is that module and nothing of the same name."""
    for path in ROOT.rglob("__init__.py"):
        package = ".".join(("moe_jax", *path.parent.relative_to(ROOT).parts))
        modules = {
            file.stem for file in path.parent.iterdir() if file.suffix == ".py" or (file / "__init__.py").exists()
        }
        names = bound_names(ast.parse(path.read_text()))
        hidden = [name for name, origin in names if name in modules and origin != package]
        assert not hidden, f"in {package} something else has the name of a module: {hidden}"


def test_at_most_ten_modules_at_the_root():
    """Whoever lists the package sees folders, and few files beside them."""
    modules = [path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("__")]
    assert len(modules) <= 10, modules


def test_no_test_file_imports_another():
    """What the tests of several files share stands in files of its own, such as ``helpers.py`` and ``*_cases.py``."""
    for path in Path(__file__).parent.glob("*.py"):
        found = re.search(r"^\s*(?:from|import) test_\w+", path.read_text(), re.MULTILINE)
        assert not found, f"{path.name}: {found}"


def test_the_architecture_page_has_the_same_order():
    page = (ROOT.parent / "docs" / "architecture.md").read_text().split("## The folders")[1].split("\n## ")[0]
    lines = [set(re.findall(r"`(\w+)/?`", row.split("|")[1])) for row in page.splitlines() if row.startswith("| `")]
    assert lines == [names for names in LAYERS if not names & {"__init__", "__main__"}]


def test_import_touches_no_device_and_no_extra():
    program = (
        "import os, sys; before = dict(os.environ); import moe_jax; from jax._src import xla_bridge; "
        "assert not xla_bridge.backends_are_initialized(); assert dict(os.environ) == before; "
        "extras = {'grain', 'optax', 'orbax', 'rich', 'matplotlib', 'tensorboardX', 'tokamax', 'flax', 'safetensors'}; "
        "bad = (extras | {'jax.experimental.pallas'}) & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_all_is_complete_and_hand_listed():
    assert moe_jax.__all__ == sorted(moe_jax.__all__)
    for name in moe_jax.__all__:
        assert getattr(moe_jax, name).__doc__, f"{name} has no docstring"
