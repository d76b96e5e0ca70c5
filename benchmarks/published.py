"""The authors' HEALNet out of a checkout of theirs; nothing of it is copied here.

    git clone https://github.com/konst-int-i/healnet DIR
    pip install einops

is all that it takes.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

MODULE = Path("healnet") / "models" / "healnet.py"


def published_healnet(checkout: Path) -> type[torch.nn.Module]:
    """Return their class HealNet, from its file alone: the package around it wants torchvision.

    Raises:
        ValueError: a folder that is no checkout of theirs, or no einops.
    """
    path = checkout / MODULE
    if not path.is_file():
        raise ValueError(
            f"--published: expected a clone of konst-int-i/healnet, got {checkout} without {MODULE}"
        )
    if importlib.util.find_spec("einops") is None:
        raise ValueError("--published: their code needs einops: pip install einops")
    name = "published_healnet"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name].HealNet


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
