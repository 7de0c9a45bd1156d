"""From the experts that the router chose to the instances that compute them, by a table that may change every step."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import _compat, layout
from moe_jax.errors import (
    DtypeError,
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    UnexpectedArgumentError,
    check_choice,
    check_count,
    check_dtype,
    check_mask,
    check_rank,
    check_shape,
)

BALANCES = ("rank", "token", "load")
_SHARE_BITS = 15  # A share is read as a whole number of 2**-15ths, so that all that follows is exact.
_NO_INSTANCE = -2  # neither an instance nor the -1 of "no expert": dispatch counts it in stats.num_invalid


@_compat.vary_as_operands("rank")
def update_expert(
    expert_ids: jax.Array,
    table: jax.Array,
    *,
    rank: int | jax.Array,
    ep_size: int,
    balance: str = "rank",
    shares: jax.Array | None = None,
    combine_weights: jax.Array | None = None,
    pruning_threshold: jax.Array | None = None,
    token_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Replaces every logical expert by one of its physical instances, and prunes pairs of little weight.

    Row e of the table is ``[n_e, instance_0, ..., instance_{n_e - 1}, padding]``. Of the n_e instances of its expert,
    token t on rank r takes number

    - ``r // ceil(ep_size / n_e)`` with ``balance="rank"``: all tokens of a rank go to the same instance. Where n_e does
      not divide ep_size the last instances may serve fewer ranks than the others, or none;
    - ``t mod n_e`` with ``balance="token"``: t is the token's row, so its k choices share one t. Where the tokens that
      choose an expert have something to do with their rows, one instance can get all of them;
    - i with ``balance="load"``, where the pair is number j of the c pairs that this rank has for the expert, in the
      order of tokens and choices, and i is the instance in whose interval of the running sum of the shares
      ``(j + phase) / c`` lies. So each instance gets its share of the load that is there, rounded up or down, whatever
      the rows. Shares are equal, or those of ``shares``, which may be new in every step.

    The phase decides who gets the pairs that are left over. It is ``(m + 1/2) / ep_size`` with
    ``m = (rank + e) * g mod ep_size``. Over the ranks it takes each of these values once: where all ranks have equally
    many pairs of an expert, what an instance gets of all ranks together is within 1 of its share, too. Of all g that
    are coprime to ep_size it is the least one for which the quotients of Euclid's algorithm have the least sum, which
    bounds how unevenly phases can lie: those of neighbouring ranks, and of neighbouring experts, are far apart.

    A pair stays active if ``w[t, k] >= threshold[k] * sum_j w[t, j]``, all in fp32, the sum in ascending order of j.
    Nothing guarantees that a token keeps an expert: a token whose weights all fall short loses them all.

    Purely local. The table, the shares, the thresholds and the masks are traced: changing them never recompiles.
    Integers and booleans only come out, so no gradient flows through here.

    Args:
      expert_ids: [T, K] i32, or i64 with 64-bit types enabled; logical ids, -1 = no expert. Not checked: an id outside
        -1 .. E-1, and one whose row has n_e outside 1 .. F-1, becomes -2, which ``dispatch`` counts as invalid.
      table: [E, F] i32 with F >= 2; E logical experts.
      rank: this rank's index along the expert-parallel axis, an int or a traced integer scalar, 0 <= rank < ep_size.
        Not read with ``balance="token"``. With ``balance="load"`` and tokens of their own on every tp rank,
        ``ep_rank * tp_size + tp_rank`` spreads better, beside ``ep_size * tp_size``.
      ep_size: the number of expert-parallel ranks. Not read with ``balance="token"``.
      balance: "rank", "token" or "load". CANN has the first two.
      shares: [E, F - 1] f32, of the instances in the order of the table, for ``balance="load"`` only; None: equal ones.
        ``Placement.shares`` makes them. Only their proportion counts. Each is read as a multiple of 2^-15: what is
        below 0 or NaN as 0, and what is above 1 as 1. A row of zeros has equal shares. Only n_e of a row are read.
      combine_weights: [T, K] f32, bf16 or f16, in any order; together with ``pruning_threshold``.
      pruning_threshold: [K] or [1, K] f32, share of the token's total weight that choice k must reach.
      token_mask: [T] bool, False = the token is inactive and loses all its pairs. Need not be a prefix. Only with
        pruning (without it, give the mask to ``dispatch``), or with ``balance="load"``: pairs that are inactive or
        pruned do not count there, and go to instance 0.

    Returns:
      (ids, mask): ids like ``expert_ids``, -1 where that is -1; they replace ``expert_ids`` in ``dispatch``, where
      num_experts is then the number of instances. mask [T, K] bool is ``dispatch``'s token_mask; None without pruning.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError, UnexpectedArgumentError: an argument breaks a
        rule above.

    >>> import jax.numpy as jnp, moe_jax as moe
    >>> table = jnp.array([[1, 4, 0], [2, 0, 3]])  # expert 0 has one instance, expert 1 has two
    >>> moe.update_expert(jnp.array([[1, 0], [1, -1]]), table, rank=0, ep_size=2, balance="token")[0]
    Array([[ 0,  4],
           [ 3, -1]], dtype=int32)
    >>> shares = jnp.array([[1, 0], [0.25, 0.75]])
    >>> moe.update_expert(jnp.array([[1]] * 4), table, rank=0, ep_size=2, balance="load", shares=shares)[0].ravel()
    Array([0, 3, 3, 3], dtype=int32)

    Source: moe_update_expert; where its document and the kernel differ, this is the kernel. ``balance="load"`` is ours.
    """
    _check_ids(expert_ids)
    check_table(table)
    check_choice("balance", balance, BALANCES)
    if shares is not None:
        check_shares(shares, table, balance)
    if balance != "token":
        _check_rank(rank, ep_size)
    _check_pruning(expert_ids, combine_weights, pruning_threshold, token_mask, balance)
    with jax.named_scope("update_expert"):
        kept = None if combine_weights is None else _kept(combine_weights, pruning_threshold, token_mask)
        counted = kept if kept is not None or token_mask is None else token_mask[:, None]
        return instances_of(expert_ids, table, rank, ep_size, balance, shares, counted), kept


def instances_of(
    expert_ids: jax.Array,
    table: jax.Array,
    rank: int | jax.Array,
    ep_size: int,
    balance: str,
    shares: jax.Array | None = None,
    counted: jax.Array | None = None,
) -> jax.Array:
    """The ids of ``update_expert``, of arguments that have been checked.

    ``counted``: [T, K] or [T, 1] bool, the pairs that count with ``balance="load"``; None: all.
    """
    table = jnp.asarray(table)  # a NumPy array cannot be indexed by a traced one
    num_experts, width = table.shape
    known = (expert_ids >= 0) & (expert_ids < num_experts)
    expert = jnp.where(known, expert_ids, 0).astype(jnp.int32)
    num_instances = table[expert, 0]
    known &= (num_instances >= 1) & (num_instances < width)
    num_instances = jnp.maximum(num_instances, 1)  # rows that are not read must not divide by zero either
    if balance == "rank":
        ranks_per_instance = (ep_size - 1) // num_instances + 1  # ceil(ep_size / n), and no sum that could overflow
        place = jnp.asarray(rank, jnp.int32) // ranks_per_instance
    elif balance == "token":
        token = jnp.arange(expert_ids.shape[0], dtype=jnp.int32)
        place = token[:, None] % num_instances
    else:
        pairs = jnp.where(known if counted is None else known & counted, expert, -1)
        place = _places_by_load(pairs, _weights_of(shares, table), rank, ep_size)
    known &= (place >= 0) & (place < num_instances)  # false only for a traced rank outside 0 .. ep_size-1
    instance = table[expert, jnp.where(known, place + 1, 0)].astype(expert_ids.dtype)
    return jnp.where(known, instance, jnp.where(expert_ids == -1, -1, _NO_INSTANCE).astype(expert_ids.dtype))


def _weights_of(shares: jax.Array | None, table: jax.Array) -> jax.Array:
    """[E, F - 1] whole numbers in proportion to the shares, zeros behind the instances of an expert."""
    is_instance = jnp.arange(table.shape[1] - 1, dtype=jnp.int32) < table[:, :1]
    equal = is_instance.astype(jnp.int32)
    if shares is None:
        return equal
    given = jnp.where(is_instance & (shares > 0), jnp.minimum(shares, 1.0), 0.0)  # a NaN is not above 0
    weights = jnp.rint(given * 2**_SHARE_BITS).astype(jnp.int32)
    return jnp.where(jnp.any(weights > 0, axis=1, keepdims=True), weights, equal)


def _places_by_load(expert: jax.Array, weights: jax.Array, rank: int | jax.Array, size: int) -> jax.Array:
    """The place of each pair among the instances of its expert, with ``balance="load"``.

    Args:
      expert: [T, K] i32 in -1 .. E-1; -1 is a pair that does not count, and gets place 0.
      weights: [E, N] i32 >= 0 below 2**_SHARE_BITS + 1, of the instances; a row that pairs read is not all zeros.
      rank, size: of this rank, and how many there are.
    """
    num_experts, num_places = weights.shape
    # 1. A pair is number j of the c pairs of its expert, in the order of tokens and choices.
    pairs = layout.sort_pairs(expert.ravel(), num_experts)
    count = pairs.counts[:, None]
    of = jnp.maximum(expert, 0)
    number = pairs.position.reshape(expert.shape) - layout.exclusive_cumsum(pairs.counts)[of]
    # 2. The phase is p = (2 m + 1) / (2 R). In whole numbers a point (j + p) / c reaches place i, which begins at the
    #    share B / W, from j * W + floor(p * W) >= B * c on, that is from j = ceil((B * c - floor(p * W)) / W) on.
    step = min((g for g in range(1, size + 1) if math.gcd(g, size) == 1), key=lambda g: _sum_of_quotients(g, size))
    turn = (jnp.asarray(rank, jnp.int32) + jnp.arange(num_experts, dtype=jnp.int32)) % size * step % size
    whole = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True, dtype=jnp.int32), 1)
    bits = min((num_places << _SHARE_BITS).bit_length(), 29)  # an expert has fewer than 2**14 instances
    ahead, _ = _divided(2 * turn[:, None] + 1, whole, 2 * size, (2 * size).bit_length(), bits)
    begin = layout.exclusive_cumsum(weights)
    start, rest = _divided(begin, count, whole, bits, expert.size.bit_length())
    start += rest > ahead
    # 3. So many places but the first one have begun at j.
    place = jnp.sum(start[of][..., 1:] <= number[..., None], axis=-1, dtype=jnp.int32)
    return jnp.where(expert >= 0, place, 0)


def _sum_of_quotients(step: int, size: int) -> int:
    """How unevenly ``i * step mod size`` can lie on the circle, over any stretch of i: a bound of the discrepancy."""
    total = 0
    while step:
        total, step, size = total + size // step, size % step, step
    return total


def _sum_of_quotients(step: int, size: int) -> int:
    """How unevenly ``i * step mod size`` can lie on the circle, over any stretch of i: a bound of the discrepancy."""
    total = 0
    while step:
        total, step, size = total + size // step, size % step, step
    return total


def _divided(
    part: jax.Array, count: jax.Array, whole: jax.Array | int, whole_bits: int, count_bits: int
) -> tuple[jax.Array, jax.Array]:
    """``part * count`` by ``whole``, the quotient and the rest, where the product itself may need more than 31 bits.

    The quotient comes digit by digit. All are integers >= 0, part <= whole < 2**whole_bits, count < 2**count_bits.
    """
    digit = 30 - whole_bits  # bits; then rest * 2**digit + part * digit stays below 2**31
    quotient = rest = jnp.zeros((), jnp.int32)
    for low in reversed(range(0, count_bits, digit)):
        value = (rest << digit) + part * ((count >> low) & (2**digit - 1))
        quotient, rest = (quotient << digit) + value // whole, value % whole
    return quotient, rest


def _kept(combine_weights, pruning_threshold, token_mask):
    weights = combine_weights.astype(jnp.float32)
    total = weights[:, 0]
    for k in range(1, weights.shape[1]):  # spelled out: the order of the sum decides ties
        total = total + weights[:, k]
    kept = weights >= pruning_threshold.reshape(1, -1) * total[:, None]
    return kept if token_mask is None else kept & token_mask[:, None]


def _check_ids(expert_ids):
    check_rank("expert_ids", expert_ids, 2, "[T, K]")
    check_dtype("expert_ids", expert_ids, ("int32", "int64"), "cast it with .astype(jnp.int32)")
    if jax.dtypes.canonicalize_dtype(expert_ids.dtype) != expert_ids.dtype:
        raise DtypeError(
            "expert_ids has dtype int64, but 64-bit types are off and JAX would cut it to int32; cast it with "
            '.astype("int32"), or enable them with jax.config.update("jax_enable_x64", True)'
        )
    if expert_ids.shape[1] < 1:
        raise ShapeError(f"expert_ids has shape {expert_ids.shape}; expected [T, K] with K of at least 1")


def check_table(table: jax.Array) -> None:
    """Raises unless ``table`` can be one of instances: [E, F] i32 with at least an expert and an instance."""
    check_rank("table", table, 2, "[E, F]")
    check_dtype("table", table, ("int32",), "cast it with .astype(jnp.int32)")
    if table.shape[0] < 1 or table.shape[1] < 2:
        raise ShapeError(
            f"table has shape {table.shape}; expected [E, F] with at least one expert and two columns: the number of "
            "instances, then the instances"
        )


def check_shares(shares: jax.Array, table: jax.Array | None, balance: str) -> None:
    """Raises unless ``shares`` can be those of the instances in ``table``, and are read."""
    if table is None or balance != "load":
        raise UnexpectedArgumentError(
            f"shares was given with balance={balance!r} and {'no' if table is None else 'a'} table; only "
            'balance="load" reads shares, of the instances in a table: pass both, or leave shares out'
        )
    check_shape(
        "shares", shares, (table.shape[0], table.shape[1] - 1), "[E, F - 1], a share for each instance in table"
    )
    check_dtype("shares", shares, ("float32",), "cast it with .astype(jnp.float32)")


def _check_rank(rank, ep_size):
    check_count("ep_size", ep_size)
    if isinstance(rank, (jax.Array, np.ndarray)):
        check_shape("rank", rank, (), "a scalar")
        check_dtype("rank", rank, (jnp.integer,))
        return
    check_count("rank", rank, low=0)
    if rank >= ep_size:
        raise InvalidArgumentError(f"rank={rank} must lie in [0, ep_size={ep_size}); ranks are counted from 0")


def _check_pruning(expert_ids, combine_weights, pruning_threshold, token_mask, balance):
    given = {"combine_weights": combine_weights, "pruning_threshold": pruning_threshold}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 2 and token_mask is not None and balance != "load":
        raise InvalidArgumentError(
            "token_mask was given without pruning, where no mask comes out; pass it to dispatch, or pass "
            "combine_weights and pruning_threshold too"
        )
    if token_mask is not None:
        check_mask("token_mask", token_mask, expert_ids.shape[:1], "[T]")
    if len(missing) == 2:
        return
    if missing:
        (other,) = given.keys() - set(missing)
        raise MissingArgumentError(f"{missing[0]} is missing: pruning needs it beside {other}; pass both or neither")
    check_shape("combine_weights", combine_weights, expert_ids.shape, "[T, K], as expert_ids")
    check_dtype("combine_weights", combine_weights, ("float32", "bfloat16", "float16"))
    top_k = expert_ids.shape[1]
    if getattr(pruning_threshold, "shape", None) != (1, top_k):
        check_shape("pruning_threshold", pruning_threshold, (top_k,), "[K] or [1, K], one share per choice")
    check_dtype("pruning_threshold", pruning_threshold, ("float32",))
