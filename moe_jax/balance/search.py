"""The search for an even placement: replicas are counted, dealt to ranks, and exchanged as long as that helps.

Everything is vectorised NumPy over a leading axis X: a layer, or a node of a layer. E logical experts, R ranks, S slots
per rank, P = R * S slots. All replicas of an expert get equal shares of its load. No slot is ever empty. Replicas of
one expert on the same rank are called *twins*.
"""

import dataclasses

import numpy as np

_EVEN = 1e-4  # The search ends at this excess over the mean load of a rank.
_GAIN = 1e-9  # What a step must gain, as a part of the load, so that rounding does not count as a gain.
_STEPS = 1000  # The most steps in one go.
_TRIES, _SHAKES = 8, 3  # Ways out of a dead end that are tried, and random exchanges at the start of each.
_LAST_TRIES = 100  # How many are tried before twins are allowed.


@dataclasses.dataclass
class Deal:
    """Which expert lies where, and what follows from that. ``experts`` is the state; the other arrays follow it.

    Attributes:
      experts: [X, R, S] logical expert in each slot.
      load: [X, E] load of each expert.
      counts: [X, E] replicas of each expert.
      held: [X, R, E] replicas of each expert on each rank.
      rank_load: [X, R].
    """

    experts: np.ndarray
    load: np.ndarray
    counts: np.ndarray
    held: np.ndarray
    rank_load: np.ndarray

    @classmethod
    def of(cls, experts: np.ndarray, load: np.ndarray) -> "Deal":
        num_layers, num_ranks, num_slots = experts.shape
        held = np.zeros((num_layers, num_ranks, load.shape[1]), np.int32)
        layer, rank = np.indices((num_layers, num_ranks))
        for slot in range(num_slots):
            np.add.at(held, (layer, rank, experts[:, :, slot]), 1)
        deal = cls(experts, load, held.sum(1), held, np.zeros((num_layers, num_ranks)))
        deal.rank_load = deal.loads_of(slice(None))
        return deal

    def loads_of(self, layers) -> np.ndarray:
        """[x, R] the loads of the ranks of some layers, summed from scratch."""
        share = self.load[layers] / np.maximum(self.counts[layers], 1)
        return np.einsum("xre,xe->xr", self.held[layers], share)

    def share(self, layers) -> np.ndarray:
        """[x, R, S] the load in each slot of some layers."""
        experts = self.experts[layers]
        shares = self.load[layers] / np.maximum(self.counts[layers], 1)
        return np.take_along_axis(shares, experts.reshape(len(experts), -1), 1).reshape(experts.shape)

    def put(self, layers: np.ndarray, ranks: np.ndarray, slots: np.ndarray, experts: np.ndarray) -> None:
        """Writes one slot in each of some layers. Loads are out of date until ``refresh`` is called."""
        old = self.experts[layers, ranks, slots]
        self.held[layers, ranks, old] -= 1
        self.held[layers, ranks, experts] += 1
        self.counts[layers, old] -= 1
        self.counts[layers, experts] += 1
        self.experts[layers, ranks, slots] = experts

    def refresh(self, layers: np.ndarray) -> None:
        self.rank_load[layers] = self.loads_of(layers)


def count_replicas(load: np.ndarray, num_slots: int, most: int) -> np.ndarray:
    """[X, E] replicas: one each, and every further one for the expert whose replicas carry most, up to ``most``."""
    num_layers, num_experts = load.shape
    counts, everyone = np.ones((num_layers, num_experts), np.int64), np.arange(num_layers)
    each = load.astype(np.float64).copy()
    for _ in range(num_slots - num_experts):
        hottest = np.argmax(each, axis=1)
        counts[everyone, hottest] += 1
        count = counts[everyone, hottest]
        each[everyone, hottest] = np.where(count < most, load[everyone, hottest] / count, -1.0)
    return counts


def deal_out(load: np.ndarray, counts: np.ndarray, num_ranks: int, *, apart: bool) -> np.ndarray:
    """[X, R, S] experts: replicas in order of falling load, each to the emptiest rank that has room.

    ``apart``: ranks that have the expert already are taken last.
    """
    num_layers, num_experts = load.shape
    num_slots = int(counts[0].sum()) // num_ranks
    # 1. The replicas in order of falling load, where those of an expert stand side by side.
    share = load / counts
    order = np.argsort(-share, axis=1, kind="stable")  # [X, E]
    repeats = np.take_along_axis(counts, order, 1)
    replicas = np.stack([np.repeat(o, n) for o, n in zip(order, repeats, strict=True)])  # [X, P]
    values = np.take_along_axis(share, replicas, 1)
    # 2. One after the other, for all layers at once.
    experts = np.zeros((num_layers, num_ranks, num_slots), np.int64)
    filled = np.zeros((num_layers, num_ranks), np.int64)
    rank_load = np.zeros((num_layers, num_ranks))
    held = np.zeros((num_layers, num_ranks, num_experts), bool)
    everyone, behind = np.arange(num_layers), 2 * load.sum() + 1
    for expert, value in zip(replicas.T, values.T, strict=True):
        cost = rank_load + behind * held[everyone, :, expert] if apart else rank_load
        rank = np.argmin(np.where(filled == num_slots, np.inf, cost), axis=1)
        experts[everyone, rank, filled[everyone, rank]] = expert
        filled[everyone, rank] += 1
        rank_load[everyone, rank] += value
        held[everyone, rank, expert] = True
    return experts


def deal_in_turn(counts: np.ndarray, num_ranks: int) -> np.ndarray:
    """[X, R, S] experts: replicas of an expert on consecutive ranks, so that there are no twins while counts <= R."""
    replicas = np.stack([np.repeat(np.arange(len(row)), row) for row in counts])
    return replicas.reshape(len(counts), -1, num_ranks).swapaxes(1, 2).copy()


def _exchange(deal: Deal, layers, rank, slot, other_rank, other_slot) -> None:
    mine, theirs = deal.experts[layers, rank, slot], deal.experts[layers, other_rank, other_slot]
    each = deal.load[layers, mine] / deal.counts[layers, mine], deal.load[layers, theirs] / deal.counts[layers, theirs]
    deal.put(layers, rank, slot, theirs)
    deal.put(layers, other_rank, other_slot, mine)
    deal.rank_load[layers, rank] += each[1] - each[0]
    deal.rank_load[layers, other_rank] += each[0] - each[1]


def _loads_after_exchange(deal: Deal, layers: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """[x, S, R, S] the larger of the two ranks' loads, if each slot of ``rank`` is exchanged with each slot elsewhere.

    It is infinite where the exchange would bring a rank an expert that it has, which includes the slots of ``rank``
    itself.
    """
    num = np.arange(len(layers))
    share, experts, held, loads = deal.share(layers), deal.experts[layers], deal.held[layers], deal.rank_load[layers]
    mine = experts[num, rank]  # [x, S]
    leaving = share[num, rank][:, :, None, None] - share[:, None]  # [x, S, R, S]
    larger = np.maximum(loads[num, rank][:, None, None, None] - leaving, loads[:, None, :, None] + leaving)
    they_have_mine = held[num[:, None, None], np.arange(held.shape[1]), mine[:, :, None]] > 0  # [x, S, R]
    i_have_theirs = held[num[:, None, None], rank[:, None, None], experts] > 0  # [x, R, S]
    larger[they_have_mine[:, :, :, None] | i_have_theirs[:, None]] = np.inf
    return larger


def _uneven(deal: Deal, layers: np.ndarray, rest: float = _EVEN) -> np.ndarray:
    loads = deal.rank_load[layers]
    return layers[loads.max(1) > loads.mean(1) * (1 + rest)]


def exchange_slots(deal: Deal, layers: np.ndarray, rest: float, steps: int = _STEPS) -> None:
    """Makes the best exchange of a slot of each layer's fullest rank with another rank, as long as that helps."""
    for _ in range(steps):
        layers = _uneven(deal, layers, rest)
        if not len(layers):
            return
        num, rank = np.arange(len(layers)), deal.rank_load[layers].argmax(1)
        larger = _loads_after_exchange(deal, layers, rank)
        best = np.unravel_index(larger.reshape(len(layers), -1).argmin(1), larger.shape[1:])
        helps = larger[num, *best] < deal.rank_load[layers, rank] * (1 - _GAIN)
        layers, rank = layers[helps], rank[helps]
        slot, other_rank, other_slot = (index[helps] for index in best)
        _exchange(deal, layers, rank, slot, other_rank, other_slot)


def recount(deal: Deal, layer: int, most: int) -> bool:
    """Gives an expert of the fullest rank a replica in place of one of several of another expert, if that helps.

    g experts may gain a replica, and C slots may give one up. The shares of both experts change on all ranks, so all
    loads are compared.
    """
    loads, experts, counts, load = deal.rank_load[layer], deal.experts[layer], deal.counts[layer], deal.load[layer]
    held, fullest = deal.held[layer], deal.rank_load[layer].argmax()
    gains = experts[fullest]
    gains = gains[counts[gains] < most]
    ranks, slots = np.nonzero(counts[experts] > 1)
    if not len(gains) or not len(ranks):
        return False
    gives = experts[ranks, slots]  # [C]
    # 1. The gaining expert gets lighter wherever it lies, and the giving one heavier.
    lighter = held[:, gains] * (load[gains] / (counts[gains] + 1) - load[gains] / counts[gains])  # [R, g]
    heavier = held[:, gives] * (load[gives] / (counts[gives] - 1) - load[gives] / counts[gives])  # [R, C]
    after = loads[:, None, None] + lighter[:, :, None] + heavier[:, None, :]  # [R, g, C]
    # 2. In the slot itself the heavier share makes room for the lighter one.
    comes = (load[gains] / (counts[gains] + 1))[:, None] - load[gives] / (counts[gives] - 1)  # [g, C]
    after[ranks, :, np.arange(len(ranks))] += comes.T
    worst = after.max(0)
    # 3. No rank gets an expert that it has already.
    worst[(held[ranks][:, gains] > 0).T] = np.inf
    gain, place = np.unravel_index(worst.argmin(), worst.shape)
    if not worst[gain, place] < loads[fullest] * (1 - _GAIN):
        return False
    one = np.array([layer])
    deal.put(one, ranks[[place]], slots[[place]], gains[[gain]])
    deal.refresh(one)
    return True


def even_out(deal: Deal, layers: np.ndarray, most: int, rest: float = _EVEN) -> None:
    """Takes both kinds of steps in turn, until neither helps or the excess over the mean is below ``rest``.

    The largest load of a layer never grows.
    """
    while len(layers := _uneven(deal, layers, rest)):
        exchange_slots(deal, layers, rest)
        layers = _uneven(deal, layers, rest)
        helped = np.zeros(len(layers), bool)
        for i, layer in enumerate(layers):
            for _ in range(_STEPS):
                if not recount(deal, int(layer), most):
                    break
                helped[i] = True
        layers = layers[helped]


def shake(deal: Deal, layers: np.ndarray, rng: np.random.Generator) -> None:
    """Leaves a dead end: the fullest rank exchanges a few slots at random, where no rank gets an expert that it has."""
    for _ in range(_SHAKES):
        if not len(layers):
            return
        num, rank = np.arange(len(layers)), deal.rank_load[layers].argmax(1)
        larger = _loads_after_exchange(deal, layers, rank).reshape(len(layers), -1)
        chance = np.where(np.isinf(larger), -1.0, rng.random(larger.shape))
        pick = chance.argmax(1)
        can = chance[num, pick] >= 0
        shape = (deal.experts.shape[2], *deal.experts.shape[1:])
        slot, other_rank, other_slot = (index[can] for index in np.unravel_index(pick, shape))
        layers, rank = layers[can], rank[can]
        _exchange(deal, layers, rank, slot, other_rank, other_slot)


def twins(deal: Deal) -> np.ndarray:
    """[X] how many replicas are twins, beside the first replica of their expert on a rank."""
    return np.maximum(deal.held - 1, 0).sum((1, 2))


def part_twins(deal: Deal, layers: np.ndarray) -> None:
    """Exchanges twins for other replicas, at the least cost in load, as far as that is possible."""
    for layer in layers:
        one = np.array([layer])
        for rank in np.nonzero((deal.held[layer] > 1).any(1))[0]:
            slots = np.nonzero(deal.held[layer, rank, deal.experts[layer, rank]] > 1)[0]
            while len(slots):
                larger = _loads_after_exchange(deal, one, np.array([rank]))[0, slots]
                pick, other_rank, other_slot = np.unravel_index(larger.argmin(), larger.shape)
                if np.isinf(larger[pick, other_rank, other_slot]):
                    break
                _exchange(deal, one, rank, slots[pick], other_rank, other_slot)
                slots = np.nonzero(deal.held[layer, rank, deal.experts[layer, rank]] > 1)[0]


def solve(load: np.ndarray, num_slots: int, num_ranks: int, num_nodes: int = 1) -> np.ndarray:
    """[X, R, S] experts, evenly loaded, for load [X, E] >= 0 and P = ``num_slots`` >= E.

    Every ``num_nodes`` neighbours along X are the nodes of one layer, for which the fullest rank of all of them counts.

    Twins are kept apart, unless a layer would then end less even than what the public EPLB's way of dealing gives,
    which allows twins.
    """
    num_experts, everyone = load.shape[1], np.arange(len(load))
    most = num_ranks * -(-num_slots // (num_ranks * num_experts))
    # 1. Begin with a deal without twins.
    counts = count_replicas(load, num_slots, most)
    best = Deal.of(deal_out(load, counts, num_ranks, apart=True), load)
    part_twins(best, np.nonzero(twins(best))[0])
    stuck = np.nonzero(twins(best))[0]
    if len(stuck):
        _replace(best, Deal.of(deal_in_turn(counts[stuck], num_ranks), load[stuck]), stuck)
    even_out(best, everyone, most)
    # 2. Begin with the usual deal, whose twins are parted at the end.
    usual = Deal.of(deal_out(load, count_replicas(load, num_slots, num_slots), num_ranks, apart=False), load)
    bound = np.repeat(usual.rank_load.max(1).reshape(-1, num_nodes).max(1), num_nodes)
    even_out(usual, everyone, most)
    parted = _some(usual, everyone)
    part_twins(parted, np.nonzero(twins(parted))[0])
    even_out(parted, everyone, most)
    _take_better(best, parted, everyone, twins(parted) == 0)
    # 3. Leave dead ends.
    for seed in range(_TRIES):
        left = _uneven(best, everyone)
        if not len(left):
            break
        _leave_dead_ends(best, left, most, seed)
    # 4. Nothing less even than the usual deal is returned.
    worse = np.nonzero(best.rank_load.max(1) > bound)[0]
    even_out(best, worse, most, rest=0.0)
    for seed in range(_LAST_TRIES):
        worse = worse[best.rank_load[worse].max(1) > bound[worse]]
        if not len(worse):
            break
        _leave_dead_ends(best, worse, most, seed, rest=0.0)
    worse = worse[best.rank_load[worse].max(1) > bound[worse]]
    _replace(best, _some(usual, worse), worse)
    return best.experts


def _leave_dead_ends(deal: Deal, layers: np.ndarray, most: int, seed: int, rest: float = _EVEN) -> None:
    """Tries other beginnings for some layers, and takes a result that is better and has no twins."""
    trial, mine = _some(deal, layers), np.arange(len(layers))
    shake(trial, mine, np.random.default_rng(seed))
    even_out(trial, mine, most, rest)
    _take_better(deal, trial, layers, twins(trial) == 0)


def _some(deal: Deal, chosen) -> Deal:
    return Deal(*(getattr(deal, field.name)[chosen].copy() for field in dataclasses.fields(Deal)))


def _replace(deal: Deal, other: Deal, layers: np.ndarray) -> None:
    for field in dataclasses.fields(Deal):
        getattr(deal, field.name)[layers] = getattr(other, field.name)


def _take_better(deal: Deal, other: Deal, layers: np.ndarray, allowed: np.ndarray) -> None:
    wins = allowed & (other.rank_load.max(1) < deal.rank_load[layers].max(1) * (1 - _GAIN))
    _replace(deal, _some(other, wins), layers[wins])


def improve_by_few(deal: Deal, max_moved: int) -> None:
    """Takes steps at the layer with the fullest rank, while one helps and at most ``max_moved`` slots have changed.

    All layers share the limit, since they are the nodes of one layer. Of the two kinds of step, the one that gains more
    per slot moved is taken.
    """
    before = deal.experts.copy()
    most = deal.experts.shape[1] * -(-deal.experts.shape[2] // deal.load.shape[1])
    while True:
        layer = int(deal.rank_load.max(1).argmax())
        largest = deal.rank_load[layer].max()
        best, gain_per_slot = None, 0.0
        exchanged, recounted = _some(deal, slice(None)), _some(deal, slice(None))
        exchange_slots(exchanged, np.array([layer]), 0.0, steps=1)
        recount(recounted, layer, most)
        for trial in (exchanged, recounted):
            moved = int((trial.experts != deal.experts).sum())
            if not moved:
                continue
            gain = (largest - trial.rank_load[layer].max()) / moved
            if (trial.experts != before).sum() <= max_moved and (best is None or gain > gain_per_slot):
                best, gain_per_slot = trial, gain
        if best is None:
            return
        _replace(deal, best, np.arange(len(deal.experts)))
