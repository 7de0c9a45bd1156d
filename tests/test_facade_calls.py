"""Generated calls of the facade keep the laws of ``facade_laws``: 5 of them here, 335 more with ``-m slow``.

Each batch runs in a process of its own, which has the 16 devices that A2 begins with. ``python tests/facade_calls.py``
runs any number of others.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
BATCHES = [(36, 7, 5)]  # a refusal, dispatch and combine on A5 and without a product, and a barrier
SLOW = [pytest.param(36, first, cases, marks=pytest.mark.slow) for first, cases in ((0, 7), (12, 28))]
SLOW += [pytest.param(1, 30 * batch, 30, marks=pytest.mark.slow) for batch in range(10)]


@pytest.mark.parametrize(("seed", "first", "cases"), BATCHES + SLOW)
def test_generated_calls(seed, first, cases):
    command = [sys.executable, str(HERE / "facade_calls.py"), f"--seed={seed}", f"--first={first}", f"--cases={cases}"]
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    summary = re.search(r"(\d+) cases, (\d+) ran and equal the oracle, 0 break a law", done.stdout)
    assert int(summary[1]) == cases
    assert int(summary[2]) >= cases // 4, "most of the legal half should run"
