"""LegoMerge, without training, against its best block and the ensemble."""

from collections.abc import Sequence
from functools import partial

from motet.experiments import Run

from .rows import Row, describe, means, over_seeds, verdict
from .scores import compute_difference, compute_metric, ensemble, part_predictions, scores_of
from .study import Study, fitted_at

RIVALS = ("its best block (validation)", "its best block (hindsight)", "the ensemble")


def measure(study: Study) -> list[Row]:
    """Compare LegoMerge, without training, with its blocks and with their ensemble.

    There are two best blocks. The first has the lowest validation loss in each fold: a user would
    choose it. The second, which is harder to beat, has the best metric on the test patients.
    """
    merged, chosen, hindsight, ensembles = [], [], [], []
    for seed in range(study.seeds):
        run = study.train("lego", seed, "2d")
        blocks = study.blocks(run)
        scores = {name: scores_of(block) for name, block in blocks.items()}
        scores = {name: parts for name, parts in scores.items() if parts}
        merged.append(scores_of(run))
        best = [
            min(scores, key=lambda name, i=number: _validation_loss(blocks[name], i))
            for number in range(len(run.splits))
        ]
        chosen.append(
            [part for i, name in enumerate(best) for part in scores[name] if part.number == i]
        )
        hindsight.append(max(scores.values(), key=lambda parts: compute_metric(parts)[0][0]))
        ensembles.append(
            [
                part_predictions(
                    run, number, *ensemble(fitted_at(blocks, number), study.cohort, split["test"])
                )
                for number, split in enumerate(run.splits)
            ]
        )
    row = partial(over_seeds, case=study.name, measure=study.measure)
    rows = row([compute_metric(scores) for scores in merged], what="LegoMerge")
    for name, rival in zip(RIVALS, (chosen, hindsight, ensembles), strict=True):
        rows += row([compute_metric(scores) for scores in rival], what=name)
        differences = [compute_difference(a, b) for a, b in zip(merged, rival, strict=True)]
        rows += row(differences, what="LegoMerge", than=name)
    return rows


def _validation_loss(run: Run, number: int) -> float:
    """Return the validation loss of a block's weights: those of the last epoch."""
    history = run.facts(number)["history"]
    return history["validation_loss"][history["best_epoch"] - 1]


def conclude(rows: Sequence[Row]) -> str:
    """Return a sentence: LegoMerge against the block that a user would choose, and the ensemble."""
    clauses = []
    for rival in (RIVALS[0], RIVALS[2]):
        differences = [row for row in means(rows) if row.than == rival]
        clause = describe("LegoMerge", rival, differences)
        clauses.append(f"{clause}: {verdict(differences)}")
    return "; ".join(clauses) + "."
