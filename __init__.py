"""motet fuses biomedical modalities (slides, omics, clinical data, time series) in one latent.

HEALNet and MM-Lego, from the papers' equations. The names below are loaded at their first use, so
that `import motet` takes milliseconds and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from . import fusion, io, kernels
    from .fusion.checkpoint import load, save
    from .fusion.encoders import ABMIL, SNN
    from .fusion.evaluation import (
        compare_classes,
        compare_survival,
        evaluate_classes,
        evaluate_survival,
    )
    from .fusion.explain import (
        RolloutOutput,
        attention_rollout,
        deletion_curve,
        integrated_gradients,
        token_attention,
    )
    from .fusion.graphs import CudaGraphs, StepGraphs
    from .fusion.healnet import HEALNet, HEALNetOutput
    from .fusion.held_out import ClassFold, SurvivalFold
    from .fusion.layers import Head
    from .fusion.lego_block import LegoBlock, LegoOutput
    from .fusion.lego_fuse import LegoFuse
    from .fusion.lego_merge import LegoMerge
    from .fusion.losses import cox_loss, cross_entropy, l1_penalty, nll_loss
    from .fusion.modalities import Bag, Grid, Tabular
    from .fusion.resampling import Comparison, Estimate
    from .fusion.statistics import token_statistics
    from .fusion.survival import TimeBins, concordance_index, hazards, risk, survival
    from .fusion.upstream import from_upstream, to_upstream

_HOMES = {
    "fusion.checkpoint": ("load", "save"),
    "fusion.encoders": ("ABMIL", "SNN"),
    "fusion.evaluation": (
        "compare_classes",
        "compare_survival",
        "evaluate_classes",
        "evaluate_survival",
    ),
    "fusion.explain": (
        "RolloutOutput",
        "attention_rollout",
        "deletion_curve",
        "integrated_gradients",
        "token_attention",
    ),
    "fusion.graphs": ("CudaGraphs", "StepGraphs"),
    "fusion.healnet": ("HEALNet", "HEALNetOutput"),
    "fusion.held_out": ("ClassFold", "SurvivalFold"),
    "fusion.layers": ("Head",),
    "fusion.lego_block": ("LegoBlock", "LegoOutput"),
    "fusion.lego_fuse": ("LegoFuse",),
    "fusion.lego_merge": ("LegoMerge",),
    "fusion.losses": ("cox_loss", "cross_entropy", "l1_penalty", "nll_loss"),
    "fusion.modalities": ("Bag", "Grid", "Tabular"),
    "fusion.resampling": ("Comparison", "Estimate"),
    "fusion.statistics": ("token_statistics",),
    "fusion.survival": ("TimeBins", "concordance_index", "hazards", "risk", "survival"),
    "fusion.upstream": ("from_upstream", "to_upstream"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022 (sorted by kind, as _HOMES is)
    "ABMIL",
    "SNN",
    "HEALNet",
    "HEALNetOutput",
    "CudaGraphs",
    "Head",
    "LegoBlock",
    "LegoFuse",
    "LegoMerge",
    "LegoOutput",
    "StepGraphs",
    "Bag",
    "Grid",
    "Tabular",
    "ClassFold",
    "Comparison",
    "Estimate",
    "RolloutOutput",
    "SurvivalFold",
    "TimeBins",
    "attention_rollout",
    "compare_classes",
    "compare_survival",
    "concordance_index",
    "cox_loss",
    "cross_entropy",
    "deletion_curve",
    "evaluate_classes",
    "evaluate_survival",
    "from_upstream",
    "fusion",
    "hazards",
    "integrated_gradients",
    "io",
    "kernels",
    "l1_penalty",
    "load",
    "nll_loss",
    "risk",
    "save",
    "survival",
    "to_upstream",
    "token_attention",
    "token_statistics",
]


if not TYPE_CHECKING:  # so that type checkers know the names above and no others

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module("importlib.metadata").version("motet")
        if name in ("fusion", "io", "kernels"):
            return import_module(f".{name}", __name__)
        if name in _HOME:
            value = getattr(import_module(f".{_HOME[name]}", __name__), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
