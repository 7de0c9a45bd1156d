"""Every example runs as its first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_runs(path):
    assert f"Run: python examples/{path.name}" in path.read_text()
    done = subprocess.run([sys.executable, str(path)], cwd=ROOT, capture_output=True, text=True, env=_environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout


def _environment():
    """This process's, with the checkout on the path: an example imports moe_jax as a user's program does."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
