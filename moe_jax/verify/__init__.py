"""The laws and the float64 oracle, on the devices that are there: ``python -m moe_jax verify``.

``run`` checks everything and prints a table; ``transport_contract`` checks one transport, which may be yours. The laws
stand in ``exchange`` (dispatch and combine), ``layer`` and ``kernels``, on the data of ``cases``. ``table`` runs them
all, and ``contract`` those of a transport.
"""

from moe_jax.verify.contract import TransportContractError, transport_contract
from moe_jax.verify.table import Check, run

__all__ = ["Check", "TransportContractError", "run", "transport_contract"]
