"""Modalities added to a merged model one after the other, without training."""

import hashlib
from collections.abc import Sequence
from functools import partial

from motet.fusion.lego_merge import LegoMerge
from torch import nn

from .rows import Row, describe, means, over_seeds, verdict
from .scores import (
    Scores,
    calibrate,
    compute_difference,
    compute_metric,
    part_predictions,
    values_of,
)
from .study import Study, fitted_at, models_of


def measure(study: Study) -> list[Row]:
    """Add one modality after the other to a merged model, in the order of the cohort's file.

    Every step is tested on the same patients: those of the test part who have the first modality.

    Raises:
        RuntimeError: the parameters of a block that was merged before have changed.
    """
    names = list(study.cohort.modalities)
    seeds: list[list[Scores]] = []
    for seed in range(study.seeds):
        run = study.train("lego", seed, "2d")
        blocks = study.blocks(run)
        steps: list[Scores] = [[] for _ in names]
        for number, split in enumerate(run.splits):
            fitted = fitted_at(blocks, number)
            first = fitted[names[0]].patients(study.cohort.modalities, split["test"])
            ids = first.select(first.has(names[0])).ids
            models = models_of(fitted)
            merged: LegoMerge | None = None
            for step, name in enumerate(names):
                merged = LegoMerge({name: models[name]}) if merged is None else merged.add(
                    name, models[name]
                )  # fmt: skip
                for merged_name in names[: step + 1]:
                    trained = blocks[merged_name].fitted(number).model
                    if digest(merged.blocks[merged_name]) != digest(trained):
                        raise RuntimeError(f"block {merged_name!r} changed when {name!r} was added")
                calibrated = calibrate(merged, fitted, study.cohort, run, number)
                patients = calibrated.patients(study.cohort.modalities, ids)
                values = values_of(calibrated.objective, calibrated.logits(patients))
                steps[step].append(part_predictions(run, number, ids, values))
        seeds.append(steps)
    rows = []
    row = partial(over_seeds, case=study.name, measure=study.measure)
    for step, name in enumerate(names):
        label = f"{step + 1}: {'and ' if step else ''}{name}"
        rows += row([compute_metric(steps[step]) for steps in seeds], what=label)
        for than, earlier in (("one less", step - 1), ("the first alone", 0)):
            if step:
                pairs = [(steps[step], steps[earlier]) for steps in seeds]
                rows += row([compute_difference(*pair) for pair in pairs], what=label, than=than)
    return rows


def digest(model: nn.Module) -> str:
    """Return a sha256 of a model's parameters and buffers."""
    sha256 = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha256.update(name.encode())
        sha256.update(tensor.numpy().tobytes())
    return sha256.hexdigest()


def conclude(rows: Sequence[Row]) -> str:
    """Return a sentence about the gain of the complete model, and of the single additions."""
    last = {row.case: row for row in means(rows) if row.than == "the first alone"}
    added = [row for row in means(rows) if row.than == "one less"]
    worse = sum(row.high < 0 for row in added)
    better = sum(row.low > 0 for row in added)
    gain = describe("the whole model", "its first modality alone", list(last.values()))
    return (
        f"No byte of the blocks before changed in {len(added)} additions; {gain}: "
        f"{verdict(list(last.values()))}; {better} of the additions improve the model by "
        f"themselves, {worse} make it worse, {len(added) - better - worse} show no difference."
    )
