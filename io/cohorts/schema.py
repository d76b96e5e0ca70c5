"""The schema of a cohort's YAML file, and its errors in one line."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from ..errors import CohortError, suggest


def _as_list(value: object) -> object:
    return value if isinstance(value, list) else [value]


def _as_text(value: object) -> str:
    if not isinstance(value, str | int | float):  # bool is an int
        raise PydanticCustomError("scalar", "expected text, a number, true or false")
    return plain(value)


def plain(value: object) -> str:
    """Return a cell as text, such that 1, 1.0 and "1.0" give the same text, and 01 another.

    pandas reads a column of integers as floats if it has gaps, so the same id or category may be
    1 in one file and 1.0 in another.
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip())


TextList = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]
CellText = Annotated[str, BeforeValidator(_as_text)]
CellTextList = Annotated[list[CellText], BeforeValidator(_as_list), Field(min_length=1)]
Side = Annotated[int, Field(ge=1)]
Range = Annotated[list[float], Field(min_length=2, max_length=2)]


class Section(BaseModel):
    """A part of the YAML file: unknown keys are errors, and no value is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    other_forms: ClassVar[tuple[str, ...]] = ()
    """Keys of the other forms that the section could have had, to suggest them."""

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise PydanticCustomError("mapping", "expected keys with values")
        keys = [field.alias or name for name, field in cls.model_fields.items()]
        for key in value:
            if key not in keys:
                raise PydanticCustomError(
                    "unknown",
                    "unknown key {key}: {known}",
                    {"key": repr(key), "known": suggest(str(key), [*keys, *cls.other_forms])},
                )
        return value


class Join(Section):
    table: str
    on: str


class Derive(Section):
    start: str = Field(alias="from")
    to: str
    unit: Literal["hours", "days", "months", "years"]
    at_most: float | None = None


class Table(Section):
    file: TextList | None = None
    sksurv: str | None = None
    patient: str | None = None
    patients_of: str | None = None
    repeats: Literal["same"] | None = None
    missing: dict[str, CellTextList] = {}
    join: Join | None = None
    derive: dict[str, Derive] = {}

    @model_validator(mode="after")
    def _one_source(self) -> Table:
        if (self.file is None) == (self.sksurv is None):
            raise PydanticCustomError("source", "expected one of the keys file and sksurv")
        return self


# censor, censoring, is_censored, OS.cens; not licenses.
_CENSORING = re.compile(r"censor|(?<![a-z])cens(?![a-z])", re.IGNORECASE)


class SurvivalOutcome(Section):
    table: str
    time: str
    unit: str
    event: str
    observed: CellTextList = ["1"]
    nonpositive: Literal["error", "drop"] = "error"

    @model_validator(mode="after")
    def _censoring_is_declared(self) -> SurvivalOutcome:
        """Refuse the default of `observed` where 1 most likely means censored."""
        if _CENSORING.search(self.event) and "observed" not in self.model_fields_set:
            raise PydanticCustomError(
                "censoring",
                "the name of column {event} says censoring: list in `observed` the values that "
                "mean that the event happened, such as `observed: 0` if 1 is censored",
                {"event": repr(self.event)},
            )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.time, self.event)


class LabelOutcome(Section):
    table: str
    label: str
    names: dict[CellText, str] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.label,)


class CodeOutcome(Section):
    table: str
    code: str
    between: Range
    names: Annotated[list[str], Field(min_length=2, max_length=2)] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.code,)


def _as_optional(value: object) -> object:
    names = [value] if isinstance(value, str) else value
    if isinstance(names, bool) or (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        return names
    raise PydanticCustomError("optional", "expected true or names of columns")


class Columns(Section):
    other_forms = ("codes", "item", "bags", "images")

    table: str
    columns: TextList | None = None
    categorical: TextList | None = None
    rows: Literal["bag", "mean"] | None = None
    optional: Annotated[bool | list[str], PlainValidator(_as_optional)] = False
    fill: dict[str, CellText] = {}

    @property
    def may_lack(self) -> list[str]:
        """The columns that the table may lack."""
        optional = self.optional if isinstance(self.optional, list) else []
        return list(dict.fromkeys([*self.fill, *optional]))


class Codes(Section):
    table: str
    codes: str
    characters: Annotated[int, Field(ge=1)] | None = None
    optional: bool = False


class Since(Section):
    table: str
    column: str


class Measurements(Section):
    table: str
    item: str
    items: CellTextList | None = None
    value: str
    time: str
    since: Since | None = None
    unit: Literal["minutes", "hours", "days"] | None = None
    hours: Range
    optional: bool = False

    @model_validator(mode="after")
    def _unit_is_of_numbers(self) -> Measurements:
        if self.since and self.unit:
            raise PydanticCustomError(
                "unit", "expected since (times are dates) or unit (times are numbers), got both"
            )
        return self


class SlideColumn(Section):
    table: str
    column: str


class BagFiles(Section):
    bags: TextList
    features: Annotated[int, Field(ge=1)] | None = None
    source: bool = False
    keys: SlideColumn | None = None
    encoder: str | None = None
    optional: bool = False


class ImageFiles(Section):
    images: str
    table: str
    column: str
    file: Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$")] = "{}"
    patch: Annotated[int, Field(ge=1)]
    size: Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    encoder: str | None = None
    store: str | None = None
    optional: bool = False

    @model_validator(mode="after")
    def _sides_and_store(self) -> ImageFiles:
        if self.size and any(side % self.patch for side in self.size):
            raise PydanticCustomError(
                "source",
                "expected a size in multiples of patch, {patch}, got {size}",
                {"patch": self.patch, "size": str(self.size)},
            )
        if (self.encoder is None) != (self.store is None):
            raise PydanticCustomError("source", "expected both of the keys encoder and store")
        return self


class SplitFiles(Section):
    files: TextList


class SplitTest(Section):
    test: TextList


def _by_key(kinds: dict[str, str], otherwise: str | None = None) -> Discriminator:
    """Choose a section's class by a key that only this class has.

    Without it pydantic tries all classes and reports the errors of each.

    Args:
        kinds: key to the tag of a class.
        otherwise: the tag if no key matches; None for an error.
    """

    def choose(value: object) -> str | None:
        keys = value if isinstance(value, dict) else ()
        return next((kind for key, kind in kinds.items() if key in keys), otherwise)

    return Discriminator(
        choose,
        custom_error_type="kind",
        custom_error_message=f"expected one of the keys {', '.join(kinds)}",
    )


# Tags are in <>, so that `_in_one_line` can remove them from the location of an error.
OutcomeSection = Annotated[
    Annotated[SurvivalOutcome, Tag("<survival>")]
    | Annotated[LabelOutcome, Tag("<label>")]
    | Annotated[CodeOutcome, Tag("<code>")],
    _by_key({"time": "<survival>", "event": "<survival>", "label": "<label>", "code": "<code>"}),
]
ModalitySection = Annotated[
    Annotated[Columns, Tag("<columns>")]
    | Annotated[Codes, Tag("<codes>")]
    | Annotated[Measurements, Tag("<events>")]
    | Annotated[BagFiles, Tag("<bags>")]
    | Annotated[ImageFiles, Tag("<images>")],
    _by_key(
        {"bags": "<bags>", "images": "<images>", "codes": "<codes>", "item": "<events>"},
        "<columns>",
    ),
]
SplitsSection = Annotated[
    Annotated[SplitFiles, Tag("<files>")] | Annotated[SplitTest, Tag("<test>")],
    _by_key({"files": "<files>", "test": "<test>"}),
]


class Spec(Section):
    name: str
    patient: str
    group: str | None = None
    tables: dict[str, Table] = {}
    outcome: OutcomeSection | None = None
    modalities: Annotated[dict[str, ModalitySection], Field(min_length=1)]
    splits: SplitsSection | None = None


class Loader(yaml.SafeLoader):
    """A loader of YAML that refuses repeated keys, and reads `on`, `no` and dates as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} repeats", key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


_BOOL, _TIME = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in (_BOOL, _TIME)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")


def read_spec(path: Path) -> Spec:
    """Read a YAML file and check its keys and values. The data files are not opened.

    Raises:
        CohortError: it cannot be read, or a key or value is wrong.
    """
    try:
        content = yaml.load(path.read_text("utf-8-sig"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise CohortError(f"cannot be read: {error}") from None
    except RecursionError:
        raise CohortError("expected a cohort, got YAML nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise CohortError(f"not YAML{line}: {getattr(error, 'problem', None) or error}") from None
    try:
        spec = Spec.model_validate(content)
    except ValidationError as error:
        raise CohortError(_in_one_line(error.errors()[0])) from None
    _check_tables(spec)
    return spec


def _in_one_line(error: ErrorDetails) -> str:
    where = [str(part) for part in error["loc"] if not str(part).startswith("<")]
    message = error["msg"].replace("Input should be ", "expected ")
    got = error["input"]
    if error["type"] == "missing":
        message = f"key {where.pop()!r} is missing"
    elif error["type"] == "kind" and isinstance(got, dict):
        kinds = message.removeprefix("expected one of the keys ").split(", ")
        guesses = [suggest(str(key), kinds).partition(" known:")[0] for key in got]
        message += "".join(f"; {guess}" for guess in guesses if "did you mean" in guess)
    elif error["type"] not in ("unknown", "source", "kind", "censoring", "unit"):
        message = f"{message[0].lower()}{message[1:]}, got {reprlib.repr(got)}"
    return f"{'.'.join(where)}: {message}" if where else message


def _check_tables(spec: Spec) -> None:
    """Check that each name of a table is in `tables`, and that no join is of a joined table."""
    table_names = {"outcome.table": spec.outcome.table} if spec.outcome else {}
    for name, table in spec.tables.items():
        if table.join:
            table_names[f"tables.{name}.join.table"] = table.join.table
        if table.patients_of:
            table_names[f"tables.{name}.patients_of"] = table.patients_of
    for name, modality in spec.modalities.items():
        where = f"modalities.{name}"
        if not isinstance(modality, BagFiles):
            table_names[f"{where}.table"] = modality.table
        elif modality.keys:
            table_names[f"{where}.keys.table"] = modality.keys.table
        if isinstance(modality, Measurements):
            if modality.since:
                table_names[f"{where}.since.table"] = modality.since.table
            if not modality.hours[0] < modality.hours[1]:
                raise CohortError(f"{where}.hours: expected [first, last], got {modality.hours}")
    for where, name in table_names.items():
        if name not in spec.tables:
            raise CohortError(f"{where}: no table {name!r}: {suggest(name, spec.tables)}")
        if "tables." in where and (spec.tables[name].join or spec.tables[name].patients_of):
            raise CohortError(
                f"{where}: expected a table without join and patients_of, but {name!r} has one of "
                "them"
            )
