"""The plan of one layer of a decoder, and the sections of a configuration that describe one, without flax."""

from jax.sharding import AbstractMesh, Mesh

import moe_jax as moe
from moe_jax.config import Config, ModelConfig, TrainConfig
from moe_jax.errors import ConfigError
from moe_jax.hardware import Machine


def training_sections(config: Config) -> tuple[ModelConfig, TrainConfig]:
    """The [model] and [train] sections, without which nothing can be trained.

    Raises:
      ConfigError: `config` has no [train] section. (A `Config` with [train] has [model] too.)
    """
    if config.model is None or config.train is None:
        raise ConfigError("the configuration has no [train] section; it describes a shape: use the plan command")
    return config.model, config.train


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

    It counts replicas as experts. The recipes of the wire and the machine are as for `make_plan`.
    """
    return moe.make_plan(
        mesh,
        tokens_per_rank=tokens_per_rank,
        hidden=model.hidden,
        num_experts=config.num_slots,
        top_k=config.moe.top_k,
        dtype=dtype,
        num_shared_experts=config.moe.num_shared_experts,
        num_zero_experts=config.moe.num_zero_experts,
        num_copy_experts=config.moe.num_copy_experts,
        transport=config.moe.transport,
        overflow=config.moe.overflow,
        capacity_factor=config.moe.capacity_factor,
        backend=config.moe.backend,
        quant=quant,
        combine_quant=combine_quant,
        backward_quant=backward_quant,
        hardware=hardware,
    )
