"""What a plan is: everything static about one MoE layer on one mesh."""

import dataclasses
import math

import jax.numpy as jnp

from moe_jax import _compat
from moe_jax.config import ACTIVATIONS
from moe_jax.errors import InvalidArgumentError, UnsupportedError, check_choice, check_count
from moe_jax.plan.cost import Cost, balanced_rows, layer_costs
from moe_jax.plan.rates import RATES
from moe_jax.plan.transport_table import transport_of
from moe_jax.quant import Recipe, recipe
from moe_jax.types import DispatchHandle


@_compat.exportable_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One layer's static facts. Hashable; holds no array and no mesh. Build it with ``make_plan``.

    Attributes:
      ep_axis: mesh axes over which experts are spread, outermost first: ("ep",), or ("node", "ep").
      tp_axis: the mesh axis along which experts are split; None: no such axis.
      dp_axis: mesh axes that replicate the whole group.
      ep_size: W, ranks along ``ep_axis``, of all nodes.
      tp_size: P, ranks along ``tp_axis``.
      num_nodes: N, nodes that ``ep_axis`` spans.
      tokens_per_rank: T, tokens of each device.
      hidden: H, the width of a token.
      num_experts: E, physical routed experts.
      top_k: K, choices of a token.
      dtype: of the rows: "float32", "bfloat16" or "float16".
      num_shared_experts: experts that every token goes to.
      num_shared_ranks: expert-parallel ranks that hold shared experts; 0: they are computed where the token is.
      num_zero_experts: experts that add nothing; their ids follow those of routed experts.
      num_copy_experts: experts that add the token itself; their ids come next.
      num_const_experts: experts that mix the token with a constant vector; their ids come last.
      quant: recipe of the rows on their way to the experts, "none" for none; see ``moe_jax.quant``.
      combine_quant: recipe of the rows on their way back.
      backward_quant: recipe of the cotangents of rows, both ways.
      transport: how rows travel: "padded", "ragged", "allgather" or "hierarchy"; never "auto".
      transport_reason: why this one, in words.
      overflow: "dropless" or "drop": what happens to rows that a round has no room for.
      pair_capacity: rows that a pair of ranks can move in a round of the layer.
      platform: of the devices that the plan was made for: "cpu", "gpu" or "tpu".
      backend: the back end of the kernels, by name; where several share the work, joined by "+": the first that has a
        kernel serves it. Never "auto".
      backend_reason: which of them serves what, and why, in words.
      poison: whether slots that nobody may read are filled with NaN.
    """

    ep_axis: tuple[str, ...]
    tp_axis: str | None
    dp_axis: tuple[str, ...]
    ep_size: int
    tp_size: int
    num_nodes: int
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
    quant: str
    combine_quant: str
    backward_quant: str
    transport: str
    transport_reason: str
    overflow: str
    pair_capacity: int
    platform: str
    backend: str
    backend_reason: str
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
    def dispatch_capacity(self) -> int:
        """Rows that a pair of ranks can move in a call of ``dispatch`` alone: all, unless overflow is dropped."""
        return self.pair_capacity if self.overflow == "drop" else self.max_pair_rows

    @property
    def exchanges(self) -> bool:
        """Whether the layer moves rows between devices; false where one device holds all experts, whole."""
        return self.ep_size * self.tp_size > 1

    @property
    def exchange_axes(self) -> tuple[str, ...]:
        """Axes over which rows move: expert parallel, then tensor parallel."""
        return self.ep_axis if self.tp_axis is None else (*self.ep_axis, self.tp_axis)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes over which tokens are spread: data parallel, then the exchange axes."""
        return (*self.dp_axis, *self.exchange_axes)

    @property
    def max_rounds(self) -> int:
        """Rounds that the worst skew needs: 1 where one holds all, overflow is dropped or nothing is exchanged."""
        if self.overflow == "drop" or not self.num_pairs or not self.exchanges:
            return 1
        return math.ceil(self.max_pair_rows / self.pair_capacity)

    @property
    def dispatch_recipe(self) -> Recipe | None:
        """How rows travel to the experts; None: as they are."""
        return recipe(self.quant, self.dtype)

    @property
    def combine_recipe(self) -> Recipe | None:
        """How rows travel back from the experts; None: as they are."""
        return recipe(self.combine_quant, self.dtype)

    @property
    def backward_recipe(self) -> Recipe | None:
        """How cotangents travel, both ways; None: as they are."""
        return recipe(self.backward_quant, self.dtype)

    @property
    def sums_at_experts(self) -> bool:
        """Whether a token's rows are summed where they were made, rather than at the token."""
        return not transport_of(self).pairwise

    def num_rows(self, capacity: int) -> int:
        """M, rows that a device can receive when every pair of ranks moves at most ``capacity``."""
        return self.tp_size * self.ep_size * capacity

    def workspace(self, call: str = "layer") -> dict[str, int]:
        """Bytes per device of the buffers through which rows pass in a forward pass, by purpose.

        They are counted as the program describes them, from sizes alone; each buffer counts once, and those of one call
        are counted as if all were there at the same time. By key:

        - "send": rows, or messages of a quantised wire, packed for other ranks; "crossing" instead of it for those
          between nodes, both ways. Not for "allgather", which sends the tokens as they are.
        - "arrival": what came from all ranks, of all tp ranks.
        - "rows": the M rows in the order of the experts, in ``plan.dtype``.
        - "return": rows, or sums of rows, on their way back to the tokens.
        - "integers": which row lies where, and the counts.

        Not in it are the arguments and results (tokens, parameters, y); what the experts compute of the rows (inner
        activations, as wide as an FFN, and the rows that they return); casts of parameters and of rows; the router;
        everything of a backward pass (residuals, cotangents, gradients); the buffers of further rounds and of the
        chunks of an exchange that follows the true counts; and what the compiler adds (copies, scratch of its
        collectives) or saves by letting buffers share memory. So the temporaries of a compiled program may be several
        times as large: ``temporary_bytes`` of ``moe_jax.hlo_contract`` reads what they are.

        Args:
          call: "layer": of one round of ``moe_layer`` or ``moe_on_mesh``, M being ``num_rows(pair_capacity)``: bounded,
            at any skew; where one device holds all experts nothing is sent, and M is T * K. "dispatch": of a call of
            ``dispatch`` alone and the ``combine`` that follows it, which do all in one round: with overflow="dropless"
            M is the worst skew, T * K rows from every rank.

        Raises:
          InvalidArgumentError: ``call`` is neither.

        >>> plan.workspace()["rows"], plan.workspace("dispatch")["rows"]
        (512, 512)
        """
        check_choice("call", call, ("layer", "dispatch"))
        capacity = self.pair_capacity if call == "layer" else self.dispatch_capacity
        row = self.hidden * jnp.dtype(self.dtype).itemsize
        rows = self.num_rows(capacity)
        if call == "layer" and not self.exchanges:
            buffers = {"send": 0, "arrival": 0, "return": self.num_pairs * row}
            integers = 2 * rows + self.num_pairs
        else:
            buffers, integers = transport_of(self).buffers(self, capacity)
        counts = (self.tp_size + 1) * self.num_experts
        return {**buffers, "rows": rows * row, "integers": 4 * (integers + counts)}

    def cost(
        self, ffn: int, *, activation: str = "swiglu", num_replicas: int = 1, platform: str | None = None
    ) -> dict[str, Cost]:
        """What one call of the layer costs one device, by phase: "forward" and "forward + backward".

        Args:
          ffn: F, width of an expert, divisible by tp; a shared expert is as many times as wide as there are. 0 leaves
            out what depends on it: products of experts, and gradients of weights that are summed over devices.
          activation: as for ``moe_on_mesh``.
          num_replicas: devices along the data-parallel axes, whose sizes a plan does not hold.
          platform: "cpu", "gpu" or "tpu", whose nominal rates bound the time, see ``plan.rates``; None: the back end's,
            if it is one of these, or else the plan's.

        Raises:
          InvalidArgumentError: an argument is not as above.
          UnsupportedError: the plan puts shared experts on ranks of their own, which the layer does not serve.

        >>> plan.cost(64)["forward"].flops
        24832
        """
        check_count("ffn", ffn, low=0)
        if ffn % self.tp_size:
            raise InvalidArgumentError(f"ffn={ffn} must be divisible by tp={self.tp_size}")
        check_choice("activation", activation, ACTIVATIONS)
        check_count("num_replicas", num_replicas)
        if platform is None:
            platform = self.backend if self.backend in RATES else self.platform
        check_choice("platform", platform, RATES)
        if self.num_shared_ranks:
            raise UnsupportedError(
                f"num_shared_ranks={self.num_shared_ranks}: the layer computes shared experts beside the exchange, and "
                "its cost is that of a plan with num_shared_ranks=0"
            )
        return layer_costs(self, platform, ffn=ffn, activation=activation, num_replicas=num_replicas)

    def describe(self, *, ffn: int | None = None, activation: str = "swiglu") -> str:
        """The plan in words: sizes, choices with their reasons, bytes and costs per device.

        ``ffn``, ``activation``: as for ``cost``; None: of the costs only what they do not decide.
        """
        balanced = balanced_rows(self.tokens_per_rank, self.top_k, self.ep_size, self.num_shared_ranks)
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
            f"{self.num_rows(self.pair_capacity)} rows per device in a round of the layer, "
            f"{self.num_rows(self.dispatch_capacity)} in a call of dispatch alone"
            + (", the worst skew" if self.overflow == "dropless" else ""),
            f"wire       out {self.quant}, back {self.combine_quant}, cotangents {self.backward_quant}",
            f"overflow   {self.overflow}, "
            + (f"at most {self.max_rounds} rounds" if self.overflow == "dropless" else "counting what does not fit"),
            f"backend    {self.backend}: {self.backend_reason}",
            f"workspace  of a round of the layer: {_bytes(self.workspace())}",
            f"           of a call of dispatch alone, and combine: {_bytes(self.workspace('dispatch'))}",
        ]
        if ffn is not None or not self.num_shared_ranks:
            costs = self.cost(ffn or 0, activation=activation)
            lines += [f"cost       {phase}: {_words(cost, whole=bool(ffn))}" for phase, cost in costs.items()]
        return "\n".join(lines)


_compat.exportable(
    DispatchHandle, to_json=lambda aux: _compat.fields_of(aux[0]), from_json=lambda fields: (Plan(**fields),)
)


def _bytes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size:,} B" for name, size in sizes.items())


def _words(cost: Cost, *, whole: bool) -> str:
    """``whole``: whether the experts' products are in it."""
    even = "" if cost.even_wire_bytes == cost.wire_bytes else f" at most, {cost.even_wire_bytes:,} B under an even load"
    words = f"{cost.wire_bytes:,} B leave the device{even}; "
    if not whole:
        return words + f"{cost.traffic_bytes:,} B read and written but for products of experts"
    resource, seconds = cost.bound
    return words + (
        f"{cost.flops:,} flops; {cost.traffic_bytes:,} B read and written; {1e3 * seconds:.3g} ms bound by {resource} "
        f"(compute {1e3 * cost.compute_seconds:.3g}, memory {1e3 * cost.memory_seconds:.3g}, wire "
        f"{1e3 * cost.wire_seconds:.3g}, at nominal rates of {cost.platform})"
    )
