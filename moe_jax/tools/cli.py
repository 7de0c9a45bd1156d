"""The command line, `python -m moe_jax COMMAND ...`: the only place where a MoEError is caught.

Exit codes: 0 done, 1 a check failed (verify), 2 bad input with one sentence on standard error, 130 interrupted
(Ctrl-C); of a training run that saved and ended because it was asked to, 143 (SIGTERM) and 129 (SIGHUP); 141 nobody
reads any more.
"""

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moe_jax.config import DTYPES, Config, load_config, override, parse_mesh
from moe_jax.errors import InvalidArgumentError, MoEError, check_count

if TYPE_CHECKING:  # a command imports only what it needs, so that bad input is told at once
    from moe_jax.tools.planner.question import Terms


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise InvalidArgumentError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        arguments = _make_parser().parse_args(argv)
        arguments.argv = list(sys.argv[1:] if argv is None else argv)
        return arguments.command(arguments)
    except MoEError as error:
        print(f"moe_jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moe_jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes standard output at exit, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("moe_jax: stopped: whoever read standard output has closed it", file=sys.stderr)
        return 141


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moe_jax",
        description="Distributed Mixture-of-Experts for JAX. Where a mesh needs more CPU devices, they are emulated.",
        allow_abbrev=False,
        # One column for the texts in every version of Python; names that are too long for it have a line of their own.
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=14),
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_verify(commands)
    _add_plan(commands)
    _add_sweep(commands)
    _add_bench(commands)
    _add_eplb(commands)
    _add_stragglers(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> None:
    text = "train a byte-level decoder with Mixture-of-Experts layers, print its validation loss and a sample"
    parser = commands.add_parser("train", help=text, description=text, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="TOML with [moe], [model], [train]: configs/tiny.toml")
    parser.add_argument("--data", metavar="PATH", help="file or folder of text (default: Python's standard library)")
    parser.add_argument("--steps", type=int, metavar="N", help="stop after N steps; the learning-rate schedule stays")
    out = "for checkpoints, metrics.jsonl and report.png (default: runs/CONFIG, runs/CONFIG-2, ...: the first empty)"
    parser.add_argument("--out", metavar="DIR", help=out)
    resume = "go on from the last checkpoint in --out (default: the folder of CONFIG that was saved last)"
    parser.add_argument("--resume", action="store_true", help=resume)
    earlier = "go on from the checkpoint of this step instead of the last one, whose place the next one takes"
    parser.add_argument("--resume-from", type=int, metavar="STEP", help=earlier)
    profile = "for a trace of jax.profiler of three steps, whose operations have the names of the layer's phases"
    parser.add_argument("--profile", metavar="DIR", help=profile)
    parser.add_argument("--seed", type=int, metavar="N", help="instead of train.seed")
    several = parser.add_mutually_exclusive_group()
    processes = "start N processes on this machine, which share the emulated devices of the mesh"
    several.add_argument("--processes", type=int, metavar="N", help=processes)
    _add_distributed(several)
    _add_mesh_and_json(parser)
    parser.set_defaults(command=_train)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    text = "check the operators against the float64 oracle on this machine's devices"
    parser = commands.add_parser("verify", help=text, description=text, allow_abbrev=False)
    parser.add_argument(
        "--backend", default="auto", metavar="NAME", help="of the table, or of an installed package (default: auto)"
    )
    _add_mesh_and_json(parser)
    parser.set_defaults(command=_verify)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    text = "whether a layer of CONFIG fits on a mesh of some machine, how long it takes, and what bounds it"
    parser = commands.add_parser("plan", help=text, description=text + "; needs no devices", allow_abbrev=False)
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="TOML with [moe] and [model]: configs/deepseek_v3.toml"
    )
    _add_mesh_and_json(parser)
    _add_question(parser)
    compiled = "compile the layer with the machine's real compiler, and put its figures beside the estimates"
    parser.add_argument("--compile", action="store_true", help=compiled)
    described = "also print what the plan is: sizes, choices with reasons, bytes, exact counts"
    parser.add_argument("--describe", action="store_true", help=described)
    picture = "draw time by phase, memory by purpose, and wire bytes from rank to rank: .png, .svg or .pdf"
    parser.add_argument("--picture", metavar="FILE", help=picture)
    published = "instead: exchanges and training runs that others published, beside what the planner predicts for them"
    parser.add_argument("--published", action="store_true", help=published)
    parser.set_defaults(command=functools.partial(_plan, parser))


def _add_sweep(commands: argparse._SubParsersAction) -> None:
    text = "plans of CONFIG on several meshes beside each other, ranked, with a picture"
    parser = commands.add_parser("sweep", help=text, description=text, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="TOML with [moe] and [model]: configs/deepseek_v3.toml")
    mesh = "a mesh to try, as often as there are meshes: axes ep, tp, nodes, dp; nodes not named: the machine's"
    parser.add_argument("--mesh", action="append", default=[], metavar="ep=8,dp=8", help=mesh)
    devices = "try all meshes of N devices that make sense: ep divides the experts, tp the width of one, dp is the rest"
    parser.add_argument("--devices", type=int, metavar="N", help=devices)
    _add_question(parser)
    parser.add_argument("--compile", action="store_true", help="also compile the layer, by the machine's real compiler")
    run = "also time the layer on the devices that are here, which must be of the machine's platform"
    parser.add_argument("--run", action="store_true", help=run)
    top = "compile and run only the N meshes that are predicted best (default: all of --mesh, 3 with --devices)"
    parser.add_argument("--top", type=int, metavar="N", help=top)
    out = "for sweep.jsonl, by which an interrupted sweep goes on, and sweep.png (default: sweeps/CONFIG)"
    parser.add_argument("--out", metavar="DIR", help=out)
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.set_defaults(command=_sweep)


def _add_question(parser: argparse.ArgumentParser) -> None:
    """What a plan and a sweep can be asked about, beside the mesh."""
    hardware = "h100, v5p, a3, ...: the machine, or a TOML file that describes one (default: what is here)"
    parser.add_argument("--hardware", metavar="NAME", help=hardware)
    tokens = "tokens of each device (default: batch_size * seq_len / devices, or 512 without [train])"
    parser.add_argument("--tokens", type=int, metavar="N", help=tokens)
    parser.add_argument("--tokens-per-rank", dest="tokens", type=int, help=argparse.SUPPRESS)  # its name until now
    parser.add_argument("--dtype", choices=DTYPES, help="of the rows (default: train.dtype, or bfloat16)")
    for name, rows in (
        ("quant", "rows on their way to the experts: int8, fp8_e4m3, ..."),
        ("combine-quant", "rows on their way back"),
        ("backward-quant", "cotangents of rows, both ways"),
    ):
        parser.add_argument(f"--{name}", default="none", metavar="Q", help=f"recipe of {rows} (default: none)")
    parser.add_argument("--layers", type=int, metavar="N", help="layers in memory at a time (default: model.layers)")
    optimizer = "whose state is in memory: adamw, sgd, none, ... (default: adamw)"
    parser.add_argument("--optimizer", default="adamw", metavar="NAME", help=optimizer)
    parser.add_argument("--remat", action="store_true", help="compute the layer again in the backward pass")


def _add_bench(commands: argparse._SubParsersAction) -> None:
    text = "time the layer beside the dense limit and four usual ways of doing it, and count its bytes"
    parser = commands.add_parser("bench", help=text, description=text, allow_abbrev=False)
    own = "TOML with [moe] and [model]: a workload of your own, alone or beside --workloads"
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=own)
    parser.add_argument("--mesh", metavar="ep=4,tp=2", help="axes ep, tp, nodes, dp (default: CONFIG's, or ep=8)")
    parser.add_argument("--workloads", type=_words, metavar="W1,W3", help="of W1 to W6 (default: all, or CONFIG alone)")
    parser.add_argument("--dtype", type=_words, default=["float32"], metavar="D,...", help="float32, bfloat16 or both")
    parser.add_argument("--quant", type=_words, default=["none"], metavar="Q,...", help="wires: none, int8, fp8_e4m3")
    against = (
        "what to compare with: minimal, ragged_dot, one-hot capacity, all experts (default: these), balanced (with "
        "replicas of hot experts), or a transport"
    )
    parser.add_argument("--against", type=_words, metavar="A,...", help=against)
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of timing (default: 7, or 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and W1, W3 and W4 only")
    slowest = "leave out what would need longer for a run (default: 60)"
    parser.add_argument("--max-seconds", type=float, default=60.0, metavar="S", help=slowest)
    parser.add_argument("--json", metavar="FILE", help="JSON lines with raw seconds; -: on standard output, no tables")
    picture = "draw the time of each contender, by pass, beside the layer's: .png, .svg or .pdf"
    parser.add_argument("--picture", metavar="FILE", help=picture)
    target = (
        "instead: here: check and time everything on the first device that is here, by a prepared list of under ten "
        "minutes; v5e:2x4, h100:8, ...: what the compilers of these make of the layer (--workloads of A, A64, B, C)"
    )
    parser.add_argument("--target", type=_words, metavar="T,...", help=target)
    parser.set_defaults(command=functools.partial(_bench, parser))


def _add_eplb(commands: argparse._SubParsersAction) -> None:
    text = "place experts on ranks by their loads, with replicas of the hot ones; say what it gains; needs no devices"
    parser = commands.add_parser("eplb", help=text, description=text, allow_abbrev=False)
    loads = "JSON list of loads, one per expert, or one such list per layer; or metrics.jsonl of a training run"
    parser.add_argument("loads", metavar="LOADS", help=loads)
    parser.add_argument("--ranks", type=int, required=True, metavar="R", help="expert-parallel ranks")
    parser.add_argument("--redundant", type=int, default=0, metavar="N", help="slots more than experts (default: 0)")
    parser.add_argument("--groups", type=int, default=1, metavar="G", help="groups of experts to keep on a node each")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the ranks")
    parser.add_argument("--steps", type=int, metavar="N", help="of metrics.jsonl, the last N steps (default: all)")
    out = "for placement.json, tables.json (what update_expert reads) and load.png (default: eplb)"
    parser.add_argument("--out", default="eplb", metavar="DIR", help=out)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=_eplb)


def _add_stragglers(commands: argparse._SubParsersAction) -> None:
    text = "time who waits for whom in the exchanges of a layer; say which rank, receiver or link is slow"
    parser = commands.add_parser("stragglers", help=text, description=text, allow_abbrev=False)
    layer = "TOML with [moe] and [model]: its layer, with the same load on every rank (default: a small one)"
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=layer)
    parser.add_argument("--steps", type=int, metavar="N", help="steps to time (default: 30)")
    parser.add_argument("--warm-up", type=int, default=2, metavar="N", help="first steps to leave out (default: 2)")
    least = "what a slow rank or link adds to a step at least (default: 0.5ms)"
    parser.add_argument("--at-least", default="0.5ms", metavar="TIME", help=least)
    inject = (
        "rehearse: compute:3=20ms, rank 3 is late to dispatch; receiver:3=20ms, sender:3=20ms, link:1-5=20ms, blocks "
        "to rank 3, of rank 3, from rank 1 to 5 are late, on both ways of a step; as often as there are faults"
    )
    parser.add_argument("--inject", action="append", default=[], metavar="FAULT", help=inject)
    parser.add_argument("--from", dest="given", metavar="FILE", help="read what --out wrote instead of measuring")
    parser.add_argument("--out", metavar="FILE", help="write the waits of all steps, as JSON")
    parser.add_argument("--picture", metavar="FILE", help="draw both parts of the waits: .png, .svg or .pdf")
    _add_distributed(parser)
    mesh = "axes ep and nodes: all devices are ranks (default: CONFIG's, or ep=8)"
    parser.add_argument("--mesh", metavar="ep=8", help=mesh)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(command=functools.partial(_stragglers, parser))


def _add_distributed(parser: argparse._ActionsContainer) -> None:
    distributed = (
        "this is one of several processes, started alike on all hosts; Slurm, Kubernetes and Cloud TPU tell which, "
        "elsewhere HOST:PORT of the first one, how many there are, and the number of this one do"
    )
    parser.add_argument("--distributed", nargs="?", const=True, default=False, metavar="H:P,N,I", help=distributed)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _add_mesh_and_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", metavar="ep=4,tp=2", help="axes ep, tp, nodes, dp; not named: 1")
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def _train(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    if arguments.processes is not None:
        from moe_jax.tools.train.launch import run_processes

        place = next(i for i, word in enumerate(arguments.argv) if word.startswith("--processes"))
        num_words = 1 if "=" in arguments.argv[place] else 2
        others = arguments.argv[:place] + arguments.argv[place + num_words :]
        return run_processes(others, arguments.processes)
    from moe_jax.host.extras import require

    require("flax", "training")  # which the modules of the next import cannot do without
    from moe_jax.tools.train.loop import train

    if arguments.seed is not None and config.train is not None:
        config = override(config, train={"seed": arguments.seed})
    return train(
        config,
        data=arguments.data,
        steps=arguments.steps,
        out=arguments.out,
        name=Path(arguments.config).stem,
        resume=arguments.resume,
        resume_from=arguments.resume_from,
        distributed=arguments.distributed,
        profile=arguments.profile,
        json_lines=arguments.json,
    )


def _verify(arguments: argparse.Namespace) -> int:
    mesh = None if arguments.mesh is None else parse_mesh(arguments.mesh)
    from moe_jax import verify

    return verify.run(mesh, arguments.backend, arguments.json)


def _plan(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.published:
        given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
        if others := sorted({*given} - {"published", "json", "command", "argv"}):
            other = "CONFIG" if others[0] == "config" else f"--{others[0].replace('_', '-')}"
            raise InvalidArgumentError(
                f"{other} does not go with --published, which has a list of its own; leave it out"
            )
        from moe_jax.tools import published

        return published.run(json_lines=arguments.json)
    if arguments.config is None:
        parser.error("the following arguments are required: CONFIG")
    config = load_config(arguments.config)
    from moe_jax.tools.planner import screen

    return screen.run(
        config,
        arguments.config,
        arguments.mesh,
        arguments.hardware,
        _terms(arguments),
        compiled=arguments.compile,
        describe=arguments.describe,
        picture=arguments.picture,
        json_lines=arguments.json,
    )


def _sweep(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config)
    from moe_jax.tools.planner import sweep

    return sweep.run(
        config,
        arguments.config,
        arguments.mesh,
        arguments.hardware,
        _terms(arguments),
        num_devices=arguments.devices,
        compiled=arguments.compile,
        run=arguments.run,
        top=arguments.top,
        out=arguments.out or str(Path("sweeps") / Path(arguments.config).stem),
        json_lines=arguments.json,
    )


def _terms(arguments: argparse.Namespace) -> "Terms":
    from moe_jax.tools.planner.question import Terms

    return Terms(
        tokens=arguments.tokens,
        dtype=arguments.dtype,
        quant=arguments.quant,
        combine_quant=arguments.combine_quant,
        backward_quant=arguments.backward_quant,
        layers=arguments.layers,
        optimizer=arguments.optimizer,
        remat=arguments.remat,
    )


def _eplb(arguments: argparse.Namespace) -> int:
    for option, value in (("--ranks", arguments.ranks), ("--groups", arguments.groups), ("--nodes", arguments.nodes)):
        check_count(option, value)
    check_count("--redundant", arguments.redundant, 0)
    if arguments.steps is not None:
        check_count("--steps", arguments.steps)
    from moe_jax.tools import eplb

    return eplb.run(
        arguments.loads,
        ranks=arguments.ranks,
        redundant=arguments.redundant,
        groups=arguments.groups,
        nodes=arguments.nodes,
        steps=arguments.steps,
        out=arguments.out,
        json_lines=arguments.json,
    )


def _stragglers(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.given is not None:
        _refuse(parser, arguments, "--from, which measures nothing", "config", "mesh", "steps", "inject", "distributed")
        _refuse(parser, arguments, "--from, which has the waits already", "out")
    config = None if arguments.config is None else _load(arguments)
    mesh = None if arguments.mesh is None else parse_mesh(arguments.mesh)
    from moe_jax.tools import stragglers

    return stragglers.run(
        config,
        path=arguments.config or "",
        mesh=mesh,
        steps=stragglers.STEPS if arguments.steps is None else arguments.steps,
        warm_up=arguments.warm_up,
        at_least=arguments.at_least,
        injected=arguments.inject,
        distributed=arguments.distributed,
        given=arguments.given,
        out=arguments.out,
        picture=arguments.picture,
        json_lines=arguments.json,
    )


def _bench(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.target == ["here"]:
        return _bench_here(parser, arguments)
    if arguments.target:
        return _bench_elsewhere(parser, arguments)
    config = None if arguments.config is None else _load(arguments)
    mesh = None if arguments.mesh is None else parse_mesh(arguments.mesh)
    from moe_jax.tools import bench

    return bench.run(
        config,
        path=arguments.config or "",
        mesh=mesh,
        workloads=arguments.workloads,
        dtypes=arguments.dtype,
        quants=arguments.quant,
        contenders=arguments.against,
        repeats=arguments.repeats,
        quick=arguments.quick,
        max_seconds=arguments.max_seconds,
        json_path=arguments.json,
        picture=arguments.picture,
    )


def _bench_here(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    unread = ("config", "mesh", "workloads", "dtype", "quant", "against", "repeats", "quick", "max_seconds", "picture")
    _refuse(parser, arguments, "--target here, whose list is prepared", *unread)
    from moe_jax.tools.bench import here

    return here.run(json_path=arguments.json)


def _bench_elsewhere(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    other = f"--target {','.join(arguments.target)}, whose list is prepared"
    _refuse(parser, arguments, other, "config", "mesh", "dtype", "quant", "repeats", "quick", "max_seconds", "picture")
    from moe_jax.tools.bench import facts

    contenders = arguments.against or ()
    return facts.run(arguments.target, workloads=arguments.workloads, contenders=contenders, json_path=arguments.json)


def _refuse(parser: argparse.ArgumentParser, arguments: argparse.Namespace, other: str, *unread: str) -> None:
    """Raises if one of the ``unread`` was given, which does not go with the ``other`` option."""
    for name in unread:
        if getattr(arguments, name) != parser.get_default(name):
            option = "CONFIG" if name == "config" else f"--{name.replace('_', '-')}"
            raise InvalidArgumentError(f"{option} does not go with {other}; leave it out")


def _load(arguments: argparse.Namespace) -> Config:
    """The configuration that the arguments name, on the mesh of --mesh if there is one."""
    config = load_config(arguments.config)
    return config if arguments.mesh is None else dataclasses.replace(config, mesh=parse_mesh(arguments.mesh))
