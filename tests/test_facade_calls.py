"""Generated calls of the facade keep the laws of ``facade_laws``: 20 of them here, 342 with ``-m slow``.

Each batch runs in a process of its own, which has the 16 devices that A2 begins with. ``python tests/facade_calls.py``
runs any number of others. By default both phases of all 20 calls are traced, which is enough for the first and the
third law. The programs of 5 are compiled, and compared with the oracle; those of the others are with ``-m slow``.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
# Seed, first case, cases, and how many of them run. The 5 of the first batch: a refusal, dispatch and combine on A5 and
# without a product, and a barrier.
BATCHES = [(36, 7, 20, 5)]
SLOW = [(36, 0, 7, 7), (36, 12, 35, 35), *((1, 30 * batch, 30, 30) for batch in range(10))]


@pytest.mark.parametrize(
    ("seed", "first", "cases", "run"), BATCHES + [pytest.param(*batch, marks=pytest.mark.slow) for batch in SLOW]
)
def test_generated_calls(seed, first, cases, run):
    command = [sys.executable, str(HERE / "facade_calls.py"), f"--seed={seed}", f"--first={first}", f"--cases={cases}"]
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [*command, f"--run={run}"], check=False, capture_output=True, text=True, env=environment, timeout=1500
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = r"(\d+) cases, (\d+) ran and equal the oracle, (\d+) were accepted and only traced, 0 break a law"
    total, equal, traced = map(int, re.search(counts, done.stdout).groups())
    assert total == cases
    assert equal >= run // 4 and traced >= (cases - run) // 4, "most of the legal half should run"
