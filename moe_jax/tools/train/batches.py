"""The batches of a run: which windows of the corpus each one holds. Grain reads them ahead of the steps.

A batch is a pure function of (corpus, seed, step), and a process reads the rows that its own devices get. So batches
are the same on any number of processes, and a position in them is one number, which a checkpoint keeps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from moe_jax.host.extras import require
from moe_jax.tools.train.data import Corpus, Text

# A batch of bytes takes far less time to read than a step to compute, so that a few of them ahead are enough.
NUM_THREADS, NUM_AHEAD = 1, 4


@dataclass(frozen=True)
class TrainBatches:
    """The training batches of a run, a source of data as grain has it: batch `step` follows `step` finished steps.

    Attributes:
      corpus: the windows are drawn from its training bytes, uniformly and with replacement.
      seed: of the draw.
      num_batches: how many there are.
      batch_size: windows in a batch, over all processes.
      seq_len: a window has one byte more than this.
      rows: the numbers of the windows of a batch that this process reads, [R] i64.
    """

    corpus: Corpus
    seed: int
    num_batches: int
    batch_size: int
    seq_len: int
    rows: np.ndarray

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, step: int) -> np.ndarray:
        """The rows of batch `step` that this process reads: [R, seq_len + 1] i32."""
        rng = np.random.default_rng([self.seed, int(step)])
        starts = rng.integers(0, len(self.corpus.train) - self.seq_len, self.batch_size)
        return _windows(self.corpus.train, starts[self.rows], self.seq_len)


class Reader:
    """Goes through batches in their order, while a thread of grain reads ahead. Errors of that thread are raised here.

    Raises:
      UnsupportedError: grain is not installed.
    """

    def __init__(self, batches: TrainBatches) -> None:
        grain = require("grain", "reading the data")
        options = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=NUM_AHEAD)
        self._iterator = iter(grain.MapDataset.source(batches).to_iter_dataset(options))

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        return next(self._iterator)

    @property
    def position(self) -> Any:
        """Where the reader is, in a form for JSON: behind the batches that were taken, however many were read ahead."""
        return self._iterator.get_state()

    def seek(self, position: Any) -> None:
        """Goes to a place that `position` of this reader, or of another one over the same batches, has returned."""
        self._iterator.set_state(position)

    def close(self) -> None:
        self._iterator.close()


def eval_batch(
    corpus: Corpus, *, index: int, num_batches: int, batch_size: int, seq_len: int, rows: np.ndarray
) -> np.ndarray:
    """The `rows` of batch `index` of `num_batches`: windows evenly over the held-out bytes, [R, S + 1] i32."""
    starts = np.linspace(0, len(corpus.held_out) - seq_len - 1, num_batches * batch_size).astype(np.int64)
    return _windows(corpus.held_out, starts[index * batch_size + rows], seq_len)


def rows_here(sharding: jax.sharding.Sharding, shape: tuple[int, int]) -> np.ndarray:
    """The numbers of the rows that devices of this process get of an array of `shape`, in their order: [R] i64."""
    places = sharding.addressable_devices_indices_map(shape).values()
    rows = np.arange(shape[0])
    return np.unique(np.concatenate([rows[place[0]] for place in places if place is not None]))


def _windows(text: Text, starts: np.ndarray, seq_len: int) -> np.ndarray:
    content = b"".join(text.read(int(start), seq_len + 1) for start in starts)
    return np.frombuffer(content, np.uint8).reshape(len(starts), seq_len + 1).astype(np.int32)
