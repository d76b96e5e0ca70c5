"""Encoders of patches: stain statistics, each family of models, error messages."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from motet.io import Encoder, load_encoder
from motet.io.encoders import stain_stats
from motet.io.encoders.model_zoos import imported_transformers
from motet.io.encoders.torch_encoder import Setup, TorchEncoder, Transform, hash_of, load_weights
from torch import Tensor, nn

from .processes import run_python


def patches(*shape: int, seed: int = 0) -> np.ndarray:
    """Make patches with structure at several scales, [*shape, 3]."""
    generator = np.random.default_rng(seed)
    *batch, height, width = shape
    coarse = generator.integers(0, 256, (*batch, -(-height // 8), -(-width // 8), 3))
    coarse = coarse.repeat(8, -3).repeat(8, -2)[..., :height, :width, :]
    fine = generator.integers(-60, 60, (*shape, 3))
    return np.clip(coarse + fine, 0, 255).astype(np.uint8)


# Stain statistics


def described(patch: np.ndarray) -> dict[str, float]:
    """Return the features of one patch as documented, in float64; sides are multiples of 4."""
    cells = patch.reshape(patch.shape[0] // 4, 4, patch.shape[1] // 4, 4, 3).astype(float)
    density = -np.log10((cells.mean((1, 3)) + 0.5) / 255.5)
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    names = ("haematoxylin", "eosin", "residual")
    amounts = np.linalg.solve(vectors.T, density.reshape(-1, 3).T).reshape(3, *density.shape[:2])
    stains = dict(zip(names, amounts, strict=True))
    features: dict[str, float] = {}
    for name, x in stains.items():
        features |= {f"{name} mean": x.mean(), f"{name} std": x.std()}
        levels = (
            (0.0, 0.1, 0.25, 0.5) if name == "residual" else (0.05, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9)
        )
        features |= {f"{name} > {level:g}": (x > level).mean() for level in levels}
    total = density.mean(2)
    features |= {"density mean": total.mean(), "density std": total.std()}
    features["density < 0.05"] = (total < 0.05).mean()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        x, y = amounts[a] - amounts[a].mean(), amounts[b] - amounts[b].mean()
        features[f"{names[a]} ~ {names[b]}"] = (x * y).mean() / (x.std() * y.std() + 1e-4)
    h, e, _ = amounts
    features["haematoxylin > 0.3 and > eosin"] = ((h > 0.3) & (h > e)).mean()
    features["eosin > 0.15 and > haematoxylin"] = ((e > 0.15) & ~(h > e)).mean()
    features["haematoxylin and eosin > 0.3"] = ((h > 0.3) & (e > 0.3)).mean()
    smooth = {"haematoxylin": h - h.mean(), "eosin": e - e.mean()}
    for scale in (1, 2, 4):
        edges = {}
        for name, x in smooth.items():
            a, b, c, d = (
                x[:-scale, :-scale],
                x[:-scale, scale:],
                x[scale:, :-scale],
                x[scale:, scale:],
            )
            across, down, corner = (b + d - a - c) / 2, (c + d - a - b) / 2, (a + d - b - c) / 2
            smooth[name], edges[name] = (a + b + c + d) / 4, np.stack([across, down])
            xx, yy, xy = (across**2).mean(), (down**2).mean(), (across * down).mean()
            features[f"{name} edges {4 * scale} px"] = np.sqrt(xx + yy)
            turned = np.sqrt((xx - yy) ** 2 + 4 * xy**2)
            features[f"{name} alignment {4 * scale} px"] = turned / (xx + yy)
            if name == "haematoxylin":
                features[f"{name} steps {4 * scale} px"] = np.abs(edges[name]).mean() * 2
                features[f"{name} corners {4 * scale} px"] = np.sqrt((corner**2).mean())
        norms = [np.linalg.norm(x) for x in edges.values()]
        both = (edges["haematoxylin"] * edges["eosin"]).sum()
        features[f"shared edges {4 * scale} px"] = both / (norms[0] * norms[1])
    for name, x in smooth.items():
        features[f"{name} std of 32 px means"] = np.sqrt((x**2).mean())
    within = ((cells - cells.mean((1, 3), keepdims=True)) ** 2).mean((0, 1, 2, 3))
    features |= {
        f"{c} detail": np.sqrt(v) / 255
        for c, v in zip(("red", "green", "blue"), within, strict=True)
    }
    return features


def tissue() -> np.ndarray:
    from skimage.data import immunohistochemistry

    return immunohistochemistry()


def test_stain_stats_are_what_they_are_called() -> None:
    encoder = load_encoder("stain-stats")
    for patch in (tissue()[100:356, 64:320], patches(64, 48), patches(40, 128, seed=3)):
        expected = described(patch)
        assert tuple(expected) == encoder.names
        np.testing.assert_allclose(
            encoder.encode(patch[None])[0], list(expected.values()), rtol=1e-4, atol=3e-6
        )


def test_stains_are_those_of_scikit_image() -> None:
    """Densities agree on real tissue, wherever scikit-image does not clip them at 0."""
    from skimage.color import rgb2hed

    coarse = tissue().reshape(128, 4, 128, 4, 3).mean((1, 3)).round().astype(np.uint8)
    coarse = coarse[coarse.min(2) > 30]
    # scikit-image measures density in ln(10^6), and does not normalise the stain vectors.
    expected = rgb2hed(coarse[None])[0] * 6 * np.linalg.norm(stain_stats.VECTORS, axis=1)
    assert ((expected > 0).mean(0) > 0.9).tolist() == [True, False, True]  # it is not eosin
    encoder = load_encoder("stain-stats")
    rows = encoder.encode(coarse[:, None, None].repeat(4, 1).repeat(4, 2))
    for stain, density in zip(stain_stats.STAINS, expected.T, strict=True):
        actual = rows[:, encoder.names.index(f"{stain} mean")]
        # The half grey level that is added here is at most 0.007 of a colour's density.
        np.testing.assert_allclose(actual[density > 0], density[density > 0], atol=0.02)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 1000),
    level=st.sampled_from([None, 0, 1, 127, 254, 255]),
)
def test_stain_stats_of_any_patch_are_bounded_and_the_same_turned(
    height: int, width: int, seed: int, level: int | None
) -> None:
    encoder = load_encoder("stain-stats")
    patch = patches(height, width, seed=seed)
    if level is not None:
        patch[:] = level
    row = encoder.encode(patch[None])
    assert row.dtype == np.float32
    assert row.shape == (1, len(encoder.names))
    assert (abs(row) < 8).all()  # nor NaN
    for turned in (patch[::-1], patch[:, ::-1], patch.swapaxes(0, 1), np.rot90(patch)):
        np.testing.assert_allclose(encoder.encode(turned[None]), row, rtol=2e-4, atol=2e-5)
    if level is not None:
        moving = [not re.search("mean|<|>", name) for name in encoder.names]
        assert abs(row[0, moving]).max() < 2e-6


@pytest.mark.parametrize("px", [4, 30, 63, 64, 129])
def test_a_row_has_the_same_bits_in_every_batch(px: int) -> None:
    encoder = load_encoder("stain-stats")
    pixels = patches(21, px, px)
    expected = encoder.encode(pixels)
    for size in (1, 2, 3, 8, 20):
        parts = [encoder.encode(pixels[i : i + size]) for i in range(0, 21, size)]
        assert np.array_equal(np.concatenate(parts), expected)
    wide = np.empty((21, px, px + 3, 3), np.uint8)[:, :, 3:]
    wide[:] = pixels
    wide.flags.writeable = False
    assert np.array_equal(encoder.encode(wide), expected)
    assert np.array_equal(encoder.encode(torch.from_numpy(pixels)), expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(
            np.array_equal(rows, expected) for rows in pool.map(encoder.encode, [pixels] * 8)
        )


def test_pieces_of_a_side_lie_symmetrically() -> None:
    for side in range(1, 400):
        cuts = stain_stats._cuts(side)
        assert (cuts[0], cuts[-1]) == (0, side)
        assert np.array_equal(np.diff(cuts), np.diff(cuts)[::-1])
        assert np.diff(cuts).min() >= min(side, 3)
        assert np.diff(cuts).max() <= 7
    assert np.array_equal(stain_stats._cuts(64), np.arange(0, 65, 4))


def test_both_ways_to_shrink_agree() -> None:
    pixels = patches(3, 32, 48)
    means, _ = stain_stats._shrink(pixels)
    sums = np.add.reduceat(pixels, range(0, 32, 4), axis=1, dtype=np.uint32)
    sums = np.add.reduceat(sums, range(0, 48, 4), axis=2)
    assert np.array_equal(means, sums.transpose(3, 0, 1, 2))


# All encoders


@pytest.mark.parametrize("name", ["stain-stats", "python_tests.no:where"])
@pytest.mark.parametrize(
    ("pixels", "came"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"float32 \[2, 8, 8, 3\]"),
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \[8, 8, 3\]"),
        (np.zeros((1, 8, 8, 4), np.uint8), r"uint8 \[1, 8, 8, 4\]"),
        (np.zeros((1, 0, 8, 3), np.uint8), r"uint8 \[1, 0, 8, 3\]"),
        (torch.zeros(1, 3, 8, 8), r"torch.float32 \[1, 3, 8, 8\]"),
        ([[0]], "list"),
    ],
)
def test_pixels_of_another_kind_are_refused(name: str, pixels: Any, came: str) -> None:
    encoder = load_encoder("stain-stats") if name == "stain-stats" else small()
    with pytest.raises(ValueError, match=rf"^pixels: expected uint8 \[B, H, W, 3\], got {came}$"):
        encoder.encode(pixels)


class Net(nn.Module):
    """A convolution, a norm, two linear layers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width)
        self.first, self.last = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.last(self.first(x).relu())


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def small(**options: Any) -> TorchEncoder:
    """Make an encoder of a small network that standardises."""
    transform = Transform(mean=(0.7, 0.5, 0.7), std=(0.2, 0.3, 0.2))
    return TorchEncoder("small", net(), transform, Setup(device="cpu", **options))


def test_pixels_are_copied_on_a_stream_of_their_own() -> None:
    """On a fake GPU: an attribute that torch.cuda lacks raises, and so does a wrong call."""
    encoder, pixels = small(), patches(2, 32, 32)
    assert encoder.upload(pixels) is pixels  # on the CPU
    expected = encoder.encode(pixels)
    cuda, calls = mock.create_autospec(torch.cuda), mock.Mock()
    calls.attach_mock(cuda.stream, "stream")
    calls.attach_mock(cuda.Stream.return_value.synchronize, "synchronize")
    to = torch.Tensor.to

    def copy(tensor: Tensor, device: Any, *, non_blocking: bool) -> Tensor:
        calls.copy(device.type, non_blocking)
        return to(tensor, "cpu", copy=True)

    encoder.device = torch.device("cuda:1")
    with (
        mock.patch.object(torch, "cuda", cuda),
        mock.patch.object(torch.Tensor, "to", copy),
        mock.patch.object(torch.Tensor, "record_stream", calls.record),
    ):
        uploaded = [encoder.upload(pixels), encoder.upload(pixels)]
        assert encoder.upload(uploaded[0]) is uploaded[0]
    cuda.Stream.assert_called_once_with(encoder.device)  # one stream for all copies
    steps = [name for name, *_ in calls.mock_calls if "__" not in name]
    assert steps == ["stream", "copy", "record", "synchronize"] * 2
    calls.copy.assert_called_with("cuda", True)
    cuda.current_stream.assert_called_with(encoder.device)
    calls.record.assert_called_with(cuda.current_stream.return_value)
    encoder.device = torch.device("cpu")
    for tensor in uploaded:
        assert isinstance(tensor, Tensor)
        assert np.array_equal(encoder.encode(tensor), expected)


def test_torch_encoders() -> None:
    encoder, pixels = small(), patches(5, 32, 40)
    assert isinstance(encoder, Encoder)
    model = net().double().eval()
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    mean, std = torch.tensor([0.7, 0.5, 0.7])[:, None, None], torch.tensor([0.2, 0.3, 0.2])
    exact = model((x - mean) / std[:, None, None]).detach().numpy()
    rows = encoder.encode(pixels)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, exact, rtol=1e-4, atol=1e-5)
    assert np.array_equal(encoder.encode(pixels), rows)
    assert np.array_equal(encoder.encode(torch.from_numpy(pixels)), rows)
    alone = np.concatenate([encoder.encode(pixels[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(alone, rows, atol=1e-6)
    pixels.flags.writeable = False  # as a memory map is
    assert np.array_equal(encoder.encode(pixels), rows)
    assert encoder.encode(pixels[:0]).shape == (0, 16)
    assert json.loads(json.dumps(encoder.spec())) == {
        "id": "small",
        "width": 16,
        "weights": hash_of(net().state_dict()),
        "transform": encoder.transform,
        "precision": "fp32",
    }


@pytest.mark.parametrize(("precision", "error"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_half_precision(precision: str, error: float) -> None:
    encoder, pixels = small(precision=precision), patches(8, 32, 32)
    exact, rows = small().encode(pixels), encoder.encode(pixels)
    assert encoder.precision == precision
    assert rows.dtype == np.float32
    assert 0 < np.linalg.norm(rows - exact) < error * np.linalg.norm(exact)
    # The hash of the weights is the checkpoint's, whatever the dtype in memory.
    assert encoder.weights == small().weights


def test_compile_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compiled(module, backend="eager"))
    encoder, pixels = small(compile=True), patches(5, 32, 32)
    for batch in (pixels, pixels[:2], pixels[:1]):
        np.testing.assert_allclose(encoder.encode(batch), small().encode(batch), atol=1e-6)


def test_a_batch_too_large_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = small()

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(encoder, "_module", full)
    with pytest.raises(MemoryError, match="'small': a batch of 3 patches does not fit .* of cpu"):
        encoder.encode(patches(3, 8, 8))


def test_what_a_model_returns_is_looked_at() -> None:
    with pytest.raises(
        ValueError, match=r"'flat': expected \[B, D\] of the model, got \[1, 3, 24, 24\]"
    ):
        TorchEncoder("flat", nn.Identity(), Transform(resize=24), Setup())
    with pytest.raises(
        ValueError, match="'odd': the model does not take a patch of 224 px: Expected size"
    ):
        TorchEncoder("odd", nn.Linear(7, 3), Transform(), Setup())


def test_the_hash_is_of_names_dtypes_shapes_and_bytes() -> None:
    state = {"a": torch.arange(6.0), "b": torch.tensor(1), "c": torch.ones(2).bfloat16()}
    expected = hash_of(state)
    assert len(expected) == 16
    assert expected == hash_of(dict(reversed(state.items())))
    changes: list[dict[str, Tensor]] = [
        {"a": state["a"].view(2, 3)}, {"a": state["a"].double()}, {"b": torch.tensor(2)},
        {"c": torch.ones(2).half()}, {"d": torch.tensor(1)},
    ]  # fmt: skip
    assert len({expected, *(hash_of(state | change) for change in changes)}) == 6


@pytest.mark.parametrize("size", [(40, 40), (48, 64), (64, 48), (100, 90)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_is_pils(size: tuple[int, int], interpolation: str) -> None:
    """Resizing differs by PIL's rounding: 0.5 at the end, and 0.5 x 1.25 (weights) before."""
    from PIL import Image

    pixels = patches(2, *size) // 2 + 64  # bicubic overshoots, and PIL cuts that off twice
    short = min(size)
    wide = tuple(int(48 * side / short) for side in size)
    transform = Transform(resize=48, interpolation=interpolation, scale=1.0)
    resized = transform(torch.from_numpy(pixels)).permute(0, 2, 3, 1).numpy()
    kind = getattr(Image.Resampling, interpolation.upper())
    for actual, patch in zip(resized, pixels, strict=True):
        expected = np.asarray(Image.fromarray(patch).resize(wide[::-1], kind))
        assert abs(actual - expected).max() <= 1.13
        assert abs(actual - expected).mean() < 0.4


def test_a_crop_larger_than_the_patch_is_refused() -> None:
    transform = Transform(crop=(32, 32))
    with pytest.raises(ValueError, match="expected patches of at least 32 x 32 px, got 30 x 40"):
        transform(torch.zeros(1, 30, 40, 3, dtype=torch.uint8))


# transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save small vision models with their image processors."""
    transformers = imported_transformers("test")
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vit = transformers.ViTConfig(**sizes, intermediate_size=64, image_size=32, patch_size=8)
    dino = transformers.Dinov2WithRegistersConfig(**sizes, image_size=32, patch_size=8)
    conv = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    models = {
        "vit": transformers.ViTModel(vit),
        "classifier": transformers.ViTForImageClassification(vit),  # without a pooler
        "dino": transformers.Dinov2WithRegistersModel(dino),
        "resnet": transformers.ResNetModel(conv),
    }
    side = {"height": 32, "width": 32}
    processors = dict.fromkeys(models, transformers.ViTImageProcessor(size=side))
    processors["dino"] = transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size=side)
    for name, model in models.items():
        model.save_pretrained(root / name)
        processors[name].save_pretrained(root / name)
    return root


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work offline, also if huggingface_hub was imported before $HF_HUB_OFFLINE was set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(("name", "px", "special"), [("vit", 32, 1), ("dino", 40, 5)])
def test_hf(folder: Path, name: str, px: int, special: int) -> None:
    import transformers

    encoder = load_encoder(f"hf:{folder / name}", device="cpu")
    assert (encoder.id, encoder.width, encoder.input_px) == (f"hf:{name}", 32, px)
    pixels = patches(3, px, px)
    processor = transformers.AutoImageProcessor.from_pretrained(folder / name)
    expected = processor(list(pixels), return_tensors="pt")["pixel_values"]
    actual = encoder._prepare(torch.from_numpy(pixels))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    model = transformers.AutoModel.from_pretrained(folder / name).eval()
    with torch.no_grad():
        tokens = model(expected).last_hidden_state
    first, mean = tokens[:, 0].numpy(), tokens[:, special:].mean(1).numpy()
    for pool, exact in {"cls": first, "mean": mean, "cls+mean": np.hstack([first, mean])}.items():
        pooled = load_encoder(f"hf:{folder / name}?pool={pool}", device="cpu")
        assert pooled.id == f"hf:{name}?pool={pool}"
        assert pooled.weights == encoder.weights
        np.testing.assert_allclose(pooled.encode(pixels), exact, rtol=1e-4, atol=1e-5)
    assert np.array_equal(
        encoder.encode(pixels), load_encoder(f"hf:{folder / name}").encode(pixels)
    )
    assert encoder.encode(patches(2, 50, 60)).shape == (2, 32)  # resized
    half = load_encoder(f"hf:{folder / name}", device="cpu", precision="bf16").encode(pixels)
    assert 0 < np.linalg.norm(half - first) < 2e-2 * np.linalg.norm(first)


def test_transformers_does_not_import_motets_kernels(folder: Path) -> None:
    """transformers looks for a module `kernels`, and conftest.py puts ours on sys.path."""
    load_encoder(f"hf:{folder / 'vit'}", device="cpu")
    assert find_spec("kernels") is not None
    assert "kernels" not in sys.modules


def test_hf_leaves_out_what_a_checkpoint_lacks(folder: Path) -> None:
    """A missing pooler would get random weights, which would change the hash."""
    first, second = (load_encoder(f"hf:{folder / 'classifier'}", device="cpu") for _ in range(2))
    assert first.weights == second.weights
    state = torch.load(_without(folder / "vit", "layernorm.weight"), weights_only=True)
    assert state
    with pytest.raises(ValueError, match=r"'hf:vit-cut': its weights lack layernorm.weight \(1 in"):
        load_encoder(f"hf:{folder / 'vit-cut'}")


def _without(source: Path, name: str) -> Path:
    """Copy a model's folder without one of its tensors."""
    from safetensors.torch import load_file, save_file

    target = source.with_name(source.name + "-cut")
    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_text(file.read_text())
    state = load_file(source / "model.safetensors")
    (key,) = [key for key in state if key.endswith(name) and "layers" not in key]
    del state[key]
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    torch.save(state, target / "state.bin")
    return target / "state.bin"


def test_hf_without_a_class_token(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"'hf:resnet': the model has no class token; write '\?pool"
    ):
        load_encoder(f"hf:{folder / 'resnet'}")
    assert load_encoder(f"hf:{folder / 'resnet'}?pool=mean").width == 16


def test_hf_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^encoder 'hf:nobody/nothing': OSError: "):
        load_encoder("hf:nobody/nothing")
    with pytest.raises(ValueError, match=r"pool: expected one of cls, mean, cls\+mean, got 'max'"):
        load_encoder(f"hf:{folder / 'vit'}?pool=max")
    with pytest.raises(ValueError, match="no option 'pol': did you mean 'pool'"):
        load_encoder(f"hf:{folder / 'vit'}?pol=cls")
    with pytest.raises(ValueError, match="^weights: hf:... has its own"):
        load_encoder(f"hf:{folder / 'vit'}", weights=tmp_path)
    from motet.io.encoders.model_zoos import _transform_of

    with pytest.raises(ValueError, match="resizes in an unsupported way: {'longest_edge': 5}"):
        _transform_of("hf:x", {"do_resize": True, "size": {"longest_edge": 5}})
    with pytest.raises(ValueError, match="bilinear or bicubic, got None"):  # PIL's Lanczos
        _transform_of("hf:x", {"do_resize": True, "size": {"shortest_edge": 5}, "resample": 1})


# torchvision and timm, by stand-ins


class Backbone(nn.Module):
    """A small model with the names of a ResNet."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 4, stride=4, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 16, 1))
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


def backbone(classes: int = 1000) -> Backbone:
    torch.manual_seed(classes)
    return Backbone(classes)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for torchvision, which does not load beside torch for CPUs from PyPI."""

    def get_model(name: str, weights: object) -> nn.Module:
        assert name == "resnet50"
        return backbone() if weights else Backbone()

    usual = SimpleNamespace(
        resize_size=[40], crop_size=[32], interpolation=SimpleNamespace(value="bilinear"),
        mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    published = SimpleNamespace(DEFAULT=SimpleNamespace(transforms=lambda: usual))
    models: Any = ModuleType("torchvision.models")
    models.get_model, models.get_model_weights = get_model, lambda name: published
    models.list_models = lambda module: ["resnet18", "resnet50", "vit_b_16"]
    package: Any = ModuleType("torchvision")
    package.models = models
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


@pytest.mark.usefixtures("torchvision")
def test_torchvision() -> None:
    encoder = load_encoder("torchvision:resnet50", device="cpu")
    assert (encoder.id, encoder.width, encoder.input_px) == ("torchvision:resnet50", 16, 40)
    pixels = patches(3, 40, 40)
    model = backbone().eval()
    model.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.from_numpy(pixels[:, 4:36, 4:36]).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    exact = model((x - mean[:, None, None]) / std[:, None, None]).detach().numpy()
    np.testing.assert_allclose(encoder.encode(pixels), exact, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no such model: did you mean 'resnet50' or 'resnet18'"):
        load_encoder("torchvision:resnet5O")


@pytest.mark.usefixtures("torchvision")
def test_weights_from_a_file(tmp_path: Path) -> None:
    """Checkpoints like MM-Lego's load: a head of nine classes, and any prefix of the names."""
    from safetensors.torch import save_file

    state = backbone(9).state_dict()
    order = dict(zip(("conv1", "bn1", "layer1", "fc"), range(4), strict=True))
    toolbox = {}  # TIAToolbox's names
    for key, value in state.items():
        name, _, rest = key.partition(".")
        toolbox["classifier." + rest if name == "fc" else f"feat_extract.{order[name]}.{rest}"] = (
            value
        )
    forms: dict[str, Callable[[Path], None]] = {
        "plain.pth": lambda path: torch.save(state, path),
        "parallel.pt": lambda path: torch.save(
            {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path
        ),
        "toolbox.pth": lambda path: torch.save(toolbox, path),
        "old.pth": lambda path: torch.save(
            {k: v for k, v in state.items() if "tracked" not in k}, path
        ),
        "safe.safetensors": lambda path: save_file(state, path),
    }
    name, pixels = "torchvision:resnet50?normalise=none", patches(2, 32, 32)
    rows = []
    for file, write in forms.items():
        write(tmp_path / file)
        encoder = load_encoder(name, weights=tmp_path / file, device="cpu")
        assert encoder.id == name
        rows.append(encoder.encode(pixels))
    assert all(np.array_equal(row, rows[0]) for row in rows)
    plain, published = (load_encoder("torchvision:resnet50", weights=w, device="cpu")
                        for w in (tmp_path / "plain.pth", None))  # fmt: skip
    assert encoder.weights == plain.weights != published.weights
    assert encoder.transform != plain.transform == published.transform


def test_weights_of_another_model(tmp_path: Path) -> None:
    model, file = backbone(), tmp_path / "other.pth"
    model.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    state = backbone(9).state_dict()
    state["extra.weight"], state["bn1.weight"] = state.pop("conv1.weight"), torch.ones(3)
    torch.save(state, file)
    with pytest.raises(ValueError, match=(
        r"other.pth' is of another model: missing: conv1.weight; unexpected: extra.weight; "
        r"of another shape: bn1.weight \[3\] instead of \[8\]$"
    )):  # fmt: skip
        load_weights(model, file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="^weights: expected a checkpoint of tensors .*other.pth'"):
        load_weights(model, file)
    torch.save({"epoch": 3}, file)
    with pytest.raises(ValueError, match="holds no tensors by name"):
        load_weights(model, file)


class Tokens(nn.Module):
    """A vision transformer's interface in timm."""

    num_prefix_tokens = 2

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, stride=8)

    def forward_features(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).mT
        return torch.cat([patches[:, :2] * 2, patches], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)[:, 0]


@pytest.fixture
def timm_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Stand in for timm, which imports torchvision; return the recorded calls."""
    timm_calls = []

    def create_model(name: str, **arguments: Any) -> nn.Module:
        timm_calls.append((name, arguments))
        torch.manual_seed(0)
        return Tokens()

    config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 0.8,
              "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # fmt: skip
    timm: Any = ModuleType("timm")
    layers: Any = ModuleType("timm.layers")
    timm.create_model, timm.list_models = create_model, lambda: ["vit_small", "resnet50"]
    timm.data = SimpleNamespace(resolve_model_data_config=lambda model: config)
    layers.SwiGLUPacked = nn.Linear
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.layers", layers)
    return timm_calls


def test_timm(timm_calls: list[tuple[str, dict[str, Any]]], tmp_path: Path) -> None:
    encoder = load_encoder("timm:vit_small.tag", device="cpu")
    assert timm_calls.pop() == ("vit_small.tag", {"pretrained": True, "num_classes": 0})
    assert (encoder.id, encoder.width, encoder.input_px) == ("timm:vit_small.tag", 8, 40)
    pixels = patches(2, 40, 40)
    torch.manual_seed(0)
    x = torch.from_numpy(pixels[:, 4:36, 4:36]).permute(0, 3, 1, 2) / 127.5 - 1
    tokens = Tokens().forward_features(x).detach().numpy()
    np.testing.assert_allclose(encoder.encode(pixels), tokens[:, 0], rtol=1e-4, atol=1e-5)
    pooled = load_encoder("timm:hf-hub:paige-ai/Virchow2?pool=cls+mean", device="cpu")
    exact = np.hstack([tokens[:, 0], tokens[:, 2:].mean(1)])
    np.testing.assert_allclose(pooled.encode(pixels), exact, rtol=1e-4, atol=1e-5)
    assert timm_calls.pop()[1].keys() >= {"mlp_layer", "act_layer"}
    torch.save({k: v + 1 for k, v in Tokens().state_dict().items()}, tmp_path / "own.pth")
    from_file = load_encoder("timm:vit_small", weights=tmp_path / "own.pth", device="cpu")
    assert timm_calls.pop()[1]["pretrained"] is False
    assert from_file.weights != encoder.weights
    with pytest.raises(ValueError, match="timm has no such model: did you mean 'vit_small'"):
        load_encoder("timm:vit_smal")
    assert not timm_calls


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_the_package_itself(name: str, tmp_path: Path) -> None:
    """The real package works if it imports; otherwise the error is one line with the cure."""
    family = name.partition(":")[0]
    try:
        models = __import__(family, fromlist=["models"])
    except (ImportError, RuntimeError):
        with pytest.raises(ValueError, match="motet.encoders|install the torchvision"):
            load_encoder(name)
        return
    model = models.models.resnet18() if family == "torchvision" else models.create_model("resnet18")
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    assert load_encoder(name, weights=file).encode(patches(2, 64, 64)).shape == (2, 512)


def test_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from motet.io.encoders import model_zoos

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(model_zoos, "import_module", broken)
    with pytest.raises(ValueError, match=(
        r"'timm:resnet50': timm does not load beside torch .*torchvision::nms does not exist\); "
        "install the torchvision that was built for this torch"
    )):  # fmt: skip
        load_encoder("timm:resnet50")

    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr(model_zoos, "import_module", absent)
    with pytest.raises(ValueError, match=r"needs timm, .* pip install 'motet\[encoders\]'$"):
        load_encoder("timm:resnet50")


# torch.export


def test_export(tmp_path: Path) -> None:
    pixels = patches(5, 32, 32)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    model = net().eval()
    exact = model(x / 255).detach().numpy()
    some = torch.export.Dim("batch")
    dynamic = torch.export.export(model, (x[:2] / 255,), dynamic_shapes=({0: some},))
    fixed = torch.export.export(model, (x[:2] / 255,))
    bytes_ = torch.export.export(Bytes(model), (x[:2],), dynamic_shapes=({0: some},))
    for name, program in {"dynamic": dynamic, "fixed": fixed, "bytes": bytes_}.items():
        torch.export.save(program, tmp_path / f"{name}.pt2")
        encoder = load_encoder(f"export:{tmp_path / name}.pt2", device="cpu")
        assert (encoder.id, encoder.width, encoder.input_px) == (f"export:{name}.pt2", 16, 32)
        np.testing.assert_allclose(encoder.encode(pixels), exact, rtol=1e-4, atol=1e-5)
        assert encoder.encode(patches(1, 40, 40)).shape == (1, 16)  # resized
    with pytest.raises(ValueError, match="^precision: export:fixed.pt2 has the precision"):
        load_encoder(f"export:{tmp_path / 'fixed.pt2'}", precision="bf16")
    with pytest.raises(ValueError, match="^no encoder 'export:nowhere.pt2': no such file$"):
        load_encoder("export:nowhere.pt2")
    (tmp_path / "text.pt2").write_text("not an archive")
    with pytest.raises(
        ValueError, match="^encoder 'export:text.pt2': expected a file of torch.exp"
    ):
        load_encoder(f"export:{tmp_path / 'text.pt2'}")
    torch.export.save(
        torch.export.export(nn.Linear(3, 4), (torch.ones(2, 3),)), tmp_path / "row.pt2"
    )
    with pytest.raises(ValueError, match=r"expected one input, \[B, 3, H, W\], got"):
        load_encoder(f"export:{tmp_path / 'row.pt2'}")


class Bytes(nn.Module):
    """A model that takes uint8."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x / 255)


# Callables


@pytest.fixture
def callables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    module: Any = ModuleType("mine")
    module.mean = lambda pixels: pixels.mean((1, 2))
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def test_callables(callables: Any) -> None:
    encoder, pixels = load_encoder("mine:mean"), patches(3, 8, 8)
    assert (encoder.id, encoder.width, encoder.weights) == ("mine:mean", 3, "none")
    np.testing.assert_allclose(encoder.encode(pixels), pixels.mean((1, 2)), rtol=1e-6)
    assert encoder.encode(torch.from_numpy(pixels)).dtype == np.float32
    assert encoder.encode(pixels[:0]).shape == (0, 3)
    callables.Named = SimpleNamespace(model=lambda pixels: torch.ones(len(pixels), 4))
    model = callables.Named.model
    model.width, model.id, model.weights = 4, "own", "0" * 16
    named = load_encoder("mine:Named.model")
    assert named.spec() == {"id": "own", "width": 4, "weights": "0" * 16,
                            "transform": named.transform, "precision": "fp32"}  # fmt: skip
    assert named.encode(pixels).shape == (3, 4)


def test_what_a_callable_does_wrong(callables: Any) -> None:
    def refuses(pixels: np.ndarray) -> None:
        raise KeyError("model")

    callables.refuses, callables.number = refuses, 5
    callables.five = lambda pixels: np.ones(5)
    callables.grows = lambda pixels: np.ones((len(pixels), pixels.shape[1]))
    callables.words = lambda pixels: [["a"]] * len(pixels)
    wrong = {
        "mine:refuses": r"raised KeyError on uint8 \[1, 256, 256, 3\]: 'model'",
        "mine:number": "expected a callable, got int",
        "mine:five": r"expected \[1, D\] back, got ndarray of shape \[5\]",
        "mine:words": "raised ValueError .*could not convert string",
        "mine:meen": "no 'meen' there: did you mean 'mean'",
        "nowhere.at_all:f": r"no module 'nowhere' \(PYTHONPATH=. finds .*known: stain-stats",
    }
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=f"encoder '{name}': {message}"):
            load_encoder(name)
    encoder = load_encoder("mine:grows")
    with pytest.raises(ValueError, match="'mine:grows': expected 256 features per patch, got 8"):
        encoder.encode(patches(2, 8, 8))
    callables.grows = lambda pixels: 1 / 0
    callables.slow = lambda pixels: (_ for _ in ()).throw(MemoryError("no room"))
    with pytest.raises(MemoryError, match="no room"):
        load_encoder("mine:slow")


def test_a_module_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_more.py").write_text("import nothing_of_this_name")
    (tmp_path / "falls_over.py").write_text("1 / 0")
    with pytest.raises(
        ValueError, match="importing it failed: No module named 'nothing_of_this_name'"
    ):
        load_encoder("needs_more:f")
    with pytest.raises(ValueError, match="importing it raised ZeroDivisionError: division by zero"):
        load_encoder("falls_over:f")


# Names and arguments


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("stain-stat", {}, "^no encoder 'stain-stat': did you mean 'stain-stats'"),
        ("resnet50", {}, "^no encoder 'resnet50': known: stain-stats, torchvision:<name>, timm:"),
        ("hf:", {}, "^no encoder 'hf:'"),
        ("", {}, "^no encoder ''"),
        ("stain-stats", {"device": "cuda"}, "^device: stain-stats has no such option"),
        ("stain-stats", {"precision": "bf16"}, "^precision: stain-stats has no such option"),
        ("stain-stats", {"compile": True}, "^compile: stain-stats has no such option"),
        ("stain-stats", {"weights": "w.pth"}, "^weights: stain-stats has no such option"),
        ("stain-stats", {"device": "gpu"}, "^device: expected auto, cpu, cuda or .*, got 'gpu'"),
        ("stain-stats", {"precision": "int8"}, "^precision: expected one of auto, .*, got 'int8'"),
        ("timm:resnet50", {"weights": "nowhere.pth"}, "^weights: no file 'nowhere.pth'"),
    ],
)
def test_refused_names_and_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_encoder(name, **options)
    assert "\n" not in str(caught.value)


def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(
        ValueError, match="^device: expected one that torch finds here, got 'cuda:99'"
    ):
        load_encoder(f"hf:{folder / 'vit'}", device="cuda:99")


def test_loading_imports_what_it_needs() -> None:
    code = (
        "import motet.io.encoders.load_encoder, sys; "
        "print(*{'torch', 'transformers'} & {*sys.modules})"
    )
    assert run_python(code).split() == []
    code = code.replace("; print", "; motet.io.load_encoder('stain-stats'); print")
    assert run_python(code).split() == []
