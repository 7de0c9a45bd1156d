"""Experts follow their placement: bit by bit what a gather on the host gives, over a wire of the slots that move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import mesh_of, needs
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax.balance.migration import _kernels_of, _move_in_place, _moved
from moe_jax.balance.moves import find_moves
from moe_jax.collectives import ragged, slots
from moe_jax.errors import InvalidArgumentError, MeshError, MissingArgumentError
from moe_jax.kernels import table

EP, TP, SLOTS, EXPERTS = 4, 2, 3, 8
SPECS = {"w_up": P("ep", None, "tp"), "w_gate": P("ep", None, "tp"), "w_down": P("ep", "tp"), "router": P()}
SHAPES = {"w_up": (EP * SLOTS, 3, 10), "w_gate": (EP * SLOTS, 3, 10), "w_down": (EP * SLOTS, 10, 3), "router": (12, 5)}
DTYPES = {"w_up": jnp.bfloat16, "w_gate": jnp.bfloat16, "w_down": jnp.float32, "router": jnp.float32}


def random_experts(rng, num_experts, num_slots):
    """[P] every expert once, the redundant slots for any of them, few of them hot, in any order."""
    hot = rng.integers(0, num_experts, num_slots - num_experts) // rng.integers(1, num_experts + 1)
    return rng.permutation(np.concatenate([np.arange(num_experts), hot])).astype(np.int32)


def placement_of(experts, num_experts=EXPERTS, num_ranks=EP):
    return moe.Placement(
        physical_to_logical=np.asarray(experts, np.int32), num_logical_experts=num_experts, num_ranks=num_ranks
    )


def gathered(leaf, old, new):
    """The oracle: every slot gets what the first slot of its expert had."""
    first = [int(np.flatnonzero(old == expert)[0]) for expert in new]
    return np.asarray(leaf)[first]


def bits(array):
    return np.atleast_1d(array).view(np.uint8)


def random_params(mesh, rng, experts):
    """Parameters of which all replicas of an expert agree; any bits, NaNs too."""
    params = {}
    for name, shape in SHAPES.items():
        words = rng.integers(0, 256, (*shape, jnp.dtype(DTYPES[name]).itemsize), dtype=np.uint8)
        values = words.view(DTYPES[name])[..., 0]
        values = values if name == "router" else values[experts]
        params[name] = jax.device_put(values, NamedSharding(mesh, SPECS[name]))
    return params


def trained(params):
    """The parameters and a state of Adam over them, whose moments are any numbers of the same layouts."""
    state = optax.adam(1e-3).init(params)
    moments = lambda tree, factor: jax.tree.map(lambda leaf: leaf * factor, tree)  # noqa: E731
    return {"params": params, "opt": (state[0]._replace(mu=moments(params, 2), nu=moments(params, 3)), *state[1:])}


def assert_moved(state, before, old, new):
    """Experts lie where the oracle puts them, everything else where it was, in the layouts that they had."""
    for (path, got), was in zip(jax.tree.leaves_with_path(state), before, strict=True):
        moves = path[-1] != jax.tree_util.DictKey("router") and np.ndim(was[0])
        want = gathered(was[0], old, new) if moves else was[0]
        np.testing.assert_array_equal(bits(got), bits(want), err_msg=jax.tree_util.keystr(path))
        assert got.sharding == was[1]


def can_send(able, num_ranks, most):
    """Whether every slot finds one of the ranks that are ``able`` to send it, none of which sends more than ``most``.

    Maximum matching by augmenting paths: another algorithm than the one that is tested.
    """
    sent = [[] for _ in range(num_ranks)]

    def place(slot, seen):
        for rank in able[slot]:
            if rank not in seen:
                seen.add(rank)
                if len(sent[rank]) < most or any(
                    place(other, seen) and not sent[rank].remove(other) for other in list(sent[rank])
                ):
                    sent[rank].append(slot)
                    return True
        return False

    return all(place(slot, set()) for slot in range(len(able)))


@pytest.mark.parametrize(
    ("num_ranks", "num_slots", "num_experts"), [(1, 6, 4), (2, 1, 2), (4, 3, 8), (8, 4, 24), (3, 5, 2), (64, 5, 256)]
)
def test_the_moves_of_any_two_placements(num_ranks, num_slots, num_experts):
    """Every slot gets its expert, what travels is what its rank did not hold, and no plan would take fewer turns."""
    rng, ranks = np.random.default_rng(num_ranks), np.arange(num_ranks)[:, None]
    for _ in range(10):
        old, new = (random_experts(rng, num_experts, num_ranks * num_slots) for _ in range(2))
        moves = find_moves(old, new, num_ranks)
        before, after = old.reshape(num_ranks, num_slots), new.reshape(num_ranks, num_slots)
        # 1. Every slot takes what it shall hold: from itself if it has it, at home if its rank has it.
        np.testing.assert_array_equal(old[moves.sources], after)
        kept = before == after
        np.testing.assert_array_equal(moves.sources[kept], np.flatnonzero(kept))
        travels = moves.sources // num_slots != ranks
        np.testing.assert_array_equal(travels, ~(after[:, :, None] == before[:, None, :]).any(-1))
        # 2. In a turn a rank sends one slot at most and receives one at most, and there are as few turns as can be.
        np.testing.assert_array_equal(moves.turns >= 0, travels)
        receiver, turn, sender = np.nonzero(travels)[0], moves.turns[travels], moves.sources[travels] // num_slots
        assert len({*zip(sender, turn, strict=True)}) == len({*zip(receiver, turn, strict=True)}) == len(turn)
        sent, received = (np.bincount(rank, minlength=num_ranks).max() for rank in (sender, receiver))
        assert moves.num_turns == [max(sent, received)] == [turn.max(initial=-1) + 1]
        # 3. No other choice of senders relieves the rank that sends most.
        able = [np.unique(np.flatnonzero(old == expert) // num_slots) for expert in after[travels]]
        assert sent == 0 or not can_send(able, num_ranks, sent - 1)


@pytest.mark.parametrize(("num_ranks", "num_slots", "num_experts"), [(2, 1, 2), (4, 3, 8), (3, 5, 2), (8, 4, 24)])
def test_a_ragged_exchange_sends_the_moved_slots_and_no_others(num_ranks, num_slots, num_experts):
    """What the ranks tell jax.lax.ragged_all_to_all, played by hand as its documentation says."""
    rng = np.random.default_rng(num_ranks)
    old, new = (random_experts(rng, num_experts, num_ranks * num_slots) for _ in range(2))
    moves = find_moves(old, new, num_ranks)
    told = [[np.asarray(table).ravel() for table in slots.slices_of(moves.sources, rank)] for rank in range(num_ranks)]
    before, result = old.reshape(num_ranks, num_slots), np.full((num_ranks, num_slots), -1)
    on_the_wire = 0
    for rank, (starts, sizes, lands, _) in enumerate(told):
        for i, size in enumerate(sizes):
            peer, slice_of_peer = divmod(i, num_slots)
            assert size == told[peer][3][rank * num_slots + slice_of_peer], "what comes is what was sent"
            assert (result[peer, lands[i] : lands[i] + size] == -1).all(), "no slot is written twice"
            result[peer, lands[i] : lands[i] + size] = before[rank, starts[i] : starts[i] + size]
            on_the_wire += size * (peer != rank)
    np.testing.assert_array_equal(result.ravel(), new)
    held = [expert in before[slot // num_slots] for slot, expert in enumerate(new)]
    assert on_the_wire == len(new) - sum(held)


def test_bit_by_bit_as_a_gather_on_the_host_and_compiled_once(caplog):
    """Parameters in two dtypes and Adam's moments, over ep and tp, from placement to placement, given away or kept."""
    rng, mesh = np.random.default_rng(0), mesh_of(EP, TP)
    old = random_experts(rng, EXPERTS, EP * SLOTS)
    state = trained(random_params(mesh, rng, old))
    for turn in range(6):
        new = random_experts(rng, EXPERTS, EP * SLOTS)
        before = [(np.asarray(leaf).copy(), leaf.sharding) for leaf in jax.tree.leaves(state)]
        caplog.clear()
        with jax.log_compiles():
            moved = moe.migrate(state, placement_of(old), placement_of(new), mesh, donate=turn > 0)
        compiled = [record for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
        assert len(compiled) <= (2 if turn < 2 else 0), turn  # one for each of two layouts, kept or given away
        assert moved["params"]["router"] is state["params"]["router"]
        assert state["params"]["w_up"].is_deleted() == (turn > 0)
        assert_moved(moved, before, old, new)
        state, old = moved, new


def several_slices(operand, output, starts, sizes, lands, comes, *, axis_name):
    """jax.lax.ragged_all_to_all as its documentation has it, for slices of a row or none; of everything gathered."""
    numbers = operand.dtype  # and not the bits, with which the instruction does not compute, but this function does
    operand, output = (lax.bitcast_convert_type(array, jnp.uint16) for array in (operand, output))
    everything, *told = (lax.all_gather(array, axis_name) for array in (operand, starts, sizes, lands))
    me, (num_ranks, num_slices) = lax.axis_index(axis_name), told[0].shape
    for rank in range(num_ranks):
        for i in range(num_slices // num_ranks):
            start, size, land = (array[rank, me * (num_slices // num_ranks) + i] for array in told)
            output = jnp.where(size > 0, output.at[land].set(everything[rank, start]), output)
    return lax.bitcast_convert_type(output, numbers)


@pytest.mark.parametrize("exchange", ["native", "brought"])
def test_through_a_ragged_exchange(exchange, monkeypatch):
    """The way that GPUs and TPUs take, and that of a back end which brings an exchange of single slices."""
    if exchange == "native":
        monkeypatch.setattr(slots, "NATIVE", ("cpu",))
        monkeypatch.setattr(lax, "ragged_all_to_all", several_slices)
    else:
        monkeypatch.setattr(table, "_TABLE", dict(table._TABLE))
        brought = {"ragged": ragged.portable_ragged_all_to_all}
        moe.register_backend(moe.Backend(name="mover", platforms=("cpu",), transports=brought))
    _move_in_place.clear_cache()  # what other tests compiled for CPU goes in turns
    rng, mesh = np.random.default_rng(4), mesh_of(EP, TP)
    old = random_experts(rng, EXPERTS, EP * SLOTS)
    state = {"w_up": random_params(mesh, rng, old)["w_up"]}
    for _ in range(3):
        new = random_experts(rng, EXPERTS, EP * SLOTS)
        before = np.asarray(state["w_up"])
        state = moe.migrate(state, placement_of(old), placement_of(new), mesh, donate=True)
        np.testing.assert_array_equal(bits(state["w_up"]), bits(gathered(before, old, new)))
        old = new
    _move_in_place.clear_cache()


def described(mesh, shape, dtype, spec, moves):
    """The arguments of ``_moved``: those that are traced, and those that are not."""
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    whole = NamedSharding(mesh, P())
    moves = jax.tree.map(lambda ints: jax.ShapeDtypeStruct(ints.shape, ints.dtype, sharding=whole), moves)
    return (leaf, moves), {"mesh": mesh, "spec": spec, "kernels": _kernels_of(mesh)}


def test_a_turn_takes_a_slot_over_the_wire_and_nothing_else_does():
    mesh = mesh_of(EP, TP)
    moves = find_moves(np.arange(12), np.roll(np.arange(12), 3), EP)
    assert moves.num_turns == [3]
    arrays, static = described(mesh, (EP * SLOTS, 3, 16), jnp.bfloat16, SPECS["w_up"], moves)
    found = moe.hlo_contract(_move_in_place, *arrays, **static)
    slot = 3 * 8 * 2  # [3, 16 / tp] of two bytes
    assert found.counts == {"all-to-all": 2}
    assert all(c.in_loop and c.wire_bytes == slot * (EP - 1) // EP for c in found.collectives)
    assert found.alias_bytes == SLOTS * slot
    assert found.float_scatters == 0


@pytest.mark.compilers
@pytest.mark.parametrize("target", ["v5e:2x4", "h100:8"])
def test_gpus_and_tpus_send_the_moved_slots_in_one_ragged_exchange(target):
    """Nothing else carries slots, there is no loop of turns, and no buffer beside the leaf and its result on GPU."""
    needs(target)
    mesh = mesh_of(EP, TP)
    moves = find_moves(np.arange(12), np.roll(np.arange(12), 3), EP)
    arrays, static = described(mesh, (EP * SLOTS, 256, 512), jnp.bfloat16, SPECS["w_up"], moves)
    report = moe.compile_for(target, functools.partial(_moved, **static), *arrays)
    part = SLOTS * 256 * 256 * 2
    assert [(c.op, c.operand_bytes, c.group_size, c.in_loop) for c in report.collectives] == [
        ("ragged-all-to-all", part, EP, False)
    ]
    assert report.float_scatters == 0
    assert report.temporary_bytes <= (0.1 if report.platform == "gpu" else 1.1) * part


def test_layers_are_told_by_their_numbers_and_one_that_stays_is_not_touched():
    rng, mesh = np.random.default_rng(1), mesh_of(EP, TP)
    old = np.stack([random_experts(rng, EXPERTS, EP * SLOTS) for _ in range(3)])
    new = np.stack([random_experts(rng, EXPERTS, EP * SLOTS), old[1], random_experts(rng, EXPERTS, EP * SLOTS)])
    layers = [random_params(mesh, rng, experts) for experts in old]
    tree = {"opt": ({"layer_2": layers[0], "layer_10": layers[1]},), "dense": jnp.ones(2)}
    tree["opt"][0]["layer_11"] = layers[2]
    moved = moe.migrate(tree, placement_of(old), placement_of(new), mesh)
    for x, name in enumerate(("layer_2", "layer_10", "layer_11")):
        for key in ("w_up", "w_down"):
            want = gathered(layers[x][key], old[x], new[x])
            np.testing.assert_array_equal(bits(moved["opt"][0][name][key]), bits(want))
    assert moved["opt"][0]["layer_10"]["w_up"] is layers[1]["w_up"]
    assert moved["dense"] is tree["dense"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["node", "dp", "explicit", "one", "fp4"])
def test_on_other_meshes_and_of_other_numbers(kind):
    rng = np.random.default_rng(2)
    spec, num_ranks = P("ep"), 4
    if kind == "node":
        mesh, spec = moe.make_mesh(ep=4, nodes=2, tp=2), P(("node", "ep"), None, "tp")
    elif kind == "dp":
        mesh = moe.make_mesh(ep=4, dp=2)
    elif kind == "fp4":
        mesh = moe.make_mesh(ep=4)
    elif kind == "explicit":
        mesh = Mesh(np.array(jax.devices()[:4]), ("ep",), axis_types=(AxisType.Explicit,))
    else:
        mesh, num_ranks = moe.make_mesh(), 1
    old, new = (random_experts(rng, EXPERTS, 12) for _ in range(2))
    leaf = rng.normal(size=(12, 5, 6)).astype(jnp.float4_e2m1fn if kind == "fp4" else np.float32)[old]
    params = {"w_up": jax.device_put(leaf, NamedSharding(mesh, spec))}
    moved = moe.migrate(params, *(placement_of(experts, num_ranks=num_ranks) for experts in (old, new)), mesh)
    np.testing.assert_array_equal(moved["w_up"], gathered(leaf, old, new))


def test_errors_list_all_that_is_wrong():
    rng, mesh = np.random.default_rng(3), mesh_of(EP, TP)
    old, other = placement_of(np.arange(12), 12), placement_of(np.arange(8), 8, 2)
    params = random_params(mesh, rng, np.arange(12))
    with pytest.raises(InvalidArgumentError) as caught:
        moe.migrate({"b_up": np.ones(12), "w_down": jnp.ones((5, 2)), **params}, old, other, mesh)
    for text in (
        "num_logical_experts is 12 in old_placement and 8 in new_placement",
        "num_ranks is 4",
        "num_physical_experts is 12",
        "params['b_up'] is a ndarray",
    ):
        assert text in str(caught.value)
    whole = {"w_up": jax.device_put(np.ones((12, 2)), NamedSharding(mesh, P()))}
    with pytest.raises(InvalidArgumentError, match="split over 1 ranks .* num_ranks=4"):
        moe.migrate(whole, old, old, mesh)
    with pytest.raises(InvalidArgumentError, match=r"has shape \(4, 2\); expected \[12, ...\]"):
        moe.migrate({"w_up": jax.device_put(np.ones((4, 2)), NamedSharding(mesh, P("ep")))}, old, old, mesh)
    with pytest.raises(InvalidArgumentError, match="not over mesh"):
        moe.migrate({"w_up": jnp.ones((12, 2))}, old, old, mesh)
    with pytest.raises(InvalidArgumentError, match="no leaf below the name"):
        moe.migrate({"up": params["w_up"]}, old, old, mesh)
    layers = placement_of(np.tile(np.arange(12), (2, 1)), 12)
    with pytest.raises(InvalidArgumentError, match="no number of its layer"):
        moe.migrate(params, layers, layers, mesh)
    with pytest.raises(InvalidArgumentError, match=r"layers \[3\], and the placements are for 2 layers"):
        moe.migrate({"3": params}, layers, layers, mesh)
    with pytest.raises(InvalidArgumentError, match=r"layers \(\) and new_placement \(2,\)"):
        moe.migrate(params, old, layers, mesh)
    with pytest.raises(InvalidArgumentError, match="outside jax.jit"):
        jax.jit(lambda params: moe.migrate(params, old, old, mesh))(params)
    with pytest.raises(
        InvalidArgumentError, match="is a ndarray, not an array on devices; lay it out with moe_jax.place"
    ):
        moe.migrate(jax.tree.map(np.asarray, params), old, old, mesh)
    with pytest.raises(MissingArgumentError, match="new_placement is None"):
        moe.migrate(params, old, None, mesh)
    with pytest.raises(MeshError, match="AbstractMesh"):
        moe.migrate(params, old, old, mesh.abstract_mesh)
    with pytest.raises(InvalidArgumentError, match="donate"):
        moe.migrate(params, old, old, mesh, donate=1)


def test_an_array_is_donated_once():
    # Of a deleted array JAX 0.10 makes a segmentation fault on several devices.
    rng, mesh = np.random.default_rng(4), mesh_of(EP, TP)
    old, new = placement_of(np.arange(12), 12), placement_of(np.arange(12)[::-1], 12)
    params = random_params(mesh, rng, np.arange(12))
    average = {"ema": params, "params": params}
    with pytest.raises(
        InvalidArgumentError, match=r"params\['params'\]\['w_up'\] is the same array as params\['ema'\]"
    ):
        moe.migrate(average, old, new, mesh, donate=True)
    assert not params["w_up"].is_deleted()
    params["w_up"].delete()
    for donate in (False, True):
        with pytest.raises(InvalidArgumentError, match=r"params\['w_up'\] was donated before"):
            moe.migrate(params, old, new, mesh, donate=donate)
