"""Ragged bags: one after the other in one tensor, bag b from offsets[b] to offsets[b + 1].

These functions cut the work on them into chunks and groups. Chunks are counted from the start of
each bag, so that a bag alone is computed as it is in any batch, and gives the same bits.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Neighbouring bags of equal length, up to this many tokens, are attended to by one batched product:
# in a shorter bag, a dozen operators take less time to compute than to start.
TOGETHER = 512
# Every matrix of a batched product, operand or result, must begin at a multiple of this. Else MKL
# may sum a narrow product in another order, and a bag would not have the bits that it has alone.
ALIGNED_BYTES = 64
# Rows of a chunk times their width: 8 MiB in float32, which stays in the caches between two
# operators. Twice or half of it was 3 to 20 % slower on two Sapphire Rapids cores.
CHUNK_ELEMENTS = 1 << 21
# On CUDA an operator takes longer to start than to compute 2 million numbers: 1 GiB in float32.
CUDA_CHUNK_ELEMENTS = 1 << 28


def slices_of(offsets: Tensor) -> list[slice]:
    """Return the tokens of each bag."""
    return [slice(start, stop) for start, stop in pairwise(offsets.tolist())]


def bags_of(tokens: Tensor, offsets: Tensor | None) -> list[Tensor]:
    """Return views [H, N_b, E] of each bag's tokens."""
    if offsets is None:
        return list(tokens)
    return [tokens[bag].transpose(0, 1) for bag in slices_of(offsets)]


class EqualBags(NamedTuple):
    """A group of G neighbouring bags of equal length, which one batched product computes."""

    first: int
    """The number of the first bag."""
    bags: int
    """G; 1 for bags that are longer than TOGETHER."""
    start: int | None
    """The first token of the first bag; None if the tensors have an axis of bags."""
    length: int
    """N, the tokens of each bag."""

    def of(self, x: Tensor) -> Tensor:
        """Return this group's part [G·H, ...] of x [B, H, ...]."""
        return x[self.first : self.first + self.bags].flatten(0, 1)

    def rows(self, x: Tensor) -> Tensor:
        """Return this group's part of x [B, H, C, E], aligned, as wide as its `tokens`."""
        part = self.of(x)
        return padded(part) if self._copies(x) else aligned(part)

    def write(self, target: Tensor, x: Tensor) -> None:
        """Write x [G·H, ...] into this group's part of target [B, H, ...]."""
        part = target[self.first : self.first + self.bags]
        part.copy_(x.unflatten(0, part.shape[:2]))

    def view(self, tokens: Tensor) -> Tensor:
        """Return a view [G, H, N, E] of this group's tokens."""
        if self.start is None:
            return tokens[self.first : self.first + self.bags]
        part = tokens[self.start : self.start + self.bags * self.length]
        return part.unflatten(0, (self.bags, self.length)).transpose(1, 2)

    def tokens(self, tokens: Tensor) -> Tensor:
        """Return this group's tokens: a view [H, N, E] of a long bag, or a copy.

        Short bags and float64 are copied.

        The copy [G·H, N, E'] has columns of zeros where rows would not be aligned: so one bag alone
        is multiplied as it is among others.
        """
        view = self.view(tokens)
        if self._copies(tokens):
            return padded(view.contiguous().flatten(0, 1))
        return view[0]

    def _copies(self, x: Tensor) -> bool:
        """Return whether `tokens` copies: in float64 also long bags, whose products MKL may sum in
        another order too."""
        return self.length <= TOGETHER or x.dtype == torch.float64

    def bias(self, counts: Tensor | None, heads: int) -> Tensor | None:
        """Return log(counts) of this group's keys, to add to their scores, [G·H, 1, N]."""
        if counts is None:
            return None
        if self.start is None:
            part = counts[self.first : self.first + self.bags]
        else:
            part = counts[self.start : self.start + self.bags * self.length]
        bias = part.log().reshape(self.bags, 1, 1, self.length)
        return bias.expand(-1, heads, -1, -1).flatten(0, 1)


def aligned(x: Tensor) -> Tensor:
    """Return x, or a copy of it if it does not begin at a multiple of ALIGNED_BYTES."""
    return x.clone() if x.data_ptr() % ALIGNED_BYTES else x


def padded(x: Tensor) -> Tensor:
    """Return x [G, n, E] with columns of zeros up to rows of a multiple of ALIGNED_BYTES."""
    missing = -x.shape[-1] % (ALIGNED_BYTES // x.element_size())
    return pad(x, (0, missing)) if missing else x


def equal_bags(k: Tensor, offsets: Tensor | None) -> list[EqualBags]:
    """Group the bags of keys k that have tokens; a bag longer than TOGETHER is a group."""
    if offsets is None:
        bags, _, length, _ = k.shape
        lengths, starts = [length] * bags, [None] * bags
    else:
        starts = offsets.tolist()
        lengths = [stop - start for start, stop in pairwise(starts)]
    groups: list[EqualBags] = []
    for bag, length in enumerate(lengths):
        last = groups[-1] if groups else None
        if not length:
            continue
        if last and length == last.length <= TOGETHER and last.first + last.bags == bag:
            groups[-1] = last._replace(bags=last.bags + 1)
        else:
            groups.append(EqualBags(bag, 1, starts[bag], length))
    return groups


def bounds_of(offsets: Tensor | None, tokens: int) -> list[int]:
    """Return where the bags start and the last one stops; without offsets all rows are one bag.

    Rows behind the last bag count as one more bag, so that their results are defined.
    """
    if offsets is None:
        return [0, tokens]
    bounds = offsets.tolist()
    return bounds if bounds[-1] == tokens else [*bounds, tokens]


def chunks(bounds: Sequence[int], width: int, x: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (bag, start, stop) of chunks of rows of x.

    They are counted from the start of each bag, so that the products of a bag have the same shapes,
    and the same bits, in any batch.
    """
    rows = chunk_rows(width, x)
    for bag, (first, last) in enumerate(pairwise(bounds)):
        for start in range(first, last, rows):
            yield bag, start, min(start + rows, last)


def chunk_rows(width: int, x: Tensor) -> int:
    """Return the rows of a chunk, a multiple of 64, for rows of `width` on the device of x."""
    elements = CUDA_CHUNK_ELEMENTS if x.is_cuda else CHUNK_ELEMENTS
    return max(64, elements // max(width, 1) // 64 * 64)


def count_slots(rows: int, bags: int, chunk: int) -> int:
    """Return how many slots `chunk_of_slot` of ragged_kernels needs at most, for any offsets."""
    return rows // chunk + bags
