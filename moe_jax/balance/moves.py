"""From two placements to moves: which slot takes its expert from which, and in which turn, as integers."""

import collections
import dataclasses
import itertools

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moves:
    """Where the slots of one layer, S on each of R ranks, take their weights from, as these were before.

    What takes turns needs all of it; what sends everything at once needs ``sources`` alone. In a turn every rank sends
    at most one slot and receives at most one.

    Attributes:
      sources: [R, S] i32, the slot, of all R * S, that a slot takes its weights from: itself if it keeps its expert,
        one of its own rank if that has its new expert, and else one of another rank.
      turns: [R, S] i32, the turn in which a slot gets its weights from another rank; -1: it does not.
      num_turns: [1] i32.
    """

    sources: np.ndarray
    turns: np.ndarray
    num_turns: np.ndarray


def find_moves(old: np.ndarray, new: np.ndarray, num_ranks: int) -> Moves:
    """The moves from one row of ``physical_to_logical`` [P] to another.

    A slot whose expert its own rank has takes it from there, so nothing travels. Of the ranks that could send an expert
    one is chosen such that the rank which sends most sends as few slots as possible. There are as many turns as the
    rank has slots to send, or to receive, that has most.
    """
    slots = len(old) // num_ranks
    # 1. Which slot of which ranks has an expert today.
    holders: dict[int, dict[int, int]] = {}
    for slot, expert in enumerate(old.tolist()):
        holders.setdefault(expert, {}).setdefault(slot // slots, slot)
    # 2. What is at home, and for which slots another rank must send.
    sources, turns = np.arange(len(old), dtype=np.int32), np.full(len(old), -1, np.int32)
    receivers: list[int] = []
    for slot in np.flatnonzero(old != new).tolist():
        at_home = holders[int(new[slot])].get(slot // slots)
        if at_home is None:
            receivers.append(slot)
        else:
            sources[slot] = at_home
    # 3. Which rank sends it, and when.
    senders = _level([list(holders[int(new[slot])]) for slot in receivers], num_ranks)
    for slot, sender in zip(receivers, senders, strict=True):
        sources[slot] = holders[int(new[slot])][sender]
    turns[receivers] = _take_turns([(sender, slot // slots) for slot, sender in zip(receivers, senders, strict=True)])
    return Moves(
        sources=sources.reshape(num_ranks, slots),
        turns=turns.reshape(num_ranks, slots),
        num_turns=turns.max(keepdims=True) + 1,
    )


def _level(able: list[list[int]], num_ranks: int) -> list[int]:
    """One of the ranks that are able to send each slot, such that the rank that sends most sends as few as possible.

    Source: N. J. A. Harvey, R. E. Ladner, L. Lovasz and T. Tamir, Semi-Matchings for Bipartite Graphs and Load
    Balancing, J. Algorithms 59 (2006): there is nothing better once no path leads from the rank that sends most to one
    that sends at least two fewer.
    """
    senders = [0] * len(able)
    sent: list[set[int]] = [set() for _ in range(num_ranks)]
    # 1. Slots that few can send choose first, and they choose who sends least.
    for move in sorted(range(len(able)), key=lambda move: len(able[move])):
        senders[move] = min(able[move], key=lambda rank: len(sent[rank]))
        sent[senders[move]].add(move)
    while True:
        # 2. Whom the rank that sends most could relieve itself to, directly or through others that pass slots on.
        fullest = max(range(num_ranks), key=lambda rank: len(sent[rank]))
        relief: dict[int, int] = {}  # a rank -> the move that it would take over
        reached = [fullest]
        for rank in reached:
            for move in sent[rank]:
                found = [other for other in able[move] if other != fullest and other not in relief]
                relief.update(dict.fromkeys(found, move))
                reached += found
        rank = min(reached, key=lambda rank: len(sent[rank]))
        if len(sent[rank]) > len(sent[fullest]) - 2:
            return senders
        # 3. Every rank on the path hands one slot on, so that only its two ends send another number than before.
        while rank != fullest:
            move = relief[rank]
            before, senders[move] = senders[move], rank
            sent[before].remove(move)
            sent[rank].add(move)
            rank = before


def _take_turns(pairs: list[tuple[int, int]]) -> list[int]:
    """The turn of each (sender, receiver): no two moves of a sender, or of a receiver, have the same.

    There are as many turns as the busiest sender or receiver has moves, since the edges of a bipartite graph have a
    colouring with as many colours as its largest degree.

    Source: D. Koenig, Ueber Graphen und ihre Anwendung auf Determinantentheorie und Mengenlehre, Math. Ann. 77 (1916).
    """
    turns = [0] * len(pairs)
    at: dict[tuple[int, int], dict[int, int]] = collections.defaultdict(dict)  # (side, rank) -> turn -> move
    for move, ends in enumerate(pairs):
        # 1. The first turn in which the sender is free, and the first in which the receiver is.
        turn, other = (next(t for t in itertools.count() if t not in at[end]) for end in enumerate(ends))
        # 2. If the receiver is not free in the sender's turn, the move that it has then must get the other turn, the
        #    move that its sender has in that one must get this one, and so on. The chain never comes to our sender,
        #    whose moves it would reach in the turn in which that is free.
        chain: list[int] = []
        side, wanted = 1, turn
        while (busy := at[side, pairs[chain[-1]][side] if chain else ends[1]].get(wanted)) is not None:
            chain.append(busy)
            side, wanted = 1 - side, turn + other - wanted
        for link in chain:
            for end in enumerate(pairs[link]):
                del at[end][turns[link]]
        for link in chain:
            turns[link] = turn + other - turns[link]
            for end in enumerate(pairs[link]):
                at[end][turns[link]] = link
        # 3. Now both are free.
        turns[move] = turn
        for end in enumerate(ends):
            at[end][turn] = move
    return turns
