"""``python -m moe_jax verify``: the laws and the float64 oracle, on the devices that are there."""

from moe_jax.verify.contract import TransportContractError, transport_contract
from moe_jax.verify.table import Check, run

__all__ = ["Check", "TransportContractError", "run", "transport_contract"]
