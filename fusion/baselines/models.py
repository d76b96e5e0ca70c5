"""Fitted baselines as modules: a linear model and an ensemble of trees, in float64.

They take the inputs of HEALNet, and return logits for an objective. Their arrays are parameters, so
`motet.save` and `motet.load` keep them like the weights of a network.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from .features import FlatFeatures


def array(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    """Return zeros that are kept with a model, without a gradient."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


class FlatModel(nn.Module, ABC):
    """A model of the flat features of a patient.

    Args:
        features: how modalities become one row.
        sizes: keyword arguments with which `from_config` builds a model of the same shapes.
    """

    def __init__(self, features: FlatFeatures, **sizes: Any) -> None:
        super().__init__()
        self.features = features
        self.config = {"features": features.to_config(), **sizes}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build a model without content from `model.config`."""
        return cls(**{**config, "features": FlatFeatures.from_config(config["features"])})

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits, float64 [n, K], of flat features, float64 [n, P]."""

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        *,
        present: Mapping[str, Tensor] | None = None,
        coords: Mapping[str, Tensor] | None = None,
        statistics: Any = None,
    ) -> Tensor:
        """Return the logits of a batch of patients, float64 [B, K].

        Args:
            inputs: tables [B, F], and bags as jagged NestedTensors [B, j, D]; all modalities.
            present: bool [B] for tables that some of the patients lack.
            coords: jagged NestedTensors [B, j, A] for bags that have coordinates.
            statistics: not used; networks need them.
        """
        return self.logits(self.features.flatten(inputs, present or {}, coords or {}))


class LinearModel(FlatModel):
    """Logits x Wᵀ + b.

    Args:
        features: how modalities become one row of P features.
        outputs: number of logits K.
    """

    def __init__(self, features: FlatFeatures, outputs: int) -> None:
        super().__init__(features, outputs=outputs)
        self.weight = array(outputs, features.width)
        self.bias = array(outputs)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits, float64 [n, K], of flat features, float64 [n, P]."""
        return x @ self.weight.T + self.bias


class TreeEnsemble(FlatModel):
    """The sum over trees of the values of the leaves that a row reaches, plus an offset.

    A node sends a row to the left if its feature, rounded to float32 as scikit-learn does, is at
    most the threshold. A leaf leads to itself on both sides, so all rows take `depth` steps.

    Args:
        features: how modalities become one row of P features.
        trees: number of trees.
        nodes: number of nodes of all trees.
        leaves: number of leaves of all trees.
        outputs: number of values V of a leaf.
        depth: depth of the deepest tree.
        log: whether the sums are probabilities, of which the logits are the logarithms.
    """

    def __init__(
        self,
        features: FlatFeatures,
        *,
        trees: int,
        nodes: int,
        leaves: int,
        outputs: int,
        depth: int,
        log: bool,
    ) -> None:
        super().__init__(
            features, trees=trees, nodes=nodes, leaves=leaves, outputs=outputs, depth=depth, log=log
        )
        self.depth, self.log = depth, log

        self.feature = array(nodes, dtype=torch.int32)
        self.threshold = array(nodes)
        self.left = array(nodes, dtype=torch.int32)
        self.right = array(nodes, dtype=torch.int32)
        self.leaf = array(nodes, dtype=torch.int32)  # the row in `values`; of leaves only
        self.values = array(leaves, outputs)
        self.root = array(trees, dtype=torch.int32)
        self.offset = array(outputs)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits, float64 [n, V], of flat features, float64 [n, P]."""
        x = x.float().double()
        nodes = self.root.long().expand(len(x), -1)
        for _ in range(self.depth):
            is_left = x.gather(1, self.feature[nodes].long()) <= self.threshold[nodes]
            nodes = torch.where(is_left, self.left[nodes], self.right[nodes]).long()
        sums = self.offset.expand(len(x), -1)
        for leaves in self.leaf[nodes].T:  # tree after tree: all at once would take [n, trees, V]
            sums = sums + self.values[leaves]
        return sums.log() if self.log else sums
