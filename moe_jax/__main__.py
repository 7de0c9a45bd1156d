"""`python -m moe_jax`: the command line."""

import sys

from moe_jax.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
