"""The three kinds of modality: shapes of their inputs, and how they become context tokens."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._checks import choice, integer, positive

# Tokens of fewer features get two constants by default, see `keep_scale`.
NARROW = 32


@dataclass(frozen=True)
class Positions:
    """Fourier features of positions: sin and cos of π · scale · x for each scale, then x itself.

    Per axis there are `num_freq_bands` scales, evenly spaced from 1 to max_freq / 2.
    """

    num_freq_bands: int = 2
    max_freq: float = 10.0
    enabled: bool = True

    def __post_init__(self) -> None:
        _set_fields(
            self,
            num_freq_bands=integer("num_freq_bands", self.num_freq_bands),
            max_freq=positive("max_freq", self.max_freq),
        )
        choice("fourier_encode", self.enabled, (True, False))

    def width(self, axes: int) -> int:
        return axes * (2 * self.num_freq_bands + 1) if self.enabled else 0

    def encode(self, x: Tensor) -> Tensor:
        """Encode positions [..., A] as [..., A * (2 * num_freq_bands + 1)], axis after axis."""
        bands = self.num_freq_bands
        scales = torch.linspace(1.0, self.max_freq / 2, bands, dtype=x.dtype, device=x.device)
        angles = x[..., None] * scales * math.pi
        return torch.cat([angles.sin(), angles.cos(), x[..., None]], dim=-1).flatten(-2)

    def grid(self, sizes: tuple[int, ...], like: Tensor) -> Tensor:
        """Encode a regular grid on [-1, 1] as [*sizes, width]."""
        axes = [torch.linspace(-1.0, 1.0, n, dtype=like.dtype, device=like.device) for n in sizes]
        return self.encode(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1))


@dataclass(frozen=True)
class Tabular:
    """A row of numbers per patient: clinical variables, omics.

    Args:
        features: length of the row.
        tokens: "row", the row is one token; or "features", each feature is a token of one channel
            with its position encoded, which gives an attention weight per feature.
        keep_scale: append two constants, c and -c with c = sqrt(features / 2), to each row. The
            LayerNorm of a token divides by the spread of its features, and so erases their common
            scale: one feature gives the same for every value, of two features only their order is
            left. Beside constants the values keep their size. None for True if `features` is less
            than 32; a wider row has nothing to gain. Not used for "features".

    Input: [B, features], or [B, K, features] for K items per patient (visits, samples).

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> model = motet.HEALNet({"omic": motet.Tabular(20, tokens="features")}, out_features=4)
        >>> out = model({"omic": torch.randn(2, 20)}, return_attention=True)
        >>> out.attention["omic"][0].shape
        torch.Size([2, 8, 25, 20])
    """

    features: int
    tokens: Literal["row", "features"] = "row"
    keep_scale: bool | None = None
    item_ndim: ClassVar[int] = 1

    def __post_init__(self) -> None:
        features = integer("features", self.features)
        choice("tokens", self.tokens, ("row", "features"))
        keep_scale = self.tokens == "row" and _choose_keep_scale(self.keep_scale, features)
        _set_fields(self, features=features, keep_scale=keep_scale)

    @property
    def channels(self) -> int:
        return self.features

    def token_dim(self, positions: Positions) -> int:
        if self.tokens == "row":
            return self.features + 2 * bool(self.keep_scale)
        if not positions.enabled:
            # A LayerNorm over a single channel returns zero whatever the value is. Only together
            # with its position does a feature keep its value.
            raise ValueError("fourier_encode: Tabular(tokens='features') needs True, got False")
        return 1 + positions.width(1)

    def token_shape(self, x: Tensor) -> tuple[int, ...]:
        return (1,) if self.tokens == "row" else (self.features,)

    def tokenise(
        self, x: Tensor, positions: Positions, coords: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.tokens == "row":
            return x[:, None], _constants(self.features, x)[None] if self.keep_scale else None
        return x[..., None], positions.grid((self.features,), x)


@dataclass(frozen=True)
class Bag:
    """A set of vectors per patient: patches of a slide, cells, time steps. Order is ignored.

    Args:
        features: width of each vector.
        coords: number of coordinate axes per vector, 0 for none; e.g. 2 for patch positions, 1 for
            the time of a measurement. They are Fourier-encoded and joined to the vector.
        extent: the coordinate that is encoded as 1. Choose about the largest coordinate of the
            cohort (e.g. 100_000 level-0 pixels, or 48 hours).
        keep_scale: append two constants to each vector, see `Tabular`. None for True if `features`
            is less than 32.

    Input: a jagged NestedTensor [B, j, features]; or [B, N, features], with all tokens real unless
    a mask [B, N] marks padding; or [B, K, N, features] for K items per patient (several slides).
    Coordinates have the same layout with `coords` in place of `features`.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> model = motet.HEALNet({"wsi": motet.Bag(32, coords=2, extent=1e5)}, out_features=4)
        >>> patches, pixels = torch.randn(2, 50, 32), 1e5 * torch.rand(2, 50, 2)
        >>> model({"wsi": patches}, coords={"wsi": pixels}).shape
        torch.Size([2, 4])
    """

    features: int
    coords: int = 0
    extent: float = 1.0
    keep_scale: bool | None = None
    item_ndim: ClassVar[int] = 2

    def __post_init__(self) -> None:
        features = integer("features", self.features)
        _set_fields(
            self,
            features=features,
            keep_scale=_choose_keep_scale(self.keep_scale, features),
            coords=integer("coords", self.coords, 0),
            extent=positive("extent", self.extent),
        )

    @property
    def channels(self) -> int:
        return self.features

    def token_dim(self, positions: Positions) -> int:
        if self.coords and not positions.enabled:
            raise ValueError(f"fourier_encode: Bag(coords={self.coords}) needs True, got False")
        coords = positions.width(self.coords) if self.coords else 0
        return self.features + coords + 2 * bool(self.keep_scale)

    def token_shape(self, x: Tensor) -> tuple[int, ...]:
        return (x.shape[-2],)

    def tokenise(
        self, x: Tensor, positions: Positions, coords: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        encoded = None if coords is None else positions.encode(coords / self.extent).to(x.dtype)
        if not self.keep_scale:
            return x, encoded
        constants = _constants(self.features, x)
        if encoded is None:
            return x, constants.expand(x.shape[-2], 2)
        return x, torch.cat([encoded, constants.expand(*encoded.shape[:-1], 2)], dim=-1)


@dataclass(frozen=True)
class Grid:
    """A regular array per patient, channels last: an image (axes=2), a volume (3), a signal (1).

    Args:
        channels: values per grid point.
        axes: number of axes. Each grid point is a token; its position, in [-1, 1] on each axis, is
            Fourier-encoded.

    Input: `[B, *sizes, channels]`, or `[B, K, *sizes, channels]` for K items per patient.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> model = motet.HEALNet({"mri": motet.Grid(1, axes=3)}, out_features=4)
        >>> model({"mri": torch.randn(2, 4, 8, 8, 1)}).shape
        torch.Size([2, 4])
    """

    channels: int
    axes: int = 2

    def __post_init__(self) -> None:
        _set_fields(
            self, channels=integer("channels", self.channels), axes=integer("axes", self.axes)
        )

    @property
    def item_ndim(self) -> int:
        return self.axes + 1

    def token_dim(self, positions: Positions) -> int:
        return self.channels + positions.width(self.axes)

    def token_shape(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[-1 - self.axes : -1])

    def tokenise(
        self, x: Tensor, positions: Positions, coords: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        grid = positions.grid(tuple(x.shape[1:-1]), x) if positions.enabled else None
        return x.flatten(1, -2), None if grid is None else grid.flatten(0, -2)


Modality = Tabular | Bag | Grid
_KINDS: dict[str, type[Tabular] | type[Bag] | type[Grid]] = {
    "Tabular": Tabular,
    "Bag": Bag,
    "Grid": Grid,
}


def input_shape(modality: Modality) -> str:
    """Return the shape of a modality's input in words, for error messages."""
    width = modality.channels
    if isinstance(modality, Tabular):
        return f"[B, {width}]"
    if isinstance(modality, Bag):
        return f"[B, N, {width}] or jagged [B, j, {width}]"
    return f"[B, {', '.join(f'size {i + 1}' for i in range(modality.axes))}, {width}]"


def check_modalities(modalities: Any) -> None:
    """Raise unless `modalities` maps names to modalities."""
    if not isinstance(modalities, Mapping) or not modalities:
        raise ValueError("modalities: expected a dict of name to Tabular, Bag or Grid, not empty")
    check_names("modalities", modalities)
    for name, modality in modalities.items():
        check_modality(f"modalities[{name!r}]", modality)


def check_modality(argument: str, modality: Any) -> None:
    """Raise unless `modality` is a Tabular, Bag or Grid."""
    if not isinstance(modality, (Tabular, Bag, Grid)):
        raise TypeError(f"{argument}: expected a Tabular, Bag or Grid, got {modality!r}")


def check_names(argument: str, names: Iterable[str]) -> None:
    """Raise unless every name can be the name of a submodule, and so of tensors in a file."""
    container = nn.ModuleDict()
    for name in names:
        if (
            not isinstance(name, str)
            or not 0 < len(name) <= 100
            or any(character in name for character in "./\\\0")
            or hasattr(container, name)
        ):
            raise ValueError(
                f"{argument}: expected names of up to 100 characters without dots and slashes that "
                f"torch.nn.ModuleDict does not use itself, got {name[:120]!r}"
            )


def modality_to_config(modality: Modality) -> dict[str, Any]:
    return {"type": type(modality).__name__, **asdict(modality)}


def modality_from_config(config: dict[str, Any]) -> Modality:
    fields = dict(config)
    kind = _KINDS[fields.pop("type")]
    if kind is not Grid:
        fields.setdefault("keep_scale", False)  # in older files
    return kind(**fields)


def _choose_keep_scale(keep_scale: bool | None, features: int) -> bool:
    choice("keep_scale", keep_scale, (None, True, False))
    return features < NARROW if keep_scale is None else keep_scale


def _constants(features: int, like: Tensor) -> Tensor:
    """Return the two constants beside a token, [2], in the dtype and on the device of `like`.

    Their sum of squares is what `features` numbers with variance 1 have. Made by kernels, not
    copied from the host, since a CUDA graph cannot hold such a copy.
    """
    constant = math.sqrt(features / 2)
    return torch.cat([like.new_full((1,), constant), like.new_full((1,), -constant)])


def _set_fields(instance: object, **values: Any) -> None:
    """Set fields of a frozen dataclass, in its `__post_init__`, to checked values."""
    for field, value in values.items():
        object.__setattr__(instance, field, value)
