"""The training job from start to end: data, model, steps, checkpoints, validation, sample and report."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import moe_jax as moe
from moe_jax.config import Config
from moe_jax.errors import ConfigError, DataError, InvalidArgumentError
from moe_jax.mesh import ensure_devices
from moe_jax.train import checkpoint
from moe_jax.train.data import Corpus, eval_batch, load_corpus, train_batch
from moe_jax.train.interrupt import Interrupt, catch_interrupt
from moe_jax.train.model import Decoder, build_decoder
from moe_jax.train.progress import Progress, Record, make_progress
from moe_jax.train.report import MetricsFile, write_report
from moe_jax.train.sample import printable, sample_text
from moe_jax.train.step import StepMetrics, TrainState, compile_eval, compile_step, init_state, make_optimizer

CHECKPOINT = "checkpoint.moe"
METRICS = "metrics.jsonl"
REPORT = "report.png"
PROMPT_BYTES = 16
INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended


@dataclass
class Run:
    """A run in progress; `state` and `done_steps` move, the rest is fixed."""

    config: Config
    corpus: Corpus
    decoder: Decoder
    optimizer: Any
    identity: checkpoint.RunIdentity
    progress: Progress
    out: Path | None
    num_steps: int
    state: TrainState
    done_steps: int

    def batch(self, array: np.ndarray) -> jax.Array:
        """A host batch [B, S + 1] on the mesh, spread over all devices."""
        return jax.device_put(array, self.decoder.over_batch)

    def save(self) -> None:
        path = self.out / CHECKPOINT
        checkpoint.save(path, self.state, step=self.done_steps, identity=self.identity)


def train(
    config: Config,
    *,
    data: str | Path | None = None,
    steps: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    json_lines: bool = False,
) -> int:
    """Trains, then prints the validation loss in nats per byte and a sample; returns the exit code.

    Args:
      config: with [model] and [train].
      data: a file or folder of text; None: the sources of Python's standard library.
      steps: stop after this many steps of the schedule; None: `config.train.steps`. The schedule itself does not
        change, so stopping early and resuming is the same as going through.
      out: folder for the checkpoint, the metrics and the report; None: nothing is written.
      resume: go on from the checkpoint in `out`, bit by bit as if the run had not stopped.
      json_lines: print JSON lines instead of text.

    Returns:
      0, or 130 if Ctrl-C stopped the run (after saving a checkpoint when there is `out`).

    Raises:
      ConfigError, DataError, CheckpointError, MeshError: each with one sentence for the person.
    """
    num_steps = _check_request(config, steps, out, resume)
    corpus = load_corpus(data, config.model.seq_len)
    folder = _make_folder(out)
    progress = make_progress(json_lines=json_lines, log_every=config.train.log_every, num_steps=num_steps)
    try:
        run = _start(config, corpus, folder, progress, num_steps=num_steps, resume=resume)
        if not _take_steps(run):
            return INTERRUPTED
        _finish(run)
    finally:
        progress.close()
    return 0


def _check_request(config: Config, steps: int | None, out: str | Path | None, resume: bool) -> int:
    """The number of steps to take."""
    if config.train is None:
        raise ConfigError("the configuration has no [train] section; it describes a shape: use the plan command")
    if steps is not None and steps < 1:
        raise InvalidArgumentError(f"steps={steps} must be at least 1")
    if resume and out is None:
        raise InvalidArgumentError("resume needs the folder of the run to resume; pass --out DIR")
    return config.train.steps if steps is None else steps


def _make_folder(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror}); pass --out a folder you may write") from None
    return folder


def _start(
    config: Config, corpus: Corpus, out: Path | None, progress: Progress, *, num_steps: int, resume: bool
) -> Run:
    optimizer = make_optimizer(config.train)
    shape = config.mesh
    ensure_devices(shape.num_devices)
    mesh = moe.make_mesh(ep=shape.ep, tp=shape.tp, nodes=shape.nodes, dp=shape.dp)
    decoder = build_decoder(config, mesh)
    state, done_steps = init_state(decoder, optimizer, config.train.seed), 0
    identity = checkpoint.identify(config, corpus.digest)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    progress.note(f"{num_params:,} parameters, {len(corpus.train):,} bytes to train on, {mesh.size} devices")
    if resume:
        state, done_steps = checkpoint.restore(out / CHECKPOINT, state, identity=identity)
        progress.note(f"resuming after step {done_steps}")
    elif out is not None and (out / CHECKPOINT).exists():
        progress.note(f"{out / CHECKPOINT} will be replaced: this run starts afresh (--resume would continue it)")
    return Run(config, corpus, decoder, optimizer, identity, progress, out, num_steps, state, done_steps)


def _take_steps(run: Run) -> bool:
    """Trains up to `num_steps`; False if Ctrl-C came first. In both cases the state is saved where there is `out`."""
    if run.done_steps >= run.num_steps:
        run.progress.note(f"the checkpoint has {run.done_steps} steps already; nothing is left to train")
        return True
    metrics = MetricsFile(run.out / METRICS, done_steps=run.done_steps) if run.out else None
    try:
        with catch_interrupt() as interrupt:
            _step_until(run, interrupt, metrics)
        if run.out:
            run.save()
            run.progress.note(write_report(run.out / REPORT, metrics.records()))
    finally:
        if metrics:
            metrics.close()
    if interrupt.requested:
        kept = f"saved {run.out / CHECKPOINT}; go on with --resume" if run.out else "nothing was saved (no --out)"
        run.progress.result("interrupted", f"interrupted after step {run.done_steps}: {kept}", step=run.done_steps)
    return not interrupt.requested


def _step_until(run: Run, interrupt: Interrupt, metrics: MetricsFile | None) -> None:
    """Steps until `num_steps` or an interrupt."""
    begin = time.perf_counter()
    step = compile_step(run.decoder, run.optimizer, run.config, run.state)
    run.progress.note(f"compiled the step in {time.perf_counter() - begin:.1f} s")
    while run.done_steps < run.num_steps and not interrupt.requested:
        record = _one_step(run, step)
        run.progress.step(record)
        if metrics:
            metrics.append(record)
        save_every = run.config.train.save_every
        if run.out and save_every and run.done_steps % save_every == 0 and run.done_steps < run.num_steps:
            run.save()


def _one_step(run: Run, step: Callable) -> Record:
    """Takes one step and waits for it: steps queued behind one another can starve emulated devices of threads."""
    config = run.config.train
    begin = time.perf_counter()
    seq_len = run.config.model.seq_len
    host_batch = train_batch(
        run.corpus, seed=config.seed, step=run.done_steps, batch_size=config.batch_size, seq_len=seq_len
    )
    run.state, metrics = step(run.state, run.batch(host_batch))
    metrics = jax.device_get(metrics)
    run.done_steps += 1
    if not math.isfinite(metrics.loss):
        raise ConfigError(
            f"the loss became {metrics.loss} at step {run.done_steps}; "
            f"lower train.learning_rate={config.learning_rate} or train.grad_clip={config.grad_clip}"
        )
    num_tokens = config.batch_size * seq_len
    return make_record(metrics, step=run.done_steps, tokens_per_s=num_tokens / (time.perf_counter() - begin))


def make_record(metrics: StepMetrics, *, step: int, tokens_per_s: float) -> Record:
    """The numbers of one step as plain Python values, ready for JSON."""
    stats = metrics.stats
    return {
        "step": step,
        "loss": float(metrics.loss),
        "grad_norm": float(metrics.grad_norm),
        "balance": float(stats.balance),
        "z": float(stats.z),
        "tokens_per_s": tokens_per_s,
        "imbalance": float(np.max(stats.load.max(axis=-1) / np.maximum(stats.load.mean(axis=-1), 1e-9))),
        "dropped": int(stats.num_dropped),
        "rounds": int(stats.num_rounds),
        "load": stats.load.tolist(),
    }


def _finish(run: Run) -> None:
    """Validation loss and sample."""
    loss = _validate(run)
    run.progress.result("validation", f"validation loss {loss:.3f}", loss=loss)
    config = run.config.train
    if config.sample_bytes:
        prompt = run.corpus.held_out[:PROMPT_BYTES].tobytes()
        text = sample_text(
            run.decoder,
            run.state.params,
            prompt,
            num_bytes=config.sample_bytes,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        run.progress.result("sample", f"sample:\n{printable(text)}", text=text)


def _validate(run: Run) -> float:
    """Mean cross-entropy over the held-out windows, in nats per byte."""
    config = run.config.train
    evaluate = compile_eval(run.decoder, run.config, run.state.params)
    shape = {"batch_size": config.batch_size, "seq_len": run.config.model.seq_len}
    losses = [
        evaluate(run.state.params, run.batch(eval_batch(run.corpus, index=i, num_batches=config.eval_batches, **shape)))
        for i in range(config.eval_batches)
    ]
    return float(np.mean(jax.device_get(losses)))
