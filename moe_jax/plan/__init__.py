"""Plans: everything static about one layer on one mesh, checked once and resolved once, before anything is traced.

``make`` checks the arguments (``checks`` has the rules) and decides; ``plan`` is what was decided, and nothing changes
it. ``cost``, ``workspace``, ``memory`` and ``describe`` are functions of a plan: what it will move, multiply and touch,
at the nominal rates of its machine; what its buffers take; what a device holds at the largest of the ``moments``; and
all that in words. ``steps`` says what one exchange or pass costs, of which a cost is a sum, and ``transport_table``
finds the transport that a plan names, which lists its own.
"""

from moe_jax.plan.make import make_plan
from moe_jax.plan.plan import Plan

__all__ = ["Plan", "make_plan"]
