"""How much of each block's information a merge keeps, in the frequency domain and without it."""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from motet.experiments import Run
from motet.fusion.fitted import Fitted
from motet.fusion.lego_merge import LegoMerge
from motet.fusion.objectives import Objective
from motet.fusion.patients import PatientBatch, Patients
from motet.fusion.resampling import Estimate
from torch import Tensor

from .rows import Figure, Row, describe, mean_of, means, over_seeds, verdict
from .scores import (
    DRAWS,
    Floats,
    PartPredictions,
    Scores,
    calibrate,
    compute_difference,
    compute_metric,
    part_predictions,
    values_of,
)
from .study import Study, fitted_at, models_of

PENALTIES = np.logspace(-1, 5, 13)
CLIP = 5.0  # standard deviations
TRANSFORMS = {"2d": "2d", "latents": "latents", "none": None}
METHODS = ("harmonic", "mean", "sum", "product")
# The paper's merge, and the simplest merge without a transform.
PAPER, PLAIN = ("2d", "harmonic"), ("none", "mean")
COMPARED = [(PAPER, PLAIN), *((("2d", method), ("none", method)) for method in METHODS)]
"""Pairs of merges, (transform, method), whose difference is a row."""
PROBE = "R² of the probe"


class MergePredictions(NamedTuple):
    """The predictions with the blocks of one seed and one transform."""

    blocks: dict[str, Scores]
    """By block: of the block alone."""
    merged: dict[str, Scores]
    """By method: of the merged model."""
    shuffled: dict[str, dict[str, Scores]]
    """By method and block: of the merged model, if all modalities but the block's are taken from
    another patient."""
    probes: dict[str, dict[str, list[Floats]]]
    """By method and block: squared errors of the probe and of the mean, [n, 2] per fold."""


def measure(study: Study) -> list[Row]:
    """Merge blocks with and without a transform, by every method; measure the loss of each block.

    There are three measures for a block:

    * "others shuffled": the metric of the merged model less that of the block alone, if all other
      modalities are taken from another patient. Then they add nothing but interference.
    * "merged": the metric of the merged model less that of the block alone. Here the other
      modalities add information too.
    * R² on test patients of a linear (ridge) probe, which predicts the block's logits from the
      merged latents and is fitted on training patients.

    Only patients with all modalities count, so that every merge is a merge of all blocks. Means
    over blocks leave out the blocks whose own interval is not above chance: they have no
    information to lose.

    Raises:
        ValueError: too few patients have all modalities.
    """
    seeds = [
        {name: _predict(study, seed, name, fft) for name, fft in TRANSFORMS.items()}
        for seed in range(study.seeds)
    ]
    names = list(study.cohort.modalities)
    rows: list[Row] = []

    def add(label: str, figures: list[dict[str, Figure]], measure: str, than: str = "") -> None:
        """Add rows for each block, and for the mean over the informative blocks.

        `figures` has a dict for each seed, by block.
        """
        row = partial(over_seeds, case=study.name, what=label, than=than, measure=measure)
        for name in figures[0]:
            rows.extend(row([by_block[name] for by_block in figures], block=name))
        rows.extend(
            row([mean_of([by_block[name] for name in informative]) for by_block in figures])
        )

    alone = {
        transform: [
            {name: compute_metric(seed[transform].blocks[name]) for name in names} for seed in seeds
        ]
        for transform in TRANSFORMS
    }
    informative = [
        name
        for name in names
        if all(
            statistics.fmean(by_block[name][0].low for by_block in figures) > 0.5
            for figures in alone.values()
        )
    ] or names
    for transform, figures in alone.items():
        add(f"{transform}, block alone", figures, study.measure)
        predictions = [seed[transform] for seed in seeds]
        for method in METHODS:
            merge = f"{transform}, {method}"
            shuffled = [
                {name: compute_difference(p.shuffled[method][name], p.blocks[name])
                 for name in names}
                for p in predictions
            ]  # fmt: skip
            add(f"{merge}, others shuffled", shuffled, study.measure, "block alone")
            merged = [
                {name: compute_difference(p.merged[method], p.blocks[name]) for name in names}
                for p in predictions
            ]
            add(f"{merge}, merged", merged, study.measure, "block alone")
    for (transform, method), (other_transform, other_method) in COMPARED:
        pairs = [
            (seed[transform].shuffled[method], seed[other_transform].shuffled[other_method])
            for seed in seeds
        ]
        differences = [
            {name: compute_difference(a[name], b[name]) for name in names} for a, b in pairs
        ]
        label = f"{transform}, {method}, others shuffled"
        add(label, differences, study.measure, f"{other_transform}, {other_method}")
    return rows + _probe_rows(study, seeds, informative)


def _predict(study: Study, seed: int, transform: str, fft: str | None) -> MergePredictions:
    """Train blocks with one transform, merge them by every method, and predict the test parts."""
    # With the default transform these are the runs of the other claims: no change is given.
    run = study.train("lego", seed, transform, changes={} if fft == "2d" else {"fft": fft})
    predictions = MergePredictions({}, {}, {m: {} for m in METHODS}, {m: {} for m in METHODS})
    runs = study.blocks(run)
    for number, split in enumerate(run.splits):
        fitted = fitted_at(runs, number)
        scaling = {name: block.scaling[name] for name, block in fitted.items()}
        parts = {}
        for part in ("train", "test"):
            patients = Patients.of(study.cohort.modalities, scaling, split[part])
            complete = torch.stack([patients.has(name) for name in scaling]).all(0)
            parts[part] = patients.select(complete)
        train, test = parts["train"], parts["test"]
        if len(test) < 2 or not len(train):
            raise ValueError(
                f"{study.name}: expected patients who have all of {', '.join(scaling)}, got "
                f"{len(train)} in the train part and {len(test)} in the test part of fold "
                f"{number + 1}; choose other --modalities"
            )
        # The patients stand in a random circle, and each gets the other modalities of a neighbour:
        # no patient gets their own.
        circle = np.random.default_rng((seed, number)).permutation(len(test))
        donors = torch.empty(len(test), dtype=torch.long)
        donors[circle] = torch.from_numpy(np.roll(circle, 1))
        others = test.select(donors)
        score = partial(_score, run, number, test.ids)
        logits = {}
        for name, block in fitted.items():
            logits[name] = [
                block.logits(block.patients(study.cohort.modalities, part.ids))
                for part in (train, test)
            ]
            predictions.blocks.setdefault(name, []).append(score(block.objective, logits[name][1]))
        for method in METHODS:
            model = LegoMerge(models_of(fitted), method=cast(Any, method)).eval()
            merged = calibrate(model, fitted, study.cohort, run, number)
            merged_logits, test_latents = _outputs(merged, test)
            train_latents = _outputs(merged, train)[1]
            values = score(merged.objective, merged_logits)
            predictions.merged.setdefault(method, []).append(values)
            for name in fitted:
                values = _outputs(merged, test, others, name)[0]
                shuffled = score(merged.objective, values)
                predictions.shuffled[method].setdefault(name, []).append(shuffled)
                errors = _probe_errors(train_latents, test_latents, *logits[name])
                predictions.probes[method].setdefault(name, []).append(errors)
    return predictions


def _score(
    run: Run, number: int, ids: Sequence[str], objective: Objective, logits: Tensor
) -> PartPredictions:
    return part_predictions(run, number, ids, values_of(objective, logits))


@torch.no_grad()
def _outputs(
    merged: Fitted, patients: Patients, others: Patients | None = None, kept: str = ""
) -> tuple[Tensor, Tensor]:
    """Return calibrated logits and latents of patients.

    Args:
        merged: the merged model.
        patients: whose outputs are computed.
        others: patients from whom all modalities but `kept` are taken, one for each; None to take
            all from `patients`.
        kept: the modality that is always taken from `patients`.
    """
    outputs = []
    for rows in torch.arange(len(patients)).split(16):
        batch = patients.__getitems__(rows.tolist())
        if others is not None:
            other = others.__getitems__(rows.tolist())
            batch = PatientBatch(
                {**other.x, kept: batch.x[kept]},
                {**other.coords, **{k: at for k, at in batch.coords.items() if k == kept}},
                {},
                {},
            )
        inputs, options = batch.arguments()
        outputs.append(merged.model(inputs, **options, return_latents=True))
    logits = torch.cat([output.logits for output in outputs])
    latents = torch.cat([output.latents for output in outputs])
    assert merged.calibrations is not None
    calibrated = merged.calibrations.apply(patients, logits.double().numpy())
    return torch.from_numpy(calibrated), latents


def _probe_errors(
    train_latents: Tensor, test_latents: Tensor, train_logits: Tensor, test_logits: Tensor
) -> Floats:
    """Return the squared errors of a ridge probe, and of the training mean, [n, 2].

    Args:
        train_latents: merged latents of the training patients, [m, C, D].
        test_latents: merged latents of the test patients, [n, C, D].
        train_logits: a block's logits of the training patients, [m, K].
        test_logits: a block's logits of the test patients, [n, K].
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    def flat(latents: Tensor) -> Floats:
        parts = torch.view_as_real(latents) if latents.is_complex() else latents
        return parts.flatten(1).double().numpy()

    # Clipped, because of the harmonic merge of real numbers. Its imaginary part is zero unless the
    # signs of the merged numbers differ. If they differ in almost no training patient, the standard
    # deviation is tiny, and a test patient in whom they differ would be huge after scaling.
    scaler = StandardScaler().fit(flat(train_latents))
    x, x_test = (
        np.clip(scaler.transform(flat(z)), -CLIP, CLIP) for z in (train_latents, test_latents)
    )
    y_scaler = StandardScaler().fit(train_logits.double().numpy())
    y, y_test = (
        np.asarray(y_scaler.transform(z.double().numpy())) for z in (train_logits, test_logits)
    )
    predicted = np.reshape(RidgeCV(PENALTIES).fit(x, y).predict(x_test), y_test.shape)
    return np.stack([((y_test - predicted) ** 2).sum(1), (y_test**2).sum(1)], axis=1)


def _probe_rows(
    study: Study, seeds: list[dict[str, MergePredictions]], informative: list[str]
) -> list[Row]:
    """Return the rows of R² over the patients of all folds, and of paired differences.

    `informative` are the blocks over which means are taken.
    """
    names = list(study.cohort.modalities)
    # (transform, method, block or "" for the mean) -> for each seed R², R² of the bootstrap, n.
    results: dict[tuple[str, str, str], list[tuple[float, Floats, int]]] = {}
    for number, seed in enumerate(seeds):
        size = sum(map(len, next(iter(next(iter(seed.values())).probes["mean"].values()))))
        generator = np.random.default_rng(number)
        counts = generator.multinomial(size, np.full(size, 1 / size), size=DRAWS)
        for transform, predictions in seed.items():
            for method in METHODS:
                r2 = {}
                for name in names:
                    errors = np.concatenate(predictions.probes[method][name])
                    sums, total = counts @ errors, errors.sum(0)
                    r2[name] = (1 - total[0] / total[1], 1 - sums[:, 0] / sums[:, 1], size)
                values, draws, _ = zip(*(r2[name] for name in informative), strict=True)
                r2[""] = (statistics.fmean(values), np.mean(draws, axis=0), size)
                for name, result in r2.items():
                    results.setdefault((transform, method, name), []).append(result)

    def make_figure(value: float, draws: Floats, size: int) -> Figure:
        return Estimate(value, *map(float, np.quantile(draws, [0.025, 0.975]))), size

    rows = []
    row = partial(over_seeds, case=study.name, measure=PROBE)
    for (transform, method, name), seed_results in results.items():
        figures = [make_figure(*result) for result in seed_results]
        rows += row(figures, what=f"{transform}, {method}", block=name)
    for merge, other in COMPARED:
        differences = [
            make_figure(a[0] - b[0], a[1] - b[1], a[2])
            for a, b in zip(results[*merge, ""], results[*other, ""], strict=True)
        ]
        rows += row(differences, what=", ".join(merge), than=", ".join(other))
    return rows


def conclude(rows: Sequence[Row]) -> str:
    """Return a sentence: the paper's merge against the simplest merge without a transform."""
    paper, plain = ", ".join(PAPER), ", ".join(PLAIN)
    probes, shuffled = (
        [row for row in means(rows) if row.what == label and row.than == plain]
        for label in (paper, f"{paper}, others shuffled")
    )
    kept = describe(
        "latents merged in the frequency domain (2d, harmonic)",
        "those merged without a transform (mean)",
        probes,
        above_verb="keep more of a block than",
        below_verb="keep less than",
    )
    worth = describe("what the former predict", "what the latter do", shuffled)
    return (
        f"Read by a linear probe, {kept}: {verdict(probes)}; once the other modalities are another "
        f"patient's, {worth}: {verdict(shuffled)}."
    )
