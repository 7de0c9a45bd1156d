"""The table of the layer's parameters: every reader takes names, axes, layouts and first values from it."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax.errors import InvalidArgumentError, MeshError, MissingArgumentError, UnsupportedError
from moe_jax.parameters import TABLE

EVERYTHING = {"num_shared_experts": 2, "num_const_experts": 1, "num_zero_experts": 1}
BIASED = moe.RouterConfig(selection_bias=True)
# The first and the last value of each parameter, and the sum of all, as init drew them for key 7 when it was written.
FIRST_VALUES = {
    "const_alpha1": (-0.38044223, -0.53023475, -1.49185207),
    "const_alpha2": (-0.37452504, -0.37287858, -0.60288936),
    "const_v": (-0.20912336, -0.06677923, -1.14178033),
    "router": (-0.47411963, -0.18043168, -4.56382585),
    "shared_down": (0.54029858, 0.10458673, -2.27999368),
    "shared_gate": (-0.16564725, -0.53629452, -0.44179933),
    "shared_router": (-0.35004035, 0.56785637, 0.67148969),
    "shared_up": (0.39200661, 0.67084217, 1.77510658),
    "w_down": (0.53481019, 0.15539743, -3.18524369),
    "w_gate": (0.22779451, -0.30269456, 3.53059654),
    "w_up": (0.10203270, -0.35104457, -10.39261698),
}
ZEROS = {"b_down", "b_gate", "b_up", "router_bias", "selection_bias"}
OPTIONS = {"use_bias": True, "gated_shared": True, "expert_scale": True}


def make(mesh, **options):
    sizes = {"tokens_per_rank": 4, "hidden": 3, "num_experts": 4, "top_k": 2, "dtype": "float32"}
    return moe.make_plan(mesh, **sizes, **options)


def test_first_values_are_those_of_all_time():
    """Saved runs begin with these numbers; no parameter depends on which others there are."""
    mesh = moe.make_mesh(ep=2, tp=2)
    init, _ = moe.moe_on_mesh(mesh, make(mesh, **EVERYTHING), BIASED, ffn=4, **OPTIONS)
    params = {name: np.asarray(value, np.float64) for name, value in init(jax.random.key(7)).items()}
    assert params.keys() == FIRST_VALUES.keys() | ZEROS | {"expert_scale"} == {row.name for row in TABLE}
    assert (params.pop("expert_scale") == 1).all()
    for name, (first, last, total) in FIRST_VALUES.items():
        found = params[name].ravel()
        np.testing.assert_allclose([found[0], found[-1], found.sum()], [first, last, total], rtol=1e-5, err_msg=name)
    assert not any(params[name].any() for name in ZEROS)


@pytest.mark.quick("swiglu-True", "gelu-False")
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_abstract_params_are_those_that_init_makes(activation, use_bias):
    mesh = moe.make_mesh(ep=2, tp=2)
    plan, options = make(mesh, **EVERYTHING), {"activation": activation, "use_bias": use_bias}
    init, _ = moe.moe_on_mesh(mesh, plan, BIASED, ffn=4, num_logical_experts=3, **options)
    params = init(jax.random.key(0))
    abstract = moe.abstract_params(mesh, plan, BIASED, ffn=4, num_logical_experts=3, **options)
    specs = moe.param_specs(plan, BIASED, **options)
    assert params.keys() == abstract.keys() == specs.keys()
    for name, value in params.items():
        assert (value.shape, value.dtype) == (abstract[name].shape, abstract[name].dtype), name
        assert value.sharding == abstract[name].sharding == NamedSharding(mesh, specs[name]), name
    assert ("w_gate" in params) == (activation != "gelu") and ("b_up" in params) == use_bias
    assert params["router"].shape == (3, 3 + 2)  # logical experts, and those without rows


def test_a_program_lowers_from_abstract_params_alone():
    mesh = AbstractMesh((2, 2), ("ep", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    plan = make(mesh)
    _, apply = moe.moe_on_mesh(mesh, plan, moe.RouterConfig(), ffn=4)
    params = moe.abstract_params(mesh, plan, moe.RouterConfig(), ffn=4)
    x = jax.ShapeDtypeStruct((4 * 4, 3), "float32", sharding=NamedSharding(mesh, P(plan.token_axes)))
    y, _ = jax.eval_shape(apply, params, x)
    assert y.shape == x.shape


MESH = AbstractMesh((2, 2), ("ep", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"plan": None}, MissingArgumentError, "plan is None.*make_plan"),
        ({"router": "softmax"}, InvalidArgumentError, "router is a str.*RouterConfig"),
        ({"activation": "elu"}, InvalidArgumentError, "activation='elu' is unknown.*swiglu"),
        ({"use_bias": 1}, InvalidArgumentError, "use_bias=1 must be True or False"),
        ({"plan": make(MESH, quant="int8_static")}, UnsupportedError, "plan.quant='int8_static' needs scales"),
        ({"ffn": 3}, InvalidArgumentError, "ffn=3 must be divisible by tp=2"),
        ({"ffn": 2.0}, InvalidArgumentError, "ffn=2.0 must be a whole number"),
        ({"num_logical_experts": 0}, InvalidArgumentError, "num_logical_experts=0 must be a whole number"),
        (
            {"router": moe.RouterConfig(num_groups=3)},
            InvalidArgumentError,
            "num_groups=3 does not divide the 4 experts",
        ),
        ({"mesh": AbstractMesh((4, 1), ("ep", "tp"))}, MeshError, "make the plan from this mesh"),
    ],
)
def test_what_is_wrong_is_said(change, error, words):
    given = {"plan": make(MESH), "router": moe.RouterConfig()} | change
    with pytest.raises(error, match=words):
        moe.abstract_params(**{"mesh": MESH} | given)
    if not change.keys() & {"mesh", "ffn", "num_logical_experts"} and "num_groups" not in words:
        with pytest.raises(error, match=words):
            moe.param_specs(**given)


def _parts_of_names():
    """Beginnings and ends of parameters' names that end, or begin, with an underscore: "w_", "shared_", "_bias"."""
    names = [row.name for row in TABLE]
    ends = {name[: name.index("_") + 1] for name in names if "_" in name}
    return ends | {name[name.index("_") :] for name in names if "_" in name} | {"shared", "const"}


PARSING = {"startswith", "endswith", "removeprefix", "removesuffix", "replace", "split", "partition"}
FILES = sorted(Path(moe.__file__).parent.rglob("*.py"))


def test_no_name_is_taken_apart():
    """Whoever wants to know what a parameter is asks the table, and not the letters of its name."""
    parts, found = _parts_of_names(), []
    assert {"w_", "b_", "shared_", "const_", "_bias", "_down"} <= parts
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in PARSING:
                words = {n.value for argument in node.args for n in ast.walk(argument) if isinstance(n, ast.Constant)}
                found += [f"{path.name}:{node.lineno}"] if words & parts else []
    assert not found
