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
# Exceptions of packages for a model that does not exist, or cannot be downloaded or loaded.
FAILURES = (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError)


def load_torchvision(
    model_id: str, options: dict[str, str], setup: Setup, *, weights: Path | None = None
) -> Encoder:
    """Load a model of torchvision without its last linear layer: the input of its classifier."""
    name = _encoder_name("torchvision", model_id, options)
    models = _import_package("torchvision.models", name)
    names = models.list_models(module=models)
    if model_id not in names:
        raise ValueError(f"no encoder {name!r}: torchvision has no such model: "
                         f"{suggest(model_id, names)}")  # fmt: skip
    published = models.get_model_weights(model_id).DEFAULT
    try:
        model = models.get_model(model_id, weights=None if weights else published)
    except FAILURES as error:
        raise _load_error(name, error) from error
    linear = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ValueError(f"encoder {name!r}: expected a classifier that is linear, found none")
    model.set_submodule(linear[-1], nn.Identity())
    if weights:
        load_weights(model, weights)
    preset = published.transforms()
    statistics: dict[str, Any] = {"mean": tuple(preset.mean), "std": tuple(preset.std)}
    transform = Transform(
        resize=preset.resize_size[0],
        crop=(preset.crop_size[0], preset.crop_size[0]),
        interpolation=preset.interpolation.value,
        **({} if options.get("normalise") == "none" else statistics),
    )
    return TorchEncoder(name, model, transform, setup)


def load_timm(
    model_id: str, options: dict[str, str], setup: Setup, *, weights: Path | None = None
) -> Encoder:
    """Load a model of timm, or of a repository in timm's format ("hf-hub:MahmoodLab/UNI")."""
    name = _encoder_name("timm", model_id, options)
    timm = _import_package("timm", name)
    hub = model_id.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not hub and model_id.split(".")[0] not in (names := timm.list_models()):
        raise ValueError(f"no encoder {name!r}: timm has no such model: {suggest(model_id, names)}")
    arguments: dict[str, Any] = {}
    if "virchow" in model_id.lower():  # these classes are not in its configuration, which is JSON
        layers = import_module("timm.layers")
        arguments = {"mlp_layer": layers.SwiGLUPacked, "act_layer": nn.SiLU}
    try:
        model = timm.create_model(model_id, pretrained=weights is None, num_classes=0, **arguments)
    except FAILURES as error:
        raise _load_error(name, error) from error
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


def load_hf(repo: str, options: dict[str, str], setup: Setup) -> Encoder:
    """Load a vision model of transformers from a repository of the hub or a folder."""
    folder = Path(repo).expanduser()
    name = _encoder_name("hf", folder.resolve().name if folder.is_dir() else repo, options)
    transformers = imported_transformers(name)
    source = str(folder) if folder.is_dir() else repo
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(source)
        model, loading = transformers.AutoModel.from_pretrained(source, output_loading_info=True)
    except FAILURES as error:
        raise _load_error(name, error) from error
    # transformers initialises tensors that a checkpoint lacks at random. A pooler often lacks, and
    # is not used here.
    if any(True for _ in getattr(model, "pooler", nn.Identity()).parameters()):
        model.pooler = None
    missing = [key for key in loading["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise ValueError(f"encoder {name!r}: its weights lack {missing[0]} ({len(missing)} in all)")
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


def load_export(path: str, options: dict[str, str], setup: Setup) -> Encoder:
    """Load a program that torch.export.save has written: [B, 3, H, W] to [B, D]."""
    file = Path(path).expanduser()
    name = _encoder_name("export", file.name, options)
    if not file.is_file():
        raise ValueError(f"no encoder {f'export:{path}'!r}: no such file")
    if setup.precision != "auto":
        raise ValueError(f"precision: {name} has the precision of its export, leave it out")
    try:
        program = torch.export.load(file)
    except Exception as error:  # reading an archive may raise any exception
        raise ValueError(
            f"encoder {name!r}: expected a file of torch.export.save: {one_line(error)}"
        ) from error
    inputs = list(program.graph_signature.user_inputs)
    values: dict[str, Any] = {node.name: node.meta.get("val") for node in program.graph.nodes}
    first = values.get(str(inputs[0])) if len(inputs) == 1 else None
    if not isinstance(first, Tensor) or first.ndim != 4 or first.shape[1] != 3:
        raise ValueError(f"encoder {name!r}: expected one input, [B, 3, H, W], got {inputs}")
    batch, _, height, width = first.shape
    fixed = isinstance(height, int) and isinstance(width, int)
    transform = Transform(
        resize=(height, width) if fixed else None, dtype=str(first.dtype).removeprefix("torch.")
    )
    setup = Setup(setup.device, "fp32", setup.compile)
    program = move_to_device_pass(program, setup.choose_device())
    fixed_batch = batch if isinstance(batch, int) else None
    return TorchEncoder(name, program.module(), transform, setup, batch=fixed_batch, as_is=True)


class _Pooled(nn.Module):
    """Pool the tokens [B, T, D] or the feature maps [B, D, h, w] of a model.

    Args:
        model: the model.
        pool: "cls", "mean" (of tokens of patches) or "cls+mean" (concatenated).
        prefix: number of the first tokens that are not patches, such as the class token.
    """

    def __init__(self, model: nn.Module, pool: str, prefix: int) -> None:
        super().__init__()
        self.model, self.pool, self.prefix = model, pool, prefix

    def forward(self, x: Tensor) -> Tensor:
        # timm has forward_features; a model of transformers is called itself.
        tokens = getattr(self.model, "forward_features", self.model)(x)
        tokens = getattr(tokens, "last_hidden_state", tokens)
        if tokens.ndim == 4:
            tokens = tokens.flatten(2).mT
        parts = {"cls": tokens[:, 0], "mean": tokens[:, self.prefix :].mean(1)}
        return torch.cat([parts[part] for part in self.pool.split("+")], dim=1)


def _transform_of(name: str, settings: dict[str, Any]) -> Transform:
    """Return the transform of a transformers image processor, from its settings."""
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    resize: int | tuple[int, int] | None = None
    if settings.get("do_resize"):
        if "height" in size and "width" in size:
            resize = size["height"], size["width"]
        elif "shortest_edge" in size and settings.get("crop_pct") is None:
            resize = size["shortest_edge"]
        else:
            raise ValueError(f"encoder {name!r}: its image processor resizes in an unsupported "
                             f"way: {size}")  # fmt: skip
    kinds = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
    kind = kinds.get(int(settings["resample"])) if resize else "bilinear"
    fields: dict[str, Any] = {}
    if settings.get("do_center_crop"):
        fields["crop"] = crop["height"], crop["width"]
    if settings.get("do_normalize"):
        fields |= {"mean": tuple(settings["image_mean"]), "std": tuple(settings["image_std"])}
    return Transform(
        resize=resize,
        interpolation=_interpolation(name, kind),
        scale=settings["rescale_factor"] if settings.get("do_rescale") else 1.0,
        **fields,
    )


def _interpolation(name: str, kind: str | None) -> str:
    if kind not in ("nearest", "bilinear", "bicubic"):
        raise ValueError(
            f"encoder {name!r}: expected to resize by nearest, bilinear or bicubic, got {kind}"
        )
    return kind


def _encoder_name(family: str, model_id: str, options: dict[str, str]) -> str:
    query = "&".join(f"{key}={value}" for key, value in sorted(options.items()))
    return f"{family}:{model_id}{'?' if query else ''}{query}"


def _import_package(module: str, name: str) -> Any:
    """Import a package that the encoder `name` needs; raise ValueError with the cure."""
    package = module.split(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise _load_error(name, error) from error
        raise ValueError(
            f"encoder {name!r} needs {package}, which is not installed: "
            "pip install 'motet[encoders]'"
        ) from None
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # For example torchvision for another torch: "operator torchvision::nms does not exist".
        raise ValueError(
            f"encoder {name!r}: {package} does not load beside torch {torch.__version__} "
            f"({one_line(error)}); install the torchvision that was built for this torch "
            "(https://pytorch.org/get-started)"
        ) from error


def imported_transformers(name: str) -> Any:
    """Import transformers, and hide motet's folder `kernels` from it.

    transformers looks once for a package `kernels` and imports it. If a checkout of motet is on
    sys.path, it would import motet/kernels under a second name, whose operators can be registered
    only once.
    """
    spec = find_spec("kernels")
    if spec is None or spec.origin != str(Path(__file__).parents[2] / "kernels" / "__init__.py"):
        return _import_package("transformers", name)
    modules: Any = sys.modules
    modules["kernels"] = None  # an entry of None means: there is no such module
    try:
        transformers = _import_package("transformers", name)
        import_module("transformers.utils").is_kernels_available()  # it caches the answer
    finally:
        del modules["kernels"]
    return transformers


def _load_error(name: str, error: BaseException) -> ValueError:
    return ValueError(f"encoder {name!r}: {type(error).__name__}: {one_line(error)}")
