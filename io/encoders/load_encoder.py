"""Load an encoder by its name."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import suggest
from .base import Encoder, as_numpy, check_pixels, digest, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# Beside these, any <package.module>:<callable>.
FAMILIES = {
    "torchvision": "torchvision:<name>",
    "timm": "timm:<name>",
    "hf": "hf:<repo or folder>",
    "export": "export:<file.pt2>",
}
KNOWN = ("stain-stats", *FAMILIES.values(), "<package.module>:<callable>")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def load_encoder(
    name: str,
    *,
    device: str = "auto",
    precision: str = "auto",
    weights: str | os.PathLike[str] | None = None,
    compile: bool = False,
) -> Encoder:
    """Load an encoder by its name (docs/how-to/encoders.md lists the kinds).

    Args:
        name: "stain-stats", "torchvision:<name>", "timm:<name>", "hf:<repo or folder>",
            "export:<file.pt2>" or "<package.module>:<callable>". Some have options:
            "hf:<repo>?pool=cls+mean".
        device: "auto" (a GPU if there is one, else the CPU), "cpu", "cuda" or "cuda:1".
        precision: "fp32", "bf16" or "fp16"; "auto" is bf16 on GPUs that support it, else fp32.
        weights: a file (.pth, .pt, .safetensors) with weights for a torchvision or timm model,
            instead of its published weights.
        compile: True compiles the model with torch.compile: the first batch takes longer, others
            less time.

    Returns:
        The encoder, ready to use.

    Raises:
        ValueError: in one line: the encoder does not exist, its package is not installed or does
            not load, weights do not fit, or the encoder does not have an argument.

    Example:
        >>> encoder = motet.io.load_encoder("stain-stats")
        >>> patches = torch.full((2, 256, 256, 3), 255, dtype=torch.uint8)
        >>> encoder.encode(patches).shape == (2, encoder.width)
        True
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:<number>, got {device!r}")
    family, colon, model = name.partition(":")
    if family in FAMILIES and model:
        return _from_zoo(name, weights, device, precision, compile)
    if name != "stain-stats" and not (colon and re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name)):
        raise ValueError(f"no encoder {name!r}: {suggest(name, KNOWN)}")
    is_default = {
        "device": device in ("auto", "cpu"),
        "precision": precision in ("auto", "fp32"),
        "weights": weights is None,
        "compile": not compile,
    }
    if unused := [argument for argument, default in is_default.items() if not default]:
        raise ValueError(f"{unused[0]}: {name} has no such option, leave the argument out")
    if name == "stain-stats":
        from .stain_stats import StainStats

        return StainStats()
    return _CallableEncoder(name)


def _from_zoo(
    name: str, weights: str | os.PathLike[str] | None, device: str, precision: str, compile: bool
) -> Encoder:
    """Load a model of one of the FAMILIES, which need torch."""
    family, _, model_and_options = name.partition(":")
    file: dict[str, Path] = {}
    if weights is not None:
        if family not in ("torchvision", "timm"):
            raise ValueError(f"weights: {family}:... has its own, leave the argument out")
        file["weights"] = Path(weights).expanduser()
        if not file["weights"].is_file():
            raise ValueError(f"weights: no file {str(file['weights'])!r}")
    from . import model_zoos

    model, options = _parse_options(name, model_and_options, model_zoos.OPTIONS[family])
    load = getattr(model_zoos, f"load_{family}")
    return load(model, options, model_zoos.Setup(device, precision, compile), **file)


class _CallableEncoder(Encoder):
    """A callable of the user: uint8 [B, H, W, 3] to [B, D], both numpy arrays."""

    PROBE_PX = 256

    def __init__(self, name: str) -> None:
        self._name, self._call = name, _import_callable(name)
        self.id = str(getattr(self._call, "id", name))
        self.weights = str(getattr(self._call, "weights", "none"))
        self.transform = digest({"callable": self.id})
        self.precision = "fp32"
        self.input_px = getattr(self._call, "input_px", None)
        width = getattr(self._call, "width", None)
        if width is None:
            px = self.input_px or self.PROBE_PX
            width = self._rows(np.full((1, px, px, 3), 255, np.uint8)).shape[1]
        self.width = int(width)

    def encode(self, pixels: np.ndarray | Tensor) -> np.ndarray:
        pixels = as_numpy(check_pixels(pixels))
        if len(pixels) == 0:
            return np.empty((0, self.width), np.float32)
        rows = self._rows(pixels)
        if rows.shape[1] != self.width:
            raise ValueError(
                f"encoder {self._name!r}: expected {self.width} features per patch, "
                f"got {rows.shape[1]}"
            )
        return rows

    def _rows(self, pixels: np.ndarray) -> np.ndarray:
        try:
            returned = self._call(pixels)
            rows = np.asarray(returned, dtype=np.float32)
        except (MemoryError, OSError):  # of the machine, not of the user's code
            raise
        except Exception as error:  # the user's code may raise any exception
            raise ValueError(
                f"encoder {self._name!r}: raised {type(error).__name__} on uint8 "
                f"{list(pixels.shape)}: {one_line(error)}"
            ) from error
        if rows.ndim != 2 or len(rows) != len(pixels) or rows.shape[1] == 0:
            raise ValueError(
                f"encoder {self._name!r}: expected [{len(pixels)}, D] back, got "
                f"{type(returned).__name__} of shape {list(rows.shape)}"
            )
        return rows


def _import_callable(name: str) -> Callable[[np.ndarray], Any]:
    module, _, attribute = name.partition(":")
    try:
        target: Any = import_module(module)
    except ModuleNotFoundError as error:
        if not (error.name and f"{module}.".startswith(f"{error.name}.")):
            raise ValueError(f"encoder {name!r}: importing it failed: {one_line(error)}") from error
        raise ValueError(
            f"no encoder {name!r}: no module {error.name!r} (PYTHONPATH=. finds those of this "
            f"folder); {suggest(name, KNOWN)}"
        ) from None
    except Exception as error:  # the user's module may raise any exception
        raise ValueError(
            f"encoder {name!r}: importing it raised {type(error).__name__}: {one_line(error)}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [public for public in dir(target) if not public.startswith("_")]
            raise ValueError(f"no encoder {name!r}: no {part!r} there: {suggest(part, names)}")
        target = getattr(target, part)
    if not callable(target):
        raise ValueError(f"encoder {name!r}: expected a callable, got {type(target).__name__}")
    return target


def _parse_options(
    name: str, model_and_options: str, allowed: dict[str, tuple[str, ...]]
) -> tuple[str, dict[str, str]]:
    """Return the model and the options of "model?key=value&key=value".

    Args:
        name: of the encoder, for errors.
        model_and_options: what follows the family in the name.
        allowed: option to its values.
    """
    model, _, query = model_and_options.partition("?")
    options = {}
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        if key not in allowed:
            raise ValueError(f"encoder {name!r}: no option {key!r}: {suggest(key, allowed)}")
        if value not in allowed[key]:
            raise ValueError(
                f"encoder {name!r}: {key}: expected one of {', '.join(allowed[key])}, got {value!r}"
            )
        options[key] = value
    return model, options
