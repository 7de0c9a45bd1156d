"""The layer over global arrays: one shard_map around ``moe_layer``, and parameters placed for it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from moe_jax import _compat
from moe_jax.activations import Choice
from moe_jax.config import RouterConfig
from moe_jax.errors import (
    MeshError,
    MissingArgumentError,
    ShapeError,
    check_array,
    check_choice,
    check_dtype,
    check_flag,
    check_mask,
    check_shape,
)
from moe_jax.layer.layer import (
    check_choices,
    check_chunks,
    check_router_x,
    check_sequences_of,
    choices_of,
    layer_of_shard,
    with_losses,
)
from moe_jax.layer.params import abstract_params, check_params, check_width, draw, param_spec
from moe_jax.layer.placement import BALANCES, check_shares, check_table
from moe_jax.parameters import TABLE
from moe_jax.plan import Plan
from moe_jax.types import LayerStats, Routing

Array = jax.Array


def moe_on_mesh(
    mesh: Mesh | AbstractMesh,
    plan: Plan,
    router: RouterConfig | None,
    *,
    ffn: int = 1024,
    activation: Choice = "swiglu",
    use_bias: bool = False,
    num_logical_experts: int | None = None,
    chunks: int = 1,
    param_dtype: str = "float32",
    router_hidden: int | None = None,
    shared_ffn: int | None = None,
    shared_activation: Choice | None = None,
    gated_shared: bool = False,
    expert_scale: bool = False,
    weigh_inputs: bool = False,
) -> tuple[Callable, Callable]:
    """The MoE layer on global arrays: ``init(key) -> params`` and ``apply(params, x) -> (y, stats)``.

    Expert weights are sharded over the expert-parallel axes and, along their FFN axis, over tp, and along H over
    ``plan.param_axes``; router and shared expert are replicated. Along axes of the mesh that the plan leaves alone, all
    devices do the same. Values do not depend on the mesh, but for the last bits, which are the compiler's. ``apply``
    may be jitted, differentiated, scanned and rematerialised. Called by itself, it is one program, compiled once.

    Args:
      mesh: the mesh that the plan was made from. Its axes may be Auto, Explicit or of both types, with or without
        ``jax.set_mesh``. Arguments may be laid out over it in any way: ``apply`` moves what lies elsewhere. To trace
        and lower, an AbstractMesh will do; where its axes are Explicit, which is the default of newer JAX, JAX lowers
        inside ``jax.sharding.use_abstract_mesh(mesh)`` alone.
      plan, router: static. Without a router, None, there are no parameters for one, and ``apply`` needs ``routing``.
      ffn: F, width of an expert, divisible by tp.
      activation: a name or a function, see ``moe_layer``.
      use_bias: whether ``init`` makes the optional biases (zero at first).
      num_logical_experts: experts that the router scores, where ``apply`` is given a ``table`` of their instances;
        None: it scores the plan's experts.
      chunks: parts in which the tokens of a device pass, see ``moe_layer``.
      param_dtype: "float32", "bfloat16" or "float16", of the parameters that ``init`` makes; ``apply`` takes any.
      router_hidden: H_r, where ``apply`` is given ``router_x`` [..., H_r], which the router sees instead of x; None: H.
      shared_ffn: S, width of the shared expert; None: F * ``plan.num_shared_experts``. ``apply`` takes any width.
      shared_activation: that of the shared expert; None: as ``activation``.
      gated_shared: whether sigmoid(x @ shared_router), one number for each token, multiplies what the shared expert
        adds (Qwen2-MoE). False: ``apply`` takes parameters with or without a gate, as ``moe_layer`` does.
      expert_scale: whether the weights of choices are multiplied by a parameter of their expert, expert_scale, one at
        first (Gemma 4). False: as for ``gated_shared``.
      weigh_inputs: whether weights multiply what experts are given (Llama 4), see ``moe_layer``.

    Returns:
      init: key -> dict of arrays in ``param_dtype``: router [H_r, E'], w_gate (if gated), w_up [E, H, F],
        w_down [E, F, H], selection_bias [E'] if the router has one, shared_gate (if gated), shared_up [H, S],
        shared_down [S, H] if there are shared experts; router_bias, b_gate, b_up, b_down with ``use_bias``;
        shared_router [H, 1] with ``gated_shared``, and expert_scale [E'] with ``expert_scale``.
      apply: (params, x [..., H] in ``plan.dtype``, token_mask [...] bool or None) -> (y [..., H], LayerStats). Tokens
        may have any leading shape, and there may be as many as the devices along ``plan.token_axes`` have room for,
        tokens_per_rank each; they are spread evenly over these devices, and where there are fewer, the rest is padding
        that goes nowhere and counts nowhere. So the same parameters serve plans of any size, such as one for long
        prompts and one for single steps. y is sharded over ``plan.token_axes``; where axes are Explicit
        and x had to be padded or given another shape, it is replicated. The keywords ``table``, ``balance``,
        ``shares`` and ``rank_table`` are those of ``moe_layer``, the same on every device. ``routing`` and ``router_x``
        are too, but have the leading shape of x: (expert_ids [..., K], combine_weights [..., K]) or a ``Routing`` of
        such arrays; and [..., H_r]. With ``return_routing=True`` stats.routing has such ids and weights. With
        ``sequence_length=L`` the tokens, in their order in x, are sequences of L, such as the rows of x [B, L, H], each
        of which one device gets as a whole, and stats.losses has their "sequence_balance", see ``route``.

    Raises:
      InvalidArgumentError: ``ffn`` is not divisible by tp, the activation is unknown, ``chunks`` does not divide T, or
        the router's groups and the plan's experts and ``top_k`` do not fit (one error lists all that does not);
        ``init`` and ``apply`` check their own arguments: DtypeError and others.
      MeshError: the mesh is not the plan's; ``apply`` is called inside a ``shard_map``.
      UnsupportedError: the plan puts shared experts on ranks of their own.

    >>> import jax, jax.numpy as jnp, moe_jax as moe
    >>> moe.emulate_devices(2)  # leave this out where there are accelerators
    >>> mesh = moe.make_mesh(ep=2)
    >>> plan = moe.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=4, top_k=2, dtype="float32")
    >>> init, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=32)
    >>> y, stats = jax.jit(apply)(init(jax.random.key(0)), jnp.ones((8, 8)))
    """
    shapes = abstract_params(
        mesh,
        plan,
        router,
        ffn=ffn,
        activation=activation,
        use_bias=use_bias,
        num_logical_experts=num_logical_experts,
        param_dtype=param_dtype,
        router_hidden=router_hidden,
        shared_ffn=shared_ffn,
        shared_activation=shared_activation,
        gated_shared=gated_shared,
        expert_scale=expert_scale,
    )
    asked = [name for name in ("shared_router", "expert_scale") if name in shapes]
    check_chunks(chunks, plan)
    check_flag("weigh_inputs", weigh_inputs)
    num_devices = plan.ep_size * plan.tp_size * plan.num_replicas
    num_tokens = plan.tokens_per_rank * num_devices
    specs = {row.name: _split(param_spec(row.name, plan), mesh) for row in TABLE}
    tokens: Any = _split(PartitionSpec(plan.token_axes), mesh)
    everywhere: Any = PartitionSpec()
    # Compiled once, and not at every call of ``init``.
    drawn = jax.jit(
        lambda key: draw(key, shapes),
        out_shardings={name: of.sharding for name, of in shapes.items()},
    )

    def init(key: Array) -> dict[str, Array]:
        _check_key(key)
        return drawn(key)

    stats_specs = LayerStats(
        num_dropped=everywhere,
        num_rounds=everywhere,
        load=everywhere,
        losses=everywhere,
        mean_score=everywhere,
        routing=tokens,
    )

    @functools.partial(jax.jit, static_argnames=("share", "balance", "return_routing", "sequence_length"))
    def layer(
        params,
        x,
        token_mask,
        table,
        shares,
        rank_table,
        choices,
        router_x,
        *,
        share,
        balance,
        return_routing,
        sequence_length,
    ):
        """The layer as one program, where it is not part of a larger one. Tokens come in the shape that users have."""
        lead = x.shape[:-1]
        if lead != (num_tokens,):
            operands = (x, token_mask, choices, router_x)
            x, token_mask, choices, router_x = _as_tokens(*operands, share, plan.tokens_per_rank, num_tokens, mesh)
        in_specs = (
            {name: specs[name] for name in params},
            tokens,
            None if token_mask is None else tokens,
            None if table is None else everywhere,
            None if shares is None else everywhere,
            None if rank_table is None else everywhere,
            None if choices is None else (tokens, tokens),
            None if router_x is None else tokens,
        )
        given = (params, x, token_mask, table, shares, rank_table, choices, router_x)
        given = jax.tree.map(lambda array, spec: _compat.lay_out(array, mesh, spec), given, in_specs)
        shard = functools.partial(
            layer_of_shard,
            plan=plan,
            router=router,
            activation=activation,
            shared_activation=activation if shared_activation is None else shared_activation,
            balance=balance,
            chunks=chunks,
            weigh_inputs=weigh_inputs,
            return_routing=return_routing,
            sequence_length=sequence_length,
        )
        mapped = _compat.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=(tokens, stats_specs))
        y, stats = mapped(*given)
        y = _compat.name_unit_axes_as(y, x, mesh)
        if lead != (num_tokens,):
            of_tokens = _compat.unsplit((y, stats.routing), mesh)
            y, given = jax.tree.map(lambda array: _as_given(array, share, plan.tokens_per_rank, lead), of_tokens)
            stats = dataclasses.replace(stats, routing=given)
        return y, stats

    def apply(
        params: dict[str, Array],
        x: Array,
        token_mask: Array | None = None,
        *,
        table: Array | None = None,
        balance: str = "rank",
        shares: Array | None = None,
        rank_table: Array | None = None,
        routing: Routing | tuple[Array, Array] | None = None,
        router_x: Array | None = None,
        return_routing: bool = False,
        sequence_length: int | None = None,
    ) -> tuple[Array, LayerStats]:
        if around := _compat.manual_axes():
            raise MeshError(
                f"apply of moe_on_mesh was called inside a shard_map over {around}, and makes one itself; in there, "
                f"call moe_layer on the part of one device, with that shard_map over {plan.token_axes} too"
            )
        check_array("x", x)
        lead = x.shape[:-1]
        check_shape("x", x, (*lead, plan.hidden), "[..., H]")
        check_dtype("x", x, (plan.dtype,), "the plan's dtype: cast x, or make a plan with dtype=...")
        if math.prod(lead) > num_tokens:
            raise ShapeError(
                f"x has {math.prod(lead)} tokens, and the plan has room for {num_tokens}: tokens_per_rank="
                f"{plan.tokens_per_rank} on each of {num_devices} devices; make a plan with more tokens_per_rank, "
                "whose layer takes the same parameters"
            )
        if token_mask is not None:
            check_mask("token_mask", token_mask, lead, "the shape of x without H")
        check_choice("balance", balance, BALANCES)  # static, so it must be hashable
        if table is not None:
            check_table(table)
        if shares is not None:
            check_shares(shares, table, balance)
        if rank_table is not None:
            check_array("rank_table", rank_table)
        if return_routing is not False:
            check_flag("return_routing", return_routing)
        if sequence_length is not None:
            check_sequences_of(sequence_length, math.prod(lead), routing)
        whole = sequence_length or 1
        share = -(-math.prod(lead) // (num_devices * whole)) * whole  # tokens of a device, in whole sequences
        if share > plan.tokens_per_rank:  # tokens one by one have room, as has been checked
            raise ShapeError(
                f"x has {math.prod(lead)} tokens in sequences of sequence_length={sequence_length}, each of which "
                f"lies on one of {num_devices} devices as a whole, and the plan has room for tokens_per_rank="
                f"{plan.tokens_per_rank} on each; make a plan for {share}, whose layer takes the same parameters"
            )
        choices = None if routing is None else choices_of(routing)
        if choices is not None:
            check_choices(*choices, (*lead, plan.top_k))
        elif router is None:
            raise MissingArgumentError("routing is missing: this layer was made with router=None; pass routing=(...)")
        if router_x is not None:
            check_router_x(router_x, lead, routing)
        elif router_hidden is not None and routing is None:
            raise MissingArgumentError(f"router_x is missing: this layer was made with router_hidden={router_hidden}")
        check_params(
            params,
            plan,
            router,
            activation,
            shared_activation,
            on_device=False,
            table=table,
            routed=choices is not None,
            router_x=router_x,
            needed=asked,
        )
        check_width(f"params: 'w_up' has shape {params['w_up'].shape}; its width", params["w_up"].shape[-1], plan)
        y, stats = layer(
            params,
            x,
            token_mask,
            table,
            shares,
            rank_table,
            choices,
            router_x,
            share=share,
            balance=balance,
            return_routing=return_routing,
            sequence_length=sequence_length,
        )
        return y, with_losses(stats, routing) if isinstance(routing, Routing) else stats

    return init, apply


def _as_tokens(
    x: Array,
    token_mask: Array | None,
    choices: tuple[Array, Array] | None,
    router_x: Array | None,
    share: int,
    per_device: int,
    num_tokens: int,
    mesh: Mesh | AbstractMesh,
) -> tuple[Array, Array | None, tuple[Array, Array] | None, Array | None]:
    """All of these [..., X] as [N, X], with padding up to ``num_tokens`` of them; the mask says what is padding.

    Every device gets ``share`` tokens, but for the last ones that have some, and padding behind them.
    """
    given = math.prod(x.shape[:-1])
    if token_mask is None and given < num_tokens:
        token_mask = jnp.ones(x.shape[:-1], bool)

    def rows(array: Array, lead: int) -> Array:
        array = jnp.reshape(_compat.unsplit(array, mesh), (given, *array.shape[lead:]))
        if given == num_tokens:
            return array
        devices, rest = num_tokens // per_device, [(0, 0)] * (array.ndim - 1)
        array = jnp.pad(array, ((0, devices * share - given), *rest)).reshape(devices, share, *array.shape[1:])
        return jnp.pad(array, ((0, 0), (0, per_device - share), *rest)).reshape(num_tokens, *array.shape[2:])

    return jax.tree.map(functools.partial(rows, lead=x.ndim - 1), (x, token_mask, choices, router_x))


def _as_given(y: Array, share: int, per_device: int, lead: tuple[int, ...]) -> Array:
    """[N, X] -> [*lead, X]: what the layer made of the tokens of ``_as_tokens``, without padding."""
    num_tokens, width = y.shape
    given = math.prod(lead)
    if given < num_tokens:
        y = y.reshape(num_tokens // per_device, per_device, width)[:, :share].reshape(-1, width)[:given]
    return y.reshape(*lead, width)


def _split(spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """``spec`` without the axes of size 1, which split nothing."""
    return _compat.only_axes(spec, {axis for axis, size in mesh.shape.items() if size > 1})


def _check_key(key: Array) -> None:
    seed = key if type(key) is int else 0
    remedy = f"pass a random key, jax.random.key({seed})"
    check_array("key", key, remedy)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        check_shape("key", key, (), "one key; take one of several by index")
    else:  # a raw key
        check_dtype("key", key, ("uint32",), remedy)
        check_shape("key", key, jax.eval_shape(jax.random.PRNGKey, 0).shape, "one raw key", remedy)
