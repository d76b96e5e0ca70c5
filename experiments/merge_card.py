"""The card of a merge: a README.md beside the result that names the merged blocks.

It has no date, so that the same merge gives the same bytes.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from ..fusion.lego_block import LegoBlock
from ..fusion.lego_merge import LegoMerge
from ..fusion.modalities import Bag, Grid, Modality, Tabular

NAME = "README.md"
# The first line of a card. A README.md that begins with another line is never overwritten.
MODEL_MARK = "<!-- Written by `motet merge` from model files; the same command overwrites it. -->"
RUN_MARK = "<!-- Written by `motet merge` from run folders; the same command overwrites it. -->"


class CardEntry(NamedTuple):
    """What the card says about a block."""

    name: str
    path: str
    """As the user typed it."""
    digest: str
    """SHA-256 of its file; for a run, of the concatenated files of all folds."""
    models: Sequence[LegoBlock]
    """The block; for a run, the block of every fold."""
    metadata: Mapping[str, Any]


def make_model_card(
    merged: LegoMerge, parts: Sequence[CardEntry], typed: str, file: str, digest: str
) -> str:
    """Return the card of one merged model.

    Args:
        merged: the model.
        parts: its blocks.
        typed: the recipe that the user typed, see `make_code_block`.
        file: name of the model's file, in the folder of the card.
        digest: SHA-256 of that file.
    """
    result = f"`{file}`, SHA-256 `{digest}`"
    return _make_card(MODEL_MARK, merged, parts, typed, result, _make_example(merged, file))


def make_run_card(merged: LegoMerge, parts: Sequence[CardEntry], typed: str) -> str:
    """Return the card of a merge of runs.

    Args:
        merged: the model of the first fold.
        parts: its blocks.
        typed: the recipe or the command that the user typed, see `make_code_block`.
    """
    folds = len(parts[0].models)
    result = f"this run folder, a model per fold, {folds} in all: `folds/0/model.safetensors`, ..."
    return _make_card(RUN_MARK, merged, parts, typed, result, _USE_RUN)


def make_code_block(language: str, text: str) -> str:
    """Return text as a code block; the fence is longer than any backticks in the text."""
    ticks = "`" * max(3, _longest_ticks(text) + 1)
    return f"{ticks}{language}\n{text}{'' if text.endswith(chr(10)) else chr(10)}{ticks}"


_HARMONIC = {
    "principal": "Z = exp(i Σ w_m arg Z_m) / Σ (w_m / |Z_m|)    (Eq. 4)",
    "circular": "Z = exp(i arg Σ w_m Z_m / |Z_m|) / Σ (w_m / |Z_m|)    (Eq. 4, phases averaged on "
    "the circle)",
}
_LATENTS = {
    "mean": "Z = Σ w_m Z_m    (in place of Eq. 4)",
    "sum": "Z = Σ Z_m    (in place of Eq. 4; the weights count for the heads)",
    "product": "Z = Π Z_m    (in place of Eq. 4; the weights count for the heads)",
    "upstream-harmonic": "Z = 2 w_1 w_2 exp(i (arg Z_1 + arg Z_2) / 2) / Σ (w_m / |Z_m|)    (Eq. 4 "
    "as the authors' code has it)",
}
_HEADS = {
    "slerp": "θ = SLERP of the parameters θ_m of the heads, at weights w_m",
    "linear": "θ = Σ w_m θ_m, of the parameters θ_m of the heads",
    "ot": "θ = Σ w_m θ_m, of the parameters θ_m of the heads, their rows moved to those of the "
    "first by optimal transport",
}
_USE_RUN = """In this folder, for new patients, scaled as each fold learned to:

```sh
motet predict . new.yaml --out risks.csv
```

In Python, here for the patients that the run was made on:

```python
from pathlib import Path

from motet.experiments import Run, cohort_of, predict_cohort

run = Run.finished(Path("."))
cohort = cohort_of(run)
table = predict_cohort(run, cohort)
model = run.fitted(0).model  # of the first fold: motet.load("folds/0/model.safetensors")
```"""


def _make_card(
    mark: str, merged: LegoMerge, parts: Sequence[CardEntry], typed: str, result: str, use: str
) -> str:
    harmonic = merged.method == "harmonic"
    latents = _HARMONIC[merged.phase] if harmonic else _LATENTS[merged.method]
    head = "no head" if merged.head is None else _HEADS[merged.config["head"]]
    sections = [
        f"{mark}\n\n# LegoMerge of {' and '.join(part.name for part in parts)}",
        f"{len(parts)} trained LegoBlocks, joined with no training by motet {version('motet')}, as "
        "in MM-Lego (arXiv:2405.19950). Computed from the last complex latents Z_m of the blocks "
        "that a patient has, their weights w_m summing to 1:",
        make_code_block("text", f"{latents}\n{head}"),
        f"* method: {merged.method}\n"
        f"* phase: {merged.phase}\n"
        f"* head: {merged.config['head']}\n"
        f"* result: {result}",
        "## Parts",
        *(_describe_entry(part, merged.weights[part.name]) for part in parts),
        f"## Recipe\n\n{typed}",
        f"## Use\n\n{use}",
    ]
    return "\n\n".join(sections) + "\n"


def _describe_entry(part: CardEntry, weight: float) -> str:
    def of_all_folds(describe: Callable[[LegoBlock], str]) -> str:
        """Return the descriptions of all folds, which may differ (in columns, for example)."""
        return " or ".join(dict.fromkeys(map(describe, part.models)))

    whose = f" of {len(part.models)} folds' files, one after the other" * (len(part.models) > 1)
    lines = [
        f"### {part.name}\n",
        f"* path: {_inline_code(part.path)}",
        f"* SHA-256{whose}: `{part.digest}`",
        f"* weight: {weight:.6g}",
        f"* modality: {of_all_folds(lambda block: _inline_code(repr(block.modality)))}",
        f"* encoder: {of_all_folds(_describe_encoder)}",
        f"* shapes: {of_all_folds(_describe_shapes)}",
        f"* parameters: {of_all_folds(lambda b: str(sum(p.numel() for p in b.parameters())))}",
        "* metadata:\n",
        make_code_block("json", json.dumps(part.metadata, indent=1, ensure_ascii=False)),
    ]
    return "\n".join(lines)


def _describe_encoder(block: LegoBlock) -> str:
    config = block.config["encoder"]
    if config is None:
        return "none"
    options = (f"{key}={value!r}" for key, value in config.items() if key != "type")
    return _inline_code(f"{config['type']}({', '.join(options)})")


def _describe_shapes(block: LegoBlock) -> str:
    config, modality = block.config, block.modality
    if isinstance(modality, Grid):
        shape = f"[B, {'size, ' * modality.axes}{modality.channels}]"
    elif isinstance(modality, Bag):
        shape = f"[B, N, {modality.features}]"
        shape += f", coordinates [B, N, {modality.coords}]" if modality.coords else ""
    else:
        shape = f"[B, {modality.features}]"
    outputs = config["out_features"]
    return (
        f"input {shape}; latents [B, {config['num_latents']}, {config['latent_dim']}], "
        f"{'no transform' if config['fft'] is None else 'transform ' + config['fft']}; "
        f"{'no head' if outputs is None else f'logits [B, {outputs}]'}"
    )


def _make_example(merged: LegoMerge, file: str) -> str:
    """Return example code that loads the model and predicts, with tensors of the right shapes."""
    dtype = next(merged.parameters()).dtype
    end = ")" if str(dtype) == "torch.float32" else f", dtype={dtype})"

    def tensor(modality: Modality) -> str:
        if isinstance(modality, Tabular):
            return f"torch.randn(2, {modality.features}{end}"
        if isinstance(modality, Bag):
            return f"torch.randn(2, 50, {modality.features}{end}"
        return f"torch.randn(2, {'8, ' * modality.axes}{modality.channels}{end}"

    modalities = {json.dumps(name): modality for name, modality in merged.modalities.items()}
    inputs = [f"    {name}: {tensor(modality)}," for name, modality in modalities.items()]
    coords = [
        f"    {name}: torch.rand(2, 50, {modality.coords}{end},"
        for name, modality in modalities.items()
        if isinstance(modality, Bag) and modality.coords
    ]
    passed = ", coords=coords" if coords else ""
    result = "latents" if merged.head is None else "logits"
    lines = [
        "import torch",
        "",
        "import motet",
        "",
        f'model = motet.load("{file}")',
        "inputs = {  # two patients; real ones prepared as for the training of each block",
        *inputs,
        "}",
        *(["coords = {", *coords, "}"] if coords else []),
        f"{result} = model(inputs{passed})",
        f"{result} = model({{**inputs, {list(modalities)[-1]}: None}}{passed})  # one is missing",
    ]
    return make_code_block("python", "\n".join(lines))


def _inline_code(text: str) -> str:
    ticks = "`" * (_longest_ticks(text) + 1)
    pad = " " * (len(ticks) > 1)
    return f"{ticks}{pad}{text}{pad}{ticks}"


def _longest_ticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
