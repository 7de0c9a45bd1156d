"""Checks one call by all rules of its operator, in the order of section 1.1 of the CANN sheet.

Null pointers come first, then dtypes, then everything else: kinds of attributes, shapes, values that have a meaning
anywhere, relations, the product's own values, the relations that follow from those, and the buffer.
"""

import inspect
from collections.abc import Mapping

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
)
from moe_jax.aclnn.workspace import sizes
from moe_jax.errors import (
    DtypeError,
    InvalidArgumentError,
    MissingArgumentError,
    ShapeError,
    UnsupportedError,
    suggest,
)
from moe_jax.hardware.ascend import PRODUCTS, megabytes
from moe_jax.hardware.ascend.legal import Legal

_GROUP_LENGTH = 128  # the name of a group is shorter than this


def check(call: Call, rules: Rules, parameters: Mapping[str, inspect.Parameter], needs: tuple[str, ...]) -> None:
    """Raises the error of the first rule that ``call`` breaks; ``needs`` are the arguments that must not be None."""
    _check_product(call, rules)
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
    _check_buffer(call)


def _check_product(call: Call, rules: Rules) -> None:
    """Checks that the product is known, and that it has the operator."""
    if call.product is None:
        return
    with marked("product", call.product):
        if not isinstance(call.product, str) or call.product not in PRODUCTS:
            known = suggest(call.product, PRODUCTS)
            raise InvalidArgumentError(f"product={call.product!r} is unknown; {known}, or None")
        if call.operator not in PRODUCTS[call.product]:
            have = [name for name, operators in PRODUCTS.items() if call.operator in operators]
            raise make_error(
                UnsupportedError,
                f"product={call.product!r} does not have {call.operator}; {', '.join(have)} do, or pass product=None",
                rules.missing_product,
            )


def _check_nulls(call: Call, needs: tuple[str, ...]) -> None:
    """Checks that everything is given that the operator needs, and that the product needs with this comm_alg."""
    for name in needs:
        if (call.arrays[name] if name in call.arrays else call[name]) is None:
            with marked(f"null:{name}"):
                raise MissingArgumentError(f"{name} is None, but {call.operator} needs it; pass it")
    for product, limits in call.tables():
        for name in limits.required:
            if not call.given(name) and call.in_range("comm_alg"):
                with marked(f"null:{name}", product):
                    raise MissingArgumentError(
                        f"{name} is None, but comm_alg={call['comm_alg']!r} needs it{on(product)}; pass it"
                    )


def _check_groups(call: Call, rules: Rules, stage: str) -> None:
    """Checks that the group's name is not empty, and that no name of a group is too long."""
    for name in (rules.group, "group_tp" if "group_tp" in call.attributes else None):
        if name is None:
            continue
        group = call[name]
        if stage == NULL and name == rules.group and isinstance(group, (str, tuple)) and not group:
            with marked(f"null:{name}"):
                raise MissingArgumentError(f"{name}={group!r} is empty; pass a mesh axis's name")
        for part in group if isinstance(group, tuple) else (group,):
            if stage == rules.long_group[0] and isinstance(part, str) and len(part) >= _GROUP_LENGTH:
                with marked("group_length"):
                    raise make_error(
                        InvalidArgumentError,
                        f"{name}={part!r} has {len(part)} characters; a group's name has fewer than {_GROUP_LENGTH}, "
                        f"so {_GROUP_LENGTH - 1} at most",
                        rules.long_group[1],
                    )


def _check_dtypes(call: Call) -> None:
    """Checks that arrays are arrays, of dtypes that every table in force allows."""
    for name in filter(call.given, call.arrays):
        array = call.arrays[name]
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            with marked(f"dtype:{name}"):
                raise DtypeError(f"{name}={array!r} is no array; pass a jax or numpy array, or a jax.ShapeDtypeStruct")
    for product, limits in call.tables():
        for key, allowed in limits.dtypes.items():
            with marked(f"dtype:{key}", product):
                _check_dtype(call, key, allowed, product)


def _check_dtype(call: Call, key: str, allowed: tuple[str, ...], product: str | None) -> None:
    """Checks one dtype. ``key`` is an array, or "y_dtype:2": what that attribute may ask for with quant_mode=2."""
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
    """Checks that attributes are whole numbers, flags, words or names of groups, as their annotations say."""
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
            with marked("kind"):
                raise InvalidArgumentError(f"{name}={value!r} must be {kind}")
    if call["hccl_buffsize"] < 1:
        with marked("hccl_buffsize"):
            raise InvalidArgumentError(f"hccl_buffsize={call['hccl_buffsize']!r} must be at least 1, in MB")


def _check_shapes(call: Call, rules: Rules) -> None:
    """Checks that shapes fit each other: a letter stands for the extent that it had where it came first."""
    extents = {letter: extent(call) for letter, extent in rules.letters.items()}
    for name, shape in rules.shapes.items():
        if not call.given(name):
            continue
        found = call.shape(name)
        alternatives = [one.split() for one in (shape if isinstance(shape, str) else shape(call)).split(" | ")]
        legal = [tuple(int(one) if one.isdigit() else extents.get(one) for one in letters) for letters in alternatives]
        with marked(f"shape:{name}"):
            check_shape(name, found, tuple(legal))
        for letters in alternatives:
            if len(letters) == len(found):
                extents = dict(zip(letters, found, strict=True)) | extents


def _check_values(call: Call, rules: Rules, product: str | None) -> None:
    """Checks attributes and quantities by the table of ``product``, and that it takes all arrays that are given."""
    limits = dict(call.tables())[product]
    for name in filter(call.given, limits.absent):
        alg = f" with comm_alg={call['comm_alg']!r}" if call.attributes.get("comm_alg") else ""
        came = getattr(call.arrays[name], "shape", call.arrays[name])
        why = f": {limits.why[name]}" if name in limits.why else ""
        with marked(f"absent:{name}", product):
            raise InvalidArgumentError(
                f"{name} was given, with shape {came}; {call.operator} takes none{on(call.product)}{alg}{why}; "
                "pass None"
            )
    for name, legal in limits.values.items():
        with marked(name, product):
            _check_value(call, rules, name, legal, product)


def _check_value(call: Call, rules: Rules, name: str, legal: Legal, product: str | None) -> None:
    """Checks ``name``, an attribute, or a quantity that follows from the arguments and may not be there."""
    if name not in rules.quantities:
        if not legal.allows(call[name]):
            nearest = legal.nearest(call[name])
            raise InvalidArgumentError(
                f"{name}={call[name]!r} must be {legal}{on(product)}; the nearest legal value is {nearest!r}"
            )
        return
    words, quantity = rules.quantities[name]
    found = quantity(call)
    if found is not None and not legal.allows(found[1]):
        source, value = found
        raise ShapeError(
            f"{source}: {value} = {words}, must be {legal}{on(product)}; "
            f"the nearest legal value is {legal.nearest(value)!r}"
        )


def _check_buffer(call: Call) -> None:
    """Checks that HCCL_BUFFSIZE holds what the product needs for an exchange with this comm_alg."""
    for product, limits in call.tables():
        if limits.buffer is None:
            continue
        needed = megabytes(limits.buffer(sizes(call)))
        if call["hccl_buffsize"] < needed:
            with marked("buffer", product):
                raise InvalidArgumentError(
                    f"hccl_buffsize={call['hccl_buffsize']} MB is too small for this call{on(product)}: it needs "
                    f"{needed} MB; set HCCL_BUFFSIZE and hccl_buffsize to {needed}"
                )
