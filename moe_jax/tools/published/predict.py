"""The time of an exchange by the links of a machine, and the fit of a link to published lines."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from moe_jax.tools.published import gathers
from moe_jax.tools.published.gathers import GATHERED
from moe_jax.tools.published.rows import (
    COMBINE,
    DISPATCH,
    PUBLISHED,
    PUBLISHED_MACHINES,
    ROW_BYTES,
    TOP_K,
    Published,
)


class Moved(NamedTuple):
    """How many rows one rank moves in one exchange, on average.

    Attributes:
      inside: rows that leave it for other ranks of its node.
      between: rows that leave it for other nodes.
      counted: rows by which the publisher computed a bandwidth.
    """

    inside: float
    between: float
    counted: float


def moved(line: Published) -> Moved:
    """Rows that an exchange moves when every choice of experts is as likely as any other."""
    node = min(PUBLISHED_MACHINES[line.machine].devices_per_node or line.ranks, line.ranks)
    nodes, tokens = line.ranks // node, line.tokens
    # The experts of a token are on some of the nodes only, and on some of the ranks.
    share = min(line.groups or nodes, nodes) / nodes
    to_ranks, to_nodes = (_places(round(n * share), round(line.experts * share)) for n in (line.ranks, nodes))
    counted = tokens * {"ranks": to_ranks, "nodes": to_nodes}.get(line.counts, float(TOP_K))
    if line.rows == "pairs":
        # 1. Each row goes straight to the rank of its expert.
        pairs = tokens * TOP_K / line.ranks
        return Moved(pairs * (node - 1), pairs * (line.ranks - node), counted)
    # 2. A row goes to each node once: to the rank there that has the same place in its node as the sender has here.
    #    That rank passes it on to every rank that needs it; with a probability of one in ``node`` it is such a rank
    #    itself.
    return Moved(tokens * to_ranks * (node - 1) / node, tokens * to_nodes * (nodes - 1) / nodes, counted)


def _places(count: int, experts: int) -> float:
    """On how many of ``count`` places the TOP_K different experts of a token are, if all places have equally many."""
    elsewhere = math.comb(experts - experts // count, TOP_K) / math.comb(experts, TOP_K)
    return count * (1 - elsewhere)


def published_seconds(line: Published, way: str) -> float:
    """The published time, or the time that the published bandwidth needs for the bytes that it counts."""
    value = line.published(way)
    assert value is not None  # this is only asked for what is published
    if line.counts == "time":
        return value * 1e-6
    return moved(line).counted * ROW_BYTES[line.dtype(way)] / (value * 1e9)


def predicted_seconds(line: Published, way: str) -> float:
    """The time of the slower of both links, which work at the same time, and the latency of the farther one."""
    machine, rows, size = PUBLISHED_MACHINES[line.machine], moved(line), ROW_BYTES[line.dtype(way)]
    seconds, latency = rows.inside * size / machine.inside.bytes_per_second, machine.inside.latency
    if rows.between:
        assert machine.between is not None  # it has nodes
        seconds = max(seconds, rows.between * size / machine.between.bytes_per_second)
        latency = machine.between.latency
    return seconds + latency


def ways(line: Published) -> list[str]:
    """Which of dispatch and combine are published."""
    return [way for way in (DISPATCH, COMBINE) if line.published(way) is not None]


def error(line: Published, way: str) -> float:
    """How far the prediction is from the published time, as a share of that: 0.1 where it is 10 % longer."""
    return predicted_seconds(line, way) / published_seconds(line, way) - 1


def points_of(kind: str) -> list[tuple[float, float]]:
    """The points that a kind of link is fitted to: seconds of a line's bytes at its rate, and the published seconds."""
    points = [
        (gathers.seconds_at_rate(line), gathers.published_seconds(line)) for line in GATHERED if line.fits == kind
    ]
    for line in PUBLISHED:
        if line.fits == kind:
            machine, rows = PUBLISHED_MACHINES[line.machine], moved(line)
            link, count = (machine.between, rows.between) if kind == "RDMA" else (machine.inside, rows.inside)
            assert link is not None  # the line crosses it
            for way in ways(line):
                at_rate = count * ROW_BYTES[line.dtype(way)] / link.bytes_per_second
                points.append((at_rate, published_seconds(line, way)))
    return points


def fit(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The link that fits the points best: its rate, over the rate that they assume, and its latency in seconds.

    It minimises the squares of the relative errors of at_rate / factor + latency.
    """
    matrix = np.array([(at_rate / seconds, 1e-6 / seconds) for at_rate, seconds in points])
    slowness, microseconds = np.linalg.lstsq(matrix, np.ones(len(matrix)), rcond=None)[0]
    return float(1 / slowness), float(microseconds * 1e-6)
