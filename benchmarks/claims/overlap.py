"""Blocks trained on patients in common, or not, and merged."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from motet import experiments
from motet.fusion.splits import carve
from motet.io import Bags, Classes, Cohort, Split, Survival
from numpy.typing import NDArray

from .rows import Row, means, no_loss, over_seeds, said
from .scores import Scores, ensemble, figure, less, scores_of, tested
from .study import Study, fitted_at

OVERLAPS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRAINED = ("LegoMerge", "the ensemble", "HEALNet, those in common", "HEALNet, all")


def measure(study: Study) -> list[Row]:
    """Train two blocks on as many patients each, a share of them in common; merge them.

    The blocks are those of the first two modalities. Half of the training patients who have both
    train the first block. The other block's are a share of these, and for the rest others. HEALNet
    is trained end to end on the patients in common, and on all of both blocks with whatever
    modality each has. Validation and test parts are the same throughout.
    """
    names = tuple(study.cohort.modalities)[:2]
    cohort = replace(study.cohort, modalities={n: study.cohort.modalities[n] for n in names})
    shares = (0.0, 0.5, 1.0) if study.quick else OVERLAPS
    found: dict[str, dict[float, list[Scores]]] = {name: {} for name in (*TRAINED, *names)}
    for seed in range(study.seeds):
        chosen = experiments.Splits(study.splits, test=1 / study.splits, seed=seed)
        splits = experiments.split_cohort(cohort, chosen)
        for share in shares:
            scores: dict[str, Scores] = {name: [] for name in found}
            for number, fold in enumerate(splits):
                _overlap_fold(study, cohort, fold, share, seed, number, scores)
            for name, parts in scores.items():
                found[name].setdefault(share, []).append(parts)
    rows = []
    row = partial(over_seeds, case=study.name, measure=study.measure)
    for name, by_share in found.items():
        for share, seeds in by_share.items():
            if not seeds[0]:
                continue
            if name in names:
                label = f"block, {share:.0%} in common"
                rows += row([figure(scores) for scores in seeds], what=label, block=name)
                continue
            label = f"{name}, {share:.0%} in common"
            rows += row([figure(scores) for scores in seeds], what=label)
            if name == "LegoMerge":
                for rival in TRAINED[1:]:
                    if found[rival][share][0]:
                        pairs = zip(seeds, found[rival][share], strict=True)
                        rows += row([less(*pair) for pair in pairs], what=label, than=rival)
            if share < 1:
                pairs = zip(seeds, by_share[1.0], strict=True)
                rows += row([less(*pair) for pair in pairs], what=label, than="100% in common")
    return rows


def _overlap_fold(
    study: Study, cohort: Cohort, fold: Split, share: float, seed: int, number: int,
    scores: dict[str, Scores],
) -> None:  # fmt: skip
    """Train on one fold and one overlap; append what is predicted."""
    both, common, own = parts_in_common(cohort, fold, share, seed * 1_009 + number)
    folder = f"fold{number}/overlap{share:.0%}".replace("%", "")
    masked = only_these(
        cohort, fold, dict(zip(cohort.modalities, (both, common | own), strict=True))
    )
    run = study.train("lego", seed, f"{folder}/lego", cohort=masked)
    scores["LegoMerge"] += scores_of(run)
    blocks = study.blocks(run)
    for name, block in blocks.items():
        scores[name] += scores_of(block)
    joint = ensemble(fitted_at(blocks, 0), masked, fold.test)
    scores["the ensemble"].append(tested(run, 0, *joint))
    run = study.train("healnet", seed, f"{folder}/healnet", cohort=masked)
    scores["HEALNet, all"] += scores_of(run)
    if not own:  # all are in common
        scores["HEALNet, those in common"] += scores_of(run)
    elif common:
        paired = only_these(cohort, fold, dict.fromkeys(cohort.modalities, common))
        run = study.train("healnet", seed, f"{folder}/paired", cohort=paired)
        scores["HEALNet, those in common"] += scores_of(run)


def parts_in_common(
    cohort: Cohort, fold: Split, share: float, seed: int
) -> tuple[set[str], set[str], set[str]]:
    """Return who trains the first block, who of them the second as well, and who the second alone.

    Both blocks have half of the training patients with both modalities, events in proportion.
    """
    row = {patient: i for i, patient in enumerate(cohort.patients)}
    pool = np.array(
        [row[p] for p in fold.train if all(_has(m, p) for m in cohort.modalities.values())]
    )
    pool = pool[: len(pool) // 2 * 2]
    if not len(pool):
        raise ValueError(
            f"{cohort.name}: expected training patients who have "
            f"{' and '.join(cohort.modalities)}, got none"
        )
    everyone, strata = np.arange(len(cohort)), _strata(cohort)
    draw = partial(carve, groups=everyone, strata=strata, seed=seed)
    second, first = draw(pool, share=0.5)
    common = draw(first, share=share)[1]
    own = draw(second, share=(len(first) - len(common)) / len(first))[1]
    ids = np.asarray(cohort.patients, object)
    return set(ids[first]), set(ids[common]), set(ids[own])


def only_these(cohort: Cohort, fold: Split, trained: Mapping[str, set[str]]) -> Cohort:
    """Return the cohort with one split, each modality taken from training patients but these."""
    modalities = {}
    for name, source in cohort.modalities.items():
        gone = set(fold.train) - trained[name]
        if isinstance(source, Bags):
            left = {one: source[one] for one in source.patients if one not in gone}
            modalities[name] = Bags(
                left, features=source.features, coords=source.coords, extent=source.extent,
                names=source.names,
            )  # fmt: skip
        else:
            modalities[name] = source.drop(index=list(gone)).reindex(source.index)
    return replace(cohort, modalities=modalities, splits=(fold,))


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


def say(rows: Sequence[Row]) -> str:
    """Say what is lost where no patient is in common."""
    merged = [row for row in means(rows) if row.what == "LegoMerge, 0% in common"]
    losses = [row for row in merged if row.than == "100% in common"]
    rivals = [row for row in merged if row.than == "HEALNet, all"]
    return (
        said("LegoMerge of blocks without a patient in common", "that of blocks with all", losses)
        + f": {no_loss(losses)}; "
        + said("it", "HEALNet trained end to end on the same patients", rivals)
        + "."
    )
