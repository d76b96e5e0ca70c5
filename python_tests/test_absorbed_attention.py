"""absorbed_attention against softmax over normalised tokens; bags, dropout and mass, refusals."""

import itertools
import math
from unittest import mock

import motet
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from motet.kernels import ragged as chunks
from motet.kernels.absorbed_attention import operator
from motet.kernels.absorbed_attention.operator import absorbed_weights
from motet.kernels.absorbed_attention.reference import absorbed_attention_reference
from motet.kernels.context_kv.reference import context_kv_reference
from motet.kernels.dtypes import wide
from torch import Tensor
from torch.library import opcheck

from .comparison import EXACT, FLOOR, assert_as_good_as, with_gradients
from .conftest import (
    ROWS,
    assert_compiles,
    assert_differentiable_once,
    assert_leaves_no_trace,
    offsets_of,
    rows_of,
    views_of,
)

absorbed_attention = motet.kernels.absorbed_attention
row_statistics = motet.kernels.row_statistics
WIDE = {"dtype": torch.float64}
LENGTHS = {
    "three bags": [4, 2, 3],
    "empty and one-key bags": [0, 1, 5, 0, 1],
    "above the chunks": [65, 64, 63, 128],
    "all empty": [0, 0],
    "no bag": [],
    "one bag": [150],
}


def draw(
    lengths: list[int],
    dtype: torch.dtype = torch.float64,
    *,
    rows: int = 4,
    width: int = 5,
    places: tuple[int, int] | None = None,
    kind: float | str = 1.0,
) -> list[Tensor]:
    """Return queries and x, and positions of the shape `places` if it is not None."""
    wide = width + (places[1] if places else 0)
    queries = torch.randn(len(lengths), rows, wide).to(dtype)
    x = rows_of(kind, sum(lengths), width, dtype=dtype)
    return [queries, x, *([torch.randn(places).to(dtype)] if places else [])]


def call(lengths: list[int], function=absorbed_attention, **options):
    """Return `function` as a function of queries, x and optional positions."""

    def called(queries: Tensor, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, ...]:
        return function(queries, x, offsets_of(lengths), positions=positions, **options)

    return called


def counts_of(tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return counts from 1 to 4, in the dtype that tokens of `dtype` need."""
    return torch.randint(1, 5, (tokens,)).to(wide(dtype))


def reference(lengths: list[int], **options):
    return call(lengths, absorbed_attention_reference, **options)


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 1)  # 64 rows


@pytest.mark.usefixtures("_poisoned", "_small_chunks")
@pytest.mark.parametrize("channels", [None, 0, 3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_the_reference(lengths: list[int], channels: int | None) -> None:
    args = draw(lengths, places=None if channels is None else (sum(lengths), channels))
    actual, expected = (with_gradients(f(lengths))(*args) for f in (call, reference))
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.usefixtures("_poisoned", "_small_chunks")
@pytest.mark.parametrize("lengths", [[7, 7, 7], [89, 89], [89, 0, 178], [70, 84]], ids=str)
def test_shared_positions(lengths: list[int]) -> None:
    args = draw(lengths, places=(89 if 89 in lengths else 7, 2))
    actual, expected = (with_gradients(f(lengths))(*args) for f in (call, reference))
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (0, 5), (11, 1), (1, 17)])
def test_sizes_at_the_edge(rows: int, width: int) -> None:
    args = draw([4, 0, 3], rows=rows, width=width)
    actual, expected = (with_gradients(f([4, 0, 3]))(*args) for f in (call, reference))
    torch.testing.assert_close(actual, expected, **EXACT)


def test_bags_without_tokens_and_with_one() -> None:
    queries, x = draw([0, 1])
    pooled, mass = absorbed_attention(queries, x, offsets_of([0, 1]))
    assert torch.equal(pooled[0], torch.zeros(4, 5, **WIDE))
    assert torch.equal(mass, torch.tensor([[0.0] * 4, [1.0] * 4], **WIDE))
    token = torch.nn.functional.layer_norm(x, (5,))
    torch.testing.assert_close(pooled[1], token.expand(4, 5), **EXACT)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("places", [None, (50, 4)])
def test_rows_with_any_mean_lose_no_digits(kind, dtype: torch.dtype, places) -> None:
    lengths = [70, 0, 1, 79]
    queries, *tokens = draw(lengths, dtype, rows=8, width=48, places=places, kind=kind)
    assert_as_good_as(
        with_gradients(call(lengths)), with_gradients(reference(lengths)), queries / 8, *tokens
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_say_the_dtype_of_the_products(dtype: torch.dtype) -> None:
    queries, x = draw([4, 3], torch.float32)
    for tokens in (x, x.to(dtype)):
        outcome = with_gradients(call([4, 3]))(queries.to(dtype), tokens)
        assert [part.dtype for part in outcome] == [dtype, dtype, dtype, tokens.dtype]
        assert_as_good_as(call([4, 3]), reference([4, 3]), queries.to(dtype), tokens)


@pytest.mark.usefixtures("_small_chunks")
def test_huge_scores_do_not_overflow() -> None:
    """With scores of 1e4 and more, the token of the highest score is pooled; nothing is NaN."""
    queries, x = draw([200], torch.float32)
    outcome = with_gradients(call([200]))(1e4 * queries, x)
    z = torch.nn.functional.layer_norm(x, (5,))
    torch.testing.assert_close(outcome[0][0], z[(z @ queries[0].T).argmax(0)])
    assert all(part.isfinite().all() for part in outcome)


@given(
    st.lists(st.sampled_from([0, 1, 2, 7, 63, 64, 65, 128, 129, 200]), max_size=4),
    st.sampled_from([(4, 5), (3, 16), (17, 33)]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
    st.booleans(),
)
@example([], (4, 5), torch.float32, False, True)
@example([0, 7], (17, 33), torch.float64, False, False)
@example([63, 7], (17, 33), torch.float32, True, False)
def test_a_bag_has_the_same_bits_in_any_batch(
    lengths: list[int], sizes: tuple[int, int], dtype: torch.dtype, positions: bool, counted: bool
) -> None:
    torch.manual_seed(sum(lengths))
    places = (sum(lengths), 2) if positions else None
    counts = counts_of(sum(lengths), dtype) if counted else None

    def run(bag: slice, lengths: list[int], *args: Tensor) -> list[Tensor]:
        args = tuple(t.clone().requires_grad_() for t in args)
        results = call(lengths, counts=None if counts is None else counts[bag])(*args)
        return [*results, *torch.autograd.grad(results[0].sum() + results[1].sum(), args)]

    queries, *tokens = draw(lengths, dtype, rows=sizes[0], width=sizes[1], places=places)
    with mock.patch.object(chunks, "CHUNK_ELEMENTS", 1):
        batched = run(slice(None), lengths, queries, *tokens)
        for b, bound in enumerate(itertools.pairwise(offsets_of(lengths).tolist())):
            row, bag = slice(b, b + 1), slice(*bound)
            alone = run(bag, lengths[row], queries[row], *(t[bag] for t in tokens))
            assert all(map(torch.equal, alone[:3], (part[row] for part in batched[:3])))
            assert all(map(torch.equal, alone[3:], (part[bag] for part in batched[3:])))


def test_the_size_of_chunks_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [300, 0, 233]
    args = draw(lengths, places=(533, 2))
    seed = torch.tensor([5])
    plain, dropped = [], []
    for elements in (1, 128 * 7, 256 * 7, 1 << 21):
        monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements)
        plain.append(with_gradients(call(lengths))(*args))
        dropped.append(with_gradients(call(lengths, dropout_p=0.4, seed=seed))(*args))
    for outcomes in (plain, dropped):
        for outcome in outcomes:
            torch.testing.assert_close(outcome, outcomes[0], **EXACT)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("places", [None, (70, 1), (5, 2)])
def test_gradients(dropout_p: float, places: tuple[int, int] | None) -> None:
    """Gradients of both results match finite differences; a fixed seed fixes the dropout mask."""
    lengths = [3, 0, 67] if places != (5, 2) else [2, 0, 3]
    args = [a.requires_grad_() for a in draw(lengths, rows=2, width=2, places=places)]
    seed = torch.tensor([5]) if dropout_p else None
    run = call(lengths, dropout_p=dropout_p, seed=seed)
    assert torch.autograd.gradcheck(run, args, fast_mode=True)


def test_no_gradient_where_none_is_wanted() -> None:
    lengths = [3, 4]
    queries, x, places = draw(lengths, places=(7, 2))
    all_gradients = with_gradients(call(lengths))(queries, x, places)[2:]
    generator = torch.Generator().manual_seed(0)
    for indices in ([0], [1], [2], [0, 2]):
        args = [a.clone().requires_grad_(i in indices) for i, a in enumerate((queries, x, places))]
        results = call(lengths)(*args)
        generator.manual_seed(0)
        sums = [torch.randn(r.shape, generator=generator).bfloat16().double() for r in results]
        gradients = torch.autograd.grad(results, [args[i] for i in indices], sums)
        for i, gradient in zip(indices, gradients, strict=True):
            torch.testing.assert_close(gradient, all_gradients[i], **EXACT)


def test_one_result_is_enough_for_a_gradient() -> None:
    args = [a.requires_grad_() for a in draw([3, 4])]
    for i in range(2):
        options = {"allow_unused": True, "materialize_grads": True}
        actual, expected = (
            torch.autograd.grad(f([3, 4])(*args)[i].square().sum(), args, **options)
            for f in (call, reference)
        )
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.usefixtures("_poisoned", "_small_chunks")
@pytest.mark.parametrize("mode", ["eager", "compile", "reference"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_count_is_so_many_equal_tokens(lengths: list[int], mode: str, monkeypatch) -> None:
    """A count c equals c copies of the token; its gradient is the sum over the copies."""
    monkeypatch.setattr(operator, "compiled", lambda function: function)
    args, counts = draw(lengths, places=(sum(lengths), 2)), counts_of(sum(lengths))
    index = torch.arange(sum(lengths)).repeat_interleave(counts.long())
    longer = [int(bag.sum()) for bag in counts.split(lengths)] if lengths else []

    def literal(queries: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return reference(longer)(queries, x[index], positions[index])

    options = {"counts": counts}
    if mode == "reference":
        counted = reference(lengths, **options)
    else:
        counted = call(lengths, backend=mode, **options)
    results = [with_gradients(f)(*args) for f in (counted, literal)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", FLOOR)
def test_counts_of_1_change_no_bit(dtype: torch.dtype) -> None:
    lengths = [70, 0, 1, 79]
    args, ones = draw(lengths, dtype), torch.ones(150, dtype=wide(dtype))
    with_ones, without = (with_gradients(call(lengths, counts=c))(*args) for c in (ones, None))
    assert all(map(torch.equal, with_ones, without))


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts_of_any_size_are_as_good_as_torch(dtype: torch.dtype, size: float) -> None:
    lengths, counts = [70, 0, 1, 79], size * (1 + 3 * torch.rand(150))
    queries, x = draw(lengths, dtype, rows=8, width=48)

    def run(make, queries: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return make(lengths, counts=counts.to(wide(x.dtype)))(queries, x)

    assert_as_good_as(
        *(with_gradients(lambda *t, make=make: run(make, *t)) for make in (call, reference)),
        queries / 8, x,
    )  # fmt: skip


@pytest.mark.usefixtures("_small_chunks")
def test_gradients_with_counts() -> None:
    lengths = [3, 0, 67]
    args = [a.requires_grad_() for a in draw(lengths, rows=2, width=2, places=(70, 1))]
    run = call(lengths, counts=0.3 * counts_of(70))
    assert torch.autograd.gradcheck(run, args, fast_mode=True)


ROWS_OF_QUERIES, TOKENS, P = 12, 400, 0.3


def kept(lengths: list[int], seed: int = 5, dropout_p: float = P) -> list[Tensor]:
    """Return the dropout mask [R, N_b] of each bag.

    All scores are equal and tokens are unit vectors, so the pooled result shows the weights.
    """
    wide = max(lengths)
    x = torch.cat([torch.eye(wide, **WIDE)[:n] for n in lengths])
    queries = torch.zeros(len(lengths), ROWS_OF_QUERIES, wide, **WIDE)
    options = {"dropout_p": dropout_p, "seed": torch.tensor([seed])}
    pooled, mass = absorbed_attention(queries, x, offsets_of(lengths), **options)
    rstd = (1 / wide - 1 / wide**2 + 1e-5) ** -0.5  # of a normalised unit vector
    masks = []
    for bag, total, count in zip(pooled, mass, lengths, strict=True):
        weights = bag / rstd + total[:, None] / wide
        scaled = weights[:, :count] * count * (1 - dropout_p)
        assert ((scaled - scaled.round()).abs() < 1e-9).all()
        assert (weights[:, count:].abs() < 1e-12).all()
        torch.testing.assert_close(total, weights.sum(-1), **EXACT)
        masks.append(scaled.round().bool())
    return masks


def test_every_weight_is_kept_with_the_same_probability() -> None:
    """The share kept per bag, query and token is within 5 standard deviations of a binomial."""
    bags = torch.stack(kept([TOKENS] * 6)).double()  # [B, R, N]
    for axes in ([], [0], [1], [2], [0, 1]):
        others = [axis for axis in range(3) if axis not in axes]
        count = math.prod(bags.shape[axis] for axis in others)
        deviation = math.sqrt(P * (1 - P) / count)
        assert (bags.mean(others) - (1 - P)).abs().max() < 5 * deviation, axes


def test_masks_of_bags_queries_and_seeds_are_independent() -> None:
    masks = torch.cat(kept([TOKENS] * 3) + kept([TOKENS] * 3, seed=6)[2:]).double()
    agreement = (masks @ masks.T + (1 - masks) @ (1 - masks).T) / TOKENS
    expected = P**2 + (1 - P) ** 2
    apart = agreement[~torch.eye(len(masks)).bool()]
    assert (apart - expected).abs().max() < 6 * math.sqrt(expected * (1 - expected) / TOKENS)


def test_the_mask_depends_on_the_seed_and_not_on_chunks_or_other_bags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, middle, last = kept([9, 140, 3])
    assert torch.equal(middle, kept([50, 140])[1])
    assert torch.equal(first, kept([9])[0])
    assert torch.equal(last, kept([0, 0, 3])[2])
    assert not torch.equal(middle, kept([9, 140, 3], seed=6)[1])
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 1)
    assert all(map(torch.equal, kept([9, 140, 3]), (first, middle, last)))


def test_dropout_keeps_the_mean() -> None:
    lengths = [200, 100]
    args = draw(lengths)
    draws = [call(lengths, dropout_p=0.4)(*args) for _ in range(300)]
    expected = call(lengths)(*args)
    for drawn, true in zip(map(torch.stack, zip(*draws, strict=True)), expected, strict=True):
        error = (drawn.mean(0) - true) / (drawn.std(0) / len(draws) ** 0.5)
        assert error.abs().max() < 5
        assert drawn.std(0).min() > 0


@pytest.mark.parametrize("backend", ["auto", "eager", "compile"])
def test_torchs_generator_draws_the_seed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Runs the function that would be compiled, without the time of compilation.
    monkeypatch.setattr(operator, "compiled", lambda function: function)
    args = draw([40, 20])

    def run(dropout_p: float = 0.5) -> Tensor:
        return call([40, 20], dropout_p=dropout_p, backend=backend)(*args)[0]

    torch.manual_seed(3)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    state = torch.get_rng_state()
    assert torch.equal(run(0.0), run(0.0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ["auto", "eager", "compile"])
def test_the_same_seed_is_the_same_mask(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "compiled", lambda function: function)
    args = draw([40, 20])
    state = torch.get_rng_state()

    def run(seed: int) -> Tensor:
        options = {"dropout_p": 0.5, "seed": torch.tensor([seed]), "backend": backend}
        return call([40, 20], **options)(*args)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_weights(lengths: list[int], dtype: torch.dtype) -> None:
    queries, x, places = draw(lengths, dtype, places=(sum(lengths), 2))
    weights = absorbed_weights(queries, x, offsets_of(lengths), positions=places)
    assert (weights.dtype, weights.shape) == (dtype, (sum(lengths), 4))
    identity = torch.eye(7, **WIDE)[None]
    (z,) = context_kv_reference(x.double(), identity, positions=places.double())
    bags = weights.double().split(lengths) if lengths else []
    own_z = z.split(lengths) if lengths else []
    atol = 8 * FLOOR[dtype]  # scores are at most 5
    for bag, query, tokens in zip(bags, queries.double(), own_z, strict=True):
        torch.testing.assert_close(bag, (tokens @ query.T).softmax(0), rtol=0, atol=atol)
        if len(bag):
            torch.testing.assert_close(bag.sum(0), torch.ones(4, **WIDE), rtol=0, atol=atol)


@pytest.mark.sampled
@pytest.mark.parametrize("lengths", [[4, 0, 3], [0, 0], []], ids=str)
@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("option", [None, "dropout", "counts"])
def test_registration(lengths: list[int], channels: int | None, option: str | None) -> None:
    queries, x, *places = draw(lengths, places=channels and (sum(lengths), channels))
    positions = places[0] if places else None
    counts = counts_of(sum(lengths)) if option == "counts" else None
    bags = (offsets_of(lengths), counts)
    statistics = row_statistics(x, positions=positions)
    options = (1e-5, *((0.5, torch.tensor([5])) if option == "dropout" else (0.0, None)), "auto")
    operators = torch.ops.motet
    args = [a if a is None else a.clone().requires_grad_() for a in (queries, x, positions)]
    for pair in ((None, None), statistics):
        opcheck(operators.absorbed_attention, (*args, *bags, *pair, *options))
    plain = (queries, x, positions, *bags)
    made = operators.absorbed_attention(*plain, None, None, *options)
    grads = [torch.randn_like(part) for part in made[:2]]
    for rows in (True, False):
        for statistics_given in (True, False):
            opcheck(
                operators.absorbed_attention_backward,
                (*grads, *plain, *statistics, statistics_given, *made[:4], *options, rows),
            )


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("places", [None, (70, 2)])
def test_statistics_of_a_former_call_change_rounding_only(places: tuple[int, int] | None) -> None:
    lengths = [75, 0, 65]
    args, seed = draw(lengths, places=places), torch.tensor([5])
    positions = args[2] if places else None
    mean, rstd = row_statistics(args[1], positions=positions)
    apart = torch.stack((mean, rstd), 1).unbind(1)
    for options in ({}, {"dropout_p": 0.4, "seed": seed}, {"backend": "compile"}):
        plain = with_gradients(call(lengths, **options | {"backend": "auto"}))(*args)
        for pair in ((mean, rstd), apart):
            result = with_gradients(call(lengths, statistics=pair, **options))(*args)
            torch.testing.assert_close(result, plain, **EXACT)
    bags = (*args[:2], offsets_of(lengths))
    result = absorbed_weights(*bags, positions=positions, statistics=(mean, rstd))
    torch.testing.assert_close(result, absorbed_weights(*bags, positions=positions), **EXACT)
    # The statistics are used: other statistics give other weights.
    other = absorbed_weights(*bags, positions=positions, statistics=(mean, 2 * rstd))
    assert not torch.allclose(result, other)


def test_rows_behind_the_last_bag() -> None:
    """Rows of NaN after the last bag change no result and have a gradient of zero."""
    queries, x = draw([70, 0, 30])
    padded, offsets = torch.cat([x, x.new_full((40, 5), torch.nan)]), offsets_of([70, 0, 30])
    operators = torch.ops.motet
    options = (1e-5, 0.0, None, "eager")

    def run(x: Tensor) -> tuple[Tensor, ...]:
        plain = (queries, x, None, offsets, None)
        pooled, mass, scores, lse, *statistics = operators.absorbed_attention(
            *plain, None, None, *options
        )
        made = (pooled, mass, scores, lse)
        dqueries, dx, _ = operators.absorbed_attention_backward(
            pooled, mass, *plain, *statistics, False, *made, *options, True
        )
        assert not dx[100:].any()
        return pooled, mass, scores[:100], lse, dqueries, dx[:100]

    assert all(map(torch.equal, run(padded), run(x)))


@pytest.mark.parametrize("counted", [False, True])
def test_compiles_whole_for_any_size(counted: bool) -> None:
    def run(queries: Tensor, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        offsets = torch.arange(3) * (len(x) // 2)
        counts = torch.arange(1, len(x) + 1, **WIDE) if counted else None
        options = {"positions": positions, "counts": counts}
        pooled, mass = absorbed_attention(queries, x, offsets, **options)
        return 2 * pooled, mass

    assert_compiles(run, *(draw([n, n], places=(n, 3)) for n in (6, 9)))


# torch's own, where offsets break the graph; it says so only where warnings are errors.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_compiled_backend() -> None:
    lengths = [4]
    args = draw(lengths)
    actual, expected = (f(lengths) for f in (lambda n: call(n, backend="compile"), reference))
    torch.testing.assert_close(
        with_gradients(actual)(*args), with_gradients(expected)(*args), **EXACT
    )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_what_the_compiled_backend_computes(lengths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "compiled", lambda function: function)
    args = draw(lengths)
    actual, expected = (
        with_gradients(call(lengths, backend=backend))(*args) for backend in ("compile", "eager")
    )
    torch.testing.assert_close(actual, expected, **EXACT)


def test_there_is_one_derivative() -> None:
    assert_differentiable_once(call([2, 3]), *draw([2, 3], places=(5, 2)))


def test_no_state_survives_a_call() -> None:
    lengths = [4, 0, 3]
    args = draw(lengths, places=(7, 2))
    assert_leaves_no_trace(call(lengths), *args)
    seed = torch.tensor([5])
    assert_leaves_no_trace(call(lengths, dropout_p=0.5, seed=seed), *args)
    assert seed.item() == 5


@pytest.mark.parametrize("which", range(3))
def test_layouts_of_every_argument(which: int) -> None:
    lengths = [9, 0, 12]
    args = draw(lengths, places=(7, 2))
    expected = with_gradients(reference(lengths))(*args)
    for view in views_of(args[which]).values():
        changed = [*args[:which], view, *args[which + 1 :]]
        torch.testing.assert_close(with_gradients(call(lengths))(*changed), expected, **EXACT)


def test_expanded_arguments() -> None:
    lengths = [9, 0, 12]
    shapes = [(3, 4, 7), (21, 5), (7, 2)]
    args = [torch.randn(shape[-1], **WIDE).expand(shape) for shape in shapes]
    actual, expected = (with_gradients(f(lengths))(*args) for f in (call, reference))
    torch.testing.assert_close(actual, expected, **EXACT)


def refused() -> list[tuple[type[Exception], str, tuple, dict]]:
    queries, x = draw([2, 3])
    offsets, seed = offsets_of([2, 3]), torch.tensor([1])
    ok, ones = (queries, x, offsets), torch.ones(5, **WIDE)
    wide = torch.randn(2, 4, 7, **WIDE)
    single = (queries.float(), x.float(), offsets)
    return [
        (TypeError, "queries: expected a tensor", ([1.0], x, offsets), {}),
        (TypeError, "x: expected a tensor", (queries, [1.0], offsets), {}),
        (TypeError, "offsets: expected a tensor", (queries, x, [0, 2, 5]), {}),
        (TypeError, "offsets: expected a tensor", (queries, x, None), {}),
        (TypeError, "positions: expected a tensor", (wide, x, offsets), {"positions": [1.0]}),
        (ValueError, "x: expected floating-point \\[T, D\\]", (queries, x[None], offsets), {}),
        (ValueError, "x: expected floating-point", (queries, x.long(), offsets), {}),
        (ValueError, "\\[T, D\\] with D > 0", (queries, x[:, :0], offsets), {}),
        (ValueError, "queries: expected \\[2, R, 5\\]", (queries[..., :4], x, offsets), {}),
        (ValueError, "queries: expected \\[2, R, 5\\]", (queries[0], x, offsets), {}),
        (ValueError, "queries: expected \\[2, R, 5\\]", (queries[:1], x, offsets), {}),
        (ValueError, "queries: expected", (single[0].long(), single[1], offsets), {}),
        (ValueError, "queries: expected", (single[0].to(torch.complex64), single[1], offsets), {}),
        (ValueError, "queries: expected a dtype that goes with torch.float64",
         (queries.float(), x, offsets), {}),
        (ValueError, "queries: expected .* on cpu", (queries.to("meta"), x, offsets), {}),
        (ValueError, "positions: expected \\[N, P\\]", (wide, x, offsets), {"positions": x[:2]}),
        (ValueError, "positions: expected cpu as x", (wide, x, offsets),
         {"positions": x[:, :2].to("meta")}),
        (ValueError, "positions: expected floating", (wide, x, offsets),
         {"positions": x[:, :2].long()}),
        (ValueError, "offsets: expected int64", (queries, x, offsets.int()), {}),
        (ValueError, "offsets: expected int64", (queries, x, offsets[None]), {}),
        (ValueError, "offsets: expected int64", (queries, x, offsets[:0]), {}),
        (ValueError, "offsets: expected cpu", (queries, x, offsets.to("meta")), {}),
        (ValueError, "offsets: expected to rise", (queries, x, torch.tensor([0, 6, 5])), {}),
        (ValueError, "offsets: expected to rise", (queries, x, torch.tensor([1, 2, 5])), {}),
        (ValueError, "offsets: expected to rise", (queries, x, torch.tensor([0, 2, 6])), {}),
        (TypeError, "statistics\\[0\\]: expected a tensor", ok, {"statistics": ([1.0], ones)}),
        (ValueError, "statistics: expected two tensors, got 1", ok, {"statistics": (ones,)}),
        (ValueError, "statistics\\[1\\]: expected torch.float64 \\[5\\]", ok,
         {"statistics": (ones, ones[:4])}),
        (ValueError, "dropout_p: expected", ok, {"dropout_p": 1.0}),
        (ValueError, "seed: expected int64 \\[1\\]", ok, {"dropout_p": 0.5, "seed": seed[0]}),
        (TypeError, "seed: expected a tensor", ok, {"dropout_p": 0.5, "seed": 1}),
        (TypeError, "counts: expected a tensor", ok, {"counts": [1.0] * 5}),
        (ValueError, "counts: expected \\(5,\\) torch.float64", ok, {"counts": ones[:4]}),
        (ValueError, "counts: expected .* got \\(5,\\) torch.float32", ok,
         {"counts": ones.float()}),
        (ValueError, "counts: expected .* on cpu, got .* on meta", ok,
         {"counts": ones.to("meta")}),
        (ValueError, "counts: expected no gradient", ok,
         {"counts": ones.clone().requires_grad_()}),
        (ValueError, "counts: expected positive", ok, {"counts": 0 * ones}),
        (ValueError, "dropout_p: expected 0 with counts", ok, {"counts": ones, "dropout_p": 0.5}),
        (ValueError, "backend: expected 'auto'", ok, {"backend": "cuda"}),
        (ValueError, "backend: 'triton' takes float32", ok, {"backend": "triton"}),
        (ValueError, "backend: 'triton' needs CUDA tensors, got cpu; 'auto' falls back", single,
         {"backend": "triton"}),
    ]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "args", "options"), refused())
def test_refusals(error, message: str, args: tuple, options: dict) -> None:
    with pytest.raises(error, match=message):
        absorbed_attention(*args, **options)
    if not options.keys() & {"dropout_p", "seed", "counts"}:
        with pytest.raises(error, match=message):
            absorbed_weights(*args, **options)


def test_tokens_behind_the_last_bag_belong_to_none() -> None:
    """Their values change no result and no gradient; static tensors of CUDA graphs have them."""
    queries, x = draw([4, 0, 3, 2])
    queries = queries[:3].requires_grad_()
    offsets = offsets_of([4, 0, 3])

    def outcome(count: int) -> list[Tensor]:
        pooled, mass = absorbed_attention(queries, x[:count], offsets)
        return [pooled, mass, *torch.autograd.grad(pooled.square().sum() + mass.sum(), queries)]

    for padded, exact in zip(outcome(9), outcome(7), strict=True):
        assert torch.equal(padded, exact)
