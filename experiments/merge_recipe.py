"""Merge recipes: trained LegoBlocks named in a YAML file, joined by `motet merge` with no training.

    method: harmonic          # or sum, mean, product
    phase: principal          # or circular
    head: slerp               # or linear, ot
    blocks:
      omic: {model: blocks/omic.safetensors, weight: 2}
      wsi: blocks/wsi.safetensors             # weight 1

Blocks that are model files give a folder with one model; blocks that are run folders give a run
folder, merged fold by fold. Both come with a card, README.md, that names the parts.
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
# Some thousand blocks; more is no recipe.
LARGEST = 1 << 16


class RecipeError(ValueError):
    """A recipe that does not serve, in one line."""


@dataclass(frozen=True)
class Block:
    """One part of a merge.

    Args:
        name: its modality, in the merged model.
        given: the path as it was typed.
        path: of a model file or a run folder.
        weight: relative to the others'.
    """

    name: str
    given: str
    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """What to merge and how.

    Args:
        where: what its errors begin with.
        text: as it was typed, for the card.
        language: of the text, yaml or sh.
        blocks: the parts.
        method: of LegoMerge, as are phase and head.
    """

    where: str
    text: str
    language: str
    blocks: tuple[Block, ...]
    method: str
    phase: str
    head: str

    def options(self) -> dict[str, Any]:
        """Return the arguments of LegoMerge."""
        shares = normalised_weights([block.weight for block in self.blocks], len(self.blocks))
        weights = {block.name: share for block, share in zip(self.blocks, shares, strict=True)}
        return {"method": self.method, "phase": self.phase, "head": self.head, "weights": weights}


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe; the models it names are not opened.

    Args:
        path: the YAML file; paths in it are relative to its folder.

    Raises:
        RecipeError: in one line, what is wrong with which key.
    """
    where = f"{path}: "
    try:
        if not path.is_file():
            raise RecipeError(f"{where}expected a recipe, got {_kind(path)}")
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise RecipeError(f"{where}cannot be read: {error}") from error
    if len(content) > LARGEST:
        raise RecipeError(f"{where}expected a recipe of at most {LARGEST} bytes, got more")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{where}expected UTF-8, got byte {content[error.start]:#04x} at {error.start}"
        ) from error
    try:
        schema = _Schema.model_validate(_yaml(text))
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise RecipeError(where + "; ".join(map(_in_one_line, wrong[:5])) + more) from error
    except ValueError as error:
        raise RecipeError(f"{where}{error}") from error
    blocks = tuple(
        Block(name, block.model, path.parent / block.model, block.weight)
        for name, block in schema.blocks.items()
    )
    return Recipe(where, text, "yaml", blocks, schema.method, schema.phase, schema.head)


def of_command(paths: Sequence[Path], *, method: str, head: str) -> Recipe:
    """Return the recipe of `motet merge RUN ...`: the blocks of some run folders, equal weights.

    Raises:
        RunError: a folder that holds none, or a run that is not finished.
    """
    text = shlex.join(["motet", "merge", *map(str, paths), "--method", method, "--head", head])
    blocks = tuple(
        Block(run.config["modalities"][0], str(run.path), run.path) for run in blocks_of(paths)
    )
    return Recipe("", text, "sh", blocks, method, "principal", head)


def merge(recipe: Recipe, out: Path, *, data: Path | None = None) -> Run | Path:
    """Merge the blocks of a recipe, and write a card beside the result.

    Args:
        recipe: see `read_recipe` and `of_command`.
        out: the new folder. A run is continued if it is the same; a model and its card replace
            those of an earlier merge, each whole, and nothing else is overwritten.
        data: folder of the cohort's files, for runs.

    Returns:
        The finished run; of model files, the path of the merged model.

    Raises:
        ValueError: in one line, blocks that are none or do not fit, or a folder that holds
            something else.
    """
    if recipe.head == "ot" and find_spec("ot") is None:
        raise RecipeError(f"{recipe.where}head: ot needs POT: pip install POT")
    if _are_runs(recipe):
        return _merge_runs(recipe, out, data)
    if data is not None:
        raise RecipeError(f"{recipe.where}expected run folders with --data, got model files")
    return _merge_files(recipe, out)


def _are_runs(recipe: Recipe) -> bool:
    """Return whether the blocks are run folders, after checking that they are there."""
    for block in recipe.blocks:
        try:
            there = block.path.exists()
        except OSError:  # a name that no file can have
            there = False
        if not there:
            raise RecipeError(
                f"{recipe.where}blocks.{block.name}: expected a model file or a run folder, its "
                f"path relative to the recipe, got {_short(block.given)}, where there is none"
            )
    folders = [block.name for block in recipe.blocks if block.path.is_dir()]
    files = [block.name for block in recipe.blocks if not block.path.is_dir()]
    if folders and files:
        raise RecipeError(
            f"{recipe.where}blocks: expected model files or run folders, got both: files "
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
            raise RecipeError(f"{recipe.where}blocks.{block.name}: {error}") from error
        digest = _digest([block.path])
        parts.append(merge_card.Part(block.name, block.given, digest, [model], metadata))
    try:
        merged = LegoMerge({p.name: p.models[0] for p in parts}, **recipe.options()).eval()
    except ValueError as error:
        raise RecipeError(f"{recipe.where}{error}") from error
    out.mkdir(parents=True, exist_ok=True)
    # The card first: what is cut short between the two is known for a merge, to be written again.
    with replacing(out / MODEL) as model_file:
        save(merged, model_file)
        typed = merge_card.fenced("yaml", recipe.text)
        digest = _digest([model_file])
        write_text(out / merge_card.NAME, merge_card.of_files(merged, parts, typed, MODEL, digest))
    return out / MODEL


def _merge_runs(recipe: Recipe, out: Path, data: Path | None) -> Run:
    if not rank():
        Run.check_free(out, "merge")
        _check_card(out, merge_card.OF_RUNS)
    try:
        runs = [_run_of(block) for block in recipe.blocks]
        merged = merge_runs(runs, out, cohort=cohort_of(runs[0], data), **recipe.options())
    except ValueError as error:
        raise RecipeError(f"{recipe.where}{error}") from error
    if rank():
        return merged
    folds = range(len(merged.splits))
    parts = [
        merge_card.Part(
            block.name,
            block.given,
            _digest([run.fold(number) / MODEL for number in folds]),
            [cast(LegoBlock, run.fitted(number).model) for number in folds],
            run.config,
        )
        for block, run in zip(recipe.blocks, runs, strict=True)
    ]
    model = merged.fitted(0).model
    assert isinstance(model, LegoMerge)
    typed = merge_card.fenced(recipe.language, recipe.text)
    write_text(out / merge_card.NAME, merge_card.of_runs(model, parts, typed))
    return merged


def _run_of(block: Block) -> Run:
    """Return the run of a block's modality at its path: itself, or one of the blocks in it."""
    runs = blocks_of([block.path])
    names = [run.config["modalities"][0] for run in runs]
    if block.name not in names:
        raise RecipeError(
            f"blocks.{block.name}: expected the name of a modality in {block.given}, "
            f"{' or '.join(map(repr, names))}, got {block.name!r}"
        )
    return runs[names.index(block.name)]


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# Where a result may go


def _check_free(out: Path) -> None:
    """Raise unless a merged model can go to a folder."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {str(out)!r}")
    _check_card(out, merge_card.OF_FILES)
    if out.is_dir() and not (out / merge_card.NAME).exists():
        held = [item.name for item in out.iterdir() if item.name[0] != "."]
        if held:
            raise ValueError(
                f"--out: expected a new or empty folder, or an earlier merge, got {str(out)!r}, "
                f"which holds {held[0]!r}"
            )


def _check_card(out: Path, mark: str) -> None:
    """Raise if a card would overwrite something else."""
    path = out / merge_card.NAME
    if not path.exists():
        return
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(len(mark.encode())) == mark.encode():
                return
    raise ValueError(f"--out: {str(path)!r} is there, and is no card of such a merge")


# Reading


def _kind(path: Path) -> str:
    if path.is_dir():
        return "a folder"
    return "something else" if path.exists() else "no such file"


class _Loader(Loader):
    """The cohorts' YAML, in which a repeated key is refused, of text and decimal numbers alone.

    No aliases, which make a huge thing of a small file, and no tags; 1e-3 is a number, and 1:30,
    which YAML takes for 90, is none.
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


def _yaml(text: str) -> Any:
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise ValueError(f"not YAML{line}: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise ValueError("expected a recipe, got YAML nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected the keys {', '.join(_KEYS)}, got {_short(content)}")
    return content


def _name(value: str) -> str:
    if not value.isprintable():
        raise PydanticCustomError("name", "")  # said in _in_one_line
    return value


def _weight(value: object) -> float:
    try:
        return positive("weight", value)
    except ValueError:
        raise PydanticCustomError("weight", "expected a positive finite number") from None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Block(_Strict):
    model: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, BeforeValidator(_weight)] = 1.0

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if isinstance(value, str):
            return {"model": value}
        if not isinstance(value, dict):
            raise PydanticCustomError("block", "expected a path, or the keys model and weight")
        return value


class _Schema(_Strict):
    method: Literal["harmonic", "sum", "mean", "product"] = "harmonic"
    phase: Literal["principal", "circular"] = "principal"
    head: Literal["slerp", "linear", "ot"] = "slerp"
    blocks: Annotated[dict[Annotated[str, AfterValidator(_name)], _Block], Field(min_length=2)]


_KEYS = tuple(_Schema.model_fields)
_MESSAGES = {
    "dict_type": "expected names with paths",
    "string_type": "expected text",
    "string_too_short": "expected a path",
    "too_short": "expected 2 or more",
}


def _in_one_line(error: ErrorDetails) -> str:
    where, kind = [str(part) for part in error["loc"]], error["type"]
    if kind == "extra_forbidden":
        known = _KEYS if len(where) == 1 else _Block.model_fields
        key = where.pop()
        message = f"unknown key {key!r}: {suggest(key, known)}"
    elif kind == "missing":
        message = f"key {where.pop()!r} is missing"
    elif where[-1] == "[key]":
        where = where[:-2]
        message = f"expected a name of printable characters, got {_short(error['input'])}"
    else:
        message = _MESSAGES.get(kind) or error["msg"].replace("Input should be ", "expected ")
        got = len(error["input"]) if kind == "too_short" else _short(error["input"])
        message = f"{message}, got {got}"
    return f"{'.'.join(where)}: {message}" if where else message


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
