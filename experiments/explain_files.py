"""The files of `motet explain`.

explanation.json   run, cohort, what is explained, numbers of patients
patients.csv       output, change, and the sum of the contributions, which approximates it
modalities.csv     contribution of each modality to each patient; attention's share (rollout)
features.csv       contribution of each column of a table, or named feature of a bag
tokens.csv         contribution of and attention to each token of the named patients' bags
agreement.csv      Spearman's rank correlation of attention and contributions, by modality
cohort.csv         mean absolute contributions over the patients, with 95 % intervals
cohort.svg         the same as a picture
patients/ID.svg    of the named patients
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from .._atomic import write_text
from ..fusion.preprocessing import BagSource
from .explain import Explanation, PatientExplanation
from .explain_plots import draw_cohort, draw_patient
from .explain_slides import file_name, write_slides

Floats = NDArray[np.float64]
ABOUT = "explanation.json"
# Bootstrap samples of patients for the intervals of cohort.csv.
DRAWS = 1000


def check_folder(out: Path) -> None:
    """Raise unless the folder is new or empty, or holds an earlier explanation.

    Raises:
        ValueError: it holds something else, or is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {str(out)!r}")
    if out.is_dir() and any(out.iterdir()) and not (out / ABOUT).is_file():
        raise ValueError(
            f"--out: {str(out)!r} holds something else than an explanation; choose a new folder"
        )


def write_explanation(explanation: Explanation, out: Path) -> dict[str, Any]:
    """Write all files, and return the content of explanation.json.

    Files of the same names are replaced.
    """
    check_folder(out)
    (out / "patients").mkdir(parents=True, exist_ok=True)
    cohort, agreement = cohort_table(explanation), agreement_table(explanation)
    about = {
        "run": str(explanation.run.path),
        "model": explanation.run.config["model"],
        "cohort": explanation.cohort.name,
        "explained": explanation.explained.title,
        "patients": len(explanation.patients),
        "evaluated": len(explanation.evaluated),
        "named": list(explanation.named),
        "agreement": {
            row["modality"]: row["note"] or row["spearman"] for row in agreement.to_dict("records")
        },
    }
    write_text(out / ABOUT, json.dumps(about, indent=2))
    tables = {
        "patients": patients_table(explanation),
        "modalities": modalities_table(explanation),
        "features": features_table(explanation),
        "tokens": tokens_table(explanation),
        "agreement": agreement,
        "cohort": cohort,
    }
    for name, table in tables.items():
        write_text(out / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
    write_text(out / "cohort.svg", draw_cohort(explanation, cohort))
    for patient in explanation.patients:
        if patient.patient in explanation.named:
            picture = draw_patient(explanation, patient, feature_rows(explanation, patient))
            write_text(out / "patients" / f"{file_name(patient.patient)}.svg", picture)
    write_slides(explanation, out)
    return about


def patients_table(explanation: Explanation) -> pd.DataFrame:
    """Return patient, folds, trained, output, change and sum of the contributions."""
    return pd.DataFrame(
        [
            {
                "patient": one.patient,
                "folds": one.folds,
                "trained": int(one.trained),
                "output": one.output,
                "change": one.change,
                "sum": sum(modality.total for modality in one.modalities.values()),
            }
            for one in explanation.patients
        ]
    )


def modalities_table(explanation: Explanation) -> pd.DataFrame:
    """Return patient, modality, present, contribution, absolute and rollout."""
    rows = []
    for one in explanation.patients:
        for name in explanation.features:
            of_modality = one.modalities.get(name)
            values = (0.0, 0.0, np.nan)
            if of_modality is not None:
                values = (of_modality.total, of_modality.absolute, of_modality.rollout)
            rows.append((one.patient, name, int(of_modality is not None), *values))
    names = ["patient", "modality", "present", "contribution", "absolute", "rollout"]
    return pd.DataFrame(rows, columns=names)


def features_table(explanation: Explanation) -> pd.DataFrame:
    """Return patient, modality, feature, value, contribution and attention."""
    return pd.concat([feature_rows(explanation, one) for one in explanation.patients])


def feature_rows(explanation: Explanation, one: PatientExplanation) -> pd.DataFrame:
    """Return the rows of `features_table` of one patient."""
    parts = [pd.DataFrame(columns=["patient", "modality", "feature", "value", "contribution",
                                   "attention"])]  # fmt: skip
    for name, of_modality in one.modalities.items():
        features = explanation.features[name]
        if not features:
            continue
        attention = None if of_modality.tokens is not None else of_modality.attention
        parts.append(
            pd.DataFrame(
                {
                    "patient": one.patient,
                    "modality": name,
                    "feature": features,
                    "value": _values(explanation.cohort.modalities[name], one.patient, features),
                    "contribution": of_modality.contributions,
                    "attention": np.nan if attention is None else attention,
                }
            )
        )
    return pd.concat(parts[1:] or parts)


def _values(
    source: pd.DataFrame | BagSource, patient: str, features: Sequence[str]
) -> list[object]:
    """Return the values of a patient, as in the cohort; of a bag the mean over its tokens."""
    if isinstance(source, pd.DataFrame):
        row = source.loc[patient]
        values = [row.get(name) for name in features]
    else:
        tokens = source[patient][0].astype(float)
        count = (~np.isnan(tokens)).sum(0)
        means = np.nansum(tokens, axis=0) / np.where(count, count, np.nan)
        known = dict(zip(source.names or (), means.tolist(), strict=False))
        values = [known.get(name) for name in features]
    return [_text(value) for value in values]


def _text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.6g}" if isinstance(value, float | int) else str(value)


def tokens_table(explanation: Explanation) -> pd.DataFrame:
    """Return patient, modality, token, coords, contribution and attention of named patients."""
    parts = [pd.DataFrame(columns=["patient", "modality", "token", "coords", "contribution",
                                   "attention"])]  # fmt: skip
    for one in explanation.patients:
        if one.patient not in explanation.named:
            continue
        for name, of_modality in one.modalities.items():
            if of_modality.tokens is None:
                continue
            count, source = len(of_modality.tokens), explanation.cohort.modalities[name]
            coords = None if isinstance(source, pd.DataFrame) else source[one.patient][1]
            places = [""] * count
            if coords is not None:
                places = [" ".join(f"{x:.6g}" for x in place) for place in coords.tolist()]
            attention = of_modality.attention
            parts.append(
                pd.DataFrame(
                    {
                        "patient": one.patient,
                        "modality": name,
                        "token": np.arange(count),
                        "coords": places,
                        "contribution": of_modality.tokens,
                        "attention": np.nan if attention is None else attention,
                    }
                )
            )
    return pd.concat(parts[1:] or parts)


def agreement_table(explanation: Explanation) -> pd.DataFrame:
    """Return modality, patients, mean Spearman correlation, low, high and a note.

    The correlation is between the attention to and the absolute contribution of the tokens of a
    patient; it is undefined for fewer than three tokens.
    """
    rows = []
    for name in explanation.features:
        of_patients = np.array([
            one.modalities[name].agreement for one in explanation.evaluated
            if name in one.modalities
        ])  # fmt: skip
        known = of_patients[~np.isnan(of_patients)]
        note = explanation.not_comparable.get(name, "")
        if not note and not len(known):
            note = "not comparable: no patient with three tokens that differ"
        mean, low, high = (np.nan,) * 3 if note else _intervals(known[:, None])[0]
        rows.append((name, len(known), mean, low, high, note))
    names = ["modality", "patients", "spearman", "low", "high", "note"]
    return pd.DataFrame(rows, columns=names)


def cohort_table(explanation: Explanation) -> pd.DataFrame:
    """Return level, modality, feature, patients, mean, low and high, the largest mean first.

    The mean is over the patients who have the modality and whom the models were not trained on: of
    the absolute contribution of a feature, or of a modality. Intervals are those of a bootstrap
    over patients, NaN for one patient.
    """
    rows = []
    for name, features in explanation.features.items():
        having = [one.modalities[name] for one in explanation.evaluated if name in one.modalities]
        if not having:
            continue
        totals = np.array([[abs(one.total)] for one in having])
        rows.append(("modality", name, "", len(having), *_intervals(totals)[0]))
        if features:
            absolute = np.abs([one.contributions for one in having])
            rows += [
                ("feature", name, feature, len(having), *figures)
                for feature, figures in zip(features, _intervals(absolute), strict=True)
            ]
    names = ["level", "modality", "feature", "patients", "mean", "low", "high"]
    table = pd.DataFrame(rows, columns=names)
    order = table.sort_values(["level", "mean"], ascending=[False, False], kind="stable")
    return order.reset_index(drop=True)


def _intervals(values: Floats) -> list[tuple[float, float, float]]:
    """Return mean and 95 % interval of each column of values [n, P], by bootstrap over rows."""
    means = values.mean(0)
    if len(values) < 2:
        return [(mean, np.nan, np.nan) for mean in means.tolist()]
    rng = np.random.default_rng(0)
    shares = rng.multinomial(len(values), [1 / len(values)] * len(values), DRAWS) / len(values)
    bounds = [np.quantile(shares @ part, [0.025, 0.975], axis=0) for part in _column_blocks(values)]
    low, high = np.concatenate(bounds, axis=1)
    return list(zip(means.tolist(), low.tolist(), high.tolist(), strict=True))


def _column_blocks(values: Floats) -> Iterator[Floats]:
    """Yield blocks of columns, so that the samples of wide tables take little memory."""
    for start in range(0, values.shape[1], 1000):
        yield values[:, start : start + 1000]
