"""save and load: equal predictions, tied weights stored once, a clear error for a bad file."""

import json
import os
import subprocess
import sys

import motet
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .conftest import randomised
from .lego_helpers import blocks_of, inputs_of


def healnet(**options) -> motet.HEALNet:
    modalities = {
        "omic": motet.Tabular(7),
        "genes": motet.Tabular(5, tokens="features"),
        "wsi": motet.Bag(6, coords=2, extent=50.0),
        "mri": motet.Grid(1, axes=3),
    }
    return randomised(motet.HEALNet(modalities, out_features=3, num_latents=4, **options))


@pytest.mark.parametrize("share", [True, False, "all-but-first"])
def test_healnet(share, tmp_path) -> None:
    model = healnet(depth=3, share_weights=share, self_attention=1, self_heads=2, snn=False)
    motet.save(model, tmp_path / "model.safetensors")
    loaded = motet.load(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert not loaded.training
    inputs = {"omic": torch.randn(2, 7), "genes": torch.randn(2, 5)}
    assert torch.equal(loaded(inputs), model(inputs))
    # Sharing survives: changing one layer's weights changes all that share them.
    sizes = [len({id(p) for p in m.parameters()}) for m in (model, loaded)]
    assert sizes[0] == sizes[1]


def test_lego(tmp_path) -> None:
    blocks, x = blocks_of(4), inputs_of(2)
    encoders = {"mri": blocks["mri"].encoder}
    path = tmp_path / "model.safetensors"
    motet.save(blocks["wsi"], path)
    loaded = motet.load(path)
    assert isinstance(loaded.encoder, motet.ABMIL)
    assert torch.equal(loaded(x["wsi"]), blocks["wsi"](x["wsi"]))
    for model in (
        motet.LegoMerge(blocks, method="mean", head="linear", weights=[1, 2, 3, 4]),
        motet.LegoMerge(blocks, phase="circular").add("other", blocks["omic"]),
        randomised(motet.LegoFuse(blocks, mode="weave", depth=1)),
        randomised(motet.LegoFuse(blocks).add("other", blocks["omic"])),
    ):
        motet.save(model, path)
        before = {k: v.clone() for k, v in encoders["mri"].state_dict().items()}
        loaded = motet.load(path, encoders=encoders)
        inputs = {**x, "other": x["omic"]} if "other" in model.blocks else x
        assert torch.equal(loaded(inputs), model(inputs))
        assert loaded.config == model.config
        assert all(torch.equal(before[k], v) for k, v in encoders["mri"].state_dict().items())
    with pytest.raises(ValueError, match="expected the block's own encoder, a Convolution"):
        motet.load(path)
    with pytest.raises(ValueError, match="encoders: unknown modality 'ct'"):
        motet.load(path, encoders={**encoders, "ct": nn.Identity()})
    with pytest.raises(ValueError, match="another architecture"):
        motet.load(path, encoders={"mri": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5))})
    motet.save(blocks["mri"], path)
    with pytest.raises(ValueError, match="another architecture"):
        motet.load(path, encoders=nn.Conv2d(3, 9, 1))


def test_every_model_that_can_be_built_can_be_saved(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    numbers = motet.HEALNet(
        {"a": motet.Tabular(np.int64(3))},  # pyright: ignore[reportArgumentType]
        out_features=2,
        heads=np.int64(2),  # pyright: ignore[reportArgumentType]
        attn_dropout=np.float32(0.5),  # pyright: ignore[reportArgumentType]
    ).eval()
    motet.save(numbers, path)
    x = torch.randn(2, 3)
    assert torch.equal(motet.load(path)({"a": x}), numbers({"a": x}))

    def block(out_features: int | None, encoder: nn.Module | None = None) -> motet.LegoBlock:
        sizes = {"num_latents": 4, "latent_dim": 8, "heads": 2, "head_dim": 4}
        return motet.LegoBlock(motet.Tabular(3), encoder, out_features=out_features, **sizes)

    head = motet.fusion.layers.Head(8, 7)
    for model in (
        motet.LegoMerge({"a": block(None), "b": block(None)}, head=head),
        motet.LegoMerge({"a": block(2), "b": block(2)}, head=head),
        motet.LegoFuse({"a": block(None), "b": block(None)}),
    ):
        motet.save(model.eval(), path)
        loaded = motet.load(path)
        assert torch.equal(loaded({"a": x, "b": x}), model({"a": x, "b": x}))
        assert loaded.config == model.config

    class SNN(nn.Linear):
        """A user's encoder with the name of one of motet's; its buffer is a view of a parameter."""

        def __init__(self) -> None:
            super().__init__(3, 5)
            self.register_buffer("start", self.weight.detach())

    custom = block(2, SNN()).eval()
    motet.save(custom, path)
    assert torch.equal(motet.load(path, encoders=SNN())(x), custom(x))
    with pytest.raises(ValueError, match="the block's own encoder, a SNN"):
        motet.load(path)
    motet.save(motet.LegoMerge({"a": custom}), path)
    with pytest.raises(TypeError, match="encoders: expected a dict"):
        motet.load(path, encoders=SNN())


def test_tied_weights_are_stored_once(tmp_path) -> None:
    def tied() -> nn.Module:
        linear = nn.Linear(6, 6)
        return nn.Sequential(linear, nn.Tanh(), linear)

    block = motet.LegoBlock(motet.Bag(6), tied(), out_features=2)
    motet.save(block, tmp_path / "block.safetensors")
    with safe_open(tmp_path / "block.safetensors", "pt") as file:
        names = list(file.keys())
    assert [n for n in names if n.startswith("encoder.")] == ["encoder.0.bias", "encoder.0.weight"]
    loaded = motet.load(tmp_path / "block.safetensors", encoders=tied())
    bag = torch.randn(1, 3, 6)
    assert torch.equal(loaded(bag), block.eval()(bag))
    assert loaded.encoder[0] is loaded.encoder[2]


def test_same_predictions_in_another_process(tmp_path) -> None:
    model = healnet(fourier_encode=True)
    omic = torch.randn(3, 7)
    motet.save(model, tmp_path / "model.safetensors")
    save_file({"omic": omic, "logits": model({"omic": omic}).detach()}, tmp_path / "data")
    code = """
import sys, motet, torch
from safetensors.torch import load_file
torch.set_num_threads(1)
data = load_file("data")
assert torch.equal(motet.load("model.safetensors")({"omic": data["omic"]}), data["logits"])
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.safetensors"
    model = healnet()
    motet.save(model, path)
    before = path.read_bytes()
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~_umask())

    def full(*_args) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("motet.fusion.checkpoint.save_file", full)
    with pytest.raises(OSError, match="no space"):
        motet.save(healnet(depth=3), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_every_damaged_byte_is_noticed(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    motet.save(motet.HEALNet({"a": motet.Tabular(2)}, out_features=1, num_latents=2, latent_dim=4,
                             heads=1, head_dim=2), path)  # fmt: skip
    good = path.read_bytes()
    # One byte in 7 of the first 400 (the header's length and JSON), then one in 97.
    for position in [*range(0, 400, 7), *range(400, len(good), 97)]:
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors: "):
            motet.load(path)
    for size in (0, 5, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="corrupt"):
            motet.load(path)


def test_bad_files(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        motet.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="motet did not write"):
        motet.load(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="corrupt, or not a safetensors file"):
        motet.load(path)
    motet.save(healnet(), path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["motet"])
    from motet.fusion.checkpoint import _digest

    newer = json.dumps({**header, "format": 2, "version": "9.0"})
    save_file({}, path, {"motet": newer, "sha256": _digest(newer, {})})
    with pytest.raises(
        ValueError, match="format 2 was written by motet 9.0.*pip install --upgrade"
    ):
        motet.load(path)
    save_file({}, path, {"motet": '{"format": 3}', "sha256": ""})
    with pytest.raises(ValueError, match="format 3 was written by"):
        motet.load(path)
    for header_ in ({**header, "format": 0}, {**header, "model": "Perceiver"}):
        save_file({}, path, {"motet": json.dumps(header_), "sha256": ""})
        with pytest.raises(ValueError, match="names no format or model"):
            motet.load(path)
    bare = json.dumps({**header, "config": {"depth": 2}})
    save_file({}, path, {"motet": bare, "sha256": _digest(bare, {})})
    with pytest.raises(ValueError, match="its configuration has no 'modalities'"):
        motet.load(path)
    save_file({}, path, {"motet": "[]", "sha256": ""})
    with pytest.raises(ValueError, match="its header cannot be read"):
        motet.load(path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        motet.save(healnet(), tmp_path / "nowhere" / "model.safetensors")
    with pytest.raises(TypeError, match="model: expected one of HEALNet"):
        motet.save(nn.Linear(1, 1), path)
    motet.save(healnet(), path)
    with pytest.raises(ValueError, match="encoders: expected none for a HEALNet"):
        motet.load(path, encoders=nn.Identity())
