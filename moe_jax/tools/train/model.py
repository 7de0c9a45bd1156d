"""A byte-level decoder in flax nnx: an embedding, blocks of attention and Mixture-of-Experts, and a head.

`Transformer` is the module. `Decoder` takes it apart into a graph and a dict of arrays, so that the step, the optimizer
and checkpoints see plain parameters.

B sequences, S positions, H hidden size, V vocabulary, A heads of size D, L layers, E experts. Parameters are float32;
activations have `dtype`. The batch is spread over all axes of the mesh, so N = B * S tokens split evenly over devices.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import moe_jax as moe
from moe_jax.config import Config, ModelConfig
from moe_jax.interop.nnx import MoE
from moe_jax.parameters import NAMES_OF_EXPERTS
from moe_jax.tools.train.balance import Balance
from moe_jax.tools.train.layer_plan import make_layer_plan, training_sections

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelStats:
    """What the layers did in one forward pass.

    Attributes:
      load: [L, E'] i32, how many pairs (token, choice) each expert received; experts without weights come last.
      num_dropped: i32 scalar, pairs that were dropped, summed over the layers.
      num_rounds: i32 scalar, the most rounds that a layer took.
      balance, z: f32 scalars, the router's losses, summed over the layers.
      sequence_balance: the same for its balance loss of each sequence; None where that has no weight.
    """

    load: jax.Array
    num_dropped: jax.Array
    num_rounds: jax.Array
    balance: jax.Array
    z: jax.Array
    sequence_balance: jax.Array | None = None


class Attention(nnx.Module):
    """Causal self-attention with rotary positions, x [B, S, H] -> [B, S, H]."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        heads, scale = (config.heads, config.hidden // config.heads), config.hidden**-0.5
        linear = functools.partial(nnx.LinearGeneral, use_bias=False, dtype=dtype, rngs=rngs)
        self.qkv = linear(config.hidden, (3, *heads), kernel_init=normal(scale))
        out_scale = scale / (2 * config.layers) ** 0.5
        self.out = linear(heads, config.hidden, axis=(-2, -1), kernel_init=normal(out_scale))
        self.rope_theta = config.rope_theta

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.moveaxis(self.qkv(x), 2, 0)
        q, k = rotate(q, self.rope_theta), rotate(k, self.rope_theta)
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))


class Block(nnx.Module):
    """One layer: attention, then experts, each after a norm and beside a residual."""

    def __init__(self, config: Config, mesh: Mesh, plan: moe.Plan, *, rngs: nnx.Rngs) -> None:
        model, train = training_sections(config)
        dtype = jnp.dtype(train.dtype)
        self.attention_norm = nnx.RMSNorm(model.hidden, dtype=dtype, rngs=rngs)
        self.attention = Attention(model, dtype, rngs=rngs)
        self.moe_norm = nnx.RMSNorm(model.hidden, dtype=dtype, rngs=rngs)
        options = {**config.parameters, "weigh_inputs": config.moe.weigh_inputs}
        self.moe = MoE(mesh, plan, config.router, rngs=rngs, **options)
        self.balances_sequences = config.moe.sequence_balance_loss > 0
        self.mode = config.balance.mode if config.balance else "rank"  # read with a table only

    def __call__(self, x: jax.Array, balance: Balance | None, layer: int) -> tuple[jax.Array, moe.LayerStats]:
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x))
        with jax.named_scope("moe"):
            sequence_length = x.shape[1] if self.balances_sequences else None
            y, stats = self.moe(
                self.moe_norm(x),
                table=None if balance is None else balance.table[layer],
                balance=self.mode,
                shares=None if balance is None or self.mode != "load" else balance.shares[layer],
                sequence_length=sequence_length,
            )
            return x + y, stats


class Transformer(nnx.Module):
    """The model that the sections [model], [train], [moe] and [router] of `config` describe, on `mesh`.

    `plan` is that of each of its layers.
    """

    def __init__(self, config: Config, mesh: Mesh, plan: moe.Plan, *, rngs: nnx.Rngs) -> None:
        model, train = training_sections(config)
        self.dtype = jnp.dtype(train.dtype)
        self.over_batch = over_batch(mesh)
        scale = model.hidden**-0.5 if model.tied_head else 1.0
        self.embedding = nnx.Embed(model.vocab, model.hidden, dtype=self.dtype, embedding_init=normal(scale), rngs=rngs)
        # The blocks are kept by name and not in a list, because checkpoints turn numbers into names.
        self.blocks = nnx.Dict({str(i): Block(config, mesh, plan, rngs=rngs) for i in range(model.layers)})
        self.final_norm = nnx.RMSNorm(model.hidden, dtype=self.dtype, rngs=rngs)
        if not model.tied_head:
            # The head is so small at first that every byte is about as likely as any other.
            self.head = nnx.Param(normal(1 / model.hidden)(rngs.params(), (model.hidden, model.vocab)))

    def __call__(self, tokens: jax.Array, balance: Balance | None = None) -> tuple[jax.Array, ModelStats]:
        """tokens [B, S] i32 -> (logits of the next byte [B, S, V] f32, stats); balance as in `Decoder.logits`."""
        x = self.embedding(jax.lax.with_sharding_constraint(tokens, self.over_batch))
        stats = []
        for i in range(len(self.blocks)):
            x = jax.lax.with_sharding_constraint(x, self.over_batch)
            x, layer_stats = self.blocks[str(i)](x, balance, i)
            stats.append(layer_stats)
        x = self.final_norm(x)
        head = self.head[...] if hasattr(self, "head") else self.embedding.embedding[...].T
        logits = jnp.einsum("bsh,hv->bsv", x, head.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits, _gather_stats(stats)


@dataclass(frozen=True)
class Decoder:
    """The model on one mesh: `init` makes its parameters, `logits` runs it. Another mesh changes last bits at most.

    Attributes:
      config: the section [model].
      mesh: where the model lies.
      plan: the plan of each layer.
      make: makes the module with parameters that are drawn from its argument.
      graph: the module without its parameters.
      shardings: a tree like the parameters, which says how each lies on the mesh.
    """

    config: ModelConfig
    mesh: Mesh
    plan: moe.Plan
    make: Callable[[nnx.Rngs], Transformer]
    graph: nnx.GraphDef[Transformer]
    shardings: Params

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def over_batch(self) -> NamedSharding:
        """The sharding of an array whose first dimension is the batch, which is split over all axes of the mesh."""
        return over_batch(self.mesh)

    def init(self, key: jax.Array, slots: np.ndarray | None = None) -> Params:
        """Draws parameters from `key`. Dense ones are replicated; those of experts are sharded as the layer wants.

        `slots` [L, P] is the expert of each slot of each layer; None: slots are experts, in their order. JAX draws the
        first numbers of an array alike, however long it is, so that an expert has the same first values in any slot.
        """

        def draw(key):
            params = nnx.to_pure_dict(nnx.state(self.make(nnx.Rngs(params=key))))
            if slots is None:
                return params
            experts = jnp.asarray(slots)
            return change_experts(params, lambda leaf, layer: leaf[experts[layer]])

        return jax.jit(draw, out_shardings=self.shardings)(key)

    def logits(self, params: Params, tokens: jax.Array, balance: Balance | None = None) -> tuple[jax.Array, ModelStats]:
        """tokens [B, S] i32 -> (logits of the next byte [B, S, V] f32, stats).

        `balance` says where the experts lie; None if the configuration has no section [balance].
        """
        return nnx.merge(self.graph, params)(tokens, balance)


def build_decoder(config: Config, mesh: Mesh) -> Decoder:
    """The decoder that `config` describes on `mesh`, without parameters yet."""
    model, train = training_sections(config)
    tokens = config.tokens_per_device(mesh.size)
    plan = make_layer_plan(config, model, mesh, tokens_per_rank=tokens, dtype=train.dtype)

    def make(rngs: nnx.Rngs) -> Transformer:
        return Transformer(config, mesh, plan, rngs=rngs)

    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    shardings = nnx.to_pure_dict(nnx.get_named_sharding(state, mesh))
    return Decoder(model, mesh, plan, make, graph, shardings)


def change_experts(params: Params, change: Callable[[jax.Array, int], jax.Array]) -> Params:
    """Parameters or gradients, of which `change(leaf [P, ...], layer)` makes those of routed experts anew."""
    return change_layers(
        params,
        lambda leaves, layer: {
            name: change(leaf, layer) if name in NAMES_OF_EXPERTS else leaf for name, leaf in leaves.items()
        },
    )


def change_layers(params: Params, change: Callable[[Params, int], Params]) -> Params:
    """Parameters or gradients, of which `change(leaves by name, layer)` makes those of the MoE layers anew."""
    blocks = {name: {**block, "moe": change(block["moe"], int(name))} for name, block in params["blocks"].items()}
    return {**params, "blocks": blocks}


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first dimension is the batch, which is split over all axes of `mesh`."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: turns the pair (i, i + D/2) of x [B, S, A, D] at position s by the angle s * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency  # [S, D/2]
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _gather_stats(layers: list[moe.LayerStats]) -> ModelStats:
    """The stats of all layers as one ModelStats."""
    balances_sequences = "sequence_balance" in layers[0].losses
    return ModelStats(
        load=jnp.stack([stats.load for stats in layers]),
        num_dropped=_total([stats.num_dropped for stats in layers]),
        num_rounds=jnp.max(jnp.stack([stats.num_rounds for stats in layers])),
        balance=_total([stats.losses["balance"] for stats in layers]),
        z=_total([stats.losses["z"] for stats in layers]),
        sequence_balance=(
            _total([stats.losses["sequence_balance"] for stats in layers]) if balances_sequences else None
        ),
    )


def _total(values: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, values)
