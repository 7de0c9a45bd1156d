"""Routers: which experts each token goes to, with what weight, and how even the load is."""

import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax import _compat, comm
from moe_jax.config import RouterConfig
from moe_jax.derivatives import custom_gradient
from moe_jax.errors import (
    InvalidArgumentError,
    MissingArgumentError,
    check_count,
    check_dtype,
    check_mask,
    check_rank,
    check_shape,
    check_type,
)
from moe_jax.types import Routing

_FLOATS = ("float32", "bfloat16", "float16")
_LEAST_LOG = -1e30  # of a score: keeps -inf out of differences


def route(
    logits: jax.Array,
    router: RouterConfig,
    *,
    top_k: int,
    bias: jax.Array | None = None,
    token_mask: jax.Array | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> Routing:
    """Chooses ``top_k`` distinct experts for every token.

    ``scores = f(logits)`` with f one of softmax, sigmoid, sqrt(softplus). The choice is the top k of ``scores``
    (of ``logits`` with ``router.topk_first``), plus ``bias`` if the router has a selection bias, inside the best
    ``top_groups`` of ``num_groups`` expert groups; ties go to the lower id. The weights are the chosen scores without
    bias (with ``topk_first``: f over the chosen logits), divided by their sum if ``renormalize``, times ``scale``. The
    quotient is right for any finite logits, as it is taken between logarithms; where all are -inf it is 1 / top_k.
    All arithmetic is fp32. The choice has no gradient; the weights and losses have.

    Args:
      logits: [T, E] float.
      router: the static recipe.
      top_k: experts per token, 1 <= top_k <= E; inside the kept groups when there are groups.
      bias: [E] f32, added for the choice only; required if, and only if, ``router.selection_bias``.
      token_mask: [T] bool; tokens that are false get ids of -1 and weights of 0 and do not count.
      axis_name: mesh axes over which the tokens are spread; losses and load are then those of all tokens.

    Returns:
      Routing. ``losses["balance"] = E * sum_e f_e P_e`` (Switch Transformer, eq. 4, over top_k choices: f_e the share
      of choices that fell on e, P_e the mean normalised score; 1.0 when even), ``losses["z"] = mean(logsumexp^2)``
      (ST-MoE, eq. 5). ``load`` [E] i32 counts choices.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError: an argument breaks a rule above.
      MeshError: ``axis_name`` is not bound here.

    >>> route(jnp.array([[0.0, 2.0, 1.0]]), RouterConfig(), top_k=2).expert_ids
    Array([[1, 2]], dtype=int32)
    """
    _check_route(logits, router, top_k, bias, token_mask)
    axes = () if axis_name is None else _compat.bound_axes(axis_name)
    with jax.named_scope("route"):
        logits = logits.astype(jnp.float32)
        if token_mask is not None:  # padding may hold anything, and its gradient is zero
            logits = jnp.where(token_mask[:, None], logits, 0.0)
        scores = _scores(logits, router.score)
        selection = logits if router.topk_first else scores
        if bias is not None:
            selection = selection + bias.astype(jnp.float32)
        _, expert_ids = lax.top_k(_mask_groups(lax.stop_gradient(selection), router), top_k)
        if router.renormalize:
            weights = _shares(_take_columns(logits, expert_ids), router.score)
        elif router.topk_first:
            weights = _scores(_take_columns(logits, expert_ids), router.score)
        else:
            weights = _take_columns(scores, expert_ids)
        weights = weights * router.scale
        active = jnp.ones_like(logits[:, 0], dtype=bool) if token_mask is None else token_mask
        expert_ids = jnp.where(active[:, None], expert_ids, -1)
        weights = jnp.where(active[:, None], weights, 0.0)
        losses, load = _losses(logits, scores, expert_ids, active, router, axes)
    return Routing(expert_ids=expert_ids, combine_weights=weights, losses=losses, load=load)


def update_selection_bias(bias: jax.Array, load: jax.Array, *, rate: float) -> jax.Array:
    """One step of balancing without a loss: raises the bias of experts below the mean load, lowers it above.

    ``bias + rate * sign(mean(load) - load)`` (DeepSeek-V3, section 2.1.2).

    Args:
      bias: [E] f32.
      load: [E] integer or float, pairs per expert over all tokens of the step.
      rate: the step, in units of the score; not negative. A number, or a traced scalar.

    Returns:
      The new bias [E] f32, whatever the precision of ``rate``.

    Raises:
      ShapeError, DtypeError, InvalidArgumentError, MissingArgumentError: an argument breaks a rule above.
    """
    check_rank("bias", bias, 1, "[E]")
    check_dtype("bias", bias, ("float32",), "keep it in fp32: small steps vanish in narrower types")
    check_shape("load", load, bias.shape, "[E], as bias")
    check_dtype("load", load, (jnp.integer, jnp.floating))
    if isinstance(rate, (jax.Array, np.ndarray)):
        check_shape("rate", rate, (), "a scalar")
        check_dtype("rate", rate, (jnp.floating,))
    elif isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= rate < math.inf:
        raise InvalidArgumentError(f"rate={rate!r} must be a number, finite and not below zero")
    load = load.astype(jnp.float32)
    rate = rate if isinstance(rate, (jax.Array, np.ndarray)) else float(rate)
    return bias + jnp.asarray(rate, jnp.float32) * jnp.sign(jnp.mean(load) - load)


def count_ids(ids: jax.Array, num_ids: int) -> jax.Array:
    """How often each of 0..num_ids-1 stands in ``ids``; others do not count. i32 [num_ids], by one sort."""
    edges = _compat.searchsorted(jnp.sort(ids.ravel()), jnp.arange(num_ids + 1, dtype=ids.dtype), side="left")
    return jnp.diff(edges).astype(jnp.int32)


def _check_route(logits, router, top_k, bias, token_mask):
    check_rank("logits", logits, 2, "[T, E]")
    check_dtype("logits", logits, _FLOATS)
    check_type("router", router, RouterConfig, "build one with moe_jax.RouterConfig(...)")
    check_count("top_k", top_k)
    num_experts = logits.shape[1]
    if num_experts % router.num_groups:
        raise InvalidArgumentError(
            f"router.num_groups={router.num_groups} does not divide the {num_experts} experts of logits"
        )
    reachable = num_experts // router.num_groups * router.top_groups
    if top_k > reachable:
        raise InvalidArgumentError(f"top_k={top_k} exceeds {reachable}, the number of experts that a token can reach")
    if router.selection_bias and bias is None:
        raise MissingArgumentError("bias is missing: router.selection_bias is true; pass an fp32 array [E]")
    if bias is not None:
        if not router.selection_bias:
            raise InvalidArgumentError("bias was given but router.selection_bias is false; set it or leave bias out")
        check_shape("bias", bias, (num_experts,), "[E], one per expert")
        check_dtype("bias", bias, (jnp.floating,))
    if token_mask is not None:
        check_mask("token_mask", token_mask, logits.shape[:1], "[T]")


def _scores(logits: jax.Array, score: str) -> jax.Array:
    if score == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    if score == "sigmoid":
        return jax.nn.sigmoid(logits)
    softplus = jax.nn.softplus(logits)
    positive = softplus > jnp.finfo(softplus.dtype).tiny  # below about -87 it vanishes, and sqrt has no slope at 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, softplus, 1.0)), 0.0)


def _shares(logits: jax.Array, score: str) -> jax.Array:
    """Scores divided by their sum along the last axis, for scores that may vanish in fp32 or in their squares."""
    return jax.nn.softmax(jnp.maximum(_log_scores(logits, score), _LEAST_LOG), axis=-1)


def _log_scores(logits: jax.Array, score: str) -> jax.Array:
    """The logarithm of ``_scores``; of softmax without its constant."""
    if score == "softmax":
        return logits
    if score == "sigmoid":
        return jax.nn.log_sigmoid(logits)
    small = logits < -20.0  # then log(softplus(x)) = x - exp(x) / 2 up to exp(2x), and x itself in fp32
    return 0.5 * jnp.where(small, logits, jnp.log(jax.nn.softplus(jnp.where(small, 0.0, logits))))


def _mask_groups(selection: jax.Array, router: RouterConfig) -> jax.Array:
    """Sets experts outside the best ``top_groups`` groups to -inf."""
    if router.top_groups == router.num_groups:
        return selection
    grouped = selection.reshape(selection.shape[0], router.num_groups, -1)
    if router.resolved_group_score == "top2":
        group_score = jnp.sum(lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
    else:
        group_score = jnp.max(grouped, axis=-1)
    _, best = lax.top_k(group_score, router.top_groups)
    kept = jnp.any(best[:, :, None] == jnp.arange(router.num_groups), axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(selection.shape)


@custom_gradient
def _take_columns(table: jax.Array, columns: jax.Array) -> jax.Array:
    """table [T, E], columns [T, K] distinct in a row -> [T, K]; its adjoint compares instead of scattering."""
    return jnp.take_along_axis(table, columns, axis=1)


def _take_forward(table, columns):
    return _take_columns(table, columns), (table, columns)


def _take_backward(residuals, ct):
    # d_table[t, e] = ct[t, k] where columns[t, k] = e, else 0    # [T, E]
    table, columns = residuals
    all_columns = jnp.arange(table.shape[1], dtype=columns.dtype)
    total = jnp.zeros_like(table)
    for k in range(columns.shape[1]):
        total += jnp.where(columns[:, k, None] == all_columns, ct[:, k, None], 0.0)
    return total, None


_take_columns.defvjp(_take_forward, _take_backward)


def _losses(logits, scores, expert_ids, active, router, axes):
    """Losses and load over the active tokens of all ranks along ``axes``."""
    num_experts, top_k = logits.shape[1], expert_ids.shape[1]
    shares = scores if router.score == "softmax" else _shares(logits, router.score)
    load = count_ids(expert_ids, num_experts)
    num_active = jnp.sum(active, dtype=jnp.int32)
    share_sum = jnp.sum(jnp.where(active[:, None], shares, 0.0), axis=0)
    z_sum = jnp.sum(jnp.where(active, jnp.square(jax.nn.logsumexp(logits, axis=-1)), 0.0))
    if axes:
        load, num_active, share_sum, z_sum = comm.sum_over((load, num_active, share_sum, z_sum), axes)
    count = jnp.maximum(num_active, 1).astype(jnp.float32)
    fraction = load.astype(jnp.float32) / (count * top_k)
    balance = num_experts * jnp.sum(fraction * share_sum / count)
    return {"balance": balance, "z": z_sum / count}, load
