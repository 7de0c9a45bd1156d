"""The laws and the float64 oracle, on the devices that are there: ``python -m moe_jax verify``.

``run`` checks everything and prints a table. ``transport_contract`` checks one transport and ``backend_contract`` one
back end; either may be your own. The laws stand in ``exchange`` (dispatch and combine), ``layer``, ``backend`` (grouped
products, on the data of ``products``) and ``kernels`` (kernels that spare passes, and recipes). ``table`` runs all of
them, and ``contract`` those of a transport. ``moe_jax.testing`` has the laws of a back end as tests.
"""

from moe_jax.verify.backend import BackendContractError, backend_contract
from moe_jax.verify.contract import TransportContractError, transport_contract
from moe_jax.verify.table import Check, run

__all__ = [
    "BackendContractError",
    "Check",
    "TransportContractError",
    "backend_contract",
    "run",
    "transport_contract",
]
