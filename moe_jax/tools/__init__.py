"""What `python -m moe_jax` runs: the command line, training, benchmarks. They use the library as any user does."""
