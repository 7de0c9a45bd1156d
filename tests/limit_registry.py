"""The operators of the facade, and the names of all rules of each, so that a test can ask that each is exercised."""

from moe_jax import aclnn
from moe_jax.aclnn.calls import FIRST_PHASE, Operator, operator_of
from moe_jax.hardware.ascend import ANY, PRODUCTS, Limits, lacking

OPERATORS = {
    name: operator_of(getattr(aclnn, name)) for name in aclnn.__all__ if f"{name}{FIRST_PHASE}" in aclnn.__all__
}
# Relations that cannot be broken without this parameter, which some operators do not have.
NEEDED = {
    "performance_info_by_rank": "performance_info",
    "window_or_clock": "performance_info",
    "special_inputs": "ori_x",
    "const_shapes": "const_expert_v",
}


def registered(operator: str, definition: Operator) -> set[tuple[str, str | None]]:
    """Every rule that a call of ``operator`` can break, as (name, product).

    A limit that a product has with one comm_alg alone is called "tokens@hierarchy".
    """
    own = {*definition.parameters, *definition.arrays} - {*lacking(operator)}
    found = {(f"null:{name}", None) for name in definition.needs}
    found |= {(f"shape:{name}", None) for name in definition.rules.shapes if name in own}
    found |= {("group_length", None)} if definition.rules.group else set()
    found |= {("kind", None), ("hccl_buffsize", None)}
    have = [None, *(name for name, product in PRODUCTS.items() if operator in product)]
    for rule in definition.rules.rules + definition.rules.last_rules:
        if NEEDED.get(rule.name) in {None, *own}:
            found |= {(rule.name, product) for product in rule.products or (None,) if product in have}
    tables = {None: ANY[operator]}
    for name, product in PRODUCTS.items():
        if operator in product:
            tables[name] = product[operator]
        else:
            found.add(("product", name))
    for name, base in tables.items():
        outer = ANY[operator] if name else Limits()
        found |= {(rule, name) for rule in _table_rules(base, outer, own | definition.rules.quantities.keys())}
    return found


def _table_rules(base: Limits, outer: Limits, known: set[str]) -> set[str]:
    """Names of the rules of a table that ``outer`` does not have already, as far as they are about what is known."""
    found = set()
    for alg, limits in {"": base, **base.variants}.items():
        suffix = f"@{alg}" if alg else ""
        for name, legal in limits.values.items():
            if name in known and outer.values.get(name) != legal:
                found.add(name if base.values.get(name) == legal else name + suffix)
        absent = [name for name in limits.absent if name in known]
        found |= {f"absent:{name}" + ("" if name in base.absent else suffix) for name in absent}
        found |= {f"null:{name}" + suffix for name in limits.required}
        if limits.buffer is not None:
            found.add("buffer" if limits.buffer is base.buffer else "buffer" + suffix)
        for name, allowed in limits.dtypes.items():
            if name.partition(":")[0] in known and outer.dtypes.get(name) != allowed:
                found.add(f"dtype:{name}")
    return found
