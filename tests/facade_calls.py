"""As many generated calls of the facade as one likes: ``python tests/facade_calls.py --seed 7 --cases 300``.

Every fourth call is one of the small or fused operators, the others are of dispatch and combine. A seed names its cases
for ever. Prints what came of them and, in full, each call that breaks a law of ``facade_laws``; exits with 1 then.
"""

import argparse
import collections
import sys

import facade_exchange_calls
import facade_other_calls
import jax
import numpy as np
from facade_laws import Broken

import moe_jax as moe
from moe_jax.errors import MoEError

DEVICES = facade_exchange_calls.DEVICES


def run(seed: int, index: int, *, runs: bool = True) -> str:
    """What came of case ``index`` of ``seed``, which is only traced unless it ``runs``.

    Raises ``Broken`` with the case in its text.
    """
    rng = np.random.default_rng([seed, index])
    case, check = (facade_other_calls if index % 4 == 3 else facade_exchange_calls).one(rng)
    operator = getattr(case, "operator", "dispatch and combine")
    try:
        return f"{operator}, {case.product or 'no product'}: {check(runs)}"
    except (AssertionError, MoEError) as error:  # of the laws, and of an oracle that was asked for what it refuses
        raise Broken(f"case {index} of seed {seed}: {type(error).__name__}: {error}\n  {case}") from error


def main(arguments: list[str] | None = None) -> int:
    """Runs cases and prints what came of them; 1 where a law is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first case of the seed")
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument(
        "--run",
        type=int,
        default=None,
        help="compile so many of the cases and compare them with the oracle; default: all",
    )
    options = parser.parse_args(arguments)
    number_to_run = options.cases if options.run is None else options.run
    moe.emulate_devices(DEVICES)
    found, broken = collections.Counter(), 0
    for index in range(options.first, options.first + options.cases):
        try:
            found[run(options.seed, index, runs=index - options.first < number_to_run)] += 1
        except Broken as error:
            broken += 1
            print(error, flush=True)
        if index % 20 == 19:
            jax.clear_caches()  # compiled programs hold memory mappings, and a process may have 65530 of them
    for result, count in sorted(found.items()):
        print(f"{count:6d}  {result}")
    equal = sum(count for result, count in found.items() if result.endswith("equal"))
    traced = sum(count for result, count in found.items() if result.endswith("accepted"))
    print(
        f"seed {options.seed}: {options.cases} cases, {equal} ran and equal the oracle, {traced} were accepted and "
        f"only traced, {broken} break a law"
    )
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
