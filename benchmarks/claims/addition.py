"""One modality after the other added to a merged model, nothing retrained."""

import hashlib
from collections.abc import Sequence
from functools import partial

from motet.fusion.lego_merge import LegoMerge
from motet.fusion.patients import Patients
from motet.fusion.training import predict_logits
from torch import nn

from .rows import Row, means, over_seeds, said, verdict
from .scores import Scores, figure, less, tested, values_of
from .study import Study, fitted_at, models_of


def measure(study: Study) -> list[Row]:
    """Add one modality after the other to a merged model, in the order of the cohort's file.

    Of the test patients who have the first modality, at every step.

    Raises:
        RuntimeError: a block that was there before changed by a bit.
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
            models, scaling = models_of(fitted), {}
            merged: LegoMerge | None = None
            for step, name in enumerate(names):
                merged = LegoMerge({name: models[name]}) if merged is None else merged.add(
                    name, models[name]
                )  # fmt: skip
                for old in names[: step + 1]:
                    if digest(merged.blocks[old]) != digest(blocks[old].fitted(number).model):
                        raise RuntimeError(f"block {old!r} changed when {name!r} was added")
                scaling[name] = fitted[name].scaling[name]
                patients = Patients.of(study.cohort.modalities, scaling, ids)
                values = values_of(fitted[name].objective, predict_logits(merged, patients))
                steps[step].append(tested(run, number, ids, values))
        seeds.append(steps)
    rows = []
    row = partial(over_seeds, case=study.name, measure=study.measure)
    for step, name in enumerate(names):
        what = f"{step + 1}: {'and ' if step else ''}{name}"
        rows += row([figure(steps[step]) for steps in seeds], what=what)
        for than, earlier in (("one less", step - 1), ("the first alone", 0)):
            if step:
                pairs = [(steps[step], steps[earlier]) for steps in seeds]
                rows += row([less(*pair) for pair in pairs], what=what, than=than)
    return rows


def digest(model: nn.Module) -> str:
    """Return a sha256 over all that a model holds."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def say(rows: Sequence[Row]) -> str:
    """Say what the additions brought."""
    last = {row.case: row for row in means(rows) if row.than == "the first alone"}
    added = [row for row in means(rows) if row.than == "one less"]
    worse = sum(row.high < 0 for row in added)
    better = sum(row.low > 0 for row in added)
    whole = said("the whole model", "its first modality alone", list(last.values()))
    return (
        f"No byte of the blocks before changed in {len(added)} additions; {whole}: "
        f"{verdict(list(last.values()))}; {better} of the additions improve the model by "
        f"themselves, {worse} make it worse, {len(added) - better - worse} show no difference."
    )
