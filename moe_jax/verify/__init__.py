"""The laws and the float64 oracle, on the devices that are there: ``python -m moe_jax verify``.

``run`` checks everything and prints a table; ``transport_contract`` checks one transport, which may be yours.
"""

from moe_jax.verify.contract import TransportContractError, transport_contract
from moe_jax.verify.table import Check, run

__all__ = ["Check", "TransportContractError", "run", "transport_contract"]
