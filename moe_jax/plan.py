"""Plans: everything static about one MoE layer on one mesh, checked once and resolved once."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from moe_jax.config import OVERFLOWS, TRANSPORTS
from moe_jax.errors import MeshError, UnsupportedError, raise_all, suggest
from moe_jax.kernels import FLOAT_DTYPES, backend_names, resolve_backend
from moe_jax.kernels.table import KERNELS


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
    shape = _mesh_shape(mesh)
    ep_axis = tuple(name for name in ("node", "ep") if name in shape)
    ep_size = math.prod(shape[name] for name in ep_axis)
    platform = _platform(mesh)
    violations = [
        *_size_violations(tokens_per_rank, hidden, num_experts, top_k, num_shared_experts),
        *_choice_violations(dtype=(dtype, FLOAT_DTYPES), transport=(transport, TRANSPORTS), overflow=(overflow, OVERFLOWS)),
        *_backend_violations(backend),
        *_capacity_violations(capacity_factor),
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
    if not violations and num_experts % ep_size:
        violations.append(
            f"num_experts={num_experts} is not divisible by ep={ep_size}; "
            f"use {math.ceil(num_experts / ep_size) * ep_size} experts or another ep"
        )
    if not violations and top_k > num_experts:
        violations.append(f"top_k={top_k} exceeds num_experts={num_experts}")
    if not violations and shape["tp"] * ep_size * tokens_per_rank * top_k >= 2**31:
        violations.append(f"tokens_per_rank={tokens_per_rank}: ep * tp * T * K must stay below 2**31; use more devices")
    raise_all(violations, "make_plan")

    pair_capacity = _pair_capacity(tokens_per_rank * top_k, ep_size, capacity_factor)
    transport, reason = _choose_transport(transport, platform, ep_size, tokens_per_rank, top_k, pair_capacity, dtype)
    return Plan(
        ep_axis=ep_axis,
        tp_axis="tp",
        dp_axis=tuple(name for name in shape if name not in ("node", "ep", "tp")),
        ep_size=ep_size,
        tp_size=shape["tp"],
        tokens_per_rank=int(tokens_per_rank),
        hidden=int(hidden),
        num_experts=int(num_experts),
        top_k=int(top_k),
        dtype=str(jnp.dtype(dtype)),
        num_shared_experts=int(num_shared_experts),
        transport=transport,
        transport_reason=reason,
        overflow=overflow,
        pair_capacity=pair_capacity,
        backend=resolve_backend("grouped_matmul", backend, platform=platform).name,
        poison=bool(poison),
    )


def _mesh_shape(mesh) -> Mapping[str, int]:
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise MeshError(f"mesh={mesh!r} is not a jax.sharding.Mesh; build one with moe_jax.make_mesh(ep=..., tp=...)")
    missing = [name for name in ("ep", "tp") if name not in mesh.shape]
    if missing:
        raise MeshError(
            f"mesh has axes {tuple(mesh.shape)} and lacks {' and '.join(repr(m) for m in missing)}; "
            "an axis may have size 1: build the mesh with moe_jax.make_mesh(ep=..., tp=...)"
        )
    return dict(mesh.shape)


def _platform(mesh) -> str:
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


def _is_count(value) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__")


def _size_violations(tokens_per_rank, hidden, num_experts, top_k, num_shared_experts) -> list[str]:
    rules = {
        "tokens_per_rank": (tokens_per_rank, 0),
        "hidden": (hidden, 1),
        "num_experts": (num_experts, 1),
        "top_k": (top_k, 1),
        "num_shared_experts": (num_shared_experts, 0),
    }
    return [
        f"{name}={value!r} must be a whole number of at least {low}"
        for name, (value, low) in rules.items()
        if not _is_count(value) or value < low
    ]


def _choice_violations(**choices) -> list[str]:
    found = []
    for name, (value, known) in choices.items():
        try:
            word = str(jnp.dtype(value)) if name == "dtype" else value
        except TypeError:
            word = value
        if word not in known:
            found.append(f"{name}={value!r} is unknown; {suggest(word, known)}")
    return found


def _backend_violations(backend) -> list[str]:
    if backend != "auto" and backend not in backend_names():
        return [f"backend={backend!r} is unknown; {suggest(backend, ['auto', *backend_names()])}"]
    found = []
    for kernel in KERNELS:
        try:
            resolve_backend(kernel, backend)
        except UnsupportedError as error:
            found.append(str(error))
    return found


def _unavailable(**options) -> list[str]:
    """Options of the operator family that this version does not serve; anything but their default is refused."""
    return [
        f"{name}={value!r} is not available in this version; leave it at {default!r}"
        for name, (value, default) in options.items()
        if value != default
    ]


def _capacity_violations(capacity_factor) -> list[str]:
    if capacity_factor is None:
        return []
    if isinstance(capacity_factor, bool) or not isinstance(capacity_factor, (int, float)):
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
        capacity = math.ceil(capacity_factor * balanced)
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
