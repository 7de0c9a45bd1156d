"""Experts that follow their load in a training run: what is learnt stays the same, and nothing is compiled again."""

import dataclasses
import tomllib
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import moe_jax as moe
from moe_jax.config import BalanceConfig, load_config, override
from moe_jax.layer.placement import BALANCES
from moe_jax.parameters import NAMES_OF_EXPERTS
from moe_jax.tools.train import balance, loop, model, step

ROOT = Path(__file__).parent.parent
EP, LAYERS, EXPERTS, REDUNDANT = 4, 2, 8, 4
SLOTS = EXPERTS + REDUNDANT
SKEWED = np.array([[40, 1, 1, 1, 1, 1, 1, 2], [6, 6, 6, 6, 6, 6, 6, 6]])  # the first layer is, the second is even


def config_with(balance=None, **sections):
    config = load_config(ROOT / "configs" / "tiny.toml")
    config = override(
        config,
        mesh={"ep": EP, "tp": 1},
        model={"hidden": 16, "heads": 2, "seq_len": 8, "layers": LAYERS},
        moe={"ffn": 16},
        train={"batch_size": 8, "warmup_steps": 2, "steps": 20, "grad_clip": 0.3},
    )
    return override(dataclasses.replace(config, balance=balance), **sections)


def random_places(seed):
    load = np.random.default_rng(seed).pareto(1, (LAYERS, EXPERTS)) + 0.01
    placement = moe.rebalance(load, num_physical_experts=SLOTS, num_ranks=EP)
    return balance.Places(placement, np.zeros((LAYERS, EXPERTS, 1 + REDUNDANT), np.float32))


# Where experts go.


def test_modes_are_those_of_the_layer():
    assert moe.config.BALANCES == BALANCES


def test_the_how_to_has_the_defaults():
    page = (ROOT / "docs" / "how_to" / "balance_experts.md").read_text()
    section = tomllib.loads(page.split("```toml")[1].split("```")[0])["balance"]
    assert section == {name: value for name, value in dataclasses.asdict(BalanceConfig()).items() if value is not None}


def test_experts_begin_in_their_order_and_replicas_evenly():
    in_order = balance.first_places(config_with(BalanceConfig()), 3).placement
    np.testing.assert_array_equal(in_order.physical_to_logical, np.tile(np.arange(EXPERTS), (3, 1)))
    assert balance.first_places(config_with(), 3).placement == in_order
    placed = balance.first_places(config_with(BalanceConfig(num_redundant=REDUNDANT)), 2)
    assert placed.placement.num_physical_experts == SLOTS
    np.testing.assert_allclose(placed.imbalance(np.ones((2, EXPERTS))), 1)


@pytest.mark.parametrize("mode", BALANCES)
def test_a_layer_moves_where_it_gains_enough(mode):
    config = config_with(BalanceConfig(num_redundant=REDUNDANT, mode=mode))
    first = balance.first_places(config, LAYERS)
    before = first.imbalance(SKEWED)
    better = balance.find_better(config, config.balance, SKEWED, first)
    after, experts = better.places.imbalance(SKEWED), better.places.placement.physical_to_logical
    assert (better.before, better.after) == pytest.approx((before.mean(), after.mean()))
    assert after[0] < 0.7 * before[0]
    np.testing.assert_array_equal(experts[1], first.placement.physical_to_logical[1])
    moved = (experts != first.placement.physical_to_logical).sum()
    assert better.num_moved == moved > 0
    assert better.sentence.endswith(f" x mean, {moved} of 24 slots moved")
    # Where they are by now, experts gain nothing more; and they stay where the gain is less than the threshold.
    assert balance.find_better(config, config.balance, SKEWED, better.places).num_moved == 0
    stay = dataclasses.replace(config.balance, threshold=0.99)
    kept = balance.find_better(config, stay, SKEWED, first)
    assert kept.num_moved == 0 and kept.places.placement == first.placement
    gain = float(1 - after[0] / kept.places.imbalance(SKEWED)[0])
    for threshold, does in ((gain - 0.01, True), (gain + 0.01, False)):
        strict = dataclasses.replace(config.balance, threshold=threshold)
        assert (balance.find_better(config, strict, SKEWED, first).num_moved > 0) == does


def test_shares_follow_the_load_where_experts_stay():
    places, load = random_places(0), np.random.default_rng(1).pareto(1, (LAYERS, EXPERTS))
    after = {}
    for mode in BALANCES:
        config = config_with(BalanceConfig(num_redundant=REDUNDANT, mode=mode, threshold=0.99))
        better = balance.find_better(config, config.balance, load, places)
        assert better.num_moved == 0 and better.places.placement == places.placement
        after[mode] = better.after
        if mode == "load":
            np.testing.assert_allclose(better.places.shares.sum(-1), 1, rtol=1e-6)
    assert after["load"] < better.before - 0.01 and after["rank"] == after["token"] == better.before


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_few_slots_differ_where_ranks_and_slots_may_change_places(num_nodes):
    rng, moved = np.random.default_rng(0), np.zeros(2)
    for seed in range(5):
        now, new = random_places(seed).placement, random_places(seed + 1).placement
        found = balance.nearest(new, now, num_nodes)
        ranks = [np.sort(p.physical_to_logical.reshape(LAYERS, num_nodes, -1, SLOTS // EP)) for p in (new, found)]
        for mine, theirs in zip(*(rows.reshape(LAYERS * num_nodes, -1, SLOTS // EP) for rows in ranks), strict=True):
            assert sorted(mine.tolist()) == sorted(theirs.tolist())  # the same ranks in each node, in some order
        moved += [(p.physical_to_logical != now.physical_to_logical).sum() for p in (new, found)]
        # The same in another order is no change at all.
        rows = now.physical_to_logical.reshape(LAYERS, num_nodes, -1, SLOTS // EP)
        mixed = rng.permuted(rng.permutation(rows, axis=2), axis=3).reshape(LAYERS, SLOTS)
        assert balance.nearest(dataclasses.replace(now, physical_to_logical=mixed), now, num_nodes) == now
    assert moved[1] < 0.75 * moved[0]


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_no_more_slots_move_than_may(num_nodes):
    """Two nodes, each of which has its groups of experts; and placements that were made where nodes did not count."""
    uneven, mixed = [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 3], [0, 2, 4, 6, 0, 2, 1, 3, 5, 7, 1, 3]  # no expert is on both
    of_nodes = {"mesh": {"nodes": num_nodes}, "router": {"num_groups": 2, "top_groups": 2}}
    config = config_with(BalanceConfig(num_redundant=REDUNDANT, max_moved=2, threshold=0.0), **of_nodes)
    first = balance.first_places(config, LAYERS)
    others = (
        dataclasses.replace(first.placement, physical_to_logical=np.tile(np.array(slots, np.int32), (LAYERS, 1)))
        for slots in (uneven, mixed)
    )
    for now in (first, random_places(0), *(dataclasses.replace(first, placement=other) for other in others)):
        loads = np.random.default_rng(1).pareto(1, (9, LAYERS, EXPERTS))
        found = [balance.find_better(config, config.balance, load, now) for load in loads]
        assert sum(better.num_moved > 0 for better in found) > 3
        for better in found:
            changed = better.places.placement.physical_to_logical != now.placement.physical_to_logical
            assert changed.sum(1).max() <= 2 and better.after <= better.before


@pytest.mark.parametrize("num_groups", [3, 2])  # of four experts, the last ones without weights; of six, one of both
def test_groups_may_hold_experts_without_weights(num_groups):
    router = {"num_groups": num_groups, "top_groups": num_groups}
    moe_section = {"ffn": 16, "num_zero_experts": 4}
    config = config_with(BalanceConfig(threshold=0.0), mesh={"nodes": 2}, moe=moe_section, router=router)
    first = balance.first_places(config, LAYERS)
    load = np.tile([10, 9, 8, 7, 1, 1, 1, 1], (LAYERS, 1))
    better = balance.find_better(config, config.balance, load, first)
    assert better.num_moved > 0
    nodes = better.places.placement.physical_to_logical.reshape(LAYERS, 2, -1)
    whole = [len(np.unique(node // 4)) == 1 for layer in nodes for node in layer]
    assert all(whole) == (num_groups == 3)


# What moves with them.


class Said:
    """The parts of a job that a move of experts tells."""

    def __init__(self):
        self.results, self.doing = [], ""

    def result(self, event, sentence, /, **values):
        self.results.append((event, sentence, values))


def run_of(config, state, decoder):
    """As much of a run as moving experts needs."""
    said, records = Said(), []
    job = types.SimpleNamespace(config=config, model=config.model, interrupt=said, progress=said)
    return types.SimpleNamespace(
        job=job,
        state=state,
        decoder=decoder,
        places=state.balance.places(decoder.plan, config.balance.mode),
        done_steps=0,
        record=records.append,
        records=records,
    )


def test_twenty_moves_compile_nothing_and_keep_every_expert(caplog):
    """A state of one number for each expert. Steps between looks, and those where nothing is gained, change nothing."""
    config = config_with(BalanceConfig(num_redundant=REDUNDANT, every=3, threshold=0.01))
    mesh = moe.make_mesh(ep=EP)
    plan = moe.make_plan(mesh, tokens_per_rank=4, hidden=8, num_experts=SLOTS, top_k=2)
    whole, split = (NamedSharding(mesh, spec) for spec in (P(), P("ep")))
    decoder = types.SimpleNamespace(mesh=mesh, plan=plan, replicated=whole)
    places = balance.first_places(config, LAYERS)

    def experts(first):
        values = first + places.placement.physical_to_logical[:, :, None] + np.zeros(3, np.float32)
        return {"blocks": {str(i): {"moe": {"w_up": jax.device_put(value, split)}} for i, value in enumerate(values)}}

    def load_of(load):
        load = jax.device_put(np.asarray(load, np.float32), whole)
        return dataclasses.replace(run.state.balance, load=load)

    state = step.TrainState(experts(100), (experts(200),), balance.Balance.of(places, None, whole))
    run = run_of(config, state, decoder)
    rng, compiled = np.random.default_rng(0), []
    for turn in range(21):
        load = rng.pareto(1, (LAYERS, EXPERTS)) + 0.01
        run.state, before = dataclasses.replace(run.state, balance=load_of(load)), run.places
        caplog.clear()
        with jax.log_compiles():
            for run.done_steps in range(3 * turn + 1, 3 * turn + 4):
                loop._rebalance(run)
        compiled.append(sum("Finished XLA compilation" in record.getMessage() for record in caplog.records))
        after = run.places
        assert len(run.records) == len(run.job.progress.results) == turn + 1
        assert run.records[-1] == {
            "step": 3 * turn + 4,
            "rebalanced_before": pytest.approx(before.imbalance(load).mean()),
            "rebalanced_after": pytest.approx(after.imbalance(load).mean()),
            "rebalanced_moved_slots": (
                before.placement.physical_to_logical != after.placement.physical_to_logical
            ).sum(),
        }
        event, sentence, values = run.job.progress.results[-1]
        assert event == "rebalanced" and values["step"] == 3 * turn + 3
        assert sentence.startswith(f"rebalanced after step {values['step']}: fullest rank {values['before']:.2f} -> ")
        held = run.state.balance
        np.testing.assert_array_equal(held.experts, after.placement.physical_to_logical)
        np.testing.assert_array_equal(held.table, after.placement.table(1 + REDUNDANT))
        np.testing.assert_array_equal(held.shares, after.placement.shares(held.load, 1 + REDUNDANT))
        np.testing.assert_array_equal(held.load, load.astype(np.float32))
        for first, tree in ((100, run.state.params), (200, run.state.opt_state[0])):
            found = [np.asarray(tree["blocks"][str(i)]["moe"]["w_up"])[:, 0] for i in range(LAYERS)]
            np.testing.assert_array_equal(found, first + after.placement.physical_to_logical)
    assert compiled[0] >= 1 and not any(compiled[1:])
    # A run that goes on in another mode reads no shares, and does not count with them.
    assert (held.places(plan, "load").shares == after.shares).all() and after.shares.any()
    assert not held.places(plan, "token").shares.any()
    run.state, run.done_steps = dataclasses.replace(run.state, balance=load_of(np.ones((LAYERS, EXPERTS)))), 99
    loop._rebalance(run)  # towards an even load it may move
    settled, run.done_steps = run.state.params, 102
    loop._rebalance(run)
    assert run.state.params is settled and len(run.records) <= 22


# What is learnt.


def trained(config, batches):
    """The losses and norms of a run on these batches, the run at its end, and the average load of its experts."""
    mesh = moe.make_mesh(ep=config.mesh.ep)
    decoder, optimizer = model.build_decoder(config, mesh), step.make_optimizer(config.train)
    state = step.init_state(decoder, optimizer, 0, config)
    take = step.compile_step(decoder, optimizer, config, state)
    run, measured = run_of(config, state, decoder) if config.balance else types.SimpleNamespace(state=state), []
    average = np.zeros((LAYERS, EXPERTS))
    for batch in batches:
        if config.balance:
            loop._rebalance(run)
            run.done_steps += 1
        run.state, metrics = take(run.state, jax.device_put(batch, decoder.over_batch))
        measured.append((float(metrics.loss), float(metrics.grad_norm)))
        average = 0.5 * (average + np.asarray(metrics.stats.load)[:, :EXPERTS])
    return np.array(measured), run, average


@pytest.mark.slow
def test_training_is_the_same_with_balancing_and_without():
    """Skewed data, gradients of which all are clipped, a selection bias, and an expert without weights to choose.

    Experts move before most of the steps.
    """
    rng = np.random.default_rng(0)
    batches = [rng.choice(4, (8, 9), p=[0.7, 0.1, 0.1, 0.1]).astype(np.int32) for _ in range(10)]
    sections = {"router": {"selection_bias": True}, "moe": {"num_zero_experts": 1}}
    section = BalanceConfig(num_redundant=REDUNDANT, every=1, decay=0.5, threshold=0.0)
    want, plain, _ = trained(config_with(**sections), batches)
    got, run, average = trained(config_with(section, **sections), batches)
    assert len(run.records) >= 5
    assert (want[:, 1] > 0.3).all() and want[-1, 0] < want[0, 0] - 0.5
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(run.state.balance.load, average, rtol=1e-5)
    assert 0 < average.sum(1).max() < 8 * 8 * 2 * (1 - 0.5**10)  # some went to the expert without weights
    for tree, alone in (
        (run.state.params, plain.state.params),
        (run.state.opt_state[1][0].mu, plain.state.opt_state[1][0].mu),
    ):
        for i, experts in enumerate(run.places.placement.physical_to_logical):
            layer, other = (each["blocks"][str(i)]["moe"] for each in (tree, alone))
            first = run.places.placement.table()[i, :, 1]  # a slot of each expert
            for name in NAMES_OF_EXPERTS & set(layer):
                values = np.asarray(layer[name])
                np.testing.assert_array_equal(values, values[first][experts], err_msg=name)  # bit by bit
                np.testing.assert_allclose(values[first], other[name], rtol=0, atol=1e-4, err_msg=name)
