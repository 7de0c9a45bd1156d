"""Compile for hardware that is not here, with its real compiler, and read what the compiler made of the program.

``target`` says what a name stands for, ``compile`` hands a program to a process of its own, ``child`` is that process,
and ``report`` is what comes back.
"""

from moe_jax.targets.compile import compile_for
from moe_jax.targets.report import TargetReport

__all__ = ["TargetReport", "compile_for"]
