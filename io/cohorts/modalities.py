"""Read the modalities: tables of numbers and categories, codes, measurements, bags, images."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .bags import Bags, open_bags
from .columns import read_columns
from .encode_images import encode_images
from .images import Cut, ImageBags, find_images, open_images
from .measurements import read_measurements
from .schema import BagFiles, Codes, Columns, ImageFiles, Measurements
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
        case ImageFiles():
            return _read_images(section, tables, keep, where)


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
        keys = _names_of(tables, section.keys.table, section.keys.column, f"{where}.keys")
    return open_bags(
        tables.folders.match(section.bags, f"{where}.bags"),
        keys,
        keep,
        features=section.features,
        source=section.source,
        encoder=section.encoder,
        where=where,
    )


def _names_of(tables: Tables, table: str, column: str, where: str) -> dict[str, list[str]]:
    """Return the texts of a column by patient, each once."""
    rows = tables.long(table, [column], where)[column]
    names = texts(rows, verbatim=True).dropna()
    return {
        str(patient): list(dict.fromkeys(part))
        for patient, part in names.groupby(level=0, sort=False)
    }


def _read_images(section: ImageFiles, tables: Tables, keep: set[str] | None, where: str) -> Bags:
    files = {
        patient: [section.file.replace("{}", name) for name in names]
        for patient, names in _names_of(tables, section.table, section.column, where).items()
        if keep is None or patient in keep
    }
    images = open_images(tables.folders.find(section.images, f"{where}.images"), where)
    files = find_images(images, files, must_exist=keep is not None)
    cut = Cut(section.patch, (section.size[0], section.size[1]) if section.size else None)
    if section.encoder is None or section.store is None:
        return Bags(ImageBags(images, files, cut), features=cut.features, coords=2)
    store = tables.folders.find_or_new(section.store)
    slug, keys = encode_images(images, files, cut, section.encoder, store)
    return open_bags([store], keys, keep, features=None, source=False, encoder=slug, where=where)
