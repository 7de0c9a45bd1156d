"""How the load of experts is best split over replicas that lie where they lie."""

import numpy as np

_TINY = 1e-12  # of the mean load of a rank: less than that is rounding


def split_evenly(load: np.ndarray, experts: np.ndarray, num_ranks: int) -> np.ndarray:
    """The load of each slot, such that the fullest rank has as little as the placement allows, of one layer.

    It is a flow from experts over their slots to ranks, whose least largest sum M is sought. No split can give a set of
    ranks less than the load of the experts that lie nowhere else, so M is at least that load over the number of ranks.
    We begin with equal shares, and with M as the mean over all ranks, and lead what ranks have above M along the
    shortest ways to ranks that have less. On a way from rank to rank an expert passes load from one of its slots to
    another. Where no way is left, the ranks that can be reached from one above M are such a set: all that they have
    lies nowhere else. Their mean is the new M. In the end no rank is above M, and so M is the least.

    Args:
      load: [E] f64 >= 0.
      experts: [P] expert of each slot; slot p lies on rank ``p // (P / num_ranks)``.
      num_ranks: R.

    Returns:
      [P] f64 >= 0, whose sum over the slots of an expert is its load.
    """
    counts = np.bincount(experts, minlength=len(load))
    slots_per_rank = len(experts) // num_ranks
    amount = (load / counts)[experts].tolist()
    rank_load = np.reshape(amount, (num_ranks, -1)).sum(1).tolist()
    slots_of = [np.flatnonzero(experts == e).tolist() if n > 1 else [] for e, n in enumerate(counts)]
    movable = [
        [p for p in range(r * slots_per_rank, (r + 1) * slots_per_rank) if slots_of[experts[p]]]
        for r in range(num_ranks)
    ]
    expert_of = experts.tolist()
    limit = sum(rank_load) / num_ranks
    tiny = limit * _TINY
    while True:
        # 1. From all ranks above the limit to the next one below it, breadth first.
        reached = [r for r in range(num_ranks) if rank_load[r] > limit + tiny]
        if not reached:
            return np.array(amount)
        came: dict[int, tuple[int, int] | None] = dict.fromkeys(reached)  # the two slots of the last step to a rank
        passed: set[int] = set()
        end = None
        for r in reached:  # grows
            if rank_load[r] < limit - tiny:
                end = r
                break
            for p in movable[r]:
                e = expert_of[p]
                if e in passed or amount[p] <= tiny:
                    continue
                passed.add(e)
                for q in slots_of[e]:
                    to = q // slots_per_rank
                    if to not in came:
                        came[to] = (p, q)
                        reached.append(to)
        # 2. Where there is none, all that the reached ranks have lies on them alone.
        if end is None:
            limit = max(limit + tiny, sum(rank_load[r] for r in reached) / len(reached))
            continue
        # 3. As much as the way can lead goes along it.
        steps, r = [], end
        while (step := came[r]) is not None:
            steps.append(step)
            r = step[0] // slots_per_rank
        moved = min(rank_load[r] - limit, limit - rank_load[end], *(amount[p] for p, _ in steps))
        for p, q in steps:
            amount[p] -= moved
            amount[q] += moved
        rank_load[r] -= moved
        rank_load[end] += moved
