"""The engine of the Lego models against their literal loop: one transform instead of 2 L - 1."""

from collections.abc import Iterator
from typing import Any

import motet
import pytest
import torch
from motet.fusion.context import jagged
from motet.fusion.passes import PassOptions
from motet.kernels.lego_pass.spectrum import (
    AXES,
    column_scale,
    compute_real_spectrum,
    compute_spectrum,
    restore_rows,
    self_conjugate,
)
from torch import Tensor, nn

from .comparison import assert_as_good_as, results_of, with_gradients
from .conftest import offsets_of, randomised

WIDE = {"dtype": torch.float64}
EXACT = {"rtol": 0.0, "atol": 1e-9}
SIZES = [(17, 126), (25, 119), (64, 64), (256, 32), (13, 7), (2, 3), (1, 5)]
FFTS = ["2d", "latents", "width"]


def block_of(size: tuple[int, int], seed: int = 0, **options: Any) -> motet.LegoBlock:
    torch.manual_seed(seed)
    options = {"heads": 2, "head_dim": 4, "out_features": 3, **options}
    modality = options.pop("modality", motet.Bag(6))
    block = motet.LegoBlock(modality, num_latents=size[0], latent_dim=size[1], **options)
    return randomised(block.double(), seed)


def outcome(model: nn.Module, x: Any, strategy: str | None, **options: Any) -> list[Tensor]:
    """Return logits, complex latents, and the gradients of all parameters and inputs."""
    out = model(x, return_latents=True, strategy=strategy, **options)
    inputs = [x] if isinstance(x, Tensor) else [t for t in x.values() if t is not None]
    inputs = [t.values() if t.is_nested else t for t in inputs]
    differentiated = [*model.parameters(), *(t for t in inputs if t.requires_grad)]
    latents = torch.view_as_real(out.latents) if out.latents.is_complex() else out.latents
    generator = torch.Generator().manual_seed(1)
    sums = [torch.randn(t.shape, generator=generator, **WIDE) for t in (out.logits, latents)]
    total = (out.logits * sums[0]).sum() + (latents * sums[1]).sum()
    grads = torch.autograd.grad(total, differentiated, allow_unused=True, materialize_grads=True)
    return [out.logits.detach(), latents.detach(), *grads]


def assert_literal(model: nn.Module, x: Any, *strategies: str | None, **options: Any) -> None:
    expected = outcome(model, x, "reference", **options)
    for strategy in strategies or (None,):
        actual = outcome(model, x, strategy, **options)
        torch.testing.assert_close(actual, expected, **EXACT)


def covering() -> Iterator[Any]:
    """Yield every size with every transform and every setting of the pass; depths alternate."""
    count = 0
    for size in SIZES:
        for fft in FFTS:
            for normalise in (False, True):
                for track in (False, True):
                    for context in ("features", "spectrum"):
                        depth = 1 + count % 6
                        count += 1
                        yield pytest.param(
                            size, fft, depth, normalise, track, context,
                            id=f"{size[0]}x{size[1]}-{fft}-L{depth}-{'n' * normalise}"
                            f"{'i' * track}-{context}",
                        )  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("size", "fft", "depth", "normalise", "track", "context"), list(covering())
)
def test_equals_the_literal_loop(
    size: tuple[int, int], fft: Any, depth: int, normalise: bool, track: bool, context: Any
) -> None:
    block = block_of(
        size, fft=fft, depth=depth, normalise=normalise, track_imaginary=track, context=context
    )
    assert_literal(block, torch.randn(2, 5, 6, **WIDE).requires_grad_())


@pytest.mark.parametrize("share", [True, "all-but-first"])
@pytest.mark.parametrize("fft", [*FFTS, None])
def test_shared_weights_and_strategies(fft: Any, share: Any) -> None:
    block = block_of((9, 8), fft=fft, depth=3, share_weights=share, normalise=True)
    x = torch.randn(3, 12, 6, **WIDE).requires_grad_()
    assert_literal(block, x, None, "cached", "absorbed")


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("strategy", ["cached", "absorbed"])
@pytest.mark.parametrize("fft", FFTS)
def test_half_of_a_spectrum_serves_for_all_of_it(fft: Any, strategy: str, tokens: int) -> None:
    block = block_of((8, 5), fft=fft, depth=2, context="spectrum", normalise=True)
    assert block.pass_options().half == (fft == "latents")
    assert_literal(block, torch.randn(3, tokens, 6, **WIDE).requires_grad_(), strategy)


@pytest.mark.parametrize("context", ["features", "spectrum"])
@pytest.mark.parametrize("fft", FFTS)
def test_ragged_masked_and_missing(fft: Any, context: Any) -> None:
    block = block_of((8, 5), fft=fft, depth=3, context=context, normalise=True)
    offsets = offsets_of([4, 0, 1, 7])
    values = torch.randn(12, 6, **WIDE).requires_grad_()
    assert_literal(block, jagged(values, offsets), None, "cached", "absorbed")
    dense = torch.randn(4, 5, 6, **WIDE).requires_grad_()
    mask = torch.rand(4, 5) > 0.4
    mask[2] = False
    assert_literal(block, dense, mask=mask)
    assert_literal(block, dense, present=torch.tensor([True, False, True, False]))
    assert_literal(block, dense, present=torch.zeros(4, dtype=torch.bool))
    one = block_of((8, 5), fft=fft, depth=3, context=context, modality=motet.Tabular(6))
    row = torch.randn(4, 6, **WIDE).requires_grad_()
    assert_literal(one, row)
    assert_literal(one, row, present=torch.tensor([True, False, True, False]))


@pytest.mark.parametrize("fft", FFTS)
def test_latents_to_start_from(fft: Any) -> None:
    block = block_of((8, 5), fft=fft, depth=2, normalise=True)
    x = torch.randn(3, 4, 6, **WIDE).requires_grad_()
    for shape in ((8, 5), (3, 8, 5)):
        assert_literal(block, x, latents=torch.randn(shape, **WIDE))


def joined_blocks(fft: Any, **options: Any) -> dict[str, motet.LegoBlock]:
    """Make blocks of different depths, with and without normalisation and imaginary part."""
    settings_of_blocks = [
        {"depth": 2, "normalise": True, "context": "spectrum", "modality": motet.Bag(6)},
        {"depth": 3, "track_imaginary": False, "modality": motet.Tabular(4)},
        {"depth": 1, "normalise": True, "track_imaginary": False, "modality": motet.Bag(3)},
    ]
    return {
        name: block_of((7, 6), seed, fft=fft, **{**options, **settings})
        for seed, (name, settings) in enumerate(zip("abc", settings_of_blocks, strict=True))
    }


def joined_inputs() -> dict[str, Tensor]:
    shapes = {"a": (4, 5, 6), "b": (4, 4), "c": (4, 3, 3)}
    return {name: torch.randn(shape, **WIDE).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize("fft", [*FFTS, None])
@pytest.mark.parametrize("kind", ["merge", "mean", "stack", "weave"])
def test_joined_models(kind: str, fft: Any) -> None:
    blocks = joined_blocks(fft)
    if kind in ("stack", "weave"):
        model: nn.Module = motet.LegoFuse(blocks, mode=kind)
    else:
        model = motet.LegoMerge(blocks, method="harmonic" if kind == "merge" else "mean")
    x = joined_inputs()
    present = {
        "a": torch.tensor([True, False, True, False]),
        "b": torch.tensor([True, True, False, False]),
    }
    for options in ({}, {"present": present}, {"present": {"c": torch.zeros(4, dtype=torch.bool)}}):
        assert_literal(model, x, **options)
    assert_literal(model, {"b": x["b"], "c": None})


def test_a_weave_takes_halves_only_where_all_blocks_can(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = joined_blocks("latents", ff_dropout=0.5)
    fused = motet.LegoFuse(blocks, mode="weave")
    recorded: list[PassOptions] = []
    plain = motet.LegoBlock.prepare

    def prepare(self: motet.LegoBlock, batch: Any, options: PassOptions) -> Any:
        recorded.append(options)
        return plain(self, batch, options)

    monkeypatch.setattr(motet.LegoBlock, "prepare", prepare)
    fused(joined_inputs())
    fused.blocks["b"].train()
    fused(joined_inputs())
    assert [options.half for options in recorded] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("dropout", ["attn_dropout", "ff_dropout"])
def test_dropout_ends_halves_and_keeps_the_mean(dropout: str) -> None:
    block = block_of((6, 5), fft="latents", depth=1, **{dropout: 0.3})
    x = torch.randn(2, 5, 6, **WIDE)
    assert block.pass_options().half
    expected = block(x, return_latents=True).latents
    block.train()
    assert not block.pass_options().half
    with torch.no_grad():
        draws = torch.stack([block(x, return_latents=True).latents.real for _ in range(600)])
    moved = draws[:, :, 1] != draws[:, :, -1]
    assert moved.any()  # latents 1 and C - 1 are equal only without dropout
    if dropout == "ff_dropout":  # nothing nonlinear follows, so that the mean is unbiased
        error = (draws.mean(0) - expected.real) / (draws.std(0) / len(draws) ** 0.5).clamp_min(1e-9)
        assert error.abs().max() < 5


def test_float32_is_as_good_as_the_literal_loop() -> None:
    for fft in FFTS:
        block = block_of((17, 126), fft=fft, depth=4, normalise=True, context="spectrum")
        names = [name for name, _ in block.named_parameters()]

        def run(strategy: str | None, block: Any = block, names: Any = names) -> Any:
            def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
                replaced = dict(zip(names, parameters, strict=True))
                moved = block.to(x.dtype)
                keywords = {"return_latents": True, "strategy": strategy}
                out = torch.func.functional_call(moved, replaced, (x,), keywords)
                return out.logits, out.latents.real, out.latents.imag

            return call

        args = (torch.randn(2, 20, 6), *(p.detach().float() for p in block.parameters()))
        pair = (with_gradients(run(None)), with_gradients(run("reference")))
        assert_as_good_as(*pair, *args, rms=True)


@pytest.mark.parametrize("fft", FFTS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 4), (6, 7), (17, 126), (3, 8, 6)])
def test_spectrum(fft: Any, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, **WIDE)
    axes = AXES[fft]
    z = torch.fft.fftn(x, dim=axes)
    real, imaginary = compute_spectrum(x, axes)
    torch.testing.assert_close(torch.complex(real, imaginary), z, rtol=0, atol=1e-12)
    is_real = self_conjugate(*shape[-2:], axes)
    assert not imaginary[..., is_real].any()
    real_in_z = torch.stack([z.imag.abs() < 1e-12, is_real.expand(shape)]).all(0)
    assert int(is_real.sum()) == real_in_z.sum() / (x.numel() / is_real.numel())
    if fft == "latents":
        rows = shape[-2]
        half = compute_spectrum(x, axes, half=True)
        assert half[0].shape[-2] == rows // 2 + 1
        for part, full in zip(restore_rows(*half, rows), (real, imaginary), strict=True):
            torch.testing.assert_close(part, full, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            column_scale(*half, axes, rows), column_scale(real, imaginary, axes, rows)
        )
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True)
    torch.testing.assert_close(column_scale(real, imaginary, axes, shape[-2]), 1 / norm)


@pytest.mark.parametrize("fft", FFTS)
@pytest.mark.parametrize("count", [1, 2, 3, 8, 31])
def test_spectrum_of_tokens(fft: Any, count: int) -> None:
    x = torch.randn(2, count, 5, **WIDE)
    expected = torch.fft.fftn(x, dim=AXES[fft]).real
    real, counts = compute_real_spectrum(x, AXES[fft])
    assert counts is None
    torch.testing.assert_close(real, expected, rtol=0, atol=1e-12)
    half, counts = compute_real_spectrum(x, AXES[fft], half=True)
    if fft != "latents":
        assert counts is None
        return
    assert counts is not None
    assert counts.sum() == count
    torch.testing.assert_close(half, expected[:, : count // 2 + 1], rtol=0, atol=1e-12)


def test_zero_latents_have_a_gradient() -> None:
    block = block_of((6, 5), fft="latents", depth=2, normalise=True)
    with torch.no_grad():
        block.latents.zero_()
    (grad,) = torch.autograd.grad(block(torch.randn(2, 3, 6, **WIDE)).sum(), [block.latents])
    assert grad.isfinite().all()


def test_half_precision_needs_autocast() -> None:
    block = block_of((6, 5)).bfloat16()
    with pytest.raises(ValueError, match="dtype: expected float32 or float64 for the transform"):
        block(torch.randn(2, 3, 6, dtype=torch.bfloat16))
    block = block_of((6, 5)).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(torch.randn(2, 3, 6))
    assert out.isfinite().all()


@pytest.mark.parametrize(
    "fft",
    ["latents", *(pytest.param(fft, marks=pytest.mark.slow) for fft in ("2d", "width", None))],
)
def test_compiles_whole(fft: Any) -> None:
    block = block_of((6, 5), fft=fft, depth=2, normalise=True, context="spectrum").eval()
    x = torch.randn(2, 4, 6, **WIDE)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), **EXACT)


@pytest.mark.parametrize(
    ("option", "expected"),
    [({"strategy": "fast"}, "strategy: expected"), ({"backend": "cuda"}, "backend: expected")],
)
def test_unknown_ways_are_refused(option: dict[str, Any], expected: str) -> None:
    blocks = joined_blocks("2d")
    for model, x in (
        (blocks["a"], joined_inputs()["a"]),
        (motet.LegoMerge(blocks), joined_inputs()),
        (motet.LegoFuse(blocks, mode="weave"), joined_inputs()),
    ):
        with pytest.raises(ValueError, match=expected):
            model(x, **option)


def test_inputs_are_not_changed() -> None:
    block = block_of((6, 5), context="spectrum", fft="latents")
    x = torch.randn(2, 1, 6, **WIDE)
    before = x.clone()
    results_of(lambda t: block(t), x)
    assert torch.equal(x, before)
