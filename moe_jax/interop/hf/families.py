"""The one table of model families: what their config.json says, and what their files call the tensors. Data only.

A row describes one MoE block of Hugging Face's transformers, by the names of released checkpoints, which are those that
its ``save_pretrained`` writes too. Where several spellings are about, the first one is written, and any one is read.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.activations import Choice, ClampedSwiGLU
from moe_jax.interop.hf.layouts import Layout, Stored
from moe_jax.interop.hf.spellings import (
    DBRX,
    FUSED,
    FUSED_BACKWARD,
    INTERLEAVED,
    LINEARS,
    NAMED,
    NUMBERED,
    SHARED_FUSED,
    STACKED,
    biased,
    fused,
    shared,
)

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A value of config.json: that of the first of ``names`` that is there and not null; of a list, the layer's entry.

    Attributes:
      names: where it may stand.
      default: the value where none of the names is there; REQUIRED: one of them must be there.
      own: those of the names that the models of a family use, which an error about a missing value lists.
    """

    names: tuple[str, ...]
    default: Any = REQUIRED
    own: tuple[str, ...] = ()

    def named(self, *own: str) -> "Key":
        """The same key for a family whose models say it under the names ``own``."""
        return dataclasses.replace(self, own=own)

    @property
    def shown(self) -> tuple[str, ...]:
        return self.own or self.names


def key(*names: str, default: Any = REQUIRED) -> Key:
    """A ``Key``; without a default, config.json must have it."""
    return Key(names, default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A value of config.json that must be one of ``allowed``; ``lacks`` says what the layer cannot do with others."""

    value: Key
    allowed: tuple[Any, ...]
    lacks: str


Get = Callable[[Any], Any]  # a Key, or a value that stands for itself -> the value


HIDDEN = key("hidden_size", "d_model").named("hidden_size")
NUM_EXPERTS = key("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts").named("num_experts")
ROUTED, LOCAL = NUM_EXPERTS.named("n_routed_experts"), NUM_EXPERTS.named("num_local_experts")
PLAIN_OR_LOCAL = NUM_EXPERTS.named("num_experts", "num_local_experts")  # released, and written by later transformers
OF_MOE = NUM_EXPERTS.named("moe_num_experts")
TOP_K = key("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
TOP_K = TOP_K.named("num_experts_per_tok")
MOE_FFN = key("moe_intermediate_size")
HIDDEN_ACT = key("hidden_act", "mlp_hidden_act", "hidden_activation", "activation_function", default="silu")
NORM = key("norm_topk_prob", "moe_renormalize", default=True)
SCALE = key("routed_scaling_factor", "route_scale", "router_scaling_factor", default=1.0)
GROUPS: dict[str, Any] = dict(
    num_groups=key("n_group", "num_expert_group", default=1),
    top_groups=key("topk_group", default=1),
)
SHARED_COUNT = key("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", default=0)
SHARED_WIDTH = key("shared_expert_intermediate_size", default=0)

_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu", "relu2": "relu2_gated"}
_GATED |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "geglu_tanh")
_UNGATED = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2"}
_UNGATED |= dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh")


# Activations.


def gated(name: Any, get: Get) -> Choice | None:
    """Our name for Hugging Face's activation ``name``, for experts with a gate; None: we have no such activation."""
    return _GATED.get(name)


def ungated(name: Any, get: Get) -> Choice | None:
    return _UNGATED.get(name)


def clamped(name: Any, get: Get) -> Choice | None:
    """silu(min(gate, limit)) * clip(up): DeepSeek-V4."""
    return ClampedSwiGLU(float(get(key("swiglu_limit"))), alpha=1.0, shift=0.0) if name == "silu" else None


def clamped_alpha(name: Any, get: Get) -> Choice | None:
    """gpt-oss."""
    limit, alpha = get(key("swiglu_limit", default=7.0)), get(key("swiglu_alpha", default=1.702))
    return ClampedSwiGLU(float(limit), alpha=float(alpha), shift=1.0)


@dataclasses.dataclass(frozen=True)
class SoftcappedSwiGLU:
    """cap(gate, gate_cap) * sigmoid(gate) * cap(up, up_cap), where cap(x, c) = c tanh(x / c): Inkling 2."""

    gate_cap: float
    up_cap: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        softcap = self.gate_cap * jnp.tanh(gate / self.gate_cap)
        return softcap * jax.nn.sigmoid(gate) * (self.up_cap * jnp.tanh(up / self.up_cap))


@dataclasses.dataclass(frozen=True)
class ClampedSiLU:
    """min(silu(gate), limit) * clip(up, -limit, limit), clamped behind the activation: Step 3.7."""

    limit: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return jnp.minimum(jax.nn.silu(gate), self.limit) * jnp.clip(up, -self.limit, self.limit)


def softcapped(name: Any, get: Get) -> Choice | None:
    return SoftcappedSwiGLU(float(get(key("mlp_gate_softcap"))), float(get(key("mlp_up_softcap"))))


def clamped_behind(name: Any, get: Get) -> Choice | None:
    limit = get(key("swiglu_limits", default=0.0))
    return ClampedSiLU(float(limit)) if limit else gated(name, get)


def clamped_behind_shared(name: Any, get: Get) -> Choice | None:
    limit = get(key("swiglu_limits_shared", default=0.0))
    return ClampedSiLU(float(limit)) if limit else gated(name, get)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table. A value is a ``Key``, or stands for itself.

    Attributes:
      types: the values of ``model_type`` in config.json.
      layers: what stands before the number of a layer in the names of tensors. Files with another prefix are read too.
      blocks: what stands behind it, by spelling; "" where the tensors stand in the layer itself.
      hidden, num_experts, top_k, ffn, num_copy_experts: of the plan and the layer; copy experts give back their input.
      activation, shared_activation: (name in config.json, reader of a Key) -> ours.
      score, topk_first, renormalize, scale, num_groups, top_groups, group_score: of the router.
      router, router_bias, selection_bias, expert_scale, shared_router: spellings of these tensors; () where there is
        none. Names are below the block, or, behind "../", below the layer.
      bias_axes: the axes of the selection bias.
      experts, shared: spellings of these groups of tensors.
      shared_count: how many shared experts of width F there are.
      shared_width: how wide the shared expert is, in models that say so instead.
      weigh_inputs: whether the weight multiplies what goes into an expert.
      use_bias: whether experts and router have biases.
      rules: what config.json must say for the layer to be right.
      refuse: names of tensors that only occur in blocks which the layer cannot be, and what it lacks for them.
      rest: names and axes of tensors in the block that belong to the model around the layer.
      outside: what that model does with the tensors of ``rest``.
      ignored: a pattern of names that no model reads.
    """

    types: tuple[str, ...]
    layers: str = "model.layers"
    blocks: tuple[str, ...] = ("mlp",)
    hidden: Any = HIDDEN
    num_experts: Any = NUM_EXPERTS
    top_k: Any = TOP_K
    ffn: Any = MOE_FFN
    num_copy_experts: Any = 0
    activation: Callable[[Any, Get], Choice | None] = gated
    shared_activation: Callable[[Any, Get], Choice | None] | None = None
    score: str | Key = "softmax"
    topk_first: bool = False
    renormalize: Any = True
    scale: Any = 1.0
    num_groups: Any = 1
    top_groups: Any = 1
    group_score: str = "auto"
    router: tuple[str, ...] = ("gate.weight",)
    router_bias: tuple[str, ...] = ()
    selection_bias: tuple[str, ...] = ()
    bias_axes: str = "I"
    expert_scale: tuple[str, ...] = ()
    shared_router: tuple[str, ...] = ()
    experts: tuple[Layout, ...] = (NAMED, FUSED)
    shared: tuple[Layout, ...] = ()
    shared_count: Any = 0
    shared_width: Any = 0
    weigh_inputs: bool = False
    use_bias: bool = False
    rules: tuple[Rule, ...] = ()
    refuse: tuple[tuple[str, str], ...] = ()
    rest: tuple[tuple[str, str], ...] = ()
    outside: str = ""
    ignored: str = ""


_FFN = key("intermediate_size")
_NO_BIAS = Rule(value=key("mlp_bias", "use_bias", default=False), allowed=(False,), lacks="shared experts with biases")
_TOPK_METHOD = key("topk_method", default="greedy")
_SIGMOID: dict[str, Any] = dict(score="sigmoid", renormalize=NORM, scale=SCALE, **GROUPS)
_DEEPSEEK: dict[str, Any] = dict(num_experts=ROUTED, **_SIGMOID)
_CORRECTION = ("gate.e_score_correction_bias",)
_GRANITE: dict[str, Any] = dict(
    num_experts=LOCAL, blocks=("block_sparse_moe",), ffn=_FFN, topk_first=True, renormalize=False,
    router=("router.layer.weight", "router.weight"), experts=(LINEARS, FUSED),
)  # fmt: skip

FAMILIES = (
    # softmax, then the best
    Family(
        types=("mixtral", "minimax"), num_experts=LOCAL, blocks=("block_sparse_moe", "mlp"), ffn=_FFN, topk_first=True,
        renormalize=False,
        experts=(NUMBERED, FUSED),
    ),
    Family(
        types=("qwen2_moe", "qwen3_next", "qwen3_omni_moe_talker_text", "qwen4_exp_text"), num_experts=PLAIN_OR_LOCAL,
        renormalize=key("norm_topk_prob", default=False),
        shared=(shared("shared_expert"),), shared_width=SHARED_WIDTH, shared_router=("shared_expert_gate.weight",),
    ),
    Family(
        types=("qwen3_5_moe_text", "qwen3_5_moe"), num_experts=PLAIN_OR_LOCAL, layers="model.language_model.layers",
        experts=(FUSED, NAMED),
        shared=(shared("shared_expert"),), shared_width=SHARED_WIDTH, shared_router=("shared_expert_gate.weight",),
    ),
    Family(types=("qwen3_moe", "mellum"), num_experts=PLAIN_OR_LOCAL, renormalize=key("norm_topk_prob", default=False)),
    Family(
        types=("qwen3_omni_moe_text",), num_experts=PLAIN_OR_LOCAL, layers="thinker.model.layers",
        renormalize=key("norm_topk_prob", default=True),
    ),
    Family(
        types=("qwen3_vl_moe_text", "qwen3_vl_moe"), num_experts=PLAIN_OR_LOCAL, layers="model.language_model.layers",
        experts=(FUSED_BACKWARD, FUSED),
    ),
    Family(types=("olmoe", "flex_olmo"), ffn=_FFN, renormalize=key("norm_topk_prob", default=False)),
    Family(types=("jamba",), blocks=("feed_forward",), ffn=_FFN, renormalize=False, router=("router.weight",)),
    Family(
        types=("hunyuan_v1_moe",), top_k=TOP_K.named("moe_topk"), ffn=_FFN, router=("gate.wg.weight",),
        shared=(shared("shared_mlp"),), shared_count=1,
    ),
    Family(
        types=("lara_mini",), renormalize=NORM, shared=(shared("shared_expert"),), shared_width=SHARED_WIDTH,
    ),
    Family(
        types=("dbrx",), hidden=HIDDEN.named("d_model"), num_experts=OF_MOE, top_k=TOP_K.named("moe_top_k"),
        layers="transformer.blocks", blocks=("ffn",), ffn=key("ffn_hidden_size"),
        router=("router.layer.weight",), experts=(DBRX,),
        rules=(Rule(
            value=key("moe_normalize_expert_weights", default=1.0), allowed=(1, 1.0),
            lacks="weights divided by another norm than the sum",
        ),),
    ),
    Family(
        types=("deepseek_v2", "deepseek_ocr2_text", "unlimited_ocr_text"), num_experts=ROUTED, renormalize=False,
        scale=SCALE, **GROUPS,
        group_score="max", shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
        rules=(_NO_BIAS, Rule(value=_TOPK_METHOD, allowed=("greedy", "group_limited_greedy"), lacks="that choice")),
    ),
    Family(
        types=("mistral4",), num_experts=ROUTED, renormalize=NORM, scale=SCALE, **GROUPS, group_score="top2",
        experts=(FUSED, NAMED),
        shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
    ),
    Family(
        types=("mistral_large4_text",), num_experts=ROUTED, layers="layers", blocks=("", "mlp"), scale=SCALE, **GROUPS,
        group_score="top2",
        experts=(NUMBERED, FUSED), shared=(shared("shared_experts", "w1", "w3", "w2"), shared("shared_experts")),
        shared_count=SHARED_COUNT,
    ),
    Family(
        types=("ernie4_5_moe",), num_experts=key("moe_num_experts", "num_experts"), top_k=TOP_K.named("moe_k"),
        rules=(_NO_BIAS,),
        selection_bias=("moe_statics.e_score_correction_bias",), bias_axes="1 I",
        shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
    ),
    Family(
        types=("longcat_flash",), num_experts=ROUTED, top_k=TOP_K.named("moe_topk"),
        ffn=key("expert_ffn_hidden_size", "moe_intermediate_size"), renormalize=False,
        scale=SCALE, num_copy_experts=key("zero_expert_num", default=0), router=("router.classifier.weight",),
        selection_bias=("router.e_score_correction_bias",),
        ignored=r"router\.classifier\.bias|experts\.\d+\.(gate|up)_proj\.weight",
        rules=(Rule(
            value=key("zero_expert_type", default="identity"), allowed=("identity",),
            lacks="weightless experts that are not the identity",
        ),),
    ),
    Family(
        types=("gemma4_text", "gemma4_unified_text", "diffusion_gemma_text"), top_k=TOP_K.named("top_k_experts"),
        layers="model.language_model.layers",
        blocks=("",), router=("router.proj.weight",), expert_scale=("router.per_expert_scale",),
        experts=(FUSED, NAMED), rest=(("router.scale", "H"),),
        outside="router_x is RMSNorm(h) without weights, times router.scale / sqrt(H), and x is "
                "pre_feedforward_layernorm_2(h); the dense MLP and the other norms stand beside the layer",
    ),
    # the best, then softmax over those
    Family(types=("granitemoe",), **_GRANITE),
    Family(
        types=("granitemoeshared", "granitemoehybrid", "granitemoe_swa"), **_GRANITE,
        shared=(SHARED_FUSED,), shared_width=key("shared_intermediate_size", default=0),
    ),
    Family(
        types=("aria_text",), num_experts=OF_MOE, top_k=TOP_K.named("moe_topk"), layers="language_model.model.layers",
        ffn=_FFN, topk_first=True, renormalize=False,
        router=("router.weight",), rules=(_NO_BIAS,), shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
        experts=(fused("experts.fc1.weight", "E H 2F", "experts.fc2.weight", "E F H"), FUSED_BACKWARD),
    ),
    Family(
        types=("jetmoe",), num_experts=LOCAL, ffn=_FFN, topk_first=True, renormalize=False,
        router=("router.layer.weight",),
        experts=(LINEARS,), rest=(("bias", "H"),), outside="adds bias to y",
    ),
    Family(
        types=("cohere2_moe",), ffn=_FFN, score=key("expert_selection_fn", default="softmax"), topk_first=True,
        renormalize=NORM, shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
        rules=(Rule(
            value=key("shared_expert_combination_strategy", default="average"), allowed=("sum",),
            lacks="the mean of routed and shared experts; say 'sum', and halve y",
        ),),
    ),
    Family(
        types=("gpt_oss",), num_experts=LOCAL, ffn=_FFN, topk_first=True, renormalize=False, router=("router.weight",),
        router_bias=("router.bias",), use_bias=True, activation=clamped_alpha,
        experts=(biased(INTERLEAVED, interleaved=True),),
    ),
    Family(
        types=("openai_privacy_filter",), num_experts=LOCAL, ffn=_FFN, topk_first=True, renormalize=False,
        router=("router.weight",),
        router_bias=("router.bias",), use_bias=True, activation=clamped_alpha, experts=(biased(FUSED_BACKWARD),),
    ),
    # sigmoid
    Family(
        types=(
            "deepseek_v3", "kimi_k2", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe_text",
            "dots1", "solar_open", "axk2",
        ),
        **_DEEPSEEK, selection_bias=_CORRECTION, shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
        rules=(_NO_BIAS,),
    ),
    Family(
        types=("axk1",), **_DEEPSEEK, selection_bias=_CORRECTION,
        shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
        rest=(("../post_mlp_layernorm.weight", "H"),), outside="applies RMSNorm to y, by post_mlp_layernorm",
    ),
    Family(
        types=("bailing_hybrid",), **_SIGMOID,
        selection_bias=("gate.expert_bias", *_CORRECTION),
        shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
    ),
    Family(
        types=("kimi_linear",), blocks=("block_sparse_moe", "mlp"), **_SIGMOID,
        top_k=TOP_K.named("num_experts_per_token", "num_experts_per_tok"), selection_bias=_CORRECTION,
        experts=(NUMBERED, FUSED), shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
    ),
    Family(types=("mimo_v2_flash", "beam"), **_DEEPSEEK, selection_bias=_CORRECTION),
    Family(
        types=("exaone_moe",), **_SIGMOID, selection_bias=("e_score_correction_bias", *_CORRECTION),
        shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
    ),
    Family(
        types=("dots3_note_text",), layers="model.language_model.layers", **_DEEPSEEK, selection_bias=_CORRECTION,
        shared=(shared("shared_experts"),), shared_width=key("shared_experts_intermediate_size"),
    ),
    Family(
        types=("hy_v4", "hy_v4_vl_text"), **_DEEPSEEK, activation=clamped, shared_activation=gated,
        selection_bias=_CORRECTION, shared_count=SHARED_COUNT,
        shared=(shared("shared_experts"), shared("shared_experts", gate="linear_gate")),
    ),
    Family(
        types=("glm5_next_text", "glm5_next"), layers="model.language_model.layers", **_DEEPSEEK, activation=clamped,
        selection_bias=_CORRECTION, shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
    ),
    Family(
        types=("nemotron_h",), layers="backbone.layers", blocks=("mixer",), **_DEEPSEEK, activation=ungated,
        selection_bias=_CORRECTION, experts=(NAMED, {"w_up": Stored("experts.up_proj", "E F H"),
                                                     "w_down": Stored("experts.down_proj", "E H F")}),
        shared=(shared("shared_experts"),), shared_width=key("moe_shared_expert_intermediate_size"),
        rules=(_NO_BIAS, Rule(
            value=key("moe_latent_size", default=None), allowed=(None,),
            lacks="a projection to a latent size and back around the routed experts alone",
        ),),
    ),
    Family(
        types=("minimax_m2",), num_experts=LOCAL, blocks=("block_sparse_moe", "mlp"), ffn=_FFN, score="sigmoid",
        selection_bias=("e_score_correction_bias", *_CORRECTION), experts=(NUMBERED, FUSED),
    ),
    Family(
        types=("minimax_m3_vl_text",), num_experts=LOCAL, layers="language_model.model.layers",
        blocks=("block_sparse_moe", "mlp"),
        ffn=_FFN, score="sigmoid", scale=SCALE, activation=clamped_alpha,
        selection_bias=("e_score_correction_bias", *_CORRECTION), experts=(NUMBERED, FUSED),
        shared=(shared("shared_experts"),), shared_width=key("shared_intermediate_size"),
    ),
    Family(
        types=("hy_v3",), score="sigmoid", scale=SCALE, router=("router.gate.weight", "gate.weight"),
        selection_bias=("expert_bias", "e_score_correction_bias"), rules=(_NO_BIAS,),
        shared=(shared("shared_mlp"), shared("shared_experts")), shared_count=SHARED_COUNT,
    ),
    Family(
        types=("step3p5", "step3p7"), num_experts=NUM_EXPERTS.named("moe_num_experts", "n_routed_experts"),
        top_k=TOP_K.named("moe_top_k", "num_experts_per_tok"), blocks=("moe",), score="sigmoid",
        activation=clamped_behind,
        shared_activation=clamped_behind_shared, scale=key("moe_router_scaling_factor", default=1.0),
        selection_bias=("router_bias",), experts=(STACKED,), rules=(_NO_BIAS,),
        shared=(shared("../share_expert"),), shared_width=key("share_expert_dim"),
    ),
    Family(
        types=("afmoe",), score="sigmoid", scale=SCALE, router=("router.gate.weight",),
        selection_bias=("expert_bias",), shared=(shared("shared_experts"),), shared_count=SHARED_COUNT,
    ),
    Family(
        types=("laguna",), score="sigmoid", scale=key("moe_routed_scaling_factor", default=1.0),
        selection_bias=("experts.e_score_correction_bias", *_CORRECTION),
        shared=(shared("shared_expert"), shared("shared_experts")), shared_width=SHARED_WIDTH,
        rules=(
            Rule(value=key("moe_router_logit_softcapping", default=0.0), allowed=(0, 0.0, None),
                 lacks="softcapped logits of a router; choose with a router of your own and pass routing="),
            Rule(value=key("moe_apply_router_weight_on_input", default=False), allowed=(False,),
                 lacks="weights on inputs here, which transformers leaves out as well"),
        ),
    ),
    Family(
        types=("lfm2_moe",), blocks=("feed_forward",), score="sigmoid", renormalize=NORM, scale=SCALE,
        selection_bias=("expert_bias",), experts=(NUMBERED, FUSED),
        rules=(Rule(value=key("use_expert_bias", default=True), allowed=(True,), lacks="a block without its bias"),),
    ),
    Family(
        types=("flint",), score="sigmoid", renormalize=NORM,
        shared=(shared("shared_expert"),), shared_width=SHARED_WIDTH,
    ),
    Family(
        types=("kolibri1",), num_experts=LOCAL, score="sigmoid", topk_first=True,
        renormalize=key("norm_topk_prob", default=False),
        selection_bias=("../moe.router.expert_bias", *_CORRECTION),
        shared=(shared("shared_experts"),), shared_width=SHARED_WIDTH,
    ),
    Family(
        types=("llama4_text",), num_experts=LOCAL, layers="language_model.model.layers", blocks=("feed_forward",),
        ffn=_FFN,
        score="sigmoid", renormalize=False, weigh_inputs=True, router=("router.weight",), experts=(FUSED_BACKWARD,),
        shared=(shared("shared_expert"),), shared_count=1,
    ),
    Family(
        types=("inkling2_text", "inkling2_loop_text"), num_experts=ROUTED, layers="model.llm.layers", score="sigmoid",
        scale=SCALE,
        activation=softcapped,
        selection_bias=("gate.bias", *_CORRECTION),
        experts=(fused("experts.w13_weight", "E 2F H", "experts.w2_weight", "E H F", interleaved=True), FUSED),
    ),
    # the root of softplus
    Family(
        types=("deepseek_v4",), num_experts=ROUTED, layers="layers", blocks=("ffn", "mlp"), score="sqrt_softplus",
        scale=SCALE,
        activation=clamped, selection_bias=("gate.bias", *_CORRECTION), experts=(NUMBERED, FUSED),
        shared=(shared("shared_experts", "w1", "w3", "w2"), shared("shared_experts")), shared_count=SHARED_COUNT,
        rules=(_NO_BIAS, Rule(value=key("scoring_func", default="sqrtsoftplus"), allowed=("sqrtsoftplus",),
                              lacks="another score"),),
        refuse=(("gate.tid2eid", "experts looked up by token; look them up yourself and pass routing="),),
    ),
)  # fmt: skip

BY_TYPE = {name: family for family in FAMILIES for name in family.types}

# Blocks that the layer cannot be, and what it lacks.
LACKS = {
    "inkling_text": "weights that routed and shared experts share in one sum; pass routing= and add the shared ones",
    "muse_spark_text": "a norm of what each expert gives; use map_experts with a function of your own",
    "phimoe": "the sparse mixer, which thins out each choice by itself; choose yourself and pass routing=",
    "zaya": "a router of several layers with a state; choose yourself and pass routing=",
    "ernie4_5_vl_moe_text": "experts of two widths, one for each kind of token; make two layers",
    "dots3_note_vision_encoder": "another number of experts in each layer of a vision tower",
    "nllb-moe": "two choices with capacities, and a factor for dropped tokens; choose yourself and pass routing=",
    "switch_transformers": "capacities for each sequence; choose yourself and pass routing=",
    "doge": "experts of one neuron, found by products of keys",
    "vitpose_backbone": "experts chosen by data set, each a part of one projection",
}
