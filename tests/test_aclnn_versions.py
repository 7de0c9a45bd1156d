"""Which arguments the facade's functions take: those of each version's document, in its order, and no others.

That earlier versions compute the same as the newest one is seen in ``test_aclnn_run``, whose executors are theirs.
"""

import inspect
import itertools

import jax
import numpy as np
import pytest
from limit_calls import call_of
from limit_registry import OPERATORS

from moe_jax import aclnn, errors
from moe_jax.aclnn.calls import bind, signature_checked
from moe_jax.hardware.ascend import VERSIONS

# The parameters of the documents' prototypes without rank ids and outputs; " / " is where arrays end, and what has no
# place in them stands after the last " / ".
DISPATCH = (
    "group_ep ep_world_size moe_expert_num group_tp tp_world_size expert_shard_type shared_expert_num "
    "shared_expert_rank_num quant_mode global_bs expert_token_nums_type comm_alg"
)
COMBINE = (
    "group_ep ep_world_size moe_expert_num group_tp tp_world_size expert_shard_type shared_expert_num "
    "shared_expert_rank_num global_bs out_dtype comm_quant_mode group_list_type comm_alg"
)
SPECIAL, CONST = "zero_expert_num copy_expert_num const_expert_num", "const_expert_alpha_1 const_expert_alpha_2"
BACK = "expand_x expert_ids assist_info_for_combine ep_send_counts expert_scales"
REST = "tp_send_counts x_active_mask activation_scale weight_scale group_list expand_scales shared_expert_x"
SIGNATURES = {
    "moe_distribute_dispatch_v2": (f"x expert_ids scales x_active_mask expert_scales / {DISPATCH} / y_dtype window"),
    "moe_distribute_dispatch_v3": (
        f"x expert_ids scales x_active_mask expert_scales elastic_info / {DISPATCH} {SPECIAL} / y_dtype window"
    ),
    "moe_distribute_dispatch_v4": (
        "x expert_ids scales x_active_mask expert_scales elastic_info performance_info / "
        f"{DISPATCH} {SPECIAL} / y_dtype window"
    ),
    "moe_distribute_combine_v2": f"{BACK} {REST} / {COMBINE} /",
    "moe_distribute_combine_v3": f"{BACK} {REST} elastic_info ori_x {CONST} const_expert_v / {COMBINE} {SPECIAL} /",
    "moe_distribute_combine_v4": (
        f"{BACK} {REST} elastic_info ori_x {CONST} const_expert_v performance_info / {COMBINE} {SPECIAL} /"
    ),
    "moe_distribute_combine_add_rms_norm": f"{BACK} residual_x gamma {REST} / {COMBINE} norm_eps /",
    "moe_distribute_combine_add_rms_norm_v2": (
        f"{BACK} residual_x gamma {REST} elastic_info ori_x {CONST} const_expert_v / {COMBINE} norm_eps {SPECIAL} /"
    ),
    "distribute_barrier": "x_ref / group world_size /",
    "distribute_barrier_v2": "x_ref time_out elastic_info / group world_size /",
}


def test_every_version_is_here():
    assert set(VERSIONS) | {version.newest for version in VERSIONS.values()} == set(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_are_those_of_the_document_in_its_order(name):
    arrays, attributes, own = (part.split() for part in SIGNATURES[name].split("/"))
    for function, last in ((name, []), (f"{name}_get_workspace_size", ["product", "hccl_buffsize"])):
        signature = inspect.signature(getattr(aclnn, function))
        parameters = signature.parameters.values()
        assert list(signature.parameters) == [*arrays, *attributes, *own, *last]
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == arrays
        assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == [*attributes, *own, *last]


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_first_phase_takes_what_its_operator_takes_and_nothing_is_required(operator):
    """It has two more parameters, ``product`` and ``hccl_buffsize``, and None for what the operator needs."""
    empty = inspect.Parameter.empty
    own = inspect.signature(getattr(aclnn, operator)).parameters
    first = inspect.signature(getattr(aclnn, f"{operator}_get_workspace_size")).parameters
    assert list(first) == [*own, "product", "hccl_buffsize"]
    for name, parameter in own.items():
        assert first[name].default == (None if parameter.default is empty else parameter.default)
        assert first[name].kind is parameter.kind
    with pytest.raises(errors.MissingArgumentError, match="is None, but") as caught:
        getattr(aclnn, f"{operator}_get_workspace_size")()
    assert caught.value.status == 161001


@pytest.mark.parametrize("name", VERSIONS)
def test_help_shows_the_version(name):
    newest = inspect.signature(getattr(aclnn, VERSIONS[name].newest)).parameters
    for function in (getattr(aclnn, name), getattr(aclnn, f"{name}_get_workspace_size")):
        assert function.__name__ == function.__qualname__ and function.__name__.startswith(name)
        assert VERSIONS[name].newest in function.__doc__
        assert set(function.__annotations__) <= {*inspect.signature(function).parameters, "return"}
    for parameter in inspect.signature(getattr(aclnn, name)).parameters.values():
        assert parameter == newest[parameter.name]  # the default, the kind and the annotation


@pytest.mark.parametrize("name", VERSIONS)
def test_a_parameter_of_a_later_version_is_named_with_that_version(name):
    later = [
        v for v in [*VERSIONS, VERSIONS[name].newest] if v.startswith(name.removesuffix("_v2").removesuffix("_v3"))
    ]
    for parameter in VERSIONS[name].without:
        first = next(v for v in later if parameter in inspect.signature(getattr(aclnn, v)).parameters)
        for function in (name, f"{name}_get_workspace_size"):
            with pytest.raises(
                errors.UnexpectedArgumentError, match=f"{parameter} was given, but {function} .*{first} d"
            ):
                getattr(aclnn, function)(**{parameter: None})


# How arguments are bound.


def pair(a, b=2, *, c, d=4):
    return a, b, c, d


def test_a_call_binds_where_python_would_bind_it():
    """Positions 0 to 3 and every set of the names, an unknown one among them, against ``inspect``."""
    signature, checked = inspect.signature(pair), signature_checked(pair)
    assert inspect.signature(checked) == signature and checked.__name__ == "pair"
    bound = 0
    for count in range(4):
        for names in itertools.chain.from_iterable(itertools.combinations("abcde", n) for n in range(6)):
            args, kwargs = range(10, 10 + count), {name: name for name in names}
            try:
                want = signature.bind(*args, **kwargs).arguments
            except TypeError:
                with pytest.raises((errors.UnexpectedArgumentError, errors.MissingArgumentError)) as caught:
                    checked(*args, **kwargs)
                assert isinstance(caught.value, TypeError) and "pair" in str(caught.value)
                continue
            assert bind("pair", signature.parameters, tuple(args), kwargs) == dict(want)
            assert checked(*args, **kwargs) == pair(*args, **kwargs)
            bound += 1
    assert bound == 4 + 4 + 2


# What only the C++ calls have.

OF_THE_CALL = {"workspace": "JAX", "workspace_size": "first phase", "executor": "first phase", "stream": "streams"}
RANKS = {"ep_rank_id": "index.*group_ep", "tp_rank_id": "index.*group_tp"}
RETURNED = {
    "moe_distribute_dispatch": (
        "expand_x dynamic_scales assist_info_for_combine expert_token_nums ep_recv_counts tp_recv_counts expand_scales"
    ),
    "moe_distribute_combine_add_rms_norm": "y rstd x",
    "moe_distribute_combine_v": "x",
    "moe_update_expert": "balanced_expert_ids balanced_active_mask",
    "grouped_mat_mul_allto_allv": "y mm_y",
    "quant_grouped_mat_mul_allto_allv": "y mm_y",
    "allto_allv": "gmm_y mm_y permute",
}


def outputs_of(operator):
    return next((RETURNED[prefix].split() for prefix in RETURNED if operator.startswith(prefix)), [])


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_only_the_c_call_has_is_explained(operator):
    parameters = inspect.signature(getattr(aclnn, operator)).parameters
    words = OF_THE_CALL | RANKS
    words |= {name: f"returned.*{name}" for name in outputs_of(operator) if name not in parameters}
    words |= {f"{name}_out": f"returned.*{name}" for name in outputs_of(operator)}
    words |= {f"{name}_optional": f"here it is {name}$" for name in parameters}
    for name, text in words.items():
        for function in (operator, f"{operator}_get_workspace_size"):
            with pytest.raises(
                errors.UnexpectedArgumentError, match=f"^{name} was given, but {function} .*{text}"
            ) as caught:
                getattr(aclnn, function)(**{name: np.zeros(1)})
            assert isinstance(caught.value, TypeError) and caught.value.status == 561002


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_executor_explains_them_too(operator):
    call = call_of(operator, None, {})
    arrays = {name: array for name, array in call.items() if isinstance(array, jax.ShapeDtypeStruct)}
    _, executor = getattr(aclnn, f"{operator}_get_workspace_size")(**call)
    names = [*OF_THE_CALL, *RANKS, *(f"{name}_out" for name in outputs_of(operator))]
    for name in names:
        with pytest.raises(errors.UnexpectedArgumentError, match=f"^{name} was given, but the executor"):
            executor(**arrays, **{name: 0})


def test_an_executor_takes_arrays_by_name():
    x = np.zeros((2, 2), np.float32)
    _, executor = aclnn.distribute_barrier_get_workspace_size(x, group="ep", world_size=2)
    with pytest.raises(errors.UnexpectedArgumentError, match="takes arrays by name, and 1 came without; pass x_ref="):
        executor(x)


SPELT_OTHERWISE = {
    "expertIds": "here it is expert_ids$", "expertIdsOptional": "here it is expert_ids$",
    "expandXOut": r"returned.*DispatchOutput\.expand_x;", "epRankId": "index along the mesh axis of group_ep",
    "expertid": "did you mean 'expert_ids'",
}  # fmt: skip


@pytest.mark.parametrize("name", SPELT_OTHERWISE)
def test_the_spelling_of_the_c_call_is_understood_and_mistakes_get_a_suggestion(name):
    with pytest.raises(errors.UnexpectedArgumentError, match=f"{name} was given.*{SPELT_OTHERWISE[name]}"):
        aclnn.moe_distribute_dispatch_v2(**{name: np.zeros((2, 1), np.int32)})


def test_attributes_by_position_are_refused():
    with pytest.raises(errors.UnexpectedArgumentError, match="at most 5 .*x to expert_scales, and 7 came.*by name"):
        aclnn.moe_distribute_dispatch_v2(*[None] * 5, "ep", 8)
