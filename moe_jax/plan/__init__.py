"""Plans: everything static about one layer on one mesh, checked once and resolved once, before anything is traced.

``make`` checks the arguments (``checks`` has the rules) and decides; ``plan`` is what was decided, and nothing changes
it. Four modules hold functions of a plan: ``cost`` says what it will move, multiply and touch, at the nominal rates of
its machine; ``workspace`` what its buffers take; ``memory`` what a device holds at the largest of the ``moments``; and
``describe`` says all that in words. A cost is a sum of ``steps``, each an exchange or a pass. ``transport_table`` finds
the transport that a plan names, and ``wire`` says who sends how much to whom.
"""

from moe_jax.plan.make import make_plan
from moe_jax.plan.plan import Plan

__all__ = ["Plan", "make_plan"]
