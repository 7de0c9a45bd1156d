"""The training main job: a byte-level decoder whose feed-forward layers are Mixture-of-Experts layers on a mesh.

`loop.train` runs it; the other modules are one concept each. Needs the `train` extra (optax, rich, matplotlib).
"""
