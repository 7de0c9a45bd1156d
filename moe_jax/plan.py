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
    num_shared_ranks: int
    num_zero_experts: int
    num_copy_experts: int
    num_const_experts: int
    transport: str
    transport_reason: str
    overflow: str
    pair_capacity: int
    backend: str
    poison: bool

    @property
    def num_local_experts(self) -> int:
        """L, routed experts on each rank that holds some; a rank of a shared expert uses the first of as many slots."""
        return self.num_experts // (self.ep_size - self.num_shared_ranks)

    @property
    def num_copies(self) -> int:
        """Copies of a token that may travel: K, and one for each shared expert that has ranks of its own."""
        return self.top_k + (self.num_shared_experts if self.num_shared_ranks else 0)

    @property
    def num_ids(self) -> int:
        """Ids that a router may give: routed, then zero, copy and constant experts."""
        return self.num_experts + self.num_zero_experts + self.num_copy_experts + self.num_const_experts

    @property
    def num_pairs(self) -> int:
        """The most copies that one device can send."""
        return self.tokens_per_rank * self.num_copies

    @property
    def max_pair_rows(self) -> int:
        """The most rows that one rank can send another: all choices of all its tokens."""
        return max(1, self.tokens_per_rank * self.top_k)

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
        return math.ceil(self.max_pair_rows / self.pair_capacity)

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
        balanced = _balanced_rows(self.tokens_per_rank, self.top_k, self.ep_size, self.num_shared_ranks)
        slack = f", {self.pair_capacity / balanced:.2f} x the balanced load" if balanced else ""
        lines = [
            f"mesh       ep={self.ep_size} over {'*'.join(self.ep_axis)}, tp={self.tp_size} over {self.tp_axis}"
            + (f", replicated over {'*'.join(self.dp_axis)}" if self.dp_axis else ""),
            f"tokens     {self.tokens_per_rank} per device x {self.hidden} {self.dtype}, top {self.top_k} of "
            f"{self.num_ids} experts, {self.num_experts} routed ({self.num_local_experts} per rank), "
            f"{self.num_zero_experts} zero, {self.num_copy_experts} copy, {self.num_const_experts} constant; "
            f"{self.num_shared_experts} shared"
            + (f" on {self.num_shared_ranks} ranks of their own" if self.num_shared_ranks else ""),
            f"transport  {self.transport}: {self.transport_reason}",
            f"capacity   {self.pair_capacity} rows per pair of ranks and round{slack}; "
            f"{self.num_rows(self.pair_capacity)} rows per device",
            f"overflow   {self.overflow}, "
            + (f"at most {self.max_rounds} rounds" if self.overflow == "dropless" else "counting what does not fit"),
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
      top_k: K, at least 1 and at most the number of ids, E plus the zero, copy and constant experts.
      dtype: "float32", "bfloat16" or "float16", of the rows.
      num_shared_experts: Ns, experts that every token goes to.
      num_shared_ranks: S. 0: shared experts are computed beside the exchange, where the token is. Otherwise they live
        on the first S expert-parallel ranks, S / Ns of them for each, and routed experts on the others, E / (ep - S)
        on each. Every token of source rank r also goes to rank (r mod S / Ns) + s * S / Ns for each shared expert s.
        For ``dispatch`` and ``combine``; the layer does not serve it.
      num_zero_experts, num_copy_experts, num_const_experts: experts that add nothing, the token itself, or a mix of the
        token and a constant vector; their ids follow E, they send no row. See ``moe_jax.special``.
      quant, combine_quant, product: parts of the operator family that this version does not serve;
        only their defaults are legal.
      transport: "padded" (all_to_all of equal blocks), "ragged" (ragged_all_to_all), "allgather" (all tokens out,
        reduce-scatter back), or "auto": the one with the fewest bytes on the wire.
      overflow: "dropless": what does not fit into a round waits for the next; "drop": it is dropped and counted.
      capacity_factor: rows that a pair of ranks can move in a round, relative to the balanced load, T * K / ep;
        None: 1.25, and four
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
        *_size_violations(
            ep_size,
            shape["tp"],
            tokens_per_rank=(tokens_per_rank, 0),
            hidden=(hidden, 1),
            num_experts=(num_experts, 1),
            top_k=(top_k, 1),
            num_shared_experts=(num_shared_experts, 0),
            num_shared_ranks=(num_shared_ranks, 0),
            num_zero_experts=(num_zero_experts, 0),
            num_copy_experts=(num_copy_experts, 0),
            num_const_experts=(num_const_experts, 0),
        ),
        *_dtype_violations(dtype),
        *choice_violations("transport", transport, TRANSPORTS),
        *choice_violations("overflow", overflow, OVERFLOWS),
        *_backend_violations(backend),
        *_capacity_violations(capacity_factor),
        *flag_violations("poison", poison),
        *_unavailable(
            quant=(quant, "none"),
            combine_quant=(combine_quant, "none"),
            product=(product, None),
        ),
    ]
    raise_all(violations, "make_plan")

    tokens_per_rank, top_k, platform = int(tokens_per_rank), int(top_k), _platform(mesh)
    balanced = _balanced_rows(tokens_per_rank, top_k, ep_size, int(num_shared_ranks))
    pair_capacity = _pair_capacity(balanced, tokens_per_rank * top_k, capacity_factor)
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
        num_shared_ranks=int(num_shared_ranks),
        num_zero_experts=int(num_zero_experts),
        num_copy_experts=int(num_copy_experts),
        num_const_experts=int(num_const_experts),
        transport=transport,
        transport_reason=reason,
        overflow=overflow,
        pair_capacity=pair_capacity,
        backend=resolve_backend("grouped_matmul", backend, platform=platform).name,
        poison=bool(poison),
    )


def _platform(mesh) -> str:
    return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()


def _size_violations(ep_size: int, tp_size: int, **sizes: tuple[object, int]) -> list[str]:
    """Broken rules of and between the sizes, each given with its least value."""
    found = [text for name, (value, low) in sizes.items() for text in count_violations(name, value, low)]
    if found:  # the rules below compare whole numbers
        return found
    number = {name: int(value) for name, (value, _) in sizes.items()}
    experts, top_k, tokens = number["num_experts"], number["top_k"], number["tokens_per_rank"]
    num_ids = experts + sum(number[f"num_{kind}_experts"] for kind in ("zero", "copy", "const"))
    shared, shared_ranks = number["num_shared_experts"], number["num_shared_ranks"]
    holders = ep_size - shared_ranks  # of routed experts
    if holders < 1:
        found.append(f"num_shared_ranks={shared_ranks} leaves none of ep={ep_size} ranks for routed experts; lower it")
    elif experts % holders:
        fitting = (experts // holders + 1) * holders
        ranks = f"ep={ep_size}" if not shared_ranks else f"the {holders} ranks that hold routed experts"
        found.append(f"num_experts={experts} is not divisible by {ranks}; use {fitting} experts or another ep")
    if shared_ranks and (not shared or shared_ranks % shared):
        found.append(
            f"num_shared_ranks={shared_ranks} must be a multiple of num_shared_experts={shared}, which must not be 0"
        )
    if top_k > num_ids:
        counted = f"num_experts={experts}" if num_ids == experts else f"the {num_ids} experts of all kinds"
        found.append(f"top_k={top_k} exceeds {counted}; lower top_k")
    if num_ids >= 2**31:
        found.append(f"num_experts={experts}: all kinds together must stay below 2**31: ids are 32-bit integers")
    if tp_size * ep_size * tokens * (top_k + shared) >= 2**31:
        found.append(f"tokens_per_rank={tokens}: ep * tp * T * K must stay below 2**31; use more devices")
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


def _balanced_rows(tokens: int, top_k: int, ep_size: int, num_shared_ranks: int) -> float:
    """Rows that a rank sends another when routes are even; a rank of a shared expert gets every token it serves."""
    routed = tokens * top_k / (ep_size - num_shared_ranks)
    return max(routed, float(tokens)) if num_shared_ranks else routed


def _pair_capacity(balanced: float, most: int, capacity_factor: float | None) -> int:
    """Rows that one rank may send another in one round; at least 1 and at most ``most``, the worst skew."""
    if capacity_factor is None:
        capacity = math.ceil(max(1.25 * balanced, balanced + 4 * math.sqrt(balanced)))
    else:
        capacity = math.ceil(min(float(min(capacity_factor, 1e9)) * balanced, most))
    return max(1, min(capacity, most))


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
