"""Attention weights of LegoBlock, LegoMerge and LegoFuse."""

from typing import Any

import motet
import pytest
import torch
from torch import Tensor

from .lego_helpers import block_of, blocks_of, inputs_of

WIDE = {"dtype": torch.float64}
TRANSFORMS = ["2d", "latents", "width", None]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def plain_blocks(**options: Any) -> dict[str, motet.LegoBlock]:
    """Return blocks without encoders, of a bag, a grid and a table with a token per feature."""
    kinds = {
        "cells": motet.Bag(4, coords=1),
        "mri": motet.Grid(3, axes=2),
        "genes": motet.Tabular(5, tokens="features"),
    }
    return {name: block_of(kind, seed=i, **options) for i, (name, kind) in enumerate(kinds.items())}


def plain_inputs(rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(rows)
    x = {
        "cells": torch.randn(rows, 6, 4, generator=generator, **WIDE),
        "mri": torch.randn(rows, 2, 3, 3, generator=generator, **WIDE),
        "genes": torch.randn(rows, 5, generator=generator, **WIDE),
    }
    return x, {"cells": torch.rand(rows, 6, 1, generator=generator, **WIDE)}


@pytest.mark.parametrize("fft", TRANSFORMS)
def test_the_first_weights_are_softmax_of_the_spectrum(fft: Any) -> None:
    """Computed here from the block's weights: Q of Re F(L), K of the normalised tokens."""
    block = block_of(motet.Bag(4, keep_scale=False), fft=fft)
    x = torch.randn(2, 7, 4, **WIDE)
    out = block(x, return_attention=True)
    assert out.latents is None
    close(out.logits, block(x))
    axes = {"2d": (-2, -1), "latents": (-2,), "width": (-1,), None: ()}[fft]
    z = torch.fft.fftn(block.latents, dim=axes).real if axes else block.latents
    attention = block.layers[0].attention
    q = attention.to_q(attention.norm(z)).unflatten(-1, (2, 4)).transpose(0, 1)
    k = attention.to_kv(attention.norm_context(x))[..., :8].unflatten(-1, (2, 4)).transpose(1, 2)
    expected = (q @ k.transpose(-1, -2) * 4**-0.5).softmax(-1)
    assert list(out.attention) == ["x"]
    assert len(out.attention["x"]) == 2
    close(out.attention["x"][0], expected)
    assert not torch.allclose(out.attention["x"][1], expected)


@pytest.mark.parametrize("fft", TRANSFORMS)
@pytest.mark.parametrize("kind", ["merge", "stack", "weave"])
def test_joined_models_record_what_the_literal_loop_computes(kind: str, fft: Any) -> None:
    blocks, (x, coords) = plain_blocks(fft=fft), plain_inputs(3)
    model = (
        motet.LegoMerge(blocks) if kind == "merge" else motet.LegoFuse(blocks, mode=kind)
    ).eval()
    present = {"mri": torch.tensor([True, False, True])}
    arguments = {"coords": coords, "present": present}
    out = model(x, return_attention=True, **arguments)
    close(out.logits, model(x, **arguments))
    assert {name: len(passes) for name, passes in out.attention.items()} == dict.fromkeys(x, 2)
    literal = model(x, return_attention=True, strategy="reference", **arguments)
    for name, passes in out.attention.items():
        tokens = {"cells": 6, "mri": 6, "genes": 5}[name]
        for weights, expected in zip(passes, literal.attention[name], strict=True):
            assert weights.shape == (3, 2, 6, tokens)
            total = torch.ones(3, 2, 6, **WIDE)
            if name == "mri":
                total[1] = 0  # this row misses it
            close(weights.sum(-1), total)
            close(weights, expected)
    if kind == "merge":  # of a block, the same as alone
        alone = blocks["genes"](x["genes"], return_attention=True)
        close(out.attention["genes"][1], alone.attention["x"][1])


def test_ragged_bags_have_ragged_weights() -> None:
    block = block_of(motet.Bag(4))
    bags = [torch.randn(n, 4, **WIDE) for n in (3, 0, 5)]
    jagged = torch.nested.nested_tensor(bags, layout=torch.jagged)
    weights = block(jagged, return_attention=True).attention["x"]
    alone = block(bags[2][None], return_attention=True).attention["x"]
    for ragged, single in zip(weights, alone, strict=True):
        rows = ragged.unbind()
        assert [tuple(row.shape) for row in rows] == [(3, 2, 6), (0, 2, 6), (5, 2, 6)]
        close(rows[2].permute(1, 2, 0), single[0])


def test_attention_to_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="return_attention: expected .* got one with an encoder"):
        motet.LegoMerge(blocks_of(2))(
            {n: inputs_of(1)[n] for n in ("omic", "wsi")}, return_attention=True
        )
    block = block_of(motet.Bag(4), context="spectrum")
    with pytest.raises(ValueError, match="got one with context='spectrum'"):
        block(torch.randn(1, 3, 4, **WIDE), return_attention=True)
    # Without a transform there is no spectrum, and the tokens are those of the input.
    plain = block_of(motet.Bag(4), context="spectrum", fft=None)
    assert plain(torch.randn(1, 3, 4, **WIDE), return_attention=True).attention is not None
