"""Plans: a product's limits, what a row costs on the wire, and the choice of a transport."""

import pytest
from jax.sharding import AbstractMesh

import moe_jax as moe

SIZES = {"tokens_per_rank": 64, "hidden": 7168, "num_experts": 256, "top_k": 8}


def make(ep=16, tp=1, **options):
    return moe.make_plan(AbstractMesh((ep, tp), ("ep", "tp")), **(SIZES | options))


PRODUCT_RULES = [  # product, at the edge, just past it, words of the refusal
    ("a3", {"hidden": 8192}, {"hidden": 8193}, "hidden=8193"),
    ("a3", {"hidden": 1024}, {"hidden": 1023}, "hidden=1023"),
    ("a3", {"tokens_per_rank": 512}, {"tokens_per_rank": 513}, "tokens_per_rank=513"),
    ("a3", {"num_experts": 1024, "ep": 128}, {"num_experts": 1152, "ep": 128}, "num_experts=1152"),
    ("a3", {"top_k": 16}, {"top_k": 17}, "top_k=17"),
    ("a3", {"quant": "int8"}, {"quant": "mx_e4m3"}, "quant='mx_e4m3'"),
    ("a3", {"quant": "int8"}, {"quant": "fp8_e4m3"}, "quant='fp8_e4m3'"),
    ("a3", {"dtype": "float16"}, {"dtype": "float32"}, "dtype='float32'"),
    ("a3", {"combine_quant": "int8_group8"}, {"combine_quant": "mx_e4m3"}, "combine_quant='mx_e4m3'"),
    ("a3", {"tp": 2, "num_experts": 16}, {"tp": 2, "num_experts": 32}, "local_experts_with_tp"),
    ("a5", {"quant": "mx_e4m3"}, {"quant": "int8_group8"}, "quant='int8_group8'"),
    ("a5", {"combine_quant": "mx_e4m3"}, {"combine_quant": "int8"}, "combine_quant='int8'"),
    ("a2", {"num_shared_experts": 0}, {"num_const_experts": 1}, "num_const_experts=1"),
    ("a2", {"ep": 16}, {"ep": 24, "num_experts": 240}, "ep=24"),
]


@pytest.mark.parametrize("product,legal,illegal,words", PRODUCT_RULES)
def test_a_product_refuses_what_its_operators_refuse(product, legal, illegal, words):
    make(**legal, product=product)
    make(**illegal)  # nothing is wrong with it elsewhere
    with pytest.raises(moe.errors.InvalidArgumentError, match=words):
        make(**illegal, product=product)


@pytest.mark.parametrize(
    "quant,bytes_per_row",
    [("none", 2 * 7168), ("int8", 7168 + 4), ("fp8_e4m3_group128", 7168 + 4 * 56), ("mx_e2m1", 3584 + 224)],
)
def test_workspace_counts_the_message_of_a_quantised_row(quant, bytes_per_row):
    plan = make(quant=quant, transport="padded")
    slots = plan.ep_size * plan.pair_capacity
    assert plan.workspace()["send"] == plan.workspace()["arrival"] == slots * bytes_per_row
    assert plan.workspace()["rows"] == plan.num_rows(plan.pair_capacity) * 2 * 7168
    assert f"out {quant}" in plan.describe()


def test_auto_weighs_all_bytes_of_both_ways():
    """Few experts per token favour the exchange, as many as ranks the gather; a quantised wire shifts the balance."""
    assert make(ep=8, top_k=1).transport == "padded"
    assert make(ep=8, top_k=8, tokens_per_rank=4096, dtype="float32").transport == "allgather"
    narrow = {"ep": 8, "top_k": 3, "tokens_per_rank": 4096, "capacity_factor": 1.0}
    chosen = [make(**narrow, quant=q, combine_quant=q).transport for q in ("none", "int8")]
    out, slots = {"none": 2 * 7168, "int8": 7168 + 4}, make(**narrow).pair_capacity
    for quant, transport in zip(("none", "int8"), chosen, strict=True):
        padded = 7 * slots * 2 * out[quant]
        gathered = 7 * 4096 * (out[quant] + 4 * 7168)
        assert transport == ("padded" if padded < gathered else "allgather")


def test_hierarchy_has_a_workspace_and_says_its_nodes():
    mesh = AbstractMesh((2, 8, 1), ("node", "ep", "tp"))
    plan = moe.make_plan(mesh, **SIZES, transport="hierarchy")
    assert plan.num_nodes == 2 and plan.ep_size == 16
    assert plan.workspace()["crossing"] == 2 * 2 * 64 * 2 * 7168  # no token crosses to a node twice
