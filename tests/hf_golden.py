"""Tiny MoE blocks of transformers with random weights, what they compute, and the files in tests/data/hf made of them.

Needs torch and transformers, which no test of every day needs: ``python tests/hf_golden.py [MODEL_TYPE...]``. Each
folder holds what a user has, config.json and model.safetensors, with the names that ``save_pretrained`` writes, and
golden.safetensors: see ``Golden``.
"""

import importlib
import inspect
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, FFN, SHARED, EXPERTS, TOP_K, TOKENS = 16, 6, 10, 8, 2, 16
DATA = Path(__file__).parent / "data" / "hf"

# Every name that a config of transformers has for one of these; a config takes those that it knows.
TINY = dict(
    hidden_size=HIDDEN, d_model=HIDDEN, intermediate_size=FFN, moe_intermediate_size=FFN, expert_ffn_hidden_size=FFN,
    shared_expert_intermediate_size=SHARED, shared_intermediate_size=SHARED, share_expert_dim=SHARED,
    shared_experts_intermediate_size=SHARED, moe_shared_expert_intermediate_size=SHARED,
    num_experts=EXPERTS, num_local_experts=EXPERTS, n_routed_experts=EXPERTS, moe_num_experts=EXPERTS,
    num_experts_per_tok=TOP_K, num_experts_per_token=TOP_K, moe_topk=TOP_K, moe_k=TOP_K, top_k_experts=TOP_K,
    n_shared_experts=2, num_shared_experts=2, moe_num_shared_experts=2, n_group=4, topk_group=2, num_expert_group=4,
    norm_topk_prob=True, moe_renormalize=True, num_hidden_layers=2, n_layers=2, vocab_size=32, swiglu_limit=0.7,
    num_attention_heads=2, n_heads=2, num_key_value_heads=2, mamba_n_heads=4, mamba_d_head=8,
    routed_scaling_factor=1.5, route_scale=1.5, router_scaling_factor=1.5, moe_router_scaling_factor=1.5,
)  # fmt: skip
_DBRX = dict(ffn_config=dict(ffn_hidden_size=FFN, moe_num_experts=EXPERTS, moe_top_k=TOP_K, hidden_size=HIDDEN))

# The blocks, and what their configs say beside TINY.
BLOCKS = {
    "afmoe": {}, "aria_text": {}, "axk1": {}, "axk2": {}, "bailing_hybrid": {}, "beam": {},
    "cohere2_moe": dict(shared_expert_combination_strategy="sum", expert_selection_fn="sigmoid"), "dbrx": _DBRX,
    "deepseek_ocr2_text": {}, "deepseek_v2": dict(topk_method="group_limited_greedy"), "deepseek_v3": {},
    "deepseek_v32": {}, "deepseek_v4": dict(n_shared_experts=1, mlp_layer_types=["moe", "moe"]),
    "diffusion_gemma_text": {}, "dots1": {},
    "dots3_note_text": dict(n_shared_experts=1), "ernie4_5_moe": {}, "exaone_moe": {}, "flex_olmo": {}, "flint": {},
    "gemma4_text": {}, "glm4_moe": {}, "glm4_moe_lite": {}, "glm4v_moe_text": {}, "glm5_next_text": {},
    "glm_moe_dsa": {}, "gpt_oss": {}, "granitemoe": {}, "granitemoe_swa": {}, "granitemoehybrid": {},
    "granitemoeshared": {}, "hunyuan_v1_moe": {}, "hy_v3": {}, "hy_v4": {}, "hy_v4_vl_text": {},
    "inkling2_loop_text": {},
    "inkling2_text": {}, "jamba": {}, "jetmoe": {}, "kimi_linear": {}, "kolibri1": {}, "laguna": {}, "lara_mini": {},
    "lfm2_moe": {}, "llama4_text": dict(num_experts_per_tok=1), "longcat_flash": dict(zero_expert_num=4), "mellum": {},
    "mimo_v2_flash": {}, "minimax": {}, "minimax_m2": {}, "minimax_m3_vl_text": {}, "mistral4": {},
    "mistral_large4_text": {}, "mixtral": {}, "nemotron_h": {}, "olmoe": dict(norm_topk_prob=False),
    "openai_privacy_filter": {}, "qwen2_moe": dict(norm_topk_prob=False), "qwen3_5_moe_text": {}, "qwen3_moe": {},
    "qwen3_next": {}, "qwen3_omni_moe_text": {},
    "qwen3_omni_moe_talker_text": dict(shared_expert_intermediate_size=SHARED), "qwen3_vl_moe_text": {},
    "qwen4_exp_text": {}, "solar_open": {}, "step3p5": dict(swiglu_limits=[0.5, 0.0], swiglu_limits_shared=[0.4, 0.0]),
    "unlimited_ocr_text": {},
}  # fmt: skip

# Where transformers keeps the names of files, if not under the model_type of the part with the experts.
CONVERSIONS = {
    "dots3_note_text": "Dots3NoteTextModel", "glm5_next_text": "glm5_next", "minimax_m3_vl_text": "minimax_m3_vl",
    "qwen3_omni_moe_talker_text": "qwen3_omni_moe",
    "deepseek_ocr2_text": "deepseek_ocr2", "qwen3_vl_moe_text": "qwen3_vl_moe", "glm4v_moe_text": "glm4v_moe",
    "step3p5": "step3p7", "unlimited_ocr_text": "UnlimitedOcrTextModel",
}  # fmt: skip
# What the layer of transformers calls the block, where its source does not say so in one line.
NAMES = {"jamba": "feed_forward", "lfm2_moe": "feed_forward", "nemotron_h": "mixer"}


@dataclass
class Golden:
    """What a block computes.

    Attributes:
      config: what config.json holds.
      tensors: the weights, by the names of a file.
      values: x [T, H]; y [T, H]; ids [T, K], sorted along K; ct [T, H]; grad_x; router_x and grad_router_x [T, H] where
        the router sees something else; and "grad " + the name of each tensor that has a gradient of sum(y * ct).
    """

    config: dict
    tensors: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


def make(model_type: str, seed: int = 0) -> Golden:
    """Builds the block of transformers, runs it forward and backward, and has transformers write it."""
    import torch
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config, modeling = _config(model_type)
    config._experts_implementation = "eager"
    name, block, shared = _block(config, modeling)
    beside = [] if shared is None else list(shared.parameters())
    for tensor in (*block.parameters(), *block.buffers(), *beside):
        scale = 0.3 if tensor.ndim == 1 else 0.5
        tensor.data = (torch.randn(tensor.shape) * scale).to(torch.bfloat16).float()
    x, ct = (torch.randn(TOKENS, HIDDEN) for _ in range(2))
    x, router_x = x.requires_grad_(), None
    ids = []
    if hasattr(block, "experts"):
        block.experts.register_forward_pre_hook(lambda _, args: ids.append(args[1]) if len(args) > 1 else None)
    # 1. Forward and backward. What the model does around our layer is left out.
    if hasattr(block, "router") and hasattr(block.router, "per_expert_scale"):
        h = torch.randn(TOKENS, HIDDEN)
        seen = block.router.norm(h) * block.router.scale * block.router.scalar_root_size
        router_x = seen.detach().requires_grad_()
        block.router.norm.forward = lambda h: router_x / (block.router.scale * block.router.scalar_root_size)
        _, weights, chosen = block.router(h)
        y = block.experts(x, chosen, weights)
    else:
        if hasattr(block, "post_mlp_layernorm"):
            block.post_mlp_layernorm.forward = lambda y: y
        given = x[None] * 1  # some blocks write into it
        y = block(given)
        y = (y[0] if isinstance(y, tuple) else y).reshape(TOKENS, HIDDEN)
        if model_type == "jetmoe":
            y = y - block.bias
        if shared is not None:
            y = y + shared(x)
    top_k = BLOCKS[model_type].get("num_experts_per_tok", TOP_K)
    if not ids or ids[0].shape[-1] != top_k:
        router = block.router.layer if model_type == "jetmoe" else block.router
        ids = [torch.topk(nn.functional.linear(x, router.weight), top_k)[1]]
    (y * ct).sum().backward()
    # 2. Two files of transformers: one of the weights, one of their gradients.
    layer = nn.Module()
    if name:
        setattr(layer, name, block)
    else:
        layer.router, layer.experts = block.router, block.experts
    if shared is not None:
        layer.shared_mlp = shared

    class Model(PreTrainedModel):
        config_class = type(config)

        def __init__(self, config):
            super().__init__(config)
            self.model = nn.Module()
            self.model.layers = nn.ModuleList([layer])

    Model.__module__, Model.__name__ = modeling.__name__, CONVERSIONS.get(model_type, "Model")
    model = Model(config)
    tensors = _written(model)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data = torch.full_like(tensor, torch.nan) if tensor.grad is None else tensor.grad
    grads = {name: array for name, array in _written(model).items() if not np.isnan(array).any()}
    values = dict(x=x, y=y, ct=ct, grad_x=x.grad, ids=ids[0].sort(-1)[0].reshape(TOKENS, -1).to(torch.int32))
    if router_x is not None:
        values |= dict(router_x=router_x, grad_router_x=router_x.grad)
    values = {name: tensor.detach().numpy() for name, tensor in values.items()}
    values |= {f"grad {name}": array for name, array in grads.items()}
    return Golden(json.loads(config.to_json_string(use_diff=False)), tensors, values)


def _config(model_type: str):
    """The tiny config, and the module of transformers that has its models."""
    import transformers

    wanted = f'model_type = "{model_type}"'
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/configuration_*.py")):
        if wanted in path.read_text():
            package = f"transformers.models.{path.parent.name}"
            module = importlib.import_module(f"{package}.{path.stem}")
            made = [each for each in vars(module).values() if getattr(each, "model_type", None) == model_type]
            known = made[0]().to_dict()
            values = {name: value for name, value in TINY.items() if name in known}
            if {"moe_intermediate_size", "expert_ffn_hidden_size"} & set(values) and "intermediate_size" in values:
                values["intermediate_size"] = 20  # of dense layers
            config = made[0](**values | BLOCKS[model_type])
            return config, importlib.import_module(f"{package}.{path.stem.replace('configuration', 'modeling')}")
    raise SystemExit(f"transformers has no model_type {model_type!r}")


def _block(config, modeling):
    """The name of the block in a layer, the block, and the shared expert beside it, None if it is inside."""
    from torch import nn

    source = inspect.getsource(modeling)
    classes = [
        each
        for name, each in vars(modeling).items()
        if re.search(r"(MoE|Moe|MLP|MoeBlock|FFN|MoEBlock|MoELayer)$", name)
        and getattr(each, "__module__", "") == modeling.__name__
        and re.search(r"self\.(experts|input_linear) = \w*(Experts|Naive)", inspect.getsource(each))
    ]
    if config.model_type == "qwen3_omni_moe_talker_text":
        classes = classes[1:]
    if not classes:  # Gemma: router and experts stand in the layer
        block = nn.Module()
        for part in ("Router", "Experts"):
            made = next(each for name, each in vars(modeling).items() if re.fullmatch(rf"\w+Text{part}", name))
            setattr(block, part.lower(), made(config))
        return "", block, None
    made = classes[0]
    name = re.search(rf"self\.(\w+) = (?:\(\s*)?{made.__name__}\(", source)
    arguments = inspect.signature(made.__init__).parameters
    block = made(config, layer_idx=0) if "layer_idx" in arguments else made(config)
    shared = re.search(r"class (GraniteMoe\w*MLP)\(", source)
    return (
        NAMES.get(config.model_type, name[1] if name else "mlp"),
        block,
        getattr(modeling, shared[1])(config) if shared else None,
    )


def _written(model) -> dict[str, np.ndarray]:
    """What ``save_pretrained`` writes."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def write(folder: Path, golden: Golden) -> None:
    """The files of a golden block; weights in bf16, in which they are exact."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(array.astype(ml_dtypes.bfloat16)) for name, array in golden.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(golden.config, indent=1, sort_keys=True) + "\n")
    save_file(
        {name: np.ascontiguousarray(array) for name, array in golden.values.items()}, folder / "golden.safetensors"
    )


if __name__ == "__main__":
    for wanted in sys.argv[1:] or BLOCKS:
        write(DATA / wanted, make(wanted))
