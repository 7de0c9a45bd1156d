"""The tables: what others published, what the planner predicts, and how far it is off."""

import json
import statistics
from typing import Any

from moe_jax.hardware.machines import REACHED
from moe_jax.tools.published import gathers
from moe_jax.tools.published.gathers import GATHERED, Gathered
from moe_jax.tools.published.models import TRAINED, Trained, tokens_per_second_at_most
from moe_jax.tools.published.predict import error, predicted_seconds, published_seconds, ways
from moe_jax.tools.published.rows import COMBINE, DISPATCH, PUBLISHED, SOURCES, Published


def run(json_lines: bool) -> int:
    """Prints all tables, or one JSON object for every exchange and every run that was published."""
    if json_lines:
        for values in (*map(exchange_values, _all_ways()), *map(gather_values, GATHERED), *map(model_values, TRAINED)):
            print(json.dumps(values))
        return 0
    print("what exchanges reach of links")
    print("\n".join(link_lines()))
    print("\ndispatch and combine: published, predicted and error; microseconds")
    print("\n".join(exchange_lines()))
    print("\nall-gathers between TPUs: published, predicted and error; microseconds")
    print("\n".join(gather_lines()))
    print("\n".join(("", *summary_lines(), "", "sources:", *(f"  {text}" for text in source_lines()))))
    print("\ntraining: tokens per second and chip, published and at most")
    print("\n".join(model_lines()))
    return 0


def link_lines() -> list[str]:
    """One line for each kind of link, in the columns of a Markdown table."""
    lines = [
        [kind, f"{reached.share:.1%}", f"{reached.latency * 1e6:.1f}", reached.source]
        for kind, reached in REACHED.items()
    ]
    return _markdown(["link", "share of the advertised rate", "latency", "source"], lines, left={0, 3})


def exchange_lines() -> list[str]:
    """One line for each published line, in the columns of a Markdown table."""
    head = ["library", "machine", "ranks", "tokens", "dtype", "dispatch", "predicted", "error"]
    head += ["combine", "predicted", "error", "use"]
    lines = []
    for line in PUBLISHED:
        cells = [line.system, line.machine, str(line.ranks), str(line.tokens), "/".join(_dtypes(line))]
        for way in (DISPATCH, COMBINE):
            if line.published(way) is None:
                cells += ["", "", ""]
            else:
                seconds = (published_seconds(line, way), predicted_seconds(line, way))
                cells += [f"{value * 1e6:.0f}" for value in seconds] + [f"{error(line, way):+.0%}"]
        lines.append([*cells, use_of(line) + (f": {line.note}" if line.note else "")])
    return _markdown(head, lines, left={0, 1, 4, 11})


def gather_lines() -> list[str]:
    """One line for each published all-gather, in the columns of a Markdown table."""
    head = ["machine", "slice", "chips", "bytes", "all-gather", "predicted", "error", "use"]
    lines = []
    for line in GATHERED:
        shapes = ["x".join(map(str, sides)) for sides in (line.slice_, line.chips)]
        seconds = (gathers.published_seconds(line), gathers.predicted_seconds(line))
        cells = [line.machine, *shapes, str(line.arrived), *(f"{value * 1e6:.0f}" for value in seconds)]
        lines.append([*cells, f"{gathers.error(line):+.0%}", use_of(line)])
    return _markdown(head, lines, left={0, 1, 2, len(head) - 1})


def source_lines() -> list[str]:
    return [f"{name}: {text}" for name, text in (*SOURCES.items(), ("all-gathers", gathers.SOURCE))]


def summary_lines() -> list[str]:
    """How large the errors are, for each group of lines with the same use."""
    found = [(line.fits, line.note, abs(error(line, way))) for line, way in _all_ways()]
    found += [(line.fits, "", abs(gathers.error(line))) for line in GATHERED]
    groups = {
        "fitted": [value for fits, _, value in found if fits],
        "kept out, of links like the fitted ones": [value for fits, note, value in found if not (fits or note)],
        "kept out, of others": [value for _, note, value in found if note],
    }
    lines = []
    for name, group in groups.items():
        errors = sorted(group)
        near = sum(value <= 0.1 for value in errors)
        text = f"median error {statistics.median(errors):.0%}, largest {errors[-1]:.0%}, {near} within 10 %"
        lines.append(f"{name}: {len(errors)} times, {text}")
    return lines


def model_lines() -> list[str]:
    """One line for each published run, in the columns of a Markdown table."""
    head = ["model", "machine", "chips", "precision", "published", "at most", "share"]
    lines = []
    for run_ in TRAINED:
        bound = tokens_per_second_at_most(run_)
        share = run_.tokens_per_second / bound
        cells = [run_.model, run_.machine, str(run_.chips), run_.precision]
        lines.append([*cells, f"{run_.tokens_per_second:.0f}", f"{bound:.0f}", f"{share:.0%}"])
    return _markdown(head, lines, left={0, 1, 3})


def exchange_values(entry: tuple[Published, str]) -> dict[str, Any]:
    line, way = entry
    return {
        "event": "published_exchange",
        "system": line.system,
        "machine": line.machine,
        "ranks": line.ranks,
        "tokens": line.tokens,
        "way": way,
        "dtype": line.dtype(way),
        "published_seconds": published_seconds(line, way),
        "predicted_seconds": predicted_seconds(line, way),
        "error": error(line, way),
        "use": use_of(line),
        "note": line.note,
        "source": line.source,
    }


def gather_values(line: Gathered) -> dict[str, Any]:
    return {
        "event": "published_gather",
        "machine": line.machine,
        "slice": line.slice_,
        "chips": line.chips,
        "bytes": line.arrived,
        "published_seconds": gathers.published_seconds(line),
        "predicted_seconds": gathers.predicted_seconds(line),
        "error": gathers.error(line),
        "use": use_of(line),
        "source": gathers.SOURCE,
    }


def model_values(run_: Trained) -> dict[str, Any]:
    return {
        "event": "published_model",
        "model": run_.model,
        "machine": run_.machine,
        "chips": run_.chips,
        "precision": run_.precision,
        "tokens_per_second": run_.tokens_per_second,
        "tokens_per_second_at_most": tokens_per_second_at_most(run_),
        "source": run_.source,
    }


def use_of(line: Published | Gathered) -> str:
    """What the line was used for: to fit a kind of link, or to check such a fit."""
    return f"fits {line.fits}" if line.fits else "kept out"


def _all_ways() -> list[tuple[Published, str]]:
    return [(line, way) for line in PUBLISHED for way in ways(line)]


def _dtypes(line: Published) -> list[str]:
    return [line.dtype(way) for way in ways(line)]


def _markdown(head: list[str], lines: list[list[str]], *, left: set[int]) -> list[str]:
    """The lines of a Markdown table whose columns are as wide as their longest cell."""
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def text(cells: list[str]) -> str:
        both = zip(cells, widths, strict=True)
        padded = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(both)]
        return f"| {' | '.join(padded)} |"

    return [text(head), text(rule), *map(text, lines)]
