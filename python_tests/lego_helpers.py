"""Small blocks of several kinds of modalities, and inputs for them."""

from typing import Any

import motet
import torch
from torch import Tensor, nn

from .conftest import randomised


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolve = nn.Conv2d(3, 5, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x.movedim(-1, 1)).movedim(1, -1)


def block_of(modality: Any, encoder: nn.Module | None = None, seed: int = 0, **options: Any):
    torch.manual_seed(seed)
    options = {"num_latents": 6, "latent_dim": 5, "heads": 2, "head_dim": 4, **options}
    return randomised(motet.LegoBlock(modality, encoder, out_features=3, **options).double(), seed)


def blocks_of(count: int = 3, **options: Any) -> dict[str, motet.LegoBlock]:
    parts = {
        "omic": (motet.Tabular(7), motet.SNN(7, hidden=(8, 4))),
        "wsi": (motet.Bag(6), motet.ABMIL(6, hidden=8, attention=5)),
        "cells": (motet.Bag(4), None),
        "mri": (motet.Grid(3, axes=2), Convolution()),
    }
    return {
        name: block_of(modality, encoder, seed, **options)
        for seed, (name, (modality, encoder)) in enumerate(list(parts.items())[:count])
    }


def inputs_of(rows: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"omic": (7,), "wsi": (9, 6), "cells": (5, 4), "mri": (4, 6, 3)}
    return {
        name: torch.randn(rows, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
