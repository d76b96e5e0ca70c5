"""latent_attention: ragged equals dense bag by bag; weights, dropout, refusals."""

import math
from itertools import pairwise

import motet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

latent_attention = motet.kernels.latent_attention
attention_weights = motet.kernels.attention_weights


def literal(q, k, v, scale):
    """One query at a time, in Python."""
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


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_each_bag_gets_what_it_gets_alone(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    q = torch.randn(len(lengths), 2, 3, 4, generator=generator)
    k, v = (torch.randn(sum(lengths), 2, 4, generator=generator) for _ in range(2))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    out = latent_attention(q, k, v, offsets)
    weights = attention_weights(q, k, offsets)
    for b, (start, stop) in enumerate(pairwise(offsets)):
        own_k, own_v = (t[start:stop].transpose(0, 1)[None] for t in (k, v))
        assert torch.equal(out[b], latent_attention(q[b, None], own_k, own_v)[0])
        if start == stop:
            assert torch.equal(out[b], torch.zeros_like(out[b]))
        else:
            assert torch.allclose(weights[start:stop].sum(0), torch.ones(2, 3), atol=1e-6)


def test_gradients() -> None:
    q = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    offsets = torch.tensor([0, 2, 5])
    assert torch.autograd.gradcheck(lambda *t: latent_attention(*t, offsets), (q, k, v))


def test_dropout_keeps_the_mean() -> None:
    q = torch.zeros(1, 1, 4, 2)
    k, v = torch.zeros(1, 1, 2000, 2), torch.ones(1, 1, 2000, 2)
    out = latent_attention(q, k, v, dropout_p=0.4)
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert out.std() > 0


def test_refusals() -> None:
    q, k = torch.randn(2, 2, 3, 4), torch.randn(5, 2, 4)
    offsets = torch.tensor([0, 2, 5])
    cases = [
        ("q: expected \\[B, H, C, E\\]", (q[0], k, k, offsets)),
        ("k: expected \\[T, 2, 4\\]", (q, k[:, :1], k, offsets)),
        ("k: expected \\[2, 2, N, 4\\]", (q, k, k)),
        ("v: expected the shape of k", (q, k, k[:3], offsets)),
        ("k: expected torch.float32 on cpu as q", (q, k.double(), k.double(), offsets)),
        ("offsets: expected int64 \\[3\\]", (q, k, k, offsets[:2])),
        ("offsets: expected int64 \\[3\\]", (q, k, k, offsets.int())),
        ("offsets: expected to rise", (q, k, k, torch.tensor([0, 2, 4]))),
        ("offsets: expected to rise", (q, k, k, torch.tensor([0, 6, 5]))),
        ("offsets: expected to rise", (q, k, k, torch.tensor([1, 2, 5]))),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            latent_attention(*arguments)
    with pytest.raises(ValueError, match="dropout_p"):
        latent_attention(q, k, k, offsets, dropout_p=1.0)
