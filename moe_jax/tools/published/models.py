"""Training speeds of whole models that others published, beside a bound that no run can pass.

The bound counts products alone, each at the peak of its dtype. A plan says how many the MoE layers have, and the
publisher's count gives the rest of the model. Whatever else takes time (exchanges, memory, the softmax of attention,
recomputation) makes a run slower. No published run sends tokens to experts: they all shard weights, and gather them for
every layer.
"""

import dataclasses

from jax.sharding import AbstractMesh

import moe_jax as moe
from moe_jax.hardware import MACHINES, Machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The MoE layers of a model.

    Attributes:
      layers: how many of them the model has.
      hidden, ffn: the widths of a token and of an expert.
      experts, top_k: routed experts, and how many of them a token goes to.
      shared_experts: experts that every token goes to.
    """

    layers: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    shared_experts: int = 0


MODELS = {
    "DeepSeek-V3": Model(layers=58, hidden=7168, ffn=2048, experts=256, top_k=8, shared_experts=1),
    "Qwen3-235B-A22B": Model(layers=94, hidden=4096, ffn=1536, experts=128, top_k=8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """One published run.

    Attributes:
      model: a name in ``MODELS``.
      machine: a name in ``moe_jax.hardware.MACHINES``.
      chips: how many chips took part.
      tokens: tokens of a step, over all chips.
      precision: the precision of products, "bf16" or "fp8".
      flops_per_second: flops per second of one chip in products, without recomputed ones, as MaxText counts them.
      tokens_per_second: tokens per second of one chip.
      source: where it was published.
    """

    model: str
    machine: str
    chips: int
    tokens: int
    precision: str
    flops_per_second: float
    tokens_per_second: float
    source: str


_IRONWOOD = "AI-Hypercomputer/tpu-recipes, training/ironwood/README.md at 0797d9c"
_V5P = "AI-Hypercomputer/tpu-recipes, training/v5p/DeepSeek3-671B-MaxText/cluster_toolkit/README.md at 2a2f894"


def _ironwood(
    model: str, chips: int, sequences: int, precision: str, teraflops: float, tokens_per_second: float
) -> Trained:
    return Trained(
        model=model,
        machine="v7x",
        chips=chips,
        tokens=sequences * 4096,
        precision=precision,
        flops_per_second=teraflops * 1e12,
        tokens_per_second=tokens_per_second,
        source=_IRONWOOD,
    )


TRAINED: tuple[Trained, ...] = (
    _ironwood("DeepSeek-V3", 128, 2048, "bf16", 607.53, 2425.75),
    _ironwood("DeepSeek-V3", 128, 2048, "fp8", 730.60, 2917.15),
    _ironwood("DeepSeek-V3", 256, 4096, "bf16", 612.66, 2446.25),
    _ironwood("DeepSeek-V3", 256, 4096, "fp8", 743.46, 2968.49),
    _ironwood("Qwen3-235B-A22B", 256, 8192, "bf16", 629.79, 4245.89),
    _ironwood("Qwen3-235B-A22B", 256, 8192, "fp8", 702.60, 4736.72),
    Trained(
        model="DeepSeek-V3",
        machine="v5p",
        chips=512,
        tokens=25165824,
        precision="bf16",
        flops_per_second=152.415e12,
        tokens_per_second=542.108,
        source=_V5P,
    ),
)


def num_devices(run: Trained) -> int:
    """Devices of the run as JAX counts them; a chip may have two."""
    torus = MACHINES[run.machine].torus
    return run.chips * (torus.devices_per_chip if torus else 1)


def moe_layers(run: Trained) -> tuple[float, float]:
    """By a plan, what a token takes in all MoE layers, forward and backward: flops, and seconds at a device's peak."""
    model, devices, machine = MODELS[run.model], num_devices(run), _machine(run)
    tokens = run.tokens // devices
    plan = moe.make_plan(
        AbstractMesh((1, 1, devices), ("ep", "tp", "dp")),
        tokens_per_rank=tokens,
        hidden=model.hidden,
        num_experts=model.experts,
        top_k=model.top_k,
        num_shared_experts=model.shared_experts,
        hardware=machine,
    )
    cost = plan.cost(model.ffn)["forward + backward"]
    return model.layers * cost.flops / tokens, model.layers * cost.compute_seconds / tokens


def tokens_per_second_at_most(run: Trained) -> float:
    """The bound: tokens per second and chip if a step consisted of its products alone."""
    flops, seconds = moe_layers(run)
    other = run.flops_per_second / run.tokens_per_second - flops
    return num_devices(run) / run.chips / (seconds + other / _machine(run).flops16)


def _machine(run: Trained) -> Machine:
    """The machine of the run. Where the run multiplies 8-bit numbers, a plan's 16-bit products get their rate."""
    machine = MACHINES[run.machine]
    if run.precision == "bf16":
        return machine
    assert machine.flops8 is not None  # the run made such products
    return dataclasses.replace(machine, flops16=machine.flops8)
