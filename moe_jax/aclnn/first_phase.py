"""The one way through every first phase: check the call, count its bytes, bind what is static."""

from collections.abc import Mapping
from typing import Any

import jax

from moe_jax.aclnn import (
    buffer_bytes,
    limits_combine,
    limits_dispatch,
    limits_fused,
    limits_fused_quant,
    limits_local,
)
from moe_jax.aclnn.executor import Executor
from moe_jax.aclnn.limits import Call, check
from moe_jax.hardware.ascend import ANY, VERSIONS, Choices, lacking

OPERATORS = {
    "moe_distribute_dispatch_v4": (limits_dispatch.DISPATCH, buffer_bytes.dispatch),
    "moe_distribute_combine_v4": (limits_combine.COMBINE, buffer_bytes.combine),
    "moe_distribute_combine_add_rms_norm_v2": (limits_combine.ADD_RMS_NORM, buffer_bytes.add_rms_norm),
    "moe_update_expert": (limits_local.UPDATE_EXPERT, buffer_bytes.update_expert),
    "distribute_barrier_v2": (limits_local.BARRIER, buffer_bytes.barrier),
    "moe_distribute_buffer_reset": (limits_local.BUFFER_RESET, buffer_bytes.buffer_reset),
    "grouped_mat_mul_allto_allv": (limits_fused.GROUPED_MATMUL_ALL_TO_ALLV, buffer_bytes.compute_then_send),
    "allto_allv_grouped_mat_mul": (limits_fused.ALL_TO_ALLV_GROUPED_MATMUL, buffer_bytes.send_then_compute),
    "quant_grouped_mat_mul_allto_allv": (
        limits_fused_quant.QUANT_GROUPED_MATMUL_ALL_TO_ALLV,
        buffer_bytes.compute_then_send,
    ),
    "allto_allv_quant_grouped_mat_mul": (
        limits_fused_quant.ALL_TO_ALLV_QUANT_GROUPED_MATMUL,
        buffer_bytes.send_then_compute,
    ),
}
OPERATORS |= {
    name: (OPERATORS[version.newest][0].without(version.without), OPERATORS[version.newest][1])
    for name, version in VERSIONS.items()
}
_UNREAD = ("group_list_type", "group_size", "hccl_buffsize")  # no operator reads them


def first_phase(name: str, arguments: Mapping[str, Any]) -> tuple[int, Executor]:
    """Workspace in bytes and executor of the operator ``name``, called with ``arguments``.

    For an earlier version they are those of the newest one, with the default where it lacks a parameter.
    """
    call = checked_call(name, arguments)
    read = {key: value for key, value in call.attributes.items() if value is not None and _is_read(name, key)}
    bound = tuple((key, _static(value)) for key, value in read.items())
    arrays = tuple((key, call.shape(key), call.dtype(key)) for key in call.arrays if call.given(key))
    return int(OPERATORS[name][1](call)), Executor(name, bound, arrays)


def checked_call(name: str, arguments: Mapping[str, Any]) -> Call:
    """The call of the operator ``name`` with ``arguments``, once nothing is wrong with it."""
    definition = OPERATORS[name][0]
    arrays = {key: value for key, value in arguments.items() if key in definition.arrays}
    attributes = {key: value for key, value in arguments.items() if key not in (*definition.arrays, "product")}
    for key in ("comm_alg", "group_tp"):
        if key in attributes and attributes[key] is None:  # the reference's null string
            attributes[key] = ""
    call = Call(name, arguments["product"], arrays, attributes)
    check(call, definition)
    return call


def _is_read(operator, attribute):
    """Whether the running operator takes it: not what it lacks or does not read, nor what has a single legal value."""
    legal = ANY[operator].values.get(attribute)
    unread = (*_UNREAD, *lacking(operator))
    return attribute not in unread and not (isinstance(legal, Choices) and len(legal.values) == 1)


def _static(value):
    """Hashable, unless it is traced: lists and arrays of counts as tuples."""
    if hasattr(value, "tolist") and not isinstance(value, jax.core.Tracer):
        value = value.tolist()
    return tuple(_static(item) for item in value) if isinstance(value, (list, tuple)) else value
