"""The authors' HEALNet and MM-Lego out of checkouts of theirs; nothing of them is copied here.

    git clone https://github.com/konst-int-i/healnet DIR
    git clone https://github.com/konst-int-i/mm-lego DIR
    pip install einops

is all that it takes.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

MODULE = Path("healnet") / "models" / "healnet.py"
LEGO = Path("mm_lego") / "models"


def published_healnet(checkout: Path) -> type[torch.nn.Module]:
    """Return their class HealNet, from its file alone: the package around it wants torchvision.

    Raises:
        ValueError: a folder that is no checkout of theirs, or no einops.
    """
    path = _checked(checkout, MODULE, "healnet")
    name = "published_healnet"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name].HealNet


def published_lego(checkout: Path) -> ModuleType:
    """Return their module with LegoBlock, LegoMerge and LegoFuse.

    What it imports for training and for optimal transport are stand-ins: the models never ask.

    Raises:
        ValueError: a folder that is no checkout of theirs, or no einops.
    """
    folder = _checked(checkout, LEGO / "lego.py", "mm-lego").parent
    for name, path in (("mm_lego", folder.parent), ("mm_lego.models", folder)):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules.setdefault(name, package)
    models: Any = sys.modules["mm_lego.models"]
    models.SNN = models.MILAttentionNet = torch.nn.Identity
    stand_ins = {name: ModuleType(name) for name in ("lightning", "ot")}
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("mm_lego.models.lego")


def _checked(checkout: Path, module: Path, repository: str) -> Path:
    path = checkout / module
    if not path.is_file():
        raise ValueError(
            f"--published: expected a clone of konst-int-i/{repository}, got {checkout} without "
            f"{module}"
        )
    if importlib.util.find_spec("einops") is None:
        raise ValueError("--published: their code needs einops: pip install einops")
    return path


def call(model: Any, tensors: list[torch.Tensor], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return their logits.

    Their forward changes the list that it is given, and goes on where an attention raises, for
    want of memory above all.

    Raises:
        RuntimeError: an attention that did not take place.
    """
    attentions = [module for module in model.modules() if hasattr(module, "attn_weights")]
    for attention in attentions:
        attention.attn_weights = None
    logits = model(list(tensors), mask=mask)
    if any(attention.attn_weights is None for attention in attentions):
        raise RuntimeError("their code left out an attention that raised an error")
    return logits
