"""Earlier versions of the operators, made of the newest: ``moe_jax.hardware.ascend.VERSIONS`` says what each lacks.

Dispatch and combine belong together by their versions: V2 with V2 or the first combine with RMSNorm, V3 with V3 or the
second, V4 with V4 or the second. On a3, V3 and the second combine with RMSNorm take ``elastic_info``; V4 reserves it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.aclnn import workspace
from moe_jax.aclnn.arguments import FIRST_PHASE, with_fewer_parameters
from moe_jax.aclnn.combine import moe_distribute_combine_add_rms_norm_v2, moe_distribute_combine_v4
from moe_jax.aclnn.dispatch import moe_distribute_dispatch_v4
from moe_jax.aclnn.first_phase import first_phase
from moe_jax.aclnn.local import distribute_barrier_v2
from moe_jax.hardware.ascend import lacking, newest_of


def _older_first_phase(operator: str, newest: Callable) -> Callable:
    """The first phase of ``operator``, of which ``newest`` is that of the newest version."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(newest).parameters.items()}

    def call(given: Mapping[str, Any]):
        return first_phase(operator, defaults | given)

    text = f"First phase of ``{operator}``: ``{newest.__name__}`` without {_listed(operator)}."
    return with_fewer_parameters(operator + FIRST_PHASE, newest, lacking(operator), call, text)


def _older_operator(operator: str, newest: Callable, check: Callable) -> Callable:
    """The earlier version ``operator`` of ``newest``; ``check`` is its first phase."""

    def call(given: Mapping[str, Any]):
        check(**given)  # so that what is wrong is said in this version's name
        return newest(**given)

    reference = "aclnn" + "".join(part.capitalize() for part in operator.split("_"))
    text = f"``{newest.__name__}`` without {_listed(operator)}, otherwise the same.\n\n    Source: {reference}.\n    "
    return with_fewer_parameters(operator, newest, lacking(operator), call, text)


def _listed(operator: str) -> str:
    return ", ".join(f"``{name}``" for name in lacking(operator))


def _both(operator: str, newest: Callable) -> tuple[Callable, Callable]:
    """The earlier version ``operator`` of ``newest``, and its first phase."""
    check = _older_first_phase(operator, getattr(workspace, newest_of(operator) + FIRST_PHASE))
    return _older_operator(operator, newest, check), check


moe_distribute_dispatch_v2, moe_distribute_dispatch_v2_get_workspace_size = _both(
    "moe_distribute_dispatch_v2", moe_distribute_dispatch_v4
)
moe_distribute_dispatch_v3, moe_distribute_dispatch_v3_get_workspace_size = _both(
    "moe_distribute_dispatch_v3", moe_distribute_dispatch_v4
)
moe_distribute_combine_v2, moe_distribute_combine_v2_get_workspace_size = _both(
    "moe_distribute_combine_v2", moe_distribute_combine_v4
)
moe_distribute_combine_v3, moe_distribute_combine_v3_get_workspace_size = _both(
    "moe_distribute_combine_v3", moe_distribute_combine_v4
)
moe_distribute_combine_add_rms_norm, moe_distribute_combine_add_rms_norm_get_workspace_size = _both(
    "moe_distribute_combine_add_rms_norm", moe_distribute_combine_add_rms_norm_v2
)
distribute_barrier, distribute_barrier_get_workspace_size = _both("distribute_barrier", distribute_barrier_v2)
