"""Placements: which logical expert lies in which physical slot, as data."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from moe_jax.balance.shares import split_evenly
from moe_jax.errors import (
    DataError,
    DtypeError,
    InvalidArgumentError,
    ShapeError,
    check_array,
    check_count,
    check_type,
)

_FIELDS = ("physical_to_logical", "num_logical_experts", "num_ranks")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """Which logical expert each physical expert is a replica of, for one layer or for X layers.

    Physical expert p lives on rank ``p // S``, where S = P / num_ranks is the number of slots of a rank. All replicas
    of an expert carry equal shares of its load, unless ``shares`` says otherwise.

    Attributes:
      physical_to_logical: [P] or [X, P] i32 NumPy array; every logical expert occurs in every row.
      num_logical_experts: E.
      num_ranks: R; P is a multiple of it.

    >>> import numpy as np, moe_jax as moe
    >>> slots = np.array([0, 1, 2, 0], np.int32)
    >>> placement = moe.Placement(physical_to_logical=slots, num_logical_experts=3, num_ranks=2)
    >>> placement.replica_counts
    array([2, 1, 1], dtype=int32)
    >>> placement.logical_to_physical
    array([[ 0,  3],
           [ 1, -1],
           [ 2, -1]], dtype=int32)
    >>> placement.table()
    array([[ 2,  0,  3],
           [ 1,  1, -1],
           [ 1,  2, -1]], dtype=int32)
    """

    physical_to_logical: np.ndarray
    num_logical_experts: int = dataclasses.field(metadata={"static": True})
    num_ranks: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        experts = self.physical_to_logical
        if isinstance(experts, (list, tuple, type(None))):
            check_array("physical_to_logical", experts, "pass a numpy array")
        if not isinstance(experts, np.ndarray):
            return  # JAX puts tracers and specs where the leaves of its pytrees were.
        check_count("num_logical_experts", self.num_logical_experts)
        check_count("num_ranks", self.num_ranks)
        if experts.ndim not in (1, 2):
            raise ShapeError(f"physical_to_logical has shape {experts.shape}; expected [P] or [X, P]")
        if not np.issubdtype(experts.dtype, np.integer):
            raise DtypeError(f"physical_to_logical has dtype {experts.dtype}; expected int32")
        if experts.shape[-1] % self.num_ranks:
            raise InvalidArgumentError(
                f"physical_to_logical has {experts.shape[-1]} slots, not a multiple of num_ranks={self.num_ranks}; "
                "every rank holds equally many"
            )
        if experts.size and (experts.min() < 0 or experts.max() >= self.num_logical_experts):
            raise InvalidArgumentError(
                f"physical_to_logical has values from {experts.min()} to {experts.max()}; expected 0 to "
                f"{self.num_logical_experts - 1}, logical experts"
            )
        missing = np.argwhere(self._replicas() == 0)
        if len(missing):
            where = f" in layer {missing[0][0]}" if experts.ndim == 2 else ""
            raise InvalidArgumentError(
                f"physical_to_logical lacks expert {missing[0][-1]}{where}; every logical expert needs a slot"
            )

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Placement) and (
            (self.num_logical_experts, self.num_ranks) == (other.num_logical_experts, other.num_ranks)
            and np.array_equal(self.physical_to_logical, other.physical_to_logical)
        )

    __hash__ = None  # type: ignore[assignment]  # It holds an array.

    @property
    def num_physical_experts(self) -> int:
        """P, slots of all ranks together."""
        return self.physical_to_logical.shape[-1]

    @property
    def slots_per_rank(self) -> int:
        """S = P / R."""
        return self.num_physical_experts // self.num_ranks

    def _replicas(self) -> np.ndarray:
        experts = np.atleast_2d(self.physical_to_logical)
        shifted = experts + np.arange(len(experts))[:, None] * self.num_logical_experts
        counts = np.bincount(shifted.ravel(), minlength=len(experts) * self.num_logical_experts)
        return counts.reshape(*self.physical_to_logical.shape[:-1], self.num_logical_experts)

    @property
    def replica_counts(self) -> np.ndarray:
        """[E] or [X, E] i32, replicas of each logical expert."""
        return self._replicas().astype(np.int32)

    @property
    def logical_to_physical(self) -> np.ndarray:
        """[E, N] or [X, E, N] i32, the physical experts of each logical one, ascending; -1 fills up to N, the most."""
        return self._instances(int(self.replica_counts.max()))

    def _instances(self, most: int) -> np.ndarray:
        experts = np.atleast_2d(self.physical_to_logical)
        counts = np.atleast_2d(self.replica_counts)
        # 1. Slots sorted by expert, stably, so that the slots of an expert stand together and ascend.
        slots = np.argsort(experts, axis=1, kind="stable")
        owners = np.take_along_axis(experts, slots, 1)
        # 2. The number of each slot among those of its expert.
        first = np.cumsum(counts, axis=1) - counts
        number = np.arange(experts.shape[1]) - np.take_along_axis(first, owners, 1)
        # 3. Into a table of -1.
        table = np.full((len(experts), self.num_logical_experts, most), -1, np.int32)
        table[np.arange(len(experts))[:, None], owners, number] = slots
        return table.reshape(*self.physical_to_logical.shape[:-1], self.num_logical_experts, most)

    def table(self, max_replicas: int | None = None) -> np.ndarray:
        """The table that ``update_expert`` reads: rows ``[n_e, instance_0, ..., instance_{n_e - 1}, -1, ...]``.

        Args:
          max_replicas: F - 1, columns for instances. By default as many as any placement of these sizes needs that
            keeps replicas of an expert on different ranks, so that a later table has the same shape and nothing is
            compiled again.

        Returns:
          [E, F] i32, or [X, E, F].

        Raises:
          InvalidArgumentError: an expert has more than ``max_replicas`` replicas.
        """
        return np.concatenate([self.replica_counts[..., None], self._instances(self._columns(max_replicas))], axis=-1)

    def shares(self, load: np.ndarray, max_replicas: int | None = None) -> np.ndarray:
        """The shares of replicas that make the fullest rank as light as this placement allows, for ``balance="load"``.

        No shares make it lighter, so it is never heavier than with equal ones. Of the ways to get there it is one that
        begins with equal shares and passes load on only where a rank is too full. It takes milliseconds per layer, and
        no weight moves: shares may follow the load in every step, and a new placement is needed only where they no
        longer help, as ``expected_imbalance`` with these shares tells.

        Args:
          load: [E] or [X, E], as in ``expected_imbalance``.
          max_replicas: F - 1, as given to ``table``, whose columns these are.

        Returns:
          [E, F - 1] or [X, E, F - 1] f32; a row sums to 1. Equal shares for an expert without load, zeros behind the
          replicas.

        Raises:
          ShapeError, DtypeError, InvalidArgumentError: the load is not as above, or an expert has more than
            ``max_replicas`` replicas.

        >>> import numpy as np, moe_jax as moe
        >>> slots = np.array([0, 1, 0, 2], np.int32)  # expert 0 beside expert 1, and beside expert 2
        >>> placement = moe.Placement(physical_to_logical=slots, num_logical_experts=3, num_ranks=2)
        >>> placement.shares(np.array([4, 3, 1]))
        array([[0.25, 0.75],
               [1.  , 0.  ],
               [1.  , 0.  ]], dtype=float32)
        """
        load = load_of(load, self)
        num_experts, columns = self.num_logical_experts, self._columns(max_replicas)
        # 1. The load of every slot, layer by layer.
        rows = zip(load.reshape(-1, num_experts), np.atleast_2d(self.physical_to_logical), strict=True)
        split = np.stack([split_evenly(loads, experts, self.num_ranks) for loads, experts in rows])
        # 2. In the columns of the table, over the load of the expert.
        slots = self._instances(columns).reshape(len(split), -1)
        parts = np.take_along_axis(split, np.maximum(slots, 0), 1)
        parts = np.where(slots >= 0, parts, 0.0).reshape(*load.shape, columns)
        total = parts.sum(-1, keepdims=True)
        equal = (slots >= 0).reshape(parts.shape) / self.replica_counts[..., None]
        return np.where(total > 0, parts / np.where(total > 0, total, 1), equal).astype(np.float32)

    def _columns(self, max_replicas: int | None) -> int:
        """F - 1, the columns for replicas of ``table``."""
        needed = int(self.replica_counts.max())
        if max_replicas is None:
            spare = self.num_physical_experts - self.num_logical_experts
            max_replicas = max(needed, min(self.num_ranks, 1 + spare))
        check_count("max_replicas", max_replicas)
        if max_replicas < needed:
            raise InvalidArgumentError(
                f"max_replicas={max_replicas} is less than the {needed} replicas that an expert has; pass {needed}"
            )
        return max_replicas

    def to_json(self) -> str:
        """One line of JSON, which ``from_json`` reads."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return json.dumps(values | {"physical_to_logical": np.asarray(self.physical_to_logical).tolist()})

    @classmethod
    def from_json(cls, text: str) -> "Placement":
        """The placement that ``to_json`` wrote.

        Raises:
          DataError: the text is no JSON object with exactly these fields.
          InvalidArgumentError: the placement breaks a rule.
        """
        check_type("text", text, str, "pass what to_json returned")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as e:
            raise DataError(f"the placement is not JSON: {e}") from e
        if not isinstance(values, dict) or sorted(values) != sorted(_FIELDS):
            raise DataError(f"the placement must be a JSON object with {', '.join(_FIELDS)}; write it with to_json")
        try:
            experts = np.array(values["physical_to_logical"])
        except ValueError as e:
            raise DataError(f"physical_to_logical must be a list of equally long lists: {e}") from e
        if not np.issubdtype(experts.dtype, np.integer):
            raise DataError(f"physical_to_logical must hold whole numbers, not {experts.dtype}")
        sizes = {name: values[name] for name in _FIELDS[1:]}
        return cls(physical_to_logical=experts.astype(np.int32), **sizes)


def expected_imbalance(load: np.ndarray, placement: Placement, shares: np.ndarray | None = None) -> np.ndarray:
    """The largest load of a rank over the mean, if each replica carries its share of its expert's load.

    1 is even, and R, the number of ranks, the worst. It is 1 where there is no load at all.

    Args:
      load: [E] or [X, E], any real numbers >= 0, such as ``stats.load`` summed over steps; X as in the placement.
      placement: where the replicas lie.
      shares: [E, F - 1] or [X, E, F - 1], of the replicas in the order of ``placement.table()``, such as
        ``placement.shares(load)``; only their proportion counts. None: equal ones.

    Returns:
      f64, a scalar array, or [X].

    Raises:
      ShapeError, DtypeError, InvalidArgumentError: the load or the shares are not as above.

    >>> import numpy as np, moe_jax as moe
    >>> slots = np.array([0, 1, 2, 0], np.int32)
    >>> placement = moe.Placement(physical_to_logical=slots, num_logical_experts=3, num_ranks=2)
    >>> load = np.array([4, 3, 1])
    >>> moe.expected_imbalance(load, placement)
    array(1.25)
    >>> moe.expected_imbalance(load, placement, placement.shares(load))
    array(1.)
    """
    check_type("placement", placement, Placement, "make one with moe_jax.rebalance")
    load = load_of(load, placement)
    return np.asarray(over_mean(rank_loads(load, placement, shares)).max(-1))


def load_of(load: Any, placement: Placement) -> np.ndarray:
    """``load`` as f64, checked, for the experts and layers of a placement."""
    load = read_load(load)
    expected = (*placement.physical_to_logical.shape[:-1], placement.num_logical_experts)
    if load.shape != expected:
        raise ShapeError(f"load has shape {load.shape}; expected {expected}, as in the placement")
    return load


def rank_loads(load: np.ndarray, placement: Placement, shares: np.ndarray | None = None) -> np.ndarray:
    """[..., R] load of each rank, for load [..., E] with the placement's layers."""
    experts = np.asarray(placement.physical_to_logical)
    if shares is None:
        carried = np.take_along_axis(load / placement.replica_counts, experts, -1)
    else:
        carried = _carried(load, placement, shares)
    return carried.reshape(*load.shape[:-1], placement.num_ranks, -1).sum(-1)


def _carried(load: np.ndarray, placement: Placement, shares: np.ndarray) -> np.ndarray:
    """[..., P] load of each slot, with shares of the replicas."""
    check_array("shares", shares, "pass a numpy array, such as placement.shares(load)")
    needed = int(placement.replica_counts.max())
    if shares.shape[:-1] != load.shape or shares.shape[-1] < needed:
        raise ShapeError(
            f"shares has shape {shares.shape}; expected {(*load.shape, 'F - 1')} with F - 1 of at least {needed}, a "
            "share for each replica, as placement.shares(load) has"
        )
    # 1. In proportion; equal ones in a row of zeros.
    slots = placement._instances(shares.shape[-1])
    weights = np.where(slots >= 0, np.asarray(shares, np.float64), 0.0)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise InvalidArgumentError("shares has entries that are negative or not finite; shares are parts of a load")
    weights = np.where(weights.sum(-1, keepdims=True) > 0, weights, slots >= 0)
    parts = load[..., None] * weights / weights.sum(-1, keepdims=True)
    # 2. To the slots. What stands behind the replicas has a slot of its own at the end, which is cut off.
    carried = np.zeros((*load.shape[:-1], placement.num_physical_experts + 1))
    flat = (*load.shape[:-1], -1)
    np.put_along_axis(carried, slots.reshape(flat), parts.reshape(flat), -1)
    return carried[..., :-1]


def over_mean(loads: np.ndarray) -> np.ndarray:
    """[..., R] load of each rank over the mean of all; ones where there is no load at all."""
    total = loads.sum(-1, keepdims=True)
    return np.where(total > 0, loads * loads.shape[-1] / np.where(total > 0, total, 1), 1.0)


def read_load(load: Any) -> np.ndarray:
    """``load`` as f64, checked: [E] or [X, E], finite and not negative."""
    check_array("load", load, "pass a numpy array of loads, [E] or [X, E]")
    if load.ndim not in (1, 2) or not load.size:
        raise ShapeError(f"load has shape {load.shape}; expected [E] or [X, E] with at least one expert and layer")
    if not (np.issubdtype(load.dtype, np.integer) or jax.numpy.issubdtype(load.dtype, np.floating)):
        raise DtypeError(f"load has dtype {load.dtype}; expected integers or floats")
    load = np.asarray(load).astype(np.float64)
    wrong = np.argwhere(~(np.isfinite(load) & (load >= 0)))
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        raise InvalidArgumentError(f"load{list(place)} is {load[place]}; loads are finite and not negative")
    return load
