"""The whole MoE layer, token by token and free of any mesh, with its hand-derived gradient.

``params`` is a dict: ``router`` [H, E], ``w_up`` [E, H, F], ``w_down`` [E, F, H]; ``w_gate`` [E, H, F] for gated
activations; optional ``b_gate`` [E, F], ``b_up`` [E, F], ``b_down`` [E, H], ``router_bias`` [E] (added to the logits),
``selection_bias`` [E] (the router's bias), ``expert_scale`` [E] (a factor on the final weights of each expert) and a
shared expert ``shared_gate`` [H, S], ``shared_up`` [H, S], ``shared_down`` [S, H] that every active token visits with
weight 1, or sigmoid(x @ shared_router) where there is a ``shared_router`` [H, 1].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax import errors
from moe_jax.parameters import rows_of, weights_of
from moe_jax.reference import elementwise as ew
from moe_jax.reference import routing as routing_lib
from moe_jax.reference.experts import expert_ffn, expert_ffn_vjp
from moe_jax.reference.weightless import WeightlessExperts, weightless_value

Params = Mapping[str, np.ndarray]

# The parameters of constant experts come with the argument ``special``.
_KNOWN = {row.name: row for part in ("router", "experts", "shared") for row in rows_of(part)}
_SHARED = {row.role: row.name for row in rows_of("shared") if row.role}


def moe_layer(
    params: Params,
    x: np.ndarray,
    router: Any,
    *,
    top_k: int,
    activation: Any = "swiglu",
    shared_activation: Any = None,
    bias: np.ndarray | None = None,
    token_mask: np.ndarray | None = None,
    special: WeightlessExperts | None = None,
    routing: tuple[np.ndarray, np.ndarray] | None = None,
    router_x: np.ndarray | None = None,
    weigh_inputs: bool = False,
    sequence_length: int | None = None,
) -> tuple[np.ndarray, routing_lib.Routing]:
    """y_t = shared(x_t) + sum over k ascending of weight_tk * expert_{id_tk}(x_t).

    Inactive tokens are never read and give zero. Nothing is dropped.

    Args:
      params: see the module's text.
      x: [N, H].
      router: see ``route``.
      top_k: K.
      activation: see ``expert_ffn``.
      shared_activation: that of the shared expert; None: as ``activation``.
      bias: [E], the router's selection bias, where it is not in ``params["selection_bias"]``.
      token_mask: [N] bool, False = inactive; None = all active.
      special: the weightless experts (zero, copy and constant ones), each of which then has a logit of its own.
        ``moe_layer_vjp`` does not take them.
      routing: (expert_ids [N, K], combine_weights [N, K]), choices made outside, -1 for none; ``router`` is not read,
        and the router's parameters need not be there.
      router_x: [N, H_r], what the router sees; None: it sees x.
      weigh_inputs: whether a routed expert adds expert_{id_tk}(weight_tk * x_t) instead.
      sequence_length: see ``route``.

    Returns:
      y [N, H] f64 and the ``Routing``.

    Raises:
      InvalidArgumentError: ``params`` has an unknown key, or the selection bias is given twice.
      MissingArgumentError: ``params`` lacks a weight.
    """
    x = np.asarray(x, np.float64)
    # 1. The choices: those of the router, or those that were made outside.
    if routing is None:
        logits = _logits(params, x if router_x is None else np.asarray(router_x, np.float64), token_mask)
        bias = _selection_bias(params, bias)
        options = {"top_k": top_k, "bias": bias, "token_mask": token_mask, "sequence_length": sequence_length}
        chosen = routing_lib.route(logits, router, **options, expert_scale=params.get("expert_scale"))
    else:
        weightless = 0 if special is None else special.num_zero + special.num_copy + special.num_const
        num_ids = len(params["w_up"]) + weightless
        chosen = _given(params, routing, num_ids, token_mask)
    y = np.zeros(x.shape)
    # 2. Token by token: the shared expert, then every choice in ascending order.
    for t in routing_lib.active_tokens(len(x), token_mask):
        y[t] += _shared_value(params, x[t], activation if shared_activation is None else shared_activation)
        for e, weight in zip(chosen.expert_ids[t], chosen.combine_weights[t], strict=True):
            if e < 0:
                continue
            if special is not None and e >= special.num_experts:
                y[t] += weight * weightless_value(x[t], e, special)
            else:
                inner, outer = (weight, 1.0) if weigh_inputs else (1.0, weight)
                y[t] += outer * expert_ffn(inner * x[t : t + 1], _routed_weights(params, e), activation)[0]
    return y, chosen


def moe_layer_vjp(
    params: Params,
    x: np.ndarray,
    ct_y: np.ndarray,
    router: Any,
    *,
    top_k: int,
    activation: Any = "swiglu",
    shared_activation: Any = None,
    bias: np.ndarray | None = None,
    token_mask: np.ndarray | None = None,
    ct_balance: float = 0.0,
    ct_z: float = 0.0,
    ct_sequence_balance: float = 0.0,
    routing: tuple[np.ndarray, np.ndarray] | None = None,
    router_x: np.ndarray | None = None,
    weigh_inputs: bool = False,
    sequence_length: int | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The cotangents of ``params`` and ``x`` in ``moe_layer``, through the experts, the weights and both losses.

    Args:
      params, x, router, top_k, activation, shared_activation, bias, token_mask, routing, router_x, weigh_inputs,
        sequence_length: as given to ``moe_layer``.
      ct_y: [N, H], cotangent of y; inactive tokens are not read.
      ct_balance, ct_z, ct_sequence_balance: cotangents of ``losses["balance"]``, ``losses["z"]`` and
        ``losses["sequence_balance"]``.

    Returns:
      A dict of f64 cotangents with the keys and shapes of ``params`` (zero for ``selection_bias``, which only steers
      the choice), and ct_x [N, H] f64, zero for inactive tokens. With ``routing`` the router's parameters have
      zeros, and ``combine_weights_vjp`` has the cotangents of the weights. With ``router_x`` ct_x is [N, H + H_r], the
      cotangents of x and of ``router_x`` side by side.
    """
    x, ct_y = np.asarray(x, np.float64), np.asarray(ct_y, np.float64)
    seen = x if router_x is None else np.asarray(router_x, np.float64)
    shared_activation = activation if shared_activation is None else shared_activation
    # 1. The choices, and the cotangents of their weights, which lead to the logits.
    ct_logits, ct_scale = None, None
    if routing is None:
        logits = _logits(params, seen, token_mask)
        options = {"top_k": top_k, "bias": _selection_bias(params, bias), "token_mask": token_mask}
        options["expert_scale"] = params.get("expert_scale")
        chosen = routing_lib.route(logits, router, **options)
        ct_weights = combine_weights_vjp(params, x, ct_y, chosen, activation=activation, weigh_inputs=weigh_inputs)
        ct_logits = routing_lib.route_vjp(
            logits,
            router,
            ct_weights,
            **options,
            ct_balance=ct_balance,
            ct_z=ct_z,
            ct_sequence_balance=ct_sequence_balance,
            sequence_length=sequence_length,
        )
        ct_scale = routing_lib.expert_scale_vjp(logits, router, ct_weights, **options)
    else:
        chosen = _given(params, routing, len(params["w_up"]), token_mask)
    # 2. Token by token: through the router, the shared expert, and the experts that the token chose.
    ct_params = {name: np.zeros(np.shape(value)) for name, value in params.items()}
    if ct_scale is not None and "expert_scale" in params:
        ct_params["expert_scale"] = ct_scale
    ct_x, ct_seen = np.zeros(x.shape), np.zeros(seen.shape)
    for t in routing_lib.active_tokens(len(x), token_mask):
        if ct_logits is not None:
            ct_seen[t] = _router_vjp(params, seen[t], ct_logits[t], ct_params)
        ct_x[t] += _shared_vjp(params, x[t], ct_y[t], shared_activation, ct_params)
        for e, weight in zip(chosen.expert_ids[t], chosen.combine_weights[t], strict=True):
            if e < 0:
                continue
            if weigh_inputs:
                ct_x[t] += weight * _routed_vjp(params, weight * x[t], ct_y[t], e, activation, ct_params)
            else:
                ct_x[t] += _routed_vjp(params, x[t], weight * ct_y[t], e, activation, ct_params)
    return ct_params, ct_x + ct_seen if router_x is None else np.concatenate([ct_x, ct_seen], axis=1)


def combine_weights_vjp(
    params: Params,
    x: np.ndarray,
    ct_y: np.ndarray,
    routing: routing_lib.Routing,
    *,
    activation: Any = "swiglu",
    weigh_inputs: bool = False,
) -> np.ndarray:
    """The cotangent of ``combine_weights`` in ``moe_layer``: <ct_y_t, expert_{id_tk}(x_t)> for every pair.

    Where inputs are weighted it is <x_t, the cotangent of weight_tk * x_t>.

    Args:
      params, x, activation, weigh_inputs: as given to ``moe_layer``.
      ct_y: [N, H], cotangent of y.
      routing: what ``moe_layer`` returned.

    Returns:
      ct_weights [N, K] f64, zero where the id is -1.
    """
    x, ct_y = np.asarray(x, np.float64), np.asarray(ct_y, np.float64)
    ct_weights = np.zeros(routing.combine_weights.shape)
    for t, k in np.argwhere(routing.expert_ids >= 0):
        weights = _routed_weights(params, int(routing.expert_ids[t, k]))
        if weigh_inputs:
            row = routing.combine_weights[t, k] * x[t : t + 1]
            ct_weights[t, k] = x[t] @ expert_ffn_vjp(ct_y[t : t + 1], row, weights, activation)[0][0]
        else:
            ct_weights[t, k] = ct_y[t] @ expert_ffn(x[t : t + 1], weights, activation)[0]
    return ct_weights


def _logits(params: Params, x: np.ndarray, token_mask: np.ndarray | None) -> np.ndarray:
    """x [N, H_r] @ router + router_bias, [N, E]; zero for inactive tokens, whose x may hold anything."""
    _check_keys(params, routed=False)
    weight = np.asarray(params["router"], np.float64)
    logits = np.zeros((len(x), weight.shape[1]))
    for t in routing_lib.active_tokens(len(x), token_mask):
        logits[t] = x[t] @ weight
        if "router_bias" in params:
            logits[t] += np.asarray(params["router_bias"], np.float64)
    return logits


def _given(
    params: Params, routing: tuple[np.ndarray, np.ndarray], num_ids: int, token_mask: np.ndarray | None
) -> routing_lib.Routing:
    """The ``Routing`` of choices that were made outside. It has no losses."""
    _check_keys(params, routed=True)
    ids, weights = np.array(routing[0], np.int64), np.array(routing[1], np.float64)
    if token_mask is not None:
        ids[~np.asarray(token_mask, bool)] = -1
    weights[ids < 0] = 0.0
    load = np.bincount(ids[ids >= 0], minlength=num_ids)
    return routing_lib.Routing(expert_ids=ids, combine_weights=weights, losses={}, load=load)


def _check_keys(params: Params, *, routed: bool) -> None:
    """Raises unless ``params`` has the right keys; ``routed``: choices are made outside, so the router needs none."""
    if unknown := sorted(set(params) - set(_KNOWN)):
        raise errors.InvalidArgumentError(f"params has unknown keys {unknown}; known: {', '.join(sorted(_KNOWN))}")
    rows = [row for row in _KNOWN.values() if not row.needs and not row.optional]
    needed = {row.name for row in rows if not (routed and row.part == "router")}
    if missing := sorted(needed - set(params)):
        raise errors.MissingArgumentError(f"params lacks {missing}")


def _selection_bias(params: Params, bias: np.ndarray | None) -> np.ndarray | None:
    if bias is not None and "selection_bias" in params:
        raise errors.InvalidArgumentError("the selection bias came twice: as bias and in params; give one of them")
    return params.get("selection_bias", bias)


def _routed_weights(params: Params, expert: int) -> dict[str, np.ndarray]:
    return {role: value[expert] for role, value in weights_of("experts", params).items()}


def _shared_value(params: Params, x: np.ndarray, activation: Any) -> np.ndarray | float:
    """What the shared expert adds to a token x [H], 0 where there is none."""
    shared, gate = _shared_weights(params, x)
    return gate * expert_ffn(x[None], shared, activation)[0] if shared else 0.0


def _shared_weights(params: Params, x: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """The shared expert's weights, and the gate of a token x [H]."""
    shared = weights_of("shared", params)
    router = shared.pop("shared_router", None)
    return shared, 1.0 if router is None else float(ew.sigmoid(x @ np.asarray(router, np.float64)[:, 0]))


# The three functions below add to ``ct_params`` in place, and return what they contribute to the token's ct_x [H].


def _router_vjp(params: Params, x: np.ndarray, ct_logits: np.ndarray, ct_params: dict[str, np.ndarray]) -> np.ndarray:
    ct_params["router"] += np.outer(x, ct_logits)
    if "router_bias" in params:
        ct_params["router_bias"] += ct_logits
    return np.asarray(params["router"], np.float64) @ ct_logits


def _shared_vjp(
    params: Params, x: np.ndarray, ct: np.ndarray, activation: Any, ct_params: dict[str, np.ndarray]
) -> np.ndarray:
    shared, gate = _shared_weights(params, x)
    if not shared:
        return np.zeros(x.shape)
    ct_x, cts = expert_ffn_vjp(gate * ct[None], x[None], shared, activation)
    for name, value in cts.items():
        ct_params[_SHARED[name]] += value
    if "shared_router" not in params:
        return ct_x[0]
    ct_logit = (ct @ expert_ffn(x[None], shared, activation)[0]) * gate * (1.0 - gate)
    ct_params["shared_router"] += ct_logit * x[:, None]
    return ct_x[0] + ct_logit * np.asarray(params["shared_router"], np.float64)[:, 0]


def _routed_vjp(
    params: Params, x: np.ndarray, ct: np.ndarray, expert: int, activation: Any, ct_params: dict[str, np.ndarray]
) -> np.ndarray:
    ct_x, cts = expert_ffn_vjp(ct[None], x[None], _routed_weights(params, expert), activation)
    for name, value in cts.items():
        ct_params[name][expert] += value
    return ct_x[0]
