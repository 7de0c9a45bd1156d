"""One training step: the loss, its gradients, AdamW and the selection bias. The compiled step takes over its state.

With replicas of experts the step is that of the experts without them: what replicas learn is summed, and the norm of
the gradients, by which they are clipped, counts each expert once.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp

import moe_jax as moe
from moe_jax.config import Config, TrainConfig
from moe_jax.host.extras import require
from moe_jax.tools.train.balance import Balance, first_places
from moe_jax.tools.train.layer_plan import training_sections
from moe_jax.tools.train.model import Decoder, ModelStats, Params, change_experts, change_layers

BIAS = "selection_bias"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes, which is what a checkpoint holds.

    Attributes:
      params: the parameters in float32; the model casts them to its dtype.
      opt_state: the moments of optax, sharded like the parameters, and its counter of steps.
      balance: where experts lie and how loaded they are; None if the configuration has no section [balance].
    """

    params: Params
    opt_state: Any
    balance: Balance | None = None

    @property
    def parts(self) -> dict[str, Any]:
        """What there is of the state, by name, as checkpoints have it."""
        return {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """What one step measured before it changed the parameters. All arrays are replicated.

    Attributes:
      loss: f32 scalar, the cross-entropy in nats per byte.
      grad_norm: f32 scalar, the norm of the gradient before it is clipped.
      stats: what the layers did.
    """

    loss: jax.Array
    grad_norm: jax.Array
    stats: ModelStats


def make_optimizer(train: TrainConfig) -> Any:
    """AdamW, for clipped gradients. The rate rises linearly to `learning_rate`, then falls to `final_rate` times that.

    The rise takes `warmup_steps`; the fall is a cosine that ends at `steps`.
    """
    optax = require("optax", "training")
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=train.learning_rate / (train.warmup_steps + 1),
        peak_value=train.learning_rate,
        warmup_steps=train.warmup_steps,
        decay_steps=train.steps,
        end_value=train.learning_rate * train.final_rate,
    )
    return optax.chain(
        optax.identity(),  # where checkpoints have the empty state of clipping, which the step does itself
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=train.weight_decay, mask=_decays),
    )


def init_state(decoder: Decoder, optimizer: Any, seed: int, config: Config) -> TrainState:
    """The state before the first step. Moments are sharded like the parameters that they belong to.

    With the section [balance] experts begin with the same values as without it.
    """
    places = first_places(config, decoder.config.layers) if config.balance else None
    params = decoder.init(jax.random.key(seed), None if places is None else places.placement.physical_to_logical)
    place = lambda leaf: leaf if leaf.ndim else jax.device_put(leaf, decoder.replicated)  # noqa: E731
    opt_state = jax.tree.map(place, optimizer.init(params))
    return TrainState(params, opt_state, None if places is None else Balance.of(places, None, decoder.replicated))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of -log softmax(logits [B, S, V] f32) at targets [B, S] i32: a scalar, in nats per byte."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def compile_step(decoder: Decoder, optimizer: Any, config: Config, state: TrainState) -> Callable:
    """Compiles step(state, batch [B, S + 1] i32) -> (state, StepMetrics). The step reuses the old state's memory."""
    _, train = training_sections(config)

    def loss_fn(params, balance, batch):
        logits, stats = decoder.logits(params, batch[:, :-1], balance)
        loss = cross_entropy(logits, batch[:, 1:])
        total = loss + config.moe.balance_loss * stats.balance + config.moe.z_loss * stats.z
        if stats.sequence_balance is not None:
            total += config.moe.sequence_balance_loss * stats.sequence_balance
        return total, (loss, stats)

    def step(state, batch):
        balance = state.balance
        (_, (loss, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, balance, batch)
        with jax.named_scope("optimizer"):
            if balance is not None:
                grads = moe.sum_replica_gradients(grads, balance.placement(decoder.plan), decoder.mesh, decoder.plan)
            grad_norm = _norm(grads if balance is None else _of_first_replicas(grads, balance.table))
            grads = _clip(grads, grad_norm, train.grad_clip)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = jax.tree.map(jnp.add, state.params, updates)
            params = _update_biases(params, stats.load, config.moe.bias_update_rate)
            if config.balance is not None and balance is not None:
                load = stats.load[:, : balance.load.shape[1]]  # without that of experts that have no weights
                balance = replace(balance, load=_moved_average(balance.load, load, config.balance.decay))
        return TrainState(params, opt_state, balance), StepMetrics(loss, grad_norm, stats)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, decoder.replicated))
    return compiled.lower(state, _batch_like(decoder, config)).compile()


def compile_eval(decoder: Decoder, config: Config, state: TrainState) -> Callable:
    """Compiles eval(params, balance, batch [B, S + 1] i32) -> cross-entropy, a scalar f32 in nats per byte."""

    def evaluate(params, balance, batch):
        return cross_entropy(decoder.logits(params, batch[:, :-1], balance)[0], batch[:, 1:])

    compiled = jax.jit(evaluate, out_shardings=decoder.replicated)
    return compiled.lower(state.params, state.balance, _batch_like(decoder, config)).compile()


def _batch_like(decoder: Decoder, config: Config) -> jax.ShapeDtypeStruct:
    model, train = training_sections(config)
    shape = (train.batch_size, model.seq_len + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=decoder.over_batch)


def _norm(grads: Params) -> jax.Array:
    """The square root of the sum of all squares, a scalar."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))


def _clip(grads: Params, norm: jax.Array, limit: float) -> Params:
    """Gradients of the norm `norm`, scaled down to `limit` where that is more."""
    return jax.tree.map(lambda grad: jnp.where(norm < limit, grad, grad / norm * limit), grads)


def _of_first_replicas(grads: Params, table: jax.Array) -> Params:
    """The gradients with zeros in all slots but the first of each expert; table [L, E, F] as in `Balance`."""

    def only_first(leaf, layer):
        is_first = jnp.zeros(len(leaf), bool).at[table[layer, :, 1]].set(True)
        return jnp.where(is_first.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, 0)

    return change_experts(grads, only_first)


def _moved_average(average: jax.Array, load: jax.Array, decay: float) -> jax.Array:
    return decay * average + (1 - decay) * load.astype(jnp.float32)


def _update_biases(params: Params, load: jax.Array, rate: float) -> Params:
    """Moves the selection bias of each layer that has one against the layer's row of load [L, E], without gradients."""

    def update(leaves, layer):
        if BIAS not in leaves:
            return leaves
        return {**leaves, BIAS: moe.update_selection_bias(leaves[BIAS], load[layer], rate=rate)}

    return change_layers(params, update)


def _decays(params: Params) -> Any:
    """Which parameters decay: True for weight matrices; False for norms, biases and the embedding."""

    def decays(path, leaf):
        name = path[-1].key
        return leaf.ndim >= 2 and "bias" not in name and name != "embedding"

    return jax.tree_util.tree_map_with_path(decays, params)
