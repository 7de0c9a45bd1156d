"""Every rule of the first phases: the last legal call and the first illegal one, its code and its words.

The rows stand in ``limit_rows_exchange`` and ``limit_rows_others``. Hardly anything here touches a device.
"""

import collections
import contextlib
import functools
import inspect
import math
import re
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import limit_rows_exchange
import limit_rows_others
import numpy as np
import pytest
from limit_calls import (
    AG,
    BARRIER,
    COMBINE,
    CONST,
    DISPATCH,
    DTYPE,
    EXCHANGE,
    GA,
    NULL,
    QAG,
    RESET,
    UPDATE,
    VALUE,
    array,
    call_of,
    first_phase,
)
from limit_registry import OPERATORS, registered
from limit_rows_others import FULL, UNEVEN, UNEVEN_BACK

from moe_jax import aclnn
from moe_jax.errors import (
    DtypeError,
    InvalidArgumentError,
    MissingArgumentError,
    MoEError,
    ShapeError,
)
from moe_jax.hardware.ascend import ANY, PRODUCTS, VERSIONS, Choices, Interval, Sizes, lacking

RULES = {operator: registered(operator, definition) for operator, definition in OPERATORS.items()}
ROWS = limit_rows_exchange.ROWS + limit_rows_others.ROWS


class Case(NamedTuple):
    """One call: a change of a row, for an operator that has the rule."""

    rule: str
    operator: str
    product: str | None
    change: dict[str, Any]
    words: str
    status: int


@functools.cache
def cases(column):
    """The calls of each (rule, product): for each row, operator and change, if the product has the operator.

    A row holds for earlier versions too, as far as they have the rule and the parameters.
    """
    found = collections.defaultdict(list)
    for rule, _section, operators, product, *columns, words, status in ROWS:
        for operator in versions((operators,) if isinstance(operators, str) else operators, rule, product):
            has_it = product is None or operator in PRODUCTS[product]
            if not has_it and rule != "product":
                continue
            changes, sizes = columns[column], product if has_it else None
            for change in changes if isinstance(changes, list) else [changes]:
                if change is not None and call_of(operator, sizes, change) is not None:
                    found[rule, product].append(Case(rule, operator, product, change, words, status))
    return found


def by_rule(column):
    """A test for the calls of each rule: thousands of tests would cost more than what they do."""
    return [pytest.param(found, id=f"{rule}-{product}") for (rule, product), found in cases(column).items()]


@contextlib.contextmanager
def about(case):
    """Says of what fails inside which case it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in {case}")
        raise


def versions(operators, rule, product):
    """``operators``, and their earlier versions that have the rule."""
    older = [name for name, version in VERSIONS.items() if version.newest in operators and name not in operators]
    return [*operators, *(name for name in older if {(rule, product), (rule, None)} & RULES[name])]


def owner(rule, operator, product):
    """The product whose rule it is; None where it always holds."""
    return product if (rule, product) in RULES[operator] else None


@pytest.mark.parametrize("calls", by_rule(0))
def test_the_last_legal_calls(calls):
    for case in calls:
        with about(case):
            num_bytes, executor = first_phase(case.operator, case.product, case.change)
            assert num_bytes >= 0 and isinstance(num_bytes, int)
            assert executor.operator_name == case.operator and hash(executor) is not None


@pytest.mark.parametrize("calls", by_rule(1))
def test_the_first_illegal_calls(calls):
    for case in calls:
        with about(case), jax.enable_x64(True):  # which tells int64 from int32
            with pytest.raises(MoEError) as caught:
                first_phase(case.operator, None if case.rule == "product" else case.product, case.change)
            error = caught.value
            name, _, alg = case.rule.partition("@")
            assert (error.rule, error.status) == (name, case.status), str(error)
            assert not alg or case.change["ALG"] == alg
            assert error.product == owner(case.rule, case.operator, case.product)
            assert re.search(case.words, str(error)), str(error)
            assert "\n" not in str(error) and len(str(error)) < 420


def test_every_rule_has_a_legal_and_an_illegal_case():
    for column in (0, 1):
        every = [case for found in cases(column).values() for case in found]
        seen = {(case.operator, case.rule, owner(*case[:3])) for case in every}
        for operator, rules in RULES.items():
            needed = {rule for rule in rules if column or rule[0] != "product"}
            missing = {rule for rule in needed if (operator, *rule) not in seen}
            assert not missing, f"{operator}: no {'illegal' if column else 'legal'} case for {sorted(missing, key=str)}"
            stale = {rule[1:] for rule in seen if rule[0] == operator} - rules
            assert not stale, f"{operator}: cases of unknown rules {stale}"


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_size_of_a_group_is_compared_with_it(operator):
    names = inspect.signature(getattr(aclnn, operator)).parameters
    compared = [rule for rule, _ in RULES[operator] if rule.startswith("group_size:")]
    assert len(compared) == sum(name.endswith("world_size") for name in names) > 0
    assert {rule.removeprefix("group_size:") for rule in compared} <= {name for name in names if name[:5] == "group"}


def test_null_pointers_come_before_dtypes_and_dtypes_before_the_rest():
    broken = {"W": 1, "expert_ids": array((8, 4), "int64"), "x": None}
    with pytest.raises(MissingArgumentError, match="x is None"):
        first_phase(DISPATCH, "a3", broken)
    broken["x"] = array((8, 1024), "bfloat16")
    with pytest.raises(DtypeError, match="expert_ids"):
        first_phase(DISPATCH, "a3", broken)
    del broken["expert_ids"]
    with pytest.raises(InvalidArgumentError, match="ep_world_size=1 "):
        first_phase(DISPATCH, "a3", broken)


EXTENTS = {"ep_world_size", "moe_expert_num", "shared_expert_num", "shared_expert_rank_num", "world_size"}
ALGS = ["fullmesh", "fullmesh_v1", "fullmesh_v2", "hierarchy"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_64_bits_are_32_where_jax_has_no_more(operator):
    """Every array whose documents say int64 or so: what JAX makes of it is taken, and refused where JAX has 64 bits."""
    check = getattr(aclnn, f"{operator}_get_workspace_size")
    for product in (None, *(name for name in PRODUCTS if operator in PRODUCTS[name])):
        call = call_of(operator, product, {})
        own = PRODUCTS[product][operator] if product else ANY[operator]
        limits = ANY[operator].dtypes | own.dtypes
        for name, allowed in limits.items():
            if name in own.absent or name in lacking(operator):
                continue
            for dtype in [dtype for dtype in allowed if dtype in ("int64", "uint64", "float64")]:
                shape = getattr(call.get(name), "shape", (call.get("ep_world_size"),))
                narrow = call | {name: array(shape, dtype.replace("64", "32"))}
                check(**call | {name: array(shape, dtype)})
                check(**narrow)
                with jax.enable_x64(True):
                    check(**call | {name: array(shape, dtype)})
                    if dtype.replace("64", "32") not in allowed:
                        with pytest.raises(DtypeError, match=f"{name} has dtype .*32; it must be {dtype} on {product}"):
                            check(**narrow)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_attribute_out_of_range_comes_before_what_it_would_need(operator):
    """Nothing but what is always needed, and one attribute out of its range: the text is about that attribute."""
    definition, tried = OPERATORS[operator], set()
    check = getattr(aclnn, f"{operator}_get_workspace_size")
    for product in (None, *(name for name in PRODUCTS if operator in PRODUCTS[name])):
        limits = [ANY[operator]] + ([PRODUCTS[product][operator]] if product else [])
        call = call_of(operator, product, {})
        bare = {name: call[name] for name in call if name not in definition.arrays or name in definition.needs}
        names = {name for table in limits for name in table.values} & inspect.signature(check).parameters.keys()
        for name in names - EXTENTS:
            for value in ALGS if name == "comm_alg" else range(-1, 9):
                if all(table.values[name].allows(value) for table in limits if name in table.values):
                    continue
                with pytest.raises(MoEError, match=f"^{name}={value!r} must be") as caught:
                    check(**bare | {name: value})
                assert caught.value.status == VALUE
                tried.add((name, value))
    if operator.startswith("moe_distribute_dispatch"):
        assert {("quant_mode", 1), ("tp_world_size", 2), ("comm_alg", "hierarchy")} <= tried


def test_no_product_refuses_no_range():
    for change in ({"W": 1, "E": 3000, "B": 0}, {"H": 10**6, "K": 100, "E": 400}, {"W": 5000, "E": 5000}):
        for operator in EXCHANGE:
            assert first_phase(operator, None, {**change, "hccl_buffsize": 1})[0] >= 0


def test_an_unknown_product_is_refused():
    with pytest.raises(InvalidArgumentError, match="product='a4' is unknown.*a2"):
        first_phase(RESET, None, {"product": "a4"})


STRANGE = [None, -1, 0, 1.5, math.nan, "", "x", True, [], [[1], [1, 2]], (1,), object(), b"x", {}, np.int64(3)]
STRANGE += [array((), "int32"), array((0, 0)), array((2, 3, 4, 5, 6)), array((4, 2), "complex64"), np.zeros((1, 1))]


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name not in VERSIONS])
def test_strange_arguments_raise_nothing_but_our_errors(operator):
    for product in (None, *PRODUCTS):
        if product is not None and operator not in PRODUCTS[product]:
            continue
        names = inspect.signature(getattr(aclnn, f"{operator}_get_workspace_size")).parameters
        for name in names:
            for value in STRANGE:
                try:
                    first_phase(operator, product, {name: value})
                except MoEError as error:
                    assert error.status in (NULL, DTYPE, VALUE) and error.rule  # noqa: PT017 - refused or not, both serve


def test_traced_arrays_serve_but_traced_counts_do_not():
    def traced(x, ids, counts):
        first_phase(DISPATCH, None, {"x": x, "expert_ids": ids})
        with pytest.raises(InvalidArgumentError, match="send_counts is a traced array"):
            first_phase(GA, None, {"send_counts": counts})
        return x

    jax.eval_shape(traced, array((4, 16), "bfloat16"), array((4, 2), "int32"), array((4,), "int32"))


def test_arrays_serve_as_well_as_shapes():
    expected = first_phase(DISPATCH, None, {})
    real = {"x": np.zeros((4, 16), jnp.bfloat16), "expert_ids": jnp.zeros((4, 2), "int32")}
    assert first_phase(DISPATCH, None, real) == expected


def test_what_the_documents_sample_calls():
    sizes = {"B": 8, "H": 7168, "K": 3, "W": 8, "E": 7, "S": 1, "NS": 1, "Z": 1, "CP": 1, "CC": 1}
    first_phase(DISPATCH, "a3", {**sizes, "expert_scales": array((8, 3)), "hccl_buffsize": 200})
    alphas = {name: array((1,), "bfloat16") for name in CONST[:2]}
    first_phase(COMBINE, "a3", {**sizes, **alphas, "group_list_type": 1, "hccl_buffsize": 200})
    gmm = {"R": 8, "e": 4, "H1": 7168, "N1": 4096, "H2": 7168, "N2": 4096, "ROWS": 256, "MM": 4096, "DTYPE": "float16"}
    first_phase(GA, "a3", gmm)


# The tables' vocabulary and the sizes.


@pytest.mark.parametrize("legal", [Interval(3, 17), Interval(5, 40, 8), Interval(2), Choices((8, 16, 64))], ids=str)
def test_nearest_is_legal_and_nothing_is_nearer(legal):
    everything = [value for value in range(-5, 200) if legal.allows(value)]
    for value in range(-5, 90):
        nearest = legal.nearest(value)
        assert legal.allows(nearest)
        assert abs(nearest - value) == min(abs(other - value) for other in everything)


def test_capacity_is_what_the_worst_routing_needs():
    """Against a loop over roles: all tokens of all ranks choose one rank; pairs of shared experts go by residue."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens, top_k, local, experts, per_expert = (int(n) for n in rng.integers(1, 5, 5))
        shared = experts * per_expert * int(rng.integers(0, 2))
        world = shared + int(rng.integers(1, 5))
        routed = sum(min(top_k, local) for _ in range(world) for _ in range(tokens))
        on_shared = [
            sum(tokens for source in range(world) if source % per_expert == rank % per_expert) for rank in range(shared)
        ]
        sizes = Sizes(
            tokens=tokens,
            hidden=8,
            top_k=top_k,
            ep_world_size=world,
            moe_expert_num=local * (world - shared),
            shared_expert_num=experts,
            shared_expert_rank_num=shared,
        )
        assert sizes.capacity == max([routed, *on_shared])


def test_workspace_bytes_are_those_of_the_rows():
    # dispatch, None: B 4, K 2, A 32, W * L = 8, bf16 rows of 16 columns, 3 integers beside each
    assert first_phase(DISPATCH, None, {})[0] == (4 * 2 + 32) * (16 * 2 + 12) + 2 * 8 * 4 + 2 * 8
    # quant_mode 3: one byte per column, one fp32 scale per 128 of them
    wide = first_phase(DISPATCH, None, {"quant_mode": 3, "H": 130})[0]
    assert wide == (4 * 2 + 32) * (130 + 2 * 4 + 12) + 2 * 8 * 4 + 2 * 8
    # a shared expert on 2 of 4 ranks: a third copy of each token; L = 4, A = max(4 * 4 * 2, 4 * 2)
    assert first_phase(DISPATCH, None, {"S": 2})[0] == (4 * 3 + 32) * (16 * 2 + 12) + 2 * 16 * 4 + 4 * 8
    # combine: 32 rows back, 8 arrive; three integers per row, one per count
    assert first_phase(COMBINE, None, {})[0] == (32 + 8) * 32 + 32 * 12 + 8 * 4
    # the same in int8, one bf16 scale per 8 columns
    assert first_phase(COMBINE, None, {"comm_quant_mode": 2})[0] == (32 + 8) * (16 + 2 * 2) + 32 * 12 + 8 * 4
    # grouped product then exchange: A 12 rows by expert and by rank, BSK 12 received, N1 16; 2 lists of 4 counts
    assert first_phase(GA, None, {})[0] == 3 * 12 * 16 * 2 + 2 * 4 * 4
    # exchange then product: BSK 12 sent, A 12 received and sorted, H1 64
    assert first_phase(AG, None, {})[0] == 3 * 12 * 64 * 2 + 2 * 4 * 4
    assert first_phase(QAG, None, {})[0] == 3 * 12 * (64 + 2) + 2 * 4 * 4
    assert first_phase(BARRIER, None, {})[0] == 2 * 8 * 4
    assert first_phase(RESET, None, {"need_sync": 0})[0] == 64 * 4
    assert first_phase(UPDATE, None, FULL)[0] == 8 * 2 * 4 + 8 * (2 + 4)


# The executor.


@pytest.fixture
def running(monkeypatch):
    """Stands in for the running operators: returns what it is called with."""
    module = types.ModuleType("moe_jax.aclnn")
    module.__path__ = sys.modules["moe_jax.aclnn"].__path__
    setattr(module, DISPATCH, lambda **arguments: arguments)
    setattr(module, GA, lambda **arguments: arguments)
    monkeypatch.setitem(sys.modules, "moe_jax.aclnn", module)


def test_the_executor_binds_attributes_and_takes_arrays(running):
    _, executor = first_phase(DISPATCH, None, {"quant_mode": 2, "comm_alg": None})
    arrays = {"x": jnp.zeros((4, 16), "bfloat16"), "expert_ids": np.zeros((4, 2), np.int32)}
    called = executor(**arrays)
    assert called.pop("x") is arrays["x"] and called.pop("expert_ids") is arrays["expert_ids"]
    assert called == {
        "group_ep": "ep",
        "ep_world_size": 4,
        "moe_expert_num": 8,
        "group_tp": "",
        "tp_world_size": 0,
        "expert_shard_type": 0,
        "shared_expert_num": 1,
        "shared_expert_rank_num": 0,
        "quant_mode": 2,
        "global_bs": 0,
        "expert_token_nums_type": 1,
        "comm_alg": "",
        "zero_expert_num": 0,
        "copy_expert_num": 0,
        "const_expert_num": 0,
    }


def test_the_executor_binds_count_lists(running):
    _, executor = first_phase(GA, None, {"send_counts": np.array(UNEVEN), "recv_counts": UNEVEN_BACK})
    called = executor(gmm_x=np.zeros((12, 64), jnp.bfloat16), gmm_weight=np.zeros((2, 64, 16), jnp.bfloat16))
    assert called["send_counts"] == ((1, 2, 4, 5), (3, 0, 1, 8))
    assert called["recv_counts"] == ((1, 2, 3, 0), (4, 5, 1, 8))
    assert called["trans_gmm_weight"] is False


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": np.zeros((5, 16), jnp.bfloat16)}, ShapeError, r"x has shape \(5, 16\).*\(4, 16\)"),
        ({"x": np.zeros((4, 16), np.float16)}, DtypeError, "x has dtype float16.*bfloat16"),
        ({"x": None}, MissingArgumentError, r"x is None.*\(4, 16\)"),
        ({"expert_id": np.zeros(3)}, InvalidArgumentError, "expert_id=.*did you mean 'expert_ids'"),
        ({"scales": np.zeros((8, 16))}, InvalidArgumentError, "scales=an array of shape.*was not given"),
    ],
)
def test_the_executor_refuses_other_arrays(running, change, error, words):
    _, executor = first_phase(DISPATCH, None, {})
    arrays = {"x": np.zeros((4, 16), jnp.bfloat16), "expert_ids": np.zeros((4, 2), np.int32)}
    with pytest.raises(error, match=words):
        executor(**{**arrays, **change})


def test_the_executor_takes_what_jax_makes_of_64_bits(running):
    _, executor = first_phase(DISPATCH, None, {"performance_info": array((4,), "int64")})
    arrays = {"x": np.zeros((4, 16), jnp.bfloat16), "expert_ids": np.zeros((4, 2), np.int32)}
    assert "performance_info" in executor(**arrays, performance_info=jnp.zeros((4,), "int32"))
