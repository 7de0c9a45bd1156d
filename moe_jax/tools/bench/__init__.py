"""How fast the layer is, beside the dense limit and the usual ways of doing it: `python -m moe_jax bench`."""

from moe_jax.tools.bench.command import run

__all__ = ["run"]
