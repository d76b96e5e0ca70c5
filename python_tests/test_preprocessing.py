"""Scaling fitted on training patients: missing values, categories, bags, settings in JSON."""

import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from motet.fusion.patients import ScaledBags as PatientBags
from motet.fusion.preprocessing import (
    BagScaling,
    TableScaling,
    fit_scaling,
    scaling_from_config,
)


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "age": [40.0, 50.0, np.nan, 60.0, np.nan],
            "size": [1.0, 2.0, 3.0, 4.0, np.nan],
            "same": [7.0, 7.0, 7.0, 7.0, np.nan],
            "grade": pd.Categorical(["low", "high", "low", None, None]),
        },
        index=list("abcde"),
    )


class Bags:
    """Bags of three patients; feature 1 is rarely measured, feature 2 is never missing."""

    features, coords, extent, names = 3, 1, 48.0, ("Na", "lactate", "K")

    def __init__(self) -> None:
        nan = np.nan
        self.bags = {
            "a": [[1, nan, 5], [3, nan, 6]],
            "b": [[5, 8, 7]],
            "c": [[nan, nan, 8], [7, 2, 9]],
        }

    def __contains__(self, patient: object) -> bool:
        return patient in self.bags

    def __getitem__(self, patient: str) -> tuple[np.ndarray, np.ndarray]:
        x = np.asarray(self.bags[patient], np.float32)
        return x, np.arange(len(x), dtype=np.float32)[:, None]


def test_a_table_is_scaled_by_its_training_patients() -> None:
    scaling = TableScaling.fit(frame())  # patient e has no value, and is left out
    assert scaling.features == ("age", "size", "age missing", "grade=high", "grade=low")
    x, present = scaling.transform(frame())
    assert present.tolist() == [True] * 4 + [False]
    age = np.array([40, 50, 50, 60])  # missing values become the median
    np.testing.assert_allclose(x[:4, 0], (age - age.mean()) / age.std(), rtol=1e-6)
    np.testing.assert_allclose(x[:4, 1], (np.arange(4) - 1.5) / np.arange(4).std(), rtol=1e-6)
    assert x[:, 2].tolist() == [0, 0, 1, 0, 0]
    assert x[:, 3:].tolist() == [[0, 1], [1, 0], [0, 1], [0, 0], [0, 0]]
    assert not x[4].any()
    assert x.dtype == np.float32


def test_new_patients_change_nothing_and_may_hold_new_categories() -> None:
    scaling = TableScaling.fit(frame().iloc[:3])
    new = frame().iloc[3:4].assign(grade=pd.Categorical(["never seen"]), age=1e5)
    x, present = scaling.transform(new)
    assert present.all()
    assert x[0, -2:].tolist() == [0, 0]
    with pytest.raises(ValueError, match="column 'age': expected numbers like those of training"):
        scaling.transform(new.assign(age=1e9))
    with pytest.raises(ValueError, match="expected the columns of training, got none named 'age'"):
        scaling.transform(new.drop(columns="age"))


def test_who_has_it_is_told_by_the_columns_of_training() -> None:
    scaling = TableScaling.fit(frame())
    new = frame().assign(further=1.0)
    assert scaling.transform(new)[1].tolist() == [True] * 4 + [False]
    with pytest.raises(ValueError, match="expected categories in column 'grade', as in training"):
        scaling.transform(new.assign(grade=1.0))
    with pytest.raises(ValueError, match="expected numbers in column 'age', as in training"):
        scaling.transform(new.assign(age=pd.Categorical(["old"] * 5)))


def test_bags_are_scaled_over_tokens() -> None:
    scaling = BagScaling.fit(Bags(), ["a", "b", "c", "who has none"])
    assert scaling.kept == (0, 1, 2)
    assert scaling.flagged == (0, 1)
    assert scaling.extent == 1.0  # the largest coordinate of training tokens
    values = np.array([1, 3, 5, 7.0])
    x = scaling.transform(Bags()["c"][0])
    assert x.shape == (2, 5)
    np.testing.assert_allclose(x[:, 0], [0, (7 - values.mean()) / values.std()], rtol=1e-6)
    assert x[:, 3:].tolist() == [[1, 1], [0, 0]]
    with pytest.raises(ValueError, match="expected 3 features per token, got 2"):
        scaling.transform(np.zeros((1, 2), np.float32))


def test_rare_features_of_bags_are_left_out() -> None:
    bags = Bags()
    bags.bags = {str(i): [[float(i), 1.0 if i == 0 else np.nan, 1.0]] for i in range(20)}
    scaling = BagScaling.fit(bags, bags.bags)
    assert scaling.kept == (0, 2)  # one patient in twenty has feature 1
    assert scaling.transform(bags["3"][0])[0, 1] == 0  # a constant feature becomes 0, not infinite


def test_codes_that_new_patients_lack_are_zero() -> None:
    nan = np.nan
    table = pd.DataFrame({"410": [1.0, 0.0, nan], "428": [1.0, 1.0, nan], "5": [0, 1.0, nan]})
    table.attrs["codes"] = True
    scaling = TableScaling.fit(table)
    x, present = scaling.transform(pd.DataFrame({"5": [1.0], "999": [1.0]}))
    expected, _ = scaling.transform(pd.DataFrame({"410": [0.0], "428": [0.0], "5": [1.0]}))
    assert present.all()
    np.testing.assert_array_equal(x, expected)


def test_features_of_new_bags_are_found_by_name() -> None:
    scaling = BagScaling.fit(Bags(), ["a", "b", "c"])
    new = Bags()
    new.names, new.features = ("K", "Hb", "Na"), 3
    new.bags = {"x": [[9.0, 77.0, 7.0]]}
    tokens = PatientBags(new, scaling)["x"].values
    expected = scaling.transform(np.array([[7.0, np.nan, 9.0]], np.float32))
    np.testing.assert_array_equal(tokens, expected)


def test_nobody_has_it() -> None:
    table = frame()
    with pytest.raises(ValueError, match="modality 'omic': no training patient has it"):
        fit_scaling({"omic": table}, ["e"])
    with pytest.raises(ValueError, match="modality 'labs': no training patient has it"):
        fit_scaling({"labs": Bags()}, ["e"])
    with pytest.raises(ValueError, match="modality 'omic': no column varies"):
        fit_scaling({"omic": table}, ["a"])


@pytest.mark.parametrize("source", [frame(), Bags()], ids=["table", "bags"])
def test_json_keeps_every_bit(source) -> None:
    (scaling,) = fit_scaling({"x": source}, ["a", "b", "c"]).values()
    again = scaling_from_config(json.loads(json.dumps(asdict(scaling))))
    assert again == scaling
