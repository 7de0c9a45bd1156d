"""The configurations of published models: each makes its plan on its mesh, without devices, and is the model's."""

from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

import moe_jax as moe
from moe_jax.interop import hf

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.toml") if path.stem != "tiny")

# What says in the models' own config.json what the presets say in ours; the rest of the numbers is in the presets.
DEEPSEEK = dict(n_shared_experts=1, norm_topk_prob=True)
RELEASED = {
    "dbrx": dict(model_type="dbrx", ffn_hidden_size=10752, moe_normalize_expert_weights=1),
    "deepseek_v2": dict(
        model_type="deepseek_v2", n_shared_experts=2, topk_method="group_limited_greedy", n_group=8, topk_group=3,
        routed_scaling_factor=16.0,
    ),
    "deepseek_v2_lite": dict(model_type="deepseek_v2", n_shared_experts=2, topk_method="greedy", n_group=1),
    "deepseek_v3": dict(model_type="deepseek_v3", n_group=8, topk_group=4, routed_scaling_factor=2.5, **DEEPSEEK),
    "glm_4_5": dict(model_type="glm4_moe", n_group=1, topk_group=1, routed_scaling_factor=2.5, **DEEPSEEK),
    "glm_4_5_air": dict(model_type="glm4_moe", n_group=1, topk_group=1, routed_scaling_factor=1.0, **DEEPSEEK),
    "glm_5": dict(model_type="glm_moe_dsa", n_group=1, topk_group=1, routed_scaling_factor=2.5, **DEEPSEEK),
    "gpt_oss_120b": dict(model_type="gpt_oss", swiglu_limit=7.0),
    "gpt_oss_20b": dict(model_type="gpt_oss", swiglu_limit=7.0),
    "kimi_k2": dict(model_type="kimi_k2", n_group=1, topk_group=1, routed_scaling_factor=2.827, **DEEPSEEK),
    "llama4_maverick": dict(model_type="llama4_text"),
    "llama4_scout": dict(model_type="llama4_text"),
    "longcat_flash": dict(
        model_type="longcat_flash", expert_ffn_hidden_size=2048, zero_expert_num=256, routed_scaling_factor=6.0,
    ),
    "minimax_m2": dict(model_type="minimax_m2"),
    "minimax_m3": dict(model_type="minimax_m3_vl_text", routed_scaling_factor=2.0, shared_intermediate_size=3072),
    "mixtral_8x22b": dict(model_type="mixtral"),
    "mixtral_8x7b": dict(model_type="mixtral"),
    "olmoe_1b_7b": dict(model_type="olmoe", norm_topk_prob=False),
    "qwen3_235b_a22b": dict(model_type="qwen3_moe", norm_topk_prob=True),
    "qwen3_30b_a3b": dict(model_type="qwen3_moe", norm_topk_prob=True),
    "qwen3_5_35b_a3b": dict(model_type="qwen3_5_moe_text", shared_expert_intermediate_size=512),
    "qwen3_5_397b_a17b": dict(model_type="qwen3_5_moe_text", shared_expert_intermediate_size=1024),
    "qwen3_coder_480b": dict(model_type="qwen3_moe", norm_topk_prob=True),
    "qwen3_next_80b": dict(model_type="qwen3_next", norm_topk_prob=True, shared_expert_intermediate_size=512),
}  # fmt: skip
# Gemma's dense MLP is no part of its block, and DeepSeek-V4 has a limit that no configuration can say.
OTHER = {"gemma4_26b", "deepseek_v4_flash"}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_plans(name):
    config = moe.load_config(CONFIGS / f"{name}.toml")
    nodes, ep = config.mesh.nodes, config.mesh.ep
    mesh = AbstractMesh((nodes, ep // nodes, 1), ("node", "ep", "tp"))
    plan = moe.make_plan(
        mesh, tokens_per_rank=64, hidden=config.model.hidden, num_experts=config.moe.num_experts,
        top_k=config.moe.top_k, num_shared_experts=config.moe.num_shared_experts,
        num_copy_experts=config.moe.num_copy_experts,
    )  # fmt: skip
    assert plan.num_local_experts * ep == config.moe.num_experts
    assert plan.workspace()
    text = (CONFIGS / f"{name}.toml").read_text()
    assert "# Source: " in text.split("[mesh]")[0]


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in OTHER])
def test_presets_are_what_config_json_says(name):
    """The router, the activation and the shared experts are those that the model's config.json leads to."""
    config = moe.load_config(CONFIGS / f"{name}.toml")
    sizes = {
        "hidden_size": config.model.hidden,
        "moe_intermediate_size": config.moe.ffn,
        "intermediate_size": config.moe.ffn,
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
    }
    layer = hf.read_config(sizes | RELEASED[name])
    assert layer.plan.get("num_shared_experts", 0) == config.moe.num_shared_experts
    assert layer.plan.get("num_copy_experts", 0) == config.moe.num_copy_experts
    assert (layer.options["ffn"], layer.plan["num_experts"]) == (config.moe.ffn, config.moe.num_experts)
    named = {"clamped_swiglu": moe.ClampedSwiGLU()}.get(config.moe.activation, config.moe.activation)
    assert layer.options["activation"] == named
    assert settled(layer.router) == settled(config.router)


def settled(router: moe.RouterConfig) -> tuple:
    """What a router does: how groups are scored says nothing where there is one."""
    group_score = router.resolved_group_score if router.num_groups > 1 else ""
    first = router.topk_first and router.score == "softmax"  # scores that grow with logits choose alike
    return (
        router.score, first, router.renormalize, router.scale, router.num_groups, router.top_groups,
        router.selection_bias, group_score,
    )  # fmt: skip
