"""What all encoders of patches have in common."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Encoder(ABC):
    """A model that makes one row of features of each patch; `load_encoder` returns one.

    Attributes:
        id: its name, without folders of this machine.
        width: D, how many features it gives.
        weights: hash of its weights, 16 hex digits, or "none".
        transform: hash of what is done to the pixels first, 16 hex digits.
        precision: what it computes in: "fp32", "bf16", "fp16".
        input_px: the patches that it takes as they are, pixels per side; others are resized.
            None if it takes any.

    Example:
        >>> encoder = motet.io.load_encoder("stain-stats")
        >>> isinstance(encoder, motet.io.Encoder), sorted(encoder.spec())
        (True, ['id', 'precision', 'transform', 'weights', 'width'])
    """

    id: str
    width: int
    weights: str
    transform: str
    precision: str
    input_px: int | None

    @abstractmethod
    def encode(self, pixels: np.ndarray | Tensor) -> np.ndarray:
        """Return the features, float32 [B, D], of patches, uint8 [B, H, W, 3] (RGB).

        The same batch gives the same bits on one machine. What else is in the batch, and how many,
        changes a row by rounding at most (by nothing with "stain-stats").

        Args:
            pixels: numpy array, or torch tensor on the CPU or a GPU; models on the same GPU take it
                without a copy through the host.

        Raises:
            ValueError: pixels of another dtype or shape; what the model returns is not [B, D].
            MemoryError: the batch does not fit into the GPU's memory.
        """

    def spec(self) -> dict[str, Any]:
        """Return what the features are a function of, beside the pixels, for JSON."""
        return {
            key: getattr(self, key) for key in ("id", "width", "weights", "transform", "precision")
        }


def checked(pixels: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Return patches that are uint8 [B, H, W, 3].

    Raises:
        ValueError: they are something else.
    """
    dtype, shape = getattr(pixels, "dtype", None), list(getattr(pixels, "shape", []))
    right = len(shape) == 4 and shape[1] > 0 and shape[2] > 0 and shape[3] == 3
    if right and str(dtype).removeprefix("torch.") == "uint8":
        return pixels
    came = type(pixels).__name__ if dtype is None else f"{dtype} {shape}"
    raise ValueError(f"pixels: expected uint8 [B, H, W, 3], got {came}")


def as_numpy(pixels: np.ndarray | Tensor) -> np.ndarray:
    """Return pixels as a numpy array, from whichever device."""
    return pixels if isinstance(pixels, np.ndarray) else pixels.detach().cpu().numpy()


def digest(value: object) -> str:
    """Return 16 hex digits that stand for a value of JSON, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def one_line(error: BaseException) -> str:
    """Return the first lines of a message as one of bounded length."""
    return " ".join(str(error).split())[:300] or "no message"
