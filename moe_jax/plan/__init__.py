"""Plans: everything static about one MoE layer on one mesh, checked once and resolved once."""

from moe_jax.plan.make import make_plan
from moe_jax.plan.plan import Plan

__all__ = ["Plan", "make_plan"]
