"""What is asked of the planner: one layer of a configuration, on one mesh, of one machine."""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

import moe_jax as moe
from moe_jax.config import Config, MeshConfig, ModelConfig
from moe_jax.errors import ConfigError, InvalidArgumentError, check_choice, check_count
from moe_jax.hardware import Machine, machine_of
from moe_jax.plan.cost import PHASES
from moe_jax.plan.memory import OPTIMIZERS
from moe_jax.tools.train.balance import first_places
from moe_jax.tools.train.layer_plan import make_layer_plan

DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What may be asked beside the mesh and the machine. None leaves an answer to the configuration.

    Attributes:
      tokens: tokens of each device; None: those of the [train] section, or ``moe_jax.config.TOKENS``.
      dtype: the dtype of rows; None: that of the [train] section, or ``DTYPE``.
      quant, combine_quant, backward_quant: recipes of rows, as for ``make_plan``.
      layers: how many such layers are in memory at a time; None: those of the model.
      optimizer, remat: as for ``Plan.memory``.
    """

    tokens: int | None = None
    dtype: str | None = None
    quant: str = "none"
    combine_quant: str = "none"
    backward_quant: str = "none"
    layers: int | None = None
    optimizer: str = "adamw"
    remat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One layer on one mesh of one machine; plain data, so that the process that compiles can be handed one.

    Attributes:
      config: the configuration, with the mesh that is asked about. It has no [train]: ``terms`` holds what that said.
      machine: what the mesh is made of.
      terms: everything else, with no None left.
    """

    config: Config
    machine: Machine
    terms: Terms

    @property
    def mesh(self) -> MeshConfig:
        return self.config.mesh

    @property
    def model(self) -> ModelConfig:
        assert self.config.model is not None, "a question is only made of a configuration that has a model"
        return self.config.model

    @property
    def tokens(self) -> int:
        assert self.terms.tokens is not None, "a question leaves nothing open"
        return self.terms.tokens

    @property
    def dtype(self) -> str:
        assert self.terms.dtype is not None, "a question leaves nothing open"
        return self.terms.dtype

    @property
    def layers(self) -> int:
        assert self.terms.layers is not None, "a question leaves nothing open"
        return self.terms.layers

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that are asked about, of which the last one counts. Without an optimizer nothing is trained."""
        return PHASES[:1] if self.terms.optimizer == "none" else PHASES

    def plan(self, mesh: Mesh | None = None) -> moe.Plan:
        """The plan of the layer on ``mesh``; None: on an abstract mesh, which needs no devices, however large it is."""
        return make_layer_plan(
            self.config,
            self.model,
            self._abstract_mesh() if mesh is None else mesh,
            tokens_per_rank=self.tokens,
            dtype=self.dtype,
            quant=self.terms.quant,
            combine_quant=self.terms.combine_quant,
            backward_quant=self.terms.backward_quant,
            hardware=self.machine,
        )

    def keywords(self) -> dict[str, Any]:
        """What `apply` of the layer is called with beside its arrays: where experts lie, if they have replicas."""
        if self.config.balance is None:
            return {}
        table = first_places(self.config, 1).placement.table()[0]
        return {"table": table, "balance": self.config.balance.mode}

    def unquantised(self) -> "Question | None":
        """The same question for rows that travel unquantised; None where they do so anyway."""
        terms = dataclasses.replace(self.terms, quant="none", combine_quant="none", backward_quant="none")
        return None if terms == self.terms else dataclasses.replace(self, terms=terms)

    def asked(self, by: str) -> dict[str, Any]:
        """Everything that decides the answer, including who gives it (``by``) and the code of this package."""
        values = dataclasses.asdict(self)
        del values["machine"]["sources"]
        return {**values, "by": by, "code": _digest()}

    def _abstract_mesh(self) -> AbstractMesh:
        """The axes that ``make_mesh`` would build, without devices."""
        shape = self.mesh
        axes = {"dp": shape.dp, "node": shape.nodes, "ep": shape.ep // shape.nodes, "tp": shape.tp}
        kept = {name: size for name, size in axes.items() if size > 1 or name in ("ep", "tp")}
        return AbstractMesh(tuple(kept.values()), tuple(kept))


def ask(config: Config, path: str, machine: Machine, mesh: MeshConfig, terms: Terms) -> Question:
    """The question, with everything filled in that ``terms`` leaves open. What the plan checks is not checked here.

    Args:
      config, path: the configuration, and the file that it came from.
      machine: see ``find_machine`` and ``machine_here``.
      mesh: takes the place of the mesh of ``config``.
      terms: what else is asked.

    Raises:
      ConfigError: the configuration has no [model] section.
      InvalidArgumentError: a number is too small, or the batch of the [train] section does not spread evenly over
        ``mesh``.
    """
    if config.model is None:
        raise ConfigError(f"{path}: has no [model] section; a plan needs model.hidden")
    check_choice("optimizer", terms.optimizer, OPTIMIZERS)
    if config.moe.ffn % mesh.tp:
        raise InvalidArgumentError(f"ffn={config.moe.ffn} must be divisible by tp={mesh.tp}; take another tp")
    train, tokens, dtype, layers = config.train, terms.tokens, terms.dtype, terms.layers
    if tokens is None:
        if train is not None:
            dataclasses.replace(config, mesh=mesh)  # raises where devices would get different numbers of tokens
        tokens = config.tokens_per_device(mesh.num_devices)
    if layers is not None:
        check_count("layers", layers)
    filled = dataclasses.replace(
        terms,
        tokens=tokens,
        dtype=dtype or (train.dtype if train else DTYPE),
        layers=config.model.layers if layers is None else layers,
    )
    return Question(config=dataclasses.replace(config, mesh=mesh, train=None), machine=machine, terms=filled)


@functools.cache
def _digest() -> str:
    """A digest that tells this code from any other: rows that other code made are no answers."""
    found = hashlib.sha256()
    for file in sorted(Path(moe.__file__).parent.rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def machine_here() -> Machine:
    """What JAX's own devices are."""
    device = jax.devices()[0]
    return machine_of(device.platform, device.device_kind)
