"""What the small operators ask of their arguments: update expert, the barriers, and the reset of a buffer.

A rule begins with its name and the section of the CANN sheet that it is from.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from moe_jax.aclnn.rules import (
    BAD_PARAMETER,
    BAD_VALUE,
    DTYPE,
    GIVEN,
    REST,
    Call,
    Rule,
    Rules,
    at_least,
    extent,
    forbids,
    group_size,
    refuses,
    requires,
)
from moe_jax.errors import InvalidArgumentError, ShapeError

# Update expert.


def _reads_ranks(call: Call) -> bool:
    return call["balance_mode"] == 0


def _is_whole(call: Call) -> bool:
    return isinstance(call["world_size"], (int, np.integer)) and not isinstance(call["world_size"], bool)


def _rank_in_world(call: Call) -> None:
    """Checks the rank, unless it is traced and so known only when the program runs."""
    rank = call["local_rank_id"]
    if rank is None or not _reads_ranks(call) or not _is_whole(call):
        return
    if isinstance(rank, (jax.Array, np.ndarray)) and rank.shape == () and jnp.issubdtype(rank.dtype, jnp.integer):
        rank = 0 if isinstance(rank, Tracer) else int(rank)
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or not 0 <= rank < call["world_size"]:
        raise InvalidArgumentError(
            f"local_rank_id={rank!r} must be in [0, {call['world_size'] - 1}], traced or not, or None for the index "
            "along group_ep"
        )


UPDATE_EXPERT = Rules(
    shapes={
        "expert_ids": "B K",
        "eplb_table": "E F",
        "expert_scales": "B K",
        "pruning_threshold": "K | 1 K",
        "active_mask": "B",
    },
    quantities={
        "tokens": ("B, tokens per rank", extent("expert_ids", 0)),
        "top_k": ("K, choices per token", extent("expert_ids", 1)),
        "logical_experts": ("E, the rows of eplb_table", extent("eplb_table", 0)),
        "table_columns": ("F, the columns of eplb_table", extent("eplb_table", 1)),
        "table_columns_by_token": (
            "F, the columns of eplb_table, with balance_mode=1",
            lambda call: extent("eplb_table", 1)(call) if call["balance_mode"] == 1 else None,
        ),
        "ranks": (
            "ranks, which balance_mode=0 reads",
            lambda call: ("world_size", call["world_size"]) if _reads_ranks(call) and _is_whole(call) else None,
        ),
    },
    rules=(
        refuses(
            "world_size_given", "11", lambda call: _reads_ranks(call) and not _is_whole(call),
            "world_size={world_size!r} must be a whole number: balance_mode=0 spreads instances over ranks",
        ),
        group_size(
            "11", "group_ep", "world_size", lambda call: _reads_ranks(call) and call["local_rank_id"] is None,
        ),
        Rule("rank_in_world", "11", _rank_in_world),
        *(
            requires(
                "pruning_pair", "11", missing, {given: GIVEN},
                f"{missing} is None, but {given} was given; pass both, or neither for no pruning",
            )
            for missing, given in (("expert_scales", "pruning_threshold"), ("pruning_threshold", "expert_scales"))
        ),
        requires(
            "mask_with_pruning", "11", "expert_scales", {"active_mask": GIVEN},
            "active_mask was given, with shape {active_mask.shape}, but no pruning; pass expert_scales and "
            "pruning_threshold too, or give the mask to dispatch",
        ),
        at_least(
            "top_k_of_experts", "11",
            lambda call: call.shape("eplb_table")[0], lambda call: call.shape("expert_ids")[1],
            "expert_ids has shape {expert_ids.shape}: K = {needed} choices per token, but eplb_table has {found} "
            "experts; K is at most {found}",
            error=ShapeError,
        ),
    ),
    last_rules=(
        at_least(  # F <= W + 1: an expert has one instance per rank at most
            "columns_by_rank", "11", lambda call: call["world_size"] + 1, lambda call: call.shape("eplb_table")[1],
            "eplb_table has shape {eplb_table.shape}: its {needed} columns must be at most {found} = world_size + 1"
            "{on}",
            error=ShapeError, when={"balance_mode": 0}, products=("a3", "a5"),
        ),
    ),
)  # fmt: skip


# The barrier. A wrong length of the group's name has neither the code of a null pointer nor that of a dtype here [13].

BARRIER = Rules(
    group="group",
    long_group=(REST, BAD_VALUE),
    letters={"4+2W": lambda call: 4 + 2 * call["world_size"]},
    shapes={"time_out": "1", "elastic_info": "4+2W"},
    rules=(group_size("13", "group", "world_size"),),
)


# The reset of a buffer. A wrong shape of its mask has the code of a wrong dtype [12.1].

BUFFER_RESET = Rules(
    group="group_ep",
    more_arrays=("time_out",),
    shapes={"time_out": "1"},
    rules=(
        refuses(
            "mask_shape", "12.1", lambda call: call.shape("elastic_info") != (call["ep_world_size"],),
            "elastic_info has shape {elastic_info.shape}; it must be ({ep_world_size},): pass a number for each rank",
            ShapeError, stage=DTYPE, status=BAD_PARAMETER,
        ),
        forbids(
            "time_out_of_a_wait", "12.1", "time_out", {"need_sync": 0},
            "time_out was given, but need_sync=0 waits for nobody; pass None, or need_sync=1",
        ),
        group_size("12.1", "group_ep", "ep_world_size"),
    ),
)  # fmt: skip
