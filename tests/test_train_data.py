"""The data of the training job: what is read, what is left out, what is refused, and the batch of every step."""

import contextlib
import json
import os
import sys

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.errors import DataError, UnsupportedError
from moe_jax.tools.train import batches, data

SHAPE = {"batch_size": 4, "seq_len": 16}


def write_files(folder, num_files, size=400):
    """Files of `size` bytes; each holds its own byte value only, so a window tells which file it came from."""
    for i in range(num_files):
        (folder / f"{i:03d}.txt").write_bytes(bytes([i]) * size)


def eval_batch(corpus, **options):
    return batches.eval_batch(corpus, rows=np.arange(4), **options, **SHAPE)


def content(text):
    return text.read(0, len(text))


def read_all(corpus):
    return data.digest(corpus, lambda task, done, total: None)


def test_standard_library_is_the_default():
    corpus = data.load_corpus(None, 128)
    share = len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out))
    assert len(corpus.train) > 1_000_000 and 0.04 < share <= 0.05
    assert b"import " in content(corpus.train) and b"import " in content(corpus.held_out)
    assert not corpus.left_out  # the standard corpus is what it is; nobody asked for the rest of that folder


def test_whole_files_are_held_out(tmp_path):
    write_files(tmp_path, 60)
    corpus = data.load_corpus(tmp_path, 16)
    trained, held_out = set(content(corpus.train)), set(content(corpus.held_out))
    assert len(held_out) == 3 and trained | held_out == set(range(60)) and not trained & held_out
    assert list(content(corpus.train)) == sorted(content(corpus.train))  # the files come in the order of their names


def test_tail_of_a_single_file_is_held_out(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)) * 10)
    corpus = data.load_corpus(path, 16)
    assert content(corpus.train) + content(corpus.held_out) == path.read_bytes()
    assert len(corpus.held_out) == 100


def test_what_is_left_out_is_named(tmp_path):
    """A pipe that nobody writes to would be read for ever; a link to a folder may lead in circles."""
    write_files(tmp_path, 3)
    (tmp_path / ".hidden").write_bytes(b"\xff" * 400)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_bytes(b"\xfe" * 400)
    (tmp_path / "circle").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    corpus = data.load_corpus(tmp_path, 16)
    assert len(corpus.train) + len(corpus.held_out) == 1200
    assert set(content(corpus.train)) == {0, 1, 2}
    assert corpus.left_out == (".git", ".hidden", "circle", "pipe")


def test_any_window_of_any_files(tmp_path):
    """Every slice of the text is that slice of the joined files, however many files it spans, empty ones included."""
    parts = [b"abc", b"", b"d", b"efghi", b"", b"j" * 7]
    for number, part in enumerate(parts):
        (tmp_path / str(number)).write_bytes(part)
    text = data.Text(tuple(data.Span(str(tmp_path / str(n)), 0, len(part)) for n, part in enumerate(parts)))
    joined = b"".join(parts)
    assert len(text) == len(joined)
    for start in range(len(joined) + 1):
        for stop in range(start, len(joined) + 1):
            assert text.read(start, stop - start) == joined[start:stop]


def test_more_data_than_memory(tmp_path):
    """A file of 1 TiB, all of it a hole but for a few bytes at its end, is used up to its end."""
    path = tmp_path / "text"
    with path.open("wb") as file:
        file.truncate(2**40 - 17)
        file.seek(0, os.SEEK_END)
        file.write(b"the last 17 bytes")
    corpus = data.load_corpus(path, 16)
    assert len(corpus.train) + len(corpus.held_out) == 2**40
    last = eval_batch(corpus, index=3, num_batches=4)[-1]
    assert bytes(last.tolist()) == b"the last 17 bytes"
    with contextlib.closing(reader(corpus)) as read:
        assert next(read).shape == (4, 17)


def test_digest_follows_content_and_says_how_far_it_is(tmp_path, monkeypatch):
    write_files(tmp_path, 4)
    before = read_all(data.load_corpus(tmp_path, 16))
    monkeypatch.setattr(data, "BLOCK", 300)
    told = []
    assert data.digest(data.load_corpus(tmp_path, 16), lambda *values: told.append(values)) == before
    assert len(told) == 6  # after all blocks but the last one: 300 five times, 20 and 80
    (tmp_path / "001.txt").write_bytes(b"\x07" * 400)
    assert read_all(data.load_corpus(tmp_path, 16)) != before


def reader(corpus, *, seed=3, num_batches=9, rows=range(4)):
    return batches.Reader(batches.TrainBatches(corpus, seed, num_batches, rows=np.array(rows), **SHAPE))


@pytest.fixture
def noise(tmp_path):
    (tmp_path / "text").write_bytes(np.random.default_rng(0).bytes(5000))
    return data.load_corpus(tmp_path, 16)


def test_batches_are_a_function_of_seed_and_step(noise):
    found = list(reader(noise))
    assert len(found) == 9 and all(batch.shape == (4, 17) and batch.dtype == np.int32 for batch in found)
    np.testing.assert_array_equal(found, list(reader(noise)))
    every = {batch.tobytes() for batch in found + list(reader(noise, seed=4))}
    assert len(every) == 18
    for row in np.concatenate(found):
        assert row.astype(np.uint8).tobytes() in content(noise.train)


def test_a_position_says_how_many_batches_were_taken(noise):
    """Grain reads ahead; a reader that goes on from the position of another one misses nothing and repeats nothing."""
    through = list(reader(noise))
    with contextlib.closing(reader(noise)) as stopped:
        for number in range(4):
            np.testing.assert_array_equal(next(stopped), through[number])
        position = json.loads(json.dumps(stopped.position))
    with contextlib.closing(reader(noise, num_batches=7)) as resumed:
        resumed.seek(position)
        np.testing.assert_array_equal(list(resumed), through[4:7])


def test_processes_read_the_rows_of_one_batch(noise):
    """Whatever the number of processes, their rows together are the batch that one process would read."""
    mesh = moe_jax.make_mesh(ep=4, tp=2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    np.testing.assert_array_equal(batches.rows_here(sharding, (16, 17)), np.arange(16))
    whole = list(reader(noise))
    for parts in ([[0, 1], [2, 3]], [[1, 3], [0], [2]]):
        for rows in parts:
            np.testing.assert_array_equal(list(reader(noise, rows=rows)), [batch[rows] for batch in whole])
            options = {"index": 1, "num_batches": 3, **SHAPE}
            full = batches.eval_batch(noise, rows=np.arange(4), **options)
            np.testing.assert_array_equal(batches.eval_batch(noise, rows=np.array(rows), **options), full[rows])


def test_missing_grain_is_said(noise, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UnsupportedError, match=r"reading the data needs grain.*pip install 'moe_jax\[train\]'"):
        reader(noise)


def test_eval_windows_span_the_held_out_bytes(tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 20)
    corpus = data.load_corpus(tmp_path, 16)
    found = [eval_batch(corpus, index=i, num_batches=3) for i in range(3)]
    assert found[0][0].tolist() == list(content(corpus.held_out)[:17])
    assert found[-1][-1].tolist() == list(content(corpus.held_out)[-17:])


def test_smallest_corpus(tmp_path):
    (tmp_path / "text").write_bytes(b"x" * 340)  # 17 bytes held out: exactly one window
    corpus = data.load_corpus(tmp_path, 16)
    assert eval_batch(corpus, index=0, num_batches=1).shape == (4, 17)
    (tmp_path / "text").write_bytes(b"x" * 339)
    with pytest.raises(DataError, match="has 339 bytes, its held-out part has 16 bytes and one window needs 17"):
        data.load_corpus(tmp_path, 16)


def test_bad_data(tmp_path):
    def refused(path, words):
        with pytest.raises(DataError, match=f"{path}: {words}"):
            data.load_corpus(path, 16)

    refused(tmp_path / "absent", "there is no such file or folder")
    refused(tmp_path, "holds no files")
    refused("/dev/null", "is a character device; give --data a file or folder")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is a pipe")
    refused(tmp_path, "holds no files to train on .only 'pipe' and the like")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "is empty")
    refused(tmp_path / "empty" / "inside", "cannot be read .Not a directory")
    (tmp_path / "void").touch()
    refused(tmp_path, "all 2 files in it are empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    with pytest.raises(DataError, match="dangling: cannot be read"):
        data.load_corpus(tmp_path, 16)


def test_data_that_shrinks_during_a_run(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"x" * 4000)
    corpus = data.load_corpus(path, 16)
    path.write_bytes(b"x" * 30)
    with pytest.raises(DataError, match="text: became shorter during the run"):
        content(corpus.train)
    with pytest.raises(DataError, match="text: became shorter during the run"):
        next(reader(corpus))
    path.unlink()
    with pytest.raises(DataError, match="text: cannot be read"):
        content(corpus.train)
