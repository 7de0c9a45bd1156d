"""The checks of the host-side first phase: a call, its rules in the reference's order, and the codes they raise.

Null pointers come first, then dtypes, then everything else, as section 1.1 of the reference sheet says. What holds on
one product, and what holds on all, is data in ``moe_jax.hardware.ascend``; relations between arguments are ``Rule`` s.
Every error carries ``status``, the reference's code, ``rule``, the name of the rule, and ``product``: the product that
has this rule, or None where nothing else is possible.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import _compat
from moe_jax.errors import (
    DtypeError,
    InvalidArgumentError,
    MeshError,
    MissingArgumentError,
    MoEError,
    ShapeError,
    UnsupportedError,
    suggest,
)
from moe_jax.hardware.ascend import ANY, PRODUCTS, QUANTITIES, Limits

NULL, DTYPE, REST = "null", "dtype", "rest"
NULL_POINTER, BAD_PARAMETER, BAD_VALUE = 161001, 161002, 561002
GROUP_LENGTH = 128  # a group's name is shorter
_WORDS = ("comm_alg",)  # attributes that are words


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a first phase: arrays or their shapes, and attributes, by the parameters' names."""

    operator: str
    product: str | None
    arrays: Mapping[str, Any]
    attributes: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """The attribute ``name``."""
        return self.attributes[name]

    def given(self, name: str) -> bool:
        """Whether the array ``name`` was passed."""
        return self.arrays.get(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the array ``name``."""
        return tuple(self.arrays[name].shape)

    def dtype(self, name: str) -> str:
        """The name of the dtype of the array ``name``."""
        return jnp.dtype(self.arrays[name].dtype).name

    def on(self, *products: str | None) -> bool:
        """Whether the call is for one of ``products``."""
        return self.product in products

    def in_range(self, name: str) -> bool:
        """Whether the attribute ``name`` is what every table in force allows."""
        value, legal = self[name], [limits.values[name] for _, _, limits in self.tables() if name in limits.values]
        kind = str if name in _WORDS else (int, np.integer)
        return isinstance(value, kind) and not isinstance(value, bool) and all(one.allows(value) for one in legal)

    def tables(self) -> Iterator[tuple[str | None, Limits, Limits]]:
        """Every table in force, the one that always holds first: its product, its base, and itself."""
        base = ANY[self.operator]
        yield None, base, base
        if self.product is not None:
            base = PRODUCTS[self.product].operators[self.operator]
            yield self.product, base, base.under(self.attributes.get("comm_alg"))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A relation between arguments: ``check`` raises where it is broken."""

    name: str
    section: str  # of the reference sheet
    check: Callable[[Call], None]
    stage: str = REST
    products: tuple[str, ...] | None = None  # None: whatever the product
    about: str | None = None  # a parameter; versions without it have no such rule
    depends_on: str | None = None  # an attribute; where it is out of its own range, that is what is wrong, not this

    def __call__(self, call: Call) -> None:
        """Raises if the rule is in force and broken."""
        if self.depends_on is not None and not call.in_range(self.depends_on):
            return
        if self.products is None or call.product in self.products:
            _marked(self.name, call.product if self.products else None, self.check, call)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """How one operator's calls are checked."""

    arrays: tuple[str, ...]
    needs: tuple[str, ...]  # arrays and attributes that must be given
    group: str | None = None  # its name is 1 to 127 characters long
    long_group: tuple[str, int] = (DTYPE, BAD_PARAMETER)  # when a longer one is found, and its code
    flags: tuple[str, ...] = ()  # attributes that are True or False
    free: tuple[str, ...] = ()  # attributes that are neither whole numbers nor flags
    shapes: Mapping[str, Callable[[Call], tuple[tuple[Any, ...], ...]]]  # legal shapes by array; None: any extent
    quantities: Mapping[str, Callable[[Call], tuple[str, int] | None]]  # where from, and how much; None: not there
    rules: tuple[Rule, ...] = ()
    last_rules: tuple[Rule, ...] = ()  # those that follow the product's table
    missing_product: int = BAD_VALUE  # the code on a product that does not have it

    def without(self, parameters: tuple[str, ...]) -> "Operator":
        """How calls of a version are checked that does not have ``parameters``; they count as not given."""
        return dataclasses.replace(
            self,
            shapes={name: shapes for name, shapes in self.shapes.items() if name not in parameters},
            rules=tuple(rule for rule in self.rules if rule.about not in parameters),
            last_rules=tuple(rule for rule in self.last_rules if rule.about not in parameters),
        )


def make_error(kind: type[MoEError], text: str, status: int | None = None) -> MoEError:
    """An error whose ``status`` is the reference's, where that is not the one of its class."""
    error = kind(text)
    if status is not None:
        error.status = status
    return error


def check(call: Call, operator: Operator) -> None:
    """Raises the first error of ``call``, in the order null, dtype, everything else."""
    _marked("product", call.product, _check_product, call, operator)
    for stage, steps in ((NULL, (_nulls,)), (DTYPE, (_dtypes,)), (REST, (_kinds, _shapes, _values_anywhere))):
        for step in steps:
            step(call, operator)
        for rule in operator.rules:
            if rule.stage == stage:
                rule(call)
        if stage == NULL or stage == operator.long_group[0]:
            _groups(call, operator, stage)
    _values_of_product(call, operator)
    for rule in operator.last_rules:
        rule(call)


def _values_anywhere(call, operator):
    _check_values(call, operator, [table for table in call.tables() if table[0] is None])


def _values_of_product(call, operator):
    _check_values(call, operator, [table for table in call.tables() if table[0] is not None])


def _check_values(call, operator, tables):
    """Raises where a quantity is outside its table, or an array is given that is not taken."""
    for owner, base, limits in tables:
        for name in limits.absent:
            variant = "" if name in base.absent else f"@{call['comm_alg']}"
            _marked(f"absent:{name}{variant}", owner, _check_absent, call, name, limits.why.get(name))
        for name, legal in limits.values.items():
            rule = name if base.values.get(name) == legal else f"{name}@{call['comm_alg']}"
            _marked(rule, owner, _check_value, call, operator, name, legal, owner)


def where(product: str | None) -> str:
    """A clause that says whose rule it is."""
    return f" on {product}" if product else ""


def _marked(name: str, product: str | None, function: Callable, *arguments: Any) -> None:
    try:
        function(*arguments)
    except MoEError as error:
        if not hasattr(error, "rule"):
            error.rule, error.product = name, product
        raise


def _check_product(call, operator):
    if call.product is None:
        return
    if not isinstance(call.product, str) or call.product not in PRODUCTS:
        raise InvalidArgumentError(f"product={call.product!r} is unknown; {suggest(call.product, PRODUCTS)}, or None")
    if call.operator not in PRODUCTS[call.product].operators:
        have = [name for name, product in PRODUCTS.items() if call.operator in product.operators]
        raise make_error(
            UnsupportedError,
            f"product={call.product!r} does not have {call.operator}; {', '.join(have)} do, or pass product=None",
            operator.missing_product,
        )


def _nulls(call, operator):
    for name in operator.needs:
        value = call.arrays[name] if name in operator.arrays else call[name]
        if value is None:
            _marked(f"null:{name}", None, _raise_missing, name, f"{call.operator} needs it")
    for product, base, limits in call.tables():
        missing = [name for name in limits.required if not call.given(name)]
        for name in missing if missing and call.in_range("comm_alg") else ():
            alg = call["comm_alg"]
            rule = f"null:{name}" + ("" if name in base.required else f"@{alg}")
            _marked(rule, product, _raise_missing, name, f"comm_alg={alg!r} needs it{where(product)}")


def _raise_missing(name, why):
    raise MissingArgumentError(f"{name} is None, but {why}; pass it")


def _groups(call, operator, stage):
    names = (operator.group, "group_tp") if "group_tp" in call.attributes else (operator.group,)
    for name in filter(None, names):
        if stage == NULL and name == operator.group:
            _marked(f"null:{name}", None, _check_group_given, name, call[name])
        if stage == operator.long_group[0]:
            _marked("group_length", None, _check_group_length, name, call[name], operator.long_group[1])


def _check_group_given(name, group):
    if isinstance(group, (str, tuple)) and not group:
        raise MissingArgumentError(f"{name}={group!r} is empty; pass a mesh axis's name")


def _check_group_length(name, group, status):
    for part in group if isinstance(group, tuple) else (group,):
        if isinstance(part, str) and len(part) >= GROUP_LENGTH:
            raise make_error(
                InvalidArgumentError,
                f"{name}={part!r} has {len(part)} characters; a group's name has fewer than {GROUP_LENGTH}, "
                f"so {GROUP_LENGTH - 1} at most",
                status,
            )


def _dtypes(call, operator):
    for name in operator.arrays:
        if call.given(name):
            _marked(f"dtype:{name}", None, _check_is_array, name, call.arrays[name])
    for product, _, limits in call.tables():
        for key, allowed in limits.dtypes.items():
            _marked(f"dtype:{key}", product, _check_dtype, call, key, allowed, product)


def _check_is_array(name, array):
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise DtypeError(f"{name}={array!r} is no array; pass a jax or numpy array, or a jax.ShapeDtypeStruct")


def _check_dtype(call, key, allowed, product):
    name, _, mode = key.partition(":")
    if mode and not (call["quant_mode"] == int(mode) and call.in_range("quant_mode")):
        return
    if name in call.attributes:
        dtype = dtype_name(name, call[name])
    else:
        dtype = call.dtype(name) if call.given(name) else None
    allowed = tuple(dict.fromkeys((*allowed, *map(canonical, allowed))))
    if dtype is not None and dtype not in allowed:
        with_mode = f" with quant_mode={mode}" if mode else ""
        raise DtypeError(f"{name} has dtype {dtype}; it must be {' or '.join(allowed)}{with_mode}{where(product)}")


def canonical(dtype: Any) -> str:
    """What JAX makes of a dtype: of int64 int32, unless 64-bit types are enabled."""
    return jax.dtypes.canonicalize_dtype(dtype).name


def dtype_name(name: str, dtype: Any) -> str | None:
    """The name of the dtype that the attribute ``name`` asks for; None for None."""
    try:
        return None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        raise DtypeError(f"{name}={dtype!r} is no dtype; pass one such as 'int8' or 'float8_e4m3fn'") from None


def _kinds(call, operator):
    """Attributes are whole numbers, flags or names."""
    for name, value in call.attributes.items():
        if name in operator.free:
            continue
        if name in operator.flags:
            legal, kind = isinstance(value, (bool, np.bool_)), "True or False"
        elif name in _WORDS:
            legal, kind = isinstance(value, str), "a word, or None"
        elif name in ("group_tp", operator.group):
            parts = value if isinstance(value, tuple) else (value,)
            legal, kind = all(isinstance(part, str) for part in parts), "a mesh axis's name, or a tuple of some"
        else:
            legal, kind = isinstance(value, (int, np.integer)) and not isinstance(value, bool), "a whole number"
        if not legal:
            _marked("kind", None, _raise_kind, name, value, kind)
    if call["hccl_buffsize"] < 1:
        _marked("hccl_buffsize", None, _raise_kind, "hccl_buffsize", call["hccl_buffsize"], "at least 1, in MB")


def _raise_kind(name, value, kind):
    raise InvalidArgumentError(f"{name}={value!r} must be {kind}")


def _shapes(call, operator):
    for name, shapes in operator.shapes.items():
        if call.given(name):
            _marked(f"shape:{name}", None, check_shape, name, call.shape(name), shapes(call))


def check_shape(name: str, shape: tuple[int, ...], legal: tuple[tuple[Any, ...], ...]) -> None:
    """Raises ShapeError unless ``shape`` is one of ``legal``, where None allows any extent."""
    for candidate in legal:
        if len(candidate) == len(shape) and all(b in (None, a) for a, b in zip(shape, candidate, strict=True)):
            return
    shown = " or ".join(str(tuple("any" if n is None else n for n in one)).replace("'", "") for one in legal)
    raise ShapeError(f"{name} has shape {shape}; it must be {shown} to fit the other arguments")


def group_size_rule(group: str, size: str, section: str, is_used: Callable[[Call], bool] = lambda call: True) -> Rule:
    """The attribute ``size`` is the number of ranks of ``group``, where that is bound: while a program is traced."""

    def check(call):
        axes = call[group] if isinstance(call[group], tuple) else (call[group],)
        bound = [_compat.bound_axis_size(axis) if isinstance(axis, str) else None for axis in axes]
        if None not in bound and math.prod(bound) != call[size] and is_used(call):
            raise MeshError(
                f"{size}={call[size]}, but {group}={call[group]!r} has {math.prod(bound)} ranks here; pass the size of "
                "the mesh axis"
            )

    return Rule(f"group_size:{group}", section, check)


def _check_absent(call, name, why):
    if call.given(name):
        alg = f" with comm_alg={call['comm_alg']!r}" if call.attributes.get("comm_alg") else ""
        came = getattr(call.arrays[name], "shape", call.arrays[name])
        raise InvalidArgumentError(
            f"{name} was given, with shape {came}; {call.operator} takes none{where(call.product)}{alg}"
            f"{f': {why}' if why else ''}; pass None"
        )


def _check_value(call, operator, name, legal, product):
    if name in operator.quantities:
        found = operator.quantities[name](call)
        if found is None or legal.allows(found[1]):
            return
        source, value = found
        raise ShapeError(
            f"{source}: {value} = {QUANTITIES[name]}, must be {legal}{where(product)}; "
            f"the nearest legal value is {legal.nearest(value)!r}"
        )
    value = call[name]
    if not legal.allows(value):
        raise InvalidArgumentError(
            f"{name}={value!r} must be {legal}{where(product)}; the nearest legal value is {legal.nearest(value)!r}"
        )
