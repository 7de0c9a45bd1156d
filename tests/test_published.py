"""What others published is counted as they count it, fits the links' figures, and stands in the documents as it is."""

import json
import statistics
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh

import moe_jax as moe
from moe_jax.hardware import MACHINES
from moe_jax.hardware.machines import REACHED
from moe_jax.tools import published
from moe_jax.tools.published import gathers, models, table
from moe_jax.tools.published.gathers import GATHERED
from moe_jax.tools.published.predict import error, fit, moved, points_of, predicted_seconds, published_seconds, ways
from moe_jax.tools.published.rows import HIDDEN, PUBLISHED, PUBLISHED_MACHINES, ROW_BYTES, SOURCES, TOP_K

PAGE = Path(__file__).parent.parent / "docs" / "planner.md"


def lines_of(system: str, machine: str, tokens: int = 4096) -> dict:
    """Lines by their ranks; of several the first."""
    found = [line for line in PUBLISHED if (line.system, line.machine, line.tokens) == (system, machine, tokens)]
    return {line.ranks: line for line in reversed(found)}


@pytest.mark.parametrize("kind", REACHED)
def test_the_figures_of_links_are_the_fit_to_their_lines(kind):
    """Fitted anew from the lines, to the digits that are stored: neither can change without the other."""
    factor, latency = fit(points_of(kind))
    reached = REACHED[kind]
    assert round(factor * reached.share, 3) == reached.share
    assert round(latency * 1e6, 1) == pytest.approx(reached.latency * 1e6)
    lines = [line for line in PUBLISHED if line.fits == kind]
    assert not any(line.note for line in lines)
    said = reached.source.removeprefix("fitted to the rows of ").split(" on ")[0]
    assert {line.system.split(",")[0] for line in lines} == ({said} if kind != "ICI" else set())
    assert kind != "ICI" or said in gathers.SOURCE


def test_a_fit_finds_the_link_that_made_the_times():
    """Times that a link of half of the rate and 10 microseconds would give."""
    points = [(at_rate, at_rate / 0.5 + 10e-6) for at_rate in (1e-6, 3e-5, 2e-3)]
    assert fit(points) == (pytest.approx(0.5), pytest.approx(10e-6))


@pytest.mark.parametrize("name", [name for name in MACHINES if name != "cpu"])
def test_fitted_links_say_so(name):
    machine = MACHINES[name]
    for part in ("inside", "between") if machine.between else ("inside",):
        for figure in ("bytes_per_second", "latency"):
            assert "fitted to the rows of" in machine.source_of(f"{part}.{figure}")
    # Of the others nobody published exchanges.
    measured = {line.machine for line in (*PUBLISHED, *GATHERED)}
    assert ("assumed of this device too" in machine.source_of("inside.latency")) == (name not in measured)


def test_bytes_are_those_that_publishers_counted():
    """UCCL-EP publishes its times beside its bandwidths, and mori how many rows travel in one case."""
    times = {8: (500, 973), 16: (1196, 6379), 24: (1633, 6365), 32: (2022, 4899)}
    for ranks, line in lines_of("UCCL-EP", "h200").items():
        found = [published_seconds(line, way) * 1e6 for way in ways(line)]
        assert found == pytest.approx(times[ranks], rel=0.025)
    sixteen = lines_of("mori", "mi300x")[16]
    rows = moved(sixteen)
    assert rows.counted == pytest.approx(8166, rel=0.001)  # tokens for nodes, its own among them
    assert rows.between == pytest.approx(8166 / 2, rel=0.001)
    assert rows.inside == pytest.approx(26757 * 7 / 8, rel=0.01)  # rows that a rank gets, of all ranks


def test_rows_that_stay_at_home_do_not_travel():
    for line in PUBLISHED:
        rows = moved(line)
        if line.rows == "pairs":
            at_home = line.tokens * TOP_K / line.ranks
            assert rows.inside + rows.between + at_home == pytest.approx(line.tokens * TOP_K)
        node = PUBLISHED_MACHINES[line.machine].devices_per_node
        assert (rows.between == 0) == (line.ranks <= node) and rows.inside < line.tokens * TOP_K


STRAIGHT = [line for line in PUBLISHED if line.rows == "pairs" and line.machine in MACHINES and line.tokens > 1]


@pytest.mark.parametrize("line", STRAIGHT, ids=lambda line: f"{line.system}-{line.machine}-{line.ranks}")
def test_a_plan_takes_the_same_time_on_the_wire(line):
    """Of a padded exchange without headroom, which sends a row for every choice too, by bytes and by links.

    The plan's rows have a scale each, instead of one for 128 numbers; latencies and passes over rows are its own.
    """
    names = {"fp8": "fp8_e4m3", "int8": "int8", "bf16": "none"}
    quant, combine_quant = (names[dtype] for dtype in line.dtypes)
    experts = line.ranks * -(-line.experts // line.ranks)
    plan = moe.make_plan(
        AbstractMesh((line.ranks, 1), ("ep", "tp")),
        tokens_per_rank=line.tokens,
        hidden=HIDDEN,
        num_experts=experts,
        top_k=TOP_K,
        transport="padded",
        capacity_factor=1.0,
        quant=quant,
        combine_quant=combine_quant,
        hardware=line.machine,
    )
    machine, rows, cost = MACHINES[line.machine], moved(line), plan.cost(0)["forward"]
    phases = {phase.name: phase for phase in cost.phases}
    for way in ways(line):
        latency = (machine.between if rows.between else machine.inside).latency
        alone = predicted_seconds(line, way) - latency
        assert phases[way].wire_seconds == pytest.approx(alone, rel=0.05)
        assert phases[way].latency_seconds > latency  # that of the exchange, and launches
    sent = sum((rows.inside + rows.between) * ROW_BYTES[line.dtype(way)] for way in ways(line))
    assert cost.even_wire_bytes == pytest.approx(sent, rel=0.05)


def test_a_gather_has_the_links_of_its_chips():
    """Of Ironwood's six links of 100 GB/s two lead to other chips of a square; what arrives is for both devices."""
    line = next(line for line in GATHERED if line.arrived == 100663296)
    link = MACHINES["v7x"].inside
    assert line.arrived == 3 * 2 * 4096 * 8 * 128 * 4  # what the other three chips have, for each of two cores
    assert link.bytes_per_second == pytest.approx(REACHED["ICI"].share * 600e9 / 2)
    alone = line.arrived / (REACHED["ICI"].share * 200e9)
    assert gathers.predicted_seconds(line) == pytest.approx(alone + link.latency)


def test_an_exchange_takes_as_long_as_its_slower_link():
    h800 = PUBLISHED_MACHINES["h800"]
    small, large = lines_of("DeepEP V1, low latency", "h800", tokens=128)[16], lines_of("DeepEP V1", "h800")[16]
    over_rdma = 128 * 8 * 8 / 16 * ROW_BYTES["fp8"] / h800.between.bytes_per_second + h800.between.latency
    assert predicted_seconds(small, "dispatch") == pytest.approx(over_rdma)
    over_nvlink = moved(large).inside * ROW_BYTES["bf16"] / h800.inside.bytes_per_second + h800.between.latency
    assert predicted_seconds(large, "combine") == pytest.approx(over_nvlink)
    assert over_nvlink > moved(large).between * ROW_BYTES["bf16"] / h800.between.bytes_per_second


def test_errors_are_as_small_as_the_page_says():
    def errors(lines):
        return [abs(error(line, way)) for line in lines for way in ways(line)]

    between_tpus = [abs(gathers.error(line)) for line in GATHERED]
    assert max(between_tpus) < 0.05
    fitted = errors(line for line in PUBLISHED if line.fits)
    assert statistics.median(fitted) < 0.05 and max(fitted) < 0.3
    others = errors(line for line in PUBLISHED if not line.fits and not line.note)
    assert len(others) > 2 * len(fitted) and statistics.median(others) < 0.1 and max(others) < 0.55
    alike = [line for line in PUBLISHED if not line.note]
    nvlink = [line for line in alike if line.machine not in ("mi300x", "mi355x", "a3") and not moved(line).between]
    assert max(errors(nvlink)) < 0.2 and {line.machine for line in nvlink} == {"h800", "h100", "h200", "b200", "gb200"}
    assert max(errors(line for line in alike if line.tokens >= 4096 and 16 < line.ranks and moved(line).between)) < 0.15
    # Other sections of the page have tables of their own.
    sections = PAGE.read_text().split("\n## ")
    text = "\n".join(part for part in sections if part.startswith(("How right the planner is: ex", "An upper bound:")))
    computed = [*table.link_lines(), *table.exchange_lines(), *table.summary_lines(), *table.model_lines()]
    computed += [*table.gather_lines(), *table.source_lines()]
    every = len(errors(PUBLISHED)) + len(GATHERED)
    known = len([line for line in GATHERED if line.fits]) + len(fitted)
    computed.append(f"five pairs of figures stand against {known} times and have to predict {every - known} others")
    assert [line for line in computed if line not in text] == [], "docs/planner.md does not say what is computed"
    said = [line for line in text.splitlines() if line.startswith("|")]
    tables = [table.link_lines(), table.exchange_lines(), table.gather_lines(), table.model_lines()]
    assert len(said) == sum(map(len, tables))


def test_a_ragged_exchange_is_as_slow_as_was_published():
    """openxla/xla#33386: 16.42 GiB/s leave a B200, on 8."""
    b200 = MACHINES["b200"]
    assert b200.ragged_share * b200.inside.bytes_per_second == pytest.approx(16.42 * 2**30, rel=0.03)


@pytest.mark.parametrize(
    "run", models.TRAINED, ids=lambda run: f"{run.model}-{run.machine}-{run.chips}-{run.precision}"
)
def test_no_published_run_passes_the_bound(run):
    bound = models.tokens_per_second_at_most(run)
    assert run.tokens_per_second < bound
    per_token, seconds = models.moe_layers(run)
    whole = run.flops_per_second / run.tokens_per_second
    assert 0.4 * whole < per_token < whole  # most products of such a model are of its experts
    # The MoE layers alone, at the peak: the router's in fp32, which takes six passes.
    machine = MACHINES[run.machine]
    peak = machine.flops8 if run.precision == "fp8" else machine.flops16
    model = models.MODELS[run.model]
    experts = model.layers * 18 * model.hidden * model.ffn * (model.top_k + model.shared_experts)
    router = model.layers * 6 * model.hidden * model.experts
    assert per_token == pytest.approx(experts + router, rel=0.001)
    assert seconds == pytest.approx(experts / peak + router / machine.flops32, rel=0.001)
    devices = 2 if run.machine == "v7x" else 1
    assert bound == pytest.approx(devices / (seconds + (whole - experts - router) / peak), rel=0.001)


def test_all_tables_are_printed(capsys):
    assert published.run(json_lines=False) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*SOURCES, *models.MODELS))
    assert published.run(json_lines=True) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {event["event"] for event in events} == {"published_exchange", "published_gather", "published_model"}
    first = events[0]
    assert first["error"] == pytest.approx(first["predicted_seconds"] / first["published_seconds"] - 1)
    assert all(event["source"] for event in events)
