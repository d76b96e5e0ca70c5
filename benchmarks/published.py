"""The authors' HEALNet and MM-Lego, imported from clones of their repositories.

    git clone https://github.com/konst-int-i/healnet DIR
    git clone https://github.com/konst-int-i/mm-lego DIR
    pip install einops

Nothing else is needed, and none of their code is copied here.
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
    """Return their class HealNet, from its file alone: their package imports torchvision.

    Raises:
        ValueError: `checkout` is not a clone of their repository, or einops is not installed.
    """
    path = _check_checkout(checkout, MODULE, "healnet")
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

    Stand-ins replace the libraries that it imports for training and for optimal transport, which
    the models never call.

    Raises:
        ValueError: `checkout` is not a clone of their repository, or einops is not installed.
    """
    folder = _check_checkout(checkout, LEGO / "lego.py", "mm-lego").parent
    for name, path in (("mm_lego", folder.parent), ("mm_lego.models", folder)):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        sys.modules.setdefault(name, package)
    models: Any = sys.modules["mm_lego.models"]
    models.SNN = models.MILAttentionNet = torch.nn.Identity
    stand_ins = {name: ModuleType(name) for name in ("lightning", "ot")}
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("mm_lego.models.lego")


def _check_checkout(checkout: Path, module: Path, repository: str) -> Path:
    """Return the path of a module of theirs."""
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
    """Return the logits of their model.

    Their forward pass changes the list of its inputs, so it gets a copy. It also catches exceptions
    of an attention, mostly out of memory, and continues without that attention: this is an error
    here.

    Raises:
        RuntimeError: an attention was left out.
    """
    attentions = [module for module in model.modules() if hasattr(module, "attn_weights")]
    for attention in attentions:
        attention.attn_weights = None
    logits = model(list(tensors), mask=mask)
    if any(attention.attn_weights is None for attention in attentions):
        raise RuntimeError("the authors' code left out an attention after an error")
    return logits
