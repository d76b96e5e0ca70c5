"""The base of all encoders on torch: preprocessing of pixels, precision, devices, weights."""

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
from .base import Encoder, check_pixels, digest, one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """The arguments of `load_encoder` that say where and in which precision a model runs."""

    device: str = "auto"
    precision: str = "auto"
    compile: bool = False

    def choose_device(self) -> torch.device:
        has_cuda = torch.cuda.is_available()
        if self.device == "auto":
            return torch.device("cuda" if has_cuda else "cpu")
        device = torch.device(self.device)
        if device.type == "cuda" and not (
            has_cuda and (device.index or 0) < torch.cuda.device_count()
        ):
            raise ValueError(f"device: expected one that torch finds here, got {self.device!r}")
        return device

    def choose_precision(self, device: torch.device) -> str:
        if self.precision != "auto":
            return self.precision
        # Before Ampere (compute capability 8.0) bf16 is emulated, many times slower than fp32.
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return "bf16" if has_bf16 else "fp32"


@dataclass(frozen=True)
class Transform:
    """The preprocessing of pixels, on the model's device: resize, crop, scale, standardise.

    Resizing is antialiased. Unlike PIL's, its result is not rounded to integers.

    Args:
        resize: the shorter side in px, or (height, width); None does not resize.
        crop: (height, width) of the crop from the middle.
        interpolation: "nearest", "bilinear" or "bicubic".
        scale: factor that converts a grey level 0..255 to the unit of mean and std.
        mean: of red, green and blue.
        std: of red, green and blue.
        dtype: of the model's input; "uint8" is neither scaled nor standardised.
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
        """Return [B, 3, h, w] of uint8 [B, H, W, 3], in memory format channels_last."""
        x = pixels.permute(0, 3, 1, 2)
        height, width = x.shape[2:]
        size = self._resized(height, width)
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

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of a patch after resizing."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        short, long = sorted((height, width))
        long = int(self.resize * long / short)
        return (self.resize, long) if height <= width else (long, self.resize)


class TorchEncoder(Encoder):
    """Run a module on batches of patches.

    Parameters of linear layers and convolutions are converted to the precision. Norms, sums and
    residual connections stay in fp32 (autocast).

    Args:
        name: the encoder's id.
        module: takes the output of the transform, [B, 3, h, w], and returns [B, D].
        transform: preprocessing of the pixels.
        setup: device, precision, compile.
        batch: the only batch size that the module takes, None for any.
        as_is: True does not change the module's dtypes and modes (it is an exported graph).
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
        self.device = setup.choose_device()
        self.precision = setup.choose_precision(self.device)
        self.weights = hash_of(module.state_dict())
        self.transform = digest(asdict(transform))
        self.input_px = transform.input_px
        self._prepare, self._batch = transform, batch
        self._copies: torch.cuda.Stream | None = None
        self._half = None if self.precision == "fp32" or as_is else DTYPES[self.precision]
        if not as_is:
            module.eval().requires_grad_(False)
            if self._half is not None:
                for layer in module.modules():
                    if isinstance(layer, nn.Linear | nn.Conv2d):
                        layer.to(self._half)
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        module.to(self.device)
        self._module: Callable[[Tensor], Any] = module
        px = self.input_px or self.PROBE_PX
        try:  # the width is found by a run on a white patch
            self.width = self._rows(np.full((1, px, px, 3), 255, np.uint8)).shape[1]
        except (RuntimeError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(
                f"encoder {name!r}: the model does not take a patch of {px} px: {one_line(error)}"
            ) from error
        if setup.compile:
            self._module = torch.compile(module)

    def upload(self, pixels: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Copy pixels to the GPU, on a stream of its own: the model continues meanwhile.

        The copy is done when this returns. From pinned memory it takes a third of the time.
        """
        if self.device.type != "cuda" or isinstance(pixels, Tensor):
            return pixels
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._copies):
            uploaded = torch.from_numpy(pixels).to(self.device, non_blocking=True)
        # Its memory belongs to the stream of copies: it must not be used again before the model,
        # which runs on another stream, has read it.
        uploaded.record_stream(torch.cuda.current_stream(self.device))
        self._copies.synchronize()
        return uploaded

    def encode(self, pixels: np.ndarray | Tensor) -> np.ndarray:
        if len(check_pixels(pixels)) == 0:
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
        x = self._prepare(self._to_device(pixels))
        autocast = torch.autocast(
            self.device.type, self._half or torch.bfloat16, enabled=self._half is not None
        )
        with autocast:
            if self._batch is None:
                parts = [self._module(x)]
            else:
                parts = [self._run_padded(part, self._batch) for part in x.split(self._batch)]
        for part in parts:
            if not isinstance(part, Tensor) or part.ndim != 2:
                got = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"encoder {self.id!r}: expected [B, D] of the model, got {got}")
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _run_padded(self, x: Tensor, size: int) -> Any:
        """Run the module on a batch padded to `size` patches with copies of its last patch."""
        rows = self._module(torch.cat([x, x[-1:].expand(size - len(x), *x.shape[1:])]))
        return rows[: len(x)] if isinstance(rows, Tensor) else rows

    def _to_device(self, pixels: np.ndarray | Tensor) -> Tensor:
        if isinstance(pixels, Tensor):
            return pixels.to(self.device)
        # A copy, since torch accepts no read-only array; in pinned memory for CUDA, which torch
        # uses again for the next batch.
        host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        host.numpy()[:] = pixels
        return host.to(self.device, non_blocking=True)


def hash_of(state: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the SHA-256 of the names, dtypes, shapes and bytes of tensors."""
    sha256 = hashlib.sha256()
    for name, value in sorted(state.items()):
        if not isinstance(value, Tensor):  # a module may keep other values in its state
            continue
        sha256.update(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        sha256.update(flat.view(torch.uint8).numpy().data)
    return sha256.hexdigest()[:16]


# Keys under which checkpoints store their tensors, and names of the classifier, which is not used.
WRAPPERS = ("state_dict", "model_state_dict", "model")
HEADS = ("fc", "classifier", "classifer", "head", "heads", "last_linear")


def load_weights(module: nn.Module, file: Path) -> None:
    """Load a checkpoint into a module without classifier; the checkpoint may have one.

    Prefixes of names such as "module." are removed. Checkpoints of TIAToolbox, which number the
    module's children ("feat_extract.0."), can be loaded too.

    Raises:
        ValueError: the file is no checkpoint, or its tensors are not those of the module.
    """
    expected = module.state_dict()
    children = [name for name, _ in module.named_children()]
    tensors = {}  # by names in which TIAToolbox's numbers are replaced by those of the children
    for key, value in _read_checkpoint(file).items():
        start, _, end = key.partition("feat_extract.")
        number, _, end = end.partition(".")
        if number.isdecimal() and int(number) < len(children):
            key = f"{start}{children[int(number)]}.{end}"
        tensors[key] = value
    # The prefix with which most of the expected names are in the checkpoint.
    prefixes = {key[: -len(name)] for key in tensors for name in list(expected)[:1]
                if key.endswith(name)} | {""}  # fmt: skip
    prefix = max(sorted(prefixes), key=lambda p: sum(p + name in tensors for name in expected))
    tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    extra = [key for key in tensors if key not in expected and key.split(".")[0] not in HEADS]
    # Counters of batches have no effect in inference, and old checkpoints lack them.
    missing = [
        key for key in expected if key not in tensors and not key.endswith("num_batches_tracked")
    ]
    other_shape = [
        f"{key} {list(tensors[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    problems = {"missing": missing, "unexpected": extra, "of another shape": other_shape}
    if any(problems.values()):
        text = "; ".join(f"{kind}: {listed(keys, 4)}" for kind, keys in problems.items() if keys)
        raise ValueError(f"weights: {str(file)!r} is of another model: {text}")
    module.load_state_dict({key: tensors.get(key, value) for key, value in expected.items()})


def _read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # unpickling may raise any exception
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
