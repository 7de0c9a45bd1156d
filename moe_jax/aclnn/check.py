"""One call against all rules of its operator, in CANN's order: null pointers, dtypes, everything else."""

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.aclnn.rules import (
    DTYPE,
    NULL,
    REST,
    WORDS,
    Call,
    Rules,
    canonical,
    check_shape,
    dtype_name,
    make_error,
    marked,
    on,
    shown,
)
from moe_jax.errors import (
    DtypeError,
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    UnsupportedError,
    suggest,
)
from moe_jax.hardware.ascend import PRODUCTS, QUANTITIES
from moe_jax.hardware.ascend.legal import Legal

_GROUP_LENGTH = 128  # the name of a group is shorter than this


def check(call: Call, rules: Rules, parameters: Mapping[str, inspect.Parameter], needs: tuple[str, ...]) -> None:
    """Raises the first error of ``call``, in the order null, dtype, everything else; ``needs`` must not be None."""
    marked("product", call.product, _check_product, call, rules)
    for stage in (NULL, DTYPE, REST):
        if stage == NULL:
            _check_nulls(call, needs)
        elif stage == DTYPE:
            _check_dtypes(call)
        else:
            _check_kinds(call, rules, parameters)
            _check_shapes(call, rules)
            _check_values(call, rules, product=None)
        for rule in rules.rules:
            if rule.stage == stage:
                rule(call)
        _check_groups(call, rules, stage)
    if call.product is not None:
        _check_values(call, rules, product=call.product)
    for rule in rules.last_rules:
        rule(call)


def _check_product(call: Call, rules: Rules) -> None:
    if call.product is None:
        return
    if not isinstance(call.product, str) or call.product not in PRODUCTS:
        raise InvalidArgumentError(f"product={call.product!r} is unknown; {suggest(call.product, PRODUCTS)}, or None")
    if call.operator not in PRODUCTS[call.product].operators:
        have = [name for name, product in PRODUCTS.items() if call.operator in product.operators]
        raise make_error(
            UnsupportedError,
            f"product={call.product!r} does not have {call.operator}; {', '.join(have)} do, or pass product=None",
            rules.missing_product,
        )


def _check_nulls(call: Call, needs: tuple[str, ...]) -> None:
    for name in needs:
        if (call.arrays[name] if name in call.arrays else call[name]) is None:
            marked(f"null:{name}", None, _raise_missing, name, f"{call.operator} needs it")
    for product, base, limits in call.tables():
        missing = [name for name in limits.required if not call.given(name)]
        for name in missing if missing and call.in_range("comm_alg") else ():
            alg = call["comm_alg"]
            rule = f"null:{name}" + ("" if name in base.required else f"@{alg}")
            marked(rule, product, _raise_missing, name, f"comm_alg={alg!r} needs it{on(product)}")


def _raise_missing(name: str, why: str) -> None:
    raise MissingArgumentError(f"{name} is None, but {why}; pass it")


def _check_groups(call: Call, rules: Rules, stage: str) -> None:
    names = (rules.group, "group_tp") if "group_tp" in call.attributes else (rules.group,)
    for name in filter(None, names):
        if stage == NULL and name == rules.group:
            marked(f"null:{name}", None, _check_group_given, name, call[name])
        if stage == rules.long_group[0]:
            marked("group_length", None, _check_group_length, name, call[name], rules.long_group[1])


def _check_group_given(name: str, group: Any) -> None:
    if isinstance(group, (str, tuple)) and not group:
        raise MissingArgumentError(f"{name}={group!r} is empty; pass a mesh axis's name")


def _check_group_length(name: str, group: Any, status: int) -> None:
    for part in group if isinstance(group, tuple) else (group,):
        if isinstance(part, str) and len(part) >= _GROUP_LENGTH:
            raise make_error(
                InvalidArgumentError,
                f"{name}={part!r} has {len(part)} characters; a group's name has fewer than {_GROUP_LENGTH}, "
                f"so {_GROUP_LENGTH - 1} at most",
                status,
            )


def _check_dtypes(call: Call) -> None:
    for name in filter(call.given, call.arrays):
        marked(f"dtype:{name}", None, _check_is_array, name, call.arrays[name])
    for product, _, limits in call.tables():
        for key, allowed in limits.dtypes.items():
            marked(f"dtype:{key}", product, _check_dtype, call, key, allowed, product)


def _check_is_array(name: str, array: Any) -> None:
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise DtypeError(f"{name}={array!r} is no array; pass a jax or numpy array, or a jax.ShapeDtypeStruct")


def _check_dtype(call: Call, key: str, allowed: tuple[str, ...], product: str | None) -> None:
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
        raise DtypeError(f"{name} has dtype {dtype}; it must be {' or '.join(allowed)}{with_mode}{on(product)}")


def _check_kinds(call: Call, rules: Rules, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Attributes are whole numbers, flags, words or names of groups, as their annotations say; Any is not looked at."""
    for name, value in call.attributes.items():
        annotation = parameters[name].annotation if name in parameters else int
        if name in ("group_tp", rules.group):
            parts = value if isinstance(value, tuple) else (value,)
            legal, kind = all(isinstance(part, str) for part in parts), "a mesh axis's name, or a tuple of some"
        elif name in WORDS:
            legal, kind = isinstance(value, str), "a word, or None"
        elif annotation is bool:
            legal, kind = isinstance(value, (bool, np.bool_)), "True or False"
        elif annotation is int:
            legal, kind = isinstance(value, (int, np.integer)) and not isinstance(value, bool), "a whole number"
        else:
            continue
        if not legal:
            marked("kind", None, _raise_kind, name, value, kind)
    if call["hccl_buffsize"] < 1:
        marked("hccl_buffsize", None, _raise_kind, "hccl_buffsize", call["hccl_buffsize"], "at least 1, in MB")


def _raise_kind(name: str, value: Any, kind: str) -> None:
    raise InvalidArgumentError(f"{name}={value!r} must be {kind}")


def _check_shapes(call: Call, rules: Rules) -> None:
    extents = {letter: extent(call) for letter, extent in rules.letters.items()}
    for name, shape in rules.shapes.items():
        if not call.given(name):
            continue
        alternatives = (shape if isinstance(shape, str) else shape(call)).split(" | ")
        found = call.shape(name)
        legal = [
            tuple(int(letter) if letter.isdigit() else extents.get(letter) for letter in one.split())
            for one in alternatives
        ]
        marked(f"shape:{name}", None, check_shape, name, found, tuple(legal))
        for letters in alternatives:
            if len(letters.split()) == len(found):
                extents = dict(zip(letters.split(), found, strict=True)) | extents


def _check_values(call: Call, rules: Rules, product: str | None) -> None:
    """Raises where a quantity is outside the table of ``product``, or an array is given that is not taken there."""
    base, limits = next((base, limits) for owner, base, limits in call.tables() if owner == product)
    for name in limits.absent:
        variant = "" if name in base.absent else f"@{call['comm_alg']}"
        marked(f"absent:{name}{variant}", product, _check_absent, call, name, limits.why.get(name))
    for name, legal in limits.values.items():
        rule = name if base.values.get(name) == legal else f"{name}@{call['comm_alg']}"
        marked(rule, product, _check_value, call, rules, name, legal, product)


def _check_absent(call: Call, name: str, why: str | None) -> None:
    if call.given(name):
        alg = f" with comm_alg={call['comm_alg']!r}" if call.attributes.get("comm_alg") else ""
        came = getattr(call.arrays[name], "shape", call.arrays[name])
        raise InvalidArgumentError(
            f"{name} was given, with shape {came}; {call.operator} takes none{on(call.product)}{alg}"
            f"{f': {why}' if why else ''}; pass None"
        )


def _check_value(call: Call, rules: Rules, name: str, legal: Legal, product: str | None) -> None:
    if name in rules.quantities:
        quantity = rules.quantities[name]
        if callable(quantity):
            found = quantity(call)
        else:
            array, axis = quantity
            found = (shown(call, array), call.shape(array)[axis]) if call.given(array) else None
        if found is None or legal.allows(found[1]):
            return
        source, value = found
        raise ShapeError(
            f"{source}: {value} = {QUANTITIES[name]}, must be {legal}{on(product)}; "
            f"the nearest legal value is {legal.nearest(value)!r}"
        )
    value = call[name]
    if not legal.allows(value):
        raise InvalidArgumentError(
            f"{name}={value!r} must be {legal}{on(product)}; the nearest legal value is {legal.nearest(value)!r}"
        )
