"""How long a benchmark will take, from its flops, the pace of these devices, and what compiling usually takes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.layer.experts import is_gated
from moe_jax.tools.bench.baselines import CAPACITY_FACTOR
from moe_jax.tools.bench.programs import ALL_EXPERTS, LAYER, LIMIT, ONE_HOT, RAGGED_DOT
from moe_jax.tools.bench.timing import SLOW, SLOW_SECONDS, seconds_of
from moe_jax.tools.bench.workloads import Workload

_SIZE = 512  # rows and columns of the product by which the pace is measured
_COMPILE_SECONDS = {LIMIT: 1.0}  # seconds to compile a forward pass
_COMPILE_LAYER_SECONDS = 6.0  # the same for a layer of any kind
_LAYER_WORK = 1.5  # the time of a layer over that of the dense limit: a layer does more than products


def pace_of(mesh: Mesh) -> float:
    """How many flops all devices of the mesh together do in a second."""
    blocks = jnp.ones((mesh.size, _SIZE, _SIZE), jnp.float32)
    blocks = jax.device_put(blocks, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    product = jax.jit(lambda a: a @ a)
    seconds = [seconds_of(lambda: product(blocks).block_until_ready()) for _ in range(3)]
    return 2 * mesh.size * _SIZE**3 / min(seconds[1:])  # the first run was compiled


def estimate_seconds(
    workload: Workload, num_devices: int, contenders: Sequence[str], *, repeats: int, max_seconds: float, pace: float
) -> float:
    """Seconds to compile all programs of a workload, run them once for checks, and time those that are fast enough."""
    products = 3 if is_gated(workload.activation) else 2
    tokens, total = workload.tokens * num_devices, 0.0
    limit = 2.0 * products * tokens * workload.top_k * workload.hidden * workload.ffn / pace
    for passes, compiles in zip((1, 3), (1, 2), strict=True):
        for name in (LIMIT, LAYER, *contenders):
            total += compiles * _COMPILE_SECONDS.get(name, _COMPILE_LAYER_SECONDS)
            seconds = passes * limit * _work(name, workload)
            if name not in (LIMIT, LAYER) and seconds > max_seconds:
                continue
            slow = max(SLOW * passes * limit * _LAYER_WORK, SLOW_SECONDS)
            total += seconds * (1 if seconds > slow else 2 + 2 * repeats)
    return total


def _work(name: str, workload: Workload) -> float:
    """The flops of a contender, in units of those of the dense limit."""
    if name == LIMIT:
        return 1.0
    if name == ALL_EXPERTS:
        return workload.num_experts / workload.top_k
    if name == RAGGED_DOT:  # on a CPU XLA multiplies the rows of the worst case with every expert of a device
        return float(workload.num_experts)
    if name == ONE_HOT:  # the products of its experts, and those with [T, E, C] on the way out and back
        return CAPACITY_FACTOR * (1 + 2 * workload.tokens / (3 * workload.ffn))
    return _LAYER_WORK


def words(seconds: float) -> str:
    """An estimate in words: "about 40 s" or "about 3 min"."""
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"
