"""Plans: everything static about one layer on one mesh, checked once and resolved once, before anything is traced.

``make`` checks the arguments (``checks`` has the rules) and decides; ``plan`` is what was decided, and nothing changes
it. ``cost``, ``workspace``, ``memory`` and ``describe`` are functions of a plan: what it will move, multiply and touch,
at the nominal rates of its machine; what its buffers take; what a device holds at the largest of the ``moments``; and
all that in words. ``transport_table`` finds the transport that a plan names, which says what it costs.
"""

from moe_jax.plan.make import make_plan
from moe_jax.plan.plan import Plan

__all__ = ["Plan", "make_plan"]
