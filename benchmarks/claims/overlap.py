"""LegoMerge of two blocks whose training sets share none, some or all of their patients."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from motet import experiments
from motet.fusion.splits import carve
from motet.io import Bags, Classes, Cohort, Split, Survival
from numpy.typing import NDArray

from .rows import Row, describe, loss_verdict, means, over_seeds
from .scores import (
    Scores,
    compute_difference,
    compute_metric,
    ensemble,
    part_predictions,
    scores_of,
)
from .study import Study, fitted_at

OVERLAPS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRAINED = ("LegoMerge", "the ensemble", "HEALNet, those in common", "HEALNet, all")


def measure(study: Study) -> list[Row]:
    """Train two blocks on equally many patients, of whom a share is in common, and merge them.

    The blocks are those of the first two modalities. The first block is trained on half of the
    training patients who have both modalities, the same at every share. The second is trained on
    that share of these patients, and on others up to the same number. HEALNet is trained end to end
    twice: on the patients in common, and on the patients of both blocks, each with the modality
    that its block gets. Validation and test parts are the same at every share.
    """
    names = tuple(study.cohort.modalities)[:2]
    cohort = replace(study.cohort, modalities={n: study.cohort.modalities[n] for n in names})
    shares = (0.0, 0.5, 1.0) if study.quick else OVERLAPS
    # Model or block name -> share -> scores of each seed.
    all_scores: dict[str, dict[float, list[Scores]]] = {name: {} for name in (*TRAINED, *names)}
    for seed in range(study.seeds):
        options = experiments.Splits(study.splits, test=1 / study.splits, seed=seed)
        splits = experiments.split_cohort(cohort, options)
        for share in shares:
            scores: dict[str, Scores] = {name: [] for name in all_scores}
            for number, split in enumerate(splits):
                _train_split(study, cohort, split, share, seed, number, scores)
            for name, parts in scores.items():
                all_scores[name].setdefault(share, []).append(parts)
    rows = []
    row = partial(over_seeds, case=study.name, measure=study.measure)
    for name, by_share in all_scores.items():
        for share, seeds in by_share.items():
            if not seeds[0]:
                continue
            if name in names:
                label = f"block, {share:.0%} in common"
                rows += row([compute_metric(scores) for scores in seeds], what=label, block=name)
                continue
            label = f"{name}, {share:.0%} in common"
            rows += row([compute_metric(scores) for scores in seeds], what=label)
            if name == "LegoMerge":
                for rival in TRAINED[1:]:
                    if all_scores[rival][share][0]:
                        pairs = zip(seeds, all_scores[rival][share], strict=True)
                        figures = [compute_difference(*pair) for pair in pairs]
                        rows += row(figures, what=label, than=rival)
            if share < 1:
                pairs = zip(seeds, by_share[1.0], strict=True)
                figures = [compute_difference(*pair) for pair in pairs]
                rows += row(figures, what=label, than="100% in common")
    return rows


def _train_split(
    study: Study, cohort: Cohort, split: Split, share: float, seed: int, number: int,
    scores: dict[str, Scores],
) -> None:  # fmt: skip
    """Train all models on one split with one share in common; append their scores."""
    first, common, only_second = draw_patients(cohort, split, share, seed * 1_009 + number)
    folder = f"fold{number}/overlap{share:.0%}".replace("%", "")
    patients = (first, common | only_second)
    masked = mask_patients(cohort, split, dict(zip(cohort.modalities, patients, strict=True)))
    run = study.train("lego", seed, f"{folder}/lego", cohort=masked)
    scores["LegoMerge"] += scores_of(run)
    blocks = study.blocks(run)
    for name, block in blocks.items():
        scores[name] += scores_of(block)
    joint = ensemble(fitted_at(blocks, 0), masked, split.test)
    scores["the ensemble"].append(part_predictions(run, 0, *joint))
    run = study.train("healnet", seed, f"{folder}/healnet", cohort=masked)
    scores["HEALNet, all"] += scores_of(run)
    if not only_second:  # all patients are in common
        scores["HEALNet, those in common"] += scores_of(run)
    elif common:
        paired = mask_patients(cohort, split, dict.fromkeys(cohort.modalities, common))
        run = study.train("healnet", seed, f"{folder}/paired", cohort=paired)
        scores["HEALNet, those in common"] += scores_of(run)


def draw_patients(
    cohort: Cohort, split: Split, share: float, seed: int
) -> tuple[set[str], set[str], set[str]]:
    """Draw the training patients of two blocks.

    Each block gets half of the training patients who have both modalities, with the same share of
    events.

    Returns:
        The patients of the first block; those of them who also train the second; and the patients
        of the second block alone.

    Raises:
        ValueError: no training patient has both modalities.
    """
    row = {patient: i for i, patient in enumerate(cohort.patients)}
    pool = np.array(
        [row[p] for p in split.train if all(_has(m, p) for m in cohort.modalities.values())]
    )
    pool = pool[: len(pool) // 2 * 2]
    if not len(pool):
        raise ValueError(
            f"{cohort.name}: expected training patients who have "
            f"{' and '.join(cohort.modalities)}, got none"
        )
    groups, strata = np.arange(len(cohort)), _strata(cohort)  # every patient is a group
    draw = partial(carve, groups=groups, strata=strata, seed=seed)
    second, first = draw(pool, share=0.5)
    common = draw(first, share=share)[1]
    only_second = draw(second, share=(len(first) - len(common)) / len(first))[1]
    ids = np.asarray(cohort.patients, object)
    return set(ids[first]), set(ids[common]), set(ids[only_second])


def mask_patients(cohort: Cohort, split: Split, trained: Mapping[str, set[str]]) -> Cohort:
    """Return the cohort with one split, in which training patients lack modalities.

    Args:
        cohort: of all patients.
        split: the only split of the result.
        trained: by modality, the training patients who keep it.
    """
    modalities = {}
    for name, source in cohort.modalities.items():
        masked = set(split.train) - trained[name]
        if isinstance(source, Bags):
            kept = {patient: source[patient] for patient in source.patients
                    if patient not in masked}  # fmt: skip
            modalities[name] = Bags(
                kept, features=source.features, coords=source.coords, extent=source.extent,
                names=source.names,
            )  # fmt: skip
        else:
            modalities[name] = source.drop(index=list(masked)).reindex(source.index)
    return replace(cohort, modalities=modalities, splits=(split,))


def _has(modality: Any, patient: str) -> bool:
    if isinstance(modality, Bags):
        return patient in modality
    return bool(modality.loc[patient].notna().any())


def _strata(cohort: Cohort) -> NDArray[np.int64]:
    outcome = cohort.outcome
    if isinstance(outcome, Classes):
        return outcome.labels
    assert isinstance(outcome, Survival)
    return outcome.events.astype(np.int64)


def conclude(rows: Sequence[Row]) -> str:
    """Return a sentence about the loss if the blocks have no patient in common."""
    merged = [row for row in means(rows) if row.what == "LegoMerge, 0% in common"]
    losses = [row for row in merged if row.than == "100% in common"]
    rivals = [row for row in merged if row.than == "HEALNet, all"]
    loss = describe(
        "LegoMerge of blocks without a patient in common", "that of blocks with all", losses
    )
    gain = describe("it", "HEALNet trained end to end on the same patients", rivals)
    return f"{loss}: {loss_verdict(losses)}; {gain}."
