"""The paper's claims: full runs, a killed run, and sentences that agree with the numbers."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import motet
import numpy as np
import pandas as pd
import pytest
import torch
from benchmarks import claims
from benchmarks.claims import (
    addition,
    interference,
    merging,
    overlap,
    rows,
    scaling,
    scores,
    study,
)
from benchmarks.claims.__main__ import main
from benchmarks.claims.rows import Row
from motet import experiments
from motet.experiments import train
from motet.io import Bags, Cohort, load_cohort

from .conftest import ROOT

QUICK = ["--quick", "--cohort", "breast_cancer"]


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (scores, interference, scaling):
        monkeypatch.setattr(module, "DRAWS", 100)


def row(value: float, low: float, high: float, **fields: Any) -> Row:
    defaults = {"case": "a", "what": "x", "than": "y", "block": "", "measure": "AUC", "seed": None}
    return Row(**{**defaults, "n": 9, "value": value, "low": low, "high": high, **fields})


ABOVE, BELOW, NEITHER = row(0.2, 0.1, 0.3), row(-0.2, -0.3, -0.1), row(0.1, -0.1, 0.3)


# Sentences


def test_sentences_follow_the_intervals() -> None:
    assert rows.describe("A", "B", [ABOVE]) == "A is better than B on a (+0.200, +0.100 to +0.300)"
    assert rows.describe("A", "B", [BELOW]) == "A is worse than B on a (-0.200, -0.300 to -0.100)"
    none = "A shows no difference from B on a (+0.100, -0.100 to +0.300)"
    assert rows.describe("A", "B", [NEITHER]) == none
    both = rows.describe("A", "B", [ABOVE, NEITHER, BELOW])
    assert both.index("better") < both.index("worse") < both.index("no difference")
    assert rows.verdict([ABOVE]) == "as the paper claims"
    assert rows.verdict([ABOVE, NEITHER]) == "as the paper claims where any is shown"
    assert rows.verdict([BELOW, NEITHER]) == "against the paper's claim"
    assert rows.verdict([ABOVE, BELOW]) == "partly as the paper claims, partly against it"
    assert rows.verdict([NEITHER]) == "neither for nor against the paper's claim"
    assert "against" in rows.loss_verdict([ABOVE, BELOW])
    assert rows.loss_verdict([ABOVE, NEITHER]).startswith("no loss shown")
    assert rows.loss_verdict([NEITHER, row(0, -0.02, 0.02, case="b")]).endswith(
        "none above 0.100 on a and 0.020 on b left possible"
    )


def test_claims_say_what_their_rows_say() -> None:
    better = merging.conclude([row(0.2, 0.1, 0.3, than=than) for than in merging.RIVALS])
    assert better.count("is better than") == 2
    assert better.count("as the paper claims") == 2
    worse = merging.conclude([row(-0.2, -0.3, -0.1, than=than) for than in merging.RIVALS])
    assert worse.count("is worse than") == 2
    assert worse.count("against the paper's claim") == 2
    # Rows of a single seed or a single block do not decide.
    unseen = [row(-0.2, -0.3, -0.1, than=merging.RIVALS[0], **one) for one in
              ({"seed": 0}, {"block": "genes"})]  # fmt: skip
    assert "worse" not in merging.conclude([row(0.2, 0.1, 0.3, than=merging.RIVALS[0]), *unseen])

    none = {"what": "LegoMerge, 0% in common"}
    end = row(0.1, -0.1, 0.3, than="HEALNet, all", **none)
    lost = row(-0.2, -0.3, -0.1, than="100% in common", **none)
    kept = row(0.0, -0.05, 0.05, than="100% in common", **none)
    assert "is worse than that of blocks with all" in overlap.conclude([lost, end])
    assert "none above 0.050 on a left possible" in overlap.conclude([kept, end])

    steps = [row(0.2, 0.1, 0.3, than="the first alone"), row(-0.2, -0.3, -0.1, than="one less")]
    sentence = addition.conclude(steps)
    assert "is better than its first modality alone" in sentence
    assert "0 of the additions improve the model by themselves, 1 make it worse" in sentence

    paper, plain = ", ".join(interference.PAPER), ", ".join(interference.PLAIN)
    probe = row(0.2, 0.1, 0.3, what=paper, than=plain)
    worth = row(-0.2, -0.3, -0.1, what=f"{paper}, others shuffled", than=plain)
    sentence = interference.conclude([probe, worth])
    assert "keep more of a block than those merged without a transform" in sentence
    assert sentence.index("as the paper claims") < sentence.index("against the paper's claim")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.95, 1.05, "within 10%"),
        (0.7, 0.8, "less than 90%"),
        (1.2, 1.3, "not within 10%"),
        (0.8, 1.0, "not shown within 10%"),
    ],
)
def test_scaling_says_what_the_interval_says(low: float, high: float, words: str) -> None:
    sentence = scaling._within(row((low + high) / 2, low, high))
    assert sentence == words


def test_a_mean_over_seeds_keeps_every_seed() -> None:
    estimates = [(motet.Estimate(0.6, 0.5, 0.7), 10), (motet.Estimate(0.8, 0.6, 0.9), 12)]
    first, second, mean = rows.over_seeds(estimates, case="a", what="x", measure="AUC")
    assert (first.seed, second.seed, mean.seed) == (0, 1, None)
    assert (first.value, second.value) == (0.6, 0.8)
    # Mean distance of the ends: 0.15 below, 0.1 above; the standard error of the seeds is 0.1.
    ends = 0.7 - np.hypot(0.15, 0.196), 0.7 + np.hypot(0.1, 0.196)
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.7, *ends), abs=1e-12)
    alone = rows.over_seeds(estimates[:1], case="a", what="x", measure="AUC")[1]
    assert (alone.value, alone.low, alone.high) == (0.6, 0.5, 0.7)
    estimates.append((motet.Estimate(1.0, 0.9, 1.0), 9))
    *_, share = rows.over_seeds(estimates, case="a", what="x", measure="AUC")
    assert share.high == 1.0
    assert rows.means([first, mean, row(1, 1, 1, block="genes")]) == [mean]


# Computations


def test_straight_lines() -> None:
    line, worst = scaling.straight([1, 2, 4], [3.0, 5.0, 9.0])
    assert line == pytest.approx([2, 1], abs=1e-9)
    assert worst < 1e-9
    _, worst = scaling.straight([1, 2, 4], [3.0, 6.0, 9.0])
    assert 0.05 < worst < 0.2


def test_probes_read_what_is_there() -> None:
    latents, noise = torch.randn(2, 300, 3, 2, dtype=torch.complex128)
    targets = latents.real.flatten(1)[:, :2] + latents.imag.flatten(1)[:, :2]
    train, test = slice(0, 200), slice(200, None)

    def r2(seen: torch.Tensor) -> float:
        errors = interference._probe_errors(seen[train], seen[test], targets[train], targets[test])
        return 1 - errors[:, 0].sum() / errors[:, 1].sum()

    assert r2(latents) > 0.999
    assert r2(noise) < 0.05


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_overlaps_are_exact(share: float) -> None:
    """Each block trains on equally many patients at every overlap; `share` of them is common."""
    cohort = load_cohort("breast_cancer")
    (fold,) = (split_of(cohort),)
    first, common, second_only = overlap.draw_patients(cohort, fold, share, 3)
    k = len(fold.train) // 2
    assert len(first) == len(common | second_only) == k
    assert common == first & (common | second_only)
    assert len(common) == round(share * k)
    assert first | second_only <= set(fold.train)
    assert first == overlap.draw_patients(cohort, fold, 0.0, 3)[0]
    outcome = pd.Series(cohort.outcome.events, cohort.patients)  # pyright: ignore
    events = [outcome[list(part)].mean() for part in (first, common | second_only)]
    assert abs(events[0] - events[1]) < 0.05

    masked = overlap.mask_patients(cohort, fold, {"genes": first, "clinical": common | second_only})
    genes = masked.modalities["genes"]
    assert set(genes.index[genes.notna().any(axis=1)]) == {  # pyright: ignore
        *first, *fold.validation, *fold.test
    }  # fmt: skip
    kept = [*fold.validation, *fold.test]
    for name, table in masked.modalities.items():
        pd.testing.assert_frame_equal(table.loc[kept], cohort.modalities[name].loc[kept])  # pyright: ignore


def test_overlap_needs_patients_with_both() -> None:
    cohort = load_cohort("breast_cancer")
    fold = split_of(cohort)
    bare = overlap.mask_patients(cohort, fold, {"genes": set(), "clinical": set(fold.train)})
    with pytest.raises(ValueError, match="training patients who have genes and clinical, got none"):
        overlap.draw_patients(bare, fold, 0.5, 0)


def test_overlaps_of_bags() -> None:
    one = np.ones((2, 3), np.float32)
    bags = Bags(dict.fromkeys("abcd", (one, None)), features=3)
    table = pd.DataFrame({"x": [1.0, 2.0, 3.0, 4.0]}, index=list("abcd"))
    cohort = Cohort("c", tuple("abcd"), tuple("abcd"), None, {"bag": bags, "row": table}, None)
    fold = motet.io.Split(("a", "b"), ("c",), ("d",))
    masked = overlap.mask_patients(cohort, fold, {"bag": {"a"}, "row": {"b"}})
    assert masked.modalities["bag"].patients == ("a", "c", "d")  # pyright: ignore
    assert masked.modalities["row"]["x"].isna().tolist() == [True, False, False, False]  # pyright: ignore


def split_of(cohort: Cohort) -> motet.io.Split:
    return experiments.split_cohort(cohort, experiments.Splits(2))[0]


# From end to end


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which several claims share trained blocks."""
    return tmp_path_factory.mktemp("claims")


def results(out: Path) -> dict[str, Any]:
    """Return the JSON that a claim wrote; check its figure, and that the CSV has equal numbers."""
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert 5_000 < (out / "figure.png").stat().st_size < 150_000
    report = json.loads((out / "results.json").read_text())
    table = pd.read_csv(out / "results.csv", keep_default_na=False)
    assert len(table) == len(report["rows"]) > 3
    for line, entry in zip(table.to_dict("records"), report["rows"], strict=True):
        assert list(line) == list(entry)
        for name in ("value", "low", "high"):
            assert float(line[name]) == pytest.approx(entry[name], abs=1e-12)
            assert np.isfinite(entry[name])
        for name in ("case", "what", "than", "block", "measure"):
            assert line[name] == entry[name]
        assert line["seed"] == ("" if entry["seed"] is None else str(entry["seed"]))
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["n"] > 0
    return report


def of_all(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in report["rows"] if r["seed"] == 0 and not r["block"]]


def of(report: dict[str, Any], **fields: Any) -> dict[str, Any]:
    (one,) = [r for r in report["rows"] if all(r[k] == v for k, v in fields.items())]
    return one


def test_merging(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merging", "--out", str(shared), *QUICK, "--json"]) == 0
    report = results(shared)
    assert json.loads(capsys.readouterr().out) == report
    assert report["settings"] == {
        "cohorts": {"breast_cancer": ["genes", "clinical"]}, "seeds": 1, "quick": True
    }  # fmt: skip
    gain = of(report, what="LegoMerge", than="the ensemble", seed=None)
    words = "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "no difference"
    assert words in report["sentence"].split("; ")[1]
    # The figures equal those of the runs.
    run = experiments.Run.finished(shared / "runs/breast_cancer/seed0/2d")
    merged = of(report, what="LegoMerge", than="", seed=0)
    c = experiments.read_metrics(run)["harrell_c"]
    assert merged["value"] == pytest.approx(c["value"], abs=1e-12)
    # The ensemble is the mean of the blocks' hazards.
    cohort = load_cohort("breast_cancer")
    blocks = {name: experiments.Run.open(run.path / "blocks" / name).fitted(0)
              for name in cohort.modalities}  # fmt: skip
    ids, risks = scores.ensemble(blocks, cohort, run.splits[0]["test"])
    hazards = []
    for fitted in blocks.values():
        logits = fitted.logits(fitted.patients(cohort.modalities, ids))
        hazards.append(motet.hazards(logits))
    by_hand = -(1 - torch.stack(hazards).mean(0)).cumprod(1).sum(1).numpy()
    np.testing.assert_allclose(risks, by_hand, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_interference(shared: Path) -> None:
    assert main(["interference", "--out", str(shared), *QUICK]) == 0
    report = results(shared)
    for transform in interference.TRANSFORMS:
        for method in interference.METHODS:
            case = f"{transform}, {method}"
            probe = of(report, what=case, than="", measure=interference.PROBE, block="", seed=None)
            assert probe["value"] < 1
            for name in ("genes", "clinical"):
                of(report, what=f"{case}, others shuffled", block=name, than="block alone", seed=0)
    # Its harmonic merge predicts what the run's LegoMerge predicts.
    run = experiments.Run.finished(shared / "runs/breast_cancer/seed0/2d")
    cohort = load_cohort("breast_cancer")
    one = study.Study("breast_cancer", cohort, run.path.parent.parent, 1, True)
    merges = interference._predict(one, 0, "2d", "2d")
    predicted = scores.scores_of(run)
    for actual, expected in zip(merges.merged["harmonic"], predicted, strict=True):
        assert actual.ids == expected.ids
        np.testing.assert_allclose(actual.fold.risks, expected.fold.risks, rtol=0, atol=1e-7)  # pyright: ignore
    # Shuffling the other modality's patients changes the merge's predictions.
    for name in ("genes", "clinical"):
        assert not np.array_equal(
            merges.shuffled["mean"][name][0].fold.risks, merges.merged["mean"][0].fold.risks  # pyright: ignore
        )  # fmt: skip


def test_addition(shared: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    command = ["addition", "--out", str(shared), *QUICK]
    assert main(command) == 0
    report = results(shared)
    assert "No byte of the blocks before changed in 1 additions" in report["sentence"]
    alone = experiments.Run.finished(shared / "runs/breast_cancer/seed0/2d/blocks/genes")
    first = of(report, what="1: genes", seed=0)
    c = experiments.read_metrics(alone)["harrell_c"]["value"]
    assert first["value"] == pytest.approx(c, abs=1e-12)
    both = experiments.Run.finished(shared / "runs/breast_cancer/seed0/2d")
    last = of(report, what="2: and clinical", than="", seed=0)
    c = experiments.read_metrics(both)["harrell_c"]["value"]
    assert last["value"] == pytest.approx(c, abs=1e-12)
    add = motet.LegoMerge.add

    def meddling(self, name, block):
        with torch.no_grad():
            bigger = add(self, name, block)
            bigger.blocks["genes"].latents[0, 0] += 1e-6
        return bigger

    monkeypatch.setattr(motet.LegoMerge, "add", meddling)
    with pytest.raises(RuntimeError, match="block 'genes' changed when 'clinical' was added"):
        main(command)


@pytest.mark.slow
def test_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.Study, "splits", 1)
    chosen = experiments.Splits
    monkeypatch.setattr(
        experiments, "Splits", lambda count, **o: chosen(count, **{**o, "test": 0.3})
    )
    assert main(["overlap", "--out", str(tmp_path), *QUICK]) == 0
    report = results(tmp_path)
    assert [r["what"] for r in of_all(report) if not r["than"]] == [
        *(f"LegoMerge, {share}% in common" for share in (0, 50, 100)),
        *(f"the ensemble, {share}% in common" for share in (0, 50, 100)),
        *(f"HEALNet, those in common, {share}% in common" for share in (50, 100)),
        *(f"HEALNet, all, {share}% in common" for share in (0, 50, 100)),
    ]
    assert len({r["n"] for r in report["rows"]}) == 1
    # The first block has the same patients at every overlap; the other block has not.
    first, other = (
        [of(report, what=f"block, {share}% in common", block=name, seed=0)["value"]
         for share in (0, 50, 100)]
        for name in ("genes", "clinical")
    )  # fmt: skip
    assert len(set(first)) == 1
    assert len(set(other)) > 1


def test_a_killed_claim_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(study.Study, "splits", 1)
    chosen = experiments.Splits
    monkeypatch.setattr(
        experiments, "Splits", lambda count, **o: chosen(count, **{**o, "test": 0.3})
    )
    command = ["merging", "--out", str(tmp_path), *QUICK]
    merge = train.merge_runs

    def killed(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "merge_runs", killed)
    assert main(command) == 130
    assert "continues where it stopped" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    trained = sorted(tmp_path.glob("runs/**/model.safetensors"))
    assert len(trained) == 2
    times = [path.stat().st_mtime_ns for path in trained]
    monkeypatch.setattr(train, "merge_runs", merge)
    assert main(command) == 0
    assert [path.stat().st_mtime_ns for path in trained] == times
    first = results(tmp_path)
    assert main(command) == 0
    assert results(tmp_path)["rows"] == first["rows"]


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_latents": 2, "latent_dim": 4, "heads": 1, "head_dim": 2}
    monkeypatch.setattr(scaling, "LegoBlock", partial(motet.LegoBlock, **small))
    measured = []

    def no_child(threads: int, function: Any, kind: str, step: str, counts: Any) -> list[float]:
        measured.append((kind, step))
        return [2.0 + 3.0 * m for m in counts]

    monkeypatch.setattr(scaling, "in_child", no_child)
    result = claims.run_claim("scaling", tmp_path, quick=True)
    report = results(tmp_path)
    assert len(measured) == len(set(measured)) == 6
    assert (
        report["sentence"].count("of 3 times one") + report["sentence"].count("of 2 times one") == 6
    )
    assert "memory 0% from a straight line" in result.sentence
    for case in ("LegoMerge, forward", "LegoFuse weave, forward and backward"):
        per_block = of(report, case=case, what="per further block", measure="MiB")
        assert per_block["value"] == pytest.approx(3.0, abs=1e-9)
        middle = {m: of(report, case=case, what=str(m), measure="ms")["value"] for m in (1, 2)}
        ratio = of(report, case=case, what="2", measure="share of M blocks")["value"]
        assert ratio == pytest.approx(middle[2] / (2 * middle[1]), rel=1e-9)


def test_memory_grows_with_the_model() -> None:
    small, large = scaling._memory_of("LegoMerge", "forward", (1, 2))
    assert 0 <= small <= large


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["truth"], "name: expected one of interference, merging, overlap, addition, scaling"),
        (["merging", "--seeds", "0"], "--seeds: expected a positive integer, got 0"),
        (["merging", "--cohort", "nowhere"], "no cohort 'nowhere'"),
        (["scaling", "--cohort", "breast_cancer"], "scaling needs no patients"),
        (
            ["merging", "--cohort", "breast_cancer", "--modalities", "genes"],
            "--modalities: expected at least two of genes, clinical, got genes",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys) -> None:
    code = main([*arguments, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_command_knows_every_claim(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    usage = capsys.readouterr().out
    assert all(name in usage for name in claims.CLAIMS)
    makefile = (ROOT / "Makefile").read_text()
    assert f"for name in {' '.join(claims.CLAIMS)}; do" in makefile


def test_cohorts_without_data_are_left_out(tmp_path: Path, capsys) -> None:
    options = {
        "data": tmp_path,
        "modalities": None,
        "seeds": 1,
        "quick": True,
        "required": False,
        "defaults": {},
    }
    studies = study.studies(("hancock_os", "breast_cancer"), tmp_path, **options)
    assert [one.name for one in studies] == ["breast_cancer"]
    assert "hancock_os is left out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="name a cohort"):
        study.studies(("hancock_os",), tmp_path, **options)
