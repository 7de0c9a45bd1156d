"""What a person reads and what a row's place is stays as the files of tests/golden/ say, until somebody renews them.

Code and oracle can change together and every other test stay green; these files then differ. Who means the change runs

    MOE_JAX_RENEW_GOLDEN=1 python -m pytest tests/test_golden.py

and looks at the difference that ``git diff tests/golden`` shows before it is committed.
"""

import difflib
import os
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import over_mesh
from jax.sharding import AbstractMesh

import moe_jax as moe
from moe_jax.tools.cli import main

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
RENEW = "MOE_JAX_RENEW_GOLDEN"
TRANSPORTS = ("padded", "ragged", "allgather", "hierarchy")
PLANS = {
    "one device": ({"ep": 1, "tp": 1}, {"tokens_per_rank": 8, "hidden": 16, "num_experts": 4, "top_k": 2}),
    "ragged, quantised": (
        {"ep": 16, "tp": 1},
        {"tokens_per_rank": 128, "hidden": 7168, "num_experts": 256, "top_k": 8, "transport": "ragged"}
        | {"quant": "fp8_e4m3_group128", "dtype": "bfloat16"},
    ),
    "padded, tp, shared": (
        {"ep": 4, "tp": 2},
        {"tokens_per_rank": 64, "hidden": 512, "num_experts": 16, "top_k": 4, "transport": "padded"}
        | {"num_shared_experts": 1, "num_zero_experts": 2, "capacity_factor": 1.5, "dtype": "float32"},
    ),
    "allgather, drop": (
        {"ep": 8, "tp": 1},
        {"tokens_per_rank": 16, "hidden": 64, "num_experts": 8, "top_k": 2, "transport": "allgather"}
        | {"overflow": "drop", "dtype": "float32"},
    ),
}
COMMANDS = ([], ["train"], ["verify"], ["plan"], ["sweep"], ["bench"], ["eplb"], ["stragglers"])
HOW_TO = ROOT / "docs" / "how_to" / "compare_meshes.md"
# A command in a block of its own, and the block of what it prints below it.
PRINTED = re.compile(r"(?<=```sh\npython -m moe_jax )(?P<command>[^\n]*)\n```\n\n```text\n(?P<text>.*?)```", re.DOTALL)


def compare(name: str, text: str) -> None:
    """Fails with the difference if the file says something else; writes the file if it is to be renewed."""
    path = GOLDEN / name
    compare_file(path, path.read_text() if path.exists() else "", text)


def compare_file(path: Path, frozen: str, text: str) -> None:
    """``compare`` for any file, which says ``frozen`` so far."""
    if os.environ.get(RENEW):
        path.write_text(text)
        return
    if text != frozen:
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        lines = difflib.unified_diff(frozen.splitlines(), text.splitlines(), str(name), "now", lineterm="")
        pytest.fail(
            "\n".join(lines)
            + f"\n\nThis is not what {name} says. If the change is meant, renew the file and commit it:\n"
            f"    {RENEW}=1 python -m pytest tests/test_golden.py",
            pytrace=False,
        )


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_order_of_rows(transport):
    """Where each row of a dispatch arrives: by local expert, then source rank, then token; -1 chooses nobody."""
    nodes = 2 if transport == "hierarchy" else 1
    mesh = moe.make_mesh(ep=4, nodes=nodes)
    plan = moe.make_plan(
        mesh, tokens_per_rank=3, hidden=1, num_experts=8, top_k=2, dtype="float32", transport=transport,
        capacity_factor=4.0, poison=True,
    )  # fmt: skip
    ids = np.array(
        [[[0, 7], [3, 0], [5, 1]], [[0, 1], [-1, 6], [7, 0]], [[2, 3], [3, 2], [6, -1]], [[7, 6], [0, 5], [-1, -1]]],
        np.int32,
    )
    x = (10 * np.arange(4)[:, None, None] + np.arange(3)[None, :, None]).astype(np.float32)  # 10 * rank + token

    def shard(x, ids):
        sent = moe.dispatch(x, ids, plan)
        return sent.x[:, 0], sent.group_sizes

    axes = (("node", "ep") if nodes > 1 else "ep",)
    rows, sizes = jax.tree.map(np.asarray, jax.jit(over_mesh(mesh, shard, axes))(x, ids))
    lines = []
    for rank in range(4):
        starts = np.cumsum(sizes[rank]) - sizes[rank]
        for local, (start, size) in enumerate(zip(starts, sizes[rank], strict=True)):
            mine = (f"rank {value // 10:.0f} token {value % 10:.0f}" for value in rows[rank, start : start + size])
            lines.append(f"rank {rank}, expert {2 * rank + local}: {', '.join(mine) or 'nothing'}")
    compare(f"rows_{transport}.txt", "\n".join(lines) + "\n")


def test_every_transport_has_the_same_order():
    texts = {(GOLDEN / f"rows_{transport}.txt").read_text() for transport in TRANSPORTS}
    assert len(texts) == 1


def test_plans_in_words():
    parts = []
    for name, (mesh, options) in PLANS.items():
        plan = moe.make_plan(AbstractMesh(tuple(mesh.values()), tuple(mesh)), **options)
        parts.append(f"# {name}\n{plan.describe(ffn=4 * plan.hidden)}\n")
    compare("describe.txt", "\n".join(parts))


def test_the_plan_command(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", "configs/deepseek_v3.toml", "--hardware", "v5p", "--describe"]) == 0
    compare("cli_plan.txt", capsys.readouterr().out)


def test_the_how_to_shows_what_commands_print(capsys, monkeypatch, tmp_path):
    """In a folder of its own, so that no row of an earlier sweep is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")

    def printed(block):
        assert main(shlex.split(block["command"])) == 0
        return f"{block['command']}\n```\n\n```text\n{capsys.readouterr().out}```"

    before = HOW_TO.read_text()
    after, count = PRINTED.subn(printed, before)
    assert count == 3  # one for each question that the page answers
    compare_file(HOW_TO, before, after)


def test_help_of_every_command(capsys, monkeypatch):
    """Without the breaks of the usage lines, which Python's versions place differently."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    parts = []
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        usage, rest = capsys.readouterr().out.split("\n\n", 1)
        parts.append(f"# {' '.join(['moe_jax', *command, '--help'])}\n{' '.join(usage.split())}\n\n{rest}")
    compare("cli_help.txt", "\n".join(parts))


def test_every_file_is_compared_with_something():
    names = {f"rows_{transport}.txt" for transport in TRANSPORTS} | {"describe.txt", "cli_plan.txt", "cli_help.txt"}
    assert {path.name for path in GOLDEN.iterdir()} == names


def test_a_difference_is_said_in_full(monkeypatch, tmp_path):
    monkeypatch.setitem(globals(), "GOLDEN", tmp_path)
    monkeypatch.delenv(RENEW, raising=False)
    (tmp_path / "some.txt").write_text("one\ntwo\n")
    with pytest.raises(pytest.fail.Exception, match=r"-two\n\+2\n[^$]*MOE_JAX_RENEW_GOLDEN=1"):
        compare("some.txt", "one\n2\n")
    monkeypatch.setenv(RENEW, "1")
    compare("some.txt", "one\n2\n")
    monkeypatch.delenv(RENEW)
    compare("some.txt", "one\n2\n")
