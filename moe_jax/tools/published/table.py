"""The tables of ``plan --published``: what others published, what the planner predicts, and how far it is off."""

import json
import statistics
from typing import Any

from moe_jax.hardware.machines import REACHED
from moe_jax.tools.published.models import TRAINED, Trained, tokens_per_second_at_most
from moe_jax.tools.published.predict import error, predicted_seconds, published_seconds, ways
from moe_jax.tools.published.rows import COMBINE, DISPATCH, PUBLISHED, SOURCES, Published


def run(json_lines: bool) -> int:
    """Prints both tables, or one JSON object for every exchange and every run that was published."""
    if json_lines:
        for values in (*map(exchange_values, _all_ways()), *map(model_values, TRAINED)):
            print(json.dumps(values))
        return 0
    print("what exchanges reach of links")
    print("\n".join(link_lines()))
    print("\ndispatch and combine: published, predicted and error; microseconds")
    print("\n".join(exchange_lines()))
    print("\n".join(("", *summary_lines(), "", "sources:", *(f"  {name}: {text}" for name, text in SOURCES.items()))))
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


def summary_lines() -> list[str]:
    """How large the errors are, of all lines that were used alike."""
    groups = {
        "fitted": [line for line in PUBLISHED if line.fits],
        "kept out, of links like the fitted ones": [line for line in PUBLISHED if not (line.fits or line.note)],
        "kept out, of others": [line for line in PUBLISHED if line.note],
    }
    lines = []
    for name, group in groups.items():
        errors = sorted(abs(error(line, way)) for line in group for way in ways(line))
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


def use_of(line: Published) -> str:
    """What the line was used for: to fit a kind of link, or to see how right such fits are."""
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
