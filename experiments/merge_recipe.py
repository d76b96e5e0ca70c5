"""Merge recipes: trained LegoBlocks named in a YAML file, joined by `motet merge` with no training.

    method: harmonic          # or sum, mean, product
    phase: principal          # or circular
    head: slerp               # or linear, ot
    blocks:
      omic: {model: blocks/omic.safetensors, weight: 2}
      wsi: blocks/wsi.safetensors             # weight 1

If the blocks are model files, the result is a folder with one model. If they are run folders, they
are merged fold by fold into a run folder. Both get a card, README.md, which names the blocks.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from safetensors import safe_open

from .._atomic import replacing, write_text
from .._checks import positive
from ..fusion.checkpoint import load, save
from ..fusion.lego_block import LegoBlock
from ..fusion.lego_merge import LegoMerge
from ..fusion.training import rank
from ..io.cohorts.schema import Loader
from ..io.errors import suggest
from ..kernels.checks import normalised_weights
from . import merge_card
from .join import blocks_of, cohort_of, merge_runs
from .run_folder import Run

MODEL = "model.safetensors"
# Largest size of a recipe: enough for a thousand blocks.
MAX_BYTES = 1 << 16


class RecipeError(ValueError):
    """A recipe that cannot be used; the message has one line."""


@dataclass(frozen=True)
class RecipeBlock:
    """One block of a merge.

    Args:
        name: its modality in the merged model.
        path_as_typed: the path that the user typed, for messages and the card.
        path: of a model file or a run folder.
        weight: relative to the other weights.
    """

    name: str
    path_as_typed: str
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """What to merge, and how.

    Args:
        error_prefix: how its errors begin: the path of the YAML file.
        text: the recipe as the user typed it, for the card.
        language: of the text, yaml or sh.
        blocks: the blocks.
        method, phase, head: arguments of LegoMerge.
    """

    error_prefix: str
    text: str
    language: str
    blocks: tuple[RecipeBlock, ...]
    method: str
    phase: str
    head: str

    def options(self) -> dict[str, Any]:
        """Return the arguments of LegoMerge."""
        shares = normalised_weights([block.weight for block in self.blocks], len(self.blocks))
        weights = {block.name: share for block, share in zip(self.blocks, shares, strict=True)}
        return {"method": self.method, "phase": self.phase, "head": self.head, "weights": weights}


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe; its models are not opened.

    Args:
        path: the YAML file; paths in it are relative to its folder.

    Raises:
        RecipeError: what is wrong with which key, in one line.
    """
    prefix = f"{path}: "
    try:
        if not path.is_file():
            raise RecipeError(f"{prefix}expected a recipe, got {_describe_path(path)}")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{prefix}cannot be read: {error}") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{prefix}expected a recipe of at most {MAX_BYTES} bytes, got more")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{prefix}expected UTF-8, got byte {content[error.start]:#04x} at {error.start}"
        ) from error
    try:
        schema = _RecipeSchema.model_validate(_parse_yaml(text))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        rest_note = f" (and {len(errors) - 5} more)" if len(errors) > 5 else ""
        raise RecipeError(prefix + "; ".join(map(_format_error, errors[:5])) + rest_note) from error
    except ValueError as error:
        raise RecipeError(f"{prefix}{error}") from error
    blocks = tuple(
        RecipeBlock(name, block.model, path.parent / block.model, block.weight)
        for name, block in schema.blocks.items()
    )
    return Recipe(prefix, text, "yaml", blocks, schema.method, schema.phase, schema.head)


def make_recipe(paths: Sequence[Path], *, method: str, head: str) -> Recipe:
    """Return the recipe of `motet merge RUN ...`: all blocks of some runs with equal weights.

    Raises:
        RunError: a folder without LegoBlocks, or a run that is not finished.
    """
    text = shlex.join(["motet", "merge", *map(str, paths), "--method", method, "--head", head])
    blocks = tuple(
        RecipeBlock(run.config["modalities"][0], str(run.path), run.path)
        for run in blocks_of(paths)
    )
    return Recipe("", text, "sh", blocks, method, "principal", head)


def merge(recipe: Recipe, out: Path, *, data: Path | None = None) -> Run | Path:
    """Merge the blocks of a recipe, and write a card beside the result.

    Args:
        recipe: see `read_recipe` and `make_recipe`.
        out: the new folder. The same run is continued. A model and its card replace those of an
            earlier merge; nothing else is overwritten.
        data: folder of the cohort's files, for runs.

    Returns:
        The finished run; for model files, the path of the merged model.

    Raises:
        ValueError: in one line: files that are not LegoBlocks, blocks that do not fit, or a folder
            that holds something else.
    """
    if recipe.head == "ot" and find_spec("ot") is None:
        raise RecipeError(f"{recipe.error_prefix}head: ot needs POT: pip install POT")
    if _are_runs(recipe):
        return _merge_runs(recipe, out, data)
    if data is not None:
        raise RecipeError(f"{recipe.error_prefix}expected run folders with --data, got model files")
    return _merge_files(recipe, out)


def _are_runs(recipe: Recipe) -> bool:
    """Return whether the blocks are run folders; raise if a path does not exist."""
    for block in recipe.blocks:
        try:
            exists = block.path.exists()
        except OSError:  # a name that no file can have
            exists = False
        if not exists:
            raise RecipeError(
                f"{recipe.error_prefix}blocks.{block.name}: expected a model file or a run folder, "
                f"its path relative to the recipe, got {_abbreviate(block.path_as_typed)}, where "
                "there is none"
            )
    folders = [block.name for block in recipe.blocks if block.path.is_dir()]
    files = [block.name for block in recipe.blocks if not block.path.is_dir()]
    if folders and files:
        raise RecipeError(
            f"{recipe.error_prefix}blocks: expected model files or run folders, got both: files "
            f"{', '.join(files)}, folders {', '.join(folders)}"
        )
    return not files


def _merge_files(recipe: Recipe, out: Path) -> Path:
    if rank():
        return out / MODEL
    _check_free(out)
    parts = []
    for block in recipe.blocks:
        try:
            model = load(block.path)
            if not isinstance(model, LegoBlock):
                raise ValueError(f"{block.path}: expected a LegoBlock, got {type(model).__name__}")
            with safe_open(block.path, framework="pt") as file:
                metadata = json.loads(file.metadata()["motet"])
        except (ValueError, TypeError, OSError) as error:
            raise RecipeError(f"{recipe.error_prefix}blocks.{block.name}: {error}") from error
        digest = _compute_digest([block.path])
        parts.append(
            merge_card.CardEntry(block.name, block.path_as_typed, digest, [model], metadata)
        )
    try:
        merged = LegoMerge({p.name: p.models[0] for p in parts}, **recipe.options()).eval()
    except ValueError as error:
        raise RecipeError(f"{recipe.error_prefix}{error}") from error
    out.mkdir(parents=True, exist_ok=True)
    # The card is complete before the model: if the process is killed in between, the card marks
    # the folder as that of a merge, so that the same command may write it again.
    with replacing(out / MODEL) as model_file:
        save(merged, model_file)
        typed = merge_card.make_code_block("yaml", recipe.text)
        digest = _compute_digest([model_file])
        write_text(
            out / merge_card.NAME, merge_card.make_model_card(merged, parts, typed, MODEL, digest)
        )
    return out / MODEL


def _merge_runs(recipe: Recipe, out: Path, data: Path | None) -> Run:
    if not rank():
        Run.check_free(out, "merge")
        _check_card(out, merge_card.RUN_MARK)
    try:
        runs = [_find_run(block) for block in recipe.blocks]
        merged = merge_runs(runs, out, cohort=cohort_of(runs[0], data), **recipe.options())
    except ValueError as error:
        raise RecipeError(f"{recipe.error_prefix}{error}") from error
    if rank():
        return merged
    folds = range(len(merged.splits))
    parts = [
        merge_card.CardEntry(
            block.name,
            block.path_as_typed,
            _compute_digest([run.fold(number) / MODEL for number in folds]),
            [cast(LegoBlock, run.fitted(number).model) for number in folds],
            run.config,
        )
        for block, run in zip(recipe.blocks, runs, strict=True)
    ]
    model = merged.fitted(0).model
    assert isinstance(model, LegoMerge)
    typed = merge_card.make_code_block(recipe.language, recipe.text)
    write_text(out / merge_card.NAME, merge_card.make_run_card(model, parts, typed))
    return merged


def _find_run(block: RecipeBlock) -> Run:
    """Return the run of the block's modality: the folder itself, or one of the blocks in it."""
    runs = blocks_of([block.path])
    names = [run.config["modalities"][0] for run in runs]
    if block.name not in names:
        raise RecipeError(
            f"blocks.{block.name}: expected the name of a modality in {block.path_as_typed}, "
            f"{' or '.join(map(repr, names))}, got {block.name!r}"
        )
    return runs[names.index(block.name)]


def _compute_digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# Where a result may go


def _check_free(out: Path) -> None:
    """Raise unless a merged model may be written to a folder."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {str(out)!r}")
    _check_card(out, merge_card.MODEL_MARK)
    if out.is_dir() and not (out / merge_card.NAME).exists():
        items = [item.name for item in out.iterdir() if item.name[0] != "."]
        if items:
            raise ValueError(
                f"--out: expected a new or empty folder, or an earlier merge, got {str(out)!r}, "
                f"which holds {items[0]!r}"
            )


def _check_card(out: Path, mark: str) -> None:
    """Raise if the folder has a README.md that is not such a card."""
    path = out / merge_card.NAME
    if not path.exists():
        return
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(mark.encode())) == mark.encode():
                return
    raise ValueError(f"--out: {str(path)!r} exists, and is no card of such a merge")


# Reading


def _describe_path(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "something else" if path.exists() else "no such file"


class _Loader(Loader):
    """The YAML of cohorts, which refuses repeated keys, with text and decimal numbers only.

    Aliases are refused, since a small file could become huge, and so are tags. 1e-3 is a number;
    1:30 is text (YAML reads it as 90).
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                None, None, "expected no alias (*) and no tag (!)", event.start_mark
            )
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$", re.ASCII),
    list("-+.0123456789"),
)


def _parse_yaml(text: str) -> Any:
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"not YAML{line}: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise ValueError("expected a recipe, got YAML nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected the keys {', '.join(_KEYS)}, got {_abbreviate(content)}")
    return content


def _check_name(value: str) -> str:
    if not value.isprintable():
        raise PydanticCustomError("name", "")  # _format_error writes the message
    return value


def _check_weight(value: object) -> float:
    try:
        return positive("weight", value)
    except ValueError:
        raise PydanticCustomError("weight", "expected a positive finite number") from None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _BlockSchema(_Strict):
    model: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, BeforeValidator(_check_weight)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if isinstance(value, str):
            return {"model": value}
        if not isinstance(value, dict):
            raise PydanticCustomError("block", "expected a path, or the keys model and weight")
        return value


class _RecipeSchema(_Strict):
    method: Literal["harmonic", "sum", "mean", "product"] = "harmonic"
    phase: Literal["principal", "circular"] = "principal"
    head: Literal["slerp", "linear", "ot"] = "slerp"
    blocks: Annotated[
        dict[Annotated[str, AfterValidator(_check_name)], _BlockSchema], Field(min_length=2)
    ]


_KEYS = tuple(_RecipeSchema.model_fields)
_MESSAGES = {
    "dict_type": "expected names with paths",
    "string_type": "expected text",
    "string_too_short": "expected a path",
    "too_short": "expected 2 or more",
}


def _format_error(error: ErrorDetails) -> str:
    location, kind = [str(part) for part in error["loc"]], error["type"]
    if kind == "extra_forbidden":
        allowed = _KEYS if len(location) == 1 else _BlockSchema.model_fields
        key = location.pop()
        message = f"unknown key {key!r}: {suggest(key, allowed)}"
    elif kind == "missing":
        message = f"key {location.pop()!r} is missing"
    elif location[-1] == "[key]":
        location = location[:-2]
        message = f"expected a name of printable characters, got {_abbreviate(error['input'])}"
    else:
        message = _MESSAGES.get(kind) or error["msg"].replace("Input should be ", "expected ")
        got = len(error["input"]) if kind == "too_short" else _abbreviate(error["input"])
        message = f"{message}, got {got}"
    return f"{'.'.join(location)}: {message}" if location else message


def _abbreviate(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
