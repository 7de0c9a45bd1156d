"""Training from the command line: a byte-level decoder whose feed-forward layers are MoE layers on a mesh.

`loop.train` runs the whole job, and every other module holds one concept of it. Training needs the packages of the
extra `train` (optax, rich, matplotlib).
"""
