"""Meshes in words, on the nodes of a machine, and all those that make sense for so many devices."""

import dataclasses
import math

from moe_jax.config import MeshConfig, MoEConfig, parse_mesh
from moe_jax.hardware import Machine

MIN_WIDTH = 128  # the least width that tp may leave of an expert: matrix units are so wide


def mesh_words(mesh: MeshConfig) -> str:
    """The mesh as `--mesh` takes it, without axes of 1: "ep=64,nodes=8"."""
    axes = {"ep": mesh.ep, "nodes": mesh.nodes, "tp": mesh.tp, "dp": mesh.dp}
    return ",".join(f"{name}={size}" for name, size in axes.items() if size > 1 or name == "ep")


def read_mesh(text: str, machine: Machine) -> MeshConfig:
    """The mesh of `--mesh`, with as many nodes as it takes on ``machine`` where it does not say how many."""
    mesh = parse_mesh(text)
    return mesh if "nodes" in text else on_nodes(mesh, machine)


def on_nodes(mesh: MeshConfig, machine: Machine) -> MeshConfig:
    """``mesh`` with as many nodes as its expert-parallel group takes on ``machine``.

    The devices of a group are numbered consecutively, tensor-parallel ranks innermost. If a group does not fill a whole
    number of nodes, ``mesh`` keeps its nodes.
    """
    if machine.devices_per_node is None or machine.devices_per_node % mesh.tp:
        return mesh
    ranks = machine.devices_per_node // mesh.tp  # expert-parallel ranks of a node
    return mesh if mesh.ep % ranks else dataclasses.replace(mesh, nodes=mesh.ep // ranks)


def resized(mesh: MeshConfig, machine: Machine, **extents: int) -> MeshConfig:
    """``mesh`` with other extents, and the nodes that it takes then, unless its nodes were chosen otherwise."""
    before, after = (dataclasses.replace(mesh, nodes=1, **sizes) for sizes in ({}, extents))
    is_natural = on_nodes(before, machine) == mesh
    return on_nodes(after, machine) if is_natural else dataclasses.replace(after, nodes=mesh.nodes)


def sensible_meshes(num_devices: int, layer: MoEConfig, machine: Machine) -> list[MeshConfig]:
    """All meshes of ``num_devices`` that make sense for ``layer``, the largest expert-parallel groups first.

    ep divides the experts. tp divides the width of an expert, leaves at least ``MIN_WIDTH`` of it, and stays inside a
    node. dp has the rest of the devices, and nodes are as large as the machine's.
    """
    found = []
    for ep in _divisors(math.gcd(num_devices, layer.num_experts)):
        for tp in _divisors(math.gcd(num_devices // ep, layer.ffn)):
            inside = machine.devices_per_node is None or machine.devices_per_node % tp == 0
            if tp == 1 or (inside and layer.ffn // tp >= MIN_WIDTH):
                found.append(on_nodes(MeshConfig(ep=ep, tp=tp, dp=num_devices // (ep * tp)), machine))
    return sorted(found, key=lambda mesh: (-mesh.ep, mesh.tp))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
