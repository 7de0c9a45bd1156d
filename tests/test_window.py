"""The receive window: reset, stale sources, and the reachability matrix, against loops over ranks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import over_ep
from jax.sharding import PartitionSpec as P

import moe_jax
from moe_jax import _compat, errors
from moe_jax.recovery.window import (
    Window,
    buffer_reset,
    fresh_sources,
    make_window,
    receivable_info_collect,
    receivable_test,
)

W, R, V = 8, 3, 5
FAR = 120_000_000  # microseconds, longer than any test


def everywhere(value):
    """The same value for every rank."""
    return np.tile(value, (W, *[1] * np.ndim(value)))


def full_windows(rng, dtype=np.float32):
    """A used window on every rank, no entry of it zero."""
    draw = functools.partial(rng.integers, 1, 100)
    data = np.asarray(draw((W, W * R, V)), dtype)
    if jnp.issubdtype(dtype, jnp.floating):  # NaNs with payload
        data.view(np.uint8)[:, 0] = 255
        data.view(np.uint8)[:, 0, ::2] = 129
    return Window(
        data=jnp.asarray(data),
        counts=jnp.asarray(draw((W, W)), jnp.int32),
        step=jnp.asarray(draw((W, 1)), jnp.int32),
    )


def test_make_window():
    window = make_window(6, 4, jnp.bfloat16, 3)
    shapes = [(leaf.shape, leaf.dtype.name, np.any(leaf)) for leaf in (window.data, window.counts, window.step)]
    assert shapes == [((6, 4), "bfloat16", False), ((3,), "int32", False), ((1,), "int32", False)]
    for sizes in ((-1, 4, 3), (6, 0, 3), (6, 4, 0), (6.0, 4, 3)):
        with pytest.raises(errors.InvalidArgumentError):
            make_window(sizes[0], sizes[1], jnp.float32, sizes[2])


@pytest.mark.quick("float32-options0", "bfloat16-options1", "int8-options2")
@pytest.mark.parametrize("options", [dict(sync=True), dict(sync=False), dict(sync=True, timeout_us=FAR)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_reset_clears_the_linked_and_leaves_the_isolated(dtype, options):
    rng = np.random.default_rng(0)
    reset = jax.jit(over_ep(lambda window, mask: buffer_reset(window, mask, "ep", **options)))
    for mask in (np.ones(W, bool), np.arange(W) % 3 != 1, np.zeros(W, bool)):
        windows = full_windows(rng, dtype)
        for kind in (bool, np.int32):
            got = reset(windows, everywhere(mask.astype(kind)))
            leaves = jax.tree.leaves(jax.device_get((windows, got)))  # indexing sharded arrays changes NaNs
            for old, new in zip(leaves[:3], leaves[3:], strict=True):
                assert new.dtype == old.dtype
                for rank in range(W):
                    kept = np.zeros_like(old[rank]) if mask[rank] else old[rank]
                    assert new[rank].tobytes() == kept.tobytes()
    assert reset._cache_size() == 2  # one for each kind: the mask is data


def test_reset_waits_only_when_asked():
    windows, mask = full_windows(np.random.default_rng(1)), everywhere(np.ones(W, np.int32))
    for sync in (True, False):
        reset = functools.partial(buffer_reset, axis_name=("node", "ep"), sync=sync)
        text = jax.jit(over_ep(reset, moe_jax.make_mesh(ep=W, nodes=2))).lower(windows, mask).compile().as_text()
        assert ("all-reduce(" in text) == sync


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reset_reuses_donated_memory(dtype):
    windows, mask = full_windows(np.random.default_rng(2), dtype), everywhere(np.ones(W, np.int32))
    sharding = jax.NamedSharding(moe_jax.make_mesh(ep=W), P("ep"))
    windows = jax.device_put(windows, sharding)
    reset = jax.jit(over_ep(lambda window, mask: buffer_reset(window, mask, "ep")), donate_argnums=0)
    per_rank = sum(leaf.nbytes for leaf in jax.tree.leaves(windows)) // W
    analysis = reset.lower(windows, jax.device_put(mask, sharding)).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == per_rank
    got = reset(windows, mask)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(windows))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("nodes,axes", [(1, "ep"), (2, ("node", "ep"))])
def test_fresh_sources(nodes, axes):
    steps = np.array([4, 4, 5, 4, 0, 4, 5, -4], np.int32)[:, None]
    got = jax.jit(over_ep(lambda step: fresh_sources(step, axes), moe_jax.make_mesh(ep=W, nodes=nodes)))(steps)
    for me in range(W):
        assert got[me].tolist() == [bool(steps[peer, 0] == steps[me, 0]) for peer in range(W)]


# --- who hears whom ---------------------------------------------------------------------------------------------------


def probe_links(pattern, servers, per_server, axes="ep", nodes=1):
    """The whole probe as one program: a test towards each of ``servers``, then the matrix of every rank."""

    def shard(link_up, pattern):
        links = {"axis_name": axes, "link_up": link_up}
        window = make_window(W * R, V, pattern.dtype, W)
        window = _compat.as_varying(window, axes if isinstance(axes, tuple) else (axes,))
        for server in servers:
            dst_ranks = jnp.arange(server * per_server, (server + 1) * per_server, dtype=jnp.int32)
            window = receivable_test(window, pattern, dst_ranks, ranks_per_server=per_server, **links)
        return window, receivable_info_collect(window, everyone, **links)

    everyone = pattern
    return jax.jit(over_ep(shard, moe_jax.make_mesh(ep=W, nodes=nodes)))


def expected_matrices(hears, tested, healthy):
    """[W, W, W] what each rank gets to know; ``hears[i, j]``: what rank j sends reaches rank i."""
    matrices = np.zeros((W, W, W), int)
    for me in range(W):
        for i in range(W):
            for j in range(W):
                if hears[me, i] and hears[i, j] and tested[i] and healthy[j]:
                    matrices[me, i, j] = j + 1
    return matrices


@pytest.mark.quick("2-axes1-bfloat16")
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16])
@pytest.mark.parametrize("nodes,axes", [(1, "ep"), (2, ("node", "ep"))])
def test_reachability_matrix(nodes, axes, dtype):
    rng = np.random.default_rng(3)
    pattern = jnp.asarray(rng.integers(1, 50, (R, V))).astype(dtype)
    for servers in ((0, 1), (1,)):
        probe = probe_links(pattern, servers, W // 2, axes, nodes)
        tested = [rank // (W // 2) in servers for rank in range(W)]
        one_deaf, one_dumb = np.ones((W, W), bool), np.ones((W, W), bool)
        one_deaf[2], one_dumb[:, 5] = False, False
        for hears in (np.ones((W, W), bool), one_deaf, one_dumb, rng.random((W, W)) < 0.6, np.zeros((W, W), bool)):
            for kind in (bool, np.int32):
                window, got = probe(hears.astype(kind), everywhere(pattern))
                np.testing.assert_array_equal(got, expected_matrices(hears, tested, np.ones(W, bool)))
                data, counts = np.asarray(window.data), np.asarray(window.counts)
                for me in range(W):
                    for peer in range(W):
                        rows, came = data[me, peer * R : (peer + 1) * R], hears[me, peer] and tested[me]
                        assert (rows == (np.asarray(pattern) if came else 0)).all()
                        assert counts[me, peer] == (peer + 1 if came else 0)


def test_status_without_the_right_rows_is_not_heard():
    """Rank 6 sends one wrong element under a right status."""
    pattern = np.arange(1, R * V + 1, dtype=np.int32).reshape(R, V)
    sent = everywhere(pattern)
    sent[6, -1, -1] += 1
    window, got = probe_links(pattern, (0, 1), W // 2)(np.ones((W, W), bool), sent)
    assert (np.asarray(window.counts) == np.arange(1, W + 1)).all()
    np.testing.assert_array_equal(got, expected_matrices(np.ones((W, W)), np.ones(W), np.arange(W) != 6))


def test_links_default_to_good():
    pattern = np.ones((R, V), np.int32)

    def shard(window, pattern):
        window = receivable_test(window, pattern, jnp.zeros(1, jnp.int32), "ep")
        return receivable_info_collect(window, pattern, "ep")

    windows = jax.tree.map(jnp.zeros_like, full_windows(np.random.default_rng(4), np.int32))
    got = jax.jit(over_ep(shard))(windows, everywhere(pattern))
    np.testing.assert_array_equal(got, everywhere(np.tile(np.arange(1, W + 1), (W, 1))))


# --- bad input --------------------------------------------------------------------------------------------------------

WINDOW = make_window(W * R, V, jnp.int32, W)
PATTERN, MASK, DST = np.ones((R, V), np.int32), np.ones(W, bool), np.zeros(1, np.int32)
BAD_CALLS = [
    (lambda: buffer_reset(None, MASK, "ep"), errors.MissingArgumentError, "make_receive_window"),
    (lambda: buffer_reset((1, 2, 3), MASK, "ep"), errors.InvalidArgumentError, "a tuple"),
    (lambda: buffer_reset(make_window(4, 4, jnp.int32, 3), MASK, "ep"), errors.ShapeError, "counts"),
    (lambda: buffer_reset(WINDOW, MASK[1:], "ep"), errors.ShapeError, "link_mask"),
    (lambda: buffer_reset(WINDOW, MASK.astype(np.float32), "ep"), errors.DtypeError, "link_mask"),
    (lambda: buffer_reset(WINDOW, None, "ep"), errors.MissingArgumentError, "link_mask"),
    (lambda: buffer_reset(WINDOW, MASK, "row"), errors.MeshError, "not bound"),
    (lambda: buffer_reset(WINDOW, MASK, "ep", sync=1), errors.InvalidArgumentError, "True or False"),
    (lambda: buffer_reset(WINDOW, MASK, "ep", sync=False, timeout_us=5), errors.InvalidArgumentError, "nobody"),
    (lambda: fresh_sources(np.zeros((), np.int32), "ep"), errors.ShapeError, "step"),
    (lambda: fresh_sources(np.zeros(1, np.float32), "ep"), errors.DtypeError, "step"),
    (lambda: receivable_test(WINDOW, PATTERN[:2], DST, "ep"), errors.ShapeError, "pattern"),
    (lambda: receivable_test(WINDOW, PATTERN.astype(np.int8), DST, "ep"), errors.DtypeError, "pattern"),
    (lambda: receivable_test(WINDOW, PATTERN, DST[:0], "ep"), errors.ShapeError, "dst_ranks"),
    (lambda: receivable_test(WINDOW, PATTERN, DST, "ep", ranks_per_server=0), ValueError, "at least 1"),
    (lambda: receivable_test(WINDOW, PATTERN, DST, "ep", link_up=MASK[:3]), errors.ShapeError, "link_up"),
    (lambda: receivable_info_collect(WINDOW, PATTERN, "ep", link_up=MASK * 1.0), errors.DtypeError, "link_up"),
]  # fmt: skip


@pytest.mark.parametrize("call,error,text", BAD_CALLS)
def test_bad_calls(call, error, text):
    with pytest.raises(error, match=text):
        jax.eval_shape(over_ep(lambda x: (call(), x)[1]), np.zeros((W, 1), np.float32))
