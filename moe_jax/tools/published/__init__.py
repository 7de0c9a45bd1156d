"""What others published about exchanges and models, beside what the planner predicts: ``run`` prints both."""

from moe_jax.tools.published.table import run

__all__ = ["run"]
