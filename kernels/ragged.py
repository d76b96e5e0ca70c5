"""Ragged bags: one after the other in one tensor, bag b from offsets[b] to offsets[b + 1].

How the work on them is cut, always counted from the start of each bag, so that a bag alone is
computed as it is in any batch.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Neighbouring bags of one length up to this are attended to by one product: below it, the time of a
# bag is that of starting a dozen operators.
TOGETHER = 512
# A matrix of a batch that begins at another byte modulo this, operand or result, may be multiplied
# in another order (MKL's narrow products): a bag would not have the bits that it has alone.
ALIGNED_BYTES = 64
# Rows of a chunk times their width: 8 MiB in float32, written and read back within the caches.
# Twice or half of it was 3 to 20 % slower on two Sapphire Rapids cores.
CHUNK_ELEMENTS = 1 << 21
# On CUDA starting an operator takes longer than 2 million numbers do: 1 GiB in float32.
CUDA_CHUNK_ELEMENTS = 1 << 28


def slices_of(offsets: Tensor) -> list[slice]:
    """Return the tokens of each bag."""
    return [slice(start, stop) for start, stop in pairwise(offsets.tolist())]


def bags_of(tokens: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """Return views [H, N_b, E] of each bag's tokens."""
    if offsets is None:
        return list(tokens)
    return [tokens[bag].transpose(0, 1) for bag in slices_of(offsets)]


class Run(NamedTuple):
    """Neighbouring bags of one length, or one bag."""

    first: int
    bags: int
    start: int | None
    """The first bag's first token; None if bags are an axis of their own."""
    length: int

    def of(self, x: Tensor) -> Tensor:
        """Return this run's part [G·H, ...] of x [B, H, ...]."""
        return x[self.first : self.first + self.bags].flatten(0, 1)

    def rows(self, x: Tensor) -> Tensor:
        """Return this run's part of x [B, H, C, E], aligned, as wide as its `tokens`."""
        own = self.of(x)
        return padded(own) if self._copies(x) else aligned(own)

    def put(self, target: Tensor, x: Tensor) -> None:
        """Write x [G·H, ...] into this run's part of target [B, H, ...]."""
        own = target[self.first : self.first + self.bags]
        own.copy_(x.unflatten(0, own.shape[:2]))

    def view(self, tokens: Tensor) -> Tensor:
        """Return a view [G, H, N, E] of this run's tokens."""
        if self.start is None:
            return tokens[self.first : self.first + self.bags]
        own = tokens[self.start : self.start + self.bags * self.length]
        return own.unflatten(0, (self.bags, self.length)).transpose(1, 2)

    def tokens(self, tokens: Tensor) -> Tensor:
        """Return this run's tokens, a view [H, N, E] of a long bag.

        Of short bags a copy [G·H, N, E'] with zeros so that it is aligned: one bag alone is
        multiplied as it is among others.
        """
        view = self.view(tokens)
        if self._copies(tokens):
            return padded(view.contiguous().flatten(0, 1))
        return view[0]

    def _copies(self, x: Tensor) -> bool:
        """Whether the tokens are copied; float64's longer products depend on their place too."""
        return self.length <= TOGETHER or x.dtype == torch.float64

    def bias(self, counts: Tensor | None, heads: int) -> Tensor | None:
        """Return what the counts of this run's keys add to their scores, [G·H, 1, N]."""
        if counts is None:
            return None
        if self.start is None:
            own = counts[self.first : self.first + self.bags]
        else:
            own = counts[self.start : self.start + self.bags * self.length]
        own = own.log().reshape(self.bags, 1, 1, self.length)
        return own.expand(-1, heads, -1, -1).flatten(0, 1)


def aligned(x: Tensor) -> Tensor:
    """Return x, copied where it does not begin at a multiple of ALIGNED_BYTES."""
    return x.clone() if x.data_ptr() % ALIGNED_BYTES else x


def padded(x: Tensor) -> Tensor:
    """Return x [G, n, E] with columns of zeros where a row is no multiple of ALIGNED_BYTES."""
    missing = -x.shape[-1] % (ALIGNED_BYTES // x.element_size())
    return pad(x, (0, missing)) if missing else x


def runs_of(k: Tensor, offsets: Tensor | None) -> list[Run]:
    """Cut the bags that have tokens into runs."""
    if offsets is None:
        bags, _, length, _ = k.shape
        lengths, starts = [length] * bags, [None] * bags
    else:
        starts = offsets.tolist()
        lengths = [stop - start for start, stop in pairwise(starts)]
    runs: list[Run] = []
    for bag, length in enumerate(lengths):
        last = runs[-1] if runs else None
        if not length:
            continue
        if last and length == last.length <= TOGETHER and last.first + last.bags == bag:
            runs[-1] = last._replace(bags=last.bags + 1)
        else:
            runs.append(Run(bag, 1, starts[bag], length))
    return runs


def bounds_of(offsets: Tensor | None, tokens: int) -> list[int]:
    """Return where the bags start and the last one stops; without offsets all is one bag.

    Rows behind the last bag are one more, so that what is computed of them is defined.
    """
    if offsets is None:
        return [0, tokens]
    bounds = offsets.tolist()
    return bounds if bounds[-1] == tokens else [*bounds, tokens]


def chunks(bounds: Sequence[int], width: int, x: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (bag, start, stop) of chunks of rows of x, counted from the start of each bag.

    So that the products of a bag have the same shapes, and the same bits, in any batch.
    """
    rows = chunk_rows(width, x)
    for bag, (first, last) in enumerate(pairwise(bounds)):
        for start in range(first, last, rows):
            yield bag, start, min(start + rows, last)


def chunk_rows(width: int, x: Tensor) -> int:
    """Return the rows of a chunk where x lies, a multiple of 64."""
    elements = CUDA_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS
    return max(64, elements // max(width, 1) // 64 * 64)


def count_slots(rows: int, bags: int, chunk: int) -> int:
    """Return how many programs `chunk_of_slot` of ragged_kernels can need, for any offsets."""
    return rows // chunk + bags
