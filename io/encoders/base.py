"""The base class of all encoders of patches, and functions that they share."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Encoder(ABC):
    """A model that computes a row of features for each patch; `load_encoder` returns one.

    Attributes:
        id: its name, without paths of this machine.
        width: D, the number of features.
        weights: hash of its weights, 16 hex digits, or "none".
        transform: hash of the preprocessing of pixels, 16 hex digits.
        precision: of the computation: "fp32", "bf16", "fp16".
        input_px: side of the patches that are not resized, px; None if no patches are resized.

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

        On one machine the same batch gives the same bits. In another batch a row may differ by
        rounding; with "stain-stats" it does not.

        Args:
            pixels: numpy array, or torch tensor on the CPU or a GPU; a model on the same GPU uses
                it without a copy to the host.

        Raises:
            ValueError: pixels have another dtype or shape; the model returns no [B, D].
            MemoryError: the batch does not fit into the memory of the GPU.
        """

    def upload(self, pixels: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Return pixels as `encode` takes them without a wait, on a GPU if the encoder has one.

        It is called in another thread than `encode`, while that works on the batch before. Here
        the pixels are returned as they are.

        Args:
            pixels: uint8 [B, H, W, 3]; after the call their memory may be used again.
        """
        return pixels

    def spec(self) -> dict[str, Any]:
        """Return all that the features depend on, besides the pixels, for JSON."""
        return {
            key: getattr(self, key) for key in ("id", "width", "weights", "transform", "precision")
        }


def check_pixels(pixels: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """Return the pixels; raise ValueError unless they are uint8 [B, H, W, 3]."""
    dtype, shape = getattr(pixels, "dtype", None), list(getattr(pixels, "shape", []))
    valid_shape = len(shape) == 4 and shape[1] > 0 and shape[2] > 0 and shape[3] == 3
    if valid_shape and str(dtype).removeprefix("torch.") == "uint8":
        return pixels
    got = type(pixels).__name__ if dtype is None else f"{dtype} {shape}"
    raise ValueError(f"pixels: expected uint8 [B, H, W, 3], got {got}")


def as_numpy(pixels: np.ndarray | Tensor) -> np.ndarray:
    """Return pixels as a numpy array, copied from their device if needed."""
    return pixels if isinstance(pixels, np.ndarray) else pixels.detach().cpu().numpy()


def digest(value: object) -> str:
    """Return 16 hex digits of the SHA-256 of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or "no message"
