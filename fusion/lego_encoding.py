"""The tokens of a LegoBlock: an encoder's output, and the spectrum of a context."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.checks import same_kind
from ..kernels.lego_pass.spectrum import compute_real_spectrum
from .context import Context, ModalityInput, offsets_of
from .modalities import Bag, Modality, Positions


@dataclass(frozen=True)
class ItemEncoder:
    """Encodes the items (visits, slides) of a batch that are real, never those that are missing.

    Args:
        encoder: from items [I, ...] to [I, W] or [I, ..., W].
        modality: of the items.
        positions: of the modality's tokens.
        token_dim: W.
        pads_bags: whether the encoder takes all bags at once, padded, with a mask.
        like: a tensor with the dtype and device of the block.
    """

    encoder: Callable[..., Any]
    modality: Modality
    positions: Positions
    token_dim: int
    pads_bags: bool
    like: Tensor

    def make_context(self, batch: ModalityInput) -> Context:
        """Return the tokens of the real items.

        Raises:
            ValueError: an item of which a part is masked, or an output of another shape.
            TypeError: an output that is not a tensor.
        """
        if batch.offsets is None and batch.keep is None:
            return batch.pack_tokens(self._as_tokens(self.encoder(batch.x), len(batch.x)), None)
        if batch.offsets is not None or isinstance(self.modality, Bag):
            tokens, lengths = self._encode_bags(self._split_bags(batch))
        else:
            tokens, lengths = self._encode_dense_items(batch)
        lengths = lengths.reshape(batch.rows, batch.items).sum(1)
        if bool((lengths <= 1).all()):
            present = lengths > 0
            zeros = tokens.new_zeros(batch.rows, 1, tokens.shape[1])
            tokens = zeros.index_put((present,), tokens[:, None])
            return Context(tokens, single=True, present=present)
        return Context(tokens, offsets=offsets_of(lengths))

    def _split_bags(self, batch: ModalityInput) -> list[Tensor]:
        if batch.offsets is not None:
            return batch.make_context(self.modality, self.positions).rows()
        assert batch.keep is not None
        return [x[keep] for x, keep in zip(batch.x, batch.keep, strict=True)]

    def _encode_dense_items(self, batch: ModalityInput) -> tuple[Tensor, Tensor]:
        """Encode dense items; return all tokens [T, W] and the number in each item, int64 [I]."""
        assert batch.keep is not None
        real = batch.keep.all(1)
        if not torch.equal(real, batch.keep.any(1)):
            raise ValueError(
                "mask: expected whole items, since the encoder cannot encode a part of one; "
                "got a partial mask"
            )
        tokens = batch.x.new_empty(0, self.token_dim)
        lengths = real.long()
        if real.any():
            encoded = self._as_tokens(self.encoder(batch.x[real]), int(real.sum()))
            tokens, lengths = encoded.flatten(0, 1), lengths * encoded.shape[1]
        return tokens, lengths

    def _encode_bags(self, bags: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Encode bags [N_i, F]: return all tokens [T, W] and the number in each bag, int64 [I]."""
        nonempty = [bag for bag in bags if len(bag)]
        encoded: list[Tensor] = []
        if nonempty and self.pads_bags:
            padded = nn.utils.rnn.pad_sequence(nonempty, batch_first=True)
            sizes = torch.tensor([len(bag) for bag in nonempty], device=padded.device)
            mask = torch.arange(padded.shape[1], device=padded.device) < sizes[:, None]
            encoded = list(self._as_tokens(self.encoder(padded, mask=mask), len(nonempty)))
        elif nonempty:
            encoded = [self._as_tokens(self.encoder(bag[None]), 1)[0] for bag in nonempty]
        counts = iter(map(len, encoded))
        lengths = [next(counts) if len(bag) else 0 for bag in bags]
        empty = self.like.new_empty(0, self.token_dim)
        return torch.cat([empty, *encoded]), torch.tensor(
            lengths, dtype=torch.int64, device=empty.device
        )

    def _as_tokens(self, encoded: Any, items: int) -> Tensor:
        """Check an encoder's output and return it in the shape [items, N, W]."""
        if not isinstance(encoded, Tensor):
            raise TypeError(
                f"encoder: expected it to return a tensor, got {type(encoded).__name__}"
            )
        if encoded.ndim == 1 and items == 1:  # some encoders squeeze a batch of one
            encoded = encoded[None]
        if encoded.ndim < 2 or len(encoded) != items or encoded.shape[-1] != self.token_dim:
            raise ValueError(
                f"encoder: expected it to return [{items}, {self.token_dim}] or "
                f"[{items}, ..., {self.token_dim}], got {tuple(encoded.shape)}"
            )
        if not torch.is_autocast_enabled(encoded.device.type):
            same_kind("encoder's output", encoded, self.like, "the block")
        return encoded[:, None] if encoded.ndim == 2 else encoded.flatten(1, -2)


def transform_context(context: Context, axes: tuple[int, ...], *, half: bool) -> Context:
    """Return the real part of the spectrum of a context, over the length of each bag.

    Args:
        context: the tokens.
        axes: the axes that are transformed.
        half: return only the first N // 2 + 1 rows of a bag's spectrum. The others mirror them, so
            a row counts twice, except those that are their own mirror image.
    """
    if context.offsets is None:
        tokens, counts = compute_real_spectrum(context.with_positions(), axes, half=half)
        if counts is not None:
            counts = counts.expand(tokens.shape[:2])
        return Context(tokens, single=context.single, counts=counts, present=context.present)
    bags = [compute_real_spectrum(bag, axes, half=half) for bag in context.rows() if len(bag)]
    tokens = torch.cat([context.with_positions()[:0], *(bag for bag, _ in bags)])
    if not half:
        return Context(tokens, offsets=context.offsets)
    lengths = context.offsets.diff()
    counts = [bag_counts for _, bag_counts in bags if bag_counts is not None]
    return Context(
        tokens,
        offsets=offsets_of(torch.where(lengths > 0, lengths // 2 + 1, 0)),
        counts=torch.cat(counts) if counts else None,
    )
