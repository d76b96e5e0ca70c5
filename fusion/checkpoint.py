"""Models on disk: one safetensors file with the configuration as JSON in its header, never pickle.

Format 1. Metadata key "motet": JSON with format, version (of motet), model (class name), config
(`model.config`). Metadata key "sha256": digest of that JSON and of the names and bytes of all
tensors, in the order of their names. The same model gives the same bytes. Tied weights are stored
once, under the first of their names.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .._atomic import replacing
from .baselines.models import FlatModel, LinearModel, TreeEnsemble
from .healnet import HEALNet
from .lego_block import LegoBlock
from .lego_fuse import LegoFuse
from .lego_merge import LegoMerge

FORMAT = 1
_DIFFERENT = "encoders or parts of another architecture were saved"
_MODELS: dict[str, type[Any]] = {
    model.__name__: model
    for model in (HEALNet, LegoBlock, LegoMerge, LegoFuse, LinearModel, TreeEnsemble)
}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to one file: its tensors and all that is needed to build it again.

    An existing file is replaced once the new one is complete. Of an encoder that motet does not
    have, only the tensors are stored; `load` then needs the module.

    Args:
        model: HEALNet, LegoBlock, LegoMerge or LegoFuse, or a fitted baseline.
        path: file to write, usually `*.safetensors`.

    Raises:
        TypeError: another model.
        OSError: the file cannot be written.

    Example:
        >>> model = motet.HEALNet({"omic": motet.Tabular(20)}, out_features=4)
        >>> motet.save(model, "model.safetensors")
        >>> motet.load("model.safetensors").config == model.config
        True
    """
    if _MODELS.get(type(model).__name__) is not type(model):
        raise TypeError(f"model: expected one of {', '.join(_MODELS)}, got {type(model).__name__}")
    header = json.dumps(
        {
            "format": FORMAT,
            "version": version("motet"),
            "model": type(model).__name__,
            "config": model.config,
        }
    )
    tensors, memory = {}, set()
    for name, tensor in _collect_tensors(model).items():
        plain = tensor.detach().cpu().contiguous()
        # safetensors refuses two tensors in the same memory (a buffer that is a view of a
        # parameter), so the second one is copied.
        address = plain.untyped_storage().data_ptr()
        tensors[name] = plain.clone() if address in memory else plain
        memory.add(address)
    metadata = {"motet": header, "sha256": _digest(header, tensors)}
    with replacing(Path(path)) as partial:
        save_file(tensors, partial, metadata)
        _sort_metadata(partial)


def load(
    path: str | os.PathLike[str],
    *,
    encoders: nn.Module | Mapping[str, nn.Module] | None = None,
    device: str | torch.device = "cpu",
) -> HEALNet | LegoBlock | LegoMerge | LegoFuse | FlatModel:
    """Read a model that `save` wrote, in evaluation mode.

    Args:
        path: the file.
        encoders: encoders that motet does not have, of the same architecture as those saved: a
            module for a LegoBlock, a dict of modality name to module for LegoMerge and LegoFuse.
            The model gets copies of them, with the tensors of the file.
        device: where to put the model.

    Returns:
        The model, giving the same predictions as the one saved.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that motet did not write, that is corrupt, or of a newer format; or
            encoders that do not fit.
        TypeError: encoders that are not modules by modality.

    Example:
        >>> block = motet.LegoBlock(motet.Bag(6), torch.nn.Linear(6, 3), out_features=4)
        >>> motet.save(block, "block.safetensors")
        >>> motet.load("block.safetensors", encoders=torch.nn.Linear(6, 3)).token_dim
        3
    """
    content, tensors = _read(Path(path))
    kind = _MODELS[content["model"]]
    arguments: list[Any] = [encoders] if kind in (LegoBlock, LegoMerge, LegoFuse) else []
    if not arguments and encoders is not None:
        raise ValueError(f"encoders: expected none for a {kind.__name__}")
    try:
        model = kind.from_config(content["config"], *arguments)
    except KeyError as error:
        raise ValueError(f"{path}: corrupt, its configuration has no {error}") from error
    if "upstream_latents" in tensors:
        model.upstream_latents = torch.zeros_like(tensors["upstream_latents"])
    targets = _collect_tensors(model)
    missing, unknown = targets.keys() - tensors, tensors.keys() - targets
    for side, names in (("the file", missing), ("the model", unknown)):
        if names:
            examples = ", ".join(sorted(names)[:3])
            raise ValueError(
                f"{path}: {side} has no {examples} ({len(names)} in all); {_DIFFERENT}"
            )
    with torch.no_grad():
        for name, tensor in targets.items():
            if tensor.shape != tensors[name].shape:
                raise ValueError(
                    f"{path}: expected {name} {tuple(tensor.shape)}, got "
                    f"{tuple(tensors[name].shape)}; {_DIFFERENT}"
                )
            # A copy: tensors in a file need not be aligned in memory, and matrix products of
            # unaligned tensors may round differently from those of the saved model.
            tensor.data = tensors[name].clone()
    return model.to(device).eval()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: corrupt, or not a safetensors file ({error})") from error
    if "motet" not in metadata:
        raise ValueError(f"{path}: a safetensors file that motet did not write")
    header = metadata["motet"]
    try:
        content = json.loads(header)
        is_newer = content["format"] > FORMAT  # before the checksum, which may differ there
        is_known = content["format"] == FORMAT and content["model"] in _MODELS
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: corrupt, its header cannot be read ({error})") from error
    if is_newer:
        raise ValueError(
            f"{path}: format {content['format']} was written by motet {content.get('version')}; "
            f"this motet reads up to format {FORMAT}: pip install --upgrade motet"
        )
    if not is_known:
        raise ValueError(f"{path}: corrupt, its header names no format or model of motet's")
    if metadata.get("sha256") != _digest(header, tensors):
        raise ValueError(f"{path}: corrupt, its content does not match its checksum")
    return content, tensors


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a file by name.

    safetensors writes them in a random order, which differs between processes. The same model
    would then give different bytes.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


def _collect_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model by name; tied ones once, under their first name."""
    tensor_ids: set[int] = set()
    untied = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in tensor_ids:
            tensor_ids.add(id(tensor))
            untied[name] = tensor
    return untied


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
