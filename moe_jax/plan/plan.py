"""What a plan is: everything static about one MoE layer on one mesh."""

import dataclasses
import math
from functools import cached_property
from typing import Any

import jax

from moe_jax import _compat
from moe_jax.activations import Choice
from moe_jax.hardware import Machine
from moe_jax.hardware.machine import Link, Torus
from moe_jax.plan.cost import Cost, plan_costs
from moe_jax.plan.describe import describe
from moe_jax.plan.memory import Memory, Question, plan_memory
from moe_jax.plan.transport_table import transport_of
from moe_jax.plan.workspace import workspace
from moe_jax.quant import Recipe, recipe
from moe_jax.types import DispatchHandle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One layer's static facts. Hashable; holds no array and no mesh. Build it with ``make_plan``.

    What follows from the fields below is worked out once, when it is first asked for, and kept with the plan.

    Attributes:
      ep_axis: mesh axes over which experts are spread, outermost first: ("ep",), or ("node", "ep"). Of several, the
        last one lies inside a node, and the others go from node to node.
      tp_axis: the mesh axis along which experts are split, or a tuple of several; None: no such axis.
      token_axes: mesh axes over which tokens are spread, outermost first; all of the exchange are among them.
      param_axes: those of ``dp_axis`` along which the weights of experts are split as well, and gathered for use.
      mesh_axes: all axes of the mesh with their sizes, outermost first: devices are laid out along the last one first.
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
      hardware: the machine that the plan was made for, whose figures the cost model takes.
      platform: that machine's: "cpu", "gpu", "tpu" or "npu".
      backend: the back end of the kernels, by name; where several share the work, joined by "+": the first that has a
        kernel serves it. Never "auto".
      backend_reason: which of them serves what, and why, in words.
      kernels: what the names in ``backend`` meant when the plan was made, such as ("cpu#1",): the registrations that
        kernels and exchanges are looked up by, so that nothing that is registered later changes the plan's program.
      poison: whether slots that nobody may read are filled with NaN.
    """

    ep_axis: tuple[str, ...]
    tp_axis: str | tuple[str, ...] | None
    token_axes: tuple[str, ...]
    param_axes: tuple[str, ...]
    mesh_axes: tuple[tuple[str, int], ...]
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
    hardware: Machine
    platform: str
    backend: str
    backend_reason: str
    kernels: tuple[str, ...]
    poison: bool

    @cached_property
    def tp_axes(self) -> tuple[str, ...]:
        """``tp_axis`` as a tuple: empty where there is none."""
        return () if self.tp_axis is None else (self.tp_axis,) if isinstance(self.tp_axis, str) else self.tp_axis

    @cached_property
    def dp_axis(self) -> tuple[str, ...]:
        """Mesh axes that replicate the whole group of ranks, each copy with tokens of its own."""
        return tuple(name for name in self.token_axes if name not in self.exchange_axes)

    @cached_property
    def num_param_shards(self) -> int:
        """Parts into which the weights of an expert are split along ``param_axes``."""
        return math.prod(size for name, size in self.mesh_axes if name in self.param_axes)

    @cached_property
    def num_replicas(self) -> int:
        """Copies of the whole group: the product of the sizes of ``dp_axis``."""
        return math.prod(size for name, size in self.mesh_axes if name in self.dp_axis)

    @cached_property
    def num_local_experts(self) -> int:
        """L, the routed experts of each rank that holds some; a rank that holds a shared expert has it in slot 0."""
        return self.num_experts // (self.ep_size - self.num_shared_ranks)

    @cached_property
    def pairs_per_token(self) -> int:
        """C, the pairs of a token that may travel: K choices, and each shared expert that has ranks of its own."""
        return self.top_k + (self.num_shared_experts if self.num_shared_ranks else 0)

    @property
    def num_copies(self) -> int:
        """The old name of ``pairs_per_token``."""
        return self.pairs_per_token

    @cached_property
    def num_ids(self) -> int:
        """Ids that a router may give: routed, then zero, copy and constant experts."""
        return self.num_experts + self.num_zero_experts + self.num_copy_experts + self.num_const_experts

    @cached_property
    def num_pairs(self) -> int:
        """The pairs of one device: the most that it can send."""
        return self.tokens_per_rank * self.pairs_per_token

    @cached_property
    def max_pair_rows(self) -> int:
        """The most rows that one rank can send another: all choices of all its tokens."""
        return max(1, self.tokens_per_rank * self.top_k)

    @cached_property
    def dispatch_capacity(self) -> int:
        """Rows that a pair of ranks can move in a call of ``dispatch`` alone: all, unless overflow is dropped."""
        return self.pair_capacity if self.overflow == "drop" else self.max_pair_rows

    @cached_property
    def exchanges(self) -> bool:
        """Whether the layer moves rows between devices; false where one device holds all experts, whole."""
        return self.ep_size * self.tp_size > 1

    @cached_property
    def exchange_axes(self) -> tuple[str, ...]:
        """Axes over which rows move: expert parallel, then tensor parallel."""
        return (*self.ep_axis, *self.tp_axes)

    @cached_property
    def max_rounds(self) -> int:
        """The rounds that the worst skew needs: 1 if a round holds it, overflow is dropped, or nothing is exchanged."""
        if self.overflow == "drop" or not self.num_pairs or not self.exchanges:
            return 1
        return math.ceil(self.max_pair_rows / self.pair_capacity)

    @cached_property
    def dispatch_recipe(self) -> Recipe | None:
        """How rows travel to the experts; None: as they are."""
        return recipe(self.quant, self.dtype)

    @cached_property
    def combine_recipe(self) -> Recipe | None:
        """How rows travel back from the experts; None: as they are."""
        return recipe(self.combine_quant, self.dtype)

    @cached_property
    def backward_recipe(self) -> Recipe | None:
        """How cotangents travel, both ways; None: as they are."""
        return recipe(self.backward_quant, self.dtype)

    @property
    def sums_at_experts(self) -> bool:
        """Whether the rows of a token are summed on their way back, by rank or by node, rather than at the token."""
        return not transport_of(self).pairwise

    def num_rows(self, capacity: int) -> int:
        """M, rows that a device can receive when every pair of ranks moves at most ``capacity``."""
        return self.tp_size * self.ep_size * capacity

    def workspace(self, call: str = "layer") -> dict[str, int]:
        """Bytes per device of the buffers through which rows pass in a forward pass, by purpose.

        They are counted as the program describes them, from sizes alone; each buffer counts once, and those of one call
        are counted as if all were there at the same time. By key:

        - "outbox": rows, or messages of a quantised wire, packed for other ranks. "allgather" has none: it sends the
          tokens as they are.
        - "inbox": what came from all ranks, of all tp ranks.
        - "node_slots": of "hierarchy", the tokens packed for other nodes, and those that came from them.
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

        >>> import moe_jax as moe
        >>> moe.emulate_devices(2)  # leave this out where there are accelerators
        >>> sizes = {"tokens_per_rank": 4, "hidden": 8, "num_experts": 4, "top_k": 2, "dtype": "float32"}
        >>> plan = moe.make_plan(moe.make_mesh(ep=2), **sizes)
        >>> plan.workspace()["rows"], plan.workspace("dispatch")["rows"]
        (512, 512)
        """
        return workspace(self, call)

    def cost(
        self,
        ffn: int,
        *,
        activation: Choice = "swiglu",
        shared_ffn: int | None = None,
        shared_activation: Choice | None = None,
        num_replicas: int | None = None,
        platform: str | None = None,
        hardware: str | Machine | None = None,
    ) -> dict[str, Cost]:
        """What one call of the layer costs one device, by pass: "forward" and "forward + backward".

        A ``Cost`` has seconds by phase of the layer ("route", "dispatch", ...) and what bounds them, and the bytes that
        stay inside a node apart from those that go to other nodes. Which ranks share a node follows from
        ``mesh_axes`` and ``devices_per_node`` of the machine; where ``ep_axis`` has several axes, these say it.

        Args:
          ffn: F, width of an expert, divisible by tp; a shared expert is as many times as wide as there are. 0 leaves
            out what depends on it: products of experts, and gradients of weights that are summed over devices.
          activation, shared_ffn, shared_activation: as for ``moe_on_mesh``.
          num_replicas: copies of the whole group; None: as many as the plan's mesh has.
          platform: "cpu", "gpu" or "tpu": at the rates of a machine of that platform (h100, v5p); or
          hardware: at those of this machine, as for ``make_plan``; both None: at those of ``plan.hardware``.

        Raises:
          InvalidArgumentError: an argument is not as above.
          UnsupportedError: the plan puts shared experts on ranks of their own, which the layer does not serve.

        >>> import moe_jax as moe
        >>> moe.emulate_devices(2)  # leave this out where there are accelerators
        >>> sizes = {"tokens_per_rank": 4, "hidden": 8, "num_experts": 4, "top_k": 2, "dtype": "float32"}
        >>> plan = moe.make_plan(moe.make_mesh(ep=2), **sizes)
        >>> plan.cost(64)["forward"].flops
        24832
        """
        return plan_costs(
            self,
            ffn,
            activation=activation,
            shared_ffn=shared_ffn,
            shared_activation=shared_activation,
            num_replicas=num_replicas,
            platform=platform,
            hardware=hardware,
        )

    def memory(
        self,
        ffn: int,
        *,
        activation: Choice = "swiglu",
        layers: int = 1,
        optimizer: str = "adamw",
        param_dtype: str = "float32",
        remat: bool = False,
        call: str = "layer",
        chunks: int = 1,
        hardware: Machine | str | None = None,
        shared_ffn: int | None = None,
        shared_activation: Choice | None = None,
        weigh_inputs: bool = False,
    ) -> Memory:
        """What one device holds at the largest moment, in bytes, as the compiler of its platform places arrays.

        Args:
          ffn: F, width of an expert, divisible by tp; a shared expert is as many times as wide as there are.
          activation: as for ``moe_on_mesh``.
          layers: how many layers like this one the model has.
          optimizer: "adamw" or "adam" (two fp32 numbers for each parameter), "momentum" (one), "sgd" (none), or "none":
            inference, where there are no gradients and nothing is kept.
          param_dtype: of the parameters.
          remat: whether each layer is computed again in the backward pass (``jax.checkpoint``), and keeps its input
            alone.
          call: "layer", or "dispatch": a call of ``dispatch`` alone, which has room for the worst skew. It has neither
            parameters nor layers, and depends on the plan and ``hardware`` alone.
          chunks: as for ``moe_on_mesh``.
          hardware: a ``moe_jax.hardware.Machine``, its name, or the path of a TOML file; None: the plan's.
          shared_ffn, shared_activation, weigh_inputs: as for ``moe_on_mesh``.

        Returns:
          A ``Memory``. ``memory.fits()`` says whether the machine has that much, ``memory.check_fits()`` raises where
          it has not, and ``memory.smallest_change()`` says what would help. docs/planner.md says how right it all is.

        Raises:
          InvalidArgumentError: an argument is not as above.
          UnsupportedError: the plan puts shared experts on ranks of their own, which the layer does not serve.

        >>> import moe_jax as moe
        >>> moe.emulate_devices(2)  # leave this out where there are accelerators
        >>> sizes = {"tokens_per_rank": 4, "hidden": 8, "num_experts": 4, "top_k": 2, "dtype": "float32"}
        >>> plan = moe.make_plan(moe.make_mesh(ep=2), **sizes)
        >>> memory = plan.memory(64, hardware="h100")
        >>> memory.weights, memory.gradients, memory.optimizer, memory.fits()
        (12416, 12416, 24832, True)
        """
        asked = Question(
            ffn=ffn,
            activation=activation,
            layers=layers,
            optimizer=optimizer,
            param_dtype=param_dtype,
            remat=remat,
            call=call,
            chunks=chunks,
            hardware=hardware,
            shared_ffn=shared_ffn,
            shared_activation=shared_activation,
            weigh_inputs=weigh_inputs,
        )
        return plan_memory(self, asked)

    def describe(
        self,
        *,
        ffn: int | None = None,
        activation: Choice = "swiglu",
        shared_ffn: int | None = None,
        shared_activation: Choice | None = None,
    ) -> str:
        """The plan in words: sizes, choices with their reasons, bytes and costs per device.

        The arguments are those of ``cost``; without ``ffn``, of the costs only what it does not decide.
        """
        return describe(
            self, ffn=ffn, activation=activation, shared_ffn=shared_ffn, shared_activation=shared_activation
        )


def _to_json(plan: Plan) -> dict[str, Any]:
    return {**_compat.fields_of(plan), "hardware": dataclasses.asdict(plan.hardware)}


def _from_json(fields: dict[str, Any]) -> Plan:
    machine = dict(fields["hardware"])
    for name, kind in (("inside", Link), ("between", Link), ("torus", Torus)):
        machine[name] = None if machine[name] is None else kind(**machine[name])
    return Plan(**{**fields, "hardware": Machine(**machine)})


_compat.exportable(jax.tree_util.register_static(Plan), to_json=_to_json, from_json=_from_json)
_compat.exportable(DispatchHandle, to_json=lambda aux: _to_json(aux[0]), from_json=lambda fields: (_from_json(fields),))
