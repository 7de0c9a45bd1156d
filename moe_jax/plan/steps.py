"""What a device does in a call of the layer, step by step: who exchanges how many bytes with whom, and what it touches.

A transport lists its own steps (``Transport.steps``), ``cost`` lists the rest and gives all of them a time. Which ranks
of a group share a node, and how much of an exchange passes between nodes, is decided here.
"""

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moe_jax.hardware import Machine

if TYPE_CHECKING:
    from moe_jax.plan.plan import Plan

# The phases of the layer, in the order in which a forward pass comes to them. The backward pass of a phase counts with
# it: to send cotangents back to the tokens belongs to "dispatch", and to send them out to the experts to "combine".
ROUTE, DISPATCH, PRODUCTS, ACTIVATION, COMBINE, GRADIENTS = STEP_PHASES = (
    "route", "dispatch", "products", "activation", "combine", "gradients",
)  # fmt: skip


class Collective(NamedTuple):
    """One exchange between the ranks of a group.

    Attributes:
      op: "all-to-all", "all-gather", "reduce-scatter" or "all-reduce".
      axes: the mesh axes along which the ranks of a group lie.
      handed: bytes that each rank hands over.
      carries_rows: whether rows go from rank to rank in it, at the rate that ``Transport.wire_share`` gives them.
    """

    op: str
    axes: tuple[str, ...]
    handed: int
    carries_rows: bool = False


class Step(NamedTuple):
    """What a device does in one step.

    Attributes:
      phase: one of ``STEP_PHASES``.
      collectives: the exchanges, one after the other.
      traffic: bytes that pass through the memory of the device.
      launches: kernels and steps of a program that are started, without the exchanges themselves.
    """

    phase: str
    collectives: tuple[Collective, ...] = ()
    traffic: int = 0
    launches: int = 0


class Group(NamedTuple):
    """The ranks that exchange something with each other, as one of them sees them.

    Attributes:
      size: how many they are, this rank included.
      outside: how many of them are on other nodes, for the rank that sees most there.
      span: how many neighbouring devices they lie among, from the first to the last, in blocks of whole axes.
    """

    size: int
    outside: int
    span: int


class Layout(NamedTuple):
    """How the devices of a mesh are laid out over nodes: along the last axis first, and node by node.

    Attributes:
      axes: names and sizes of the mesh axes, outermost first.
      replicas: the axes that replicate the whole group.
      params: the axes of ``replicas`` along which the weights of experts are split too.
      node: how many devices share a node; a number that no mesh reaches, where all devices share one.
    """

    axes: tuple[tuple[str, int], ...]
    replicas: tuple[str, ...]
    params: tuple[str, ...]
    node: int

    @classmethod
    def of(cls, plan: "Plan", machine: Machine, num_replicas: int) -> "Layout":
        """The layout of the plan's mesh on ``machine``.

        Where experts are spread over several axes, the last of them lies inside a node and the others go from node to
        node; but a node never has more devices than the machine's, and no group that has room in one reaches into the
        next: devices that would be a part of one stay unused. Any other number of replicas than the plan's is that of
        an outermost axis in place of its own, whose devices hold the weights of their experts whole.
        """
        axes, replicas, params = plan.mesh_axes, plan.dp_axis, plan.param_axes
        if num_replicas != plan.num_replicas:
            replicas, params = ("replicas",), ()
            axes = (("replicas", num_replicas), *(axis for axis in axes if axis[0] not in plan.dp_axis))
        names, across = [name for name, _ in axes], plan.ep_axis[:-1]
        node = machine.devices_per_node or math.prod(size for _, size in axes)
        if machine.between is not None and across:
            innermost = max(names.index(name) for name in across)
            node = min(node, math.prod(size for _, size in axes[innermost + 1 :]))
        last = max((place for place, name in enumerate(names) if name in replicas), default=-1)
        group = math.prod(size for _, size in axes[last + 1 :])
        if group <= node:
            node -= node % group
        return cls(axes, replicas, params, node)

    def group(self, axes: tuple[str, ...]) -> Group:
        """The group of a rank along ``axes``."""
        return _group(self.axes, frozenset(axes), self.node)


@functools.lru_cache(maxsize=1024)
def _group(axes: tuple[tuple[str, int], ...], names: frozenset[str], node: int) -> Group:
    inside = [place for place, (name, size) in enumerate(axes) if name in names and size > 1]
    sizes = [size for _, size in axes]
    size = math.prod(sizes[place] for place in inside)
    if size == 1:
        return Group(1, 0, 1)
    span = math.prod(sizes[inside[0] :])
    # 1. The node of each device, one row for each group.
    nodes = np.arange(math.prod(sizes)).reshape(sizes) // node
    rows = np.moveaxis(nodes, inside, range(-len(inside), 0)).reshape(-1, size)
    # 2. For each row, the members on each node. A rank on the node with the fewest members sees most outside.
    keys = np.arange(len(rows))[:, None] * (nodes.max() + 1) + rows
    _, members = np.unique(keys, return_counts=True)
    return Group(size, size - int(members.min()), span)


def leaves(op: str, size: int, handed: int) -> int:
    """Bytes that leave a device of a group of ``size`` when each hands over so many."""
    factor = {"all-gather": size, "all-reduce": 2}.get(op, 1)
    return factor * handed * (size - 1) // size


def bytes_of(collective: Collective, group: Group) -> tuple[int, int]:
    """(bytes that leave a device for its own node, for other nodes).

    In an all-to-all every rank gets a part of its own, so each device sends what is for other nodes by itself. What is
    gathered or summed enters each node once, and its devices share the work: each of the n members of the group in a
    node carries an n-th of what comes from one rank outside.
    """
    total = leaves(collective.op, group.size, collective.handed)
    if not group.outside:
        return total, 0
    carriers = 1 if collective.op == "all-to-all" else group.size - group.outside
    between = total * group.outside // ((group.size - 1) * carriers)
    return total - between, between


class Sent(NamedTuple):
    """What the exchanges of some steps come to.

    Attributes:
      inside: bytes that leave a device for its own node.
      between: bytes that leave it for other nodes.
      seconds: the time on the slower kind of links, exchange by exchange.
      between_seconds: the part of ``seconds`` in which the links between nodes are the slower ones.
      latency: the seconds that the exchanges take however few bytes they move.
    """

    inside: int = 0
    between: int = 0
    seconds: float = 0.0
    between_seconds: float = 0.0
    latency: float = 0.0

    def __add__(self, other) -> "Sent":
        return Sent(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def sent_by(collective: Collective, layout: Layout, machine: Machine, wire_share: float) -> Sent:
    """One exchange. Both kinds of links work at the same time, so the slower one decides; the latency is added to it.

    ``wire_share`` is the share of the rate of the link inside that exchanges of rows reach.
    """
    group = layout.group(collective.axes)
    if group.size == 1:
        return Sent()
    inside, between = bytes_of(collective, group)
    # On a torus most of an all-to-all passes through other devices.
    share = machine.all_to_all_share if collective.op == "all-to-all" else machine.gather_share
    rate = machine.inside.bytes_per_second * share(min(group.span, layout.node))
    if collective.carries_rows:
        rate *= wire_share
    inside_seconds = inside / rate
    if not between:
        return Sent(inside, 0, inside_seconds, 0.0, machine.inside.latency)
    assert machine.between is not None  # else all devices share one node
    between_seconds = between / machine.between.bytes_per_second
    decisive = between_seconds if between_seconds > inside_seconds else 0.0
    return Sent(inside, between, max(inside_seconds, between_seconds), decisive, machine.between.latency)
