"""The Triton kernels of latent_attention in Triton's interpreter, against literal torch in float64.

The interpreter multiplies the raw bits of bf16 and ignores tf32, so half precision is float16 here;
`make gpu` tests the rest on a GPU.
"""

from itertools import pairwise

import pytest
import torch

from .conftest import KERNEL_TESTS, require_interpreter

require_interpreter()

from motet.kernels import dropout
from motet.kernels.dropout import dropout_mask
from motet.kernels.latent_attention import triton as attention_launchers
from motet.kernels.latent_attention import triton_kernels as attention_kernels
from motet.kernels.latent_attention.records import like_record
from motet.kernels.latent_attention.triton import attend, kv_gradient, query_gradient, weights
from motet.kernels.ragged import count_slots
from triton.runtime.interpreter import InterpretedFunction

from .comparison import assert_as_good_as
from .conftest import offsets_of

SCALE = 0.3
RAGGED = [300, 0, 1, 530]
pytestmark = KERNEL_TESTS


def literal_attention(q, k, v, offsets, keep, dropout_p, counts=None):
    """Return out, the log-sum-exp and the weights before dropout, computed bag by bag."""
    bias = torch.zeros(k.shape[::2] if offsets is None else k.shape[:1])
    bias = (bias if counts is None else counts.log()).to(q.dtype)
    if offsets is None:
        bags = list(zip(k, v, keep, bias, strict=True))
    else:
        bags = [
            (k[bag].movedim(0, 1), v[bag].movedim(0, 1), keep[bag].permute(1, 2, 0), bias[bag])
            for bag in (slice(*bag) for bag in pairwise(offsets.tolist()))
        ]
    outs, sums, maps = [], [], []
    for query, (key, value, kept, more) in zip(q, bags, strict=True):
        scores = query @ key.mT * SCALE + more
        sums.append(torch.logsumexp(scores.float() if q.dtype == torch.half else scores, -1))
        maps.append(torch.softmax(scores, -1))
        outs.append((maps[-1] * kept / (1 - dropout_p)) @ value)
    return torch.stack(outs), torch.stack(sums), maps


def attention_inputs(lengths, heads, latents, width, dtype):
    """Return queries, and one buffer of which keys and values are views."""
    q = torch.randn(len(lengths), heads, latents, width).to(dtype)
    kv = torch.randn(sum(lengths), 2, heads, width).to(dtype)
    return q, kv, offsets_of(lengths)


def check_attention(q, kv, split, offsets, dropout_p, counts=None):
    """Compare out, lse, dq, dk and dv; `split` returns k and v as views of the buffer.

    Columns of k and v beyond the width of q are zero, and so must be their gradients.
    """
    seed, width = 2**40 + 3, q.shape[-1]
    bags = len(q) if offsets is None else len(offsets) - 1
    expanded = q.expand(bags, -1, -1, -1)
    keep = dropout_mask(expanded, split(kv)[0], offsets, dropout_p, seed)
    _, heads, latents, _ = q.shape
    dout = torch.randn(bags, latents, heads, width).transpose(1, 2).to(q.dtype)
    empty = offsets.diff() == 0 if offsets is not None else torch.zeros(len(q), dtype=torch.bool)

    def fast(q, kv):
        k, v = split(kv)
        out, lse = attend(q, k, v, offsets, counts, SCALE, dropout_p, seed)
        assert lse[empty].isneginf().all()
        dkv = torch.zeros_like(kv)
        for part in split(dkv):
            part.fill_(torch.nan)
        dq = torch.full_like(q, torch.nan)
        attend_backward(
            dout, q, k, v, offsets, counts, out, lse, SCALE, dropout_p, seed, dq, *split(dkv)
        )
        return out, lse[~empty], dq, dkv

    def literal(q, kv):
        query, buffer = (x.detach().requires_grad_() for x in (q, kv))
        converted = (
            None if counts is None else counts.to(torch.promote_types(q.dtype, torch.float32))
        )
        k, v = (part[..., :width] for part in split(buffer))
        out, lse, _ = literal_attention(
            query.expand(bags, -1, -1, -1), k, v, offsets, keep.to(q.dtype), dropout_p, converted
        )
        grads = torch.autograd.grad(out, (query, buffer), dout.to(q.dtype))
        return out.detach(), lse[~empty].detach(), *grads

    assert_as_good_as(fast, literal, q, kv)


def unbound(kv):
    return kv.unbind(1)


def attend_backward(dout, q, k, v, offsets, counts, out, lse, scale, dropout_p, seed, *results):
    """Write dq, dk and dv of one layer."""
    query_grad, *rest = results
    record = like_record(dout)
    given = (out, lse, scale, dropout_p, seed, query_grad, record)
    query_gradient(dout, q, k, v, offsets, counts, *given)
    assert record.isfinite().all() or lse.isneginf().any()
    kv_gradient(record[:, :, None], k, v, offsets, counts, q.shape[-1], scale, dropout_p, *rest)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("lengths", "heads", "latents", "width", "dtype"),
    [
        (RAGGED, 2, 7, 5, torch.float32),
        ([130], 1, 1, 27, torch.float32),
        ([257, 64], 2, 65, 16, torch.float32),
        ([70, 5], 1, 130, 16, torch.float32),
        ([600, 0, 1], 2, 17, 16, torch.float16),
        ([0, 1], 1, 3, 200, torch.float32),
        ([300, 0, 1, 40], 4, 7, 16, torch.float32),  # four heads per program
        ([70, 5], 8, 20, 27, torch.float16),
        ([70, 5], 4, 33, 16, torch.float32),  # one head per program, for more latents
    ],
)
def test_attention_ragged(lengths, heads, latents, width, dtype, dropout_p):
    q, kv, offsets = attention_inputs(lengths, heads, latents, width, dtype)
    check_attention(q, kv, unbound, offsets, dropout_p)


@pytest.mark.parametrize(
    ("lengths", "latents", "width", "dtype"),
    [
        (RAGGED, 7, 5, torch.float32),
        ([70, 5], 65, 16, torch.float32),
        ([600, 0, 1], 17, 16, torch.float16),
    ],
)
def test_attention_with_counts(lengths, latents, width, dtype):
    q, kv, offsets = attention_inputs(lengths, 2, latents, width, dtype)
    check_attention(q, kv, unbound, offsets, 0.0, (4 * torch.rand(2 * sum(lengths)))[::2])


@pytest.mark.parametrize("keys", [40, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dropout_p", "counted"), [(0.0, False), (0.3, False), (0.0, True)])
def test_attention_dense(dropout_p, counted, keys):
    """Dense bags of one chunk (no merge of chunks) and of several chunks are right."""
    q, kv = torch.randn(2, 9, 3, 16).transpose(1, 2), torch.randn(2, keys, 2, 3, 16)
    counts = 4 * torch.rand(keys, 2).t() if counted else None
    check_attention(q, kv, lambda x: x.permute(0, 2, 3, 1, 4).unbind(1), None, dropout_p, counts)


def test_attention_of_any_strides():
    """Shared queries, strided heads and columns of wider rows are read right."""
    q = torch.randn(1, 4, 2, 9).transpose(1, 2)[..., 2:].expand(3, -1, -1, -1)
    kv = torch.randn(2, 2, 90, 12)
    offsets = offsets_of([40, 30, 20])
    check_attention(q, kv, lambda x: x.permute(0, 2, 1, 3)[..., 3:10].unbind(0), offsets, 0.0)


@pytest.mark.parametrize(("dropout_p", "counted"), [(0.0, False), (0.3, False), (0.0, True)])
@pytest.mark.parametrize(
    ("shared", "heads", "latents", "width", "dtype"),
    [
        (True, 2, 7, 27, torch.float32),
        (False, 2, 20, 27, torch.float32),
        (True, 2, 20, 16, torch.float32),
        (True, 4, 5, 27, torch.float16),
        (False, 4, 20, 9, torch.float32),
    ],
)
def test_attention_of_shared_queries_and_padded_keys(
    shared, heads, latents, width, dtype, dropout_p, counted
):
    """More latents than one program takes, empty bags and unused slots are handled."""
    lengths = [*RAGGED, 0, 3] if heads == 2 else [70, 0, 3]
    q = torch.randn(1 if shared else len(lengths), latents, heads, width, dtype=dtype)
    q = q.transpose(1, 2)
    kv = torch.randn(sum(lengths), 2, heads, width + -width % 16, dtype=dtype)
    kv[..., width:] = 0
    counts = 4 * torch.rand(sum(lengths)) if counted else None
    check_attention(q, kv, unbound, offsets_of(lengths), dropout_p, counts)


def test_attention_without_keys():
    q, kv, offsets = attention_inputs([0, 0], 2, 3, 4, torch.float32)
    out, lse = attend(q, *unbound(kv), offsets, None, SCALE, 0.0, 0)
    dq, dkv = torch.full_like(q, torch.nan), torch.empty_like(kv)
    attend_backward(out, q, *unbound(kv), offsets, None, out, lse, SCALE, 0.0, 0, dq, *unbound(dkv))
    assert not out.any()
    assert not dq.any()
    assert lse.isneginf().all()
    nobody = attend(q[:0], *unbound(kv), offsets[:1], None, SCALE, 0.0, 0)
    assert [x.shape for x in nobody] == [(0, 2, 3, 4), (0, 2, 3)]


@pytest.mark.parametrize(
    ("heads", "counted"),
    [
        (2, True),
        pytest.param(2, False, marks=pytest.mark.slow),
        pytest.param(4, False, marks=pytest.mark.slow),
    ],
)
def test_a_bag_alone_is_the_bag_in_a_batch(heads, counted):
    q, kv, offsets = attention_inputs(RAGGED, heads, 3, 16, torch.float32)
    counts = 4 * torch.rand(sum(RAGGED)) if counted else None

    def run(q, kv, offsets, counts):
        k, v = unbound(kv)
        out, lse = attend(q, k, v, offsets, counts, SCALE, 0.0, 0)
        dq, dkv, ones = torch.empty_like(q), torch.empty_like(kv), torch.ones_like(out)
        attend_backward(ones, q, k, v, offsets, counts, out, lse, SCALE, 0.0, 0, dq, *unbound(dkv))
        return out, lse, dq, dkv, weights(q, k, offsets, lse, SCALE, "mean")

    batch = run(q, kv, offsets, counts)
    for b, (start, stop) in enumerate(pairwise(offsets.tolist())):
        bag = slice(start, stop)
        counts_of_bag = None if counts is None else counts[bag]
        alone = run(q[b : b + 1], kv[bag], torch.tensor([0, stop - start]), counts_of_bag)
        for result, other in zip(alone[:3], batch[:3], strict=True):
            assert torch.equal(result[0], other[b])
        for result, other in zip(alone[3:], batch[3:], strict=True):
            assert torch.equal(result, other[bag])


def test_counts_of_1_change_no_bit():
    q, kv, offsets = attention_inputs([300, 0, 1], 2, 3, 16, torch.float32)
    counted, plain = (
        attend(q, *unbound(kv), offsets, counts, SCALE, 0.0, 0)
        for counts in (torch.ones(301), None)
    )
    assert all(map(torch.equal, counted, plain))


def test_dropout_does_not_depend_on_the_blocks(monkeypatch):
    q, kv, offsets = attention_inputs([333, 40], 1, 20, 16, torch.float32)
    other = attention_launchers._Blocks(64, 16, 16, 16, 4, 2)
    monkeypatch.setattr(attention_launchers, "_forward_blocks", lambda q: other)
    check_attention(q, kv, unbound, offsets, 0.4)


def test_dropout_mask():
    q, kv, offsets = attention_inputs([3000, 500], 2, 5, 1, torch.float32)
    k, _ = unbound(kv)
    keep = dropout_mask(q, k, offsets, 0.3, 5)
    assert torch.equal(keep, dropout_mask(q, k, offsets, 0.3, torch.tensor([5])))
    for axis in range(3):  # 700 or more weights in each mean: 5 SD are 0.09
        means = keep.double().movedim(axis, 0).flatten(1).mean(1)
        if axis:
            assert (means - 0.7).abs().max() < 0.09
    assert abs(keep.double().mean() - 0.7) < 0.015
    others = (
        dropout_mask(q, k, offsets, 0.3, 6),
        keep.roll(1, 0),
        keep.roll(1, 1),
        keep.roll(1, 2),
    )
    for other in others:  # independent masks agree on 0.7^2 + 0.3^2
        assert abs((keep == other).double().mean() - 0.58) < 0.02
    dense = dropout_mask(q[:1], k[None, :3000].transpose(1, 2), None, 0.3, 5)
    assert torch.equal(dense[0].permute(2, 0, 1), keep[:3000])
    assert dropout_mask(q, k, offsets, 0.0, 5).all()


def test_philox_gives_the_published_words():
    """The words are those of Random123's kat_vectors for philox4x32-10."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(w) for w in dropout._philox(0, zero, zero, zero)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("latents", [3, 70])
@pytest.mark.parametrize("ragged", [True, False])
def test_weights(latents, ragged):
    q, kv, offsets = attention_inputs([80, 0, 1] if ragged else [300, 300], 2, latents, 9,
                                      torch.float32)  # fmt: skip
    k, v = unbound(kv)
    if not ragged:
        k, v, offsets = (*(x.view(2, 300, 2, 9).transpose(1, 2) for x in (k, v)), None)
    keep = dropout_mask(q, k, offsets, 0.0, 0)

    def fast(q, k, v):
        _, lse = attend(q, k, v, offsets, None, SCALE, 0.0, 0)
        return tuple(weights(q, k, offsets, lse, SCALE, reduce) for reduce in (None, "mean"))

    def literal(q, k, v):
        maps = literal_attention(q, k, v, offsets, keep, 0.0)[2]
        full = torch.cat(maps, -1).permute(2, 0, 1) if ragged else torch.stack(maps)
        return full, full.mean((1, 2))

    assert_as_good_as(fast, literal, q, k, v)


def test_slots_suffice_for_any_bags():
    """Each bag's chunks stay before the next bag's slots, and within the total."""
    for lengths in torch.randint(0, 40, (200, 7)).tolist():
        bounds = offsets_of(lengths).tolist()
        first = [start // 8 + b for b, start in enumerate(bounds[:-1])]
        first.append(count_slots(bounds[-1], 7, 8))
        for b, length in enumerate(lengths):
            assert first[b] + -(-length // 8) <= first[b + 1]


def test_the_kernels_are_interpreted():
    assert isinstance(attention_kernels.attend_kernel, InterpretedFunction)
