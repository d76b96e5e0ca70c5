"""What merging does to what each block knew, in the frequency domain and without a transform."""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from motet.experiments import Run
from motet.fusion.lego_merge import LegoMerge
from motet.fusion.objectives import Objective
from motet.fusion.patients import PatientBatch, Patients
from motet.fusion.resampling import Estimate
from motet.fusion.training import predict_logits
from torch import Tensor, nn

from .rows import Found, Row, mean_of, means, over_seeds, said, verdict
from .scores import DRAWS, Floats, Scores, Tested, figure, less, tested, values_of
from .study import Study, fitted_at, models_of

PENALTIES = np.logspace(-1, 5, 13)
CLIP = 5.0  # standard deviations
TRANSFORMS = {"2d": "2d", "latents": "latents", "none": None}
METHODS = ("harmonic", "mean", "sum", "product")
# The paper's merge, and the plainest one without a transform.
PAPER, PLAIN = ("2d", "harmonic"), ("none", "mean")
PROBE = "R² of the probe"


class Leftover(NamedTuple):
    """What was predicted with the blocks of one seed and one transform."""

    own: dict[str, Scores]
    """Each block alone."""
    merged: dict[str, Scores]
    """By method."""
    alone: dict[str, dict[str, Scores]]
    """By method and block: merged, the other modalities those of another patient."""
    probes: dict[str, dict[str, list[Floats]]]
    """By method and block: squared errors of the probe and of the mean, [n, 2] per fold."""


def measure(study: Study) -> list[Row]:
    """Merge blocks, with and without a transform, by every method: what is left of each block?

    * A merged model, the other modalities being those of another patient, so that they add nothing
      but interference; less the block by itself.
    * The merged model as it is, whose other modalities inform as well; less the block by itself.
    * R² on test patients of a ridge probe of the block's logits on the merged latents, fitted on
      training patients.

    Of patients who have all modalities, so that every merge is one of all blocks. Means over blocks
    are over those whose own interval is above chance: the others have nothing to lose.

    Raises:
        ValueError: too few patients who have all modalities.
    """
    seeds = [
        {name: _leftover(study, seed, name, fft) for name, fft in TRANSFORMS.items()}
        for seed in range(study.seeds)
    ]
    names = list(study.cohort.modalities)
    rows: list[Row] = []

    def add(what: str, found: list[dict[str, Found]], measure: str, than: str = "") -> None:
        """Add rows per block, and of the mean over those that know anything."""
        row = partial(over_seeds, case=study.name, what=what, than=than, measure=measure)
        for name in found[0]:
            rows.extend(row([one[name] for one in found], block=name))
        rows.extend(row([mean_of([one[name] for name in kept]) for one in found]))

    own = {
        transform: [{name: figure(seed[transform].own[name]) for name in names} for seed in seeds]
        for transform in TRANSFORMS
    }
    kept = [
        name
        for name in names
        if all(statistics.fmean(one[name][0].low for one in own[t]) > 0.5 for t in own)
    ] or names
    for transform, found in own.items():
        add(f"{transform}, block alone", found, study.measure)
        for method in METHODS:
            what, parts = f"{transform}, {method}", [seed[transform] for seed in seeds]
            shuffled = [
                {name: less(part.alone[method][name], part.own[name]) for name in names}
                for part in parts
            ]
            add(f"{what}, others shuffled", shuffled, study.measure, "block alone")
            merged = [
                {name: less(part.merged[method], part.own[name]) for name in names}
                for part in parts
            ]
            add(f"{what}, merged", merged, study.measure, "block alone")
    for ours, theirs in [(PAPER, PLAIN), *((("2d", m), ("none", m)) for m in METHODS)]:
        (transform, method), (other, way) = ours, theirs
        pairs = [(seed[transform].alone[method], seed[other].alone[way]) for seed in seeds]
        found = [{name: less(a[name], b[name]) for name in names} for a, b in pairs]
        add(f"{transform}, {method}, others shuffled", found, study.measure, f"{other}, {way}")
    return rows + _probe_rows(study, seeds, kept)


def _leftover(study: Study, seed: int, transform: str, fft: str | None) -> Leftover:
    # The same runs as of the other claims where the transform is the default.
    run = study.train("lego", seed, transform, changes={} if fft == "2d" else {"fft": fft})
    found = Leftover({}, {}, {m: {} for m in METHODS}, {m: {} for m in METHODS})
    runs = study.blocks(run)
    for number, split in enumerate(run.splits):
        fitted = fitted_at(runs, number)
        scaling = {name: one.scaling[name] for name, one in fitted.items()}
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
        # Everyone's other modalities are those of the next in a random circle.
        circle = np.random.default_rng((seed, number)).permutation(len(test))
        donors = torch.empty(len(test), dtype=torch.long)
        donors[circle] = torch.from_numpy(np.roll(circle, 1))
        others = test.select(donors)
        objective = next(iter(fitted.values())).objective
        scored = partial(_scored, run, number, test.ids, objective)
        logits = {}
        for name, one in fitted.items():
            logits[name] = [
                predict_logits(one.model, one.patients(study.cohort.modalities, part.ids))
                for part in (train, test)
            ]
            found.own.setdefault(name, []).append(scored(logits[name][1]))
        for method in METHODS:
            model = LegoMerge(models_of(fitted), method=cast(Any, method)).eval()
            own, latents = _outputs(model, test)
            learned = _outputs(model, train)[1]
            found.merged.setdefault(method, []).append(scored(own))
            for name in fitted:
                alone = scored(_outputs(model, test, others, name)[0])
                found.alone[method].setdefault(name, []).append(alone)
                errors = _probe(learned, latents, *logits[name])
                found.probes[method].setdefault(name, []).append(errors)
    return found


def _scored(
    run: Run, number: int, ids: Sequence[str], objective: Objective, logits: Tensor
) -> Tested:
    return tested(run, number, ids, values_of(objective, logits))


@torch.no_grad()
def _outputs(
    model: nn.Module, patients: Patients, others: Patients | None = None, kept: str = ""
) -> tuple[Tensor, Tensor]:
    """Return logits and latents; all modalities but `kept` taken from `others`, if given."""
    found = []
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
        found.append(model(inputs, **options, return_latents=True))
    logits, latents = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(latents)


def _probe(train: Tensor, test: Tensor, targets: Tensor, own: Tensor) -> Floats:
    """Return squared errors [n, 2], of a ridge probe and of the training mean.

    Args:
        train: merged latents of the training patients, [m, C, D].
        test: of the test patients, [n, C, D].
        targets: logits [m, K] of a block, of the training patients.
        own: of the test patients, [n, K].
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    def flat(latents: Tensor) -> Floats:
        parts = torch.view_as_real(latents) if latents.is_complex() else latents
        return parts.flatten(1).double().numpy()

    # Clipped: of real numbers a harmonic merge makes parts that are zero but where a sign differs,
    # and a sign that differs in no training patient would be worth any number of deviations.
    scale = StandardScaler().fit(flat(train))
    x, x_test = (np.clip(scale.transform(flat(z)), -CLIP, CLIP) for z in (train, test))
    unit = StandardScaler().fit(targets.double().numpy())
    y, truth = (np.asarray(unit.transform(z.double().numpy())) for z in (targets, own))
    guess = np.reshape(RidgeCV(PENALTIES).fit(x, y).predict(x_test), truth.shape)
    return np.stack([((truth - guess) ** 2).sum(1), (truth**2).sum(1)], axis=1)


def _probe_rows(study: Study, seeds: list[dict[str, Leftover]], kept: list[str]) -> list[Row]:
    """Return R² over the patients of all folds, its differences paired."""
    names = list(study.cohort.modalities)
    drawn: dict[tuple[str, str, str], list[tuple[float, Floats, int]]] = {}
    for number, seed in enumerate(seeds):
        size = sum(map(len, next(iter(next(iter(seed.values())).probes["mean"].values()))))
        generator = np.random.default_rng(number)
        counts = generator.multinomial(size, np.full(size, 1 / size), size=DRAWS)
        for transform, part in seed.items():
            for method in METHODS:
                shares = {}
                for name in names:
                    errors = np.concatenate(part.probes[method][name])
                    sums, total = counts @ errors, errors.sum(0)
                    shares[name] = (1 - total[0] / total[1], 1 - sums[:, 0] / sums[:, 1], size)
                values, draws, _ = zip(*(shares[name] for name in kept), strict=True)
                shares[""] = (statistics.fmean(values), np.mean(draws, axis=0), size)
                for name, share in shares.items():
                    drawn.setdefault((transform, method, name), []).append(share)

    def percentiles(value: float, draws: Floats, size: int) -> Found:
        return Estimate(value, *map(float, np.quantile(draws, [0.025, 0.975]))), size

    rows = []
    row = partial(over_seeds, case=study.name, measure=PROBE)
    for (transform, method, name), shares in drawn.items():
        found = [percentiles(*share) for share in shares]
        rows += row(found, what=f"{transform}, {method}", block=name)
    for ours, theirs in [(PAPER, PLAIN), *((("2d", m), ("none", m)) for m in METHODS)]:
        found = [
            percentiles(a[0] - b[0], a[1] - b[1], a[2])
            for a, b in zip(drawn[*ours, ""], drawn[*theirs, ""], strict=True)
        ]
        rows += row(found, what=", ".join(ours), than=", ".join(theirs))
    return rows


def say(rows: Sequence[Row]) -> str:
    """Say what is left in the frequency domain, as the paper merges, and without a transform."""
    ours, theirs = ", ".join(PAPER), ", ".join(PLAIN)
    probes, figures = (
        [row for row in means(rows) if row.what == what and row.than == theirs]
        for what in (ours, f"{ours}, others shuffled")
    )
    merged = "latents merged in the frequency domain (2d, harmonic)"
    plain = "those merged without a transform (mean)"
    keep = said(merged, plain, probes, more="keep more of a block than", less="keep less than")
    worth = said("what the former predict", "what the latter do", figures)
    return (
        f"Read by a linear probe, {keep}: {verdict(probes)}; once the other modalities are another "
        f"patient's, {worth}: {verdict(figures)}."
    )
