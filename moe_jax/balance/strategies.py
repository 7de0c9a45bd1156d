"""From loads to a placement of experts on ranks, by one of three strategies."""

from typing import Any

import numpy as np

from moe_jax.balance.placement import Placement, read_load
from moe_jax.balance.search import Deal, deal_out, even_out, improve_by_few, solve
from moe_jax.errors import (
    InvalidArgumentError,
    MissingArgumentError,
    UnexpectedArgumentError,
    check_choice,
    check_count,
    check_type,
)

STRATEGIES = ("replicate", "rearrange", "minimal")


def rebalance(
    load: Any,
    *,
    num_physical_experts: int,
    num_ranks: int,
    num_groups: int = 1,
    num_nodes: int = 1,
    strategy: str = "replicate",
    current: Placement | None = None,
    max_moved: int | None = None,
) -> Placement:
    """Finds a placement of experts on ranks in which the fullest rank has little more to do than the mean.

    Hot experts get several replicas, in the P - E redundant slots, and every rank gets P / R slots. Where ``num_nodes``
    divides ``num_groups``, the groups of experts among which a group-limited router chooses stay together: each node
    holds ``num_groups / num_nodes`` whole groups with all their replicas, so that a token goes to few nodes. Otherwise
    nodes do not count. Each layer is solved by itself.

    - ``"replicate"``: as even as the search finds, wherever the experts lie today.
    - ``"rearrange"``: the same without redundant slots, P = E: experts change places, and no memory is added.
    - ``"minimal"``: at most ``max_moved`` slots of each layer differ from ``current``: those that help most.

    The search deals replicas to the emptiest rank as the public EPLB does, then lets the fullest rank exchange slots
    with others, and experts exchange replicas, while either helps. Its fullest rank never has more to do than that of
    the public algorithm's placement (for "minimal", of ``current``). Two replicas of one expert lie on one rank only
    where that cannot be avoided, or where avoiding it would break this promise. The same input gives the same answer.

    Args:
      load: [E] or [X, E] real numbers >= 0, the load of each logical expert of each layer, in any unit.
      num_physical_experts: P >= E, a multiple of ``num_ranks``.
      num_ranks: R, a multiple of ``num_nodes`` where nodes count.
      num_groups: groups of consecutive logical experts; divides E.
      num_nodes: nodes of consecutive ranks.
      strategy: "replicate", "rearrange" or "minimal".
      current: the placement of today, for "minimal" and for it alone.
      max_moved: how many slots of a layer may change, for "minimal" and for it alone.

    Returns:
      Placement with ``physical_to_logical`` [P], or [X, P].

    Raises:
      InvalidArgumentError: sizes do not divide, P < E, a load is negative or not finite, or the current placement is of
        other sizes or splits a group over nodes.
      MissingArgumentError, UnexpectedArgumentError: ``current`` and ``max_moved`` go with "minimal".
      ShapeError, DtypeError: ``load`` is no such array.

    Source: DeepSeek's Expert Parallelism Load Balancer (github.com/deepseek-ai/EPLB), whose problem this is.

    >>> import numpy as np, moe_jax as moe
    >>> placement = moe.rebalance(np.array([60, 20, 10, 10]), num_physical_experts=6, num_ranks=2)
    >>> placement.replica_counts
    array([2, 2, 1, 1], dtype=int32)
    """
    load = read_load(load)
    check_choice("strategy", strategy, STRATEGIES)
    num_experts = load.shape[-1]
    for name, value in (
        ("num_physical_experts", num_physical_experts),
        ("num_ranks", num_ranks),
        ("num_groups", num_groups),
        ("num_nodes", num_nodes),
    ):
        check_count(name, value)
    _check_divides("num_ranks", num_ranks, "num_physical_experts", num_physical_experts)
    _check_divides("num_groups", num_groups, "the number of experts in load", num_experts)
    if num_physical_experts < num_experts:
        raise InvalidArgumentError(
            f"num_physical_experts={num_physical_experts} is less than the {num_experts} experts of load, of which "
            "each needs a slot"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check_divides("num_nodes", num_nodes, "num_ranks", num_ranks)
    if strategy == "rearrange" and num_physical_experts != num_experts:
        raise InvalidArgumentError(
            f'strategy="rearrange" has no redundant slots, but num_physical_experts={num_physical_experts} and load '
            f"has {num_experts} experts; pass num_physical_experts={num_experts} or another strategy"
        )
    layers = np.atleast_2d(load)
    if strategy == "minimal":
        if current is None or max_moved is None:
            raise MissingArgumentError('strategy="minimal" needs current, the placement of today, and max_moved')
        _check_current(current, load, num_physical_experts, num_ranks)
        check_count("max_moved", max_moved, 0)
        experts = _change_few(layers, current, num_nodes, max_moved)
    else:
        for name, value in (("current", current), ("max_moved", max_moved)):
            if value is not None:
                raise UnexpectedArgumentError(f'{name} is for strategy="minimal"; strategy is "{strategy}"')
        experts = _place(layers, num_physical_experts, num_ranks, num_groups, num_nodes)
    return Placement(
        physical_to_logical=experts.reshape(*load.shape[:-1], -1).astype(np.int32),
        num_logical_experts=num_experts,
        num_ranks=num_ranks,
    )


def _check_divides(small_name: str, small: int, name: str, value: int) -> None:
    if value % small:
        raise InvalidArgumentError(f"{name}, {value}, is not a multiple of {small_name}={small}")


def _check_current(current: Placement, load: np.ndarray, num_physical_experts: int, num_ranks: int) -> None:
    check_type("current", current, Placement, "pass the placement of today")
    found = (*current.physical_to_logical.shape, current.num_logical_experts, current.num_ranks)
    wanted = (*load.shape[:-1], num_physical_experts, load.shape[-1], num_ranks)
    if found != wanted:
        raise InvalidArgumentError(
            f"current has (layers,) P, E, R = {found}, but load and arguments say {wanted}; they must be the same"
        )


def _place(load: np.ndarray, num_slots: int, num_ranks: int, num_groups: int, num_nodes: int) -> np.ndarray:
    """[X, R, S] experts for load [X, E]."""
    num_layers, num_experts = load.shape
    if num_nodes == 1:
        return solve(load, num_slots, num_ranks)
    # 1. Groups to nodes, [X, N, G / N]: dealt as the public algorithm does, and more evenly.
    group_load = load.reshape(num_layers, num_groups, -1).sum(-1)
    dealt = deal_out(group_load, np.ones_like(group_load, np.int64), num_nodes, apart=False)
    evened = Deal.of(dealt.copy(), group_load)
    even_out(evened, np.arange(num_layers), 1, rest=0.0)
    # 2. Experts to ranks within each node, for both ways of dealing groups. Each layer takes the better one.
    per_group = num_experts // num_groups
    found, largest = [], []
    for groups in (dealt, evened.experts):
        experts = (groups[..., None] * per_group + np.arange(per_group)).reshape(num_layers * num_nodes, -1)
        mine = np.take_along_axis(np.repeat(load, num_nodes, 0), experts, 1)  # [X * N, E / N]
        local = solve(mine, num_slots // num_nodes, num_ranks // num_nodes, num_nodes)
        worst = Deal.of(local, mine).rank_load.max(1).reshape(num_layers, num_nodes).max(1)
        found.append(np.take_along_axis(experts, local.reshape(len(local), -1), 1).reshape(num_layers, num_ranks, -1))
        largest.append(worst)
    return np.where((largest[1] < largest[0])[:, None, None], found[1], found[0])


def _change_few(load: np.ndarray, current: Placement, num_nodes: int, max_moved: int) -> np.ndarray:
    """[X, R, S] experts, of which at most ``max_moved`` per layer are in other slots than in ``current``."""
    experts = np.atleast_2d(current.physical_to_logical).astype(np.int64)
    return np.stack(
        [_change_few_of(*layer, current, num_nodes, max_moved) for layer in zip(load, experts, strict=True)]
    )


def _change_few_of(load: np.ndarray, experts: np.ndarray, current: Placement, num_nodes: int, max_moved: int):
    nodes = experts.reshape(num_nodes, -1)
    members = [np.unique(row) for row in nodes]
    if any(len(row) * num_nodes != len(load) for row in members):
        raise InvalidArgumentError(
            f"current keeps an expert on more than one of num_nodes={num_nodes} nodes; pass num_nodes=1, or a "
            "placement made for these nodes"
        )
    # Each node is a layer of its own here, with its own experts numbered from 0.
    local = np.stack([np.searchsorted(row, node) for row, node in zip(members, nodes, strict=True)])
    deal = Deal.of(local.reshape(num_nodes, current.num_ranks // num_nodes, -1), load[np.stack(members)])
    improve_by_few(deal, max_moved)
    return np.stack(members)[np.arange(num_nodes)[:, None, None], deal.experts].reshape(current.num_ranks, -1)
