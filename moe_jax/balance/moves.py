"""From two placements to moves: who takes which expert from whom, and in which turn, as integers."""

import dataclasses

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moves:
    """What the ranks do so that the slots of one layer hold other experts: first at home, then turn by turn.

    In a turn every rank sends one of its slots, to all ranks that want it, and writes at most one. Tables have room for
    W turns, of which the first ``num_turns`` are taken. All are read from the weights as they were before.

    Attributes:
      at_home: [R, S] i32, the slot of the same rank that a slot takes its weights from: itself if it keeps them, or if
        it gets them from another rank.
      sent: [R, W] i32, the slot that a rank sends.
      written: [R, W] i32, the slot that a rank writes; S: none.
      sources: [W, R] i32, the rank whose slot a rank takes.
      num_turns: [1] i32.
    """

    at_home: np.ndarray
    sent: np.ndarray
    written: np.ndarray
    sources: np.ndarray
    num_turns: np.ndarray


def find_moves(old: np.ndarray, new: np.ndarray, num_ranks: int) -> Moves:
    """The moves from one row of ``physical_to_logical`` [P] to another.

    A slot takes its expert from its own rank where that has it, so nothing travels. From the others each turn serves as
    many ranks as it finds a sender for, those first that wait for most. Who sends an expert serves all that want it.
    Tables are 4 S turns wide, or twice that as often as it takes.
    """
    slots = len(old) // num_ranks
    at_home = np.tile(np.arange(slots, dtype=np.int32), (num_ranks, 1))
    # 1. Which slot of which ranks has an expert today.
    holders: dict[int, dict[int, int]] = {}
    for slot in range(len(old)):
        holders.setdefault(int(old[slot]), {}).setdefault(slot // slots, slot % slots)
    # 2. What every rank waits for: (expert, the slot that it is for), experts first that few can send.
    waiting: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for slot in np.flatnonzero(old != new):
        rank, expert = int(slot) // slots, int(new[slot])
        if rank in holders[expert]:
            at_home[rank, slot % slots] = holders[expert][rank]
        else:
            waiting[rank].append((expert, int(slot) % slots))
    for entries in waiting:
        entries.sort(key=lambda entry: len(holders[entry[0]]))
    # 3. Turn by turn, until nobody waits. Each turn serves at least the first rank.
    turns: list[tuple[dict[int, int], dict[int, tuple[int, int]]]] = []
    work = [0] * num_ranks
    while any(waiting):
        sending: dict[int, int] = {}  # rank -> expert
        taken: dict[int, tuple[int, int]] = {}  # rank -> the rank that it takes from, the slot that it writes
        for rank in sorted(range(num_ranks), key=lambda rank: -len(waiting[rank])):
            for entry in waiting[rank]:
                able = [peer for peer in holders[entry[0]] if sending.get(peer, entry[0]) == entry[0]]
                if able:
                    peer = min(able, key=lambda peer: (peer not in sending, work[peer]))
                    work[peer] += peer not in sending
                    sending[peer], taken[rank] = entry[0], (peer, entry[1])
                    waiting[rank].remove(entry)
                    break
        turns.append((sending, taken))
    # 4. Into tables of one width, so that other placements run the same program.
    width = 4 * slots
    while width < len(turns):
        width *= 2
    sent, written = np.zeros((num_ranks, width), np.int32), np.full((num_ranks, width), slots, np.int32)
    sources = np.tile(np.arange(num_ranks, dtype=np.int32), (width, 1))
    for turn, (sending, taken) in enumerate(turns):
        for rank, expert in sending.items():
            sent[rank, turn] = holders[expert][rank]
        for rank, (peer, slot) in taken.items():
            sources[turn, rank], written[rank, turn] = peer, slot
    return Moves(
        at_home=at_home, sent=sent, written=written, sources=sources, num_turns=np.array([len(turns)], np.int32)
    )
