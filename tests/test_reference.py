"""The oracle against what a person can check by hand, against its own laws, and against central differences."""

import ast
import decimal
import doctest
import importlib
import itertools
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest

import moe_jax as moe
from moe_jax import activations, errors, reference
from moe_jax.layer.experts import is_gated

# Central differences in float64: the truncation error is O(STEP^2), the rounding error about 1e-16 / STEP.
STEP = 1e-5
CLOSE = {"rtol": 1e-6, "atol": 1e-9}
EXACT_SUM = {"rtol": 1e-12, "atol": 1e-12}  # the same terms added in another order

MODULES = sorted(p.stem for p in pathlib.Path(reference.__file__).parent.glob("*.py") if p.stem != "__init__")


def numeric_grad(f, array):
    """d f() / d array by central differences, ``array`` being changed in place and restored."""
    grad = np.zeros(array.shape)
    for i in np.ndindex(array.shape):
        kept = array[i]
        array[i] = kept + STEP
        above = f()
        array[i] = kept - STEP
        below = f()
        array[i] = kept
        grad[i] = (above - below) / (2 * STEP)
    return grad


def router_config(**changes):
    defaults = {
        "score": "softmax",
        "topk_first": False,
        "renormalize": False,
        "scale": 1.0,
        "num_groups": 1,
        "top_groups": 1,
        "selection_bias": False,
        "group_score": "auto",
    }
    return SimpleNamespace(**defaults | changes)


def router_variants():
    scores = ["softmax", "sigmoid", "sqrt_softplus"]
    groupings = [(1, 1, "auto"), (4, 2, "auto"), (4, 2, "max"), (4, 2, "top2")]
    for score, first, renormalize, groups, biased in itertools.product(
        scores, [False, True], [False, True], groupings, [False, True]
    ):
        num_groups, top_groups, group_score = groups
        yield pytest.param(
            router_config(
                score=score,
                topk_first=first,
                renormalize=renormalize,
                scale=2.5,
                num_groups=num_groups,
                top_groups=top_groups,
                selection_bias=biased,
                group_score=group_score,
            ),
            id=f"{score}-first{first:d}-renorm{renormalize:d}-groups{num_groups}-{group_score}-bias{biased:d}",
        )


# --- the package ---


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    assert doctest.testmod(importlib.import_module(f"moe_jax.reference.{module}")).failed == 0


def test_imports_nothing_but_numpy_errors_the_table_of_parameters_and_itself():
    allowed = {"numpy", "math", "dataclasses", "collections", "typing"}
    folder = pathlib.Path(reference.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                inside = node.module == "moe_jax" and {a.name for a in node.names} <= {"errors"}
                inside |= node.module == "moe_jax.parameters" or node.module.startswith("moe_jax.reference")
                names = [] if inside else [node.module]
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_all_lists_what_is_there():
    assert sorted(reference.__all__) == reference.__all__
    assert all(hasattr(reference, name) for name in reference.__all__)


# --- routing ---


def test_ties_go_to_the_lower_index():
    routing = reference.route(np.array([[1.0, 3.0, 3.0, 3.0]]), router_config(), top_k=2)
    assert routing.expert_ids.tolist() == [[1, 2]]
    # Two values in a row long enough that an unstable sort would shuffle the ties.
    many = reference.route(np.tile([[1.0, 0.0]], 32), router_config(), top_k=32)
    assert many.expert_ids.tolist() == [list(range(0, 64, 2))]


def test_groups_max_and_top2_choose_differently():
    logits = np.array([[9.0, 0.0, 6.0, 5.0]])  # best single expert in group 0, best pair in group 1
    by_max = router_config(topk_first=True, num_groups=2, top_groups=1)
    by_pair = router_config(topk_first=True, num_groups=2, top_groups=1, group_score="top2")
    assert reference.route(logits, by_max, top_k=2).expert_ids.tolist() == [[0, 1]]
    assert reference.route(logits, by_pair, top_k=2).expert_ids.tolist() == [[2, 3]]
    biased = router_config(topk_first=True, num_groups=2, top_groups=1, selection_bias=True)  # auto means top2 here
    assert reference.route(logits, biased, top_k=2, bias=np.zeros(4)).expert_ids.tolist() == [[2, 3]]


def test_tied_groups_go_to_the_lower_index():
    router = router_config(num_groups=3, top_groups=2)
    routing = reference.route(np.zeros((1, 6)), router, top_k=4)
    assert routing.expert_ids.tolist() == [[0, 1, 2, 3]]


def test_bias_steers_the_choice_and_not_the_weights():
    logits = np.array([[0.0, 1.0, 2.0]])
    router = router_config(score="sigmoid", selection_bias=True)
    routing = reference.route(logits, router, top_k=1, bias=np.array([10.0, 0.0, 0.0]))
    assert routing.expert_ids.tolist() == [[0]]
    assert routing.combine_weights.tolist() == [[0.5]]


def test_softmax_over_the_chosen_is_the_renormalised_softmax():
    logits = np.random.default_rng(0).normal(size=(5, 8))
    first = reference.route(logits, router_config(topk_first=True), top_k=3)
    last = reference.route(logits, router_config(renormalize=True), top_k=3)
    np.testing.assert_array_equal(first.expert_ids, last.expert_ids)
    np.testing.assert_allclose(first.combine_weights, last.combine_weights, **EXACT_SUM)


def score_in_digits(logits, score):
    """The scores of ``logits`` [E] as decimals, in the precision of the context."""
    exps = [decimal.Decimal(x).exp() for x in logits.tolist()]
    if score == "softmax":
        return [x / sum(exps) for x in exps]
    return [x / (1 + x) if score == "sigmoid" else (1 + x).ln().sqrt() for x in exps]


@pytest.mark.parametrize("biases", ["none", "equal", "few", "close", "any"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_the_choice_is_that_of_exact_scores(score, biases):
    """In 300 digits, where a sigmoid of 200 is still apart from 1; float64 alone has it equal to that of 37."""
    rng = np.random.default_rng(0)
    num_groups, size, kept = 4, 3, 2
    bias = {
        "none": np.zeros(12),
        "equal": np.full(12, 0.3),
        "few": rng.choice([0.0, 0.2], 12),
        "close": 0.2 + np.spacing(0.2) * rng.integers(0, 3, 12),  # 3e-17 apart, as are the sigmoids of 38 and 39
        "any": rng.normal(size=12) / 8,
    }[biases]
    shifts = np.array([[0.0], [37.0], [-40.0], [150.0], [-150.0]])
    logits = np.concatenate([rng.normal(size=(5, 12)) + shifts, rng.uniform(-200, 200, (5, 12))])
    logits[5:, 6:] = logits[5:, :6]  # ties
    options = {"score": score, "selection_bias": biases != "none"}
    plain = router_config(**options)
    grouped = router_config(**options, num_groups=num_groups, top_groups=kept, group_score="top2")
    given = {"top_k": 5, "bias": None if biases == "none" else bias}
    with decimal.localcontext(prec=300):
        for row in logits:
            sums = [x + decimal.Decimal(b) for x, b in zip(score_in_digits(row, score), bias.tolist(), strict=True)]
            order = sorted(range(12), key=sums.__getitem__, reverse=True)
            assert reference.route(row[None], plain, **given).expert_ids[0].tolist() == order[:5]
            pairs = [sum(sorted(sums[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
            best = sorted(range(num_groups), key=pairs.__getitem__, reverse=True)[:kept]
            inside = [e for e in order if e // size in best]
            assert reference.route(row[None], grouped, **given).expert_ids[0].tolist() == inside[:5]


def test_scores_by_hand():
    logits = np.log(np.array([[1.0, 3.0]]))  # softmax 1/4, 3/4; sigmoid 1/2, 3/4; softplus log 2, log 4
    expected = {"softmax": [0.75, 0.25], "sigmoid": [0.75, 0.5], "sqrt_softplus": np.sqrt(np.log([4.0, 2.0]))}
    for score, weights in expected.items():
        routing = reference.route(logits, router_config(score=score, scale=2.0), top_k=2)
        np.testing.assert_allclose(routing.combine_weights, [np.multiply(2.0, weights)], **EXACT_SUM)
        normalised = reference.route(logits, router_config(score=score, renormalize=True), top_k=2)
        np.testing.assert_allclose(normalised.combine_weights, [weights / np.sum(weights)], **EXACT_SUM)


def test_losses_and_load_by_hand():
    logits = np.log(np.array([[1.0, 3.0], [1.0, 3.0], [1.0, 1.0]]))
    routing = reference.route(logits, router_config(), top_k=1, token_mask=np.array([True, True, False]))
    assert routing.load.tolist() == [0, 2]
    assert routing.losses["balance"] == pytest.approx(2 * 0.75)  # E * f_1 * P_1 with f_1 = 1
    assert routing.losses["z"] == pytest.approx(np.log(4.0) ** 2)
    sigmoid = reference.route(logits[:2], router_config(score="sigmoid"), top_k=1)
    assert sigmoid.losses["balance"] == pytest.approx(2 * 0.75 / 1.25)


def test_inactive_tokens_are_not_read():
    logits = np.array([[0.0, 1.0], [np.nan, np.nan]])
    mask = np.array([True, False])
    routing = reference.route(logits, router_config(), top_k=1, token_mask=mask)
    assert routing.expert_ids.tolist() == [[1], [-1]]
    assert routing.combine_weights[1].tolist() == [0.0]
    assert routing.load.tolist() == [0, 1]
    ct = reference.route_vjp(logits, router_config(), np.ones((2, 1)), top_k=1, token_mask=mask, ct_z=1.0)
    assert ct[1].tolist() == [0.0, 0.0] and ct[0].any()


def test_no_active_token():
    mask = np.zeros(2, bool)
    routing = reference.route(np.ones((2, 3)), router_config(), top_k=1, token_mask=mask)
    assert routing.losses == {"balance": 0.0, "z": 0.0}
    assert routing.load.tolist() == [0, 0, 0]
    ct_weights = np.ones((2, 1))
    ct = reference.route_vjp(np.ones((2, 3)), router_config(), ct_weights, top_k=1, token_mask=mask, ct_balance=1.0)
    assert not ct.any()


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.filterwarnings("error")
def test_extreme_logits_stay_finite(score):
    logits = np.array([[-2000.0, 0.0, 2000.0], [-2000.0, -2000.0, -2000.0]])
    router = router_config(score=score, renormalize=True)
    routing = reference.route(logits, router, top_k=3)
    assert np.isfinite(routing.combine_weights).all() and np.isfinite(routing.losses["balance"])
    assert np.isfinite(reference.route_vjp(logits, router, np.ones((2, 3)), top_k=3, ct_balance=1.0, ct_z=1.0)).all()


@pytest.mark.parametrize("router", list(router_variants()))
def test_route_vjp(router):
    rng = np.random.default_rng(1)
    logits, ct_weights = rng.normal(size=(3, 8)), rng.normal(size=(3, 2))
    options = {"top_k": 2, "token_mask": np.array([True, False, True])}
    if router.selection_bias:
        options["bias"] = 0.3 * rng.normal(size=8)

    def objective():
        routing = reference.route(logits, router, **options)
        losses = 0.7 * routing.losses["balance"] + 0.2 * routing.losses["z"]
        return (ct_weights * routing.combine_weights).sum() + losses

    ct = reference.route_vjp(logits, router, ct_weights, **options, ct_balance=0.7, ct_z=0.2)
    np.testing.assert_allclose(ct, numeric_grad(objective, logits), **CLOSE)


@pytest.mark.parametrize(
    ("changes", "top_k", "bias", "error"),
    [
        ({"score": "relu"}, 1, None, errors.InvalidArgumentError),
        ({"group_score": "mean"}, 1, None, errors.InvalidArgumentError),
        ({"num_groups": 3}, 1, None, errors.InvalidArgumentError),
        ({"num_groups": 2, "top_groups": 3}, 1, None, errors.InvalidArgumentError),
        ({"num_groups": 2, "top_groups": 1}, 3, None, errors.InvalidArgumentError),
        ({"selection_bias": True}, 1, None, errors.MissingArgumentError),
        ({}, 1, np.zeros(4), errors.InvalidArgumentError),
        ({"selection_bias": True}, 1, np.zeros(3), errors.ShapeError),
    ],
)
def test_route_refuses(changes, top_k, bias, error):
    with pytest.raises(error):
        reference.route(np.zeros((1, 4)), router_config(**changes), top_k=top_k, bias=bias)


# --- dispatch and combine ---


def exchange_case(seed=2, mask_rank=4):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, 6, size=(3, 2, 4, 2))
    mask = rng.random(ids.shape[:mask_rank]) < 0.7
    x = rng.normal(size=(3, 2, 4, 5))
    return rng, x, ids, mask, reference.dispatch(x, ids, num_experts=6, token_mask=mask)


def test_dispatch_order_by_hand():
    # W = 2, P = 2, T = 2, K = 2, E = 4. A row is named by its digits: source ep rank, tp rank, token.
    x = np.array([[[[0], [1]], [[10], [11]]], [[[100], [101]], [[110], [111]]]], np.int16)
    ids = np.array([[[[0, 1], [1, -1]], [[3, 0], [0, 2]]], [[[1, 1], [0, -1]], [[0, 3], [2, 0]]]])
    d = reference.dispatch(x, ids, num_experts=4)
    rank0 = [0, 101, 10, 11, 110, 111, 0, 1, 100, 100]  # expert 0: tp 0, then tp 1; expert 1: tp 0 only
    rank1 = [11, 111, 10, 110]  # expert 2, expert 3
    for p in range(2):
        assert d.rows[0][p].ravel().tolist() == rank0
        assert d.rows[1][p].ravel().tolist() == rank1
        assert d.rows[0][p].dtype == np.int16
        assert d.group_sizes[:, p].tolist() == [[6, 4], [2, 2]]
    assert d.origins[0][0][:3].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
    assert d.origins[1][1].tolist() == [[1, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize("mask_rank", [3, 4])
def test_masks_remove_pairs(mask_rank):
    _, x, ids, mask, d = exchange_case(mask_rank=mask_rank)
    if mask_rank == 3:
        mask = np.repeat(mask[..., None], 2, axis=-1)
    expected = {(p, w, t, k) for w, p, t, k in np.argwhere(mask & (ids >= 0))}
    arrived = [tuple(origin) for peers in d.origins for origin in peers[0].tolist()]
    assert set(arrived) == expected and len(arrived) == len(expected)
    for w, p in np.ndindex(3, 2):
        assert len(d.rows[w][p]) == d.group_sizes[w, p].sum()
        for row, (tp, source, t, k) in zip(d.rows[w][p], d.origins[w][p], strict=True):
            assert ids[source, tp, t, k] // 2 == w
            np.testing.assert_array_equal(row, x[source, tp, t])


def test_a_rank_may_receive_nothing():
    d = reference.dispatch(np.ones((2, 1, 2, 3)), np.zeros((2, 1, 2, 1), int), num_experts=2)
    assert d.rows[1][0].shape == (0, 3) and d.group_sizes.tolist() == [[[4]], [[0]]]
    y = reference.combine([[np.ones((4, 3))], [np.zeros((0, 3))]], np.full((2, 1, 2, 1), 2.0), d)
    assert (y == 2.0).all()


def test_combine_adds_partial_sums_and_weights():
    _, x, ids, mask, d = exchange_case()
    partials = [[(p + 1.0) * rows for p, rows in enumerate(peers)] for peers in d.rows]  # 1 x + 2 x = 3 x
    weights = np.where(mask & (ids >= 0), 1.0, np.nan)  # the weight of an absent pair is not read
    expected = 3.0 * (mask & (ids >= 0)).sum(-1)[..., None] * x
    np.testing.assert_allclose(reference.combine(partials, weights, d), expected, **EXACT_SUM)


def test_combine_does_not_read_padding():
    rng, _, _, _, d = exchange_case()
    weights = rng.normal(size=(3, 2, 4, 2))
    padded = [[np.concatenate([rows, np.full((2, 5), np.nan)]) for rows in peers] for peers in d.rows]
    np.testing.assert_array_equal(reference.combine(padded, weights, d), reference.combine(d.rows, weights, d))


def test_dispatch_and_combine_are_adjoint():
    rng, x, ids, _mask, d = exchange_case()
    y = [[rng.normal(size=rows.shape) for rows in peers] for peers in d.rows]
    inner = sum((a * b).sum() for a, b in zip(sum(d.rows, []), sum(y, []), strict=True))
    back = reference.combine(y, np.ones(ids.shape), d)
    np.testing.assert_allclose((x * back).sum(), inner, **EXACT_SUM)
    np.testing.assert_allclose(reference.dispatch_vjp(y, d, 4), back, **EXACT_SUM)


def test_dispatch_vjp():
    rng, x, ids, mask, d = exchange_case()
    ct = [[rng.normal(size=rows.shape) for rows in peers] for peers in d.rows]

    def objective():
        rows = reference.dispatch(x, ids, num_experts=6, token_mask=mask).rows
        return sum((a * b).sum() for a, b in zip(sum(rows, []), sum(ct, []), strict=True))

    np.testing.assert_allclose(reference.dispatch_vjp(ct, d, 4), numeric_grad(objective, x), **CLOSE)


def test_combine_vjp():
    rng, x, ids, _mask, d = exchange_case()
    rows = [[rng.normal(size=r.shape) for r in peers] for peers in d.rows]
    weights, ct_y = rng.normal(size=ids.shape), rng.normal(size=x.shape)

    def objective():
        return (ct_y * reference.combine(rows, weights, d)).sum()

    ct_rows, ct_weights = reference.combine_vjp(ct_y, rows, weights, d)
    np.testing.assert_allclose(ct_weights, numeric_grad(objective, weights), **CLOSE)
    for w, p in np.ndindex(3, 2):
        np.testing.assert_allclose(ct_rows[w][p], numeric_grad(objective, rows[w][p]), **CLOSE)


@pytest.mark.parametrize(
    ("ids_shape", "fill", "num_experts", "mask_shape", "error"),
    [
        ((2, 1, 3, 1), 0, 3, None, errors.InvalidArgumentError),
        ((2, 1, 3, 1), 4, 4, None, errors.InvalidArgumentError),
        ((2, 1, 3, 1), -2, 4, None, errors.InvalidArgumentError),
        ((2, 1, 2, 1), 0, 4, None, errors.ShapeError),
        ((2, 1, 3), 0, 4, None, errors.ShapeError),
        ((2, 1, 3, 1), 0, 4, (2, 1, 1), errors.ShapeError),
        ((2, 1, 3, 1), 0, 4, (3, 1), errors.ShapeError),
    ],
)
def test_dispatch_refuses(ids_shape, fill, num_experts, mask_shape, error):
    mask = None if mask_shape is None else np.ones(mask_shape, bool)
    with pytest.raises(error):
        reference.dispatch(np.ones((2, 1, 3, 2)), np.full(ids_shape, fill), num_experts=num_experts, token_mask=mask)


# --- ragged all-to-all ---


def ragged_case():
    """Three ranks; overlapping input slices, empty slices with wild offsets, rows that nobody writes."""
    rng = np.random.default_rng(3)
    operand, output = [rng.normal(size=(4, 2)) for _ in range(3)], [rng.normal(size=(6, 2)) for _ in range(3)]
    send_sizes = np.array([[2, 2, 0], [0, 0, 3], [1, 0, 2]])
    input_offsets = np.array([[0, 1, 99], [99, 0, 0], [3, 0, 2]])
    output_offsets = np.array([[3, 0, 99], [0, 99, 1], [0, 0, 4]])
    return rng, operand, output, (input_offsets, send_sizes, output_offsets, send_sizes.T)


def test_ragged_all_to_all_by_hand():
    _, operand, output, ints = ragged_case()
    got = reference.ragged_all_to_all(operand, output, *ints)
    a, b, c = operand
    np.testing.assert_array_equal(got[0], [c[3], *output[0][1:3], a[0], a[1], output[0][5]])
    np.testing.assert_array_equal(got[1], [a[1], a[2], *output[1][2:]])
    np.testing.assert_array_equal(got[2], [output[2][0], b[0], b[1], b[2], c[2], c[3]])


def test_ragged_all_to_all_vjp():
    rng, operand, output, ints = ragged_case()
    ct = [rng.normal(size=a.shape) for a in output]

    def objective():
        return sum((a * b).sum() for a, b in zip(ct, reference.ragged_all_to_all(operand, output, *ints), strict=True))

    ct_operand, ct_output = reference.ragged_all_to_all_vjp(ct, operand, *ints)
    for i in range(3):
        np.testing.assert_allclose(ct_operand[i], numeric_grad(objective, operand[i]), **CLOSE)
        np.testing.assert_allclose(ct_output[i], numeric_grad(objective, output[i]), **CLOSE)


@pytest.mark.parametrize(
    ("which", "rank", "peer", "value"),
    [("recv", 1, 0, 1), ("input", 0, 0, 3), ("input", 0, 0, -1), ("output", 1, 2, 4), ("output", 2, 0, 3)],
)
def test_ragged_all_to_all_refuses(which, rank, peer, value):
    _, operand, output, (input_offsets, send_sizes, output_offsets, recv_sizes) = ragged_case()
    recv_sizes = recv_sizes.copy()
    {"recv": recv_sizes, "input": input_offsets, "output": output_offsets}[which][rank, peer] = value
    with pytest.raises(ValueError, match="recv_sizes|slice"):
        reference.ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes)


# --- experts ---


@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_grouped_matmul_and_its_vjp(transpose_rhs):
    rng = np.random.default_rng(4)
    sizes = np.array([2, 0, 3])
    lhs, ct = rng.normal(size=(7, 4)), rng.normal(size=(7, 5))
    rhs = rng.normal(size=(3, 5, 4) if transpose_rhs else (3, 4, 5))
    lhs[5:], ct[5:] = np.nan, np.nan
    out = reference.grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs)
    for row, group in enumerate([0, 0, 2, 2, 2]):
        matrix = rhs[group].T if transpose_rhs else rhs[group]
        np.testing.assert_allclose(out[row], lhs[row] @ matrix, **EXACT_SUM)
    assert not out[5:].any()

    def objective():
        return (ct[:5] * reference.grouped_matmul(lhs, rhs, sizes, transpose_rhs=transpose_rhs)[:5]).sum()

    ct_lhs, ct_rhs = reference.grouped_matmul_vjp(ct, lhs, rhs, sizes, transpose_rhs=transpose_rhs)
    np.testing.assert_allclose(ct_lhs, numeric_grad(objective, lhs), **CLOSE)
    np.testing.assert_allclose(ct_rhs, numeric_grad(objective, rhs), **CLOSE)


@pytest.mark.parametrize("sizes", [[3, 2], [-1, 2]])
def test_grouped_matmul_refuses(sizes):
    with pytest.raises(errors.InvalidArgumentError, match="group_sizes"):
        reference.grouped_matmul(np.ones((4, 1)), np.ones((2, 1, 1)), sizes)


def ffn_weights(rng, activation, biases, hidden=3, ffn=4):
    weights = {"w_up": rng.normal(size=(hidden, ffn)), "w_down": rng.normal(size=(ffn, hidden))}
    if is_gated(activation):
        weights["w_gate"] = rng.normal(size=(hidden, ffn))
    if biases:
        weights |= {name.replace("w_", "b_"): rng.normal(size=value.shape[1]) for name, value in weights.items()}
    return weights


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", [*activations.TABLE, moe.ClampedSwiGLU(5.0, alpha=1.0, shift=0.0)], ids=str)
def test_expert_ffn_vjp(activation, biases):
    rng = np.random.default_rng(5)
    weights = ffn_weights(rng, activation, biases)
    x, ct = 8.0 * rng.normal(size=(6, 3)), rng.normal(size=(6, 3))  # large enough to reach every clamp
    if activation == "clamped_swiglu":
        gate, up = x @ weights["w_gate"], x @ weights["w_up"]
        assert gate.max() > 8 and gate.min() < -8 and up.max() > 8 and up.min() < -8

    def objective():
        return (ct * reference.expert_ffn(x, weights, activation)).sum()

    ct_x, ct_weights = reference.expert_ffn_vjp(ct, x, weights, activation)
    np.testing.assert_allclose(ct_x, numeric_grad(objective, x), **CLOSE)
    assert ct_weights.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_allclose(ct_weights[name], numeric_grad(objective, value), **CLOSE, err_msg=name)


def test_activations_by_hand():
    one = np.ones((1, 1))
    gated = {"w_gate": one, "w_up": one, "w_down": one}
    plain = {"w_up": one, "w_down": one}
    assert reference.expert_ffn([[2.0]], gated, "swiglu").item() == pytest.approx(4 / (1 + np.exp(-2.0)))
    assert reference.expert_ffn([[1.0]], plain, "gelu").item() == pytest.approx(0.8413447460685429)
    assert reference.expert_ffn([[9.0]], gated, "clamped_swiglu").item() == pytest.approx(56 / (1 + np.exp(-1.702 * 7)))
    low = -9 / (1 + np.exp(1.702 * 9)) * (1 - 7)  # the gate has no lower limit, the up projection has
    assert reference.expert_ffn([[-9.0]], gated, "clamped_swiglu").item() == pytest.approx(low)


@pytest.mark.parametrize(
    ("names", "activation", "error"),
    [
        (("w_up", "w_down"), "elu", errors.InvalidArgumentError),
        (("w_up", "w_down"), "swiglu", errors.MissingArgumentError),
        (("w_gate", "w_up", "w_down"), "gelu", errors.InvalidArgumentError),
    ],
)
def test_expert_ffn_refuses(names, activation, error):
    with pytest.raises(error):
        reference.expert_ffn(np.ones((1, 1)), {name: np.ones((1, 1)) for name in names}, activation)


# --- the layer ---


def layer_params(rng, activation, *, extras, num_experts=4, hidden=3, ffn=4, shared=2):
    experts = [ffn_weights(rng, activation, extras, hidden, ffn) for _ in range(num_experts)]
    params = {name: np.stack([expert[name] for expert in experts]) for name in experts[0]}
    params["router"] = rng.normal(size=(hidden, num_experts))
    if extras:
        shared_expert = ffn_weights(rng, activation, False, hidden, shared)
        params |= {name.replace("w_", "shared_"): value for name, value in shared_expert.items()}
        params |= {"router_bias": rng.normal(size=num_experts), "selection_bias": rng.normal(size=num_experts)}
    return params


def layer_variants():
    plain = router_config(topk_first=True)
    everything = router_config(
        score="sigmoid", renormalize=True, scale=1.5, num_groups=2, top_groups=1, selection_bias=True
    )
    for activation in ["swiglu", "gelu", "clamped_swiglu"]:
        yield pytest.param(activation, plain, False, id=f"{activation}-plain")
        yield pytest.param(activation, everything, True, id=f"{activation}-everything")


@pytest.mark.parametrize(("activation", "router", "extras"), list(layer_variants()))
def test_moe_layer_vjp(activation, router, extras):
    rng = np.random.default_rng(6)
    params = layer_params(rng, activation, extras=extras)
    x, ct_y = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    options = {"top_k": 2, "activation": activation, "token_mask": np.array([True, True, False, True])}
    x[2], ct_y[2] = np.nan, np.nan  # an inactive token is never read

    def objective():
        y, routing = reference.moe_layer(params, x, router, **options)
        active = options["token_mask"]
        return (ct_y * y)[active].sum() + 0.7 * routing.losses["balance"] + 0.2 * routing.losses["z"]

    ct_params, ct_x = reference.moe_layer_vjp(params, x, ct_y, router, **options, ct_balance=0.7, ct_z=0.2)
    np.testing.assert_allclose(ct_x, numeric_grad(objective, x), **CLOSE)
    assert ct_params.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_allclose(ct_params[name], numeric_grad(objective, value), **CLOSE, err_msg=name)
    assert not extras or not ct_params["selection_bias"].any()


def test_moe_layer_with_one_expert_is_that_expert():
    rng = np.random.default_rng(7)
    params = layer_params(rng, "swiglu", extras=False, num_experts=1)
    x = rng.normal(size=(3, 3))
    y, routing = reference.moe_layer(params, x, router_config(), top_k=1)
    weights = {name: params[name][0] for name in ("w_gate", "w_up", "w_down")}
    np.testing.assert_allclose(y, reference.expert_ffn(x, weights, "swiglu"), **EXACT_SUM)
    assert routing.load.tolist() == [3]


def test_combine_weights_vjp_is_the_change_of_y():
    rng = np.random.default_rng(8)
    params, router = layer_params(rng, "swiglu", extras=False), router_config(score="sigmoid")
    x, ct_y = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    y, routing = reference.moe_layer(params, x, router, top_k=2, token_mask=np.array([True, True, True, False]))
    ct_weights = reference.combine_weights_vjp(params, x, ct_y, routing)
    # y is linear in the weights and has no other term here, so <ct_y_t, y_t> = sum_k weight_tk * ct_tk.
    np.testing.assert_allclose((routing.combine_weights * ct_weights).sum(1), (ct_y * y).sum(1), **EXACT_SUM)
    assert not ct_weights[3].any()


def on_devices(params, x, routing, num_ranks, num_peers):
    """The routed part by dispatch, tensor-parallel experts and combine, on num_ranks * num_peers devices."""
    num_experts, _, ffn = params["w_up"].shape
    arrays = (x, routing.expert_ids, routing.combine_weights)
    tokens, ids, weights = (a.reshape(num_ranks, num_peers, -1, a.shape[1]) for a in arrays)
    d = reference.dispatch(tokens, ids, num_experts=num_experts)
    local, part = num_experts // num_ranks, ffn // num_peers
    rows = [[None] * num_peers for _ in range(num_ranks)]
    for w, p in np.ndindex(num_ranks, num_peers):
        experts, columns = slice(w * local, (w + 1) * local), slice(p * part, (p + 1) * part)
        gate, up = (
            reference.grouped_matmul(d.rows[w][p], params[name][experts, :, columns], d.group_sizes[w, p])
            for name in ("w_gate", "w_up")
        )
        hidden = gate / (1 + np.exp(-gate)) * up
        rows[w][p] = reference.grouped_matmul(hidden, params["w_down"][experts, columns], d.group_sizes[w, p])
    return reference.combine(rows, weights, d).reshape(x.shape)


@pytest.mark.parametrize(("num_ranks", "num_peers"), [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_the_layer_is_the_same_on_every_mesh(num_ranks, num_peers):
    rng = np.random.default_rng(9)
    params = layer_params(rng, "swiglu", extras=False)
    x, mask = rng.normal(size=(8, 3)), np.arange(8) != 5
    y, routing = reference.moe_layer(params, x, router_config(renormalize=True), top_k=2, token_mask=mask)
    np.testing.assert_allclose(on_devices(params, x, routing, num_ranks, num_peers), y, **EXACT_SUM)
    assert not y[5].any() and y[4].any()


@pytest.mark.parametrize(
    ("change", "bias", "error"),
    [
        ({"w_gats": np.ones(1)}, None, errors.InvalidArgumentError),
        ({"router": None}, None, errors.MissingArgumentError),
        ({"shared_up": np.ones((3, 2))}, None, errors.MissingArgumentError),
        ({"selection_bias": np.ones(4)}, np.ones(4), errors.InvalidArgumentError),
    ],
)
def test_moe_layer_refuses(change, bias, error):
    params = layer_params(np.random.default_rng(10), "swiglu", extras=False) | change
    params = {name: value for name, value in params.items() if value is not None}
    with pytest.raises(error):
        reference.moe_layer(params, np.ones((2, 3)), router_config(), top_k=1, bias=bias)
