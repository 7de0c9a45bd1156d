"""A byte-level decoder: an embedding, blocks of attention and Mixture-of-Experts, and a head.

Parameters are a dict of arrays, and the model is functions of them.

B sequences, S positions, H hidden size, V vocabulary, A heads of size D, L layers, E experts. Parameters are float32;
activations have `dtype`. The batch is spread over all axes of the mesh, so N = B * S tokens split evenly over devices.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

import moe_jax as moe
from moe_jax.config import Config, ModelConfig, TrainConfig
from moe_jax.errors import ConfigError
from moe_jax.hardware import Machine

Params = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelStats:
    """What the layers did in one forward pass."""

    load: jax.Array  # [L, E] i32, how many pairs (token, choice) each expert received
    num_dropped: jax.Array  # scalar i32, summed over layers
    num_rounds: jax.Array  # scalar i32, the largest over layers
    balance: jax.Array  # scalar f32, summed over layers
    z: jax.Array  # scalar f32, summed over layers


@dataclass(frozen=True)
class Decoder:
    """The model on one mesh: `init` makes its parameters, `logits` runs it. Another mesh changes last bits at most."""

    config: ModelConfig
    dtype: jnp.dtype
    mesh: Mesh
    moe_init: Callable[[jax.Array], Params]
    moe_apply: Callable[[Params, jax.Array], tuple[jax.Array, moe.LayerStats]]

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def over_batch(self) -> NamedSharding:
        """The sharding of an array whose first dimension is the batch, which is split over all axes of the mesh."""
        return NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))

    def init(self, key: jax.Array) -> Params:
        """Draws parameters from `key`. Dense ones are replicated; those of experts are sharded as the layer wants."""
        dense_key, *layer_keys = jax.random.split(key, 1 + self.config.layers)
        params = jax.jit(lambda k: _init_dense(k, self.config), out_shardings=self.replicated)(dense_key)
        for block, layer_key in zip(params["blocks"], layer_keys, strict=True):
            block["moe"] = self.moe_init(layer_key)
        return params

    def logits(self, params: Params, tokens: jax.Array) -> tuple[jax.Array, ModelStats]:
        """tokens [B, S] i32 -> (logits of the next byte [B, S, V] f32, stats)."""
        tokens = jax.lax.with_sharding_constraint(tokens, self.over_batch)
        x = params["embedding"][tokens].astype(self.dtype)
        stats = []
        for block in params["blocks"]:
            x = jax.lax.with_sharding_constraint(x, self.over_batch)
            with jax.named_scope("attention"):
                x = x + attention(block, rms_norm(x, block["attention_norm"]), self.config)
            with jax.named_scope("moe"):
                rows = rms_norm(x, block["moe_norm"]).reshape(-1, self.config.hidden)
                y, layer_stats = self.moe_apply(block["moe"], rows)
                x = x + y.reshape(x.shape)
            stats.append(layer_stats)
        x = rms_norm(x, params["final_norm"])
        head = params["embedding"].T if self.config.tied_head else params["head"]
        logits = jnp.einsum("bsh,hv->bsv", x, head.astype(self.dtype), preferred_element_type=jnp.float32)
        return logits, _gather_stats(stats)


def training_sections(config: Config) -> tuple[ModelConfig, TrainConfig]:
    """The [model] and [train] sections, without which nothing can be trained.

    Raises:
      ConfigError: `config` has no [train] section. (A `Config` with [train] has [model] too.)
    """
    if config.model is None or config.train is None:
        raise ConfigError("the configuration has no [train] section; it describes a shape: use the plan command")
    return config.model, config.train


def build_decoder(config: Config, mesh: Mesh) -> Decoder:
    """The decoder that `config` describes in its sections [model], [train], [moe] and [router], on `mesh`."""
    model, train = training_sections(config)
    tokens_per_rank = train.batch_size * model.seq_len // mesh.size
    plan = make_layer_plan(config, model, mesh, tokens_per_rank=tokens_per_rank, dtype=train.dtype)
    options = {**config.moe.parameters, "weigh_inputs": config.moe.weigh_inputs}
    init, apply = moe.moe_on_mesh(mesh, plan, config.router, **options)
    return Decoder(model, jnp.dtype(train.dtype), mesh, init, apply)


def make_layer_plan(
    config: Config,
    model: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    tokens_per_rank: int,
    dtype: str,
    quant: str = "none",
    combine_quant: str = "none",
    backward_quant: str = "none",
    hardware: Machine | None = None,
) -> moe.Plan:
    """The plan of one layer of `config`, in the decoder `model`, with `tokens_per_rank` tokens on every device.

    The recipes of the wire and the machine are as for `make_plan`.
    """
    return moe.make_plan(
        mesh,
        tokens_per_rank=tokens_per_rank,
        hidden=model.hidden,
        num_experts=config.moe.num_experts,
        top_k=config.moe.top_k,
        dtype=dtype,
        num_shared_experts=config.moe.num_shared_experts,
        transport=config.moe.transport,
        overflow=config.moe.overflow,
        capacity_factor=config.moe.capacity_factor,
        backend=config.moe.backend,
        quant=quant,
        combine_quant=combine_quant,
        backward_quant=backward_quant,
        hardware=hardware,
    )


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """x [..., H] / sqrt(mean(x^2) + 1e-6) * gain [H], computed in float32 and returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * scale * gain).astype(x.dtype)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: turns the pair (i, i + D/2) of x [B, S, A, D] at position s by the angle s * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency  # [S, D/2]
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(block: Params, x: jax.Array, config: ModelConfig) -> jax.Array:
    """Causal self-attention, x [B, S, H] -> [B, S, H]; w_qkv [H, 3, A, D], w_out [A, D, H]."""
    q, k, v = jnp.einsum("bsh,hcad->cbsad", x, block["w_qkv"].astype(x.dtype))
    q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return jnp.einsum("bsad,adh->bsh", y, block["w_out"].astype(x.dtype))


def _init_dense(key: jax.Array, config: ModelConfig) -> Params:
    """Draws all parameters but those of the experts, in float32."""
    embedding_key, head_key, *block_keys = jax.random.split(key, 2 + config.layers)
    shape = (config.vocab, config.hidden)
    params = {
        "embedding": _normal(embedding_key, shape, config.hidden**-0.5 if config.tied_head else 1.0),
        "blocks": [_init_block(block_key, config) for block_key in block_keys],
        "final_norm": jnp.ones(config.hidden, jnp.float32),
    }
    if not config.tied_head:
        # The head is so small at first that every byte is about as likely as any other.
        params["head"] = _normal(head_key, shape[::-1], 1 / config.hidden)
    return params


def _init_block(key: jax.Array, config: ModelConfig) -> Params:
    qkv_key, out_key = jax.random.split(key)
    head_size = config.hidden // config.heads
    narrow = config.hidden**-0.5
    return {
        "attention_norm": jnp.ones(config.hidden, jnp.float32),
        "moe_norm": jnp.ones(config.hidden, jnp.float32),
        "w_qkv": _normal(qkv_key, (config.hidden, 3, config.heads, head_size), narrow),
        "w_out": _normal(out_key, (config.heads, head_size, config.hidden), narrow / (2 * config.layers) ** 0.5),
    }


def _normal(key: jax.Array, shape: tuple[int, ...], scale: float) -> jax.Array:
    return scale * jax.random.normal(key, shape, jnp.float32)


def _gather_stats(layers: list[moe.LayerStats]) -> ModelStats:
    """Puts the stats of all layers together."""
    return ModelStats(
        load=jnp.stack([stats.load for stats in layers]),
        num_dropped=_total([stats.num_dropped for stats in layers]),
        num_rounds=jnp.max(jnp.stack([stats.num_rounds for stats in layers])),
        balance=_total([stats.losses["balance"] for stats in layers]),
        z=_total([stats.losses["z"] for stats in layers]),
    )


def _total(values: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, values)
