"""The rules of a plan's arguments, each as a list of what breaks it."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from moe_jax import quant
from moe_jax.activations import Choice, check_activation
from moe_jax.errors import (
    InvalidArgumentError,
    MoEError,
    UnsupportedError,
    check_count,
    check_flag,
    choice_violations,
    count_violations,
)
from moe_jax.hardware import Machine, find_machine
from moe_jax.hardware.ascend import ANY, PRODUCTS
from moe_jax.kernels import FLOAT_DTYPES, resolve_backend, table

_WEIGHTLESS = ("num_zero_experts", "num_copy_experts", "num_const_experts")
_AT_LEAST_ONE = ("hidden", "num_experts", "top_k")  # other sizes may be 0


def whole_sizes(sizes: Mapping[str, Any]) -> dict[str, int]:
    """Those sizes that are legal by themselves, as Python's own numbers. Rules can compare these."""
    return {name: int(value) for name, value in sizes.items() if not count_violations(name, value, _least(name))}


def shard_violations(hidden: Any, num_shards: int) -> list[str]:
    """What is wrong with weights that are to be split along ``param_axes`` into ``num_shards`` parts."""
    if count_violations("hidden", hidden, 1) or hidden % num_shards == 0:
        return []
    return [f"hidden={hidden} must be divisible by {num_shards}, the number of devices along param_axes"]


def _least(name: str) -> int:
    """The smallest value that the size ``name`` may have."""
    return int(name in _AT_LEAST_ONE)


def check_shared(
    plan: Any, shared_ffn: int | None, shared_activation: Choice | None, gated_shared: bool = False
) -> None:
    """Raises unless a shared expert can have this width and activation, and ``plan`` has one where either is given."""
    if shared_ffn is not None:
        check_count("shared_ffn", shared_ffn)
    if shared_activation is not None:
        check_activation(shared_activation, "shared_activation")
    check_flag("gated_shared", gated_shared)
    given = {"shared_ffn": shared_ffn, "shared_activation": shared_activation, "gated_shared": gated_shared or None}
    words = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    if words and not plan.num_shared_experts:
        raise InvalidArgumentError(
            f"{', '.join(words)}: the plan has no shared expert; make it with num_shared_experts=1, or leave this out"
        )


def width_of_shared(plan: Any, ffn: int, shared_ffn: int | None) -> int:
    """S, the width of the shared expert; 0 where ``plan`` has none. Without ``shared_ffn`` it is F for each of them."""
    return ffn * plan.num_shared_experts if shared_ffn is None else int(shared_ffn)


def size_violations(mesh_sizes: tuple[int, int] | None, sizes: Mapping[str, Any]) -> list[str]:
    """The rules that sizes break, by themselves and between them, with the names of the arguments.

    A rule between several sizes is checked as soon as each of them is legal by itself.

    Args:
      mesh_sizes: (ep, tp); None where the mesh is not one.
      sizes: all arguments of ``make_plan`` that are sizes.
    """
    found = [text for name in sizes for text in count_violations(name, sizes[name], _least(name))]
    number = whole_sizes(sizes)
    tokens, experts, top_k = (number.get(name) for name in ("tokens_per_rank", "num_experts", "top_k"))
    shared, shared_ranks = number.get("num_shared_experts"), number.get("num_shared_ranks")
    weightless = [number[name] for name in _WEIGHTLESS if name in number]
    if shared is not None and shared_ranks and (not shared or shared_ranks % shared):
        found.append(
            f"num_shared_ranks={shared_ranks} must be a multiple of num_shared_experts={shared}, which must not be 0"
        )
    if experts is not None and len(weightless) == len(_WEIGHTLESS):
        num_ids = experts + sum(weightless)
        if top_k is not None and top_k > num_ids:
            counted = f"num_experts={experts}" if num_ids == experts else f"the {num_ids} experts of all kinds"
            found.append(f"top_k={top_k} exceeds {counted}; lower top_k")
        if num_ids >= 2**31:
            found.append(f"num_experts={experts}: all kinds together must stay below 2**31: ids are 32-bit integers")
    if mesh_sizes is None:
        return found
    ep_size, tp_size = mesh_sizes
    if shared_ranks is not None:
        holders = ep_size - shared_ranks  # ranks that hold routed experts
        if holders < 1:
            found.append(
                f"num_shared_ranks={shared_ranks} leaves none of ep={ep_size} ranks for routed experts; lower it"
            )
        elif experts is not None and experts % holders:
            fitting = (experts // holders + 1) * holders
            ranks = f"ep={ep_size}" if not shared_ranks else f"the {holders} ranks that hold routed experts"
            found.append(f"num_experts={experts} is not divisible by {ranks}; use {fitting} experts or another ep")
    if tokens is None or top_k is None or shared is None:
        return found
    if tp_size * ep_size * tokens * (top_k + shared) >= 2**31:
        found.append(f"tokens_per_rank={tokens}: ep * tp * T * K must stay below 2**31; use more devices")
    return found


def dtype_violations(dtype: Any) -> list[str]:
    """Empty if rows may have this dtype."""
    try:
        word = str(jnp.dtype(dtype))
    except (TypeError, ValueError):  # no dtype at all
        word = ""
    return [] if word in FLOAT_DTYPES else choice_violations("dtype", dtype, FLOAT_DTYPES)


def backend_violations(backend: Any) -> list[str]:
    """Empty if the back end is known, is installed and has every kernel."""
    unknown = table.backend_violations(backend)
    if unknown or backend == "auto":  # "auto" has every kernel, and must not ask JAX for devices if a machine is named
        return unknown
    found = []
    for kernel in table.KERNELS:
        try:
            resolve_backend(kernel, backend)
        except UnsupportedError as error:
            found.append(str(error))
    return found


def recipe_violations(hidden: Any, names: Mapping[str, Any]) -> list[str]:
    """What is wrong with recipes: they do not exist, need a scale of the caller's, or cannot store the width."""
    found = []
    for argument, name in names.items():
        unknown = choice_violations(argument, name, quant.NAMES)
        found += unknown
        if unknown or name == "none":
            continue
        chosen = quant.recipe(name, "float32")
        assert chosen is not None  # only "none" has no recipe
        if argument != "quant" and chosen.needs_smooth:
            found.append(f"{argument}={name!r} multiplies by a scale that only dispatch is given; take another recipe")
        if not count_violations("hidden", hidden) and hidden % chosen.format.columns_per_value:
            found.append(f"{argument}={name!r} stores two columns in a byte: hidden={hidden} must be even")
    return found


_QUANT_MODES = {"none": 0, "int8_static": 1, "int8": 2, "fp8_e4m3": 2, "fp8_e5m2": 2}  # of dispatch
_COMBINE_MODES = {"none": 0, "int8_group8": 2, "mx_e5m2": 3, "mx_e4m3": 4}
_OUTPUTS = {"int8": "int8", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn"}


def product_violations(
    product: Any,
    mesh_sizes: tuple[int, int] | None,
    dtype: Any,
    transport: Any,
    recipes: Mapping[str, Any],
    sizes: Mapping[str, Any],
) -> list[str]:
    """What CANN's operators do not take on the hardware ``product``. The limits are in ``moe_jax.hardware.ascend``.

    A value that is no size, recipe or dtype at all is left out here: other rules name it.
    """
    if product is None:
        return []
    found = choice_violations("product", product, PRODUCTS)
    if found:
        return found
    number = whole_sizes(sizes)
    known = {name: value for name, value in recipes.items() if isinstance(value, str) and value in quant.NAMES}
    values = {
        quantity: (f"{argument}={number[argument]}", number[argument])
        for quantity, argument in _QUANTITIES.items()
        if argument in number
    }
    if mesh_sizes is not None:
        ep_size, tp_size = mesh_sizes
        values["ep_world_size"] = (f"mesh: ep={ep_size}", ep_size)
        values["tp_world_size"] = (f"mesh: tp={tp_size}", tp_size if tp_size > 1 else 0)
        holders = ep_size - number.get("num_shared_ranks", ep_size)
        if holders > 0 and "num_experts" in number:
            local = number["num_experts"] // holders
            values["local_experts"] = (f"num_experts={number['num_experts']} on {holders} ranks", local)
            values["experts_by_ranks"] = (f"{local} experts per rank times ep={ep_size}", local * ep_size)
            if tp_size > 1:
                values["local_experts_with_tp"] = (f"tp={tp_size} with {local} experts per rank", local)
    if "quant" in known:
        values["quant_mode"] = (f"quant={known['quant']!r}", _quant_mode(known["quant"]))
    if "combine_quant" in known:
        back = known["combine_quant"]
        values["comm_quant_mode"] = (f"combine_quant={back!r}", _COMBINE_MODES.get(back, -1))
    for operator in ("moe_distribute_dispatch_v4", "moe_distribute_combine_v4"):
        # Of CANN's algorithms only "hierarchy" has the name of a transport: all others have the limits of its default.
        limits = PRODUCTS[product][operator].under(transport)
        for quantity, legal in {**ANY[operator].values, **limits.values}.items():
            what, value = values.get(quantity, ("", None))
            if value is not None and not legal.allows(value):
                found.append(f"{what} is not legal on product={product!r}: {quantity} must be {legal}")
        rows = limits.dtypes.get("x", limits.dtypes.get("expand_x", ()))
        if rows and not dtype_violations(dtype) and str(jnp.dtype(dtype)) not in rows:
            found.append(f"dtype={dtype!r} is not legal on product={product!r}: rows are {' or '.join(rows)}")
        if "quant" not in known:
            continue
        out = known["quant"]
        outputs = limits.dtypes.get(f"y_dtype:{_quant_mode(out)}")
        if outputs and next(name for part, name in _OUTPUTS.items() if part in out) not in outputs:
            found.append(f"quant={out!r} is not legal on product={product!r}: it makes {' or '.join(outputs)}")
    return list(dict.fromkeys(found))


_QUANTITIES = {
    "moe_expert_num": "num_experts",
    "tokens": "tokens_per_rank",
    "hidden": "hidden",
    "top_k": "top_k",
    "shared_expert_num": "num_shared_experts",
    "shared_expert_rank_num": "num_shared_ranks",
    "zero_expert_num": "num_zero_experts",
    "copy_expert_num": "num_copy_experts",
    "const_expert_num": "num_const_experts",
}


def _quant_mode(name: str) -> int:
    """The quant_mode of CANN's dispatch for a recipe; -1 where there is none."""
    if name in _QUANT_MODES:
        return _QUANT_MODES[name]
    if name == "int8_group8":
        return -1
    return 3 if name.endswith("group128") else 5 if name.startswith("mx_clip") else 4


def capacity_violations(capacity_factor: Any) -> list[str]:
    """Empty if the factor is None, or a number by which a capacity can be multiplied."""
    if capacity_factor is None:
        return []
    if isinstance(capacity_factor, bool) or not isinstance(capacity_factor, numbers.Real):
        return [f"capacity_factor={capacity_factor!r} must be a number, or None for the plan's own choice"]
    factor: Any = capacity_factor
    if not 0 < factor < math.inf:
        return [f"capacity_factor={capacity_factor!r} must be positive and finite; 1.0 is a perfectly balanced load"]
    return []


def find_hardware(hardware: Any) -> tuple[Machine | None, list[str]]:
    """The machine that ``hardware`` is, names, or describes in a TOML file; or None and why there is none."""
    if isinstance(hardware, Machine):
        return hardware, []
    try:
        return find_machine(hardware), []
    except MoEError as error:
        return None, [str(error)]


def machine_from(hardware: str | Machine) -> Machine:
    """The machine of ``find_hardware``; raises InvalidArgumentError where there is none."""
    machine, wrong = find_hardware(hardware)
    if machine is None:
        raise InvalidArgumentError("; ".join(wrong))
    return machine


def platform_violations(mesh: Mesh | AbstractMesh, machine: Machine) -> list[str]:
    """Empty if a plan for ``machine`` can be traced on ``mesh``: one without devices, of CPUs, or of its platform."""
    here = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else machine.platform
    if here in ("cpu", machine.platform):
        return []
    text = (
        f"hardware={machine.name!r} is of platform {machine.platform!r} and the mesh has {here!r} devices; leave "
        "hardware out, or make the plan on an AbstractMesh or on emulated CPU devices"
    )
    return [text]
