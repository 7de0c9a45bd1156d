"""What `python -m moe_jax` runs: the command line, training, benchmarks. They use the library as any user does.

``cli`` reads the command. ``train``, ``bench``, ``eplb`` and ``planner`` (`plan` and `sweep`) carry commands out, and
`verify` is ``moe_jax.verify``. ``published`` compares predictions with what others measured.
"""
