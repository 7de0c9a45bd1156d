"""Rank tables say which ranks are left after some were removed. They are data, so removing a rank never recompiles."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import (
    InvalidArgumentError,
    check_array,
    check_count,
    check_dtype,
    check_mask,
    check_shape,
)

_NUM_HEADER = 4  # flag, number of ranks, number of shared ranks, number of experts


class RankTable(NamedTuple):
    """What a rank table says. All entries are i32 and traced; ranks count from 0, and -1 means none.

    Attributes:
      world_size: a scalar, W': how many ranks are left.
      num_shared_ranks: a scalar, S': how many of them hold shared experts.
      num_experts: a scalar, E': how many routed experts are left.
      logical: [W], the place of each rank among those that are left; -1 = removed.
      physical: [W], the rank at each place; -1 from place W' on.
    """

    world_size: jax.Array
    num_shared_ranks: jax.Array
    num_experts: jax.Array
    logical: jax.Array
    physical: jax.Array


def make_rank_table(num_ranks: int, alive: Any = None, *, num_shared_ranks: int = 0, num_experts: int) -> np.ndarray:
    """The table of the ranks that are left, on the host.

    The ranks that are left keep their order and become the logical ranks 0 .. W'-1. The number of experts per rank,
    L = E / (W - S), stays the same, and so does the number of shared ranks: W' = W - removed, S' = S,
    E' = E - L * removed. The first S logical ranks hold the shared experts; so if a shared rank was removed, a rank
    behind it takes its place.

    Args:
      num_ranks: W.
      alive: [W] bool, False = removed; None = the table that changes nothing (flag 0).
      num_shared_ranks: S, less than W.
      num_experts: E, routed experts, a multiple of W - S.

    Returns:
      [4 + 2W] i32: flag, W', S', E', logical rank of each rank or -1, rank of each logical rank or -1.

    Raises:
      InvalidArgumentError: a number breaks a rule above, or fewer than S + 1 ranks are left.
      ShapeError, DtypeError: ``alive`` is not [W] bool.

    >>> import numpy as np, moe_jax as moe
    >>> moe.make_rank_table(4, np.array([True, False, True, True]), num_experts=8)
    array([ 1,  3,  0,  6,  0, -1,  1,  2,  0,  2,  3, -1], dtype=int32)

    Source: elasticInfo of MoeDistributeDispatchV3 and DistributeBarrierV2.
    """
    check_count("num_ranks", num_ranks)
    check_count("num_shared_ranks", num_shared_ranks, low=0)
    check_count("num_experts", num_experts)
    num_moe_ranks = num_ranks - num_shared_ranks
    if num_moe_ranks < 1:
        raise InvalidArgumentError(
            f"num_shared_ranks={num_shared_ranks} must be less than num_ranks={num_ranks}; routed experts need a rank"
        )
    if num_experts % num_moe_ranks:
        raise InvalidArgumentError(
            f"num_experts={num_experts} must be a multiple of the {num_moe_ranks} ranks that hold routed experts "
            f"(num_ranks={num_ranks} less num_shared_ranks={num_shared_ranks})"
        )
    flag = alive is not None
    alive = _as_mask(alive, num_ranks)
    survivors = np.flatnonzero(alive)
    if len(survivors) <= num_shared_ranks:
        raise InvalidArgumentError(
            f"alive leaves {len(survivors)} of num_ranks={num_ranks} ranks; at least {num_shared_ranks + 1} are needed "
            f"for num_shared_ranks={num_shared_ranks} and the routed experts: keep more, or start a new program"
        )
    logical, physical = np.full(num_ranks, -1), np.full(num_ranks, -1)
    logical[survivors] = np.arange(len(survivors))
    physical[: len(survivors)] = survivors
    experts_left = num_experts // num_moe_ranks * (len(survivors) - num_shared_ranks)
    header = [flag, len(survivors), num_shared_ranks, experts_left]
    return np.concatenate([header, logical, physical]).astype(np.int32)


def read_rank_table(
    table: jax.Array | np.ndarray | None, ep_size: int, num_experts: int, num_shared_ranks: int
) -> RankTable:
    """What a rank table says, traced; a table that is None or whose flag is 0 says that everybody is there.

    Its values are taken on trust: what ``make_rank_table`` wrote is consistent.

    Args:
      table: [4 + 2W] i32, or None.
      ep_size: W.
      num_experts, num_shared_ranks: E and S where the table does not say otherwise.

    Raises:
      ShapeError, DtypeError: the table is not [4 + 2W] i32.
    """
    ranks = jnp.arange(ep_size, dtype=jnp.int32)
    header = [jnp.asarray(value, jnp.int32) for value in (ep_size, num_shared_ranks, num_experts)]
    everybody = RankTable(*header, logical=ranks, physical=ranks)
    if table is None:
        return everybody
    check_rank_table(table, ep_size)
    table = jnp.asarray(table)
    _, world_size, shared, experts = table[:_NUM_HEADER]
    logical, physical = table[_NUM_HEADER:].reshape(2, ep_size)
    shrunken = RankTable(world_size, shared, experts, logical, jnp.where(ranks < world_size, physical, -1))
    return jax.tree.map(lambda new, old: jnp.where(table[0] == 0, old, new), shrunken, everybody)


def check_rank_table(table: jax.Array | np.ndarray, ep_size: int) -> None:
    """Raises unless ``table`` is [4 + 2W] i32."""
    layout = f"[4 + 2W] with W = {ep_size} ranks"
    check_shape("rank_table", table, (_NUM_HEADER + 2 * ep_size,), layout, "build it with moe_jax.make_rank_table")
    check_dtype("rank_table", table, ("int32",), "cast it with .astype(jnp.int32)")


def _as_mask(alive: Any, num_ranks: int) -> np.ndarray:
    if alive is None:
        return np.ones(num_ranks, bool)
    if isinstance(alive, (list, tuple)):
        alive = np.asarray(alive)
    check_array("alive", alive)
    check_mask("alive", alive, (num_ranks,), "[W], False = removed")
    return np.asarray(alive)
