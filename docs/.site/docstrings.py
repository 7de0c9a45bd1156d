"""An extension of griffe that makes Markdown of our docstrings.

``Args:``, ``Attributes:``, ``Returns:`` and ``Raises:`` become lists, or the prose that they are; examples become
blocks; and a public name in double backticks becomes a link to what is said of it.
"""

import ast
import functools
import re
from pathlib import Path

import griffe

SECTION = re.compile(r"(Args|Attributes|Returns|Raises):$")
ITEM = re.compile(r"  (\*{0,2}[\w.]+(?:, [\w.]+)*): (.*)")
CODE = re.compile(r"(``?)(.+?)\1")


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, when griffe has read it."""

    def on_object(self, *, obj, **_):
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj.path)


def markdown(docstring: str, path: str) -> str:
    """The text of the docstring of ``path``, such as ``moe_jax.layer.dispatch.dispatch``."""

    def prose(line: str) -> str:
        written, end = [], 0
        for found in CODE.finditer(line):
            written += [plain(line[end : found.start()]), linked(found[0], found[2], path)]
            end = found.end()
        return "".join([*written, plain(line[end:])])

    def section(body: list[str]) -> list[str]:
        """A list, where lines hang or all of them are items; otherwise what is written."""
        filled = [line for line in body if line]
        hangs = any(line.startswith("   ") for line in filled)
        if not hangs and not all(ITEM.match(line) for line in filled):
            return [prose(line.strip()) for line in body]
        written = []
        for line in body:
            if found := ITEM.match(line):
                names = ", ".join(f"`{name}`" for name in found[1].split(", "))
                written.append(f"- {names}: {prose(found[2])}")
            else:
                written.append(f"    {prose(line.strip())}" if written else prose(line.strip()))
        return written

    written, lines = [], docstring.splitlines()
    while lines:
        line = lines.pop(0)
        if found := SECTION.match(line):
            body = []
            while lines and (not lines[0] or lines[0].startswith("  ")):
                body.append(lines.pop(0))
            written += ["", f"**{found[1]}**", "", *section(body), ""]
        elif line.lstrip().startswith(">>> "):
            block = [line]
            while lines and lines[0].strip():
                block.append(lines.pop(0))
            written += ["", "```pycon", *(text.removeprefix(indent_of(line)) for text in block), "```", ""]
        else:
            written.append(prose(line))
    return "\n".join(written)


def indent_of(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def plain(text: str) -> str:
    """Of ``<x, y>`` and ``rows[W][P]``, what Markdown shows as it is written."""
    return text.replace("<", "&lt;").replace("][", "]&#91;").replace("](", "]&#40;")


def linked(code: str, text: str, path: str) -> str:
    """The code as a link, if it names something public. Alone, a name means a folder's own where it has the same."""
    name = text.removeprefix("moe_jax.")
    alone = name == text and path.startswith(("moe_jax.aclnn", "moe_jax.reference"))
    return f"[`{text}`][moe_jax.{name}]" if name in public_names() and not alone else code


@functools.cache
def public_names() -> set[str]:
    """Functions and classes of ``moe_jax`` itself, read without importing it."""
    tree = ast.parse((Path(__file__).parents[2] / "moe_jax" / "__init__.py").read_text())
    imported = (node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module != "moe_jax")
    return {alias.asname or alias.name for node in imported for alias in node.names}
