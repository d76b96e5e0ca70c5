"""LegoMerge, without training, against its best block and the ensemble."""

from collections.abc import Sequence
from functools import partial

from motet.experiments import Run

from .rows import Row, means, over_seeds, said, verdict
from .scores import ensemble, figure, less, scores_of, tested
from .study import Study, fitted_at

RIVALS = ("its best block (validation)", "its best block (hindsight)", "the ensemble")


def measure(study: Study) -> list[Row]:
    """Compare LegoMerge, without training, with its blocks and with their ensemble.

    The best block is that of the lowest validation loss, fold by fold, as a user would choose; and,
    a higher bar, the one that proves best on the test patients.
    """
    merged, chosen, hindsight, joint = [], [], [], []
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
        hindsight.append(max(scores.values(), key=lambda parts: figure(parts)[0][0]))
        joint.append(
            [
                tested(
                    run, number, *ensemble(fitted_at(blocks, number), study.cohort, part["test"])
                )
                for number, part in enumerate(run.splits)
            ]
        )
    row = partial(over_seeds, case=study.name, measure=study.measure)
    rows = row([figure(scores) for scores in merged], what="LegoMerge")
    for name, other in zip(RIVALS, (chosen, hindsight, joint), strict=True):
        rows += row([figure(scores) for scores in other], what=name)
        found = [less(a, b) for a, b in zip(merged, other, strict=True)]
        rows += row(found, what="LegoMerge", than=name)
    return rows


def _validation_loss(run: Run, number: int) -> float:
    history = run.facts(number)["history"]
    return history["validation_loss"][history["best_epoch"] - 1]


def say(rows: Sequence[Row]) -> str:
    """Say how LegoMerge does beside the block a user would choose, and beside the ensemble."""
    parts = []
    for rival in (RIVALS[0], RIVALS[2]):
        differences = [row for row in means(rows) if row.than == rival]
        parts.append(f"{said('LegoMerge', rival, differences)}: {verdict(differences)}")
    return "; ".join(parts) + "."
