"""The training job from start to end: data, model, steps, checkpoints, validation, sample and report."""

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import moe_jax as moe
from moe_jax.config import Config, ModelConfig, TrainConfig
from moe_jax.errors import CheckpointError, ConfigError, DataError, InvalidArgumentError
from moe_jax.host.extras import REMEDY
from moe_jax.mesh import ensure_devices
from moe_jax.tools.train import peers
from moe_jax.tools.train.balance import Balance, Places, find_better, first_places
from moe_jax.tools.train.batches import Reader, TrainBatches, eval_batch, rows_here
from moe_jax.tools.train.checkpoint import Checkpoints, Identity, identify, unfinished
from moe_jax.tools.train.data import Corpus, digest, load_corpus
from moe_jax.tools.train.events import PACKAGE, EventFile
from moe_jax.tools.train.folder import RunFolder, share_folder
from moe_jax.tools.train.interrupt import Interrupt, Stopped, catch_interrupt
from moe_jax.tools.train.model import Decoder, build_decoder, training_sections
from moe_jax.tools.train.peers import parse_place
from moe_jax.tools.train.profile import StepTrace, make_profile_folder
from moe_jax.tools.train.progress import Progress, Record, make_progress
from moe_jax.tools.train.report import MetricsFile, write_report
from moe_jax.tools.train.sample import printable, sample_text
from moe_jax.tools.train.step import StepMetrics, TrainState, compile_eval, compile_step, init_state, make_optimizer

PROMPT_BYTES = 16


@dataclass
class Job:
    """What a run is asked to do, where it leaves its work, and whom it tells about it. No field changes later.

    Attributes:
      config: the configuration.
      model, train: its sections [model] and [train].
      corpus: the bytes to train on, and those to validate on.
      num_steps: the step at which the run ends.
      resume: whether it goes on from a checkpoint.
      resume_from: the step of that checkpoint; None: the last one.
      profile: where to write the trace of some steps; None: nowhere.
      folder: where the run keeps its files.
      progress: what the person sees.
      interrupt: whether the run was asked to stop.
    """

    config: Config
    model: ModelConfig
    train: TrainConfig
    corpus: Corpus
    num_steps: int
    resume: bool
    resume_from: int | None
    profile: Path | None
    folder: RunFolder
    progress: Progress
    interrupt: Interrupt

    def check(self) -> None:
        """Raises Stopped if a process of the run was asked to stop."""
        (signum,) = peers.agree(self.interrupt.signum)
        if signum:
            self.interrupt.signum = signum  # it may have come to another process
            raise Stopped

    def tell(self, task: str, done: int = 0, total: int | None = None) -> None:
        """Says which task begins or how far it has come. Here is also where a run that was asked to stop does so."""
        self.check()
        self.interrupt.doing = task
        self.progress.task(task, done, total)


@dataclass
class Run:
    """A run in progress. Only `state`, `places` and the numbers of steps change.

    Attributes:
      job: what it is asked to do.
      decoder, optimizer: the model on its mesh, and what changes its parameters.
      checkpoints, identity: where states are saved, and what they belong to.
      metrics, events: the files that records go to.
      rows: which rows of every batch this process reads.
      reader: reads the batches ahead.
      state: the parameters and the state of the optimizer.
      places: where the experts lie in `state`.
      done_steps: how many steps were taken.
      begun_steps: the steps of the checkpoint that was begun last; 0: none was.
      saved_steps: the steps of the last checkpoint in the folder; 0: there is no checkpoint.
    """

    job: Job
    decoder: Decoder
    optimizer: Any
    checkpoints: Checkpoints
    identity: Identity
    metrics: MetricsFile
    events: EventFile
    rows: np.ndarray
    reader: Reader
    state: TrainState
    places: Places
    done_steps: int
    begun_steps: int
    saved_steps: int

    def batch(self, rows: np.ndarray) -> jax.Array:
        """Puts the rows of a batch that this process read on the mesh: [B, S + 1], spread over all devices."""
        shape = (self.job.train.batch_size, self.job.model.seq_len + 1)
        return jax.make_array_from_process_local_data(self.decoder.over_batch, rows, shape)

    def record(self, record: Record) -> None:
        """Adds a record to the metrics, and to what TensorBoard reads."""
        if peers.leads():
            self.metrics.append(record)
            self.events.append(record)

    def save(self) -> None:
        """Begins to save the state, if steps were taken since the last checkpoint, and returns while it is written."""
        if self.begun_steps == self.done_steps:
            return
        self.settle()
        self.job.interrupt.doing = "saving"
        position = self.reader.position
        self.checkpoints.save(self.state.parts, step=self.done_steps, identity=self.identity, position=position)
        self.begun_steps = self.done_steps

    def poll(self) -> None:
        """Says so if what was being saved has been written."""
        self._tell_saved(self.checkpoints.poll())

    def settle(self) -> None:
        """Waits until what is being saved has been written, and says so."""
        self._tell_saved(self.checkpoints.wait())

    def _tell_saved(self, step: int | None) -> None:
        if step is None:
            return
        self.saved_steps = step
        path = self.job.folder.checkpoints / str(step)
        self.job.progress.result("saved", f"saved {path} after step {step}", step=step, path=str(path))


def train(
    config: Config,
    *,
    data: str | Path | None = None,
    steps: int | None = None,
    out: str | Path | None = None,
    name: str = "train",
    resume: bool = False,
    resume_from: int | None = None,
    distributed: bool | str = False,
    profile: str | Path | None = None,
    json_lines: bool = False,
) -> int:
    """Trains, then prints the validation loss in nats per byte and a sample; returns the exit code.

    A checkpoint is saved at the end, every `config.train.save_seconds` and `save_every` steps, when the run is asked to
    stop, and when the data, the metrics or standard output fail; the last `config.train.keep_checkpoints` are kept.
    Steps go on while one is written. A run that is killed loses what came after the last one that was whole.

    Args:
      config: a configuration with the sections [model] and [train].
      data: a file or folder of text; None: the sources of Python's standard library.
      steps: stop after this many steps of the schedule; None: `config.train.steps`. The schedule itself does not
        change, so stopping early and resuming is the same as going through.
      out: folder for the checkpoints, the metrics and the report; None: see `name`.
      name: without `out`, a new run takes the first empty folder of `runs/NAME`, `runs/NAME-2`, ..., and a resumed run
        takes the one of these folders that was saved last.
      resume: go on from the last checkpoint in the folder, bit by bit as if the run had not stopped.
      resume_from: go on from the checkpoint of this step instead. Later ones are removed when the next one is saved.
      distributed: whether this is one of several processes that take the same arguments: True where Slurm, Kubernetes
        or Cloud TPU tell which, or "HOST:PORT,COUNT,INDEX" with the address at which process 0 listens. The first one
        alone prints, and writes the metrics and the picture; all must see the same files.
      profile: a folder for a trace of `jax.profiler` of three steps, the second to the fourth that are taken.
      json_lines: print JSON lines instead of text.

    Returns:
      0, or 128 and the number of the signal that stopped the run: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.

    Raises:
      ConfigError, DataError, CheckpointError, MeshError: each with one sentence for the person.
    """
    model, schedule = training_sections(config)
    if steps is not None and steps < 1:
        raise InvalidArgumentError(f"steps={steps} must be at least 1")
    num_steps = schedule.steps if steps is None else steps
    resume = resume or resume_from is not None
    place = parse_place(distributed) if isinstance(distributed, str) else None
    trace_folder = None if profile is None else make_profile_folder(profile)
    corpus = load_corpus(data, model.seq_len)
    if distributed:
        peers.join(place, num_devices=config.mesh.num_devices)
    with share_folder(out, name, resume=resume, step=resume_from) as folder:
        _check_apart(folder, data)
        progress = make_progress(json_lines=json_lines, log_every=schedule.log_every, num_steps=num_steps)
        with peers.notice_losses(), closing(progress), catch_interrupt(progress.note) as interrupt:
            wanted = (num_steps, resume, resume_from, trace_folder)
            job = Job(config, model, schedule, corpus, *wanted, folder, progress, interrupt)
            return _carry_out(job)


def _check_apart(folder: RunFolder, data: str | Path | None) -> None:
    """Raises DataError where the run would read what it writes."""
    if data is not None and folder.path.resolve().is_relative_to(Path(data).resolve()):
        raise DataError(
            f"{data}: holds {folder.path}, where the run writes, so it would read its own files; pass another --out"
        )


def _carry_out(job: Job) -> int:
    """Does all that a job asks for, and returns the exit code."""
    run = None
    try:
        run = _start(job)
        with closing(run.metrics), closing(run.events), closing(run.reader), closing(run.checkpoints):
            try:
                _take_steps(run)
                _finish(run)
            finally:
                # Or the run failed, and an error follows.
                if run.done_steps and run.saved_steps == run.done_steps and peers.leads():
                    job.progress.task("drawing the report")
                    job.progress.note(write_report(job.folder.report, run.metrics.records(), job.config))
    except Stopped:
        done_steps = run.done_steps if run else 0
        kept = f"{job.folder.checkpoints} holds all of it; {job.folder.how_to_resume}"
        sentence = (
            f"interrupted after step {done_steps}: {kept}" if done_steps else "interrupted before a step was taken"
        )
        job.progress.result("interrupted", sentence, step=done_steps)
        return job.interrupt.exit_code
    return 0


def _start(job: Job) -> Run:
    """Prepares a run: reads the data, makes or restores the state, and opens the metrics. No step is compiled yet."""
    config, corpus, folder = job.config, job.corpus, job.folder
    if folder.note:
        job.progress.note(folder.note)
    checkpoints = Checkpoints(folder.checkpoints, keep=job.train.keep_checkpoints)
    sha256 = digest(corpus, job.tell)
    job.tell("making the parameters")
    optimizer = make_optimizer(job.train)
    shape = config.mesh
    ensure_devices(shape.num_devices)
    mesh = moe.make_mesh(ep=shape.ep, tp=shape.tp, nodes=shape.nodes, dp=shape.dp)
    decoder = build_decoder(config, mesh)
    state, done_steps = init_state(decoder, optimizer, job.train.seed, config), 0
    num_bytes = len(corpus.train) + len(corpus.held_out)
    identity = identify(config, f"{num_bytes} bytes with SHA-256 {sha256}")
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    job.progress.note(
        f"{num_params:,} parameters, {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.held_out):,} held out, {mesh.size} devices"
    )
    if corpus.left_out:
        named = ", ".join(corpus.left_out[:3]) + (", ..." if len(corpus.left_out) > 3 else "")
        job.progress.note(f"left out of the data (hidden, cached, linked folders, no files): {named}")
    rows = rows_here(decoder.over_batch, (job.train.batch_size, job.model.seq_len + 1))
    reader = Reader(TrainBatches(corpus, job.train.seed, job.num_steps, job.train.batch_size, job.model.seq_len, rows))
    if job.resume:
        for path in unfinished(folder.checkpoints):
            job.progress.note(f"{path}: was being written when the run ended, and is left out")
        restored = checkpoints.restore(state.parts, identity=identity, step=job.resume_from)
        state, done_steps = TrainState(**restored.state), restored.step
        reader.seek(restored.position)
        job.progress.note(f"resuming {folder.path} after step {done_steps}")
    else:
        seconds = job.train.save_seconds
        often = f" every {seconds:g} s and" if seconds < math.inf else ""
        job.progress.note(f"the run is kept in {folder.path}: a checkpoint{often} at the end, metrics and a picture")
    metrics = MetricsFile(folder.metrics, done_steps=done_steps)
    events = EventFile(folder.path, done_steps=done_steps)
    if events.missing:
        job.progress.note(f"{PACKAGE} is not installed, so there will be nothing for TensorBoard; {REMEDY}")
    if config.balance is not None and state.balance is not None:
        places = state.balance.places(decoder.plan, config.balance.mode)
    else:
        places = first_places(config, job.model.layers)
    return Run(
        job,
        decoder,
        optimizer,
        checkpoints,
        identity,
        metrics,
        events,
        rows,
        reader,
        state,
        places,
        done_steps,
        begun_steps=done_steps,
        saved_steps=done_steps,
    )


def _take_steps(run: Run) -> None:
    """Trains up to `num_steps` and saves. If the run is asked to stop earlier, saves too and raises Stopped."""
    job = run.job
    if run.done_steps >= job.num_steps:
        job.progress.note(f"the checkpoint has {run.done_steps} steps already; nothing is left to train")
        return
    job.tell("compiling the step")
    begin = time.perf_counter()
    step = compile_step(run.decoder, run.optimizer, job.config, run.state)
    job.progress.note(f"compiled the step in {time.perf_counter() - begin:.1f} s")
    folder = job.profile if peers.leads() else None
    try:
        with closing(StepTrace(folder, job.num_steps - run.done_steps, job.progress.note)) as trace:
            _step_until(run, step, trace)
    except CheckpointError:
        raise
    except OSError:
        # Reading the data, or writing the metrics or standard output, failed. The parameters are whole: save them. To
        # save takes all processes, and the others do not know of this one's failure.
        if peers.alone():
            run.save()
            run.settle()
        raise
    run.save()
    run.settle()
    job.check()


def _step_until(run: Run, step: Callable, trace: StepTrace) -> None:
    """Takes steps until there are `num_steps` or the run is asked to stop, and saves whenever a checkpoint is due."""
    train = run.job.train
    saved_at = time.monotonic()
    (stop,) = peers.agree(run.job.interrupt.signum)
    while run.done_steps < run.job.num_steps and not stop:
        _rebalance(run)
        run.job.interrupt.doing = f"taking step {run.done_steps + 1}"
        with trace.step(run.done_steps + 1):
            record = _one_step(run, step)
        run.record(record)
        run.job.progress.step(record)
        run.poll()
        by_steps = train.save_every and run.done_steps % train.save_every == 0
        by_time = time.monotonic() - saved_at >= train.save_seconds
        stop, due = peers.agree(run.job.interrupt.signum, by_steps or by_time)
        if due:
            run.save()
            saved_at = time.monotonic()


def _rebalance(run: Run) -> None:
    """Before a step, if one is due: moves experts to where their load is more even, if that gains enough.

    It follows from the state and the number of steps alone, so a run that goes on from a checkpoint does the same.
    """
    config, balance = run.job.config.balance, run.state.balance
    if config is None or balance is None or not run.done_steps or run.done_steps % config.every:
        return
    run.job.interrupt.doing = "rebalancing"
    now, load = run.places, np.asarray(jax.device_get(balance.load))
    better = find_better(run.job.config, config, load, now) if peers.leads() else None
    places = now if better is None else better.places
    experts, shares = peers.share(places.placement.physical_to_logical), peers.share(places.shares)
    places = Places(replace(now.placement, physical_to_logical=experts), shares)
    trained = {"params": run.state.params, "opt_state": run.state.opt_state}
    if places.placement != now.placement:
        trained = moe.migrate(trained, now.placement, places.placement, run.decoder.mesh, donate=True)
    run.state = TrainState(**trained, balance=Balance.of(places, balance.load, run.decoder.replicated))
    run.places = places
    if better is not None and better.num_moved:
        values = {"before": better.before, "after": better.after, "moved_slots": better.num_moved}
        sentence = f"rebalanced after step {run.done_steps}: {better.sentence}"
        run.job.progress.result("rebalanced", sentence, step=run.done_steps, **values)
        # Of the step that begins, so that a run that goes on from here, and does the same, writes it once.
        run.record({"step": run.done_steps + 1, **{f"rebalanced_{name}": value for name, value in values.items()}})


def _one_step(run: Run, step: Callable) -> Record:
    """Takes one step and waits for its end, because queued steps can starve emulated devices of threads."""
    config, seq_len = run.job.train, run.job.model.seq_len
    begin = time.perf_counter()
    run.state, metrics = step(run.state, run.batch(next(run.reader)))
    metrics = jax.device_get(metrics)
    run.done_steps += 1
    if not math.isfinite(metrics.loss):
        run.settle()
        kept = f"; the checkpoint of step {run.saved_steps} is kept" if run.saved_steps else ""
        raise ConfigError(
            f"the loss became {metrics.loss} at step {run.done_steps}; "
            f"lower train.learning_rate={config.learning_rate} or train.grad_clip={config.grad_clip}{kept}"
        )
    num_tokens = config.batch_size * seq_len
    seconds = time.perf_counter() - begin
    return make_record(metrics, run.places, step=run.done_steps, tokens_per_s=num_tokens / seconds)


def make_record(metrics: StepMetrics, places: Places, *, step: int, tokens_per_s: float) -> Record:
    """The numbers of one step, taken with the experts in `places`, as plain Python values, ready for JSON."""
    stats, num_experts = metrics.stats, places.placement.num_logical_experts
    load, weightless = np.split(np.asarray(stats.load), [num_experts], axis=1)  # of both kinds of experts
    of_sequences = stats.sequence_balance
    return {
        "step": step,
        "loss": float(metrics.loss),
        "grad_norm": float(metrics.grad_norm),
        "balance": float(stats.balance),
        "z": float(stats.z),
        **({} if of_sequences is None else {"sequence_balance": float(of_sequences)}),
        "tokens_per_s": tokens_per_s,
        "imbalance": float(np.max(load.max(axis=-1) / np.maximum(load.mean(axis=-1), 1e-9))),
        "rank_imbalance": float(places.imbalance(load).mean()),
        "dropped": int(stats.num_dropped),
        "rounds": int(stats.num_rounds),
        **({"weightless": float(weightless.sum() / (load.sum() + weightless.sum()))} if weightless.size else {}),
        "load": load.tolist(),
    }


def _finish(run: Run) -> None:
    """Computes the validation loss and a sample of text, tells both, and writes both to the metrics."""
    loss = _validate(run)
    run.job.progress.result("validation", f"validation loss {loss:.3f}", loss=loss)
    run.record({"step": run.done_steps, "validation_loss": loss})
    config = run.job.train
    if config.sample_bytes:
        run.job.tell("compiling the sampler")
        text = sample_text(
            run.decoder,
            run.state,
            run.job.corpus.held_out.read(0, PROMPT_BYTES),
            num_bytes=config.sample_bytes,
            batch_size=config.batch_size,
            seed=config.seed,
            tell=run.job.tell,
        )
        run.job.progress.result("sample", f"sample:\n{printable(text)}", text=text)
        run.record({"step": run.done_steps, "sample": text})


def _validate(run: Run) -> float:
    """Mean cross-entropy over the held-out windows, in nats per byte."""
    job = run.job
    config = job.train
    job.tell("compiling the validation")
    evaluate = compile_eval(run.decoder, job.config, run.state)
    losses = []
    for index in range(config.eval_batches):
        job.tell("validating", index, config.eval_batches)
        batch = eval_batch(
            job.corpus,
            index=index,
            num_batches=config.eval_batches,
            batch_size=config.batch_size,
            seq_len=job.model.seq_len,
            rows=run.rows,
        )
        losses.append(float(evaluate(run.state.params, run.state.balance, run.batch(batch))))
    return float(np.mean(losses))
