"""Earlier versions of operators as data: each is the newest one without the parameters that came later.

Sections 2.1 and 10 of the CANN sheet. The first versions of dispatch and combine, whose ``expandIdx`` has another
layout, are not among them.
"""

import dataclasses
from collections.abc import Mapping

from moe_jax.hardware.ascend.legal import Limits


@dataclasses.dataclass(frozen=True)
class Version:
    """One earlier version of an operator.

    Attributes:
      newest: the operator that it is a version of.
      without: the parameters of the newest one that it lacks.
    """

    newest: str
    without: tuple[str, ...]


_SPECIAL_NUMS = ("zero_expert_num", "copy_expert_num", "const_expert_num")
_SPECIAL_ARRAYS = ("ori_x", "const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
_DISPATCH, _COMBINE = "moe_distribute_dispatch_v4", "moe_distribute_combine_v4"

VERSIONS = {
    "moe_distribute_dispatch_v2": Version(_DISPATCH, ("elastic_info", "performance_info", *_SPECIAL_NUMS)),
    "moe_distribute_dispatch_v3": Version(_DISPATCH, ("performance_info",)),
    "moe_distribute_combine_v2": Version(
        _COMBINE, ("elastic_info", *_SPECIAL_ARRAYS, "performance_info", *_SPECIAL_NUMS)
    ),
    "moe_distribute_combine_v3": Version(_COMBINE, ("performance_info",)),
    "moe_distribute_combine_add_rms_norm": Version(
        "moe_distribute_combine_add_rms_norm_v2", ("elastic_info", *_SPECIAL_ARRAYS, *_SPECIAL_NUMS)
    ),
    "distribute_barrier": Version("distribute_barrier_v2", ("time_out", "elastic_info")),
}


def newest_of(operator: str) -> str:
    """The operator that ``operator`` is a version of: itself, where it is no earlier one."""
    return VERSIONS[operator].newest if operator in VERSIONS else operator


def lacking(operator: str) -> tuple[str, ...]:
    """The parameters of the newest version that ``operator`` does not have."""
    return VERSIONS[operator].without if operator in VERSIONS else ()


def with_versions(operators: Mapping[str, Limits], lacks: tuple[str, ...] = ()) -> dict[str, Limits]:
    """``operators``, and the earlier versions of each with the limits of the newest one, or with their own if given.

    What a version lacks counts as not given, so limits of that do no harm. Versions that ``lacks`` names are left out.
    """
    found = dict(operators)
    for name, version in VERSIONS.items():
        if version.newest in operators:
            found.setdefault(name, operators[version.newest])
    return {name: limits for name, limits in found.items() if name not in lacks}
