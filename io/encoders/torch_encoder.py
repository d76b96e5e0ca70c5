"""What all encoders on torch share: pixels to tensors, precision, devices, weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import listed
from .base import Encoder, checked, digest, one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """Where and how a model runs, as `load_encoder` was told."""

    device: str = "auto"
    precision: str = "auto"
    compile: bool = False

    def where(self) -> torch.device:
        there = torch.cuda.is_available()
        if self.device == "auto":
            return torch.device("cuda" if there else "cpu")
        device = torch.device(self.device)
        if device.type == "cuda" and not (
            there and (device.index or 0) < torch.cuda.device_count()
        ):
            raise ValueError(f"device: expected one that torch finds here, got {self.device!r}")
        return device

    def how(self, device: torch.device) -> str:
        if self.precision != "auto":
            return self.precision
        # Before Ampere bf16 is emulated, many times slower than fp32.
        half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return "bf16" if half else "fp32"


@dataclass(frozen=True)
class Transform:
    """What is done to pixels, on the model's device: resize, crop, scale, standardise.

    Resizing is antialiased and not rounded to whole grey levels in between, as PIL does.

    Args:
        resize: the shorter side in px, or height and width; None takes all sizes as they are.
        crop: height and width of what is taken from the middle.
        interpolation: "nearest", "bilinear" or "bicubic".
        scale: factor that makes a grey level 0..255 what mean and std are in.
        mean: of red, green and blue.
        std: of red, green and blue.
        dtype: what the model takes; "uint8" is neither scaled nor standardised.
    """

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    interpolation: str = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    dtype: str = "float32"

    @property
    def input_px(self) -> int | None:
        return min(self.resize) if isinstance(self.resize, tuple) else self.resize

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return [B, 3, h, w] of uint8 [B, H, W, 3]; channels stay last in memory."""
        x = pixels.permute(0, 3, 1, 2)
        height, width = x.shape[2:]
        size = self._size(height, width)
        if size != (height, width):
            kind: dict[str, Any] = {} if self.interpolation == "nearest" else {"antialias": True}
            x = F.interpolate(x.float(), size, mode=self.interpolation, **kind).clamp(0, 255)
        if self.crop is not None:
            down, across = (side - part for side, part in zip(size, self.crop, strict=True))
            if down < 0 or across < 0:
                raise ValueError(
                    f"pixels: expected patches of at least {self.crop[0]} x {self.crop[1]} px, "
                    f"got {height} x {width}"
                )
            top, left = down // 2, across // 2
            x = x[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        if self.dtype == "uint8":
            return x.round().to(torch.uint8) if x.is_floating_point() else x
        std = torch.tensor(self.std, dtype=torch.float64)
        factor = (self.scale / std).float().to(x.device)[:, None, None]
        shift = (-torch.tensor(self.mean, dtype=torch.float64) / std).float().to(x.device)
        x = torch.addcmul(shift[:, None, None], x.float(), factor)
        return x.to(getattr(torch, self.dtype))

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = sorted((height, width))
        long = int(self.resize * long / short)
        return (self.resize, long) if height <= width else (long, self.resize)


class TorchEncoder(Encoder):
    """Run a module on batches of patches.

    Parameters of linear layers and convolutions are held in the precision; sums, norms and
    what is added along the way stay in fp32 (autocast).

    Args:
        name: the encoder's id.
        module: takes what the transform gives, [B, 3, h, w], and returns [B, D].
        transform: what is done to the pixels.
        setup: device, precision, compile.
        batch: the only batch size that the module takes, None for any.
        as_is: True leaves the module's dtypes and modes alone (it is an exported graph).
    """

    PROBE_PX = 224

    def __init__(
        self,
        name: str,
        module: nn.Module,
        transform: Transform,
        setup: Setup,
        *,
        batch: int | None = None,
        as_is: bool = False,
    ) -> None:
        self.id = name
        self.device = setup.where()
        self.precision = setup.how(self.device)
        self.weights = hash_of(module.state_dict())
        self.transform = digest(asdict(transform))
        self.input_px = transform.input_px
        self._prepare, self._batch = transform, batch
        self._half = None if self.precision == "fp32" or as_is else DTYPES[self.precision]
        if not as_is:
            module.eval().requires_grad_(False)
            if self._half is not None:
                for part in module.modules():
                    if isinstance(part, nn.Linear | nn.Conv2d):
                        part.to(self._half)
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        module.to(self.device)
        self._module: Callable[[Tensor], Any] = module
        px = self.input_px or self.PROBE_PX
        try:
            self.width = self._rows(np.full((1, px, px, 3), 255, np.uint8)).shape[1]
        except (RuntimeError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"encoder {name!r}: the model does not take a patch of {px} px: {one_line(error)}"
            ) from error
        if setup.compile:
            self._module = torch.compile(module)

    def encode(self, pixels: np.ndarray | Tensor) -> np.ndarray:
        if len(checked(pixels)) == 0:
            return np.empty((0, self.width), np.float32)
        try:
            return self._rows(pixels).float().cpu().numpy()
        except torch.OutOfMemoryError:
            raise MemoryError(
                f"encoder {self.id!r}: a batch of {len(pixels)} patches does not fit into the "
                f"memory of {self.device}; take fewer at once"
            ) from None

    @torch.inference_mode()
    def _rows(self, pixels: np.ndarray | Tensor) -> Tensor:
        x = self._prepare(self._there(pixels))
        autocast = torch.autocast(
            self.device.type, self._half or torch.bfloat16, enabled=self._half is not None
        )
        with autocast:
            if self._batch is None:
                parts = [self._module(x)]
            else:
                parts = [self._filled(part, self._batch) for part in x.split(self._batch)]
        for part in parts:
            if not isinstance(part, Tensor) or part.ndim != 2:
                came = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"encoder {self.id!r}: expected [B, D] of the model, got {came}")
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _filled(self, x: Tensor, size: int) -> Any:
        """Run a part of a batch as a whole one: the last patch is repeated."""
        rows = self._module(torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]))
        return rows[: len(x)] if isinstance(rows, Tensor) else rows

    def _there(self, pixels: np.ndarray | Tensor) -> Tensor:
        if isinstance(pixels, Tensor):
            return pixels.to(self.device)
        # A copy that may be written, in pinned memory for CUDA, which torch keeps for the next.
        host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        host.numpy()[:] = pixels
        return host.to(self.device, non_blocking=True)


def hash_of(state: Mapping[str, Any]) -> str:
    """Return 16 hex digits that stand for names, dtypes, shapes and bytes of tensors."""
    found = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor):  # what modules keep beside their tensors
            continue
        found.update(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


# What checkpoints wrap the tensors in, and what they call a classifier that is left out here.
WRAPPERS = ("state_dict", "model_state_dict", "model")
HEADS = ("fc", "classifier", "classifer", "head", "heads", "last_linear")


def load_weights(module: nn.Module, file: Path) -> None:
    """Fill a module without its classifier from a checkpoint, which may have one.

    Prefixes such as "module." go. TIAToolbox's checkpoints, which number the module's children
    ("feat_extract.0."), fit too.

    Raises:
        ValueError: the file is no checkpoint, or its tensors are not the module's.
    """
    wanted = module.state_dict()
    state = _read(file)
    children = [name for name, _ in module.named_children()]
    numbered = {}
    for key, value in state.items():
        start, _, rest = key.partition("feat_extract.")
        number, _, rest = rest.partition(".")
        if number.isdecimal() and int(number) < len(children):
            key = f"{start}{children[int(number)]}.{rest}"
        numbered[key] = value
    # The prefix under which most of the names are found.
    prefixes = {key[: -len(name)] for key in numbered for name in list(wanted)[:1]
                if key.endswith(name)} | {""}  # fmt: skip
    prefix = max(sorted(prefixes), key=lambda p: sum(p + name in numbered for name in wanted))
    own = {key.removeprefix(prefix): value for key, value in numbered.items()}
    extra = [key for key in own if key not in wanted and key.split(".")[0] not in HEADS]
    # Counters of batches are of no use here, and old checkpoints have none.
    missing = [key for key in wanted if key not in own and not key.endswith("num_batches_tracked")]
    other = [
        f"{key} {list(own[key].shape)} instead of {list(value.shape)}"
        for key, value in wanted.items()
        if key in own and own[key].shape != value.shape
    ]
    wrong = {"missing": missing, "unexpected": extra, "of another shape": other}
    if any(wrong.values()):
        said = "; ".join(f"{what}: {listed(keys, 4)}" for what, keys in wrong.items() if keys)
        raise ValueError(f"weights: {str(file)!r} is of another model: {said}")
    module.load_state_dict({key: own.get(key, value) for key, value in wanted.items()})


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # unpickling raises anything
        raise ValueError(
            f"weights: expected a checkpoint of tensors (.pth, .pt, .safetensors), got "
            f"{str(file)!r}: {one_line(error)}"
        ) from error
    while isinstance(state, Mapping) and (inner := [k for k in WRAPPERS if k in state]):
        state = state[inner[0]]
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(
        state, Mapping) else {}  # fmt: skip
    if not tensors:
        raise ValueError(f"weights: {str(file)!r} holds no tensors by name")
    return tensors
