"""What a first phase checks: one call, and the kinds of rules that it must keep to.

The values that a product takes are tables in ``moe_jax.hardware.ascend``. Relations between arguments are rules: rows
of data in ``rules_exchange``, ``rules_grouped`` and ``rules_small``, each of one of the kinds below. ``check`` goes
through them in CANN's order. Every error carries ``status``, CANN's code, ``rule``, the name of the rule, and
``product``: the product that has this rule, or None where the rule holds everywhere.
"""

import contextlib
import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import _compat
from moe_jax.errors import DtypeError, InvalidArgumentError, MeshError, MoEError, ShapeError
from moe_jax.hardware.ascend import ANY, PRODUCTS, Limits

NULL, DTYPE, REST = "null", "dtype", "rest"
NULL_POINTER, BAD_PARAMETER, BAD_VALUE = 161001, 161002, 561002
WORDS = ("comm_alg",)  # attributes that are words


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
      operator: its name.
      product: the product whose limits hold; None: those of no product.
      arrays: arrays or their shapes, by parameter; None where one is not given.
      attributes: the other arguments, by parameter.
    """

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

    def in_range(self, name: str) -> bool:
        """Whether every table in force allows the attribute ``name``."""
        value, legal = self[name], [limits.values[name] for _, limits in self.tables() if name in limits.values]
        kind = str if name in WORDS else (int, np.integer)
        return isinstance(value, kind) and not isinstance(value, bool) and all(one.allows(value) for one in legal)

    def tables(self) -> Iterator[tuple[str | None, Limits]]:
        """Every table in force, with its product. The one that holds everywhere comes first."""
        yield None, ANY[self.operator]
        if self.product is not None:
            limits = PRODUCTS[self.product][self.operator]
            yield self.product, limits.under(self.attributes.get("comm_alg"))

    def worded(self, text: str, **words: Any) -> str:
        """``text`` with its fields filled in: ``{name}`` (attributes, ``words``), ``{name.shape}``, ``{name.dtype}``.

        ``{on}`` becomes " on a3" for the product "a3", and nothing without a product.
        """
        arrays = {
            name: SimpleNamespace(shape=self.shape(name), dtype=self.dtype(name))
            for name in self.arrays
            if self.given(name) and f"{{{name}." in text
        }
        return text.format_map({"on": on(self.product), **self.attributes, **arrays, **words})


# The kinds of rules.


class State(enum.Enum):
    """What a condition may ask of an argument instead of a value."""

    GIVEN = "an array that was passed"
    MISSING = "an array that was not passed"
    NONZERO = "an attribute that is not 0, False or empty"


GIVEN, MISSING, NONZERO = State
When = Mapping[str, Any]  # by argument: a State, a value, or a tuple of values; "x.dtype" is the dtype of the array x
Number = Callable[[Call], int]


def holds(call: Call, when: When) -> bool:
    """Whether all conditions of ``when`` hold."""

    def one(name: str, wanted: Any) -> bool:
        if wanted is GIVEN or wanted is MISSING:
            return call.given(name) is (wanted is GIVEN)
        if name.endswith(".dtype"):
            return call.dtype(name.removesuffix(".dtype")) in wanted
        if wanted is NONZERO:
            return bool(call[name])
        return call[name] in (wanted if isinstance(wanted, tuple) else (wanted,))

    return all(one(name, wanted) for name, wanted in when.items())


@dataclasses.dataclass(frozen=True)
class Rule:
    """A relation between arguments: ``check`` raises where it is broken. Functions below make the common kinds.

    Attributes:
      name: what the error's ``rule`` says.
      section: the section of the CANN sheet that it is from.
      check: raises a MoEError where the rule is broken.
      stage: NULL, DTYPE or REST: when it is checked.
      products: the products that have the rule; None: it holds everywhere.
      depends_on: an attribute. Where it is out of its own range, that is the error, and this rule is not checked.
    """

    name: str
    section: str
    check: Callable[[Call], None]
    _: dataclasses.KW_ONLY
    stage: str = REST
    products: tuple[str, ...] | None = None
    depends_on: str | None = None

    def __call__(self, call: Call) -> None:
        """Raises if the rule is in force and broken."""
        if self.depends_on is not None and not call.in_range(self.depends_on):
            return
        if self.products is None or call.product in self.products:
            with marked(self.name, call.product if self.products else None):
                self.check(call)


def refuses(
    name: str,
    section: str,
    when: When | Callable[[Call], Any],
    text: str,
    error: type[MoEError] = InvalidArgumentError,
    *,
    status: int | None = None,
    words: Mapping[str, Callable[[Call], Any]] = MappingProxyType({}),
    **others: Any,
) -> Rule:
    """The rule that raises ``error`` with ``text`` where ``when`` holds; ``words`` are further words of the text."""

    def check(call: Call) -> None:
        if when(call) if callable(when) else holds(call, when):
            found = {word: value(call) for word, value in words.items()}
            raise make_error(error, call.worded(text, **found), status)

    return Rule(name, section, check, **others)


def requires(name: str, section: str, array: str, when: When, text: str, **others: Any) -> Rule:
    """The rule that the array ``array`` must be passed where ``when`` holds."""
    return refuses(name, section, {array: MISSING, **when}, text, **others)


def forbids(name: str, section: str, array: str, when: When, text: str, **others: Any) -> Rule:
    """The rule that the array ``array`` must not be passed where ``when`` holds."""
    return refuses(name, section, {array: GIVEN, **when}, text, **others)


def at_least(
    name: str,
    section: str,
    found: Number,
    needed: Number,
    text: str,
    *,
    when: When = MappingProxyType({}),
    more_words: Mapping[str, Callable[[Call], Any]] = MappingProxyType({}),
    **others: Any,
) -> Rule:
    """The rule that ``found`` must be at least ``needed`` where ``when`` holds; ``text`` has both by these names."""
    words = {"found": found, "needed": needed, **more_words}

    def less(call: Call) -> bool:
        return holds(call, when) and found(call) < needed(call)

    return refuses(name, section, less, text, words=words, **others)


def one_of_dtypes(
    name: str, section: str, arrays: tuple[str, ...], legal: Callable[[Call], tuple[str, ...]], text: str, **others: Any
) -> Rule:
    """The rule that each of ``arrays`` must have one of the dtypes ``legal``; ``text`` has them by this name."""

    def check(call: Call) -> None:
        for array in filter(call.given, arrays):
            if call.dtype(array) not in legal(call):
                reason = call.worded(text, legal=" or ".join(legal(call)))
                raise DtypeError(f"{array} has dtype {call.dtype(array)}; {reason}")

    return Rule(name, section, check, stage=DTYPE, **others)


def same_dtype(name: str, section: str, arrays: tuple[str, ...], like: str) -> Rule:
    """The rule that each of ``arrays`` must have the dtype of ``like``."""
    return one_of_dtypes(
        name, section, arrays, lambda call: (call.dtype(like),), f"it must be {{legal}}, as {like}; cast it first"
    )


def group_size(section: str, group: str, size: str, used: Callable[[Call], bool] = lambda call: True) -> Rule:
    """The rule that ``size`` must be the number of ranks of ``group``, where that is bound, as in a trace."""

    def check(call: Call) -> None:
        axes = call[group] if isinstance(call[group], tuple) else (call[group],)
        bound = [_compat.bound_axis_size(axis) if isinstance(axis, str) else None for axis in axes]
        sizes = [one for one in bound if one is not None]
        if len(sizes) == len(bound) and math.prod(sizes) != call[size] and used(call):
            raise MeshError(
                f"{size}={call[size]}, but {group}={call[group]!r} has {math.prod(sizes)} ranks here; pass the size of "
                "the mesh axis"
            )

    return Rule(f"group_size:{group}", section, check)


# A shape is words such as "B K". A letter that an earlier array had stands for the same extent, a new letter allows any
# extent, and a number stands for itself. " | " stands between alternatives.
Shape = str | Callable[[Call], str]
Quantity = Callable[[Call], tuple[str, int] | None]  # (where it comes from, how much it is), or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How the calls of one operator and of its earlier versions are checked. What a version lacks counts as not given.

    Attributes:
      group: the attribute that names the group of ranks, 1 to 127 characters long.
      long_group: the stage in which a name that is too long is found, and the code of that error.
      shapes: by array, in the order in which they are checked.
      letters: the extents in shapes that are attributes, or follow from attributes.
      quantities: what the tables of products limit besides attributes, each as a function of a call.
      rules: the rules of each stage, in the order in which they are checked.
      last_rules: the rules that are checked after the table of the product.
      missing_product: the code on a product that does not have the operator.
      more_arrays: arrays that are passed by name, after those that come by position.
      not_needed: parameters without a default that have a rule of their own instead.
    """

    group: str | None = None
    long_group: tuple[str, int] = (DTYPE, BAD_PARAMETER)
    shapes: Mapping[str, Shape]
    letters: Mapping[str, Callable[[Call], int]] = dataclasses.field(default_factory=dict)
    quantities: Mapping[str, tuple[str, Quantity]] = dataclasses.field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    last_rules: tuple[Rule, ...] = ()
    missing_product: int = BAD_VALUE
    more_arrays: tuple[str, ...] = ()
    not_needed: tuple[str, ...] = ()


def make_error(kind: type[MoEError], text: str, status: int | None = None) -> MoEError:
    """An error whose ``status`` is CANN's, where that is not the one of its class."""
    error = kind(text)
    if status is not None:
        error.status = status
    return error


def on(product: str | None) -> str:
    """The words that say whose rule it is."""
    return f" on {product}" if product else ""


def shown(call: Call, name: str) -> str:
    """An array with its shape, in words."""
    return f"{name} with shape {call.shape(name)}"


def extent(array: str, axis: int) -> Quantity:
    """The extent of an array, where it is given."""
    return lambda call: (shown(call, array), call.shape(array)[axis]) if call.given(array) else None


def canonical(dtype: Any) -> str:
    """The dtype that JAX has in place of another: int32 for int64, unless 64-bit types are enabled."""
    return jax.dtypes.canonicalize_dtype(dtype).name


def dtype_name(name: str, dtype: Any) -> str | None:
    """The name of the dtype that the attribute ``name`` asks for; None where its value is None."""
    try:
        return None if dtype is None else jnp.dtype(dtype).name
    except TypeError:
        raise DtypeError(f"{name}={dtype!r} is no dtype; pass one such as 'int8' or 'float8_e4m3fn'") from None


def check_shape(name: str, shape: tuple[int, ...], legal: tuple[tuple[int | None, ...], ...]) -> None:
    """Raises ShapeError unless ``shape`` is one of ``legal``, where None allows any extent."""
    for candidate in legal:
        if len(candidate) == len(shape) and all(b in (None, a) for a, b in zip(shape, candidate, strict=True)):
            return
    words = " or ".join(str(tuple("any" if n is None else n for n in one)).replace("'", "") for one in legal)
    raise ShapeError(f"{name} has shape {shape}; it must be {words} to fit the other arguments")


@contextlib.contextmanager
def marked(name: str, product: str | None = None) -> Iterator[None]:
    """A context that marks errors raised in it with the rule that was broken, and the product that has this rule."""
    try:
        yield
    except MoEError as error:
        if error.rule is None:
            error.rule, error.product = name, product
        raise
