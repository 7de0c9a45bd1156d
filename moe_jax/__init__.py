"""Expert parallelism for JAX: distributed Mixture-of-Experts operators as differentiable per-shard functions.

Begin with ``make_mesh``, ``make_plan`` and ``moe_on_mesh``, the layer over global arrays; or with ``dispatch`` and
``combine`` inside a ``shard_map`` of your own. ``reference`` says what the right answer is. Importing this package
touches no device and no environment variable.
"""

from moe_jax import aclnn, errors, quant, reference
from moe_jax.activations import ClampedSwiGLU
from moe_jax.balance import Placement, expected_imbalance, migrate, rebalance, sum_replica_gradients
from moe_jax.collectives import ragged_all_to_all
from moe_jax.config import RouterConfig, load_config
from moe_jax.elastic.rank_table import make_rank_table
from moe_jax.elastic.wait_matrix import Straggler, find_stragglers
from moe_jax.errors import MoEError
from moe_jax.fused import all_to_allv_grouped_matmul, grouped_matmul_all_to_allv
from moe_jax.hlo.contract import Contract, assert_hlo_contract, hlo_contract
from moe_jax.kernels import Backend, grouped_matmul, register_backend, resolve_backend
from moe_jax.layer.combine import combine, combine_add_rms_norm
from moe_jax.layer.dispatch import dequantize, dispatch, make_receive_window
from moe_jax.layer.layer import moe_layer
from moe_jax.layer.mapped import map_experts
from moe_jax.layer.on_mesh import moe_on_mesh
from moe_jax.layer.params import abstract_params, param_specs, place
from moe_jax.layer.placement import update_expert
from moe_jax.layer.router import balance_loss, route, update_selection_bias
from moe_jax.mesh import emulate_devices, make_mesh
from moe_jax.plan import Plan, make_plan
from moe_jax.recovery.barrier import BarrierTimeoutError, barrier
from moe_jax.recovery.window import Window, buffer_reset, receivable_info_collect, receivable_test
from moe_jax.targets import TargetReport, compile_for
from moe_jax.types import Dispatched, DispatchHandle, LayerStats, Routing

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BarrierTimeoutError",
    "ClampedSwiGLU",
    "Contract",
    "DispatchHandle",
    "Dispatched",
    "LayerStats",
    "MoEError",
    "Placement",
    "Plan",
    "RouterConfig",
    "Routing",
    "Straggler",
    "TargetReport",
    "Window",
    "abstract_params",
    "aclnn",
    "all_to_allv_grouped_matmul",
    "assert_hlo_contract",
    "balance_loss",
    "barrier",
    "buffer_reset",
    "combine",
    "combine_add_rms_norm",
    "compile_for",
    "dequantize",
    "dispatch",
    "emulate_devices",
    "errors",
    "expected_imbalance",
    "find_stragglers",
    "grouped_matmul",
    "grouped_matmul_all_to_allv",
    "hlo_contract",
    "load_config",
    "make_mesh",
    "make_plan",
    "make_rank_table",
    "make_receive_window",
    "map_experts",
    "migrate",
    "moe_layer",
    "moe_on_mesh",
    "param_specs",
    "place",
    "quant",
    "ragged_all_to_all",
    "rebalance",
    "receivable_info_collect",
    "receivable_test",
    "reference",
    "register_backend",
    "resolve_backend",
    "route",
    "sum_replica_gradients",
    "update_expert",
    "update_selection_bias",
]
