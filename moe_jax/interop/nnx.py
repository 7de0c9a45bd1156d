"""The layer as a module of flax nnx, whose parameters are ``nnx.Param`` variables that lie on the mesh.

It needs flax, the extra "nnx", and is imported by name: ``from moe_jax.interop.nnx import MoE``.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from moe_jax.config import RouterConfig
from moe_jax.errors import InvalidArgumentError, UnsupportedError, check_type, raise_all, suggest
from moe_jax.layer.on_mesh import moe_on_mesh
from moe_jax.layer.params import param_spec
from moe_jax.parameters import BY_NAME
from moe_jax.plan import Plan
from moe_jax.types import LayerStats

try:
    from flax import nnx
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise UnsupportedError(
        "moe_jax.interop.nnx needs flax, which is not installed; run: pip install 'moe_jax[nnx]'"
    ) from None

Array = jax.Array


# Layers that are alike share what compiles them: their programs, and their static parts are equal.
_layer = functools.lru_cache(maxsize=64)(moe_on_mesh)


def _shows_options_of(other: Callable) -> Callable[[Callable], Callable]:
    """A decorator of a function that takes the options of ``other``: ``help`` shows them in place of ``**options``."""

    def decorate(function: Callable) -> Callable:
        *mine, _ = inspect.signature(function).parameters.values()
        options = [each for each in inspect.signature(other).parameters.values() if each.kind is each.KEYWORD_ONLY]
        function.__signature__ = inspect.Signature([*mine, *options])
        return function

    return decorate


class SelectionBias(nnx.Variable):
    """The router's bias that only chooses experts. It has no gradient, so it is not an ``nnx.Param`` to be optimised.

    ``moe_jax.update_selection_bias`` says what it should be after a step; write that to ``layer.selection_bias[...]``.
    """


class MoE(nnx.Module):
    """A Mixture-of-Experts layer, ``moe_jax.moe_on_mesh`` as a module: ``y, stats = MoE(mesh, plan, router, ...)(x)``.

    The parameters are attributes with the names of ``moe_on_mesh``: ``layer.router``, ``layer.w_up`` and so on, each an
    ``nnx.Param`` (but ``selection_bias``, which is a ``SelectionBias``). They are drawn where they lie, so no device
    ever holds more than its part, and their metadata ``out_sharding`` and ``mesh`` say how that is, so
    ``nnx.get_partition_spec``, ``nnx.get_named_sharding`` and ``nnx.as_abstract`` know it. Layers that are made with
    equal arguments share one compiled program.

    ``nnx.jit``, ``nnx.remat``, ``nnx.grad``, ``nnx.scan`` and ``nnx.vmap`` over stacked layers, ``nnx.Optimizer``,
    ``nnx.split`` and ``nnx.merge`` work as with any module. Made under ``nnx.eval_shape`` it has shapes in place of
    arrays. To see ``stats`` of a layer deep inside a model, use ``nnx.capture`` with ``method_outputs=``.

    With replicas of experts (``moe_jax.rebalance``) the plan counts slots, ``num_logical_experts=`` says how many
    experts the router scores, and each call is given ``table=``, the slots of each of them. ``rngs`` draws every slot
    anew, so pass ``params=``, in which replicas are equal.

    Attributes:
      mesh, plan, router_config: as given; static.
      options: the options of ``moe_on_mesh`` that were given, as pairs (name, value); static.
    """

    @_shows_options_of(moe_on_mesh)
    def __init__(
        self,
        mesh: Mesh | AbstractMesh,
        plan: Plan,
        router: RouterConfig | None,
        *,
        rngs: nnx.Rngs | None = None,
        params: Mapping[str, Array] | None = None,
        **options: Any,
    ) -> None:
        """The arguments are those of ``moe_on_mesh``, and where the parameters come from.

        Args:
          mesh, plan, router: as for ``moe_on_mesh``.
          rngs: the stream "params" gives the key to draw the parameters with, as ``init`` of ``moe_on_mesh`` does.
          params: in place of ``rngs``: arrays by name that exist already, such as those of ``moe_jax.place``.
          options: ``ffn``, ``activation``, ``param_dtype`` and all other options of ``moe_on_mesh``.

        Raises:
          InvalidArgumentError: neither or both of ``rngs`` and ``params`` are given; a name that no layer knows.
          MoEError: as ``moe_on_mesh``, and, when the layer is called, as its ``apply``.

        >>> import jax, jax.numpy as jnp, moe_jax as moe
        >>> from flax import nnx
        >>> from moe_jax.interop.nnx import MoE
        >>> moe.emulate_devices(2)  # leave this out where there are accelerators
        >>> mesh = moe.make_mesh(ep=2)
        >>> plan = moe.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=4, top_k=2, dtype="float32")
        >>> layer = MoE(mesh, plan, moe.RouterConfig(), ffn=32, rngs=nnx.Rngs(0))
        >>> y, stats = nnx.jit(layer)(jnp.ones((2, 3, 8)))
        >>> layer.w_up.shape, layer.w_up.out_sharding
        ((4, 8, 32), ('ep', None, 'tp'))
        """
        moe_on_mesh(mesh, plan, router, **options)  # refuses what could not be the key of a cache
        if params is None and rngs is not None:
            check_type("rngs", rngs, nnx.Rngs, "pass flax.nnx.Rngs(0)")
            init, _ = _layer(mesh, plan, router, **options)
            if not {"params", "default"} & set(rngs):
                raise InvalidArgumentError(
                    f"rngs has the streams {', '.join(rngs)} and none for parameters; pass flax.nnx.Rngs(params=0)"
                )
            values = init(rngs.params())
        elif params is not None and rngs is None:
            values = params
        else:
            raise InvalidArgumentError("pass either rngs=nnx.Rngs(0), to draw parameters, or params=, those to take")
        unknown = [name for name in values if name not in BY_NAME]
        raise_all([f"{name!r} is unknown; {suggest(name, BY_NAME)}" for name in unknown], "params")
        self.mesh, self.plan, self.router_config = mesh, plan, router
        self.options = tuple(sorted(options.items()))
        for name, value in values.items():
            spec = param_spec(name, plan)
            # Entries for all axes, so that nnx.vmap and nnx.scan can insert one for the axis that they add. The array
            # lies as it should, and flax cannot lay out arrays over meshes with axes of both types.
            sharding = (*spec, *(None,) * (value.ndim - len(spec)))
            kind = SelectionBias if name == "selection_bias" else nnx.Param
            setattr(self, name, kind(value, out_sharding=sharding, mesh=mesh, eager_sharding=False))

    @property
    def params(self) -> dict[str, Array]:
        """The parameters as ``moe_on_mesh`` has them, a dict of arrays by name."""
        return {name: getattr(self, name)[...] for name in BY_NAME if hasattr(self, name)}

    def __call__(self, x: Array, token_mask: Array | None = None, **given: Any) -> tuple[Array, LayerStats]:
        """``apply`` of ``moe_on_mesh`` with this layer's parameters.

        Args:
          x: [..., H] in ``plan.dtype``.
          token_mask: [...] bool, False = padding.
          given: ``routing``, ``router_x``, ``table`` and all other keywords of ``apply``.

        Returns:
          y [..., H] and LayerStats, whose ``losses`` are to be added to the loss with weights of yours.
        """
        _, apply = _layer(self.mesh, self.plan, self.router_config, **dict(self.options))
        return apply(self.params, x, token_mask, **given)
