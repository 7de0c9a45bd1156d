"""What the small operators ask of their arguments: update expert, the barriers, and the reset of a buffer.

Sections are those of the reference sheet.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.aclnn.limits import (
    BAD_PARAMETER,
    BAD_VALUE,
    DTYPE,
    REST,
    Operator,
    Rule,
    check_shape,
    group_size_rule,
    make_error,
    where,
)
from moe_jax.errors import InvalidArgumentError, ShapeError


def _shown(call, name):
    return f"{name} with shape {call.shape(name)}"


# Update expert.


def _pruning_pair(call):
    given = [name for name in ("expert_scales", "pruning_threshold") if call.given(name)]
    if len(given) == 1:
        missing = "expert_scales" if given == ["pruning_threshold"] else "pruning_threshold"
        raise InvalidArgumentError(f"{missing} is None, but {given[0]} was given; pass both, or neither for no pruning")


def _mask_with_pruning(call):
    if call.given("active_mask") and not call.given("expert_scales"):
        raise InvalidArgumentError(
            f"active_mask was given, with shape {call.shape('active_mask')}, but no pruning; pass expert_scales and "
            "pruning_threshold too, or give the mask to dispatch"
        )


def _top_k_of_experts(call):
    top_k, experts = call.shape("expert_ids")[1], call.shape("eplb_table")[0]
    if top_k > experts:
        raise ShapeError(
            f"expert_ids has shape {call.shape('expert_ids')}: K = {top_k} choices per token, but eplb_table has "
            f"{experts} experts; K is at most {experts}"
        )


def _columns_by_rank(call):
    """F <= W + 1: an expert has one instance per rank at most."""
    columns, world = call.shape("eplb_table")[1], call["world_size"]
    if _reads_ranks(call) and columns > world + 1:
        raise ShapeError(
            f"eplb_table has shape {call.shape('eplb_table')}: its {columns} columns must be at most {world + 1} = "
            f"world_size + 1{where(call.product)}"
        )


def _reads_ranks(call):
    return call["balance_mode"] == 0


def _reads_index(call):
    return _reads_ranks(call) and call["local_rank_id"] is None


def _is_whole(call):
    return isinstance(call["world_size"], (int, np.integer)) and not isinstance(call["world_size"], bool)


def _world_size_given(call):
    if _reads_ranks(call) and not _is_whole(call):
        raise InvalidArgumentError(
            f"world_size={call['world_size']!r} must be a whole number: balance_mode=0 spreads instances over ranks"
        )


def _rank_in_world(call):
    """A traced rank is only known when the program runs."""
    rank = call["local_rank_id"]
    if rank is None or not _reads_ranks(call) or not _is_whole(call):
        return
    if isinstance(rank, (jax.Array, np.ndarray)) and rank.shape == () and jnp.issubdtype(rank.dtype, jnp.integer):
        rank = 0 if isinstance(rank, jax.core.Tracer) else int(rank)
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or not 0 <= rank < call["world_size"]:
        raise InvalidArgumentError(
            f"local_rank_id={rank!r} must be in [0, {call['world_size'] - 1}], traced or not, or None for the index "
            "along group_ep"
        )


UPDATE_EXPERT = Operator(
    arrays=("expert_ids", "eplb_table", "expert_scales", "pruning_threshold", "active_mask"),
    needs=("expert_ids", "eplb_table"),
    shapes={
        "expert_ids": lambda call: ((None, None),),
        "eplb_table": lambda call: ((None, None),),
        "expert_scales": lambda call: (call.shape("expert_ids"),),
        "pruning_threshold": lambda call: (call.shape("expert_ids")[1:], (1, call.shape("expert_ids")[1])),
        "active_mask": lambda call: (call.shape("expert_ids")[:1],),
    },
    free=("world_size", "local_rank_id", "group_ep"),
    quantities={
        "tokens": lambda call: (_shown(call, "expert_ids"), call.shape("expert_ids")[0]),
        "top_k": lambda call: (_shown(call, "expert_ids"), call.shape("expert_ids")[1]),
        "logical_experts": lambda call: (_shown(call, "eplb_table"), call.shape("eplb_table")[0]),
        "table_columns": lambda call: (_shown(call, "eplb_table"), call.shape("eplb_table")[1]),
        "table_columns_by_token": lambda call: (
            (_shown(call, "eplb_table"), call.shape("eplb_table")[1]) if call["balance_mode"] == 1 else None
        ),
        "ranks": lambda call: ("world_size", call["world_size"]) if _reads_ranks(call) and _is_whole(call) else None,
    },
    rules=(
        Rule("world_size_given", "11", _world_size_given),
        group_size_rule("group_ep", "world_size", "11", is_used=_reads_index),
        Rule("rank_in_world", "11", _rank_in_world),
        Rule("pruning_pair", "11", _pruning_pair),
        Rule("mask_with_pruning", "11", _mask_with_pruning),
        Rule("top_k_of_experts", "11", _top_k_of_experts),
    ),
    last_rules=(Rule("columns_by_rank", "11", _columns_by_rank, products=("a3", "a5")),),
)


# The barrier. The group's length is no null pointer and no dtype here [13].

BARRIER = Operator(
    arrays=("x_ref", "time_out", "elastic_info"),
    needs=("x_ref", "group", "world_size"),
    group="group",
    long_group=(REST, BAD_VALUE),
    shapes={"time_out": lambda call: ((1,),), "elastic_info": lambda call: ((4 + 2 * call["world_size"],),)},
    quantities={},
    rules=(group_size_rule("group", "world_size", "13"),),
)


# The reset of a buffer. Its mask's shape has the code of a dtype [12.1].


def _mask_shape(call):
    try:
        check_shape("elastic_info", call.shape("elastic_info"), ((call["ep_world_size"],),))
    except ShapeError as error:
        raise make_error(ShapeError, str(error), BAD_PARAMETER) from None


def _time_out_of_a_wait(call):
    if call.given("time_out") and not call["need_sync"]:
        raise InvalidArgumentError("time_out was given, but need_sync=0 waits for nobody; pass None, or need_sync=1")


BUFFER_RESET = Operator(
    arrays=("elastic_info", "window", "time_out"),
    needs=("elastic_info", "group_ep", "ep_world_size", "window"),
    group="group_ep",
    shapes={"time_out": lambda call: ((1,),)},
    quantities={},
    rules=(
        Rule("mask_shape", "12.1", _mask_shape, DTYPE),
        Rule("time_out_of_a_wait", "12.1", _time_out_of_a_wait),
        group_size_rule("group_ep", "ep_world_size", "12.1"),
    ),
)
