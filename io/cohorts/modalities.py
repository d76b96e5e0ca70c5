"""Read the modalities: tables of numbers and categories, codes, measurements, bags in files."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .bags import Bags, open_bags
from .columns import read_columns
from .measurements import read_measurements
from .schema import BagFiles, Codes, Columns, Measurements
from .tables import Tables, texts


def read_modality(name: str, tables: Tables, keep: set[str] | None) -> pd.DataFrame | Bags:
    """Read one modality.

    Args:
        name: of the modality.
        tables: of the cohort.
        keep: the patients to read; None for all.

    Returns:
        A table with a row per patient who has the modality, or Bags.
    """
    where, section = f"modalities.{name}", tables.spec.modalities[name]
    match section:
        case Columns():
            return read_columns(section, tables, keep, where)
        case Codes():
            return _read_codes(section, tables, keep, where)
        case Measurements():
            return read_measurements(section, tables, keep, where)
        case BagFiles():
            return _read_bags(section, tables, keep, where)


def _read_codes(section: Codes, tables: Tables, keep: set[str] | None, where: str) -> pd.DataFrame:
    """Return a table of 0 and 1: a row per patient, a column per code."""
    tables.refuse_outcome([section.codes], f"{where}.codes")
    rows = tables.long(section.table, [section.codes], where)
    codes = texts(rows[section.codes], verbatim=True).dropna().str.slice(0, section.characters)
    if keep is not None:
        codes = codes[codes.index.isin(keep)]
    row, patients = pd.factorize(codes.index)
    column, names = pd.factorize(codes.to_numpy(object), sort=True)
    cells = np.zeros((len(patients), len(names)))  # once: 0.5 GB for all admissions of MIMIC-III
    cells[row, column] = 1
    has_code = pd.DataFrame(cells, index=patients, columns=names, copy=False)
    # For prediction: a code of the training data that no new patient has is 0, not unknown.
    has_code.attrs["codes"] = True
    return has_code


def _read_bags(section: BagFiles, tables: Tables, keep: set[str] | None, where: str) -> Bags:
    keys = None
    if section.keys:
        column = section.keys.column
        rows = tables.long(section.keys.table, [column], f"{where}.keys")[column]
        names = texts(rows, verbatim=True).dropna()
        keys = {
            str(patient): list(dict.fromkeys(part))
            for patient, part in names.groupby(level=0, sort=False)
        }
    return open_bags(
        tables.folders.match(section.bags, f"{where}.bags"),
        keys,
        keep,
        features=section.features,
        source=section.source,
        encoder=section.encoder,
        where=where,
    )
