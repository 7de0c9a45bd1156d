"""Hooks of mkdocs: pages of files that lie outside docs/, their links, and what the command line prints as help.

README.md is the first page, CONTRIBUTING.md, CHANGELOG.md and examples/README.md are pages too, and so is every
example. Links are written as they lead in the repository, and are turned to where the page lies on the site. A link to
a file that is no page stays as it is, and a strict build refuses it.
"""

import argparse
import ast
import os
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples/index.md",
}
LANGUAGES = {".py": "python", ".sbatch": "bash", ".yaml": "yaml"}  # of examples
# A fenced block, which stays as it is, or a link.
FENCE_OR_LINK = re.compile(r"^ *```.*?^ *```$|\]\((?P<target>[^)\s]+)\)", re.MULTILINE | re.DOTALL)
HELP = re.compile(r"<!-- help (\w+) -->")


def on_files(files, config):
    """Adds the pages of files outside docs/, and notes where in the repository each page comes from."""
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    examples = [path for path in sorted((ROOT / "examples").iterdir()) if path.suffix in LANGUAGES]
    for path in examples:
        files.append(File.generated(config, f"examples/{path.stem}.md", content=example_page(path)))
    sources.clear()
    sources.update({file.src_uri: f"docs/{file.src_uri}" for file in files})
    sources.update({page: path for path, page in OUTSIDE.items()})
    sources.update({f"examples/{path.stem}.md": f"examples/{path.name}" for path in examples})
    return files


sources: dict[str, str] = {}  # of each page of the site, the file of the repository that it is made of


def example_page(path: Path) -> str:
    """What the first words of a program or a job file say, and the file."""
    text = path.read_text()
    said = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else re.search("^# (.*)", text, re.MULTILINE)[1]
    return f"# {path.name}\n\n{said.splitlines()[0]}\n\n```{LANGUAGES[path.suffix]}\n{text}```\n"


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    pages = {source: name for name, source in sources.items()}

    def mended(found: re.Match) -> str:
        target = found["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return found[0]
        path, hash_, anchor = target.partition("#")
        source = posixpath.normpath(posixpath.join(posixpath.dirname(sources[here]), path))
        if source not in pages:
            return found[0]
        return f"]({posixpath.relpath(pages[source], posixpath.dirname(here) or '.')}{hash_}{anchor})"

    text = numbered_lists_indented(FENCE_OR_LINK.sub(mended, markdown))
    return HELP.sub(lambda found: f"```text\n{help_of(found[1])}```", text)


def numbered_lists_indented(markdown: str) -> str:
    """What belongs to "1. " is indented by 3 in the repository, where it begins, and by 4 for the site's Markdown."""
    lines, inside, fenced = [], False, False
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        if line and not line.startswith("   "):
            inside = not fenced and re.match(r"\d+\. ", line) is not None
        lines.append(f" {line}" if inside and line.startswith("   ") else line)
    return "\n".join(lines)


def help_of(command: str) -> str:
    """What ``python -m moe_jax command --help`` prints."""
    sys.path.insert(0, str(ROOT))
    from moe_jax.tools import cli

    os.environ["COLUMNS"] = "100"
    parser = cli._make_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices[command].format_help()
