"""What the documents say holds: Python blocks run, commands parse, and every link, file and name is there."""

import html
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
import textwrap
import types
from pathlib import Path

import pytest

import moe_jax
from moe_jax.kernels import table
from moe_jax.plan import transport_table
from moe_jax.tools import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# "<!-- sketch -->" above a block says that it cannot run here: it needs a compiler, or its names are made up.
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[a-z]+) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[re.Match]:
    return [found for found in BLOCK.finditer(path.read_text()) if found["language"] == language]


def prose(path: Path) -> str:
    """The text of a document without its blocks."""
    return BLOCK.sub("", path.read_text())


def programs() -> list[Path]:
    """The documents that have Python blocks."""
    return [path for path in DOCUMENTS if blocks(path, "python")]


# These compile for long, and what they show has tests of its own in what everybody runs.
SLOW = ("add_a_transport.md", "bring_your_own_experts.md", "prove_a_back_end.md", "use_your_own_mesh.md")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.name in SLOW), id=name_of(path)) for path in programs()],
)
def test_python_blocks_run(path, monkeypatch):
    """One after the other, as somebody pastes them into one session."""
    for known in (table, transport_table):  # what a block registers is gone after the test
        monkeypatch.setattr(known, "_TABLE", dict(known._TABLE))
    names = {"__name__": "__main__"}
    for block in blocks(path, "python"):
        line = path.read_text()[: block.start("text")].count("\n")  # so that an error names the line of the document
        code = compile("\n" * line + textwrap.dedent(block["text"]), name_of(path), "exec")
        if block["mark"] != "sketch":
            exec(code, names)


def commands(path: Path) -> list[list[str]]:
    """The arguments of every `python -m moe_jax` in the shell blocks."""
    lines = [line for block in blocks(path, "sh") for line in block["text"].splitlines()]
    found = [re.search(r"python -m moe_jax (.*)", line.split("  #")[0]) for line in lines]
    return [shlex.split(match[1]) for match in found if match]


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if commands(path)], ids=name_of)
def test_commands_parse(path):
    for arguments in commands(path):
        parsed = cli._make_parser().parse_args(arguments)
        config = getattr(parsed, "config", None)
        assert config is None or not config.startswith("configs/") or (ROOT / config).is_file(), arguments


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not target.startswith(("http://", "https://")):
            file, _, anchor = target.partition("#")
            there = path if not file else (path.parent / file).resolve()
            assert there.exists(), f"{name_of(path)} links to {target}"
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if anchor else []
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, f"{name_of(path)} links to {target}"


def exists(name: str) -> bool:
    """Whether a dotted name such as ``moe_jax.plan.make.make_plan`` leads to something."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return attribute in getattr(found, "__dataclass_fields__", ())
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name != "CHANGELOG.md"], ids=name_of)
def test_files_and_names_are_there(path):
    """In prose, `folder/file.py` is a file of the project or of the package, and `moe_jax.x.y` can be imported."""
    for code in re.findall(r"`([^`\n]+)`", prose(path)):
        if re.fullmatch(r"[\w./-]+\.(py|toml|md)|[\w./-]+/", code) and "/" in code and not code.startswith("runs/"):
            places = (ROOT, ROOT / "moe_jax", path.parent)
            assert any((place / code).exists() for place in places), f"{name_of(path)} names {code}"
        elif match := re.fullmatch(r"(moe_jax(?:\.\w+)+)(?:\(.*\))?", code):
            assert exists(match[1]), f"{name_of(path)} names {match[1]}"
        elif match := re.fullmatch(r"moe\.(\w+)(?:\(.*\))?", code):
            assert exists(f"moe_jax.{match[1]}"), f"{name_of(path)} names {code}"


def test_hooks_have_the_pinned_versions():
    pinned = dict(re.findall(r'"(ruff)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))
    hooks = re.findall(r'"(ruff)==([\d.]+)"', (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks and all(pinned[name] == version for name, version in hooks)


def test_the_operators_page_names_every_public_name():
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", (ROOT / "docs" / "operators.md").read_text()))))
    # Classes that functions return or raise are described where they are.
    assert {name for name in moe_jax.__all__ if not isinstance(getattr(moe_jax, name), type)} - named == set()


def test_the_reference_has_every_public_name_once():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    described = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    names = {f"moe_jax.{name}" for name in moe_jax.__all__} - {"moe_jax.MoEError"}  # among the errors
    assert sorted(set(described)) == sorted(described) and names - set(described) == set(), "write ::: moe_jax.name"


def test_every_page_is_in_the_navigation_once():
    """Those of docs/, and the four files outside of it that docs/.site/pages.py makes pages of."""
    pages = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    outside = ["index.md", "contributing.md", "changelog.md", "examples/index.md"]
    written = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages) == sorted(written + outside)


def as_markdown(monkeypatch):
    """What docs/.site/docstrings.py makes of a docstring, without griffe, which only the site needs."""
    monkeypatch.setitem(sys.modules, "griffe", types.SimpleNamespace(Extension=object))
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / ".site" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.markdown


def test_the_reference_says_all_that_docstrings_say(monkeypatch):
    """Every word, with examples in blocks, and with nothing outside of code that Markdown takes for HTML or a link."""
    markdown = as_markdown(monkeypatch)
    for name in moe_jax.__all__:
        said = inspect.getdoc(getattr(moe_jax, name))
        made = markdown(said, f"moe_jax.{name}")
        plain = re.sub(r"^ *```.*?^ *```$", "", made, flags=re.MULTILINE | re.DOTALL)
        assert ">>>" not in plain, name
        linked = re.sub(r"\[(`[^`]*`)\]\[moe_jax\.\w+\]", r"\1", plain)
        assert not re.search(r"<|\]\[|\]\(", re.sub(r"``?.+?``?", "", linked)), name
        words = re.findall(r"\w+", html.unescape(re.sub(r"\[(`[^`]*`)\]\[moe_jax\.\w+\]", r"\1", made)))
        assert [word for word in words if word != "pycon"] == re.findall(r"\w+", said), name


def test_sections_of_a_docstring_become_lists(monkeypatch):
    given = "One line.\n\nArgs:\n  x, y: two of\n    ``[T]``.\n\nReturns:\n  a < b: so\n  it is. See ``dispatch``.\n"
    lines = as_markdown(monkeypatch)(given, "moe_jax.f").splitlines()
    assert [line for line in lines if line.strip()] == [
        "One line.",
        "**Args**",
        "- `x`, `y`: two of",
        "    ``[T]``.",
        "**Returns**",
        "a &lt; b: so",
        "it is. See [`dispatch`][moe_jax.dispatch].",
    ]


def test_every_example_is_listed():
    listed = re.findall(r"\]\((\w+\.\w+)\)", (ROOT / "examples" / "README.md").read_text())
    files = {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} - {"README.md"}
    assert sorted(listed) == sorted(files)


def test_the_picture_names_files_that_are_there():
    files = re.findall(r'class="file">([^<]*)<', (ROOT / "docs" / "architecture.svg").read_text())
    names = [name for text in files for name in text.split()]
    assert len(names) > 8 and all((ROOT / "moe_jax" / name).exists() for name in names)
