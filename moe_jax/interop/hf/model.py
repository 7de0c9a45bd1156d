"""What config.json says about the MoE layers of a model: the arguments of the plan, the router and the layer."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_jax.config import RouterConfig
from moe_jax.errors import ConfigError, InvalidArgumentError, UnsupportedError, raise_all, suggest
from moe_jax.interop.hf import families
from moe_jax.interop.hf.families import BY_TYPE, LACKS, REQUIRED, Family, Key
from moe_jax.interop.hf.layouts import Extents

_INNER = ("text_config", "language_config", "llm_config", "thinker_config", "talker_config")


@dataclasses.dataclass(frozen=True)
class ModelLayer:
    """One MoE block of a model, as its config.json describes it.

    Attributes:
      model_type: the ``model_type`` of that part of config.json which has the experts.
      plan: keyword arguments of ``make_plan``: hidden, num_experts, top_k, num_shared_experts, num_copy_experts.
      router: the router for ``moe_on_mesh`` and ``moe_layer``.
      options: keyword arguments of ``moe_on_mesh``: ffn, activation and, where the model needs them, others.
      outside: what the model does around the layer with tensors of the block, see ``read_rest``; mostly "".
      family: the row of the table of families.
      num_layers: how many layers the whole model has; None if config.json does not say.
      quantisation: what config.json says under "quantization_config"; {} where it says nothing.
    """

    model_type: str
    plan: Mapping[str, int]
    router: RouterConfig
    options: Mapping[str, Any]
    outside: str
    family: Family = dataclasses.field(repr=False)
    num_layers: int | None = dataclasses.field(repr=False)
    quantisation: Mapping[str, Any] = dataclasses.field(repr=False, default_factory=dict)

    @property
    def extents(self) -> Extents:
        """The sizes behind the letters of ``layouts``."""
        width, count = self.options["ffn"], self.plan.get("num_shared_experts", 0)
        return {
            "E": self.plan["num_experts"],
            "F": width,
            "H": self.plan["hidden"],
            "I": self.plan["num_experts"] + self.plan.get("num_copy_experts", 0),
            "S": self.options.get("shared_ffn", width * count),
        }


def known_types() -> tuple[str, ...]:
    """The values of ``model_type`` whose MoE layers can be read and written.

    >>> from moe_jax.interop import hf
    >>> "mixtral" in hf.known_types()
    True
    """
    return tuple(sorted(BY_TYPE))


def read_config(source: str | os.PathLike | Mapping[str, Any], layer: int | None = None) -> ModelLayer:
    """The MoE layer that a model's config.json describes.

    Args:
      source: the folder of a model, the path of its config.json, or what that file holds.
      layer: the number of the layer, where layers differ, as in models whose limits or top_k are lists; None: the first
        one.

    Raises:
      ConfigError: config.json is missing, is not JSON, has an unknown ``model_type``, or lacks a value.
      UnsupportedError: a layer of moe_jax cannot be this block; the text says what it lacks.

    >>> from moe_jax.interop import hf
    >>> config = dict(model_type="mixtral", hidden_size=64, intermediate_size=128, num_local_experts=8)
    >>> hf.read_config(config | dict(num_experts_per_tok=2)).plan
    {'hidden': 64, 'num_experts': 8, 'top_k': 2}
    """
    config = load_config_json(source)
    model_type, values = _described(config)
    if model_type in LACKS:
        raise UnsupportedError(f"model_type={model_type!r} needs {LACKS[model_type]}")
    family = BY_TYPE[model_type]
    try:
        return _read(family, model_type, values, layer or 0)
    except InvalidArgumentError as error:  # values that no router has
        raise ConfigError(f"config.json: {error}") from None


def load_config_json(source: str | os.PathLike | Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json of a folder, or at a path, holds."""
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"source is a {type(source).__name__}; give the folder of a model, or what config.json holds")
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the folder of a model") from None
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: holds a {type(config).__name__}, not an object with a model_type")
    return config


def _described(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The part that has the experts: the innermost one of a type in the table, with what stands around it."""
    found = [(part.get("model_type"), part) for part in _parts(config)]
    for model_type, part in reversed(found):
        if model_type in BY_TYPE or model_type in LACKS:
            return model_type, part
    names = " and ".join(repr(model_type) for model_type, _ in found)
    raise ConfigError(f"config.json: model_type={names} is unknown; {suggest(found[0][0], BY_TYPE)}")


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """``config``, then the first config of a language model in it, and so on."""
    ffn = config.get("ffn_config")  # DBRX
    yield {**config, **ffn, "model_type": config.get("model_type")} if isinstance(ffn, Mapping) else config
    for name in _INNER:
        if isinstance(inner := config.get(name), Mapping):
            around = {key: value for key, value in config.items() if key not in _INNER}
            yield from _parts({**around, "model_type": None, **inner})
            return


def _read(family: Family, model_type: str, config: Mapping[str, Any], layer: int) -> ModelLayer:
    config = {**config, **(config.get("per_layer_config") or {}).get(str(layer), {})}

    def get(value: Any) -> Any:
        if not isinstance(value, Key):
            return value
        name = next((name for name in value.names if config.get(name) is not None), None)
        found = value.default if name is None else config[name]
        if isinstance(found, list | tuple):
            if layer >= len(found):
                raise ConfigError(f"config.json: {name!r} has {len(found)} entries, and none for layer {layer}")
            found = found[layer] if found[layer] is not None else value.default
        if found is REQUIRED:
            raise ConfigError(f"config.json of a {model_type!r} lacks {' or '.join(map(repr, value.shown))}; add it")
        return found

    # 1. What the layer cannot do.
    broken = []
    for rule in family.rules:
        names = [name for name in rule.value.names if name in config]
        said = config[names[0]] if names else rule.value.default
        if said not in rule.allowed:
            broken.append(f"{(names or rule.value.names)[0]}={said!r} needs {rule.lacks}")
    name = (config.get("ffn_act_fn") or {}).get("name") or get(families.HIDDEN_ACT)
    activation = family.activation(name, get)
    if activation is None:
        broken.append(f"activation {name!r} has no name here")
    raise_all(broken, f"model_type={model_type!r}", UnsupportedError)
    # 2. The arguments. Those that have their usual values are left out.
    ffn, width = int(get(family.ffn)), int(get(family.shared_width) or 0)
    count = 1 if width else int(get(family.shared_count) or 0)
    plan = dict(hidden=int(get(family.hidden)), num_experts=int(get(family.num_experts)), top_k=int(get(family.top_k)))
    plan |= dict(num_shared_experts=count) if count else {}
    copies = int(get(family.num_copy_experts) or 0)
    plan |= dict(num_copy_experts=copies) if copies else {}
    options: dict[str, Any] = dict(ffn=ffn, activation=activation)
    if width and width != ffn:
        options["shared_ffn"] = width
    if count and family.shared_activation is not None:
        shared = family.shared_activation(name, get)
        options |= dict(shared_activation=shared) if shared != activation else {}
    flags = dict(
        use_bias=family.use_bias,
        gated_shared=bool(count and family.shared_router),
        expert_scale=bool(family.expert_scale),
        weigh_inputs=family.weigh_inputs,
    )
    options |= {flag: True for flag, holds in flags.items() if holds}
    router = RouterConfig(
        score=get(family.score),
        topk_first=family.topk_first,
        renormalize=bool(get(family.renormalize)) and not (family.topk_first and get(family.score) == "softmax"),
        scale=float(get(family.scale)),
        num_groups=int(get(family.num_groups)),
        top_groups=int(get(family.top_groups)),
        selection_bias=bool(family.selection_bias),
        group_score=family.group_score,
    )
    num_layers = config.get("num_hidden_layers", config.get("n_layers"))
    quantisation = config.get("quantization_config") or {}
    return ModelLayer(model_type, plan, router, options, family.outside, family, num_layers, quantisation)
