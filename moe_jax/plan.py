"""Plans: everything static about one MoE layer on one mesh, checked once and resolved once."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from moe_jax.config import OVERFLOWS, TRANSPORTS
from moe_jax.errors import UnsupportedError, choice_violations, count_violations, flag_violations, raise_all
from moe_jax.kernels import FLOAT_DTYPES, backend_names, resolve_backend
from moe_jax.kernels.table import KERNELS
from moe_jax.mesh import check_mesh


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One layer's static facts. Hashable; holds no array and no mesh. Build it with ``make_plan``."""

    ep_axis: tuple[str, ...]
    tp_axis: str
    dp_axis: tuple[str, ...]
    ep_size: int
    tp_size: int
    tokens_per_rank: int
    hidden: int
    num_experts: int
    top_k: int
    dtype: str
    num_shared_experts: int
    transport: str
    transport_reason: str
    overflow: str
    pair_capacity: int
    backend: str
    poison: bool

    @property
    def num_local_experts(self) -> int:
        """L, experts per expert-parallel rank."""
        return self.num_experts // self.ep_size

    @property
    def num_pairs(self) -> int:
        """T * K, the most copies that one device can send."""
        return self.tokens_per_rank * self.top_k

    @property
    def exchange_axes(self) -> tuple[str, ...]:
        """Axes over which rows move: expert parallel, then tensor parallel."""
        return (*self.ep_axis, self.tp_axis)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes over which tokens are spread: data parallel, then the exchange axes."""
        return (*self.dp_axis, *self.exchange_axes)

    @property
    def max_rounds(self) -> int:
        """Rounds that the worst skew needs: 1 where one window holds everything or overflow is dropped."""
        if self.overflow == "drop" or not self.num_pairs:
            return 1
        return math.ceil(self.num_pairs / self.pair_capacity)

    def num_rows(self, capacity: int) -> int:
        """M, rows that a device can receive when every pair of ranks moves at most ``capacity``."""
        return self.tp_size * self.ep_size * capacity

    def workspace(self) -> dict[str, int]:
        """Bytes per device of the buffers of one round of the layer, by purpose (forward pass)."""
        row = self.hidden * jnp.dtype(self.dtype).itemsize
        rows = self.num_rows(self.pair_capacity)
        slots = self.ep_size * self.pair_capacity
        tokens = self.tp_size * self.ep_size * self.tokens_per_rank
        if self.transport == "allgather":
            buffers = {"arrival": tokens * row, "return": tokens * self.hidden * 4}
            integers = 2 * tokens * self.top_k + rows
        else:
            sent = min(slots, self.num_pairs) if self.transport == "ragged" else slots
            arrival = self.tp_size * slots
            buffers = {"send": sent * row, "arrival": arrival * row, "return": self.num_pairs * row}
            integers = sent + 3 * self.num_pairs + arrival + rows
        counts = (self.tp_size + 1) * self.num_experts
        return {**buffers, "rows": rows * row, "integers": 4 * (integers + counts)}

    def describe(self) -> str:
        """The plan in words: sizes, choices with their reasons, and bytes per device."""
        balanced = self.num_pairs / self.ep_size
        slack = f", {self.pair_capacity / balanced:.2f} x the balanced load" if balanced else ""
        lines = [
            f"mesh       ep={self.ep_size} over {'*'.join(self.ep_axis)}, tp={self.tp_size} over {self.tp_axis}"
            + (f", replicated over {'*'.join(self.dp_axis)}" if self.dp_axis else ""),
            f"tokens     {self.tokens_per_rank} per device x {self.hidden} {self.dtype}, top {self.top_k} of "
            f"{self.num_experts} experts ({self.num_local_experts} per rank), shared experts: {self.num_shared_experts}",
            f"transport  {self.transport}: {self.transport_reason}",
            f"capacity   {self.pair_capacity} rows per pair of ranks and round{slack}; "
            f"{self.num_rows(self.pair_capacity)} rows per device",
            f"overflow   {self.overflow}"
            + (f", at most {self.max_rounds} rounds" if self.overflow == "dropless" else ", what does not fit is counted"),
            f"backend    {self.backend}",
            "workspace  " + ", ".join(f"{name} {size:,} B" for name, size in self.workspace().items()),
        ]
        return "\n".join(lines)


def make_plan(
    mesh: Mesh | AbstractMesh,
    *,
    tokens_per_rank: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    dtype: str = "bfloat16",
    num_shared_experts: int = 0,
    num_shared_ranks: int = 0,
    num_zero_experts: int = 0,
    num_copy_experts: int = 0,
    num_const_experts: int = 0,
    quant: str = "none",
    combine_quant: str = "none",
    transport: str = "auto",
    overflow: str = "dropless",
    capacity_factor: float | None = None,
    backend: str = "auto",
    product: str | None = None,
    poison: bool = False,
) -> Plan:
    """Checks everything about a layer on a mesh at once, resolves every default, and returns the static plan.

    Args:
      mesh: has axes "ep" and "tp", may have "node" (experts spread over ("node", "ep")); any other axis replicates
        the whole group. Only names, sizes and the platform are read.
      tokens_per_rank: T, tokens per device; may be 0. Fewer true tokens are given by a mask.
      hidden: H.
      num_experts: E physical routed experts, divisible by the expert-parallel size.
      top_k: K, 1 <= K <= E.
      dtype: "float32", "bfloat16" or "float16", of the rows.
      num_shared_experts: experts that every token goes to; computed beside the exchange, where the token is.
      num_shared_ranks, num_zero_experts, num_copy_experts, num_const_experts, quant, combine_quant, product: parts of
        the operator family that this version does not serve; only their defaults are legal.
      transport: "padded" (all_to_all of equal blocks), "ragged" (ragged_all_to_all), "allgather" (all tokens out,
        reduce-scatter back), or "auto": the one with the fewest bytes on the wire.
      overflow: "dropless": what does not fit into a round waits for the next; "drop": it is dropped and counted.
      capacity_factor: rows that a pair of ranks can move in a round, relative to T * K / ep; None: 1.25, and four
        standard deviations of a uniform router at least. Never more than T * K.
      backend: a registered back end, or "auto": the one of the mesh's platform.
      poison: fill every slot and row that nobody may read with NaN, to prove that nobody does. For tests.

    Raises:
      InvalidArgumentError: lists every rule that is broken.
      MeshError: the mesh has no "ep" or no "tp" axis, or is not a mesh.

    >>> make_plan(make_mesh(ep=4), tokens_per_rank=16, hidden=8, num_experts=8, top_k=2).pair_capacity
    20
    """
    check_mesh(mesh)
    shape = mesh.shape
    ep_axis = tuple(name for name in ("node", "ep") if name in shape)
    ep_size = math.prod(shape[name] for name in ep_axis)
    violations = [
        *_size_violations(tokens_per_rank, hidden, num_experts, top_k, num_shared_experts, ep_size, shape["tp"]),
        *_dtype_violations(dtype),
        *choice_violations("transport", transport, TRANSPORTS),
        *choice_violations("overflow", overflow, OVERFLOWS),
        *_backend_violations(backend),
        *_capacity_violations(capacity_factor),
        *flag_violations("poison", poison),
        *_unavailable(
            num_shared_ranks=(num_shared_ranks, 0),
            num_zero_experts=(num_zero_experts, 0),
            num_copy_experts=(num_copy_experts, 0),
            num_const_experts=(num_const_experts, 0),
            quant=(quant, "none"),
            combine_quant=(combine_quant, "none"),
            product=(product, None),
        ),
    ]
    raise_all(violations, "make_plan")

    tokens_per_rank, top_k, platform = int(tokens_per_rank), int(top_k), _platform(mesh)
    pair_capacity = _pair_capacity(tokens_per_rank * top_k, ep_size, capacity_factor)
    transport, reason = _choose_transport(transport, platform, ep_size, tokens_per_rank, top_k, pair_capacity, dtype)
    return Plan(
        ep_axis=ep_axis,
        tp_axis="tp",
        dp_axis=tuple(name for name in shape if name not in ("node", "ep", "tp")),
        ep_size=ep_size,
        tp_size=shape["tp"],
        tokens_per_rank=tokens_per_rank,
        hidden=int(hidden),
        num_experts=int(num_experts),
        top_k=top_k,
        dtype=str(jnp.dtype(dtype)),
        num_shared_experts=int(num_shared_experts),
        transport=transport,
        transport_reason=reason,
        overflow=overflow,
        pair_capacity=pair_capacity,
        backend=resolve_backend("grouped_matmul", backend, platform=platform).name,
        poison=bool(poison),
    )


def _platform(mesh) -> str:
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


def _size_violations(tokens_per_rank, hidden, num_experts, top_k, num_shared_experts, ep_size, tp_size) -> list[str]:
    found = [
        *count_violations("tokens_per_rank", tokens_per_rank, 0),
        *count_violations("hidden", hidden),
        *count_violations("num_experts", num_experts),
        *count_violations("top_k", top_k),
        *count_violations("num_shared_experts", num_shared_experts, 0),
    ]
    if found:  # the rules below compare whole numbers
        return found
    tokens_per_rank, num_experts, top_k = int(tokens_per_rank), int(num_experts), int(top_k)
    if num_experts % ep_size:
        fitting = (num_experts // ep_size + 1) * ep_size
        found.append(
            f"num_experts={num_experts} is not divisible by ep={ep_size}; use {fitting} experts or another ep"
        )
    if top_k > num_experts:
        found.append(f"top_k={top_k} exceeds num_experts={num_experts}; lower top_k")
    if num_experts >= 2**31:
        found.append(f"num_experts={num_experts} must stay below 2**31: ids are 32-bit integers")
    if tp_size * ep_size * tokens_per_rank * top_k >= 2**31:
        found.append(f"tokens_per_rank={tokens_per_rank}: ep * tp * T * K must stay below 2**31; use more devices")
    return found


def _dtype_violations(dtype) -> list[str]:
    try:
        word = str(jnp.dtype(dtype))
    except (TypeError, ValueError):  # no dtype at all
        word = ""
    return [] if word in FLOAT_DTYPES else choice_violations("dtype", dtype, FLOAT_DTYPES)


def _backend_violations(backend) -> list[str]:
    unknown = choice_violations("backend", backend, ["auto", *backend_names()])
    if unknown:
        return unknown
    found = []
    for kernel in KERNELS:
        try:
            resolve_backend(kernel, backend)
        except UnsupportedError as error:
            found.append(str(error))
    return found


def _unavailable(**options) -> list[str]:
    """Options of the operator family that this version does not serve; anything but their default is refused."""
    found = []
    for name, (value, default) in options.items():
        plain = value.item() if isinstance(value, np.generic) else value
        if type(plain) is not type(default) or plain != default:
            found.append(f"{name}={value!r} is not available in this version; leave it at {default!r}")
    return found


def _capacity_violations(capacity_factor) -> list[str]:
    if capacity_factor is None:
        return []
    if isinstance(capacity_factor, bool) or not isinstance(capacity_factor, numbers.Real):
        return [f"capacity_factor={capacity_factor!r} must be a number, or None for the plan's own choice"]
    if not 0 < capacity_factor < math.inf:
        return [f"capacity_factor={capacity_factor!r} must be positive and finite; 1.0 is a perfectly balanced load"]
    return []


def _pair_capacity(num_pairs: int, ep_size: int, capacity_factor: float | None) -> int:
    """Rows that one rank may send another in one round; at least 1 and at most T * K."""
    balanced = num_pairs / ep_size
    if capacity_factor is None:
        capacity = math.ceil(max(1.25 * balanced, balanced + 4 * math.sqrt(balanced)))
    else:
        capacity = math.ceil(float(min(capacity_factor, ep_size)) * balanced)  # at ep, all pairs fit
    return max(1, min(capacity, num_pairs))


def _choose_transport(transport, platform, ep_size, tokens, top_k, pair_capacity, dtype) -> tuple[str, str]:
    """The transport and why, by bytes that a device sends in a balanced forward pass."""
    if transport != "auto":
        return transport, "as asked"
    itemsize = jnp.dtype(dtype).itemsize
    wire = {
        "padded": 2 * (ep_size - 1) * pair_capacity * itemsize,
        "allgather": (ep_size - 1) * tokens * (itemsize + 4),
    }
    if platform == "tpu":  # the native instruction; slow inside a node on GPUs, emulated on CPUs
        wire["ragged"] = 2 * (ep_size - 1) * tokens * top_k / ep_size * itemsize
    best = min(wire, key=wire.get)
    words = ", ".join(f"{name} {size:,.0f}" for name, size in wire.items())
    return best, f"fewest bytes per hidden unit that a device sends in a balanced forward pass ({words})"
