"""TPU generations that libtpu compiles for; it knows the chips itself and needs their names alone.

Source: libtpu 0.0.42, each generation tried with ``jax.experimental.topologies.get_topology_desc``.
"""

# By generation, a topology that libtpu takes, of two dimensions or of three. Other sizes may be asked for too; libtpu
# refuses those that do not exist.
TPUS = {"v5e": "2x4", "v5p": "2x2x2", "v6e": "2x4"}
