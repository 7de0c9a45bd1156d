"""Static configuration: frozen dataclasses that check themselves, and the TOML file that fills them.

Every class is keyword-only, hashable and holds no arrays. A class lists every rule that its own values break; `Config`
adds the rules between sections. `load_config` reads a file, `parse_mesh` reads the short form "ep=4,tp=2".
"""

import dataclasses
import math
import os
import types
import typing
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from moe_jax import _compat, activations
from moe_jax.errors import ConfigError, InvalidArgumentError, raise_all, read_toml, suggest

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
GROUP_SCORES = ("auto", "max", "top2")
ACTIVATIONS = tuple(activations.TABLE)
TRANSPORTS = ("auto", "padded", "ragged", "allgather", "hierarchy")
OVERFLOWS = ("dropless", "drop")
DTYPES = ("float32", "bfloat16")
TOKENS = 512  # of each device, where a configuration has no [train] section to say how many
BALANCES = ("rank", "token", "load")


class _Checked:
    """Checks the types of all fields, then the rules of the subclass; raises one error for all that is wrong."""

    def __post_init__(self) -> None:
        violations = _type_violations(self) or list(self._violations())
        raise_all(violations, type(self).__name__, InvalidArgumentError)

    def _violations(self) -> typing.Iterator[str]:
        raise NotImplementedError


@_compat.exportable_static
@dataclass(frozen=True, kw_only=True)
class RouterConfig(_Checked):
    """How logits become expert ids and weights.

    Attributes:
      score: "softmax", "sigmoid" or "sqrt_softplus": what is applied to the logits.
      topk_first: pick the top k logits and score only those, instead of scoring all and picking the top k.
      renormalize: divide the k weights by their sum.
      scale: factor on the final weights.
      num_groups, top_groups: experts form `num_groups` equal groups; only the best `top_groups` take part.
      selection_bias: add a per-expert bias for selection only (balancing without an auxiliary loss).
      group_score: "max" (best expert), "top2" (sum of the best two), or "auto": top2 with a selection bias, else max.
    """

    score: str = "softmax"
    topk_first: bool = False
    renormalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    selection_bias: bool = False
    group_score: str = "auto"

    @property
    def resolved_group_score(self) -> str:
        """`group_score` with "auto" decided: "max" or "top2"."""
        return self.group_score if self.group_score != "auto" else "top2" if self.selection_bias else "max"

    def _violations(self) -> typing.Iterator[str]:
        yield from _choice(self, "score", SCORES)
        yield from _choice(self, "group_score", GROUP_SCORES)
        yield from _positive(self, "num_groups", "top_groups", "scale")
        if 0 < self.num_groups < self.top_groups:
            yield f"top_groups={self.top_groups} exceeds num_groups={self.num_groups}; lower top_groups"


def router_violations(
    router: RouterConfig, num_experts: int, experts: str, top_k: int, top_k_name: str = "top_k"
) -> list[str]:
    """What keeps ``router`` from choosing ``top_k`` of ``num_experts``; ``experts`` names those and says how many."""
    violations = []
    size = num_experts // router.num_groups
    reachable = size * router.top_groups
    if num_experts % router.num_groups:
        violations.append(
            f"router.num_groups={router.num_groups} does not divide {experts}: groups are equal; take a divisor"
        )
    if top_k > reachable:
        violations.append(
            f"{top_k_name}={top_k} exceeds {reachable}, the number of experts that a token can reach: {size} in each "
            f"of router.top_groups={router.top_groups} groups; raise top_groups or lower top_k"
        )
    return violations


@dataclass(frozen=True, kw_only=True)
class MeshConfig(_Checked):
    """Extents of a mesh.

    Attributes:
      ep: ranks that share the experts, on all nodes together.
      tp: ranks that split every expert.
      nodes: nodes over which the `ep` ranks are spread; divides `ep`.
      dp: copies of the whole group.
    """

    ep: int = 1
    tp: int = 1
    nodes: int = 1
    dp: int = 1

    @property
    def num_devices(self) -> int:
        return self.ep * self.tp * self.dp

    def _violations(self) -> typing.Iterator[str]:
        yield from _positive(self, "ep", "tp", "nodes", "dp")
        if self.nodes > 0 and self.ep % self.nodes:
            yield f"ep={self.ep} must be a multiple of nodes={self.nodes}: ep counts the ranks of all nodes together"


@dataclass(frozen=True, kw_only=True)
class MoEConfig(_Checked):
    """One Mixture-of-Experts layer.

    Attributes:
      num_experts, top_k: routed experts, and how many of them a token goes to.
      ffn: the width of an expert.
      activation: a name of `moe_layer`, such as "swiglu" or "gelu".
      num_shared_experts: experts that every token goes to.
      num_zero_experts, num_copy_experts: experts without weights that the router may choose too, after the others: they
        add nothing, or the token itself. Predictions count their choices as rows that travel, so they are the most.
      shared_ffn, shared_activation, gated_shared: of the shared expert, as for `moe_on_mesh`.
      expert_scale, weigh_inputs: as for `moe_on_mesh`.
      transport, overflow, capacity_factor, backend: as for `make_plan`.
      balance_loss, z_loss: weights of the router's losses in the training loss.
      sequence_balance_loss: weight of the balance loss of each sequence (DeepSeek-V3), whose sequences are windows.
      bias_update_rate: step of the selection bias, where the router has one.
    """

    num_experts: int
    top_k: int
    ffn: int
    activation: str = "swiglu"
    num_shared_experts: int = 0
    num_zero_experts: int = 0
    num_copy_experts: int = 0
    shared_ffn: int | None = None
    shared_activation: str | None = None
    gated_shared: bool = False
    expert_scale: bool = False
    weigh_inputs: bool = False
    transport: str = "auto"
    overflow: str = "dropless"
    capacity_factor: float | None = None
    backend: str = "auto"
    balance_loss: float = 0.01
    z_loss: float = 0.001
    sequence_balance_loss: float = 0.0
    bias_update_rate: float = 0.001

    @property
    def num_ids(self) -> int:
        """How many experts the router chooses from."""
        return self.num_experts + self.num_zero_experts + self.num_copy_experts

    @property
    def widths(self) -> dict[str, typing.Any]:
        """The options of `Plan.cost`, `Plan.memory` and `Plan.describe`: what an expert costs."""
        return {name: getattr(self, name) for name in ("ffn", "activation", "shared_ffn", "shared_activation")}

    @property
    def parameters(self) -> dict[str, typing.Any]:
        """The options of `abstract_params` and `moe_on_mesh`: which parameters there are."""
        return {**self.widths, "gated_shared": self.gated_shared, "expert_scale": self.expert_scale}

    def _violations(self) -> typing.Iterator[str]:
        yield from _positive(self, "num_experts", "top_k", "ffn", "shared_ffn", "capacity_factor")
        losses = ("balance_loss", "z_loss", "sequence_balance_loss")
        kinds = ("num_shared_experts", "num_zero_experts", "num_copy_experts")
        yield from _not_negative(self, *kinds, *losses, "bias_update_rate")
        yield from _choice(self, "activation", ACTIVATIONS)
        if self.shared_activation is not None:
            yield from _choice(self, "shared_activation", ACTIVATIONS)
        of_shared = [name for name in ("shared_ffn", "shared_activation", "gated_shared") if getattr(self, name)]
        if of_shared and not self.num_shared_experts:
            yield f"{', '.join(of_shared)} of a layer with num_shared_experts=0; set it to 1, or leave this out"
        yield from _choice(self, "transport", TRANSPORTS)
        yield from _choice(self, "overflow", OVERFLOWS)
        if self.top_k > self.num_ids:
            of_all = (
                "" if self.num_ids == self.num_experts else f" and {self.num_ids - self.num_experts} without weights"
            )
            yield f"top_k={self.top_k} exceeds num_experts={self.num_experts}{of_all}; lower top_k"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Checked):
    """The decoder around the layers.

    Attributes:
      layers: blocks of attention and experts.
      hidden: the width of a token.
      heads: attention heads; their width is even.
      seq_len: tokens in a window.
      vocab: different tokens.
      tied_head: whether the output layer is the embedding.
      rope_theta: base of the rotary positions.
    """

    layers: int
    hidden: int
    heads: int
    seq_len: int
    vocab: int = 256
    tied_head: bool = False
    rope_theta: float = 10000.0

    def _violations(self) -> typing.Iterator[str]:
        yield from _positive(self, "layers", "hidden", "heads", "seq_len", "vocab", "rope_theta")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Checked):
    """One training run of AdamW.

    Attributes:
      steps: how many in all.
      batch_size: windows per step, over all devices.
      learning_rate: the peak.
      warmup_steps: steps of linear growth to the peak; cosine decay follows.
      final_rate: the rate at the last step, as a part of the peak.
      weight_decay: of matrices, per step and unit of the rate.
      grad_clip: largest global norm of the gradient; inf: no clipping.
      dtype: of activations, "float32" or "bfloat16".
      seed: of the parameters and the order of the data.
      eval_batches: batches of held-out data behind a reported loss.
      log_every: steps between reports.
      save_seconds: a checkpoint after so much time; inf: none by time.
      save_every: a checkpoint after so many steps; 0: none by steps. There is always one at the end.
      keep_checkpoints: how many are kept, the last ones.
      sample_bytes: bytes of text that are generated at the end.
    """

    steps: int
    batch_size: int
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    final_rate: float = 0.1
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    eval_batches: int = 8
    log_every: int = 10
    save_seconds: float = 300.0
    save_every: int = 0
    keep_checkpoints: int = 2
    sample_bytes: int = 64

    def _violations(self) -> typing.Iterator[str]:
        yield from _positive(
            self, "steps", "batch_size", "learning_rate", "eval_batches", "log_every", "keep_checkpoints"
        )
        yield from _not_negative(self, "warmup_steps", "final_rate", "weight_decay", "save_every", "sample_bytes")
        yield from _choice(self, "dtype", DTYPES)
        if not self.grad_clip > 0:
            yield f"grad_clip={self.grad_clip} must be above zero; use inf to switch clipping off"
        if not self.save_seconds > 0:
            yield f"save_seconds={self.save_seconds} must be above zero; use inf to save nothing by time"
        if self.warmup_steps >= self.steps > 0:
            yield f"warmup_steps={self.warmup_steps} must be below steps={self.steps}"
        if not 0 <= self.seed < 2**32:
            yield f"seed={self.seed} must be at least 0 and below 2**32"


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(_Checked):
    """How experts follow their load from rank to rank while a run trains.

    Attributes:
      num_redundant: slots beyond one for each expert, for replicas of hot ones.
      every: steps between looks at the load.
      decay: of the moving average of the load, per step.
      threshold: the least gain for which experts of a layer move: by which part the load of its fullest rank falls.
      max_moved: how many slots of a layer may change at a time; None: any number.
      mode: how the tokens of an expert are shared among its replicas, as ``balance`` of `moe_layer`; with "load" their
        shares follow the load too, at every look.
    """

    num_redundant: int = 0
    every: int = 50
    decay: float = 0.9
    threshold: float = 0.05
    max_moved: int | None = None
    mode: str = "load"

    def _violations(self) -> typing.Iterator[str]:
        yield from _positive(self, "every", "max_moved")
        yield from _not_negative(self, "num_redundant")
        yield from _choice(self, "mode", BALANCES)
        for name in ("decay", "threshold"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                yield f"{name}={value} must be at least 0 and below 1"


@dataclass(frozen=True, kw_only=True)
class Config(_Checked):
    """A whole configuration: one field for each section of a file.

    Attributes:
      mesh: extents of the mesh; of one device where the file has no such section.
      moe: the layer.
      router: its router; the defaults where the file has no such section.
      model: the decoder; None where a file describes only a layer.
      train: the training run; None where a file describes none.
      balance: how experts follow their load; None where they stay, in their order.
    """

    mesh: MeshConfig = field(default_factory=MeshConfig)
    moe: MoEConfig
    router: RouterConfig = field(default_factory=RouterConfig)
    model: ModelConfig | None = None
    train: TrainConfig | None = None
    balance: BalanceConfig | None = None

    @property
    def num_slots(self) -> int:
        """Experts with their replicas, which is what a plan counts."""
        return self.moe.num_experts + (self.balance.num_redundant if self.balance else 0)

    def tokens_per_device(self, num_devices: int) -> int:
        """Tokens that each of so many devices has in a step of the training run; TOKENS where there is none."""
        if self.train is None or self.model is None:
            return TOKENS
        return self.train.batch_size * self.model.seq_len // num_devices

    @property
    def parameters(self) -> dict[str, typing.Any]:
        """`moe.parameters`, and how many experts the router scores where a table says which slots they lie in."""
        return {**self.moe.parameters, "num_logical_experts": self.moe.num_experts if self.balance else None}

    def _violations(self) -> typing.Iterator[str]:
        num_experts, num_ids, top_k = self.moe.num_experts, self.moe.num_ids, self.moe.top_k
        experts = f"moe.num_experts={num_experts}"
        if num_ids > num_experts:
            experts += f" and {num_ids - num_experts} without weights, {num_ids} in all"
        yield from router_violations(self.router, num_ids, experts, top_k, "moe.top_k")
        if self.train and not self.model:
            yield "[train] needs a [model] section; add one with layers, hidden, heads and seq_len"
        if self.balance and self.num_slots % self.mesh.ep:
            yield (
                f"moe.num_experts={num_experts} and balance.num_redundant={self.balance.num_redundant} are "
                f"{self.num_slots} slots, not a multiple of mesh.ep={self.mesh.ep}: every rank has equally many; add "
                f"{-self.num_slots % self.mesh.ep} to num_redundant, or take another ep"
            )
        if self.train and self.model:
            yield from _training_violations(self.mesh, self.model, self.train)


def load_config(path: str | Path) -> Config:
    r"""Reads a TOML file with the sections [mesh], [moe], [router], [model], [train] and [balance]; only [moe] must be.

    Raises:
      ConfigError: the file is unreadable or not TOML; a section or key is unknown or missing; a value breaks a rule.

    >>> import pathlib, tempfile, moe_jax as moe
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "layer.toml"
    >>> _ = path.write_text("[moe]\nnum_experts = 8\ntop_k = 2\nffn = 64\n")
    >>> moe.load_config(path).moe.top_k
    2
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path={path!r} is a {type(path).__name__}; give the path of a TOML file")
    return _build(Config, read_toml(Path(path)), str(path))


def parse_mesh(text: str) -> MeshConfig:
    """Reads "ep=4,tp=2": axes by name, in any order; those not named are 1."""
    known = [f.name for f in fields(MeshConfig)]
    extents: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise ConfigError(f"mesh {text!r} names the axis {name!r}; {suggest(name, known)}")
        if name in extents:
            raise ConfigError(f"mesh {text!r} names the axis {name!r} twice; name each axis once")
        if not (value.isascii() and value.isdigit()) or int(value) < 1:
            raise ConfigError(f"mesh {text!r} gives {name} the extent {value!r}; write a whole number, as in ep=4,tp=2")
        extents[name] = int(value)
    try:
        return MeshConfig(**extents)
    except InvalidArgumentError as error:
        raise ConfigError(f"mesh {text!r}: {str(error).removeprefix('MeshConfig: ')}") from None


def _build(cls: type, table: dict[str, typing.Any], where: str) -> typing.Any:
    """Makes `cls` from `table`; a field that is itself a config class takes a sub-table (a section)."""
    what = "section" if cls is Config else "key"
    known = {f.name: f for f in fields(cls)}
    for name in table:
        if name not in known:
            raise ConfigError(f"{where}: unknown {what} {name!r}; {suggest(name, known)}")
    for name, entry in known.items():
        if entry.default is MISSING and entry.default_factory is MISSING and name not in table:
            raise ConfigError(f"{where}: {what} {name!r} is missing; add it")
    values = {name: _value(known[name].type, value, where, name) for name, value in table.items()}
    try:
        return cls(**values)
    except InvalidArgumentError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix(f'{cls.__name__}: ')}") from None


def _value(annotation: typing.Any, value: typing.Any, where: str, name: str) -> typing.Any:
    """A section becomes its class; a whole number becomes a float where one is wanted; the rest stays."""
    accepted = _accepted(annotation)
    section = next((cls for cls in accepted if issubclass(cls, _Checked)), None)
    if section is None:
        return float(value) if float in accepted and type(value) is int else value
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {name!r} is a single value; write it as a section, [{name}]")
    return _build(section, value, f"{where}: [{name}]")


def _accepted(annotation: typing.Any) -> tuple[type, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _type_violations(config: typing.Any) -> list[str]:
    """What is wrong with the types of the fields; bool is no int here, and an int will do for a float."""
    violations = []
    for entry in fields(config):
        value, accepted = getattr(config, entry.name), _accepted(entry.type)
        if type(value) in accepted or (type(value) is int and float in accepted):
            continue
        names = " or ".join("nothing" if cls is types.NoneType else cls.__name__ for cls in accepted)
        violations.append(f"{entry.name}={value!r} is a {type(value).__name__}; expected {names}")
    return violations


def _choice(config: typing.Any, name: str, choices: tuple[str, ...]) -> typing.Iterator[str]:
    value = getattr(config, name)
    if value not in choices:
        yield f"{name}={value!r} is unknown; {suggest(value, choices)}"


def _positive(config: typing.Any, *names: str) -> typing.Iterator[str]:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            yield f"{name}={value} must be finite and above zero"


def _not_negative(config: typing.Any, *names: str) -> typing.Iterator[str]:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            yield f"{name}={value} must be finite and not below zero"


def _training_violations(mesh: MeshConfig, model: ModelConfig, train: TrainConfig) -> typing.Iterator[str]:
    if train.batch_size % mesh.num_devices:
        yield (
            f"train.batch_size={train.batch_size} must be a multiple of the {mesh.num_devices} devices of the mesh; "
            "every device takes the same number of sequences"
        )
    if model.hidden % (2 * model.heads):
        yield f"model.hidden={model.hidden} must be a multiple of 2 * model.heads={2 * model.heads}: rotary pairs"
    if model.vocab != 256:
        yield f"model.vocab={model.vocab} must be 256 to train: the training job reads bytes"


def override(config: Config, **sections: dict[str, typing.Any]) -> Config:
    """`config` with single values replaced: `override(config, train={"seed": 1})`; all rules are checked again."""
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)
