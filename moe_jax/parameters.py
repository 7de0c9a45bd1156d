"""The one table of the layer's parameters: their names, axes and first values. Data only: the oracle reads it too.

Whoever needs to know something about the parameters reads it here: how they are drawn and checked, how they lie on a
mesh (``moe_jax.layer.params``), which of them an expert multiplies first (``moe_jax.layer.experts``), and what the
oracle takes (``moe_jax.reference``). Nobody finds it out from the letters of a name.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One row of the table.

    Attributes:
      name: the key in ``params``.
      part: what it belongs to: "router", "experts" (the routed ones), "shared" or "constants".
      dims: the names of its axes, outermost first:
        "ids": E', what the router scores; "router_hidden": H_r, the width of what it sees, H if those are the tokens;
        "hidden": H; "expert_hidden": H of an expert, split over the plan's
        ``param_axes`` if there are any; "experts": E, split over the expert-parallel axes; "ffn": F, the width of a
        routed expert, split over tp; "shared_ffn": S, the width of the shared expert; "constants": Cc; "one": 1.
      role: its name inside one expert, such as "w_up", which is the same for routed and shared experts; "" where it
        belongs to no expert.
      into: "hidden" where it takes tokens to the inner activation, "output" where it takes the inner activation to the
        result; "" where it belongs to no expert.
      fan_in: the axis that a product sums over. First values are normal, of variance 1 / its extent; "": all are
        ``first``.
      first: the first value of every entry of a parameter without ``fan_in``.
      needs: the facts about a layer, all of which must hold for the layer to know this parameter: "gated" and
        "shared_gated" (the activation of routed or of shared experts multiplies two projections), "selection_bias" (the
        router has one), "shared" and "constants" (the plan has such experts).
      option: where a layer that knows the parameter also works without it, the argument of ``moe_on_mesh`` that asks
        for it; "" where the layer needs it.
    """

    name: str
    part: str
    dims: tuple[str, ...]
    role: str = ""
    into: str = ""
    fan_in: str = ""
    first: float = 0.0
    needs: frozenset[str] = frozenset()
    option: str = ""

    @property
    def optional(self) -> bool:
        """Whether a layer that knows the parameter also works without it."""
        return bool(self.option)


def _weight(name: str, role: str, into: str, part: str, dims: tuple[str, ...], *needs: str) -> Parameter:
    """A matrix of an expert, which sums over the last axis but one."""
    return Parameter(name=name, part=part, dims=dims, role=role, into=into, fan_in=dims[-2], needs=frozenset(needs))


def _bias(name: str, into: str, dims: tuple[str, ...], *needs: str) -> Parameter:
    """What a routed expert adds to a projection, if the layer is given one."""
    return Parameter(
        name=name, part="experts", dims=dims, role=name, into=into, needs=frozenset(needs), option="use_bias"
    )


def _constant(name: str) -> Parameter:
    """A row of each constant expert."""
    return Parameter(
        name=name, part="constants", dims=("constants", "hidden"), fan_in="hidden", needs=frozenset({"constants"})
    )


TABLE = (
    Parameter(name="router", part="router", dims=("router_hidden", "ids"), fan_in="router_hidden"),
    Parameter(name="router_bias", part="router", dims=("ids",), option="use_bias"),
    Parameter(name="selection_bias", part="router", dims=("ids",), needs=frozenset({"selection_bias"})),
    Parameter(name="expert_scale", part="router", dims=("ids",), first=1.0, option="expert_scale"),
    _weight("w_up", "w_up", "hidden", "experts", ("experts", "expert_hidden", "ffn")),
    _weight("w_gate", "w_gate", "hidden", "experts", ("experts", "expert_hidden", "ffn"), "gated"),
    _weight("w_down", "w_down", "output", "experts", ("experts", "ffn", "expert_hidden")),
    _bias("b_up", "hidden", ("experts", "ffn")),
    _bias("b_gate", "hidden", ("experts", "ffn"), "gated"),
    _bias("b_down", "output", ("experts", "expert_hidden")),
    _weight("shared_up", "w_up", "hidden", "shared", ("hidden", "shared_ffn"), "shared"),
    _weight("shared_gate", "w_gate", "hidden", "shared", ("hidden", "shared_ffn"), "shared", "shared_gated"),
    _weight("shared_down", "w_down", "output", "shared", ("shared_ffn", "hidden"), "shared"),
    Parameter(
        name="shared_router",
        part="shared",
        dims=("hidden", "one"),
        fan_in="hidden",
        needs=frozenset({"shared"}),
        option="gated_shared",
    ),
    _constant("const_alpha1"),
    _constant("const_alpha2"),
    _constant("const_v"),
)
BY_NAME = {row.name: row for row in TABLE}


def rows_of(part: str) -> tuple[Parameter, ...]:
    """The rows of one part of the layer."""
    return tuple(row for row in TABLE if row.part == part)


NAMES_OF_EXPERTS = frozenset(row.name for row in rows_of("experts"))  # of which each routed expert has a row


def weights_of(part: str, params: Mapping[str, Value]) -> dict[str, Value]:
    """The entries of ``params`` for one part of the layer: by role where the part is an expert, else by name.

    >>> from moe_jax.parameters import weights_of
    >>> weights_of("shared", {"router": 1, "w_up": 2, "shared_up": 3})
    {'w_up': 3}
    """
    return {row.role or row.name: params[row.name] for row in TABLE if row.part == part and row.name in params}
