"""What `python -m moe_jax` runs: the command line, training, benchmarks. They use the library as any user does.

``cli`` reads the command; ``train``, ``bench`` and ``eplb`` are the long ones. ``plan`` and ``verify`` are
the library's own.
"""
