"""Explanations of predictions: which tokens and features of the input they depend on.

Attention shows where a model looks, gradients how the output would change. Neither proves the other
right: `deletion_curve` measures what an order of importance is worth. All functions take the inputs
as the models do, and return values in the layout of these inputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .context import Context, ModalityInput, by_name, jagged, offsets_of, read_all
from .healnet import HEALNet
from .lego_block import LegoBlock
from .lego_fuse import LegoFuse
from .lego_merge import LegoMerge
from .modalities import Modality, Tabular
from .passes import Pass, PassOptions

Model = HEALNet | LegoMerge | LegoFuse
"""A model of several modalities; a LegoBlock is explained as a LegoMerge of one block."""
Output = Callable[[Tensor], Tensor]
"""From logits [B, K] to one number per patient [B], such as `motet.risk`."""
# Numbers of the inputs for which gradients are computed at once, 128 MiB of float32: a slide of
# 60,000 patches with 1,024 features takes one point of the integral at a time.
POINT_NUMBERS = 1 << 25


def token_attention(
    model: Model,
    inputs: Any,
    *,
    masks: Any = None,
    present: Any = None,
    coords: Any = None,
    modalities: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return how much attention each token gets: the mean over layers, heads and latents.

    Args:
        model: HEALNet, LegoMerge or LegoFuse.
        inputs, masks, present, coords: as of `HEALNet.forward`.
        modalities: the modalities to explain; None for all that have more than one token.

    Returns:
        By modality [B, N], 1 in sum over the tokens of a row, and 0 for a row that misses the
        modality; jagged [B, j] for a jagged input.

    Raises:
        ValueError: a modality with a single token, whose attention is always 1; or tokens that are
            not those of the input, see `LegoBlock.forward`.

    Example:
        >>> model = motet.HEALNet({"wsi": motet.Bag(32)}, out_features=4).eval()
        >>> inputs = {"wsi": torch.randn(2, 50, 32)}
        >>> motet.token_attention(model, inputs)["wsi"].shape
        torch.Size([2, 50])
    """
    model = _check_model(model)
    with torch.no_grad():
        output = model(inputs, masks=masks, present=present, coords=coords, return_attention=True)
    attention = output.attention
    if modalities is None:
        modalities = [name for name, passes in attention.items() if not _is_single(passes[0])]
    means = {}
    for name in modalities:
        if name not in attention:
            raise ValueError(f"modalities: no attention to {name!r}; expected one of "
                             f"{', '.join(attention)}")  # fmt: skip
        if _is_single(attention[name][0]):
            raise ValueError(
                f"modalities: {name!r} has one token, and the attention to it is always 1; "
                "expected a modality with several tokens (Tabular(tokens='features'), Bag, Grid), "
                "or use integrated_gradients"
            )
        means[name] = _mean_over_passes(attention[name])
    return means


def _is_single(weights: Tensor) -> bool:
    """Return whether weights [B, H, C, N] are of one token; jagged ones never are."""
    return not weights.is_nested and weights.shape[-1] == 1


def _mean_over_passes(passes: Sequence[Tensor]) -> Tensor:
    if not passes[0].is_nested:
        return torch.stack([weights.mean(dim=(1, 2)) for weights in passes]).mean(0)
    values = torch.stack([weights.values().mean(dim=(1, 2)) for weights in passes]).mean(0)
    return jagged(values, _offsets(passes[0]))


class RolloutOutput(NamedTuple):
    """Where the last latents come from; the sum over all tokens and `initial` is 1 in each row."""

    tokens: dict[str, Tensor]
    """By modality [B, N]; jagged [B, j] for a jagged input."""
    initial: Tensor
    """[B], the share of the initial latents, which hold nothing about the patient."""


def attention_rollout(
    model: HEALNet, inputs: Any, *, masks: Any = None, present: Any = None, coords: Any = None
) -> RolloutOutput:
    r"""Follow attention through all layers, back to the tokens (Abnar and Zuidema, 2020).

    A latent is half what it was and half what it attends to. With the attention weights A of a
    cross-attention, averaged over the heads, and those S of a self-attention,

    .. math::
        R_m \leftarrow \tfrac12 R_m + \tfrac12 A, \quad
        R_{n \ne m} \leftarrow \tfrac12 R_n
        \qquad \text{and} \qquad
        R_m \leftarrow \tfrac12 R_m + \tfrac12 S R_m

    for the share R_m [C, N] of each token of modality m in each latent. The mean over the latents
    is returned. So the later of two layers counts twice as much, and tokens of different modalities
    can be compared. A row that misses a modality skips its layers.

    Args:
        model: HEALNet.
        inputs, masks, present, coords: as of `HEALNet.forward`.

    Raises:
        TypeError: another model.

    Example:
        >>> model = motet.HEALNet({"wsi": motet.Bag(32)}, out_features=4).eval()
        >>> inputs = {"wsi": torch.randn(2, 50, 32)}
        >>> rollout = motet.attention_rollout(model, inputs)
        >>> torch.allclose(rollout.tokens["wsi"].sum(1) + rollout.initial, torch.ones(2))
        True
    """
    if not isinstance(model, HEALNet):
        raise TypeError(f"model: expected a HEALNet, got {type(model).__name__}")
    batches = read_all(
        model.modalities, inputs, masks=masks, present=present, coords=coords, like=model.latents
    )
    rows = next(iter(batches.values())).rows
    with torch.no_grad():
        keys = model.prepare(batches)
        contexts = {name: of_layers[0].context for name, of_layers in keys.items()}
        shares = _Shares(contexts, rows, model.latents)
        model.fuse(rows, keys, PassOptions(watch=shares.follow))
    tokens = {
        name: _token_values(batches[name].restore_layout(share, contexts[name]))
        for name, share in shares.of_tokens().items()
    }
    return RolloutOutput(tokens, shares.initial.mean(1))


class _Shares:
    """The share of every token in every latent, carried through the passes of a HEALNet.

    Tokens are [B, C, N] if their context is dense, [T, C] if it is packed, as their weights.
    """

    def __init__(self, contexts: Mapping[str, Context], rows: int, latents: Tensor) -> None:
        self._contexts = contexts
        self._name_of = {id(context): name for name, context in contexts.items()}
        self._tokens: dict[str, Tensor] = {}
        self.initial = latents.new_ones(rows, len(latents))
        """[B, C], the share of the initial latents."""

    def follow(self, layer_pass: Pass, queries: Tensor | None) -> None:
        """Follow one pass, as `PassOptions.watch`."""
        weights = layer_pass.keys.weights(layer_pass.attention, queries)
        name = self._name_of.get(id(layer_pass.keys.context))
        if name is None:
            self._mix_latents(weights.mean(1).expand(len(self.initial), -1, -1))
            return
        context = self._contexts[name]
        halved = self.initial.new_full((len(self.initial),), 0.5)
        if context.nonempty is not None:  # rows without the modality skip the pass
            halved = torch.where(context.nonempty, halved, 1.0)
        self.initial = self.initial * halved[:, None]
        for other, share in self._tokens.items():
            self._tokens[other] = share * self._per_row(other, halved)
        attended = weights.mean(1) / 2  # over heads; zero in rows without a token
        self._tokens[name] = self._tokens.get(name, 0) + attended

    def of_tokens(self) -> dict[str, Tensor]:
        """Return the mean over latents, as weights of one head and one latent."""
        return {name: share.mean(1)[:, None, None] for name, share in self._tokens.items()}

    def _mix_latents(self, weights: Tensor) -> None:
        """Follow a self-attention with the weights [B, C, C]."""
        self.initial = (self.initial + (weights @ self.initial[..., None])[..., 0]) / 2
        for name, share in self._tokens.items():
            offsets = self._contexts[name].offsets
            if offsets is None:
                self._tokens[name] = (share + weights @ share) / 2
                continue
            bags = share.split(offsets.diff().tolist())  # [N_b, C] each
            mixed = [bag @ of_row.T for bag, of_row in zip(bags, weights, strict=True)]
            self._tokens[name] = (share + torch.cat(mixed)) / 2

    def _per_row(self, name: str, values: Tensor) -> Tensor:
        """Return values [B] in a shape that multiplies the shares of a modality."""
        offsets = self._contexts[name].offsets
        if offsets is None:
            return values[:, None, None]
        return values.repeat_interleave(offsets.diff())[:, None]


def _token_values(weights: Tensor) -> Tensor:
    """Return weights of one head and one latent without these two axes."""
    if not weights.is_nested:
        return weights[:, 0, 0]
    return jagged(weights.values()[:, 0, 0], _offsets(weights))


def integrated_gradients(
    model: Model,
    inputs: Any,
    output: Output,
    *,
    masks: Any = None,
    present: Any = None,
    coords: Any = None,
    steps: int = 50,
) -> dict[str, Tensor]:
    r"""Return by how much each feature changes an output (Sundararajan et al., 2017), with Captum.

    .. math:: (x - x_0) \int_0^1 \nabla f(x_0 + t (x - x_0)) \, dt

    with x_0 = 0: scaled features are 0 at the mean of the training patients. The sum over all
    features is the output less that of a patient whose features are all 0, up to the error of
    the sum over `steps`.

    Args:
        model: HEALNet, LegoMerge or LegoFuse.
        inputs, masks, present, coords: as of `HEALNet.forward`.
        output: from logits [B, K] to numbers [B], such as `motet.risk`.
        steps: points of the integral. At most eight are computed at once, fewer of large bags.

    Returns:
        By modality in the shape of its input, 0 at tokens that are not real.

    Raises:
        ImportError: Captum is not installed.
        ValueError: inputs that do not fit the model.

    Example:
        >>> model = motet.HEALNet({"wsi": motet.Bag(32)}, out_features=4).eval()
        >>> inputs = {"wsi": torch.randn(2, 50, 32)}
        >>> motet.integrated_gradients(model, inputs, motet.risk, steps=8)["wsi"].shape
        torch.Size([2, 50, 32])
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise ImportError("integrated_gradients needs Captum: pip install captum") from error
    model = _check_model(model)
    rows = _split_rows(model, inputs, masks, present, coords)
    values = [_integrate(IntegratedGradients, model, row, output, steps) for row in rows]
    return {
        name: _join_rows([of_row[name] for of_row in values], x)
        for name, x in by_name(inputs, list(model.modalities), "inputs").items()
    }


class _Row(NamedTuple):
    """The arguments of a model for one patient, [1, ...] each."""

    inputs: dict[str, Tensor]
    masks: dict[str, Tensor]
    coords: dict[str, Tensor]
    missing: set[str]
    """Those of `inputs` that the patient misses."""

    def present(self) -> Iterator[dict[str, Tensor]]:
        """Return inputs, masks and coordinates of the modalities that the patient has."""
        for tensors in (self.inputs, self.masks, self.coords):
            yield {name: x for name, x in tensors.items() if name not in self.missing}


def _split_rows(model: Model, inputs: Any, masks: Any, present: Any, coords: Any) -> list[_Row]:
    batches = read_all(
        model.modalities, inputs,
        masks=masks, present=present, coords=coords, like=next(model.parameters()),
    )  # fmt: skip
    names = list(model.modalities)
    has = {name: _has_token(batch).tolist() for name, batch in batches.items()}
    parts = [
        {name: _rows_of(x) for name, x in by_name(values, names, "inputs").items()}
        for values in (inputs, masks, coords)
    ]
    rows = []
    for i in range(next(iter(batches.values())).rows):
        x, mask, position = ({name: of_rows[i] for name, of_rows in p.items()} for p in parts)
        missing = {name for name, of_rows in has.items() if not of_rows[i]}
        rows.append(_Row(x, mask, position, missing))
    return rows


def _offsets(x: Any) -> Tensor:
    """Return the offsets [B + 1] of a jagged tensor."""
    return x.offsets()


def _rows_of(x: Tensor) -> list[Tensor]:
    """Return the rows of a tensor, dense, [1, ...] each."""
    return [row[None] for row in x.unbind()]


def _join_rows(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return rows [1, ...] as one tensor, jagged if `like` is."""
    if not like.is_nested:
        return torch.cat(list(rows))
    return jagged(torch.cat([row[0] for row in rows]), _offsets(like))


def _integrate(
    method: Any, model: Model, row: _Row, output: Output, steps: int
) -> dict[str, Tensor]:
    """Return the integrated gradients of one patient by modality, [1, ...] each."""
    inputs, masks, coords = row.present()

    def compute(*tensors: Tensor) -> Tensor:
        """Return the output of the inputs, the masks and the coordinates, in this order."""
        rest = iter(tensors)
        arguments = [dict(zip(names, rest, strict=False)) for names in (inputs, masks, coords)]
        return output(model(arguments[0], masks=arguments[1], coords=arguments[2]))

    gradients = {name: torch.zeros_like(x) for name, x in row.inputs.items()}
    if inputs:
        values = method(compute).attribute(
            tuple(x.detach() for x in inputs.values()),
            additional_forward_args=(*masks.values(), *coords.values()) or None,
            n_steps=steps,
            internal_batch_size=max(
                1, min(8, POINT_NUMBERS // sum(map(torch.numel, inputs.values())))
            ),
        )
        gradients |= dict(zip(inputs, values, strict=True))
    return gradients


def deletion_curve(
    model: Model,
    inputs: Any,
    modality: str,
    importance: Tensor,
    output: Output,
    *,
    masks: Any = None,
    present: Any = None,
    coords: Any = None,
    shares: Sequence[float] = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1),
) -> Tensor:
    """Return an output while tokens are removed, the most important first.

    The faster the output falls, the better the order: compare the area below the curve with that of
    a random order.

    Args:
        model: HEALNet, LegoMerge or LegoFuse.
        inputs, masks, present, coords: as of `HEALNet.forward`.
        modality: whose tokens are removed. Tokens of a bag or grid are masked; features of a table
            are set to 0, the mean of scaled features.
        importance: [B, N] for each token (of a grid, in row-major order) or feature; jagged
            [B, j] for a jagged input.
        output: from logits [B, K] to numbers [B], such as `motet.risk`.
        shares: of each row's tokens to remove, from 0 to 1.

    Returns:
        [B, number of shares].

    Raises:
        ValueError: importance that does not fit the modality, or a share outside 0 to 1.

    Example:
        >>> model = motet.HEALNet({"wsi": motet.Bag(32)}, out_features=4).eval()
        >>> inputs = {"wsi": torch.randn(2, 50, 32)}
        >>> patches = motet.token_attention(model, inputs)["wsi"]
        >>> motet.deletion_curve(model, inputs, "wsi", patches, motet.risk).shape
        torch.Size([2, 11])
    """
    model = _check_model(model)
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares: expected numbers from 0 to 1, got {list(shares)}")
    rows = _split_rows(model, inputs, masks, present, coords)
    if not rows or modality not in rows[0].inputs:
        raise ValueError(f"modality: expected one of the inputs, got {modality!r}")
    if importance.shape[0] != len(rows):
        raise ValueError(f"importance: expected {len(rows)} rows, got {importance.shape[0]}")
    kind = model.modalities[modality]
    curves = []
    with torch.no_grad():
        for row, scores in zip(rows, _rows_of(importance), strict=True):
            order = _order_tokens(row.inputs[modality], kind, scores)
            count = len(order)
            removed = [order[: round(share * count)] for share in shares]
            left = [_remove(row, modality, kind, tokens) for tokens in removed]
            curves.append(torch.cat([_predict(model, of_share, output) for of_share in left]))
    return torch.stack(curves)


def _order_tokens(x: Tensor, kind: Modality, importance: Tensor) -> Tensor:
    """Return the tokens of a patient, or the features of a table, the most important first."""
    count = kind.features if isinstance(kind, Tabular) else math.prod(x.shape[1:-1])
    if x.ndim != kind.item_ndim + 1 or tuple(importance.shape) != (1, count):
        raise ValueError(
            f"importance: expected one item and [{count}] numbers for each patient, got "
            f"{tuple(x.shape[1:])} and {tuple(importance.shape[1:])}"
        )
    return importance[0].argsort(descending=True)


def _remove(row: _Row, name: str, kind: Modality, tokens: Tensor) -> _Row:
    """Return a patient without some tokens [n] of a modality; features of a table are set to 0."""
    x = row.inputs[name]
    if isinstance(kind, Tabular):
        return row._replace(inputs={**row.inputs, name: x.index_fill(1, tokens, 0)})
    mask = row.masks.get(name, x.new_ones(x.shape[:-1], dtype=torch.bool))
    mask = mask.flatten(1).index_fill(1, tokens, False).reshape(mask.shape)
    return row._replace(masks={**row.masks, name: mask})


def _predict(model: Model, row: _Row, output: Output) -> Tensor:
    present = {
        name: torch.tensor([name not in row.missing], device=x.device)
        for name, x in row.inputs.items()
    }
    return output(model(row.inputs, masks=row.masks, coords=row.coords, present=present))


def _has_token(batch: ModalityInput) -> Tensor:
    """Return which rows of a batch have a token, bool [B]."""
    if batch.offsets is None:
        if batch.keep is None:
            return torch.ones(batch.rows, dtype=torch.bool)
        return batch.keep.reshape(batch.rows, -1).any(1)
    if batch.keep is None:
        return batch.offsets.diff() > 0
    return offsets_of(batch.keep.long())[batch.offsets].diff() > 0


def _check_model(model: Any) -> Model:
    if not isinstance(model, Model):
        hint = "; wrap it: LegoMerge({'x': block})" if isinstance(model, LegoBlock) else ""
        raise TypeError(
            f"model: expected a HEALNet, LegoMerge or LegoFuse, got {type(model).__name__}{hint}"
        )
    return model
