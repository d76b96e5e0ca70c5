"""Find the damaged tiles of a TIFF from their bytes, without decoding them.

Decoders do not report all damage. From a JPEG tile of which a part is zero bytes (a hole), libjpeg
makes a picture without an error; if cuCIM cannot decode a tile, it returns the pixels of another.
A scan of the bytes can check:

* the range of a tile lies within the file;
* JPEG and JPEG 2000 tiles begin and end with their markers, and have the size of the TIFF's tags;
* a byte that follows 0xFF in coded data is one that a coder may write there. Foreign bytes in place
  of a few hundred bytes are found in this way, since one in 256 of them is 0xFF;
* no run of zero bytes is longer than coded data can contain. In JPEG that is 32 bytes, more than a
  block whose coefficients are all -1, or, if the Huffman tables were made for the image, as many as
  all blocks of the tile take together. A JPEG 2000 tile has at most one zero byte per empty packet.
  LZW and PackBits code the third of several zero bytes differently, unless they do not compress;
* zero bytes after the end of the coded data are padding, and no damage.

Deflate data has a checksum, which its decoder verifies, so only the range is checked. Uncompressed
pixels may have any value: black is a colour, so only the range is checked there too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from .codestreams import HOLE_BYTES, Header, Index, Tiles, parse_jpeg, parse_jpeg2000
from .library_errors import DAMAGE

CHUNK_BYTES = 8 << 20  # read at a time
THREADS = 2  # that scan; more threads would hold more chunks in memory and gain little time
HEADER_BYTES = 8  # of a TIFF, which cannot be part of a tile
GAP_BYTES = 1 << 16  # a smaller gap between two tiles is read with them, in one read

Bytes = NDArray[np.uint8]


def find_damaged(file: int, tiles: Tiles) -> NDArray[np.bool_]:
    """Find the damaged tiles of a level.

    Args:
        file: descriptor of the file; it is read with pread, so several threads may share it.
        tiles: of the level.

    Returns:
        bool [n], True for a damaged tile.
    """
    offsets, counts = tiles.offsets, tiles.counts
    size = os.fstat(file).st_size
    max_bytes = 4 * tiles.raw_bytes + (1 << 16)  # no coder makes more of a tile
    bad = (counts < 0) | (offsets < 0) | (counts > max_bytes) | (offsets > size - counts)
    bad |= (counts == 0) & (not tiles.sparse)
    bad |= (counts > 0) & (offsets < HEADER_BYTES)
    if tiles.coding == "none":
        bad |= (counts > 0) & (counts < tiles.raw_bytes) & (len(tiles.sizes) == 1)
    with_bytes = np.flatnonzero(~bad & (counts > 0))
    # Writers may store equal tiles once: such tiles have the same range, which is scanned once.
    # Ranges that overlap in another way cannot all be right, so all of them count as damaged.
    starts, first, range_of_tile = np.unique(
        offsets[with_bytes], return_index=True, return_inverse=True
    )
    ends = starts + counts[with_bytes][first]
    bad_range = np.zeros(len(starts), bool)
    overlaps = starts[1:] < np.maximum.accumulate(ends)[:-1]
    bad_range[1:] |= overlaps
    bad_range[:-1] |= overlaps
    disjoint = np.flatnonzero(~bad_range)
    if tiles.coding in ("jpeg", "jpeg2000", "lzw", "packbits"):
        bad_range[disjoint] = _check_coded(file, tiles, starts[disjoint], ends[disjoint])
    other_length = counts[with_bytes] != (ends - starts)[range_of_tile]
    bad[with_bytes] |= bad_range[range_of_tile] | other_length
    return bad


def _reads(starts: Index, ends: Index) -> Iterator[slice]:
    """Divide sorted ranges into slices, each of which is read at once."""
    begin = 0
    while begin < len(starts):
        stop = int(np.searchsorted(starts, starts[begin] + CHUNK_BYTES))
        apart = starts[begin + 1 : stop] - ends[begin : stop - 1] > GAP_BYTES
        stop = begin + 1 + int(apart.argmax()) if apart.any() else stop
        yield slice(begin, stop)
        begin = stop


# Bytes that may follow 0xFF in coded data. JPEG: a stuffed zero, or the markers of restarts. JPEG
# 2000: bit stuffing keeps the byte below 0x90; 0x91 and 0x92 are markers of packets.
_AFTER_FF = {"jpeg": [0, *range(0xD0, 0xD8)], "jpeg2000": [*range(0x90), 0x91, 0x92]}
_PARSE: dict[str, Callable[[bytes, Tiles], Header | None]] = {
    "jpeg": parse_jpeg, "jpeg2000": parse_jpeg2000,
}  # fmt: skip


def _check_coded(file: int, tiles: Tiles, starts: Index, ends: Index) -> NDArray[np.bool_]:
    """Return bool [k]: True for the damaged ones of k coded ranges, which are sorted."""
    bad = np.zeros(len(starts), bool)
    common: Header | None = None  # most tiles of a file have equal headers: compare with it first

    def check(part: slice) -> None:
        nonlocal common
        base = int(starts[part.start])
        content = os.pread(file, int(ends[part].max()) - base, base)
        data = np.frombuffer(content, np.uint8)
        begin, end = starts[part] - base, ends[part] - base
        wrong = end > len(data)  # the file was cut after its size was read
        begin, end = np.minimum(begin, len(data)), np.minimum(end, len(data))
        hole = np.full(len(begin), HOLE_BYTES)
        if tiles.coding in _PARSE:
            common = common or _first_header(content, begin, end, tiles)
            begin, end, hole, single, invalid = _find_coded_data(
                content, data, begin, end, tiles, common
            )
            wrong |= invalid
            wrong |= _has_wrong_byte(data, begin, end, _AFTER_FF[tiles.coding]) & single
        has_hole = _has_hole(data, begin, end, hole)
        if tiles.coding not in _PARSE:
            for i in np.flatnonzero(has_hole):
                has_hole[i] = not _decodes(content[begin[i] : end[i]], tiles)
        bad[part] = wrong | has_hole

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(check, _reads(starts, ends)))  # `list` raises the error of a thread
    return bad


def _first_header(content: bytes, begin: Index, end: Index, tiles: Tiles) -> Header | None:
    for first, last in zip(begin[:8], end[:8], strict=True):
        if header := _PARSE[tiles.coding](content[first:last], tiles):
            return header
    return None


def _find_coded_data(
    content: bytes, data: Bytes, begin: Index, end: Index, tiles: Tiles, common: Header | None
) -> tuple[Index, Index, Index, NDArray[np.bool_], NDArray[np.bool_]]:
    """Find the coded data of k tiles, between the header and the end marker (0xFF 0xD9).

    Args:
        content: bytes of the file.
        data: the same as an array.
        begin: int64 [k], where the tiles begin in `content`.
        end: int64 [k], where they end.
        tiles: of the level.
        common: the header that most tiles have.

    Returns:
        Where the coded data begins and ends, the `hole` and `single` of the headers, and True for
        tiles whose header or end marker is not valid; all [k].
    """
    n = len(begin)
    body, stop = begin.copy(), end - 2
    hole, single, invalid = np.zeros(n, np.int64), np.zeros(n, bool), end - begin < 4
    is_common = np.zeros(n, bool)
    if common:
        head = np.frombuffer(common.bytes, np.uint8)
        long = np.flatnonzero(end - begin >= len(head) + 2)
        if len(long):
            windows = np.lib.stride_tricks.sliding_window_view(data, len(head))
            is_common[long] = (windows[begin[long]] == head).all(1)
        body[is_common] = begin[is_common] + len(head)
        hole[is_common], single[is_common] = common.hole, common.single
    for i in np.flatnonzero(~is_common & ~invalid):
        first, last = int(begin[i]), int(end[i])
        header = _PARSE[tiles.coding](content[first:last], tiles)
        if header is None:
            invalid[i] = True
        else:
            body[i], hole[i], single[i] = first + len(header.bytes), header.hole, header.single
    ends_right = np.zeros(n, bool)
    valid = np.flatnonzero(~invalid)
    ends_right[valid] = (data[stop[valid]] == 0xFF) & (data[stop[valid] + 1] == 0xD9)
    for i in np.flatnonzero(~ends_right & ~invalid):  # fill bytes may follow the marker
        at = content.rfind(b"\xff\xd9", int(body[i]), int(end[i]))
        if at < 0 or content[at + 2 : end[i]].strip(b"\0\xff"):
            invalid[i] = True
        else:
            stop[i] = at
    return body, np.maximum(body, stop), hole, single, invalid


def _has_wrong_byte(data: Bytes, begin: Index, end: Index, allowed: list[int]) -> NDArray[np.bool_]:
    """Return bool [k]: True if in a range 0xFF is followed by a byte that is not allowed."""
    is_allowed = np.zeros(256, bool)
    is_allowed[allowed] = True
    at = np.flatnonzero(data[:-1] == 0xFF)
    at = at[~is_allowed[data[at + 1]]]
    tile = np.searchsorted(begin, at, "right") - 1
    inside = (tile >= 0) & (at < end[tile])
    wrong = np.zeros(len(begin), bool)
    tile, first = np.unique(tile[inside], return_index=True)
    for i, position in zip(tile, at[inside][first], strict=True):
        remainder = data[position : end[i]]
        # Fewer than 16 bytes of 0xFF at the end fill up the data before the end marker.
        is_fill = len(remainder) < 16 and bool((remainder == 0xFF).all())
        wrong[i] = not is_fill
    return wrong


def _decodes(data: bytes, tiles: Tiles) -> bool:
    """Return True if an LZW or PackBits tile with 32 or more zero bytes in a row is sound.

    It is if the zeros follow its end, or are pixels that a coder wrote as they are. A coder that
    does so does not compress, so a tile with fewer bytes than its pixels was not coded by it.
    """
    import imagecodecs

    body = data.rstrip(b"\0")
    # The last code may end with zero bits. 4 bytes hold more than one code.
    body += data[len(body) : len(body) + 4]
    if bytes(HOLE_BYTES) in body and len(body) < tiles.raw_bytes:
        return False
    decode = {"lzw": imagecodecs.lzw_decode, "packbits": imagecodecs.packbits_decode}[tiles.coding]
    try:
        decoded = len(decode(body, out=tiles.raw_bytes + 4))
    except DAMAGE:
        return False
    return decoded in {width * height * tiles.samples for width, height in tiles.sizes}


def _has_hole(data: Bytes, begin: Index, end: Index, hole: Index) -> NDArray[np.bool_]:
    """Return bool [k]: True if a range has `hole` or more zero bytes in a row (0: never)."""
    wrong = np.zeros(len(begin), bool)
    # Look at aligned words of 8 bytes first, which is faster: a run of 32 zero bytes contains at
    # least three of them (24 bytes), wherever it begins.
    words = data[: len(data) // 8 * 8].view(np.uint64)
    at = np.flatnonzero(words == 0)
    if not len(at):
        return wrong
    breaks = np.flatnonzero(np.diff(at) > 1)
    low = 8 * at[np.concatenate([[0], breaks + 1])]
    high = 8 * at[np.concatenate([breaks, [len(at) - 1]])] + 8
    low, high = low[high - low >= 24], high[high - low >= 24]
    # Then extend each run by up to 7 zero bytes on both sides.
    for _ in range(7):
        low = low - ((low > 0) & (data[np.maximum(low - 1, 0)] == 0))
        high = high + ((high < len(data)) & (data[np.minimum(high, len(data) - 1)] == 0))
    # The runs that overlap with range i are first[i] to stop[i] - 1.
    first, stop = np.searchsorted(high, begin, "right"), np.searchsorted(low, end, "left")
    for i in np.flatnonzero((stop > first) & (hole > 0)):
        lows, highs = low[first[i] : stop[i]], high[first[i] : stop[i]]
        longest = (np.minimum(highs, end[i]) - np.maximum(lows, begin[i])).max()
        wrong[i] = longest >= hole[i]
    return wrong
