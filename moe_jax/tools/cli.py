"""The command line, `python -m moe_jax COMMAND ...`: the only place where a MoEError is caught.

Exit codes: 0 done, 1 a check failed (verify), 2 bad input with one sentence on standard error, 130 interrupted
(Ctrl-C); of a training run that saved and ended because it was asked to, 143 (SIGTERM) and 129 (SIGHUP); 141 nobody
reads any more.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moe_jax.config import DTYPES, Config, MeshConfig, ModelConfig, load_config, override, parse_mesh
from moe_jax.errors import ConfigError, InvalidArgumentError, MoEError, check_count

if TYPE_CHECKING:  # a command imports only what it needs, so that bad input is told at once
    from jax.sharding import AbstractMesh

    from moe_jax.plan import Plan

PLAN_TOKENS = 512  # tokens per device of a shape that has no [train] section
PLAN_DTYPE = "bfloat16"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise InvalidArgumentError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        arguments = _make_parser().parse_args(argv)
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
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_verify(commands)
    _add_plan(commands)
    _add_bench(commands)
    _add_eplb(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction) -> None:
    text = "train a byte-level decoder with Mixture-of-Experts layers, print its validation loss and a sample"
    parser = commands.add_parser("train", help=text, description=text, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="TOML with [moe], [model], [train]: configs/tiny.toml")
    parser.add_argument("--data", metavar="PATH", help="file or folder of text (default: Python's standard library)")
    parser.add_argument("--steps", type=int, metavar="N", help="stop after N steps; the learning-rate schedule stays")
    out = "for checkpoint.moe, metrics.jsonl and report.png (default: runs/CONFIG, runs/CONFIG-2, ...: the first empty)"
    parser.add_argument("--out", metavar="DIR", help=out)
    resume = "go on from the checkpoint in --out (default: the folder of CONFIG that was saved last)"
    parser.add_argument("--resume", action="store_true", help=resume)
    parser.add_argument("--seed", type=int, metavar="N", help="instead of train.seed")
    _add_mesh_and_json(parser)
    parser.set_defaults(command=_train)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    text = "check the operators against the float64 oracle on this machine's devices"
    parser = commands.add_parser("verify", help=text, description=text, allow_abbrev=False)
    parser.add_argument("--backend", default="auto", metavar="NAME", help="the back end to check (default: auto)")
    _add_mesh_and_json(parser)
    parser.set_defaults(command=_verify)


def _add_plan(commands: argparse._SubParsersAction) -> None:
    text = "print what a layer of CONFIG would do on its mesh: sizes, choices with reasons, bytes; needs no devices"
    parser = commands.add_parser("plan", help=text, description=text, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="TOML with [moe] and [model]: configs/deepseek_v3.toml")
    parser.add_argument(
        "--tokens-per-rank",
        type=int,
        metavar="N",
        help=f"tokens per device (default: batch_size * seq_len / devices, or {PLAN_TOKENS} without [train])",
    )
    parser.add_argument("--dtype", choices=DTYPES, help=f"of the rows (default: train.dtype, or {PLAN_DTYPE})")
    _add_mesh_and_json(parser)
    parser.set_defaults(command=_plan)


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
        "what to compare with: minimal, ragged_dot, one-hot capacity, all experts (default: these), or a transport"
    )
    parser.add_argument("--against", type=_words, metavar="A,...", help=against)
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds of timing (default: 7, or 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and W1, W3 and W4 only")
    slowest = "leave out what would need longer for a run (default: 60)"
    parser.add_argument("--max-seconds", type=float, default=60.0, metavar="S", help=slowest)
    parser.add_argument("--json", metavar="FILE", help="JSON lines with raw seconds; -: on standard output, no tables")
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


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _add_mesh_and_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", metavar="ep=4,tp=2", help="axes ep, tp, nodes, dp; not named: 1")
    parser.add_argument("--json", action="store_true", help="print JSON lines")


def _train(arguments: argparse.Namespace) -> int:
    from moe_jax.tools.train.loop import train

    config = _load(arguments)
    if arguments.seed is not None and config.train is not None:
        config = override(config, train={"seed": arguments.seed})
    return train(
        config,
        data=arguments.data,
        steps=arguments.steps,
        out=arguments.out,
        name=Path(arguments.config).stem,
        resume=arguments.resume,
        json_lines=arguments.json,
    )


def _verify(arguments: argparse.Namespace) -> int:
    mesh = None if arguments.mesh is None else parse_mesh(arguments.mesh)
    from moe_jax import verify

    return verify.run(mesh, arguments.backend, arguments.json)


def _plan(arguments: argparse.Namespace) -> int:
    config = _load(arguments)
    if config.model is None:
        raise ConfigError(f"{arguments.config}: has no [model] section; a plan needs model.hidden")
    plan = _make_plan(config, config.model, arguments.tokens_per_rank, arguments.dtype)
    experts = {"ffn": config.moe.ffn, "activation": config.moe.activation}
    if arguments.json:
        costs = {phase: dataclasses.asdict(cost) for phase, cost in plan.cost(**experts).items()}
        workspaces = {"workspace": plan.workspace(), "dispatch_workspace": plan.workspace("dispatch")}
        values = {**dataclasses.asdict(plan), **workspaces, "cost": costs}
        print(json.dumps({"event": "plan", **values}))
    else:
        print(plan.describe(**experts))
    return 0


def _eplb(arguments: argparse.Namespace) -> int:
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
    )


def _bench_here(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    _refuse(parser, arguments, "workloads", "dtype", "quant", "against", "repeats", "quick", "max_seconds")
    from moe_jax.tools.bench import here

    return here.run(json_path=arguments.json)


def _bench_elsewhere(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    _refuse(parser, arguments, "dtype", "quant", "repeats", "quick", "max_seconds")
    from moe_jax.tools.bench import facts

    contenders = arguments.against or ()
    return facts.run(arguments.target, workloads=arguments.workloads, contenders=contenders, json_path=arguments.json)


def _refuse(parser: argparse.ArgumentParser, arguments: argparse.Namespace, *unread: str) -> None:
    """Raises if an option was given that the list for a target does not read."""
    for name in ("config", "mesh", *unread):
        if getattr(arguments, name) != parser.get_default(name):
            option = "CONFIG" if name == "config" else f"--{name.replace('_', '-')}"
            target = ",".join(arguments.target)
            raise InvalidArgumentError(
                f"{option} does not go with --target {target}, whose list is prepared; leave it out"
            )


def _make_plan(config: Config, model: ModelConfig, tokens_per_rank: int | None, dtype: str | None) -> "Plan":
    """The plan of one layer on a mesh of which only the shape exists, so it may be larger than this machine."""
    from moe_jax.tools.train.model import make_layer_plan

    train, num_devices = config.train, config.mesh.num_devices
    if tokens_per_rank is None:
        tokens_per_rank = train.batch_size * model.seq_len // num_devices if train else PLAN_TOKENS
    dtype = dtype or (train.dtype if train else PLAN_DTYPE)
    return make_layer_plan(config, model, _abstract_mesh(config.mesh), tokens_per_rank=tokens_per_rank, dtype=dtype)


def _abstract_mesh(shape: MeshConfig) -> "AbstractMesh":
    """The axes that `make_mesh` would build, without devices."""
    from jax.sharding import AbstractMesh

    axes = {"dp": shape.dp, "node": shape.nodes, "ep": shape.ep // shape.nodes, "tp": shape.tp}
    kept = {name: size for name, size in axes.items() if size > 1 or name in ("ep", "tp")}
    return AbstractMesh(tuple(kept.values()), tuple(kept))


def _load(arguments: argparse.Namespace) -> Config:
    """The configuration that the arguments name, on the mesh of --mesh if there is one."""
    config = load_config(arguments.config)
    return config if arguments.mesh is None else dataclasses.replace(config, mesh=parse_mesh(arguments.mesh))
