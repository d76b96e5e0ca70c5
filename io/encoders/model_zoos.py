"""Encoders from torchvision, timm, transformers and torch.export."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from ..errors import suggest
from .base import Encoder, one_line
from .torch_encoder import Setup, TorchEncoder, Transform, load_weights

POOLS = ("cls", "mean", "cls+mean")
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "torchvision": {"normalise": ("imagenet", "none")},
    "timm": {"pool": POOLS},
    "hf": {"pool": POOLS},
    "export": {},
}
# What a package raises for a model that it does not know, cannot find or cannot load.
FAILURES = (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError)


def load_torchvision(
    place: str, options: dict[str, str], setup: Setup, *, weights: Path | None = None
) -> Encoder:
    """Load what the classifier of one of torchvision's models receives."""
    name = _named("torchvision", place, options)
    models = _imported("torchvision.models", name)
    known = models.list_models(module=models)
    if place not in known:
        raise ValueError(f"no encoder {name!r}: torchvision has no such model: "
                         f"{suggest(place, known)}")  # fmt: skip
    published = models.get_model_weights(place).DEFAULT
    try:
        model = models.get_model(place, weights=None if weights else published)
    except FAILURES as error:
        raise _failed(name, error) from error
    linear = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ValueError(f"encoder {name!r}: expected a classifier that is linear, found none")
    model.set_submodule(linear[-1], nn.Identity())
    if weights:
        load_weights(model, weights)
    usual = published.transforms()
    standard: dict[str, Any] = {"mean": tuple(usual.mean), "std": tuple(usual.std)}
    transform = Transform(
        resize=usual.resize_size[0],
        crop=(usual.crop_size[0], usual.crop_size[0]),
        interpolation=usual.interpolation.value,
        **({} if options.get("normalise") == "none" else standard),
    )
    return TorchEncoder(name, model, transform, setup)


def load_timm(
    place: str, options: dict[str, str], setup: Setup, *, weights: Path | None = None
) -> Encoder:
    """Load a model of timm, or of a repository in its form ("hf-hub:MahmoodLab/UNI")."""
    name = _named("timm", place, options)
    timm = _imported("timm", name)
    hub = place.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not hub and place.split(".")[0] not in (known := timm.list_models()):
        raise ValueError(f"no encoder {name!r}: timm has no such model: {suggest(place, known)}")
    arguments: dict[str, Any] = {}
    if "virchow" in place.lower():  # whose configuration leaves out what JSON cannot hold
        layers = import_module("timm.layers")
        arguments = {"mlp_layer": layers.SwiGLUPacked, "act_layer": nn.SiLU}
    try:
        model = timm.create_model(place, pretrained=weights is None, num_classes=0, **arguments)
    except FAILURES as error:
        raise _failed(name, error) from error
    if weights:
        load_weights(model, weights)
    config = timm.data.resolve_model_data_config(model)
    mode = config.get("crop_mode", "center")
    if mode not in ("center", "squash"):
        raise ValueError(f"encoder {name!r}: expected a crop 'center' or 'squash', got {mode!r}")
    crop = _, _ = tuple(config["input_size"][1:])
    resize = int(crop[0] / config["crop_pct"]), int(crop[1] / config["crop_pct"])
    transform = Transform(
        resize=min(resize) if mode == "center" else resize,
        crop=crop,
        interpolation=_interpolation(name, config["interpolation"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    if pool := options.get("pool"):
        model = _Pooled(model, pool, model.num_prefix_tokens)
    return TorchEncoder(name, model, transform, setup)


def load_hf(place: str, options: dict[str, str], setup: Setup) -> Encoder:
    """Load a vision model of transformers from a repository of the hub or a folder."""
    folder = Path(place).expanduser()
    name = _named("hf", folder.resolve().name if folder.is_dir() else place, options)
    transformers = imported_transformers(name)
    source = str(folder) if folder.is_dir() else place
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(source)
        model, loading = transformers.AutoModel.from_pretrained(source, output_loading_info=True)
    except FAILURES as error:
        raise _failed(name, error) from error
    # transformers fills what a checkpoint lacks at random. Poolers often are, and not used here.
    if any(True for _ in getattr(model, "pooler", nn.Identity()).parameters()):
        model.pooler = None
    lacking = [key for key in loading["missing_keys"] if not key.startswith("pooler.")]
    if lacking:
        raise ValueError(f"encoder {name!r}: its weights lack {lacking[0]} ({len(lacking)} in all)")
    pool = options.get("pool", "cls")
    parameters = {path.rpartition(".")[2] for path, _ in model.named_parameters()}
    prefix = 0
    if parameters & {"cls_token", "class_embedding"}:
        distilled = "distillation_token" in parameters
        prefix = 1 + distilled + getattr(model.config, "num_register_tokens", 0)
    elif "cls" in pool:
        raise ValueError(f"encoder {name!r}: the model has no class token; write '?pool=mean'")
    model = _Pooled(model, pool, prefix)
    return TorchEncoder(name, model, _transform_of(name, processor.to_dict()), setup)


def load_export(place: str, options: dict[str, str], setup: Setup) -> Encoder:
    """Load a program that torch.export saved: [B, 3, H, W] to [B, D]."""
    file = Path(place).expanduser()
    name = _named("export", file.name, options)
    if not file.is_file():
        raise ValueError(f"no encoder {f'export:{place}'!r}: no such file")
    if setup.precision != "auto":
        raise ValueError(f"precision: {name} computes in what it was exported in, leave it out")
    try:
        program = torch.export.load(file)
    except Exception as error:  # the reader of the archive raises anything
        raise ValueError(
            f"encoder {name!r}: expected a file of torch.export.save: {one_line(error)}"
        ) from error
    inputs = list(program.graph_signature.user_inputs)
    values: dict[str, Any] = {one.name: one.meta.get("val") for one in program.graph.nodes}
    first = values.get(str(inputs[0])) if len(inputs) == 1 else None
    if not isinstance(first, Tensor) or first.ndim != 4 or first.shape[1] != 3:
        raise ValueError(f"encoder {name!r}: expected one input, [B, 3, H, W], got {inputs}")
    batch, _, height, width = first.shape
    fixed = isinstance(height, int) and isinstance(width, int)
    transform = Transform(
        resize=(height, width) if fixed else None, dtype=str(first.dtype).removeprefix("torch.")
    )
    setup = Setup(setup.device, "fp32", setup.compile)
    program = move_to_device_pass(program, setup.where())
    own = batch if isinstance(batch, int) else None
    return TorchEncoder(name, program.module(), transform, setup, batch=own, as_is=True)


class _Pooled(nn.Module):
    """Pool a model's tokens [B, T, D], of which the first are no patches, or maps [B, D, h, w]."""

    def __init__(self, model: nn.Module, pool: str, prefix: int) -> None:
        super().__init__()
        self.model, self.pool, self.prefix = model, pool, prefix

    def forward(self, x: Tensor) -> Tensor:
        call = getattr(self.model, "forward_features", self.model)  # timm's, and transformers'
        tokens = call(x)
        tokens = getattr(tokens, "last_hidden_state", tokens)
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).mT
        parts = {"cls": tokens[:, 0], "mean": tokens[:, self.prefix :].mean(1)}
        return torch.cat([parts[part] for part in self.pool.split("+")], dim=1)


def _transform_of(name: str, settings: dict[str, Any]) -> Transform:
    """Read what a transformers image processor does."""
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    resize: int | tuple[int, int] | None = None
    if settings.get("do_resize"):
        if "height" in size and "width" in size:
            resize = size["height"], size["width"]
        elif "shortest_edge" in size and settings.get("crop_pct") is None:
            resize = size["shortest_edge"]
        else:
            raise ValueError(f"encoder {name!r}: its image processor resizes in a way not known "
                             f"here: {size}")  # fmt: skip
    kinds = {0: "nearest", 2: "bilinear", 3: "bicubic"}
    kind = kinds.get(int(settings["resample"])) if resize else "bilinear"
    found: dict[str, Any] = {}
    if settings.get("do_center_crop"):
        found["crop"] = crop["height"], crop["width"]
    if settings.get("do_normalize"):
        found |= {"mean": tuple(settings["image_mean"]), "std": tuple(settings["image_std"])}
    return Transform(
        resize=resize,
        interpolation=_interpolation(name, kind),
        scale=settings["rescale_factor"] if settings.get("do_rescale") else 1.0,
        **found,
    )


def _interpolation(name: str, kind: str | None) -> str:
    if kind not in ("nearest", "bilinear", "bicubic"):
        raise ValueError(
            f"encoder {name!r}: expected to resize by nearest, bilinear or bicubic, got {kind}"
        )
    return kind


def _named(family: str, place: str, options: dict[str, str]) -> str:
    query = "&".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"{family}:{place}{'?' if query else ''}{query}"


def _imported(module: str, name: str) -> Any:
    package = module.split(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise _failed(name, error) from error
        raise ValueError(
            f"encoder {name!r} needs {package}, which is not installed: "
            "pip install 'motet[encoders]'"
        ) from None
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # torchvision built for another torch: "operator torchvision::nms does not exist".
        raise ValueError(
            f"encoder {name!r}: {package} does not load beside torch {torch.__version__} "
            f"({one_line(error)}); install the torchvision that was built for this torch "
            "(https://pytorch.org/get-started)"
        ) from error


def imported_transformers(name: str) -> Any:
    """Import transformers, and keep it from taking motet's folder `kernels` for a package.

    It looks once for a package of that name, and imports what it finds: with a checkout on sys.path
    that is this one's, a second time, whose operators can be registered only once.
    """
    own = find_spec("kernels")
    if own is None or own.origin != str(Path(__file__).parents[2] / "kernels" / "__init__.py"):
        return _imported("transformers", name)
    hidden: Any = sys.modules
    hidden["kernels"] = None  # what says that there is none
    try:
        transformers = _imported("transformers", name)
        import_module("transformers.utils").is_kernels_available()  # which is remembered
    finally:
        del hidden["kernels"]
    return transformers


def _failed(name: str, error: BaseException) -> ValueError:
    return ValueError(f"encoder {name!r}: {type(error).__name__}: {one_line(error)}")
