"""Read the splits that come with the data."""

from __future__ import annotations

from ..errors import CohortError, counted, listed, suggest
from .cohort import Split
from .schema import SplitFiles, SplitTest
from .table_files import read_table
from .tables import Tables, texts


def read_splits(
    section: SplitFiles | SplitTest,
    tables: Tables,
    groups: dict[str, str],
    dropped: frozenset[str],
) -> tuple[Split, ...]:
    """Read the splits of a cohort.

    Args:
        section: of the YAML file.
        tables: of the cohort.
        groups: patient to group, of the patients with an outcome.
        dropped: patients that the outcome left out; the splits may name them.

    Raises:
        CohortError: a split has an unknown patient, a patient twice, or a group in two parts.
    """
    if isinstance(section, SplitTest):
        where = "splits.test"
        test: dict[str, None] = {}
        for path in tables.folders.match(section.test, where):
            frame = read_table(path, [tables.spec.patient], where)
            if tables.spec.patient not in frame:
                raise CohortError(
                    f"{where}: no column {tables.spec.patient!r} in {path.name}: "
                    f"{suggest(tables.spec.patient, frame.columns)}"
                )
            test |= dict.fromkeys(texts(frame[tables.spec.patient]).dropna())
        train = [patient for patient in groups if patient not in test]
        return (_make_split({"train": train, "test": list(test)}, groups, dropped, where),)
    splits = []
    for path in tables.folders.match(section.files, "splits.files"):
        where = f"splits: {path.name}"
        frame = read_table(path, ["*"], where)
        names = {"val": "validation"}
        parts = {
            names.get(column, column): list(texts(frame[column]).dropna())
            for column in frame.columns
            if column in ("train", "val", "validation", "test")
        }
        if "train" not in parts or len(parts) == 1:
            raise CohortError(
                f"{where}: expected columns train and val, test or both, got "
                f"{listed(frame.columns)}"
            )
        if "test" not in parts:  # files of PORPOISE: it reports on the part that it calls val
            parts["test"] = parts.pop("validation")
        splits.append(_make_split(parts, groups, dropped, where))
    return tuple(splits)


def _make_split(
    parts: dict[str, list[str]], groups: dict[str, str], dropped: frozenset[str], where: str
) -> Split:
    """Make a split of lists of patients, and check it."""
    part_of: dict[str, str] = {}
    part_of_group: dict[str, str] = {}
    kept = {part: [name for name in names if name not in dropped] for part, names in parts.items()}
    for part, patients in kept.items():
        unknown = [patient for patient in patients if patient not in groups]
        if unknown:
            raise CohortError(
                f"{where}: {part}: {counted(unknown)} not in the cohort, whose ids are such as "
                f"{listed(groups, 2)}"
            )
        for patient in patients:
            if patient in part_of:
                raise CohortError(
                    f"{where}: patient {patient} is in {part_of[patient]} and again in {part}"
                )
            part_of[patient] = part
            other = part_of_group.setdefault(groups[patient], part)
            if other != part:
                raise CohortError(
                    f"{where}: group {groups[patient]} is in {other} and, with patient {patient}, "
                    f"in {part}: expected each group in one part"
                )
        if not patients and part != "validation":
            raise CohortError(f"{where}: {part} has no patients")
    return Split(tuple(kept["train"]), tuple(kept.get("validation", ())), tuple(kept["test"]))
