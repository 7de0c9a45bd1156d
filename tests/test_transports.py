"""Transports: one contract for all of them, and how another one joins.

The contract is public (``moe_jax.verify.transport_contract``): integers, so that every sum is exact, against the
float64 oracle and loops over pairs, with NaN in all that nobody may read, on 2 nodes of 2 ranks with 2 tp ranks each.
"""

import dataclasses

import jax.numpy as jnp
import pytest
from jax import lax

import moe_jax as moe
from moe_jax import errors
from moe_jax.collectives.exchange import Exchange
from moe_jax.plan.transport_table import entered
from moe_jax.transports import ALL_GATHER, HIERARCHY, PADDED, RAGGED, Transport, register_transport, transport_names
from moe_jax.transports.all_to_all import AllToAll
from moe_jax.types import pytree
from moe_jax.verify import TransportContractError, transport_contract

ALL = [PADDED, ALL_GATHER, RAGGED, HIERARCHY]


@pytest.mark.quick("padded", "allgather")  # the others cost most, and "ragged" is emulated here
@pytest.mark.parametrize("transport", ALL, ids=lambda transport: transport.name)
def test_contract(transport):
    """Every law of the contract, for every transport that comes with the package."""
    assert set(transport_contract(transport).values()) == {0.0}


def test_these_are_all_transports():
    assert transport_names() == tuple(transport.name for transport in ALL)


# A transport of somebody else's: blocks that go around a ring.


@pytree()
class RingBlocks(Exchange):
    """One shift along the ring for each distance."""

    in_blocks = True

    def move(self, rows, num_slots, axes, plan, *, into=None):
        num_ranks, me = lax.axis_size(axes), lax.axis_index(axes)
        blocks, moved = rows.reshape(num_ranks, -1, rows.shape[1]), []
        for shift in range(num_ranks):
            to = [(rank, (rank + shift) % num_ranks) for rank in range(num_ranks)]
            moved.append(lax.ppermute(blocks[(me + shift) % num_ranks], axes, to))
        return jnp.stack(moved)[(me - jnp.arange(num_ranks)) % num_ranks].reshape(rows.shape), ()

    def back(self):
        return self


class Ring(AllToAll):
    name = "ring"

    def exchange(self, manifest, start, capacity, plan):
        return RingBlocks()


class Forgetful(Ring):
    """As the ring, but a row that came in the second slot is the first one's."""

    name = "forgetful"

    def open(self, manifest, start, capacity, plan, *, num_rows):
        opened = super().open(manifest, start, capacity, plan, num_rows=num_rows)
        maps = opened.maps
        row_inbox = jnp.where(maps.row_inbox == 1, 0, maps.row_inbox)
        return opened._replace(maps=dataclasses.replace(maps, row_inbox=row_inbox))


@pytest.mark.slow
def test_another_transport_joins():
    """It passes the contract before it is registered, and plans take it by name afterwards."""
    assert set(transport_contract(Ring()).values()) == {0.0}
    sizes = {"tokens_per_rank": 4, "hidden": 8, "num_experts": 4, "top_k": 2}
    mesh = moe.make_mesh(ep=2)
    with pytest.raises(errors.InvalidArgumentError, match="transport='ring'"):
        moe.make_plan(mesh, **sizes, transport="ring")
    ring = Ring()
    with entered(ring):
        register_transport(ring)  # the same object again
        plan = moe.make_plan(mesh, **sizes, transport="ring")
        assert "ring" in plan.describe() and plan.workspace()["outbox"] > 0
        with pytest.raises(errors.InvalidArgumentError, match="'ring' of the transport is taken"):
            register_transport(Ring())
    assert "ring" not in transport_names()


def test_a_wrong_transport_breaks_the_contract():
    with pytest.raises(TransportContractError, match=r"'forgetful' breaks(.|\n)*dispatch(.|\n)*round trip"):
        transport_contract(Forgetful())


def test_what_is_no_transport_is_refused():
    for call in (register_transport, transport_contract):
        with pytest.raises(errors.InvalidArgumentError, match="transport is a str.*Transport"):
            call("padded")
    with pytest.raises(TypeError, match="abstract"):
        Transport()
