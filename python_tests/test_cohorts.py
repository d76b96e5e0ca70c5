"""Cohorts from YAML: the shipped cohorts, every kind of table and bag, and every refusal."""

import gzip
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from textwrap import dedent

import motet
import numpy as np
import pandas as pd
import pytest
from motet.io import Bags, Classes, Cohort, CohortError, Survival, load_cohort

from .conftest import data_path

TABLE = """\
id,person,time,event,age,stage,g1,g2
001,a,5,1,60,I,0.5,1
002,a,7.5,0,,II,1.5,2
003,b,2,1,40,I,-1,
010,c,9,0,50,,2,4
"""
YAML = """\
name: small
patient: id
tables:
  t: {file: t.csv}
outcome: {table: t, time: time, unit: days, event: event}
modalities:
  genes: {table: t, columns: "g*"}
  clinical: {table: t, columns: [age, stage], categorical: stage}
"""


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Write the small cohort with texts of its YAML replaced and other files."""

    def write(*changes: tuple[str, str], yaml: str = YAML, **files: str) -> Path:
        for old, new in changes:
            assert old in yaml
            yaml = yaml.replace(old, new)
        for name, text in {"t.csv": TABLE, **files}.items():
            tmp_path.joinpath(name).write_text(text)
        path = tmp_path / "small.yaml"
        path.write_text(yaml)
        return path

    return write


Put = Callable[..., Path]


def table(cohort: Cohort, name: str) -> pd.DataFrame:
    modality = cohort.modalities[name]
    assert isinstance(modality, pd.DataFrame)
    assert tuple(modality.index) == cohort.patients
    return modality


def bags(cohort: Cohort, name: str) -> Bags:
    modality = cohort.modalities[name]
    assert isinstance(modality, Bags)
    return modality


def survival(cohort: Cohort) -> Survival:
    assert isinstance(cohort.outcome, Survival)
    assert cohort.outcome.times.dtype == np.float64
    assert cohort.outcome.events.dtype == bool
    return cohort.outcome


def classes(cohort: Cohort) -> Classes:
    assert isinstance(cohort.outcome, Classes)
    assert cohort.outcome.labels.dtype == np.int64
    return cohort.outcome


def refusal(path: Path | str, **options: bool) -> str:
    """Return the message of the error, which is one line and names the YAML file."""
    with pytest.raises(CohortError) as caught:
        load_cohort(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{Path(path).name}: ")
    return message.removeprefix(f"{Path(path).name}: ")


def test_import_is_light() -> None:
    code = "import motet.io, sys; print({*sys.modules} & {'numpy', 'pandas', 'pydantic', 'yaml'})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
    assert set(motet.io.__all__) <= set(dir(motet.io))
    with pytest.raises(AttributeError, match="has no attribute 'cohort'"):
        _ = motet.io.cohort  # pyright: ignore[reportAttributeAccessIssue]


# The shipped cohorts equal values computed here from the files.


@pytest.mark.parametrize(("name", "n", "genes"), [("blca", 373, 1554), ("kirp", 260, 1557)])
def test_tcga(name: str, n: int, genes: int) -> None:
    raw = pd.read_csv(data_path("data", "tcga", f"tcga_{name}_all_clean.csv.zip"))
    one = raw.drop_duplicates("case_id").set_index("case_id")
    cohort = load_cohort(f"tcga_{name}", data=data_path("data"))
    assert len(cohort) == n < len(raw)
    assert cohort.patients == cohort.groups == tuple(one.index)
    outcome = survival(cohort)
    assert outcome.unit == "months"
    np.testing.assert_array_equal(outcome.times, one.survival_months)
    np.testing.assert_array_equal(outcome.events, one.censorship == 0)
    for modality, ending in (("rna", "_rnaseq"), ("cnv", "_cnv"), ("mutation", "_mut")):
        columns = [column for column in one if column.endswith(ending)]
        if columns:
            np.testing.assert_array_equal(table(cohort, modality), one[columns].astype(float))
    assert table(cohort, "rna").shape == (n, genes)
    assert ("cnv" in cohort.modalities) == (name == "blca")
    assert list(table(cohort, "clinical")) == ["age", "is_female"]
    assert cohort.splits is not None
    assert len(cohort.splits) == 5
    for fold, split in enumerate(cohort.splits):
        file = data_path("data", "tcga", "splits", f"tcga_{name}", f"splits_{fold}.csv")
        given = pd.read_csv(file)
        assert split.train == tuple(given.train)
        assert split.test == tuple(given.val.dropna())
        assert split.validation == ()
    everyone = sorted(one for split in cohort.splits for one in split.test)
    assert everyone == sorted(cohort.patients)


def test_hancock() -> None:
    targets = pd.read_csv(data_path("data", "hancock", "targets.csv"), dtype={"patient_id": str})
    cohort = load_cohort("hancock_os", data=data_path("data"))
    assert len(cohort) == 571
    assert cohort.patients == tuple(targets.patient_id)
    assert "001" in cohort.patients
    outcome = survival(cohort)
    np.testing.assert_array_equal(outcome.events, targets.survival_status == "deceased")
    np.testing.assert_array_equal(outcome.times, targets.days_to_last_information)
    missing = {
        name: int(table(cohort, name).isna().all(axis=1).sum())
        for name in ("clinical", "pathological", "blood", "icd_codes", "tma_cell_density")
    }
    assert missing == {
        "clinical": 0,
        "pathological": 0,
        "blood": 571 - 524,
        "icd_codes": 571 - 532,
        "tma_cell_density": 571 - 552,
    }
    assert "Leukocytes [#/volume] in Blood" in table(cohort, "blood")
    sites = table(cohort, "pathological")["primary_tumor_site"]
    assert list(sites.cat.categories) == ["0", "1", "2", "3", "4"]
    assert sites.cat.ordered is False
    assert table(cohort, "pathological")["pT_stage"].dtype == np.float64

    tma = bags(cohort, "tma")
    assert (tma.features, tma.coords, tma.extent, len(tma)) == (264, 0, 1.0, 568)
    features, coords = tma["001"]
    assert coords is None
    assert features.dtype == np.float32
    stains = ("CD3", "CD8", "CD56", "CD68", "CD163", "HE", "MHC1", "PDL1")  # natural order
    folder = data_path("data", "hancock")
    tiles = [np.load(folder / f"tma_tile_dtr_256_{one}.npz")["001"] for one in stains]
    tiles = [tile.reshape(2, 256) for tile in tiles]
    np.testing.assert_array_equal(features[:, :256], np.concatenate(tiles))
    np.testing.assert_array_equal(features[:, 256:], np.repeat(np.eye(8), 2, axis=0))

    relapse = load_cohort("hancock_rfs", data=data_path("data"))
    kept = targets[targets.days_to_rfs_event > 0]
    assert relapse.patients == tuple(kept.patient_id)
    assert len(relapse) == 562
    np.testing.assert_array_equal(survival(relapse).events, kept.rfs_event == 1)


def test_mimic() -> None:
    folder = data_path("data", "mimic3_demo")
    raw = pd.read_csv(folder / "ADMISSIONS.csv.gz", dtype={"hadm_id": str, "subject_id": str})
    people = pd.read_csv(folder / "PATIENTS.csv.gz", dtype={"subject_id": str})
    cohort = load_cohort("mimic3_demo_death", data=folder.parent)
    assert len(cohort) == 129
    assert cohort.patients == tuple(raw.hadm_id)
    assert cohort.groups == tuple(raw.subject_id)
    assert classes(cohort).names == ("survived", "died")
    np.testing.assert_array_equal(classes(cohort).labels, raw.hospital_expire_flag)

    static = table(cohort, "static")
    born = raw.merge(people, on="subject_id", how="left", suffixes=("", "_")).dob
    days = (pd.to_datetime(raw.admittime) - pd.to_datetime(born)).dt.days
    np.testing.assert_allclose(static["age"], np.minimum(days / 365.2425, 90), atol=0.003)
    assert list(static["gender"].cat.categories) == ["F", "M"]
    np.testing.assert_array_equal(static["marital_status"].isna(), raw.marital_status.isna())
    assert not {"deathtime", "discharge_location", "diagnosis"} & {*static}

    labs = pd.read_csv(folder / "LABEVENTS.csv.gz", dtype=str)
    labs = labs.merge(raw[["hadm_id", "admittime"]], left_on="HADM_ID", right_on="hadm_id")
    since = pd.to_datetime(labs.CHARTTIME) - pd.to_datetime(labs.admittime)
    labs["hours"] = since.dt.total_seconds() / 3600
    labs = labs[labs.hours.between(0, 48)]
    assert len(labs) == 15164
    labs["number"] = pd.to_numeric(labs.VALUE, errors="coerce")
    labs = labs.dropna(subset="number")
    assert len(labs) == 13314
    assert not labs.duplicated(["HADM_ID", "hours", "ITEMID"]).any()  # no duplicates to average
    series = bags(cohort, "labs")
    assert (len(series), series.coords, series.extent) == (127, 1, 48.0)
    assert series.names is not None
    assert series.names == tuple(sorted(labs.ITEMID.unique(), key=int))
    seen = 0
    for patient in series.patients:
        features, coords = series[patient]
        assert coords is not None
        expected = labs[labs.HADM_ID.eq(patient)].pivot(
            index="hours", columns="ITEMID", values="number"
        )
        expected = expected.reindex(columns=list(series.names))
        np.testing.assert_allclose(coords[:, 0], expected.index, rtol=1e-6)
        np.testing.assert_allclose(features, expected, rtol=1e-6)
        assert series.shape(patient) == features.shape
        seen += int(np.isfinite(features).sum())
    assert seen == 13314

    codes = pd.read_csv(folder / "DIAGNOSES_ICD.csv.gz", dtype=str)
    codes["short"] = codes.icd9_code.str[:3]
    has_code = codes.groupby(["hadm_id", "short"]).size().unstack(fill_value=0) > 0
    has_code = has_code.loc[list(cohort.patients)]
    assert list(table(cohort, "diagnoses")) == sorted(codes.short.unique())
    np.testing.assert_array_equal(table(cohort, "diagnoses"), has_code.astype(float))

    for name, low, high in (("neoplasms", 140, 239), ("respiratory", 460, 519)):
        other = load_cohort(f"mimic3_demo_icd9_{name}", data=folder.parent)
        assert "diagnoses" not in other.modalities
        inside = {
            row.hadm_id
            for row in codes.itertuples()
            if row.short.isdigit() and low <= int(row.short) <= high
        }
        assert {
            one for one, label in zip(other.patients, classes(other).labels, strict=True) if label
        } == inside
        assert len(other) == 129


@pytest.mark.parametrize(("name", "slides"), [("stad", (333, 366)), ("lusc", (386, 417))])
def test_tcga_with_slides(name: str, slides: tuple[int, int]) -> None:
    folder = data_path("data", "tcga_hif")
    cohort = load_cohort(f"tcga_{name}", data=folder.parent)
    raw = pd.read_csv(folder / f"tcga_{name}_hif.csv.gz").copy().set_index("case_id")
    described = bags(cohort, "slides")
    assert described.features == 607
    patients = [patient for patient in cohort.patients if patient in described]
    assert (len(patients), sum(len(described[p][0]) for p in patients)) == slides
    for patient in patients:
        np.testing.assert_array_equal(
            described[patient][0], raw.loc[[patient]].to_numpy(np.float32)
        )
    assert ("cnv" in cohort.modalities) == (name == "stad")


@pytest.mark.slow
def test_physionet() -> None:
    folder = data_path("data", "physionet2012")
    stays = pd.read_csv(folder / "stays.csv", dtype={"stay": str})
    cohort = load_cohort("physionet2012", data=folder.parent)
    assert cohort.patients == tuple(stays.stay)
    np.testing.assert_array_equal(classes(cohort).labels, stays["In-hospital_death"])
    static = table(cohort, "static")
    assert list(static) == ["Age", "Gender", "Height", "Weight", "ICUType"]
    numbers = ["Age", "Gender", "Height", "Weight"]
    np.testing.assert_array_equal(static[numbers], stays[numbers])
    assert list(static["ICUType"].cat.categories) == ["1", "2", "3", "4"]
    series = bags(cohort, "series")
    assert (len(series), series.features, series.coords, series.extent) == (3997, 37, 1, 48)
    raw = pd.read_csv(folder / "series.csv.gz", dtype={"stay": str})
    assert series.names is not None
    for patient, rows in list(raw.groupby("stay"))[::800]:
        features, hours = series[str(patient)]
        expected = rows.pivot_table(index="hour", columns="item", values="value", aggfunc="mean")
        expected = expected.reindex(columns=list(series.names))
        assert hours is not None
        np.testing.assert_allclose(hours[:, 0], expected.index, rtol=1e-6)
        np.testing.assert_allclose(features, expected, rtol=1e-6)


def test_breast_tcga() -> None:
    folder = data_path("data", "breast_tcga")
    cohort = load_cohort("breast_tcga", data=folder.parent)
    test = pd.read_csv(folder / "data.test.mrna.csv.gz")
    kinds = [pd.read_csv(folder / f"data.{part}.subtype.csv.gz").subtype for part in
             ("train", "test")]  # fmt: skip
    assert len(cohort) == 220
    outcome = classes(cohort)
    assert outcome.names == ("Basal", "Her2", "LumA")
    assert [outcome.names[label] for label in outcome.labels] == [*kinds[0], *kinds[1]]
    protein = table(cohort, "protein").isna().all(axis=1)
    assert tuple(protein.index[protein]) == tuple(test["sample"])
    assert cohort.splits is not None
    (split,) = cohort.splits
    assert split.test == tuple(test["sample"])
    assert split.train == cohort.patients[:150]
    np.testing.assert_array_equal(table(cohort, "mrna").iloc[150:], test.drop(columns="sample"))


def test_breast_cancer_and_its_fingerprint() -> None:
    from sksurv.datasets import load_breast_cancer

    features, outcome = load_breast_cancer()
    assert outcome is not None
    cohort = load_cohort("breast_cancer")
    assert (len(cohort), int(survival(cohort).events.sum())) == (198, 51)
    np.testing.assert_array_equal(survival(cohort).times, outcome["t.tdm"])
    np.testing.assert_array_equal(table(cohort, "genes"), features.filter(regex="_at$"))
    grade = table(cohort, "clinical")["grade"]
    assert list(grade.astype(str)) == list(features["grade"].astype(str))
    assert cohort.fingerprint() == load_cohort("breast_cancer").fingerprint()
    assert len(cohort.fingerprint()) == len(hashlib.sha256().hexdigest())


@pytest.mark.parametrize("where", ["MOTET_DATA", "MOTET_DATA/data"])
def test_data_is_looked_up(
    where: str, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put()
    elsewhere = tmp_path / "elsewhere"
    folder = elsewhere / "data" if where.endswith("data") else elsewhere
    folder.mkdir(parents=True)
    (tmp_path / "t.csv").rename(folder / "t.csv")
    assert re.search(
        r"tables\.t\.file: no file 't\.csv' in .*: give its folder with --data DIR or "
        "MOTET_DATA$",
        refusal(path),
    )
    assert len(load_cohort(path, data=folder)) == 4
    monkeypatch.setenv("MOTET_DATA", str(elsewhere))
    assert len(load_cohort(path)) == 4
    with pytest.raises(CohortError, match=r"no file 't.csv' in \S+/nowhere: give its folder"):
        load_cohort(path, data=tmp_path / "nowhere")


def test_names_that_are_no_cohort(tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="no cohort 'tcga_blka': did you mean 'tcga_blca'.*known"):
        load_cohort("tcga_blka")
    with pytest.raises(CohortError, match="no cohort 'x': known: breast_cancer, .*_slides; or"):
        load_cohort("x")
    with pytest.raises(CohortError, match="no file '.*missing.yaml'"):
        load_cohort(tmp_path / "missing.yaml")


# Tables.


def test_small(put: Put) -> None:
    cohort = load_cohort(put(("patient: id", "patient: id\ngroup: person")))
    assert cohort.patients == ("001", "002", "003", "010")
    assert cohort.groups == ("a", "a", "b", "c")
    assert cohort.name == "small"
    assert cohort.splits is None
    assert list(cohort.modalities) == ["genes", "clinical"]
    assert survival(cohort).times.tolist() == [5, 7.5, 2, 9]
    assert survival(cohort).events.tolist() == [True, False, True, False]
    np.testing.assert_array_equal(
        table(cohort, "genes").to_numpy(), [[0.5, 1], [1.5, 2], [-1, np.nan], [2, 4]]
    )
    clinical = table(cohort, "clinical")
    assert clinical["age"].dtype == np.float64
    assert clinical["stage"].tolist()[:3] == ["I", "II", "I"]
    assert clinical["stage"].isna().tolist() == [False, False, False, True]


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "csv.zip", "tsv", "tsv.gz", "parquet"])
def test_kinds_of_file(kind: str, put: Put, tmp_path: Path) -> None:
    same = load_cohort(put())
    path = put(("t.csv", f"u.{kind}"))
    frame = pd.read_csv(tmp_path / "t.csv", dtype={"id": str})
    if kind == "parquet":
        frame.set_index("id").to_parquet(tmp_path / "u.parquet")
    else:
        frame.to_csv(tmp_path / f"u.{kind}", index=False, sep="\t" if "tsv" in kind else ",")
    assert load_cohort(path).fingerprint() == same.fingerprint()


def test_how_tables_come_in_the_wild(put: Put, tmp_path: Path) -> None:
    """BOM, CRLF, quotes, spaces, row numbers, integers as floats, booleans and gaps are read."""
    same = load_cohort(put()).fingerprint()
    path = put(("event: event", "event: 'my event'"))
    text = dedent("""\
        ,"id" ,time,my event,age,stage,g1,g2
        0,"001",5.0,True,60.0, I ,0.5,1.0
        1," 002",7.5,False,NA,II,1.5,2
        2,003,2,True,40,I,-1,nan
        3,010,9,False,50,NaN,2,4
        """)
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert load_cohort(path).fingerprint() == same


def test_default_columns_and_what_they_skip(put: Put) -> None:
    path = put((', columns: "g*"', ", categorical: [person, stage]"))
    (table_,) = [table(load_cohort(path), "genes")]
    assert list(table_) == ["person", "age", "stage", "g1", "g2"]
    path = put(
        (', columns: "g*"', ", categorical: stage"), ("patient: id", "patient: id\ngroup: person")
    )
    assert list(table(load_cohort(path), "genes")) == ["age", "stage", "g1", "g2"]
    numbered = "\n".join(f"{i}," * (i > 0) + "," * (i == 0) + line for i, line in
                         enumerate(TABLE.splitlines()))  # fmt: skip
    path = put(
        (', columns: "g*"', ', columns: "*", categorical: [stage, person]'), **{"t.csv": numbered}
    )
    assert list(table(load_cohort(path), "genes")) == ["person", "age", "stage", "g1", "g2"]


def test_ids_written_as_floats_meet_whole_ones(put: Put) -> None:
    yaml = YAML.replace("tables:\n", "tables:\n  more: {file: more.csv, patient: PID}\n")
    yaml += "  more: {table: more}\n"
    small = "id,time,event,age,stage,g1,g2\n1,5,1,1,I,1,1\n12,4,0,2,I,2,2\n"
    path = put(yaml=yaml, **{"t.csv": small, "more.csv": "PID,x\n12.0,3\n,\n99.0,4\n"})
    more = table(load_cohort(path), "more")["x"]
    assert more.isna().tolist() == [True, False]
    assert more["12"] == 3


def test_slides_repeat_their_patient(put: Put) -> None:
    rows = TABLE + "001,a,5,1,,I,0.5,1\n"  # the age is missing here, but not in the row above
    same = load_cohort(put()).fingerprint()
    yaml = ("file: t.csv", "file: t.csv, repeats: same")
    assert load_cohort(put(yaml, **{"t.csv": rows})).fingerprint() == same
    assert refusal(put(**{"t.csv": rows})) == (
        "tables.t: 4 patients in 5 rows, 001 in 2: expected one row per patient. If the rows "
        "agree, add `repeats: same` to the table. If they differ, add to the modality `rows: bag` "
        "(each row is a token) or `rows: mean`"
    )
    rows = TABLE + "001,other,5,1,,I,0.75,1\n"  # column person differs too, but is not used
    assert refusal(put(yaml, **{"t.csv": rows})) == (
        "tables.t.repeats: the rows of patient 001 differ in column 'g1': expected the same in "
        "all, got 0.5, 0.75"
    )


ROWS = YAML.replace("tables:\n", "tables:\n  s: {file: s.csv}\n")
ROWS += "  slides: {table: s, columns: 'h*', rows: bag}\n"
SLIDES = "id,h1,h2,kind\n002,1,2,x\n001,3,,y\n002,5,6,x\n003,,,z\n009,7,8,x\n"


def test_rows_are_tokens(put: Put) -> None:
    """Several slides of a patient are a bag of slides, or their mean."""
    slides = bags(load_cohort(put(yaml=ROWS, **{"s.csv": SLIDES})), "slides")
    assert slides.patients == ("002", "001")
    assert (slides.features, slides.names, slides.coords) == (2, ("h1", "h2"), 0)
    features, coords = slides["002"]
    assert features.dtype == np.float32
    assert features.tolist() == [[1, 2], [5, 6]]
    assert coords is None
    np.testing.assert_array_equal(slides["001"][0], [[3, np.nan]])
    path = put(("rows: bag", "rows: mean"), yaml=ROWS, **{"s.csv": SLIDES})
    cohort = load_cohort(path)
    np.testing.assert_array_equal(
        table(cohort, "slides"), [[3, np.nan], [3, 4], [np.nan, np.nan], [np.nan, np.nan]]
    )
    new = load_cohort(put(yaml=ROWS, **{"s.csv": SLIDES}), outcome=False)
    assert bags(new, "slides").patients == ("002", "001", "009")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rows: bag", "rows: all", "modalities.slides.rows: expected 'bag' or 'mean', got 'all'"),
        (", rows: bag", "", "2 rows, 002 in 2: expected one row per patient"),
        ("'h*'", "[h1, kind]", "column 'kind' of table 's' (s.csv): expected numbers, got 'x' for "
         "patient 002; `rows: bag` reads numbers only: leave it out of `columns`"),
        ("'h*', rows: bag", "[h1, kind], rows: mean, categorical: kind", "slides.categorical: "
         "expected numbers with `rows: mean`, got category 'kind': give it a modality without"),
    ],
)  # fmt: skip
def test_refused_rows(old: str, new: str, message: str, put: Put) -> None:
    path = put((old, new), yaml=ROWS, **{"s.csv": SLIDES})
    assert message.replace("2 rows", "4 patients in 5 rows") in refusal(path)


def test_refused_rows_of_a_bag(put: Put) -> None:
    huge = SLIDES.replace("5,6", "1e300,6")
    assert refusal(put(yaml=ROWS, **{"s.csv": huge})) == (
        "modalities.slides: column 'h1': expected numbers within float32, got 1e+300 for patient "
        "002"
    )
    nobody = SLIDES.replace("7,8", ",7").replace("002,1", ",1")
    assert "tables.s: the patient is missing in 1 row (the first: 0)" in (
        refusal(put(yaml=ROWS, **{"s.csv": nobody}))
    )
    others = "id,h1,h2,kind\n009,7,8,x\n"
    assert refusal(put(yaml=ROWS, **{"s.csv": others})) == (
        "modalities.slides: no patient of the outcome has it"
    )


def test_appended_files_and_patients_of_another_table(put: Put) -> None:
    yaml = """\
        name: two parts
        patient: id
        tables:
          x: {file: [x1.csv, x2.csv]}
          y: {file: [y1.csv, y2.csv], patients_of: x}
        outcome: {table: y, label: kind}
        modalities: {x: {table: x}}
        """
    files = {"x1.csv": "id,u,v\n07,1,2\n", "x2.csv": "id,v,u\n08,3,4\n", "y1.csv": "kind\nb\n",
             "y2.csv": "kind\na\n"}  # fmt: skip
    path = put(yaml=dedent(yaml), **files)
    cohort = load_cohort(path)
    assert cohort.patients == ("07", "08")
    assert classes(cohort).names == ("a", "b")
    assert classes(cohort).labels.tolist() == [1, 0]
    assert table(cohort, "x").to_numpy().tolist() == [[1, 2], [4, 3]]
    put(yaml=dedent(yaml), **files | {"y2.csv": "kind\na\nb\n"})
    assert refusal(path) == "tables.y.patients_of: expected one row per row of 'x' (2), got 3"
    put(yaml=dedent(yaml), **files | {"x2.csv": "id,v,w\n08,3,4\n"})
    assert refusal(path) == (
        "tables.x.file: expected the same columns in 'x1.csv' and 'x2.csv'; only one of them has "
        "u, w"
    )


def test_names_of_classes(put: Put) -> None:
    change = ("time: time, unit: days, event: event", "label: stage, names: {II: two, I: one}")
    yaml = YAML.replace("columns: [age, stage], categorical: stage", "columns: age")
    full = TABLE.replace("50,,2", "50,II,2")
    outcome = classes(load_cohort(put(change, yaml=yaml, **{"t.csv": full})))
    assert outcome.names == ("two", "one")
    assert outcome.labels.tolist() == [1, 0, 1, 0]
    assert refusal(put(change, ("II: two, ", ""), yaml=yaml, **{"t.csv": full})) == (
        "outcome.label: column 'stage' of table 't' (t.csv): expected the values of `names` (I), "
        "got 'II' for 2 patients (the first: 002)"
    )
    assert refusal(put(change, yaml=yaml)).endswith("missing for 1 patient (the first: 010)")


def test_observed_values(put: Put) -> None:
    words = TABLE.replace(",1,60", ",dead,60").replace(",1,40", ",lost,40")
    words = words.replace(",0,,II", ",alive,,II").replace(",0,50", ",alive,50")
    path = put(("event: event", "event: event, observed: [dead, lost]"), **{"t.csv": words})
    assert survival(load_cohort(path)).events.tolist() == [True, False, True, False]
    path = put(("event: event", "event: event, observed: 0"))
    assert survival(load_cohort(path)).events.tolist() == [False, True, False, True]
    path = put(("event: event", "event: event, observed: true"))
    assert survival(load_cohort(path)).events.tolist() == [True, False, True, False]


@pytest.mark.parametrize("name", ["censorship", "Censored", "is_censored", "cens", "os.cens"])
def test_censoring_must_say_what_was_observed(name: str, put: Put) -> None:
    table_ = TABLE.replace("event", name)
    assert refusal(put(("event: event", f"event: {name}"), **{"t.csv": table_})) == (
        f"outcome: the name of column {name!r} says censoring: list in `observed` the values that "
        "mean that the event happened, such as `observed: 0` if 1 is censored"
    )
    path = put(("event: event", f"event: {name}, observed: 0"), **{"t.csv": table_})
    assert survival(load_cohort(path)).events.tolist() == [False, True, False, True]
    path = put(("event: event", "event: licenses"), **{"t.csv": TABLE.replace("event", "licenses")})
    assert survival(load_cohort(path)).events.tolist() == [True, False, True, False]


def test_joined_and_derived(put: Put) -> None:
    yaml = """\
        name: joined
        patient: visit
        group: person
        tables:
          people: {file: people.csv}
          visits:
            file: visits.csv
            join: {table: people, on: person}
            derive:
              age: {from: born, to: came, unit: years, at_most: 90}
              stay: {from: came, to: left, unit: hours}
        outcome: {table: visits, label: died}
        modalities: {static: {table: visits, columns: [age, stay, sex], categorical: sex}}
        """
    files = {
        "people.csv": "person,born,sex\n1,1820-01-01,f\n2,2100-01-01,m\n",
        "visits.csv": "visit,person,came,left,died,sex\n"
        "v1,1,2120-01-01,2120-01-02 12:00:00,1,x\nv2,2,2120-01-01,,0,y\n",
    }
    path = put(yaml=dedent(yaml), **files)
    static = table(load_cohort(path), "static")
    np.testing.assert_allclose(static["age"], [90, 7304 / 365.2425])
    np.testing.assert_array_equal(static["stay"], [36, np.nan])
    assert static["sex"].tolist() == ["x", "y"]  # a column of the table takes precedence
    put(yaml=dedent(yaml), **files | {"people.csv": "person,born\n1,1820-01-01\n1,1900-01-01\n"})
    assert "expected one row of table 'people' (people.csv) per person, but 1 value" in refusal(
        path
    )
    put(yaml=dedent(yaml), **files | {"people.csv": "person,born\n1,01/02/1820\n"})
    assert refusal(path) == (
        "tables.visits: column 'born': expected dates such as 2164-10-23 21:09:00, got '01/02/1820'"
    )


CODES = """\
name: codes
patient: id
tables:
  t: {file: t.csv}
  d: {file: d.csv, patient: ID}
  labs: {file: labs.csv}
  visits: {file: visits.csv}
outcome: {table: t, time: time, unit: days, event: event}
modalities:
  codes: {table: d, codes: code, characters: 3}
  labs:
    {table: labs, item: item, value: value, time: at, since: {table: visits, column: came},
     hours: [0, 48]}
"""
LONG = {
    "d.csv": "ID,code\n002,0389\n001,4601\n001,038\n002,V10\n999,777\n001,4602\n,123\n",
    "labs.csv": "id,item,value,at\n002,9,1.5,2100-01-01 06:00:00\n002,10,NEG,2100-01-01 06:00:00\n"
    "002,9,2.5,2100-01-01 06:00:00\n002,10,7,2100-01-02 12:30:00\n003,9,3,2100-01-09\n"
    "001,9,4,1999-01-01\n,9,4,2100-01-01\n003,10,inf,2100-01-01\n003,10,8,2100-01-03\n",
    "visits.csv": "id,came\n001,2100-01-01\n002,2100-01-01\n003,2100-01-01\n",
}


def test_long_tables(put: Put) -> None:
    cohort = load_cohort(put(yaml=CODES, **LONG))
    codes = table(cohort, "codes")
    assert list(codes) == ["038", "460", "V10"]
    np.testing.assert_array_equal(codes, [[1, 1, 0], [1, 0, 1], [np.nan] * 3, [np.nan] * 3])
    labs = bags(cohort, "labs")
    assert labs.names == ("9", "10")
    assert (labs.features, labs.coords, labs.extent) == (2, 1, 48.0)
    assert labs.patients == ("002", "003")
    assert "001" not in labs
    with pytest.raises(KeyError, match="001"):
        labs["001"]
    features, hours = labs["002"]
    np.testing.assert_array_equal(features, [[2, np.nan], [np.nan, 7]])
    np.testing.assert_array_equal(hours, [[6], [36.5]])
    assert features.dtype == np.float32
    np.testing.assert_array_equal(labs["003"][1], [[48]])  # both ends of the window count
    assert "no numbers in column 'value' of table 'labs' (labs.csv) from hour 96 to 100" in refusal(
        put(("[0, 48]", "[96, 100]"), yaml=CODES, **LONG)
    )
    assert refusal(put(("[0, 48]", "[48, 0]"), yaml=CODES, **LONG)).startswith(
        "modalities.labs.hours: expected [first, last], got [48"
    )


HOURS = CODES.replace(
    "since: {table: visits, column: came},\n     hours: [0, 48]", "hours: [0, 48]"
)
NUMBERED = {
    "d.csv": LONG["d.csv"],
    "visits.csv": LONG["visits.csv"],
    "labs.csv": "id,item,value,at\n002,9,1.5,6\n002,10,NEG,6\n002,9,2.5,6.0\n002,10,7,36.5\n"
    "003,9,3,49\n001,9,4,-1\n,9,4,0\n003,10,inf,0\n003,10,8,48\n003,9,8,\n",
}


@pytest.mark.parametrize("rows", [3, 1000])
def test_times_are_numbers(rows: int, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("motet.io.cohorts.tables.CHUNK", rows)
    dated = load_cohort(put(yaml=CODES, **LONG))
    cohort = load_cohort(put(yaml=HOURS, **NUMBERED))
    for patient in ("002", "003"):
        for got, expected in zip(
            bags(cohort, "labs")[patient], bags(dated, "labs")[patient], strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    assert cohort.fingerprint() == dated.fingerprint()
    per_day = HOURS.replace("hours: [0, 48]", "unit: days, hours: [144, 876]")
    labs = bags(load_cohort(put(yaml=per_day, **NUMBERED)), "labs")
    assert {p: labs[p][1].ravel().tolist() for p in labs.patients} == {"002": [144, 876]}
    assert refusal(put(yaml=HOURS, **LONG)).endswith(
        "labs.time: column 'at': expected numbers (hours since the start), got '2100-01-01 "
        "06:00:00'; if times are dates, name the start by `since`"
    )
    both = put(("hours: [0, 48]", "unit: days, hours: [0, 48]"), yaml=CODES, **LONG)
    assert refusal(both) == (
        "modalities.labs: expected since (times are dates) or unit (times are numbers), got both"
    )
    chosen = HOURS.replace("item: item", "item: item, items: [10, 9.0]")
    labs = bags(load_cohort(put(yaml=chosen, **NUMBERED)), "labs")
    assert labs.names == ("10", "9")
    np.testing.assert_array_equal(labs["002"][0], [[np.nan, 2], [7, np.nan]])
    for old, new, message in (
        ("item: item", "item: item, items: [9, 8]", "labs.items: no numbers of item '8' in table"),
        ("item: item", "item: itm", "no column 'itm' in table 'labs' (labs.csv): did you mean 'i"),
        ("value: value", "value: time", "column 'time' is the outcome"),
    ):
        assert message in refusal(put((old, new), yaml=HOURS, **NUMBERED))


@pytest.mark.parametrize("rows", [3, 1000])
def test_values_declared_missing(rows: int, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """-1 in these columns, and "unknown", count as gaps; elsewhere they are values."""
    monkeypatch.setattr("motet.io.cohorts.tables.CHUNK", rows)
    expected = load_cohort(put())
    marked = TABLE.replace("7.5,0,,II", "7.5,0,-1,II").replace("0,50,,2", "0,50,unknown,2")
    cohort = load_cohort(
        put(("file: t.csv", "file: t.csv, missing: {'a?e': [-1, -9], stage: unknown}"),
            **{"t.csv": marked})
    )  # fmt: skip
    assert cohort.fingerprint() == expected.fingerprint()
    path = put(("file: t.csv", "file: t.csv, missing: {'*': -1.0}"), **{"t.csv": marked})
    assert table(load_cohort(path), "genes")["g1"].isna().tolist() == [False, False, True, False]
    path = put(("file: t.csv", "file: t.csv, missing: {ag: -1}"))
    assert "tables.t.missing: 'ag' matches no column of table 't' (t.csv): did you mean 'age'" in (
        refusal(path)
    )
    yaml = HOURS.replace("file: labs.csv", "file: labs.csv, missing: {value: [7, 8.0]}")
    labs = bags(load_cohort(put(yaml=yaml, **NUMBERED)), "labs")
    assert labs.patients == ("002",)
    assert labs.names == ("9",)


def test_outcome_from_codes(put: Put) -> None:
    change = ("{table: t, time: time, unit: days, event: event}",
              "{table: d, code: code, between: [460, 519]}")  # fmt: skip
    yaml = CODES.replace("  codes: {table: d, codes: code, characters: 3}\n", "")
    cohort = load_cohort(put(change, yaml=yaml, **LONG))
    assert cohort.patients == ("002", "001", "999")
    assert classes(cohort).labels.tolist() == [0, 1, 0]
    assert classes(cohort).names == ("not 460-519", "460-519")
    assert refusal(put(change, yaml=CODES, **LONG)) == (
        "modalities.codes.codes: column 'code' is the outcome: a model would read it"
    )
    assert refusal(put(change, ("[460, 519]", "[1, 2]"), yaml=yaml, **LONG)).endswith(
        "expected at least 2 classes, got 0 of 3 patients in 1-2"
    )


# Bags.

BAGS = YAML + "  wsi: {bags: %s}\n"


def test_npz(put: Put, tmp_path: Path) -> None:
    flat = {"001": np.arange(8.0), "003": np.arange(4.0), "other": np.zeros(4)}
    np.savez(tmp_path / "a_2.npz", **flat)
    np.savez(tmp_path / "a_10.npz", **{"001": np.full((1, 4), 9)})
    path = put(yaml=BAGS % '"a_*.npz", features: 4, source: true')
    wsi = bags(load_cohort(path), "wsi")
    assert wsi.patients == ("001", "003")
    assert (wsi.features, wsi.coords, wsi.names) == (6, 0, None)
    np.testing.assert_array_equal(  # a_2 before a_10
        wsi["001"][0], [[0, 1, 2, 3, 1, 0], [4, 5, 6, 7, 1, 0], [9, 9, 9, 9, 0, 1]]
    )
    assert wsi.shape("001") == (3, 6)
    np.savez(tmp_path / "odd.npz", **{"001": np.zeros((1, 4)), "003": np.zeros((2, 5))})
    assert refusal(put(yaml=BAGS % "odd.npz")) == (
        "modalities.wsi: odd.npz: 003 of patient 003: expected 4 features per token, as the first "
        "bag has, got 5"
    )
    with pytest.raises(CohortError, match=r"bag of patient 'b': expected \[N, 4\], got \[2, 5\]"):
        Bags({"a": (np.zeros((1, 4)), None), "b": (np.zeros((2, 5)), None)}, features=4)
    path = put(yaml=BAGS % "a_2.npz, features: 3")
    assert refusal(path) == (
        "modalities.wsi: a_2.npz: 001: expected numbers [N, 3], got float64 [8]"
    )
    np.savez(tmp_path / "bad.npz", **{"001": np.array([[1, 2], [np.inf, 0], [0, np.nan]])})
    assert refusal(put(yaml=BAGS % "bad.npz")) == (
        "modalities.wsi: bad.npz: 001: expected finite numbers, got NaN or Inf in 2 tokens "
        "(the first: 1)"
    )
    np.savez(tmp_path / "far.npz", **{"x1": np.zeros((1, 2))})
    assert (
        "no patient of the outcome has a bag: far.npz has keys such as x1, the cohort"
        in refusal(put(yaml=BAGS % "far.npz"))
    )
    (tmp_path / "no.npz").write_text("no")
    assert "no.npz cannot be read" in refusal(put(yaml=BAGS % "no.npz"))
    assert "no file 'gone_*.npz' in" in refusal(put(yaml=BAGS % '"gone_*.npz"'))


def test_zarr_is_read_when_asked_for(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zarr

    store = zarr.open_group(str(tmp_path / "s.zarr"), mode="w")
    rng = np.random.default_rng(0)
    tiles = {name: rng.normal(size=(n, 3)) for name, n in (("s1", 4), ("s2", 2), ("s3", 5))}
    where = {name: rng.uniform(0, 1000, size=(len(array), 2)) for name, array in tiles.items()}
    for name, array in tiles.items():
        member = store.create_group(name)
        member.create_array("features", data=array)
        member.create_array("coords", data=where[name])
    slides = TABLE.replace("id,", "slide,id,").replace("\n0", "\nX,0").replace("X", "s1", 1)
    slides = slides.replace("X", "s3", 1).replace("X", "gone", 1).replace("X", "", 1)
    slides += "s2,001,a,5,1,60,I,0.5,1\n"
    yaml = (BAGS % "s.zarr, features: 3, keys: {table: t, column: slide}").replace(
        "file: t.csv", "file: t.csv, repeats: same"
    )
    path = put(yaml=yaml, **{"t.csv": slides})
    with monkeypatch.context() as patch:  # tokens of a slide are read only when accessed
        read: list[str] = []
        get = zarr.Array.__getitem__
        patch.setattr(
            zarr.Array, "__getitem__", lambda a, key: (read.append(a.name), get(a, key))[1]
        )
        cohort = load_cohort(path)
        cohort.fingerprint()
        assert not [name for name in read if name.endswith("features")]
    wsi = ForkingPickler.loads(
        ForkingPickler.dumps(bags(cohort, "wsi"))
    )  # as it is sent to a worker
    assert wsi.patients == ("001", "002")
    assert (wsi.features, wsi.coords) == (3, 2)
    assert wsi.extent == max(array.max() for array in where.values())
    features, coords = wsi["001"]
    np.testing.assert_array_equal(
        features, np.concatenate([tiles["s1"], tiles["s2"]]).astype(np.float32)
    )
    np.testing.assert_array_equal(
        coords, np.concatenate([where["s1"], where["s2"]]).astype(np.float32)
    )
    assert wsi.shape("001") == (6, 3)

    bad = zarr.open_group(str(tmp_path / "s.zarr"), mode="a")
    bad["s3/coords"][0, 0] = np.nan
    with pytest.raises(CohortError, match=r"s.zarr: s3: coords: expected finite.*first: 0"):
        wsi["002"]
    del bad["s1/coords"]
    with pytest.raises(CohortError, match="s.zarr: s1 of patient 001: expected 3.*got 3 and 0"):
        wsi["001"]
    del bad["s1/features"]
    with pytest.raises(CohortError, match="s1: expected an array, or a group with an array `feat"):
        wsi["001"]


def test_zarr_arrays(put: Put, tmp_path: Path) -> None:
    import zarr

    store = zarr.open_group(str(tmp_path / "s.zarr"), mode="w")
    store.create_array("002", data=np.arange(6, dtype=np.uint8).reshape(3, 2))
    store.create_array("003", data=np.zeros((1, 5)))
    store.create_array("010", data=np.array([[1e300, 0]]))
    wsi = bags(load_cohort(put(yaml=BAGS % "s.zarr")), "wsi")
    assert (wsi.features, wsi.coords, wsi.extent) == (2, 0, 1.0)
    features, coords = wsi["002"]
    np.testing.assert_array_equal(features, [[0, 1], [2, 3], [4, 5]])
    assert features.dtype == np.float32
    assert coords is None
    with pytest.raises(CohortError, match="s.zarr: 003 of patient 003: expected 2.*got 5 and 0"):
        wsi["003"]
    with pytest.raises(CohortError, match="s.zarr: 010: expected finite numbers"):
        wsi["010"]
    (tmp_path / "folder").mkdir()
    assert "folder is no zarr group" in refusal(put(yaml=BAGS % "folder"))


# Splits.


def split_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(dedent(text))


SPLIT = ("name: small", 'name: small\nsplits: {files: "s_*.csv"}')


def test_splits(put: Put, tmp_path: Path) -> None:
    split_file(tmp_path, "s_10.csv", ",train,val,test\n0,001,003,010\n1,002,,\n")
    split_file(tmp_path, "s_2.csv", "train,val\n001,003\n002,\n")
    splits = load_cohort(put(SPLIT)).splits
    assert splits == (
        motet.io.Split(("001", "002"), (), ("003",)),
        motet.io.Split(("001", "002"), ("003",), ("010",)),
    )
    path = put(("name: small", "name: small\nsplits: {test: [held.csv]}"))
    (tmp_path / "held.csv").write_text("x,id\n1,010\n")
    assert load_cohort(path).splits == (motet.io.Split(("001", "002", "003"), (), ("010",)),)
    (tmp_path / "held.csv").write_text("x,pid\n1,010\n")
    assert (
        refusal(path)
        == "splits.test: no column 'id' in held.csv: did you mean 'pid'? known: x, pid"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train,val\n001,009\n", "s_0.csv: test: 1 patient (the first: 009) not in the cohort"),
        ("train,val\n001,003\n003,\n", "s_0.csv: patient 003 is in train and again in test"),
        ("train,test\n001,002\n", "s_0.csv: group a is in train and, with patient 002, in test"),
        ("train,tset\n001,002\n", "s_0.csv: expected columns train and val, test or both, got "),
        ("train,test\n001,\n", "s_0.csv: test has no patients"),
    ],
)
def test_refused_splits(text: str, message: str, put: Put, tmp_path: Path) -> None:
    split_file(tmp_path, "s_0.csv", text)
    assert message in refusal(put(SPLIT, ("patient: id", "patient: id\ngroup: person")))


def test_splits_may_name_the_dropped(put: Put, tmp_path: Path) -> None:
    split_file(tmp_path, "s_0.csv", "train,val\n001,003\n002,010\n")
    path = put(
        SPLIT,
        ("event: event", "event: event, nonpositive: drop"),
        **{"t.csv": TABLE.replace("7.5", "0")},
    )
    cohort = load_cohort(path)
    assert cohort.patients == ("001", "003", "010")
    assert cohort.splits == (motet.io.Split(("001",), (), ("003", "010")),)


# Prediction.


def test_without_outcome(put: Put) -> None:
    """The same YAML reads new patients without an outcome and with modalities missing."""
    new = "id,age,stage,g1,g2\n7,30,I,1,\n"
    yaml = YAML.replace("tables:\n", "tables:\n  more: {file: more.csv}\n  d: {file: d.csv}\n")
    yaml += "  more: {table: more}\n  codes: {table: d, codes: code}\n"
    files = {"t.csv": new, "more.csv": "id,x\n8,1\n7,\n9,\n", "d.csv": "id,code\n"}
    path = put(yaml=yaml, **files)
    cohort = load_cohort(path, outcome=False)
    assert (cohort.outcome, cohort.splits) == (None, None)
    assert cohort.patients == cohort.groups == ("7", "8", "9")
    missing = table(cohort, "genes").isna().to_numpy().tolist()
    assert missing == [[False, True], [True, True], [True, True]]
    assert table(cohort, "codes").shape == (3, 0)
    assert table(cohort, "more")["x"].tolist()[1] == 1
    assert "known: id, age" in refusal(path)
    line = "outcome: {table: t, time: time, unit: days, event: event}\n"
    without = put((line, ""), yaml=yaml, **files)
    assert load_cohort(without, outcome=False).fingerprint() == cohort.fingerprint()
    assert refusal(without) == "key 'outcome' is missing (only prediction works without it)"
    assert "no column 'age'" in refusal(
        put(yaml=yaml, **files | {"t.csv": "id,g1\n7,1\n"}), outcome=False
    )
    nobody = "id,age,stage,g1,g2\n"
    path = put(**{"t.csv": nobody})
    assert refusal(path, outcome=False) == "no modality has a patient"


def test_predicts_without_bags(put: Put, tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz")
    yaml = (CODES + "  wsi: {bags: none.npz, features: 4}\n").replace("[0, 48]", "[96, 99]")
    cohort = load_cohort(put(yaml=yaml, **LONG), outcome=False)
    assert bags(cohort, "wsi").patients == bags(cohort, "labs").patients == ()
    assert bags(cohort, "wsi").features == 4
    assert cohort.patients == ("002", "001", "999")


# The text of a cohort.


def test_the_text_of_a_cohort(put: Put) -> None:
    yaml = CODES.replace("name: codes\n", "name: codes\ngroup: person\n") + (
        "  clinical: {table: t, columns: [age, stage], categorical: stage}\n"
    )
    cohort = load_cohort(put(yaml=yaml, **LONG))
    assert str(cohort) == dedent("""\
        codes
        patients: 4 in 3 groups; splits with the data: 0
        outcome:  survival, 2 events (50%), median follow-up 7.5 days
        modality  kind                width  patients  tokens per patient: median (max)
        codes     table               3      2 (50%)
        labs      bags, 1 coordinate  2      2 (50%)   2 (2)
        clinical  table, 1 category   2      4 (100%)
        missing:  4 combinations
                 1 (25%)  labs
                 1 (25%)  nothing missing
                 1 (25%)  codes
                 1 (25%)  codes, labs""")
    assert repr(cohort) == "<Cohort 'codes': 4 patients, codes, labs, clinical>"
    new = load_cohort(put(yaml=yaml, **LONG), outcome=False)
    assert "\noutcome:  none, loaded for prediction\n" in str(new)
    assert str(motet.io.Classes(np.array([0, 1, 1]), ("a", "b"))) == "classes a 1, b 2"


def test_the_text_fits_a_screen() -> None:
    rng = np.random.default_rng(0)
    patients = tuple(map(str, range(100)))
    tables = {
        f"m{i}": pd.DataFrame({"x": np.where(rng.random(100) < 0.5, 1, np.nan)}, index=[*patients])
        for i in range(30)
    }
    cohort = Cohort("large", patients, patients, None, dict(tables), None)
    lines = str(cohort).splitlines()
    assert len(lines) < 25
    assert "and 18 more modalities" in lines
    assert max(map(len, lines)) < 100
    assert "m0" not in str(Cohort("bare", patients, patients, None, {}, None))


def test_median_follow_up_is_the_reverse_kaplan_meier() -> None:
    from sksurv.nonparametric import kaplan_meier_estimator

    rng = np.random.default_rng(0)
    for n in (2, 5, 40, 300):
        times = rng.integers(1, 30, n).astype(float)
        events = rng.random(n) < 0.4
        events[:2] = True, False
        at, followed = kaplan_meier_estimator(events, times, reverse=True)[:2]
        reached = at[followed <= 0.5]
        expected = f"{reached[0]:g}" if len(reached) else f"above {times.max():g}"
        assert f"median follow-up {expected} days" in str(Survival(times, events, "days"))


# What a cohort may lack.


def test_an_optional_modality_is_left_out_and_named(put: Put) -> None:
    yaml = YAML.replace("tables:\n", "tables:\n  s: {file: gone.csv}\n") + (
        "  a: {table: s, optional: true}\n"
        "  b: {table: t, columns: 'x*', optional: true}\n"
        "  c: {table: s, codes: code, optional: true}\n"
        "  d: {table: s, item: a, value: b, time: c, hours: [0, 1], optional: true}\n"
        "  e: {bags: 'gone_*.npz', optional: true}\n"
        "  f: {table: t, columns: [g1, g9], optional: true}\n"
    )
    with pytest.warns(UserWarning, match="is left out") as caught:
        cohort = load_cohort(put(yaml=yaml))
    assert list(cohort.modalities) == ["genes", "clinical"]
    assert cohort.fingerprint() == load_cohort(put()).fingerprint()
    notes = [str(warning.message) for warning in caught]
    assert [note.split(":")[1] for note in notes] == [
        f" modality '{name}' is left out" for name in "abcdef"
    ]
    assert "tables.s.file: no file 'gone.csv' in" in notes[0]
    assert "'x*' matches no column of table 't'" in notes[1]
    assert "no column 'g9' in table 't' (t.csv): known: id, person" in notes[5]
    assert caught[0].filename == __file__
    wrong = yaml.replace("columns: [g1, g9]", "columns: [stage]")
    assert "expected numbers, got 'I'" in refusal(put(yaml=wrong))
    wrong = yaml.replace("{table: s, optional: true}", "{table: s}")
    assert "tables.s.file: no file" in refusal(put(yaml=wrong))


def test_columns_may_be_absent(put: Put) -> None:
    change = ("columns: [age, stage], categorical: stage", "columns: [age, height, stage, smoker], "
              "categorical: [stage, smoker], optional: height, fill: {smoker: never}")  # fmt: skip
    with pytest.warns(UserWarning, match="has no column") as caught:
        cohort = load_cohort(put(change))
    begin = "small.yaml: modalities.clinical: table 't' (t.csv) has no column"
    assert [str(warning.message) for warning in caught] == [
        f"{begin} 'height'; it is missing for all patients",
        f"{begin} 'smoker'; filled with 'never'",
    ]
    clinical = table(cohort, "clinical")
    assert list(clinical) == ["age", "height", "stage", "smoker"]
    assert clinical["height"].isna().all()
    assert clinical["smoker"].tolist() == ["never"] * 4
    empty = TABLE.replace("2,1,40,I", "2,1,,")
    with pytest.warns(UserWarning, match="has no column"):  # 003 lacks the modality
        clinical = table(load_cohort(put(change, **{"t.csv": empty})), "clinical")
    assert clinical["smoker"].isna().tolist() == [False, False, True, False]
    there = TABLE.replace("stage", "smoker,stage").replace(",I", ",yes,I").replace("50,", "50,no,")
    with pytest.warns(UserWarning, match="no column 'height'"):
        clinical = table(load_cohort(put(change, **{"t.csv": there})), "clinical")
    assert clinical["smoker"].tolist() == ["yes", "yes", "yes", "no"]


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("optional: hight", "clinical.optional: 'hight' is none of the columns of this modality"),
        ("fill: {stge: I}", "clinical.fill: 'stge' is none of the columns of this modality: did y"),
        ("optional: 3", "modalities.clinical.optional: expected true or names of columns, got 3"),
        ("fill: {age: [1]}", "clinical.fill.age: expected text, a number, true or false, got [1]"),
    ],
)
def test_refused_absence(new: str, message: str, put: Put) -> None:
    path = put(("categorical: stage", f"categorical: stage, {new}"))
    assert message in refusal(path)


def test_a_cohort_needs_a_modality(put: Put) -> None:
    yaml = YAML[: YAML.index("  genes")] + "  a: {table: t, columns: 'x*', optional: true}\n"
    assert refusal(put(yaml=yaml)) == "modalities: all are optional, and none is there"


# Refusals.


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'columns: "g*"',
            "colums: x",
            "modalities.genes: unknown key 'colums': did you mean 'columns'? known: table, columns",
        ),
        ("name: small", "nmae: small", "unknown key 'nmae': did you mean 'name'? known: name, pat"),
        ("file: t.csv", "fil: t.csv", "tables.t: unknown key 'fil': did you mean 'file'? known: "),
        (
            'table: t, columns: "g*"',
            "bag: x",
            "modalities.genes: unknown key 'bag': did you mean 'b",
        ),
        ('table: t, columns: "g*"', "code: x", "genes: unknown key 'code': did you mean 'codes'?"),
        (
            "time: time, unit: days, event: event",
            "lable: x",
            "outcome: expected one of the keys time, event, label, code; did you mean 'label'?",
        ),
        ("name: small", "name: " + "[" * 5000, "expected a cohort, got YAML nested too deeply"),
        ("name: small", f"name: [{'x, ' * 99}]", "name: expected a valid string, got ['x', 'x', "),
        ("table: t, time: time", "time: time", "outcome: key 'table' is missing"),
        (
            "time: time, unit: days, event: event",
            "kind: x",
            "outcome: expected one of the keys time,",
        ),
        ("file: t.csv", "repeats: same", "tables.t: expected one of the keys file and sksurv"),
        ("file: t.csv", "file: 5", "tables.t.file.0: expected a valid string, got 5"),
        (
            "file: t.csv",
            "file: t.csv, repeats: yes",
            "tables.t.repeats: expected 'same', got 'yes'",
        ),
        ("  t: {file: t.csv}", "  t: t.csv", "tables.t: expected keys with values"),
        ("name: small", "- small", "not YAML at line 2"),
        ("patient: id", "patient: id\npatient: id", "not YAML at line 3: key 'patient' repeats"),
        ("{file: t.csv}", "{file: t.csv, file: u.csv}", "not YAML at line 4: key 'file' repeats"),
        (
            "genes: {table: t",
            "genes: {table: tt",
            "modalities.genes.table: no table 'tt': known: t",
        ),
        ("file: t.csv", "file: u.csv", "tables.t.file: no file 'u.csv' in "),
        ("file: t.csv", "file: small.yaml", "small.yaml: expected csv, tsv (.gz, .zip) or parquet"),
        ("file: t.csv", "sksurv: brest", "tables.t.sksurv: no data set 'brest': known: aids,"),
        (
            "[age, stage]",
            "[age, stagge]",
            "modalities.clinical.columns: no column 'stagge' in table 't' (t.csv): did you mean "
            "'stage'? known: id, person, time,",
        ),
        ('"g*"', '"h*"', "modalities.genes.columns: 'h*' matches no column of table 't' (t.csv): "),
        ('"g*"', "time", "modalities.genes.columns: column 'time' is the outcome: a model would "),
        ('"g*"', '"tim?"', "modalities.genes.columns: 'tim?' matches no column of"),
        ('"g*"', "id", "modalities.genes.columns: column 'id' names the patient; leave it out"),
        (
            "categorical: stage",
            "categorical: grade",
            "modalities.clinical.categorical: 'grade' matches none of the columns of this modality",
        ),
        (
            ", categorical: stage",
            "",
            "modalities.clinical: column 'stage' of table 't' (t.csv): expected numbers, got 'I' "
            "for patient 001; declare it under `categorical` if it is a category",
        ),
        (
            "patient: id",
            "patient: ident",
            "tables.t: no column 'ident' in table 't' (t.csv): known",
        ),
        (
            "time: time",
            "time: tme",
            "outcome: no column 'tme' in table 't' (t.csv): did you mean 't",
        ),
        (
            "event: event",
            "event: stage",
            "outcome.event: column 'stage' of table 't' (t.csv): expe",
        ),
        (
            "time: time",
            "time: age",
            "outcome.time: column 'age' of table 't' (t.csv): expected a v",
        ),
        (
            "time: time",
            "time: stage",
            "outcome.time: column 'stage' of table 't' (t.csv): expected",
        ),
        (
            "event: event",
            "event: event, observed: 3",
            "outcome.event: column 'event' of table 't' (t.csv): expected `observed` (3) and one "
            "other value, got '0', '1'; list in `observed` all that mean the event",
        ),
    ],
)
def test_refused_yaml(old: str, new: str, message: str, put: Put) -> None:
    assert message in refusal(put((old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (TABLE, "", "t.csv cannot be read: No columns to parse from file"),
        (TABLE, TABLE.splitlines()[0] + "\n", "tables.t: table 't' (t.csv) has no rows"),
        ("7.5", "-1", "outcome.time: column 'time' of table 't' (t.csv): expected times above 0, "
         "got -1 and the like for 1 patient (the first: 002); leave them out by `nonpositive: d"),
        ("7.5", "", "expected a value for every patient, missing for 1 patient (the first: 002)"),
        ("7.5", "long", "column 'time' of table 't' (t.csv): expected numbers, got 'long' for p"),
        ("7.5", "inf", "column 'time' of table 't' (t.csv): expected finite, got Inf for patien"),
        ("7.5,0", "7.5,", "outcome.event: column 'event' of table 't' (t.csv): expected a value f"),
        ("7.5,0", "7.5,2", "expected `observed` (1) and one other value, got '0', '1', '2'; list"),
        ("1.5", "-inf", "modalities.genes: column 'g1' of table 't' (t.csv): expected finite, got "
         "Inf for patient 002"),
        ("1.5", "<1.5", "column 'g1' of table 't' (t.csv): expected numbers, got '<1.5' for pati"),
        ("g1,g2", "g1,g1", "t.csv cannot be read: the header names 'g1' more than once"),
        ("003,b", ",b", "tables.t: the patient is missing in 1 row (the first: 2) of table 't' "),
        ("0.5,1\n", "0.5,1,8\n", "t.csv: rows are longer than the header"),
    ],
)  # fmt: skip
def test_refused_cells(old: str, new: str, message: str, put: Put) -> None:
    assert old in TABLE
    assert message in refusal(put(**{"t.csv": TABLE.replace(old, new)}))


def test_refused_without_events_or_values(put: Put, tmp_path: Path) -> None:
    censored = TABLE.replace("5,1,60", "5,0,60").replace("2,1,40", "2,0,40")
    assert refusal(put(**{"t.csv": censored})).endswith(
        "expected at least one event, that is `observed` (1), got '0'"
    )
    empty = TABLE.replace("0.5,1", "0.5,").replace("1.5,2", "1.5,").replace("2,4", "2,")
    assert refusal(put(**{"t.csv": empty})) == (
        "modalities.genes: no patient has a value in 1 column (the first: 'g2'); leave it out of "
        "`columns`"
    )
    yaml = YAML.replace("tables:\n", "tables:\n  far: {file: far.csv}\n") + "  far: {table: far}\n"
    path = put(yaml=yaml, **{"far.csv": "id,x\n77,1\n"})
    assert refusal(path) == "modalities.far: no patient of the outcome has it"
    change = ("time: time, unit: days, event: event", "label: kind")
    one = "\n".join(line + (",kind" if line[:2] == "id" else ",k") for line in TABLE.splitlines())
    assert refusal(put(change, **{"t.csv": one})).endswith("at least 2 classes, got only 'k'")
    assert refusal(put(("name: small\n", ""))) == "key 'name' is missing"
    several = TABLE.replace("person", "kind") + "001,z,5,1,60,I,0.5,1\n"
    path = put(
        ("file: t.csv", "file: t.csv, repeats: same"),
        ("patient: id", "patient: id\ngroup: kind"),
        **{"t.csv": several},
    )
    assert "the rows of patient 001 differ in column 'kind'" in refusal(path)
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    assert "t.csv cannot be read: 'utf-8' codec" in refusal(tmp_path / "small.yaml")
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write(TABLE * 100)
    (tmp_path / "t.csv.gz").write_bytes((tmp_path / "t.csv.gz").read_bytes()[:-20])
    path = put(("t.csv", "t.csv.gz"))
    assert "t.csv.gz cannot be read" in refusal(path)


def test_a_constant_column_is_fine_and_strangers_are_left_out(put: Put) -> None:
    yaml = YAML.replace("tables:\n", "tables:\n  more: {file: m.csv}\n") + "  more: {table: more}\n"
    path = put(yaml=yaml, **{"m.csv": "id,x\n001,1\n002,1\nstranger,5\n"})
    more = table(load_cohort(path), "more")["x"]
    np.testing.assert_array_equal(more, [1, 1, np.nan, np.nan])


def test_fingerprint_sees_what_matters(put: Put) -> None:
    base = load_cohort(put()).fingerprint()
    assert load_cohort(put(("name: small", "name: other"))).fingerprint() == base
    prints = {base}
    for change in (
        lambda: put(**{"t.csv": TABLE.replace("0.5", "0.6")}),
        lambda: put(**{"t.csv": TABLE.replace("010", "011")}),
        lambda: put(**{"t.csv": TABLE.replace("7.5", "7.6")}),
        lambda: put(**{"t.csv": TABLE.replace("II,1.5", "I,1.5")}),
        lambda: put(("unit: days", "unit: months")),
        lambda: put(("patient: id", "patient: id\ngroup: person")),
    ):
        prints.add(load_cohort(change()).fingerprint())
    assert len(prints) == 7


def test_a_wide_table_is_read_at_once(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """40,000 genes: steps for each column took 22 s where pandas alone takes 2 s."""
    genes = np.random.default_rng(0).normal(size=(4, 300))
    frame = pd.DataFrame(genes, columns=[f"g{i}" for i in range(300)]).assign(age=[1, 2, 3, np.nan])
    frame = frame.assign(id=["001", "002", "003", "010"], time=1, event=[0, 1, 1, 0], stage="I")
    path = put(**{"t.csv": frame.to_csv(index=False)})
    get, seen = pd.DataFrame.__getitem__, []

    def getitem(self: pd.DataFrame, key: object) -> object:
        seen.append(key)
        return get(self, key)

    monkeypatch.setattr(pd.DataFrame, "__getitem__", getitem)
    cohort = load_cohort(path)
    cohort.fingerprint()
    assert len(seen) < 60
    np.testing.assert_array_equal(table(cohort, "genes"), genes)
