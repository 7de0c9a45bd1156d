"""``python -m moe_jax verify``: laws and the float64 reference, on the devices that are there."""

from moe_jax.verify.table import Check, run

__all__ = ["Check", "run"]
