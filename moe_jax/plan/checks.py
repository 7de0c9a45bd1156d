"""The rules of a plan's arguments, each as a list of what breaks it."""

import math
import numbers

import jax.numpy as jnp
import numpy as np

from moe_jax import quant
from moe_jax.errors import UnsupportedError, choice_violations, count_violations
from moe_jax.kernels import FLOAT_DTYPES, backend_names, resolve_backend
from moe_jax.kernels.table import KERNELS


def size_violations(ep_size: int, tp_size: int, **sizes: tuple[object, int]) -> list[str]:
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


def dtype_violations(dtype) -> list[str]:
    try:
        word = str(jnp.dtype(dtype))
    except (TypeError, ValueError):  # no dtype at all
        word = ""
    return [] if word in FLOAT_DTYPES else choice_violations("dtype", dtype, FLOAT_DTYPES)


def backend_violations(backend) -> list[str]:
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


def recipe_violations(hidden, **names) -> list[str]:
    """Recipes that do not exist, need a scale that only the caller of dispatch has, or cannot store the width."""
    found = []
    for argument, name in names.items():
        unknown = choice_violations(argument, name, quant.NAMES)
        found += unknown
        if unknown or name == "none":
            continue
        chosen = quant.recipe(name, "float32")
        if argument != "quant" and chosen.needs_smooth:
            found.append(f"{argument}={name!r} multiplies by a scale that only dispatch is given; take another recipe")
        if not count_violations("hidden", hidden) and hidden % chosen.format.columns_per_value:
            found.append(f"{argument}={name!r} stores two columns in a byte: hidden={hidden} must be even")
    return found


def unavailable(**options) -> list[str]:
    """Options of the operator family that this version does not serve; anything but their default is refused."""
    found = []
    for name, (value, default) in options.items():
        plain = value.item() if isinstance(value, np.generic) else value
        if type(plain) is not type(default) or plain != default:
            found.append(f"{name}={value!r} is not available in this version; leave it at {default!r}")
    return found


def capacity_violations(capacity_factor) -> list[str]:
    if capacity_factor is None:
        return []
    if isinstance(capacity_factor, bool) or not isinstance(capacity_factor, numbers.Real):
        return [f"capacity_factor={capacity_factor!r} must be a number, or None for the plan's own choice"]
    if not 0 < capacity_factor < math.inf:
        return [f"capacity_factor={capacity_factor!r} must be positive and finite; 1.0 is a perfectly balanced load"]
    return []
