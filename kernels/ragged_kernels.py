"""Triton functions that find the chunk of a ragged bag which a program computes.

The grid has `count_slots` slots (ragged.py), for any offsets: a launch needs to know the number of
bags and rows only, not the offsets, which lie on the device.
"""

import triton
import triton.language as tl


@triton.jit
def _bag_of_slot(slot, offsets_ptr, n_bags, CHUNK: tl.constexpr):
    """Return the last bag whose first slot is at most `slot`, by counting these bags."""
    before = 0
    for b0 in range(0, n_bags, 128):
        b = b0 + tl.arange(0, 128)
        first = tl.load(offsets_ptr + b, mask=b < n_bags, other=0) // CHUNK + b
        before += tl.sum(((first <= slot) & (b < n_bags)).to(tl.int32), 0)
    return (before - 1).to(tl.int64)


@triton.jit
def chunk_of_slot(
    slot, offsets_ptr, n_bags, n_rows, CHUNK: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """Return a slot's bag, the bag's first row, and where the chunk starts and stops in the bag.

    Bag b's chunks have the slots from offsets[b] // CHUNK + b on. From bag to bag this rises by at
    least ceil(length / CHUNK), so that bags never share a slot, and no prefix sum over the bags is
    needed. It may rise by one more: that slot has no chunk, and start >= stop. Without offsets
    every bag has n_rows rows, counted from 0 in each.
    """
    if RAGGED:
        bag = _bag_of_slot(slot, offsets_ptr, n_bags, CHUNK)
        origin = tl.load(offsets_ptr + bag)
        length = (tl.load(offsets_ptr + bag + 1) - origin).to(tl.int32)
        start = (slot - origin // CHUNK - bag).to(tl.int32) * CHUNK
    else:
        chunks = (n_rows + CHUNK - 1) // CHUNK
        bag = (slot // chunks).to(tl.int64)
        origin = bag * 0
        length = n_rows
        start = slot % chunks * CHUNK
    return bag, origin, start, tl.minimum(start + CHUNK, length)


@triton.jit
def chunk_of_any_row(slot, offsets_ptr, n_bags, n_rows, CHUNK: tl.constexpr):
    """Do as chunk_of_slot; the rows behind the last bag, up to n_rows, count as one more bag."""
    bag = _bag_of_slot(slot, offsets_ptr, n_bags + 1, CHUNK)
    origin = tl.load(offsets_ptr + bag)
    end = tl.load(offsets_ptr + bag + 1, mask=bag < n_bags, other=0)
    length = (tl.where(bag < n_bags, end, n_rows) - origin).to(tl.int32)
    start = (slot - origin // CHUNK - bag).to(tl.int32) * CHUNK
    return bag, origin, start, tl.minimum(start + CHUNK, length)


@triton.jit
def chunks_of_bag(bag, offsets_ptr, n_rows, CHUNK: tl.constexpr, RAGGED: tl.constexpr):
    """Return a bag's first slot and its number of chunks; see chunk_of_slot."""
    bag = bag.to(tl.int64)
    if RAGGED:
        origin = tl.load(offsets_ptr + bag)
        length = (tl.load(offsets_ptr + bag + 1) - origin).to(tl.int32)
        slot = origin // CHUNK + bag
        chunks = (length + CHUNK - 1) // CHUNK
    else:
        chunks = (n_rows + CHUNK - 1) // CHUNK
        slot = bag * chunks
    return slot, chunks
