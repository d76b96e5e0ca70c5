"""Merge recipes: their result, the text of their card, and their error messages."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import motet
import pytest
import torch
from motet import cli, experiments
from motet.experiments import Run, merge_card, merge_recipe
from motet.io import load_cohort
from torch import nn

from .conftest import randomised

SIZES = {"num_latents": 4, "latent_dim": 8, "heads": 2, "head_dim": 4, "depth": 1}
RECIPE = """\
method: harmonic          # the paper's
phase: principal
head: slerp
blocks:
  omic: {model: blocks/omic.safetensors, weight: 0.4}
  wsi: blocks/wsi.safetensors
"""


def block(modality: motet.Tabular | motet.Bag | motet.Grid, encoder=None, **options):
    made = motet.LegoBlock(modality, encoder, **{"out_features": 3, **SIZES, **options})
    return randomised(made, seed=modality.channels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "blocks").mkdir()
    motet.save(block(motet.Tabular(6), motet.SNN(6)), tmp_path / "blocks" / "omic.safetensors")
    motet.save(block(motet.Bag(5), motet.ABMIL(5)), tmp_path / "blocks" / "wsi.safetensors")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def merge(folder: Path, *arguments: object, text: str | bytes | None = None) -> int:
    if text is not None:
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "recipe.yaml").write_bytes(content)
    out = folder / "merged"
    return cli.main(["merge", str(folder / "recipe.yaml"), "--out", str(out), *map(str, arguments)])


def blocks_in(folder: Path) -> dict[str, motet.LegoBlock]:
    names = ("omic", "wsi")
    return {name: motet.load(folder / "blocks" / f"{name}.safetensors") for name in names}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Model files


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda text: text, {"weights": [0.4, 1]}),
        (lambda text: text.replace("0.4", "4e-1"), {"weights": [0.4, 1]}),
        (lambda text: text.replace("principal", "circular"), {"phase": "circular"}),
        (lambda text: text.replace("harmonic ", "product "), {"method": "product"}),
        (lambda text: text.replace("slerp", "linear"), {"head": "linear"}),
        (lambda text: text.replace("slerp", "ot"), {"head": "ot"}),
        (lambda text: "\ufeff" + text[text.index("blocks:") :].replace("\n", "\r\n"), {}),
        (lambda text: text.replace("weight: 0.4", "weight: 1"), {"weights": None}),
    ],
    ids=["as it is", "exponent", "circular", "product", "linear", "ot", "defaults", "equal"],
)
def test_a_recipe_gives_the_model_it_describes(
    change: Callable[[str], str], options: dict, folder: Path
) -> None:
    assert merge(folder, text=change(RECIPE)) == 0
    expected = motet.LegoMerge(blocks_in(folder), **{"weights": [0.4, 1], **options}).eval()
    merged = motet.load(folder / "merged" / "model.safetensors")
    x = {"omic": torch.randn(3, 6), "wsi": torch.randn(3, 7, 5)}
    assert torch.equal(merged(x), expected(x))
    assert torch.equal(merged({"wsi": x["wsi"]}), expected({"wsi": x["wsi"]}))


def test_paths_are_relative_to_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = folder / "elsewhere" / "deep"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert cli.main(["merge", "../../recipe.yaml", "--out", "new/merged"]) == 0
    assert sorted(content(elsewhere / "new" / "merged")) == ["README.md", "model.safetensors"]
    (folder / "absolute.yaml").write_text(RECIPE.replace("blocks/", f"{folder}/blocks/"))
    assert cli.main(["merge", "../../absolute.yaml", "--out", "other"]) == 0
    model = "model.safetensors"
    assert (elsewhere / "other" / model).read_bytes() == (
        elsewhere / "new" / "merged" / model
    ).read_bytes()


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(folder) == 0
    model = folder / "merged" / "model.safetensors"
    assert capsys.readouterr().out == f"omic and wsi merged: {model}\n"
    assert merge(folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == str(model)
    assert report["weights"] == pytest.approx({"omic": 0.4 / 1.4, "wsi": 1 / 1.4}, rel=1e-15)


def test_the_same_recipe_gives_the_same_bytes(folder: Path) -> None:
    hashes = []
    for number in range(8):
        out = folder / str(number)
        assert cli.main(["merge", str(folder / "recipe.yaml"), "--out", str(out)]) == 0
        hashes.append(content(out))
    assert all(one == hashes[0] for one in hashes)


def test_the_same_model_gives_the_same_file(tmp_path: Path) -> None:
    """This holds for names too that JSON can write in more than one way."""
    model = motet.LegoMerge({"é\x1f\x7f\u2028😀": block(motet.Tabular(3))}).eval()
    hashes = set()
    for _ in range(16):
        motet.save(model, tmp_path / "model.safetensors")
        hashes.add((tmp_path / "model.safetensors").read_bytes())
    assert len(hashes) == 1
    assert motet.load(tmp_path / "model.safetensors").config == model.config


# The card


def code_in(text: str, language: str) -> list[str]:
    return [
        code
        for _, kind, code in re.findall(r"^(```+)(\w+)\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
        if kind == language
    ]


def test_the_card_is_true(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert merge(folder) == 0
    text = (folder / "merged" / "README.md").read_text()
    omic, wsi = text[text.index("### omic") :].split("### wsi")
    for name, part in (("omic", omic), ("wsi", wsi)):
        path = folder / "blocks" / f"{name}.safetensors"
        made = blocks_in(folder)[name]
        assert f"* path: `blocks/{name}.safetensors`\n" in part
        assert f"* SHA-256: `{hashlib.sha256(path.read_bytes()).hexdigest()}`\n" in part
        assert f"* parameters: {sum(p.numel() for p in made.parameters())}\n" in part
        (metadata,) = code_in(part, "json")
        assert json.loads(metadata)["config"] == json.loads(json.dumps(made.config))
        assert json.loads(metadata)["model"] == "LegoBlock"
    table = "Tabular(features=6, tokens='row', keep_scale=False)"
    assert f"* weight: 0.285714\n* modality: `{table}`\n" in omic
    assert "* encoder: `motet.SNN(features=6" in omic
    bag = "Bag(features=5, coords=0, extent=1.0, keep_scale=False)"
    assert f"* weight: 0.714286\n* modality: `{bag}`\n" in wsi
    assert "* shapes: input [B, N, 5]; latents [B, 4, 8], transform 2d; logits [B, 3]\n" in wsi
    model = (folder / "merged" / "model.safetensors").read_bytes()
    assert f"`model.safetensors`, SHA-256 `{hashlib.sha256(model).hexdigest()}`\n" in text
    assert "\n* method: harmonic\n* phase: principal\n* head: slerp\n" in text
    assert f"by motet {motet.__version__}, as in MM-Lego" in text
    assert code_in(text, "yaml") == [RECIPE]
    (computes,) = code_in(text, "text")
    assert len(computes.splitlines()) == 2
    monkeypatch.chdir(folder / "merged")
    names: dict = {}
    exec("\n".join(code_in(text, "python")), names)
    assert names["logits"].shape == (2, 3)


def test_the_card_of_awkward_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts in float64, with coordinates, a grid, no head, and names that contain code fences."""
    headless = {"out_features": None}
    parts = {
        "ecg": block(motet.Bag(2, coords=1, extent=10.0), **headless),
        "mri": block(motet.Grid(1, axes=2), **headless),
        'a "b"': block(motet.Tabular(3, tokens="features"), **headless),
    }
    text = "# ```\n# ````python\n# raise SystemExit\nmethod: sum\nblocks:\n"
    for number, (name, part) in enumerate(parts.items()):
        motet.save(part.double(), folder / f"`{number}``.safetensors")
        text += f"  {json.dumps(name)}: '`{number}``.safetensors'\n"
    assert merge(folder, text=text.rstrip()) == 0
    card = (folder / "merged" / "README.md").read_text()
    assert code_in(card, "yaml") == [text]
    assert "* path: ``` `0``.safetensors ```\n" in card
    assert "* shapes: input [B, N, 2], coordinates [B, N, 1]; latents [B, 4, 8], " in card
    assert "\nno head\n" in card
    (code,) = code_in(card, "python")
    assert "logits" not in code
    monkeypatch.chdir(folder / "merged")
    names: dict = {}
    exec(code, names)
    assert names["latents"].shape == (2, 4, 8)
    assert names["latents"].dtype == torch.float64


@pytest.mark.parametrize(
    ("method", "phase"),
    [
        ("harmonic", "principal"),
        ("harmonic", "circular"),
        *((method, "principal") for method in ("mean", "sum", "product", "upstream-harmonic")),
    ],
)
def test_the_card_says_what_is_computed(method: str, phase: str, folder: Path) -> None:
    """The card's formula of the latents, evaluated as code, gives the merged latents."""
    line = merge_card._HARMONIC[phase] if method == "harmonic" else merge_card._LATENTS[method]
    formula = line.removeprefix("Z = ").split("    ")[0]
    for old, new in (
        ("Σ w_m arg Z_m", "(w * z.angle()).sum(0)"),
        ("arg Σ w_m Z_m / |Z_m|", "(w * z / z.abs()).sum(0).angle()"),
        ("arg Z_1 + arg Z_2", "z[0].angle() + z[1].angle()"),
        ("Σ (w_m / |Z_m|)", "(w / z.abs()).sum(0)"),
        ("Σ w_m Z_m", "(w * z).sum(0)"),
        ("Σ Z_m", "z.sum(0)"),
        ("Π Z_m", "z.prod(0)"),
        ("2 w_1 w_2 exp", "2 * w[0] * w[1] * exp"),
        ("exp(i ", "torch.exp(1j * "),
    ):
        formula = formula.replace(old, new)
    z = torch.randn(2, 4, 8, dtype=torch.complex128)
    w = torch.tensor([0.25, 0.75], dtype=torch.float64)[:, None, None]
    model = motet.LegoMerge(blocks_in(folder), method=method, phase=phase, weights=[1, 3])
    merged = model._merge(["omic", "wsi"], list(z))
    expected = eval(formula, {"torch": torch, "w": w, "z": z})
    torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


# A merge overwrites its own files only


def test_a_merge_overwrites_its_own_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "merged"
    assert merge(folder) == 0
    first = content(out)
    assert merge(folder) == 0
    assert content(out) == first
    (out / "notes.txt").write_text("mine")
    assert merge(folder, text=RECIPE.replace("0.4", "0.9")) == 0
    assert content(out).keys() == {*first, "notes.txt"}
    assert all(content(out)[name] != first[name] for name in first)
    assert motet.load(out / "model.safetensors").weights["omic"] == pytest.approx(0.9 / 1.9)
    # A folder with the card and without the model is recognised, and is written again.
    (out / "model.safetensors").unlink()
    assert merge(folder, text=RECIPE) == 0
    assert content(out) == {**first, "notes.txt": b"mine"}

    def refused(prepare: Callable[[Path], object], expected: str) -> None:
        target = folder / "taken"
        prepare(target)
        before = content(target) if target.is_dir() else target.read_bytes()
        capsys.readouterr()
        assert cli.main(["merge", str(folder / "recipe.yaml"), "--out", str(target)]) == 2
        printed = capsys.readouterr()
        assert expected in printed.err
        assert printed.err.count("\n") == 1
        assert before == (content(target) if target.is_dir() else target.read_bytes())

    refused(lambda target: target.write_text("mine"), "--out: expected a folder, got the file")
    (folder / "taken").unlink()
    refused(
        lambda target: (target.mkdir(), (target / "model.safetensors").write_bytes(b"mine")),
        "which holds 'model.safetensors'",
    )
    refused(
        lambda target: (target / "README.md").write_text("# Mine"),
        "README.md' exists, and is no card of such a merge",
    )
    refused(
        lambda target: (target / "README.md").write_text(merge_card.RUN_MARK), "is no card of such"
    )
    (folder / "empty").mkdir()
    assert cli.main(["merge", str(folder / "recipe.yaml"), "--out", str(folder / "empty")]) == 0


def test_a_merge_that_fails_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(folder) == 0
    before = content(folder / "merged")

    def full(*_args: object) -> None:
        raise OSError("no space left on device")

    for name in ("motet.fusion.checkpoint.save_file", "motet.experiments.merge_recipe.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            assert merge(folder, text=RECIPE.replace("0.4", "0.9")) == 2
        assert "no space left on device" in capsys.readouterr().err
        assert content(folder / "merged") == before


# Bad input

NESTED = "[" * 5_000
BAD: dict[str, tuple[str | bytes, str]] = {
    "an unknown key": (RECIPE + "heads: 2\n", "unknown key 'heads': did you mean 'head'? known: "),
    "an unknown key of a block": (
        RECIPE.replace("weight:", "wieght:"),
        "blocks.omic: unknown key 'wieght': did you mean 'weight'? known: model, weight",
    ),
    "a missing file": (
        RECIPE.replace("blocks/wsi", "blocks/ct"),
        "blocks.wsi: expected a model file or a run folder, its path relative to the recipe, got "
        "'blocks/ct.safetensors', where there is none",
    ),
    "a path that no file can have": (RECIPE.replace("blocks/wsi", "x" * 9_000), "where there is n"),
    "a path with a null": (RECIPE.replace("blocks/wsi.s", '"\\0"  # '), "got '\\x00', where the"),
    "no blocks": ("method: mean\n", "key 'blocks' is missing"),
    "no model": (RECIPE.replace("model: blocks/omic.safetensors, ", ""), "blocks.omic: key 'model"),
    "nothing": ("", "expected the keys method, phase, head, blocks, got nothing"),
    "not YAML": ("blocks: {omic: a", "not YAML at line 1: "),
    "a list": ("- blocks\n", "expected the keys method, phase, head, blocks, got ['blocks']"),
    "a list of blocks": ("blocks: [a, b]\n", "blocks: expected names with paths, got ['a', 'b']"),
    "a list as a block": (
        "blocks: {a: [x], b: y}\n",
        "blocks.a: expected a path, or the keys model and weight, got ['x']",
    ),
    "a name twice": (RECIPE.replace("wsi:", "omic:"), "not YAML at line 6: key 'omic' repeats"),
    "a key twice": (RECIPE + "head: ot\n", "not YAML at line 7: key 'head' repeats"),
    "a merge key": (
        "blocks:\n  <<: {omic: blocks/wsi.safetensors}\n  omic: blocks/omic.safetensors\n",
        "blocks.<<: unknown key 'omic'",
    ),
    "a weight of zero": (RECIPE.replace("0.4", "0"), "weight: expected a positive finite number"),
    "a negative weight": (RECIPE.replace("0.4", "-1"), "a positive finite number, got -1.0"),
    "NaN": (RECIPE.replace("0.4", ".nan"), "blocks.omic.weight: expected a positive finite number"),
    "infinity": (RECIPE.replace("0.4", "1e999"), "a positive finite number, got inf"),
    "a ratio": (RECIPE.replace("0.4", "1:3"), "a positive finite number, got '1:3'"),
    "text": (RECIPE.replace("0.4", "'1'"), "a positive finite number, got '1'"),
    "true": (RECIPE.replace("0.4", "true"), "a positive finite number, got 'true'"),
    "an empty weight": (RECIPE.replace("0.4", ""), "a positive finite number, got ''"),
    "too large a weight": (RECIPE.replace("0.4", "9" * 400), "expected a positive finite number"),
    "more digits than Python reads": (RECIPE.replace("0.4", "9" * 5000), "got inf"),
    "a weight that vanishes": (
        RECIPE.replace("0.4", "1e-20").replace(": blocks/wsi.safetensors",
                                               ": {model: blocks/wsi.safetensors, weight: 1e305}"),
        "weights: expected 2 positive numbers",
    ),
    "one block": (RECIPE[: RECIPE.index("  wsi")], "blocks: expected 2 or more, got 1"),
    "a name that is a number": (RECIPE.replace("wsi:", "7:"), "characters, got 7.0"),
    "a name in two lines": (RECIPE.replace("wsi:", '"a\\nb":'), "characters, got 'a\\nb'"),
    "a name that leaves the folder": (RECIPE.replace("wsi:", "../wsi:"), "without dots and slash"),
    "an empty path": (RECIPE.replace("blocks/wsi.safetensors", "''"), "expected a path, got ''"),
    "an unknown method": (
        RECIPE.replace("harmonic ", "median "),
        "method: expected 'harmonic', 'sum', 'mean' or 'product', got 'median'",
    ),
    "two things": (
        RECIPE.replace("slerp", "best").replace("0.4", "0"),
        "head: expected 'slerp', 'linear' or 'ot', got 'best'; blocks.omic.weight: expected",
    ),
    "a bomb": (
        "a: &a [x, x]\n" + "b: &b [*a, *a]\nc: &c [*b, *b]\nblocks: *c\n",
        "not YAML at line 2: expected no alias (*) and no tag (!)",
    ),
    "a deep one": (NESTED, "nested too deeply"),
    "a huge file": ("#" * 70_000, "expected a recipe of at most 65536 bytes"),
    "Python": ("blocks: !!python/object/apply:os.system [exit]\n", "at line 1: expected no alias"),
    "a tag": (RECIPE.replace("0.4", "!!bool x"), "not YAML at line 5: expected no alias (*)"),
    "not UTF-8": (b"blocks: \xff\n", "expected UTF-8, got byte 0xff at 8"),
    "binary": (b"blocks: \x00\n", "not YAML"),
    "a folder as a block": (RECIPE.replace("blocks/wsi.safetensors", "blocks"), "got both: files"),
    "no model in it": (RECIPE.replace("blocks/wsi.safetensors", "recipe.yaml"), "blocks.wsi: "),
}  # fmt: skip


def one_line(folder: Path, capsys: pytest.CaptureFixture[str], expected: str, *more: str) -> None:
    assert merge(folder, *more) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("motet merge: ")
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 1000
    assert expected in printed.err
    assert not (folder / "merged").exists()


@pytest.mark.parametrize("what", BAD)
def test_bad_recipes_are_one_clear_line(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, expected = BAD[what]
    (folder / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    one_line(folder, capsys, expected)
    assert cli.main(["merge", str(folder / "recipe.yaml"), "--out", str(folder / "merged")]) == 2
    assert f"{folder / 'recipe.yaml'}: " in capsys.readouterr().err


def test_blocks_that_do_not_fit_are_one_clear_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "blocks" / "wsi.safetensors"
    for other, expected in (
        (block(motet.Bag(5), latent_dim=16), "blocks['wsi']: expected latent_dim 8 as blocks['omi"),
        (block(motet.Bag(5), num_latents=5), "expected num_latents 4"),
        (block(motet.Bag(5), fft=None), "expected fft '2d'"),
        (block(motet.Bag(5), out_features=2), "expected out_features 3"),
        (block(motet.Bag(5)).double(), "expected torch.float32"),
        (block(motet.Bag(5), nn.Linear(5, 5)), "expected the block's own encoder, a Linear"),
        (motet.LegoMerge({"wsi": block(motet.Bag(5))}), "expected a LegoBlock, got LegoMerge"),
    ):
        motet.save(other, path)
        one_line(folder, capsys, expected)
    path.write_bytes(path.read_bytes()[:-5])
    one_line(folder, capsys, "blocks.wsi: ")


def test_bad_arguments_are_one_clear_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_line(folder, capsys, "--method: expected it in the recipe, got 'mean'", "--method", "mean")
    one_line(folder, capsys, "--head: expected it in the recipe, got 'ot'", "--head", "ot")
    one_line(folder, capsys, "expected run folders with --data", "--data", str(folder))
    several = [str(folder), str(folder / "recipe.yaml"), "--out", str(folder / "merged")]
    assert cli.main(["merge", *several]) == 2
    assert "expected one recipe or run folders, got 2 paths" in capsys.readouterr().err
    (folder / "recipe.yaml").write_text(RECIPE.replace("slerp", "ot"))
    monkeypatch.setattr(merge_recipe, "find_spec", lambda name: None)
    one_line(folder, capsys, "head: ot needs POT: pip install POT")
    (folder / "recipe.yaml").unlink()
    one_line(folder, capsys, "recipe.yaml: expected a recipe, got no such file")


# Run folders


@pytest.fixture(scope="module")
def lego(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of blocks for genes and clinical, with two folds."""
    out = tmp_path_factory.mktemp("runs") / "lego"
    cohort = load_cohort("breast_cancer")
    experiments.train_run(
        cohort,
        "lego",
        out,
        changes={"epochs": 2, "num_latents": 4, "latent_dim": 8},
        splits=experiments.Splits(2),
    )
    return out


def test_runs_merge_fold_by_fold(
    lego: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "phase: circular\nhead: linear\nblocks:\n"
        f"  clinical: {{model: {os.path.relpath(lego, tmp_path)}/blocks/clinical, weight: 3}}\n"
        f"  genes: {lego}\n"
    )
    assert merge(tmp_path, text=text) == 0
    run = Run.finished(tmp_path / "merged")
    weights = {"clinical": 0.75, "genes": 0.25}
    given = {"method": "harmonic", "phase": "circular", "head": "linear", "weights": weights}
    assert {key: run.config["options"][key] for key in given} == given
    cohort = load_cohort("breast_cancer")
    for number in range(2):
        fitted_blocks = {
            name: Run.finished(lego / "blocks" / name).fitted(number) for name in weights
        }
        expected = motet.LegoMerge({name: one.model for name, one in fitted_blocks.items()},
                                   phase="circular", head="linear", weights=weights)  # fmt: skip
        fitted = run.fitted(number)
        assert fitted.model.config == expected.config
        for actual, parameter in zip(fitted.model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(actual, parameter)
    before = {str(p): p.read_bytes() for p in (tmp_path / "merged").rglob("*.*") if p.is_file()}
    assert merge(tmp_path) == 0
    assert before == {str(p): Path(p).read_bytes() for p in before}

    card = (tmp_path / "merged" / "README.md").read_text()
    parts = card[card.index("### clinical") :].split("### genes")
    for name, part in zip(weights, parts, strict=True):
        digest = hashlib.sha256()
        for number in range(2):
            path = lego / "blocks" / name / "folds" / str(number) / "model.safetensors"
            digest.update(path.read_bytes())
        assert f"* SHA-256 of 2 folds' files, one after the other: `{digest.hexdigest()}`\n" in part
        assert f"* weight: {weights[name]:g}\n" in part
        config = json.loads((lego / "blocks" / name / "config.json").read_text())
        assert json.loads(code_in(part, "json")[0]) == config
    assert code_in(card, "yaml") == [text]
    monkeypatch.chdir(tmp_path / "merged")
    names: dict = {}
    exec("\n".join(code_in(card, "python")), names)
    expected = experiments.predict_cohort(run, cohort)
    assert names["table"].equals(expected)
    (shell,) = code_in(card, "sh")
    (tmp_path / "merged" / "new.yaml").write_text(
        (Path(motet.__file__).parent / "io/cohorts/shipped/breast_cancer.yaml").read_text()
    )
    assert cli.main(shell.split()[1:]) == 0


def test_the_short_command_is_a_recipe_of_equal_weights(lego: Path, tmp_path: Path) -> None:
    assert cli.main(["merge", str(lego), "--out", str(tmp_path / "short")]) == 0
    card = (tmp_path / "short" / "README.md").read_text()
    command = code_in(card, "sh")[0]
    assert command == f"motet merge {lego} --method harmonic --head slerp\n"
    text = f"blocks: {{genes: {lego}/blocks/genes, clinical: {lego}/blocks/clinical}}\n"
    assert merge(tmp_path, text=text) == 0
    short, long = (Run.finished(tmp_path / name) for name in ("short", "merged"))
    assert short.config == long.config
    assert short.predictions().equals(long.predictions())
    for number in range(2):
        name = f"folds/{number}/model.safetensors"
        assert (short.path / name).read_bytes() == (long.path / name).read_bytes()
    assert short.predictions().equals(Run.finished(lego).predictions())


def test_bad_runs_are_one_clear_line(
    lego: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"blocks: {{genes: {lego}, clinical: {lego}}}\n"

    def refused(text: str, expected: str) -> None:
        (tmp_path / "recipe.yaml").write_text(text)
        one_line(tmp_path, capsys, expected)

    refused(
        text.replace("genes:", "omic:"),
        f"blocks.omic: expected the name of a modality in {lego}, 'genes' or 'clinical', got 'omic",
    )
    refused(text.replace(f"{lego},", f"{tmp_path},"), "not a run folder")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "README.md").write_text("mine")
    assert merge(tmp_path, text=text) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    (tmp_path / "merged" / "README.md").unlink()
    assert merge(tmp_path) == 0
    capsys.readouterr()
    assert merge(tmp_path, text=text + "phase: circular\n") == 2  # as every run
    assert "holds a run with options" in capsys.readouterr().err
    (tmp_path / "merged" / "README.md").write_text("mine")
    assert merge(tmp_path, text=text) == 2
    assert "is no card of such a merge" in capsys.readouterr().err
    assert (tmp_path / "merged" / "README.md").read_text() == "mine"
