"""`python -m moe_jax stragglers`: who waits for whom in the timed exchange, drawn, and what that says in words."""

from moe_jax.tools.stragglers.command import STEPS, run

__all__ = ["STEPS", "run"]
