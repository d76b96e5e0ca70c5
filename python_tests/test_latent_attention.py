"""latent_attention: ragged bags give what dense ones give; weights, dropout, error messages."""

import itertools
import math
from unittest import mock

import motet
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from motet.kernels import ragged as cuts
from motet.kernels.backends import Backend
from motet.kernels.dtypes import wide
from motet.kernels.latent_attention import cpu, operator
from motet.kernels.latent_attention.operator import latent_attention_kv, latent_self_attention
from motet.kernels.latent_attention.reference import latent_attention_reference
from torch import Tensor
from torch.library import opcheck

from .comparison import EXACT, FLOOR, assert_as_good_as, with_gradients
from .conftest import (
    assert_compiles,
    assert_differentiable_once,
    assert_leaves_no_trace,
    offsets_of,
    views_of,
)

latent_attention = motet.kernels.latent_attention
attention_weights = motet.kernels.attention_weights
WIDE = {"dtype": torch.float64}


def packed(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **options) -> Tensor:
    """Run latent_attention with K and V in one tensor."""
    options.setdefault("scale", q.shape[-1] ** -0.5)
    return latent_attention_kv(q, torch.stack([k, v], 1), offsets, **options)[0]


FORMS = {"apart": latent_attention, "in one tensor": packed}
LENGTHS = {
    "three bags": [4, 2, 3],
    "empty and one-key bags": [0, 1, 5, 0, 1],
    "above the chunks": [17, 16, 15, 33],
    "all empty": [0, 0],
    "no bag": [],
    "one bag": [7],
}


def ragged(lengths: list[int], dtype: torch.dtype = torch.float64, *, width: int = 5):
    """Return q, k and v, 3 heads and 4 latents, as views of projections."""
    q = torch.randn(len(lengths), 4, 3, width).transpose(1, 2).to(dtype)
    kv = torch.randn(sum(lengths), 2, 3, width).to(dtype)
    return q, kv[:, 0], kv[:, 1]


def counts_of(tokens: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return counts of 1 to 4 in the dtype that goes with tensors of `dtype`."""
    return torch.randint(1, 5, (tokens,)).to(wide(dtype))


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "KEYS", 8)


def literal(q, k, v, scale):
    """Compute attention one query at a time, in Python."""
    out = torch.zeros_like(q)
    for b, h, c in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        scores = [math.exp(scale * float(q[b, h, c] @ key)) for key in k[b, h]]
        for score, value in zip(scores, v[b, h], strict=True):
            out[b, h, c] += score / sum(scores) * value
    return out


def test_equals_the_literal_sum() -> None:
    q = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    k, v = (torch.randn(2, 3, 6, 5, dtype=torch.float64) for _ in range(2))
    assert torch.allclose(latent_attention(q, k, v), literal(q, k, v, 5**-0.5), atol=1e-12)
    assert torch.allclose(latent_attention(q, k, v, scale=0.3), literal(q, k, v, 0.3), atol=1e-12)


@pytest.mark.usefixtures("_poisoned", "_small_chunks")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_the_reference(lengths: list[int], form: str) -> None:
    args, offsets = ragged(lengths), offsets_of(lengths)
    for options in ({}, {"scale": 0.3}, {"scale": 4.0}):
        actual, expected = (
            with_gradients(lambda *t, f=f, o=options: f(*t, offsets, **o))(*args)
            for f in (FORMS[form], latent_attention_reference)
        )
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.usefixtures("_poisoned", "_small_chunks")
@pytest.mark.parametrize(
    "shape",
    [
        *((2, 3, 4, 5, 17), (1, 1, 1, 1, 1), (2, 1, 3, 8, 8)),
        *((0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 5, 0)),
    ],
)
def test_dense_equals_the_reference(shape: tuple[int, ...]) -> None:
    batch, heads, latents, width, keys = shape
    q = torch.randn(batch, heads, latents, width, **WIDE)
    k, v = (torch.randn(batch, heads, keys, width, **WIDE) for _ in range(2))
    actual, expected = (
        with_gradients(f)(q, k, v) for f in (latent_attention, latent_attention_reference)
    )
    torch.testing.assert_close(actual, expected, **EXACT)


def test_heads_without_width_need_a_scale() -> None:
    q, k, v = ragged([2, 3], width=0)
    out = latent_attention(q, k, v, offsets_of([2, 3]), scale=1.0)
    assert out.shape == (2, 3, 4, 0)
    for call in (lambda: latent_attention(q, k, v, offsets_of([2, 3])),
                 lambda: attention_weights(q, k, offsets_of([2, 3]))):  # fmt: skip
        with pytest.raises(ValueError, match="q: expected .*E"):
            call()


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("common", "scale"), [(0.0, 0.1), (0.0, 1.0), (0.0, 5.0), (1.0, 0.3), (10.0, 0.1), (10.0, 1.0)]
)
@pytest.mark.parametrize("form", FORMS)
def test_is_as_good_as_torch(form: str, common: float, scale: float, dtype: torch.dtype) -> None:
    """Errors stay as small as torch's, also if all keys share an offset, which softmax ignores."""
    lengths = [40, 1, 0, 23]
    offsets = offsets_of(lengths)
    q, k, v = ragged(lengths, width=16)
    assert_as_good_as(
        with_gradients(lambda *t: FORMS[form](*t, offsets, scale=scale)),
        with_gradients(lambda *t: latent_attention_reference(*t, offsets, scale=scale)),
        *(t.to(dtype) for t in (q, k + common, v + common)),
    )


@pytest.mark.usefixtures("_small_chunks")
def test_huge_scores_do_not_overflow() -> None:
    """With scores from 1e4, rising from chunk to chunk, the highest wins and all is finite."""
    k = torch.arange(40.0)[:, None, None].expand(40, 1, 1) * 1e3
    v = torch.arange(40.0)[:, None, None].clone()
    for sign, winner in ((1.0, 39.0), (-1.0, 0.0)):
        q = torch.full((1, 1, 1, 1), sign)
        outcome = with_gradients(lambda *t: latent_attention(*t, offsets_of([40]), scale=1.0))(
            q, k, v
        )
        assert outcome[0].item() == winner
        assert all(part.isfinite().all() for part in outcome)


@given(
    st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 15, 16, 17, 30]), max_size=5),
    st.sampled_from([3, 4, 16]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from(sorted(FORMS)),
    st.sampled_from([0, 8, 512]),
    st.booleans(),
)
@example([], 4, torch.float32, "apart", 512, True)
@example([9] * 5, 16, torch.float32, "in one tensor", 512, False)
@example([9] * 5, 16, torch.float32, "in one tensor", 512, True)
@example([9] * 5, 16, torch.float32, "in one tensor", 8, True)
@example([0, 1, 1, 0, 1, 17, 17], 3, torch.bfloat16, "apart", 512, False)
def test_a_bag_has_the_same_bits_in_any_batch(
    lengths: list[int], width: int, dtype: torch.dtype, form: str, together: int, counted: bool
) -> None:
    """This holds for bags cut into chunks of keys and for short bags multiplied together."""
    torch.manual_seed(sum(lengths))
    q, k, v = ragged(lengths, dtype, width=width)
    offsets = offsets_of(lengths)
    counts = counts_of(sum(lengths), dtype) if counted else None

    def run(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, bag: slice) -> list[Tensor]:
        args = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = FORMS[form](*args, offsets, counts=None if counts is None else counts[bag])
        mean = attention_weights(*args[:2], offsets, reduce="mean")
        return [out.detach(), *torch.autograd.grad(out.sum(), args), mean]

    with (
        mock.patch.object(cpu, "KEYS", 8),
        mock.patch.object(cuts, "TOGETHER", together),
    ):
        out, dq, dk, dv, mean = run(q, k, v, offsets, slice(None))
        for b, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
            bag = slice(start, stop)
            alone = run(q[b, None], k[bag], v[bag], offsets_of([stop - start]), bag)
            batched = (out[b, None], dq[b, None], dk[bag], dv[bag], mean[bag])
            assert all(map(torch.equal, alone, batched))
            own_k, own_v = (t[bag].transpose(0, 1)[None] for t in (k, v))
            own_counts = None if counts is None else counts[None, bag]
            dense = latent_attention(q[b, None], own_k, own_v, counts=own_counts)
            assert torch.equal(dense, out[b, None].to(dtype))  # K and V in one: not rounded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("lengths", "heads", "latents", "width"),
    [
        ([65, 65, 0], 3, 25, 5),
        ([13, 13, 7], 1, 25, 27),
        ([63, 63], 1, 3, 27),
        ([200, 200, 1], 8, 17, 63),
        ([600, 777, 600], 1, 17, 27),
    ],
)
def test_a_bag_does_not_see_where_it_lies(
    lengths: list[int], heads: int, latents: int, width: int, dtype: torch.dtype
) -> None:
    """The widths make matrices begin at any byte, since a product may depend on the alignment."""
    q = torch.randn(len(lengths), heads, latents, width, dtype=dtype)
    k, v = (torch.randn(sum(lengths), heads, width, dtype=dtype) for _ in range(2))

    def run(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> list[Tensor]:
        args = [t.clone().requires_grad_() for t in (q, k, v)]
        out = latent_attention(*args, offsets=offsets_of(lengths))
        weights = [
            attention_weights(q, k, offsets_of(lengths), reduce=reduce) for reduce in (None, "mean")
        ]
        return [out.detach(), *torch.autograd.grad(out.sum(), args), *weights]

    out, dq, dk, dv, weights, mean = run(q, k, v, lengths)
    for b, (start, stop) in enumerate(itertools.pairwise(offsets_of(lengths).tolist())):
        bag = slice(start, stop)
        alone = run(q[b, None], k[bag], v[bag], lengths[b : b + 1])
        batched = (out[b, None], dq[b, None], dk[bag], dv[bag], weights[bag], mean[bag])
        assert all(map(torch.equal, alone, batched))


def test_the_size_of_chunks_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [30, 0, 17, 17, 3]
    args, offsets = ragged(lengths), offsets_of(lengths)
    outcomes = []
    for keys, together in itertools.product((1, 7, 16, 30, 8192), (0, 17, 512)):
        monkeypatch.setattr(cpu, "KEYS", keys)
        monkeypatch.setattr(cuts, "TOGETHER", together)
        outcomes.append(with_gradients(lambda *t: latent_attention(*t, offsets))(*args))
    for outcome in outcomes:
        torch.testing.assert_close(outcome, outcomes[0], **EXACT)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str, dropout_p: float) -> None:
    """A fixed seed fixes the dropout mask, so that gradcheck can compare finite differences."""
    args = [t.detach().requires_grad_() for t in ragged([2, 0, 3])]
    offsets, seed = offsets_of([2, 0, 3]), torch.tensor([5])
    with mock.patch.object(cpu, "KEYS", 2):
        assert torch.autograd.gradcheck(
            lambda *t: FORMS[form](
                *t, offsets, dropout_p=dropout_p, seed=seed if dropout_p else None
            ),
            args,
        )


def test_tokens_behind_the_last_bag_belong_to_none() -> None:
    q, k, v = ragged([4, 0, 9])
    kv, offsets = torch.stack([k, v], 1), offsets_of([4, 0, 9])
    longer = torch.cat([kv, torch.full_like(kv[:3], torch.nan)])
    run = with_gradients(lambda q, kv: latent_attention_kv(q, kv, offsets, scale=0.3)[0])
    out, dq, dkv = run(q, kv)
    for actual, expected in zip(run(q, longer), (out, dq, dkv), strict=True):
        assert torch.equal(actual[: len(expected)], expected)
    with pytest.raises(ValueError, match="offsets: expected to rise from 0 to 12"):
        latent_attention_kv(q, kv[:-1], offsets, scale=0.3)
    with pytest.raises(ValueError, match="offsets: expected to rise from 0 to 16"):
        latent_attention(q, longer[:, 0], longer[:, 1], offsets)


@pytest.mark.parametrize("lengths", [[4, 0, 9], [0, 0], []], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_shared_queries_and_padded_keys(lengths: list[int], dropout_p: float) -> None:
    """Queries of batch size 1 serve every bag, and keys may be padded with zeros to a wider row."""
    _, k, v = ragged(lengths)
    q, kv = torch.randn(1, 4, 3, 5, **WIDE).transpose(1, 2), torch.stack([k, v], 1)
    options = {"scale": 0.3, "dropout_p": dropout_p}
    options["seed"] = torch.tensor([5]) if dropout_p else None

    def padded(q: Tensor, kv: Tensor) -> Tensor:
        kv = torch.nn.functional.pad(kv, (0, 11))
        return latent_attention_kv(q, kv, offsets_of(lengths), **options)[0]

    def plain(q: Tensor, kv: Tensor) -> Tensor:
        q = q.expand(len(lengths), -1, -1, -1)
        return latent_attention_kv(q, kv, offsets_of(lengths), **options)[0]

    padded_results, plain_results = with_gradients(padded)(q, kv), with_gradients(plain)(q, kv)
    for actual, expected in zip(padded_results, plain_results, strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)
    with pytest.raises(ValueError, match="kv: expected rows of 5 numbers, or of 16, got"):
        latent_attention_kv(q, kv.repeat(1, 1, 1, 2), offsets_of(lengths), **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_latents_attend_to_themselves(backend: Backend, dropout_p: float, monkeypatch) -> None:
    monkeypatch.setattr(operator, "compiled", lambda function: function)
    qkv = torch.randn(2, 7, 3, 4, 5)
    seed = torch.tensor([5]) if dropout_p else None

    def itself(x: Tensor) -> Tensor:
        return latent_self_attention(x, scale=0.3, dropout_p=dropout_p, seed=seed, backend=backend)

    def apart(x: Tensor) -> Tensor:
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind()
        return latent_attention(q, k, v, scale=0.3, dropout_p=dropout_p, seed=seed, backend=backend)

    actual, expected = with_gradients(itself)(qkv), with_gradients(apart)(qkv)
    assert all(map(torch.equal, actual, expected))
    assert latent_self_attention(qkv.bfloat16(), scale=0.3).dtype == torch.float32


def test_log_sum_exp() -> None:
    q, k, v = ragged([4, 0, 9])
    _, lse = latent_attention_kv(q, torch.stack([k, v], 1), offsets_of([4, 0, 9]), scale=0.3)
    for b, bag in enumerate((slice(0, 4), slice(4, 4), slice(4, 13))):
        scores = 0.3 * q[b] @ k[bag].movedim(0, 1).mT
        torch.testing.assert_close(lse[b], scores.logsumexp(-1), **EXACT)


def repeated(counts: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of each token repeated as often as its count, and the new offsets."""
    copies = counts.long()
    index = torch.arange(len(counts)).repeat_interleave(copies)
    return index, torch.cat([copies.new_zeros(1), copies.cumsum(0)])[offsets]


HOW = {
    **FORMS,
    "compiled": lambda *t, **options: latent_attention(*t, **options, backend="compile"),
    "reference": latent_attention_reference,
}
SAME = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.usefixtures("_poisoned", "_small_chunks")
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_a_count_is_so_many_equal_keys(lengths: list[int], how: str, monkeypatch) -> None:
    """A key with count n gives the output of n equal keys, and the sum of their gradients."""
    monkeypatch.setattr(operator, "compiled", lambda function: function)
    args, offsets, counts = ragged(lengths), offsets_of(lengths), counts_of(sum(lengths))
    index, longer = repeated(counts, offsets)
    actual, expected = (
        with_gradients(function)(*args)
        for function in (
            lambda *t: HOW[how](*t, offsets, counts=counts),
            lambda q, k, v: latent_attention_reference(q, k[index], v[index], longer),
        )
    )
    torch.testing.assert_close(actual, expected, **SAME)


@pytest.mark.usefixtures("_poisoned", "_small_chunks")
@pytest.mark.parametrize("how", [how for how in HOW if how != "in one tensor"])
@pytest.mark.parametrize(("keys", "together"), [(1, 512), (5, 512), (19, 512), (19, 0)])
def test_counts_of_dense_bags(
    keys: int, together: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuts, "TOGETHER", together)
    monkeypatch.setattr(operator, "compiled", lambda function: function)
    args = [torch.randn(3, 2, n, 5, **WIDE) for n in (4, keys, keys)]
    counts = counts_of(3 * keys).view(3, keys)
    index, longer = repeated(counts.flatten(), offsets_of([keys] * 3))

    def literal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.transpose(1, 2).flatten(0, 1)[index] for t in (k, v))
        return latent_attention_reference(q, k, v, longer)

    actual = with_gradients(lambda *t: HOW[how](*t, counts=counts))(*args)
    torch.testing.assert_close(actual, with_gradients(literal)(*args), **SAME)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("form", FORMS)
def test_counts_of_1_change_no_bit(form: str, dtype: torch.dtype) -> None:
    lengths = [9, 9, 0, 17, 1]
    args, offsets = ragged(lengths, dtype), offsets_of(lengths)
    ones = torch.ones(sum(lengths), dtype=wide(dtype))
    counted, plain = (
        with_gradients(lambda *t, c=counts: FORMS[form](*t, offsets, counts=c))(*args)
        for counts in (ones, None)
    )
    assert all(map(torch.equal, counted, plain))


@pytest.mark.parametrize("tokens", [1, 2, 9, 10])
def test_half_a_spectrum_is_enough(tokens: int) -> None:
    """Rows k and N - k of the real part of a real bag's spectrum are equal: counts replace one."""
    spectrum = torch.fft.fft(torch.randn(tokens, 15, **WIDE), dim=0).real
    rows = tokens // 2 + 1
    counts = torch.full((rows,), 2.0, **WIDE)
    counts[0] = 1
    counts[tokens - tokens // 2 :] = 1  # N / 2 of an even N is its own mirror image
    full, half = (spectrum[:n].view(n, 3, 5) for n in (tokens, rows))
    q = torch.randn(1, 3, 4, 5, **WIDE)
    actual = latent_attention(q, half, half, offsets_of([rows]), counts=counts)
    expected = latent_attention(q, full, full, offsets_of([tokens]))
    torch.testing.assert_close(actual, expected, **SAME)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
@pytest.mark.parametrize("form", FORMS)
def test_counts_of_any_size_are_as_good_as_torch(
    form: str, size: float, dtype: torch.dtype
) -> None:
    lengths = [40, 1, 0, 23]
    offsets, counts = offsets_of(lengths), (size * (1 + 3 * torch.rand(64))).double()

    def run(function, *args: Tensor) -> Tensor:
        converted = counts.float().to(wide(args[0].dtype))
        return function(*args, offsets, counts=converted, scale=0.3)

    assert_as_good_as(
        with_gradients(lambda *t: run(FORMS[form], *t)),
        with_gradients(lambda *t: run(latent_attention_reference, *t)),
        *ragged(lengths, dtype, width=16),
    )


@pytest.mark.parametrize("form", FORMS)
def test_gradients_with_counts(form: str) -> None:
    args = [t.detach().requires_grad_() for t in ragged([2, 0, 3])]
    offsets, counts = offsets_of([2, 0, 3]), torch.tensor([1.0, 2.5, 3.0, 0.3, 1.0], **WIDE)
    with mock.patch.object(cpu, "KEYS", 2):
        assert torch.autograd.gradcheck(lambda *t: FORMS[form](*t, offsets, counts=counts), args)


def test_log_sum_exp_with_counts() -> None:
    q, k, v = ragged([4, 0, 9])
    counts, kv = counts_of(13), torch.stack([k, v], 1)
    _, lse = latent_attention_kv(q, kv, offsets_of([4, 0, 9]), counts=counts, scale=0.3)
    for b, bag in enumerate((slice(0, 4), slice(4, 4), slice(4, 13))):
        scores = 0.3 * q[b] @ k[bag].movedim(0, 1).mT
        expected = (counts[bag] * scores.exp()).sum(-1).log()
        torch.testing.assert_close(lse[b], expected, **EXACT)


@pytest.mark.parametrize("dense", [False, True])
def test_layouts_of_counts(dense: bool) -> None:
    lengths = [9, 9]
    q, k, v = ragged(lengths)
    offsets, shape = offsets_of(lengths), (18,)
    if dense:
        k, v = (t.view(2, 9, 3, 5).transpose(1, 2) for t in (k, v))
        offsets, shape = None, (2, 9)
    counts = counts_of(9).repeat(2).view(shape)
    expected = latent_attention(q, k, v, offsets, counts=counts)
    views = [torch.stack([counts, counts + 1], -1)[..., 0]]
    if dense:
        views += [counts.t().contiguous().t(), counts[:1].expand(2, -1)]
    for view in views:
        assert not view.is_contiguous()
        assert torch.equal(latent_attention(q, k, v, offsets, counts=view), expected)


HEADS, LATENTS, TOKENS, P = 3, 4, 400, 0.3


def kept(
    lengths: list[int], seed: int = 5, dropout_p: float = P, form: str = "apart"
) -> list[Tensor]:
    """Return the mask [H, C, N_b] of each bag, read off with equal scores and one-hot values."""
    masks, longest = [], max(lengths)
    q = torch.zeros(len(lengths), HEADS, LATENTS, longest)
    k = torch.zeros(sum(lengths), HEADS, longest)
    v = torch.cat([torch.eye(longest)[:n] for n in lengths])[:, None].expand(-1, HEADS, -1)
    out = FORMS[form](q, k, v, offsets_of(lengths), dropout_p=dropout_p, seed=torch.tensor([seed]))
    for masked, count in zip(out, lengths, strict=True):
        scaled = masked[..., :count] * count * (1 - dropout_p)
        assert ((scaled - scaled.round()).abs() < 1e-5).all()
        masks.append(scaled.round().bool())
    return masks


def test_every_weight_is_kept_with_the_same_probability() -> None:
    """Each bag, head, latent and token is kept within 5 standard deviations of a binomial."""
    bags = torch.stack(kept([TOKENS] * 6)).double()  # [B, H, C, N]
    for axes in ([], [0], [1], [2], [3], [0, 1], [0, 1, 2], [0, 2], [1, 2]):
        others = [axis for axis in range(4) if axis not in axes]
        count = math.prod(bags.shape[axis] for axis in others)
        deviation = math.sqrt(P * (1 - P) / count)
        assert (bags.mean(others) - (1 - P)).abs().max() < 5 * deviation, axes


def test_masks_of_bags_heads_latents_and_seeds_are_independent() -> None:
    masks = torch.stack(kept([TOKENS] * 3) + kept([TOKENS] * 3, seed=6)[2:]).flatten(0, 2).double()
    agreement = (masks @ masks.T + (1 - masks) @ (1 - masks).T) / TOKENS
    expected = P**2 + (1 - P) ** 2
    apart = agreement[~torch.eye(len(masks)).bool()]
    assert (apart - expected).abs().max() < 6 * math.sqrt(expected * (1 - expected) / TOKENS)


@pytest.mark.parametrize("form", FORMS)
def test_the_mask_depends_on_the_seed_and_not_on_chunks_or_other_bags(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, middle, last = kept([9, 40, 3], form=form)
    assert torch.equal(middle, kept([50, 40], form=form)[1])
    assert torch.equal(first, kept([9], form=form)[0])
    assert not torch.equal(middle, kept([9, 40, 3], seed=6, form=form)[1])
    assert torch.equal(last, kept([0, 0, 3], form=form)[2])
    monkeypatch.setattr(cpu, "KEYS", 8)
    assert all(map(torch.equal, kept([9, 40, 3], form=form), (first, middle, last)))


def test_dropout_keeps_the_mean() -> None:
    q, k, v = ragged([200] * 2)
    offsets = offsets_of([200] * 2)
    draws = torch.stack([latent_attention(q, k, v, offsets, dropout_p=0.4) for _ in range(300)])
    expected = latent_attention(q, k, v, offsets)
    error = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    assert error.abs().max() < 5
    assert draws.std(0).min() > 0


@pytest.mark.parametrize("backend", ["auto", "eager", "compile"])
@pytest.mark.parametrize("form", FORMS)
def test_torchs_generator_draws_the_seed(form: str, backend: str, monkeypatch) -> None:
    # The same function, without compiling it.
    monkeypatch.setattr(operator, "compiled", lambda function: function)
    args, offsets = ragged([40, 0, 20]), offsets_of([40, 0, 20])

    def run(dropout_p: float = 0.5) -> Tensor:
        return FORMS[form](*args, offsets, dropout_p=dropout_p, backend=backend)

    torch.manual_seed(3)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    state = torch.get_rng_state()
    assert torch.equal(run(0.0), run(0.0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ["auto", "eager", "compile"])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_seed_is_the_same_mask(form: str, backend: str, monkeypatch) -> None:
    monkeypatch.setattr(operator, "compiled", lambda function: function)
    args, offsets = ragged([40, 0, 20]), offsets_of([40, 0, 20])
    state = torch.get_rng_state()

    def run(seed: int) -> Tensor:
        seeds = torch.tensor([seed])
        return FORMS[form](*args, offsets, dropout_p=0.5, seed=seeds, backend=backend)

    for seed in (0, 1, -1, 2**62, 2**63 - 1):
        assert torch.equal(run(seed), run(seed))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.sampled
@pytest.mark.parametrize("lengths", [[4, 0, 3], [0, 0], []], ids=str)
@pytest.mark.parametrize("option", [None, "dropout", "counts"])
def test_registration(lengths: list[int], option: str | None) -> None:
    q, k, v = (t.detach() for t in ragged(lengths))
    kv, offsets = torch.stack([k, v], 1), offsets_of(lengths)
    counts = counts_of(sum(lengths)) if option == "counts" else None
    options = (0.5, *((0.5, torch.tensor([5])) if option == "dropout" else (0.0, None)), "auto")
    operators = torch.ops.motet
    for op, tokens, more in (
        ("latent_attention", (k, v), ()),
        ("latent_attention_kv", (kv,), (None,)),
    ):
        args = [t.clone().requires_grad_() for t in (q, *tokens)]
        opcheck(getattr(operators, op), (*args, offsets, counts, *options, *more))
        made = getattr(operators, op)(q, *tokens, offsets, counts, *options, *more)
        backward = (torch.randn_like(q), q, *tokens, offsets, counts, *made, *options)
        opcheck(getattr(operators, f"{op}_backward"), (*backward, *map(bool, more)))
    q = q.new_zeros(4, 3, 5).transpose(0, 1)[None].clone().requires_grad_()
    kv = torch.nn.functional.pad(kv, (0, 11)).requires_grad_()
    opcheck(operators.latent_attention_kv, (q, kv, offsets, counts, *options, None))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_registration_of_self_attention(dropout_p: float) -> None:
    qkv, operators = torch.randn(2, 4, 3, 2, 5), torch.ops.motet
    options = (0.5, dropout_p, torch.tensor([5]) if dropout_p else None, "auto")
    opcheck(operators.latent_self_attention, (qkv.clone().requires_grad_(), *options))
    made = operators.latent_self_attention(qkv, *options)
    opcheck(operators.latent_self_attention_backward, (made[0], qkv, *made, *options))


def test_registration_dense() -> None:
    q, k, v = (torch.randn(2, 3, n, 5, requires_grad=True) for n in (4, 7, 7))
    for counts in (None, counts_of(14, torch.float32).view(2, 7)):
        opcheck(torch.ops.motet.latent_attention, (q, k, v, None, counts, 0.5, 0.0, None, "auto"))


@pytest.mark.sampled
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole_for_any_size(form: str, counted: bool) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        offsets = torch.arange(3) * (len(k) // 2)
        counts = torch.arange(1, len(k) + 1, **WIDE) if counted else None
        return 2 * FORMS[form](q, k, v, offsets, counts=counts)

    assert_compiles(run, *(ragged([n, n]) for n in (6, 9)))


def test_the_compiled_backend() -> None:
    args = [torch.randn(2, 3, n, 5, **WIDE) for n in (4, 9, 9)]
    actual = with_gradients(lambda *t: latent_attention(*t, backend="compile"))(*args)
    torch.testing.assert_close(actual, with_gradients(latent_attention_reference)(*args), **EXACT)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_what_the_compiled_backend_computes(lengths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "compiled", lambda function: function)
    args, offsets = ragged(lengths), offsets_of(lengths)
    expected = with_gradients(lambda *t: latent_attention_reference(*t, offsets))(*args)
    for form in FORMS.values():
        actual = with_gradients(lambda *t, f=form: f(*t, offsets, backend="compile"))(*args)
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_there_is_one_derivative(form: str) -> None:
    assert_differentiable_once(lambda *t: FORMS[form](*t, offsets_of([2, 3])), *ragged([2, 3]))


@pytest.mark.parametrize("form", FORMS)
def test_no_state_survives_a_call(form: str) -> None:
    lengths = [4, 0, 3]
    assert_leaves_no_trace(lambda *t: FORMS[form](*t, offsets_of(lengths)), *ragged(lengths))
    seed = torch.tensor([5])
    assert_leaves_no_trace(
        lambda *t: FORMS[form](*t, offsets_of(lengths), dropout_p=0.5, seed=seed), *ragged(lengths)
    )
    assert seed.item() == 5


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("dense", [False, True])
def test_layouts_of_every_argument(which: int, dense: bool) -> None:
    offsets = None if dense else offsets_of([9, 0, 10])
    args = [torch.randn(3, 3, n, 5, **WIDE) for n in (4, 9, 9)] if dense else ragged([9, 0, 10])
    compute, compute_expected = (
        with_gradients(lambda *t, f=f: f(*t, offsets))
        for f in (latent_attention, latent_attention_reference)
    )
    expected = compute_expected(*args)
    for view in views_of(args[which]).values():
        torch.testing.assert_close(
            compute(*args[:which], view, *args[which + 1 :]), expected, **EXACT
        )  # fmt: skip


@pytest.mark.parametrize("dense", [False, True])
def test_expanded_arguments(dense: bool) -> None:
    shapes = [(3, 3, n, 5) for n in (4, 9, 9)] if dense else [(3, 3, 4, 5), (19, 3, 5), (19, 3, 5)]
    args = [torch.randn(5, **WIDE).expand(shape) for shape in shapes]
    offsets = None if dense else offsets_of([9, 0, 10])
    actual, expected = (
        with_gradients(lambda *t, f=f: f(*t, offsets))(*args)
        for f in (latent_attention, latent_attention_reference)
    )
    torch.testing.assert_close(actual, expected, **EXACT)


def literal_weights(q: Tensor, k: Tensor, offsets: Tensor | None, scale: float) -> Tensor:
    if offsets is None:
        return (scale * q @ k.mT).softmax(-1)
    bags = [slice(*bag) for bag in itertools.pairwise(offsets.tolist())]
    maps = [(scale * q[b] @ k[bag].movedim(0, 1).mT).softmax(-1) for b, bag in enumerate(bags)]
    return torch.cat([torch.zeros(*q.shape[1:3], 0, dtype=q.dtype), *maps], -1).permute(2, 0, 1)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("dtype", FLOOR)
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), (2, 17), (2, 0), (0, 9)], ids=str)
def test_attention_weights(lengths: list[int] | tuple[int, int], dtype: torch.dtype) -> None:
    """A list has the lengths of ragged bags; a pair is the number and length of dense bags."""
    if isinstance(lengths, tuple):
        offsets = None
        q, k = (torch.randn(lengths[0], 3, n, 5).to(dtype) for n in (4, lengths[1]))
    else:
        offsets = offsets_of(lengths)
        q, k, _ = ragged(lengths, dtype)
    lse = torch.ops.motet.latent_attention(q, k, k, offsets, None, 0.7, 0.0, None, "eager")[1]
    exact = literal_weights(q.double(), k.double(), offsets, 0.7)
    close = {"rtol": 0, "atol": 4 * FLOOR[dtype]}
    for own_lse, backend in itertools.product((None, lse), ("auto", "eager", "compile")):
        options = {"scale": 0.7, "lse": own_lse, "backend": backend}
        full = attention_weights(q, k, offsets, **options)
        assert full.dtype == dtype
        torch.testing.assert_close(full.double(), exact, **close)
        mean = attention_weights(q, k, offsets, reduce="mean", **options)
        assert mean.dtype == lse.dtype
        torch.testing.assert_close(mean.double(), exact.mean((1, 2)), **close)


@pytest.mark.usefixtures("_small_chunks")
def test_attention_weights_sum_to_1_over_the_tokens_of_a_bag() -> None:
    lengths = [20, 0, 1, 9]
    q, k, _ = ragged(lengths)
    for reduce in (None, "mean"):
        weights = attention_weights(q, k, offsets_of(lengths), reduce=reduce)
        for bag in weights.split(lengths):
            expected = torch.full_like(bag[0], 1) if len(bag) else bag.sum(0)
            torch.testing.assert_close(bag.sum(0), expected, **EXACT)


def test_attention_weights_have_a_gradient() -> None:
    q, k, _ = (t.detach().requires_grad_() for t in ragged([2, 0, 3]))
    assert torch.autograd.gradcheck(lambda *t: attention_weights(*t, offsets_of([2, 0, 3])), (q, k))
    dense = k.detach()[None, :5].transpose(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(attention_weights, (q.detach()[:1].requires_grad_(), dense))
    assert not attention_weights(q, k, offsets_of([2, 0, 3]), reduce="mean").requires_grad


def refused() -> list[tuple[type[Exception], str, tuple, dict]]:
    q, k = torch.randn(2, 2, 3, 4), torch.randn(5, 2, 4)
    offsets, seed = torch.tensor([0, 2, 5]), torch.tensor([1])
    rag, ones = (q, k, k, offsets), torch.ones(5)
    dense = (q, *[torch.randn(2, 2, 7, 4)] * 2)
    half = (*(t.half() for t in rag[:3]), offsets)
    return [
        (ValueError, "q: expected \\[B, H, C, E\\]", (q[0], k, k, offsets), {}),
        (ValueError, "q: expected a floating-point", (q.long(), k, k, offsets), {}),
        (ValueError, "k: expected \\[T, 2, 4\\]", (q, k[:, :1], k, offsets), {}),
        (ValueError, "k: expected \\[T, 2, 4\\]", (q, k[None], k, offsets), {}),
        (ValueError, "k: expected \\[2, 2, N, 4\\]", (q, k, k), {}),
        (ValueError, "v: expected the shape of k", (q, k, k[:3], offsets), {}),
        (ValueError, "v: expected the shape of k", (q, k, k[..., :3], offsets), {}),
        (ValueError, "k: expected torch.float32 on cpu as q", (q, k.double(), k.double(), offsets),
         {}),
        (ValueError, "v: expected torch.float32 on cpu as q", (q, k, k.half(), offsets), {}),
        (ValueError, "k: expected torch.float32 on cpu as q", (q, k.to("meta"), k, offsets), {}),
        (ValueError, "v: expected torch.float32 on cpu as q", (q, k, k.to("meta"), offsets), {}),
        (ValueError, "offsets: expected int64 \\[3\\]", (q, k, k, offsets[:2]), {}),
        (ValueError, "offsets: expected int64 \\[3\\]", (q, k, k, offsets.int()), {}),
        (ValueError, "offsets: expected int64 \\[3\\]", (q, k, k, offsets[None]), {}),
        (ValueError, "offsets: expected cpu", (q, k, k, offsets.to("meta")), {}),
        (ValueError, "offsets: expected to rise", (q, k, k, torch.tensor([0, 2, 4])), {}),
        (ValueError, "offsets: expected to rise", (q, k, k, torch.tensor([0, 6, 5])), {}),
        (ValueError, "offsets: expected to rise", (q, k, k, torch.tensor([1, 2, 5])), {}),
        (ValueError, "offsets: expected to rise", (q, k, k, torch.tensor([0, 2, 6])), {}),
        (TypeError, "q: expected a tensor", (None, k, k, offsets), {}),
        (TypeError, "k: expected a tensor", (q, [1.0], k, offsets), {}),
        (TypeError, "v: expected a tensor", (q, k, [1.0], offsets), {}),
        (TypeError, "offsets: expected a tensor", (q, k, k, [0, 2, 5]), {}),
        (ValueError, "dropout_p: expected", rag, {"dropout_p": 1.0}),
        (ValueError, "dropout_p: expected", rag, {"dropout_p": -0.1}),
        (ValueError, "dropout_p: expected", rag, {"dropout_p": float("nan")}),
        (ValueError, "dropout_p: expected", rag, {"dropout_p": "half"}),
        (ValueError, "seed: expected int64 \\[1\\]", rag, {"dropout_p": 0.5, "seed": seed.int()}),
        (ValueError, "seed: expected int64 \\[1\\]", rag, {"dropout_p": 0.5, "seed": seed[0]}),
        (ValueError, "seed: expected int64 \\[1\\] on cpu", rag,
         {"dropout_p": 0.5, "seed": seed.to("meta")}),
        (TypeError, "seed: expected a tensor", rag, {"dropout_p": 0.5, "seed": 1}),
        (TypeError, "counts: expected a tensor, got list", rag, {"counts": [1.0] * 5}),
        (ValueError, "counts: expected \\(5,\\) torch.float32 on cpu, got \\(4,\\)", rag,
         {"counts": ones[:4]}),
        (ValueError, "counts: expected \\(5,\\) .* got \\(1, 5\\)", rag, {"counts": ones[None]}),
        (ValueError, "counts: expected \\(2, 7\\) .* got \\(5,\\)", dense, {"counts": ones}),
        (ValueError, "counts: expected .* got \\(5,\\) torch.float64", rag,
         {"counts": ones.double()}),
        (ValueError, "counts: expected .* got \\(5,\\) torch.int64", rag, {"counts": ones.long()}),
        (ValueError, "counts: expected .* torch.float32 on cpu, got", half,
         {"counts": ones.half()}),
        (ValueError, "counts: expected .* on cpu, got .* on meta", rag,
         {"counts": ones.to("meta")}),
        (ValueError, "counts: expected no gradient", rag,
         {"counts": ones.clone().requires_grad_()}),
        (ValueError, "counts: expected positive finite numbers, got 0 to 1", rag,
         {"counts": ones * torch.tensor([1, 1, 0, 1, 1])}),
        (ValueError, "counts: expected positive .* got -1 to -1", rag, {"counts": -ones}),
        (ValueError, "counts: expected positive .* got nan", rag,
         {"counts": ones * torch.tensor([1, 1, 1, 1, math.nan])}),
        (ValueError, "counts: expected positive .* got inf to inf", rag,
         {"counts": ones * math.inf}),
        (ValueError, "dropout_p: expected 0 with counts.* got 0.5", rag,
         {"counts": ones, "dropout_p": 0.5}),
        (ValueError, "backend: expected 'auto'", rag, {"backend": "cuda"}),
        (ValueError, "backend: 'triton' needs CUDA tensors, got cpu; 'auto' falls back", rag,
         {"backend": "triton"}),
        (ValueError, "backend: 'triton' takes float32", (*(t.double() for t in rag[:3]), offsets),
         {"backend": "triton"}),
    ]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "args", "options"), refused())
def test_refusals(error, message: str, args: tuple, options: dict) -> None:
    with pytest.raises(error, match=message):
        latent_attention(*args, **options)
    if "counts" in options and len(args) == 4:
        with pytest.raises(error, match=message):
            packed(*args, **options)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "reduce: expected None or 'mean'", {"reduce": "sum"}),
        (ValueError, "lse: expected \\(2, 3, 4\\)", {"lse": torch.zeros(1, 3, 4, **WIDE)}),
        (ValueError, "lse: expected", {"lse": torch.zeros(2, 3, 4, dtype=torch.half)}),
        (ValueError, "lse: expected", {"lse": torch.zeros(2, 3, 4, **WIDE, device="meta")}),
        (TypeError, "lse: expected a tensor", {"lse": [1.0]}),
        (ValueError, "backend: expected", {"backend": "cuda"}),
        (ValueError, "backend: 'triton' takes", {"backend": "triton", "reduce": "mean"}),
        (
            ValueError,
            "backend: 'triton' takes",
            {"backend": "triton", "lse": torch.zeros(2, 3, 4, **WIDE)},
        ),
    ],
)
def test_refusals_of_attention_weights(error, message: str, options: dict) -> None:
    q, k, _ = ragged([2, 3])
    with pytest.raises(error, match=message):
        attention_weights(q, k, offsets_of([2, 3]), **options)
