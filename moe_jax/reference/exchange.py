"""Dispatch, combine and the ragged all-to-all with every rank visible, pair by pair.

W = expert-parallel size, P = tensor-parallel size; an "all-ranks" array starts with [W, P]. Expert e lives on expert
rank e // L in local slot e % L, with L = E // W; its FFN axis is spread over that rank's P tensor peers.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from moe_jax import errors

PerRank = Sequence[np.ndarray] | np.ndarray  # W arrays, one of each rank, or all of them stacked
Ranked = list[list[np.ndarray]]  # [W][P] arrays, since the number of rows differs from device to device


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dispatched:
    """What every device holds after ``dispatch``.

    Attributes:
      rows: [W][P] of [n, H], the dtype of x; the P peers of one expert rank hold identical rows.
      origins: [W][P] of [n, 4] i64: (tp rank, source ep rank, token, k) of each row.
      group_sizes: [W, P, L] i64, rows per local expert.
    """

    rows: Ranked
    origins: Ranked
    group_sizes: np.ndarray


def dispatch(
    x: np.ndarray,
    expert_ids: np.ndarray,
    *,
    num_experts: int,
    token_mask: np.ndarray | None = None,
    num_shared_experts: int = 0,
    num_shared_ranks: int = 0,
) -> Dispatched:
    """Sends each token, once per pair, to each of its experts and to each shared expert that has ranks of its own.

    With S shared ranks for Ns shared experts, routed expert e lives on rank S + e // L, L = E // (W - S); and every
    active token of source rank w also goes, as k = K + s, to rank w % (S // Ns) + s * (S // Ns), slot 0, for each s. A
    token is active when its mask, or any of its pairs', is true.

    Rows stand by local expert, then tp rank, then source ep rank, then flat pair index token * K + k, all ascending.
    Values are copied, never rounded. Nothing is dropped but pairs that do not exist: id -1, or masked.

    Args:
      x: [W, P, T, H], any dtype.
      expert_ids: [W, P, T, K] int, -1 = the pair does not exist.
      num_experts: E, a multiple of W.
      token_mask: bool, [W, P, T] (whole tokens) or [W, P, T, K] (pairs); None = everything active.
      num_shared_experts, num_shared_ranks: Ns and S.

    Returns:
      A ``Dispatched``.

    Raises:
      InvalidArgumentError: W does not divide E, or an id lies outside [-1, E).
      ShapeError: shapes disagree.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> x = np.array([[[[10], [11]]], [[[20], [21]]]])  # W = 2, P = 1, T = 2, H = 1
    >>> d = reference.dispatch(x, np.array([[[[0, 1], [1, -1]]], [[[1, 0], [0, 1]]]]), num_experts=2)
    >>> [d.rows[w][0].ravel().tolist() for w in range(2)]
    [[10, 20, 21], [10, 11, 20, 21]]
    """
    x = np.asarray(x)
    num_ranks, num_peers = x.shape[:2]
    ids = _active_ids(x, expert_ids, num_experts, num_ranks - num_shared_ranks, token_mask)
    num_local = num_experts // (num_ranks - num_shared_ranks)
    slots = np.where(ids >= 0, num_shared_ranks * num_local + ids, -1)  # a rank's slots follow those of the rank before
    for s in range(num_shared_experts if num_shared_ranks else 0):
        copies = _shared_slots(x.shape[:3], s, num_shared_ranks // num_shared_experts, num_local, token_mask)
        slots = np.concatenate([slots, copies[..., None]], axis=-1)
    origins, group_sizes = [], np.zeros((num_ranks, num_peers, num_local), np.int64)
    for w in range(num_ranks):
        groups = [_pairs_of(slots, w * num_local + slot) for slot in range(num_local)]
        group_sizes[w] = [len(group) for group in groups]  # the same for every tp peer
        arrived = np.array([pair for group in groups for pair in group], np.int64).reshape(-1, 4)
        origins.append([arrived.copy() for _ in range(num_peers)])
    rows = [[x[o[:, 1], o[:, 0], o[:, 2]] for o in peers] for peers in origins]
    return Dispatched(rows=rows, origins=origins, group_sizes=group_sizes)


def dispatch_vjp(ct_rows: Ranked, dispatched: Dispatched, num_tokens: int) -> np.ndarray:
    """The cotangent of ``x`` in ``dispatch``: the sum over all rows of a token, those on every tp peer included.

    Args:
      ct_rows: [W][P] of [n, H]; rows past the true number are not read.
      dispatched: what ``dispatch`` returned.
      num_tokens: T.

    Returns:
      ct_x [W, P, T, H] f64.
    """
    num_ranks, num_peers, _ = dispatched.group_sizes.shape
    ct_x = np.zeros((num_ranks, num_peers, num_tokens, np.shape(ct_rows[0][0])[-1]))
    for w in range(num_ranks):
        for p in range(num_peers):
            for row, (tp, source, t, _k) in enumerate(dispatched.origins[w][p]):
                ct_x[source, tp, t] += np.asarray(ct_rows[w][p][row], np.float64)
    return ct_x


def combine(rows: Ranked, combine_weights: np.ndarray, dispatched: Dispatched) -> np.ndarray:
    """Brings every row back to its token: y_t = sum over k ascending of weight_tk * value_tk.

    The value of a pair is the sum of its rows over the tp peers, each of which holds a partial sum. Pairs that do not
    exist contribute nothing and their weights are not read; a token without pairs gives zero.

    Args:
      rows: [W][P] of [n, H], in the order of ``dispatched``; rows past the true number are not read.
      combine_weights: [W, P, T, K] float.
      dispatched: what ``dispatch`` returned.

    Returns:
      y [W, P, T, H] f64.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> d = reference.dispatch(np.ones((1, 1, 1, 1)), np.array([[[[1, 0]]]]), num_experts=2)
    >>> reference.combine([[np.array([[3.0], [5.0]])]], np.array([[[[10.0, 1.0]]]]), d).item()  # 10 * 5 + 1 * 3
    53.0
    """
    combine_weights = np.asarray(combine_weights, np.float64)
    num_ranks, num_peers, num_tokens, top_k = combine_weights.shape
    values = _pair_values(rows, dispatched)
    y = np.zeros((num_ranks, num_peers, num_tokens, np.shape(rows[0][0])[-1]))
    for w, p, t in np.ndindex(num_ranks, num_peers, num_tokens):
        for k in range(top_k):
            if (p, w, t, k) in values:
                y[w, p, t] += combine_weights[w, p, t, k] * values[p, w, t, k]
        k = top_k
        while (p, w, t, k) in values:  # shared experts, unweighted
            y[w, p, t] += values[p, w, t, k]
            k += 1
    return y


def combine_vjp(
    ct_y: np.ndarray, rows: Ranked, combine_weights: np.ndarray, dispatched: Dispatched
) -> tuple[Ranked, np.ndarray]:
    """The cotangents of ``rows`` and ``combine_weights`` in ``combine``.

    A value is a sum over tp peers, so the row of every peer receives the whole cotangent of the value.

    Args:
      ct_y: [W, P, T, H].
      rows, combine_weights, dispatched: as given to ``combine``.

    Returns:
      ct_rows ([W][P] of [n, H] f64, n the true number of rows) and ct_weights [W, P, T, K] f64, zero for pairs that do
      not exist.
    """
    ct_y, combine_weights = np.asarray(ct_y, np.float64), np.asarray(combine_weights, np.float64)
    ct_weights = np.zeros(combine_weights.shape)
    top_k = combine_weights.shape[-1]
    for (p, w, t, k), value in _pair_values(rows, dispatched).items():
        if k < top_k:
            ct_weights[w, p, t, k] = ct_y[w, p, t] @ value
    ct_rows = []
    for peers in dispatched.origins:
        ct_rows.append([np.zeros((len(origins), ct_y.shape[-1])) for origins in peers])
        for origins, ct in zip(peers, ct_rows[-1], strict=True):
            for row, (p, w, t, k) in enumerate(origins):
                ct[row] = (combine_weights[w, p, t, k] if k < top_k else 1.0) * ct_y[w, p, t]
    return ct_rows, ct_weights


def ragged_all_to_all(
    operand: PerRank,
    output: PerRank,
    input_offsets: np.ndarray,
    send_sizes: np.ndarray,
    output_offsets: np.ndarray,
    recv_sizes: np.ndarray,
) -> list[np.ndarray]:
    """``jax.lax.ragged_all_to_all`` with every rank visible.

    Rank i sends ``operand[i][input_offsets[i, j]:][:send_sizes[i, j]]`` to rank j, where it lands at
    ``output[j][output_offsets[i, j]:]``: the sender knows the offset in the receiver's buffer. Rows that nobody writes
    keep ``output``. Input slices may overlap; output slices may not. The offsets of an empty slice are not read.

    Args:
      operand: W arrays [N, ...].
      output: W arrays [M, ...], whose dtype the results keep.
      input_offsets, send_sizes, output_offsets, recv_sizes: [W, W] int, row i being rank i's argument.

    Returns:
      W arrays [M, ...]; ``output`` itself is left as it was.

    Raises:
      InvalidArgumentError: recv_sizes[j, i] != send_sizes[i, j], or a slice leaves its buffer or meets another one.

    >>> import numpy as np
    >>> from moe_jax import reference
    >>> operand, output = [np.array([1, 2]), np.array([3])], [np.zeros(2, int), np.zeros(2, int)]
    >>> starts, sent = [[0, 0], [0, 0]], [[0, 2], [1, 0]]
    >>> lands, received = [[0, 0], [1, 0]], [[0, 1], [2, 0]]
    >>> out = reference.ragged_all_to_all(operand, output, starts, sent, lands, received)
    >>> [o.tolist() for o in out]
    [[0, 3], [1, 2]]
    """
    result = [np.array(buffer) for buffer in output]
    operand_lengths, output_lengths = [len(a) for a in operand], [len(a) for a in output]
    slices = _slices(operand_lengths, output_lengths, input_offsets, send_sizes, output_offsets, recv_sizes)
    for i, j, source, target in slices:
        result[j][target] = np.asarray(operand[i])[source]
    return result


def ragged_all_to_all_vjp(
    ct: PerRank,
    operand: PerRank,
    input_offsets: np.ndarray,
    send_sizes: np.ndarray,
    output_offsets: np.ndarray,
    recv_sizes: np.ndarray,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The cotangents of ``operand`` and ``output`` in ``ragged_all_to_all``.

    A row of ``operand`` gets the sum of the cotangents of all rows that it was sent to; a row of ``output`` that was
    overwritten gets zero.

    Args:
      ct: W arrays [M, ...].
      operand: W arrays [N, ...]; only their shapes are read.
      input_offsets, send_sizes, output_offsets, recv_sizes: as given to ``ragged_all_to_all``.

    Returns:
      ct_operand (W arrays [N, ...] f64) and ct_output (W arrays [M, ...] f64).
    """
    ct = [np.asarray(a, np.float64) for a in ct]
    ct_operand = [np.zeros(np.shape(a)) for a in operand]
    ct_output = [a.copy() for a in ct]
    operand_lengths, output_lengths = [len(a) for a in operand], [len(a) for a in ct]
    slices = _slices(operand_lengths, output_lengths, input_offsets, send_sizes, output_offsets, recv_sizes)
    for i, j, source, target in slices:
        ct_operand[i][source] += ct[j][target]
        ct_output[j][target] = 0.0
    return ct_operand, ct_output


def _shared_slots(
    lead: tuple[int, int, int], s: int, per_expert: int, num_local: int, token_mask: np.ndarray | None
) -> np.ndarray:
    """[W, P, T] the slot that each token's row for shared expert ``s`` goes to, -1 for tokens that are not active."""
    slots = np.full(lead, -1)
    for w, p, t in np.ndindex(lead):
        if token_mask is None or np.any(token_mask[w, p, t]):
            slots[w, p, t] = (w % per_expert + s * per_expert) * num_local
    return slots


def _active_ids(
    x: np.ndarray, expert_ids: np.ndarray, num_experts: int, num_holders: int, token_mask: np.ndarray | None
) -> np.ndarray:
    """``expert_ids`` checked, with -1 wherever ``token_mask`` is False."""
    errors.check_rank("x", x, 4, "[W, P, T, H]")
    expert_ids = np.asarray(expert_ids)
    errors.check_rank("expert_ids", expert_ids, 4, "[W, P, T, K]")
    errors.check_shape("expert_ids", expert_ids, x.shape[:3] + expert_ids.shape[3:], "[W, P, T, K]")
    if num_experts % num_holders:
        raise errors.InvalidArgumentError(
            f"num_experts={num_experts} must be a multiple of the {num_holders} ep ranks that hold routed experts"
        )
    if ((expert_ids < -1) | (expert_ids >= num_experts)).any():
        raise errors.InvalidArgumentError(f"expert_ids must lie in [-1, {num_experts}), with -1 = no expert")
    if token_mask is None:
        return expert_ids
    token_mask = np.asarray(token_mask, bool)
    layout = "[W, P, T]" if token_mask.ndim == 3 else "[W, P, T, K]"
    errors.check_shape("token_mask", token_mask, expert_ids.shape[: 3 if token_mask.ndim == 3 else 4], layout)
    if token_mask.ndim == 3:
        token_mask = token_mask[..., None]  # a token's flag covers all its pairs
    return np.where(token_mask, expert_ids, -1)


def _pairs_of(slots: np.ndarray, slot: int) -> list[tuple[int, int, int, int]]:
    """(tp rank, source ep rank, token, k) of every pair that goes to ``slot``, in the order of arrival."""
    num_ranks, num_peers = slots.shape[:2]
    pairs = []
    for p in range(num_peers):
        for w in range(num_ranks):
            pairs += [(p, w, t, k) for t, k in np.argwhere(slots[w, p] == slot)]  # argwhere walks t * K + k
    return pairs


def _pair_values(rows: Ranked, dispatched: Dispatched) -> dict[tuple[int, int, int, int], np.ndarray]:
    """The value [H] of every pair that exists, by origin: its partial sums added over the tp peers."""
    values = {}
    for peers, origins in zip(rows, dispatched.origins, strict=True):
        for row, origin in enumerate(origins[0]):  # the peers hold the same pairs in the same order
            values[tuple(origin.tolist())] = sum(np.asarray(partial[row], np.float64) for partial in peers)
    return values


def _slices(operand_lengths, output_lengths, input_offsets, send_sizes, output_offsets, recv_sizes):
    """(sender, receiver, slice of operand, slice of output) of every slice that is not empty, checked."""
    input_offsets, send_sizes, output_offsets = map(np.asarray, (input_offsets, send_sizes, output_offsets))
    if (np.asarray(recv_sizes) != send_sizes.T).any():
        raise errors.InvalidArgumentError("recv_sizes[j, i] must equal send_sizes[i, j] for all ranks i, j")
    written = [np.zeros(length, bool) for length in output_lengths]
    slices = []
    for i, j in zip(*np.nonzero(send_sizes), strict=True):
        start, landing, size = input_offsets[i, j], output_offsets[i, j], send_sizes[i, j]
        if min(start, landing, size) < 0 or start + size > operand_lengths[i] or landing + size > output_lengths[j]:
            raise errors.InvalidArgumentError(f"the slice from rank {i} to rank {j} leaves operand or output")
        source, target = slice(start, start + size), slice(landing, landing + size)
        if written[j][target].any():
            raise errors.InvalidArgumentError(f"the slice from rank {i} overwrites another one in output of rank {j}")
        written[j][target] = True
        slices.append((i, j, source, target))
    return slices
