"""The shipped cohorts whose data must be requested, on small made files of the same layout."""

import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from motet.io import Bags, Classes, Cohort, Survival, load_cohort
from motet.io.store.write import StoreWriter
from PIL import Image

from .store_helpers import TILING, Slide, numbers, put, spec


def table(cohort: Cohort, name: str) -> pd.DataFrame:
    modality = cohort.modalities[name]
    assert isinstance(modality, pd.DataFrame)
    return modality


def bags(cohort: Cohort, name: str) -> Bags:
    modality = cohort.modalities[name]
    assert isinstance(modality, Bags)
    return modality


@pytest.fixture
def mimic3(tmp_path: Path) -> Path:
    """Write MIMIC-III's files with three admissions of two persons; one is over 89 years old."""
    folder = tmp_path / "mimic3"
    folder.mkdir()
    files = {
        "PATIENTS": '"ROW_ID","SUBJECT_ID","GENDER","DOB","DOD","DOD_HOSP","DOD_SSN",'
        '"EXPIRE_FLAG"\n'
        '1,22,"F",2080-07-01 00:00:00,,,,0\n2,23,"M",1850-01-01 00:00:00,,,,1\n',
        "ADMISSIONS": '"ROW_ID","SUBJECT_ID","HADM_ID","ADMITTIME","DISCHTIME","DEATHTIME",'
        '"ADMISSION_TYPE","ADMISSION_LOCATION","DISCHARGE_LOCATION","INSURANCE","LANGUAGE",'
        '"RELIGION","MARITAL_STATUS","ETHNICITY","EDREGTIME","EDOUTTIME","DIAGNOSIS",'
        '"HOSPITAL_EXPIRE_FLAG","HAS_CHARTEVENTS_DATA"\n'
        + "".join(
            f'{i},{who},{stay},{start} 12:00:00,2150-01-01 00:00:00,,"EMERGENCY","ER","HOME",'
            f'"Private","ENGL","NONE","{married}","WHITE",,,"SEPSIS",{died},1\n'
            for i, who, stay, start, married, died in (
                (1, 22, 165315, "2130-07-01", "MARRIED", 0),
                (2, 22, 165316, "2131-07-01", "SINGLE", 1),
                (3, 23, 165317, "2140-01-01", "SINGLE", 0),
            )
        ),
        "DIAGNOSES_ICD": '"ROW_ID","SUBJECT_ID","HADM_ID","SEQ_NUM","ICD9_CODE"\n'
        '1,22,165315,1,"4660"\n2,22,165316,1,"1890"\n3,22,165316,2,"V3001"\n4,23,165317,1,\n'
        '5,23,165317,2,"0389"\n',
        "LABEVENTS": '"ROW_ID","SUBJECT_ID","HADM_ID","ITEMID","CHARTTIME","VALUE","VALUENUM",'
        '"VALUEUOM","FLAG"\n'
        '1,22,165315,50820,2130-07-01 18:30:00,"7.3",7.3,"units",\n'
        '2,22,165315,50821,2130-07-01 18:30:00,"NEG",,"mg",\n'
        '3,22,165315,50912,2130-07-03 12:00:00,"1.1",1.1,"mg/dL","abnormal"\n'
        '4,22,165315,50912,2130-07-03 12:30:00,"9.9",9.9,"mg/dL","abnormal"\n'
        '5,22,,50912,2131-07-01 13:00:00,"8.8",8.8,"mg/dL",\n'
        '6,23,165317,50820,2140-01-01 11:00:00,"5",5,"units",\n',
    }
    for name, text in files.items():
        with gzip.open(folder / f"{name}.csv.gz", "wt") as file:
            file.write(text)
    return tmp_path


def test_mimic3(mimic3: Path) -> None:
    cohort = load_cohort("mimic3_death", data=mimic3)
    assert cohort.patients == ("165315", "165316", "165317")
    assert cohort.groups == ("22", "22", "23")
    assert isinstance(cohort.outcome, Classes)
    assert cohort.outcome.labels.tolist() == [0, 1, 0]
    static = table(cohort, "static")
    np.testing.assert_allclose(static["AGE"], [50, 51, 90], atol=0.01)
    assert static["GENDER"].tolist() == ["F", "F", "M"]
    labs = bags(cohort, "labs")
    assert (labs.patients, labs.names) == (("165315",), ("50820", "50912"))
    features, hours = labs["165315"]
    np.testing.assert_allclose(features, [[7.3, np.nan], [np.nan, 1.1]], rtol=1e-6)
    np.testing.assert_array_equal(hours, [[6.5], [48]])
    codes = table(cohort, "diagnoses")
    assert list(codes) == ["038", "189", "466", "V30"]
    np.testing.assert_array_equal(codes, [[0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]])
    for name, labels in (("neoplasms", [0, 1, 0]), ("respiratory", [1, 0, 0])):
        cohort = load_cohort(f"mimic3_icd9_{name}", data=mimic3)
        assert isinstance(cohort.outcome, Classes)
        assert cohort.outcome.labels.tolist() == labels
        assert "diagnoses" not in cohort.modalities


@pytest.mark.parametrize("name", ["blca", "brca", "kirp", "ucec"])
def test_tcga_with_a_store(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "tcga"
    folder.mkdir()
    text = (
        ",case_id,slide_id,age,site,survival_months,censorship,is_female,oncotree_code,train,"
        "A_rnaseq,B_rnaseq,C_cnv,D_mut\n"
        "0,TCGA-2F-A9KO,TCGA-2F-A9KO-01Z-00-DX1.195576CF.svs,63.0,2F,24.11,0.0,0.0,B,1.0,.1,.2,-1,0\n"
        "1,TCGA-2F-A9KO,TCGA-2F-A9KO-01Z-00-DX2.195576CF.svs,63.0,2F,24.11,0.0,0.0,B,1.0,.1,.2,-1,0\n"
        "2,TCGA-2F-A9KP,TCGA-2F-A9KP-01Z-00-DX1.718C82A3.svs,66.0,2F,11.96,1.0,1.0,B,1.0,.3,.4,2,1\n"
        "3,TCGA-2F-A9KQ,TCGA-2F-A9KQ-01Z-00-DX1.1C8CB2DD.svs,69.0,2F,94.81,1.0,0.0,B,1.0,.5,.6,1,1\n"
    )
    (folder / "clean.csv").write_text(text)
    pd.read_csv(folder / "clean.csv").to_csv(folder / f"tcga_{name}_all_clean.csv.zip", index=False)
    if name in ("blca", "kirp"):
        splits = folder / "splits" / f"tcga_{name}"
        splits.mkdir(parents=True)
        (splits / "splits_0.csv").write_text(
            ",train,val\n0,TCGA-2F-A9KO,TCGA-2F-A9KQ\n1,TCGA-2F-A9KP,\n"
        )
    writer = StoreWriter.open(folder / f"slides_{name}", TILING, "0" * 16, spec("made", 4))
    for file, patches in (
        ("TCGA-2F-A9KO-01Z-00-DX1.195576CF.svs", 3),
        ("TCGA-2F-A9KO-01Z-00-DX2.195576CF.svs", 2),
        ("TCGA-2F-A9KP-01Z-00-DX1.718C82A3.svs", 1),
    ):
        (tmp_path / file).write_text(file)
        put(writer, Slide(tmp_path / file, f"0a1b2c/{file}"), numbers(patches, 4))
    cohort = load_cohort(f"tcga_{name}_slides", data=tmp_path)
    assert isinstance(cohort.outcome, Survival)
    assert cohort.outcome.events.tolist() == [True, False, False]
    assert table(cohort, "rna").shape == (3, 2)
    assert ("cnv" in cohort.modalities) == (name != "kirp")
    slides = bags(cohort, "slides")
    assert {patient: slides.shape(patient) for patient in slides.patients} == {
        "TCGA-2F-A9KO": (5, 4),  # two slides
        "TCGA-2F-A9KP": (1, 4),
    }


def test_siim_isic(tmp_path: Path) -> None:
    (tmp_path / "siim_isic").mkdir()
    (tmp_path / "siim_isic" / "train.csv").write_text(
        "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,"
        "benign_malignant,target\n"
        "ISIC_2637011,IP_7279968,male,45.0,head/neck,unknown,benign,0\n"
        "ISIC_0015719,IP_3075186,female,45.0,upper extremity,unknown,benign,0\n"
        "ISIC_0052212,IP_2842074,,,,nevus,benign,0\n"
        "ISIC_0149568,IP_7279968,female,55.0,,melanoma,malignant,1\n"
    )
    with pytest.warns(UserWarning, match="modality 'image' is left out: .*no file 'siim_isic/jpeg"):
        cohort = load_cohort("siim_isic", data=tmp_path)
    assert cohort.groups == ("IP_7279968", "IP_3075186", "IP_2842074", "IP_7279968")
    assert str(cohort.outcome) == "classes benign 3, melanoma 1"
    static = table(cohort, "static")
    assert list(static) == ["age_approx", "sex", "anatom_site_general_challenge"]
    assert static.loc["ISIC_0052212"].isna().all()
    images = tmp_path / "siim_isic" / "jpeg" / "train"
    images.mkdir(parents=True)
    for name in cohort.patients:
        Image.new("RGB", (80, 60), (200, 100, 50)).save(images / f"{name}.jpg")
    cohort = load_cohort("siim_isic", data=tmp_path)
    image = bags(cohort, "image")
    assert image.patients == cohort.patients
    assert image.shape("ISIC_2637011") == (12, 3 * 12**2)
