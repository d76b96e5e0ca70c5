"""Parity vectors of the authors' published code, and models built from them."""

import json
from typing import Any, NamedTuple

import motet
from safetensors import safe_open
from torch import Tensor, nn

from .conftest import golden_path

HEALNETS = [
    "healnet_masked_bag",
    "healnet_missing_second",
    "healnet_tab_bag",
    "healnet_tab_image_volume",
    "healnet_tied_self_attention",
]
TOLERANCE = 1e-9


class Golden(NamedTuple):
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    state: dict[str, Tensor]
    inputs: list[Tensor | None]

    def encoders(self) -> list[nn.Module]:
        if self.config["model"] == "HealNet" or self.config["encoder"] == "none":
            return []
        shapes = self.config.get("in_shapes") or [self.config["in_shape"]]
        return [nn.Sequential(nn.Tanh(), nn.Linear(width, width)) for _, width in shapes]

    def model(self, **changes: Any):
        return motet.from_upstream({**self.config, **changes}, self.state, self.encoders())

    def run(self, model: nn.Module):
        if self.config["model"] == "LegoBlock":
            return model(self.inputs[0], return_latents=True)
        masks = [self.tensors["mask"]] if "mask" in self.tensors else None
        return model(self.inputs, masks=masks, return_latents=True)


def load(name: str) -> Golden:
    with safe_open(golden_path(name), "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {key[6:]: value for key, value in tensors.items() if key.startswith("param.")}
    if "model.L" in tensors:
        state["model.L"] = tensors["model.L"]
    count = len(config.get("in_shapes", [])) or config.get("n_modalities", 1)
    inputs = [tensors.get(f"input.{i}") for i in range(count)]
    return Golden(config, tensors, state, inputs)
