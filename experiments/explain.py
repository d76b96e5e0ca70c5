"""Explain the predictions of a finished run: contributions and attention, averaged over folds.

A patient is explained by the models of the folds that tested the patient, a new patient by those of
all folds. `explain_files` writes the result, `explain_plots` draws it.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from ..fusion.explain import attention_rollout, integrated_gradients, token_attention
from ..fusion.fitted import Fitted
from ..fusion.healnet import HEALNet
from ..fusion.lego_block import LegoBlock
from ..fusion.lego_fuse import LegoFuse
from ..fusion.lego_merge import LegoMerge
from ..fusion.modalities import Tabular
from ..fusion.objectives import Objective
from ..fusion.preprocessing import BagSource, TableScaling
from ..io import Cohort
from ..io.errors import suggest
from .predict import count_seen
from .run_folder import Run, RunError
from .settings import BASELINES, Explained

Floats = NDArray[np.float64]
# Points of the integral. On tcga_blca, whose tables are wide, the sum of the contributions of a
# patient then differs from the change of the risk by some 0.02 to 0.07 standard deviations.
STEPS = 32


@dataclass(frozen=True)
class ModalityExplanation:
    """One modality of one patient.

    Args:
        contributions: of the named features, [P]: columns of a table, or named features of a bag
            (summed over its tokens).
        tokens: contribution of each token of a bag, [N]; None for tables.
        attention: to each named feature of a table [P], or to each token of a bag [N]; None if the
            modality has one token, or the tokens are those of an encoder.
        rollout: share of all tokens in the last latents of a HEALNet, else NaN.
    """

    contributions: Floats
    tokens: Floats | None
    attention: Floats | None
    rollout: float

    @property
    def total(self) -> float:
        """By how much the modality changes what is explained."""
        return float(self._parts.sum())

    @property
    def absolute(self) -> float:
        """Sum of the absolute contributions of the columns or tokens."""
        return float(np.abs(self._parts).sum())

    @property
    def agreement(self) -> float:
        """Spearman's rank correlation of attention and absolute contributions; NaN if undefined."""
        if self.attention is None or len(self.attention) < 3:
            return np.nan
        importance = np.abs(self._parts)
        if not (np.ptp(importance) > 0 and np.ptp(self.attention) > 0):
            return np.nan
        return float(spearmanr(self.attention, importance)[0])  # pyright: ignore[reportArgumentType]

    @property
    def _parts(self) -> Floats:
        return self.contributions if self.tokens is None else self.tokens

    @classmethod
    def mean(cls, folds: Sequence[Self]) -> Self:
        """Return the mean over folds."""

        def average(values: Sequence[Floats | None]) -> Floats | None:
            known = [value for value in values if value is not None]
            return np.mean(known, axis=0) if known else None

        return cls(
            np.mean([one.contributions for one in folds], axis=0),
            average([one.tokens for one in folds]),
            average([one.attention for one in folds]),
            float(np.mean([one.rollout for one in folds])),
        )


@dataclass(frozen=True)
class PatientExplanation:
    """The explanation of one patient.

    Args:
        patient: the id.
        folds: number of folds that are averaged.
        trained: whether the models were trained on the patient.
        output: the risk or log-odds.
        change: the output less that of a patient whose scaled features are all 0.
        modalities: those that the patient has.
    """

    patient: str
    folds: int
    trained: bool
    output: float
    change: float
    modalities: dict[str, ModalityExplanation]


@dataclass(frozen=True)
class Explanation:
    """The explanations of the patients of a cohort by a run.

    Args:
        run: the run.
        cohort: the cohort.
        explained: what is explained, and its unit.
        features: names of the features of each modality, [P] each; empty for bags without names.
        patients: in the order of the cohort.
        named: the ids for which the user wants pictures.
        not_comparable: by modality why attention is not compared with gradients.
    """

    run: Run
    cohort: Cohort
    explained: Explained
    features: dict[str, tuple[str, ...]]
    patients: list[PatientExplanation]
    named: tuple[str, ...] = ()
    not_comparable: dict[str, str] = field(default_factory=dict)

    @property
    def evaluated(self) -> list[PatientExplanation]:
        """The patients that the models were not trained on; figures of the cohort use these."""
        return [patient for patient in self.patients if not patient.trained]


class Choice(NamedTuple):
    """Which patients to explain.

    Args:
        named: ids to explain in any case.
        limit: the largest number of other patients, drawn at random; None for all.
    """

    named: tuple[str, ...] = ()
    limit: int | None = None


def explain_run(
    run: Run,
    cohort: Cohort,
    choice: Choice = Choice(),  # noqa: B008
    *,
    class_name: str | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Explanation:
    """Explain patients with the models of a finished run.

    Contributions are integrated gradients of the calibrated risk, in standard deviations of the
    training patients' risks, or of the log-odds of a class. They are averaged over the folds that
    tested the patient, or over all folds for new patients. Patients who are in a training part of
    every fold are explained only if they are named.

    Args:
        run: a finished run of HEALNet, LegoBlock, LegoMerge or LegoFuse.
        cohort: patients with modalities of the run.
        choice: the patients.
        class_name: of a run that predicts classes; may be None if there are two.
        progress: called after each patient with the numbers of explained and of all patients.

    Raises:
        ImportError: Captum is not installed.
        RunError: a baseline, or no patient to explain.
        ValueError: an unknown patient or class, or a cohort without any modality of the run.
    """
    models = _FoldModels.of(run, cohort, class_name)
    folds = _folds_of(run, cohort)
    ids = _choose(cohort, folds, choice)
    every = tuple(range(len(run.splits)))
    patients = []
    for number, patient in enumerate(ids):
        trained = not folds[patient]
        explained = models.explain(patient, folds[patient] or every, trained)
        if explained is not None:
            patients.append(explained)
        progress(number + 1, len(ids))
    lacking = [one for one in choice.named if one not in {p.patient for p in patients}]
    if lacking or not patients:
        raise RunError(
            f"{cohort.name}: expected patients with a modality of the run "
            f"({', '.join(run.config['modalities'])}), got "
            f"{lacking[0] if lacking else 'none'!r} without one"
        )
    return Explanation(
        run, cohort, models.explained, models.features, patients, choice.named,
        models.not_comparable,
    )  # fmt: skip


def _folds_of(run: Run, cohort: Cohort) -> dict[str, tuple[int, ...]]:
    """Return by patient the folds that explain: those that tested, all for a new patient.

    None of them if the patient is only in training and validation parts.
    """
    tested: dict[str, list[int]] = {patient: [] for patient in cohort.patients}
    for number, parts in enumerate(run.splits):
        for patient in parts["test"]:
            if patient in tested:
                tested[patient].append(number)
    seen = dict(zip(cohort.patients, count_seen(run, cohort).tolist(), strict=True))
    every = list(range(len(run.splits)))
    return {
        patient: tuple(numbers or ([] if seen[patient] else every))
        for patient, numbers in tested.items()
    }


def _choose(cohort: Cohort, folds: dict[str, tuple[int, ...]], choice: Choice) -> list[str]:
    """Return the patients to explain, in the order of the cohort."""
    for patient in choice.named:
        if patient not in folds:
            raise ValueError(
                f"--patients: {cohort.name} has no patient {patient!r}: "
                f"{suggest(patient, cohort.patients)}"
            )
    others = [patient for patient in cohort.patients if folds[patient]]
    if choice.limit is not None and len(others) > choice.limit:
        others = random.Random(0).sample(others, choice.limit)
    chosen = {*others, *choice.named}
    return [patient for patient in cohort.patients if patient in chosen]


@dataclass(frozen=True)
class _FoldModels:
    """The models of all folds, and what is the same for all patients."""

    fitted: list[Fitted]
    models: list[Any]
    sources: Mapping[str, pd.DataFrame | BagSource]
    explained: Explained
    features: dict[str, tuple[str, ...]]
    not_comparable: dict[str, str]

    @classmethod
    def of(cls, run: Run, cohort: Cohort, class_name: str | None) -> Self:
        names, kind = run.config["modalities"], run.config["model"]
        if kind in BASELINES:
            raise RunError(
                f"{run.path}: expected a run of healnet, lego, merge or fuse, got the baseline "
                f"{kind}, which these methods do not explain"
            )
        explained = run.task.explained(class_name)
        sources = {name: cohort.modalities[name] for name in names if name in cohort.modalities}
        if not sources:
            raise ValueError(
                f"{cohort.name}: expected at least one modality of the run ({', '.join(names)}), "
                f"got {', '.join(cohort.modalities)}"
            )
        fitted = [run.fitted(number) for number in range(len(run.splits))]
        models = [_prepare(one) for one in fitted]
        features = {
            name: scaling.columns if isinstance(scaling, TableScaling) else scaling.known_names
            for name, scaling in fitted[0].scaling.items()
        }
        for one in fitted[1:]:  # a fold may keep named features of bags that others do not keep
            for name, scaling in one.scaling.items():
                if not isinstance(scaling, TableScaling):
                    features[name] = tuple(dict.fromkeys([*features[name], *scaling.known_names]))
        return cls(fitted, models, sources, explained, features, _not_comparable(models[0]))

    def explain(
        self, patient: str, folds: Sequence[int], trained: bool
    ) -> PatientExplanation | None:
        """Return the mean over some folds; None if the patient has no modality of the run."""
        values, outputs, changes = [], [], []
        for number in folds:
            part = self.fitted[number].patients(self.sources, [patient])
            has = part.sets_of_modalities()[0]
            if not has:
                return None
            values.append(_of_fold(self, number, part.batch([0]), has))
            outputs.append(values[-1][0])
            changes.append(values[-1][1])
        modalities = {
            name: ModalityExplanation.mean([of_fold[name] for _, _, of_fold in values])
            for name in values[0][2]
        }
        return PatientExplanation(
            patient, len(folds), trained, float(np.mean(outputs)), float(np.mean(changes)),
            modalities,
        )  # fmt: skip

    def output(self, number: int, has: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
        """Return the function from logits to what is explained, for patients with modalities."""
        fitted, label = self.fitted[number], self.explained.label
        calibration = fitted.calibrations and fitted.calibrations.nearest(has)
        objective = fitted.objective
        assert isinstance(objective, Objective)

        def compute(logits: Tensor) -> Tensor:
            logits = logits.double()
            if calibration is not None:
                logits = calibration.slope * logits + logits.new_tensor(calibration.offset)
            value = objective.explained(logits, label)
            return value if fitted.scale is None else (value - fitted.scale.mean) / fitted.scale.sd

        return compute


def _prepare(fitted: Fitted) -> Any:
    """Return the model of a fold, on a GPU if there is one; a LegoBlock as a LegoMerge of one."""
    model = fitted.model
    if isinstance(model, LegoBlock):
        model = LegoMerge({next(iter(fitted.scaling)): model})
    assert isinstance(model, HEALNet | LegoMerge | LegoFuse)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _not_comparable(model: HEALNet | LegoMerge | LegoFuse) -> dict[str, str]:
    """Return by modality why attention has no order of the input's tokens to compare."""
    if not isinstance(model, HEALNet) and not model.attends_to_input:
        return dict.fromkeys(model.modalities, "not comparable: tokens of an encoder")
    return {
        name: "not comparable: one token"
        for name, kind in model.modalities.items()
        if isinstance(kind, Tabular) and kind.tokens == "row"
    }


def _of_fold(
    models: _FoldModels, number: int, batch: Any, has: tuple[str, ...]
) -> tuple[float, float, dict[str, ModalityExplanation]]:
    """Return output, change and modalities of a batch of one patient."""
    model, compute = models.models[number], models.output(number, has)
    inputs, arguments = batch.to(next(model.parameters()).device).arguments()
    arguments.pop("statistics")
    gradients = integrated_gradients(model, inputs, compute, steps=STEPS, **arguments)
    comparable = [name for name in has if name not in models.not_comparable]
    attention, rollout = {}, {}
    if comparable:
        attention = token_attention(model, inputs, modalities=comparable, **arguments)
    if isinstance(model, HEALNet):
        rollout = attention_rollout(model, inputs, **arguments).tokens
    with torch.no_grad():
        output = float(compute(model(inputs, **arguments)))
        zeros = {name: torch.zeros_like(x) for name, x in inputs.items()}
        base = float(compute(model(zeros, **arguments)))
    modalities = {}
    for name in has:
        scaling = models.fitted[number].scaling[name]
        values = _row(gradients[name])
        seen = _row(attention[name]) if name in attention else None
        share = float(_row(rollout[name]).sum()) if name in rollout else np.nan
        names = models.features[name]
        if isinstance(scaling, TableScaling):
            columns = scaling.columns_of_features
            seen = None if seen is None else _sum_by_name(seen, columns, names)
            modalities[name] = ModalityExplanation(
                _sum_by_name(values, columns, names), None, seen, share
            )
        else:
            named = _sum_by_name(values.sum(0), scaling.names_of_features, names)
            modalities[name] = ModalityExplanation(named, values.sum(1), seen, share)
    return output, output - base, modalities


def _row(x: Tensor) -> Floats:
    """Return the single row of a tensor, dense or jagged."""
    return x.unbind()[0].double().cpu().numpy()


def _sum_by_name(values: Floats, names: Sequence[str], into: Sequence[str]) -> Floats:
    """Return [P], the sum of the values [F] of each name in `into`."""
    if not names:
        return np.zeros(len(into))
    places = pd.Index(into).get_indexer(pd.Index(names))
    return np.bincount(places, values, len(into)).astype(np.float64)
