"""From the experts that the router chose to the instances that compute them, by a table that may change every step."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import _compat
from moe_jax.errors import (
    DtypeError,
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    check_choice,
    check_count,
    check_dtype,
    check_mask,
    check_rank,
    check_shape,
)

BALANCES = ("rank", "token")
_NO_INSTANCE = -2  # neither an instance nor the -1 of "no expert": dispatch counts it in stats.num_invalid


@_compat.vary_as_operands("rank")
def update_expert(
    expert_ids: jax.Array,
    table: jax.Array,
    *,
    rank: int | jax.Array,
    ep_size: int,
    balance: str = "rank",
    combine_weights: jax.Array | None = None,
    pruning_threshold: jax.Array | None = None,
    token_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Replaces every logical expert by one of its physical instances, and prunes pairs of little weight.

    Row e of the table is ``[n_e, instance_0, ..., instance_{n_e - 1}, padding]``. Of the n_e instances of its expert,
    token t on rank r takes number

    - ``r // ceil(ep_size / n_e)`` with ``balance="rank"``: all tokens of a rank go to the same instance. Where n_e does
      not divide ep_size the last instances may serve fewer ranks than the others, or none;
    - ``t mod n_e`` with ``balance="token"``: t is the token's row, so its k choices share one t.

    A pair stays active if ``w[t, k] >= threshold[k] * sum_j w[t, j]``, all in fp32, the sum in ascending order of j.
    Nothing guarantees that a token keeps an expert: a token whose weights all fall short loses them all.

    Purely local. The table, the thresholds and the masks are traced: changing them never recompiles. Integers and
    booleans only come out, so no gradient flows through here.

    Args:
      expert_ids: [T, K] i32, or i64 with 64-bit types enabled; logical ids, -1 = no expert. Not checked: an id outside
        -1 .. E-1, and one whose row has n_e outside 1 .. F-1, becomes -2, which ``dispatch`` counts as invalid.
      table: [E, F] i32 with F >= 2; E logical experts.
      rank: this rank's index along the expert-parallel axis, an int or a traced integer scalar, 0 <= rank < ep_size.
        Read with ``balance="rank"`` only.
      ep_size: the number of expert-parallel ranks. Read with ``balance="rank"`` only.
      balance: "rank" or "token".
      combine_weights: [T, K] f32, bf16 or f16, in any order; together with ``pruning_threshold``.
      pruning_threshold: [K] or [1, K] f32, share of the token's total weight that choice k must reach.
      token_mask: [T] bool, False = the token is inactive and loses all its pairs; only with pruning (without it,
        give the mask to ``dispatch``). Need not be a prefix.

    Returns:
      (ids, mask): ids like ``expert_ids``, -1 where that is -1; they replace ``expert_ids`` in ``dispatch``, where
      num_experts is then the number of instances. mask [T, K] bool is ``dispatch``'s token_mask; None without pruning.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError: an argument breaks a rule above.

    >>> import jax.numpy as jnp, moe_jax as moe
    >>> table = jnp.array([[1, 4, 0], [2, 0, 3]])  # expert 0 has one instance, expert 1 has two
    >>> moe.update_expert(jnp.array([[1, 0], [1, -1]]), table, rank=0, ep_size=2, balance="token")[0]
    Array([[ 0,  4],
           [ 3, -1]], dtype=int32)

    Source: moe_update_expert; where its document and the kernel differ, this is the kernel.
    """
    _check_ids(expert_ids)
    check_table(table)
    check_choice("balance", balance, BALANCES)
    if balance == "rank":
        _check_rank(rank, ep_size)
    _check_pruning(expert_ids, combine_weights, pruning_threshold, token_mask)
    with jax.named_scope("update_expert"):
        ids = instances_of(expert_ids, table, rank, ep_size, balance)
        if combine_weights is None:
            return ids, None
        return ids, _kept(combine_weights, pruning_threshold, token_mask)


def instances_of(
    expert_ids: jax.Array, table: jax.Array, rank: int | jax.Array, ep_size: int, balance: str
) -> jax.Array:
    """The ids of ``update_expert``, for checked arguments."""
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
    else:
        token = jnp.arange(expert_ids.shape[0], dtype=jnp.int32)
        place = token[:, None] % num_instances
    known &= (place >= 0) & (place < num_instances)  # false only for a traced rank outside 0 .. ep_size-1
    instance = table[expert, jnp.where(known, place + 1, 0)].astype(expert_ids.dtype)
    return jnp.where(known, instance, jnp.where(expert_ids == -1, -1, _NO_INSTANCE).astype(expert_ids.dtype))


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


def _check_rank(rank, ep_size):
    check_count("ep_size", ep_size)
    if isinstance(rank, (jax.Array, np.ndarray)):
        check_shape("rank", rank, (), "a scalar")
        check_dtype("rank", rank, (jnp.integer,))
        return
    check_count("rank", rank, low=0)
    if rank >= ep_size:
        raise InvalidArgumentError(f"rank={rank} must lie in [0, ep_size={ep_size}); ranks are counted from 0")


def _check_pruning(expert_ids, combine_weights, pruning_threshold, token_mask):
    given = {"combine_weights": combine_weights, "pruning_threshold": pruning_threshold}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 2 and token_mask is not None:
        raise InvalidArgumentError(
            "token_mask was given without pruning, where no mask comes out; pass it to dispatch, or pass "
            "combine_weights and pruning_threshold too"
        )
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
    if token_mask is not None:
        check_mask("token_mask", token_mask, expert_ids.shape[:1], "[T]")
