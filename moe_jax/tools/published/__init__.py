"""What others published of exchanges and of models, beside what the planner predicts: ``run`` prints it."""

from moe_jax.tools.published.table import run

__all__ = ["run"]
