"""What the tests of the CANN facade share: drawn calls, both ways to run one, and programs over all ranks."""

import jax
import numpy as np
from family_cases import Config, data
from helpers import over_mesh

import moe_jax as moe
from moe_jax import aclnn
from moe_jax.aclnn.first_phase import Executor
from moe_jax.hardware.ascend import VERSIONS, lacking


def groups(config):
    names = {"group_ep": ("node", "ep") if config.nodes > 1 else "ep", "ep_world_size": config.world}
    names |= {"group_tp": "tp"} if config.tp > 1 else {}
    fullmesh = ("", "fullmesh", "fullmesh_v1", "fullmesh_v2", None)[(config.tokens + config.top_k) % 5]
    return names | {"comm_alg": "hierarchy" if config.nodes > 1 else fullmesh}


def over_ranks(config, drawn):
    """[W, P, ...] of every array that is there."""
    lead, arrays = (config.world, max(config.tp, 1)), {}
    for name, array in drawn.items():
        if array is None:
            arrays[name] = None
        elif name == "elastic_info":
            arrays[name] = np.broadcast_to(array, (*lead, *array.shape))
        else:
            arrays[name] = array.reshape(*lead, *array.shape[len(config.lead) :])
    return arrays


SPECIAL = ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v")
FLOATS = ("expand_x", "expert_scales", "expand_scales", "shared_expert_x", "ori_x", *SPECIAL, "residual_x", "gamma")


def draw(rng, config):
    """One draw of data, all of it whole numbers of at most 2 in size; weights of 1/2, 1 or 2, either sign."""
    drawn = data(rng, config)
    for name in ("x", *FLOATS):
        if drawn.get(name) is not None:
            dtype, size = drawn[name].dtype, drawn[name].shape
            values = rng.integers(-2, 3, size)
            if name in ("expert_scales", "gamma"):
                values = rng.choice([-2, -1, -0.5, 0.5, 1, 2], size)
            drawn[name] = values.astype(dtype)
    return drawn


def mesh_of_world(config):
    """The mesh of a configuration, and the axes over which its arrays [W, P, ...] are split."""
    nodes = {"nodes": config.nodes} if config.nodes > 1 else {}
    mesh = moe.make_mesh(ep=config.world, tp=max(config.tp, 1), **nodes)
    return mesh, (("node", "ep") if nodes else "ep", "tp")


def over_world(config, shard):
    """``shard`` over dicts of arrays [W, P, ...]."""
    mesh, axes = mesh_of_world(config)
    return jax.jit(over_mesh(mesh, shard, axes))


def shape_of(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


RAN = set()  # the versions whose executors were called


def both(name, arrays, attributes):
    """Both ways to run an operator; for use inside ``shard_map``.

    The second is from shapes alone, and by the earliest version that has all that is given.
    """
    older = [version for version, one in VERSIONS.items() if one.newest == name]
    given = {key for key, value in arrays.items() if value is not None}
    given |= {key for key, value in attributes.items() if value}
    version = next((version for version in older if not given & set(VERSIONS[version].without)), name)
    known = {key: value for key, value in attributes.items() if key not in lacking(version)}
    first = getattr(aclnn, f"{version}_get_workspace_size")
    num_bytes, executor = first(**jax.tree.map(shape_of, arrays), **known)
    assert isinstance(num_bytes, int) and num_bytes >= 0 and isinstance(executor, Executor)
    assert executor.operator_name == version
    RAN.add(version)
    assert hash(executor) == hash(first(**jax.tree.map(shape_of, arrays), **known)[1])
    return getattr(aclnn, name)(**arrays, **attributes), executor(**arrays)


def bits(array):
    array = np.asarray(array)
    return array.view(np.uint8) if array.dtype.itemsize == 1 else array


def agree(direct, executed):
    """Both outputs have the same fields, the same of them None, and the same bits; the first of them, as NumPy."""
    assert type(direct) is type(executed)
    direct, executed = jax.tree.map(np.asarray, (direct, executed))
    assert jax.tree.structure(direct) == jax.tree.structure(executed)
    for one, other in zip(jax.tree.leaves(direct), jax.tree.leaves(executed), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(bits(one), bits(other))
    return direct


def over_ep(ranks, shard):
    """``shard`` over arrays [ranks, ...]."""
    return jax.jit(over_mesh(moe.make_mesh(ep=ranks), shard, ("ep",)))


WORLDS = {
    "shared": Config(world=4, shared_ranks=2, num_shared=2, local_experts=2, top_k=3, mask="pairs", num_copy=1,
                     expand_scales=True),
    "tp": Config(world=2, tp=2, local_experts=1, top_k=2, mask="pairs", expand_scales=True, norm=True),
    "nodes": Config(world=4, nodes=2, local_experts=2, top_k=2, expand_scales=True, dtype="float16"),
    "elastic": Config(world=4, elastic=True, shared_ranks=1, local_experts=2, top_k=2, num_zero=1, global_bs=24),
    "codes": Config(world=4, local_experts=1, top_k=2, quant_mode=2, y_dtype="int8", smooth="experts", mask="tokens",
                    comm_quant_mode=2),
}  # fmt: skip


def given(arrays):
    return {name: value for name, value in arrays.items() if value is not None}
