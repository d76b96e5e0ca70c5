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
  LZW codes the third of several zero bytes differently;
* an uncompressed RGB tile is not completely black.

Deflate data has a checksum, which its decoder verifies, so only the range is checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 8 << 20  # read at a time
THREADS = 2  # that scan; more threads would hold more chunks in memory and gain little time
GAP_BYTES = 1 << 16  # a smaller gap between two tiles is read with them, in one read
HOLE_BYTES = 32  # zero bytes in a row that are damage; `_has_hole` finds runs of 31 and more

Bytes = NDArray[np.uint8]
Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tiles:
    """Where the n tiles (or strips) of a level lie in the file, and how they are coded."""

    offsets: Index  # int64 [n]
    counts: Index  # int64 [n], in bytes
    coding: str  # "jpeg" | "jpeg2000" | "lzw" | "packbits" | "deflate" | "none"
    sizes: frozenset[tuple[int, int]]  # (width, height) that tiles may have, in px
    raw_bytes: int  # of a decoded tile
    samples: int  # per px
    tables: bytes = b""  # the tag JPEGTables: Huffman and quantisation tables of all tiles
    sparse: bool = True  # a tile of 0 bytes was not scanned and is white; if False it is damaged


@dataclass(frozen=True)
class Header:
    """The bytes of a tile before its coded data, and what they say."""

    bytes: bytes
    hole: int  # as many zero bytes in a row are damage; 0 if no number of zeros proves damage
    single: bool  # True: one run of coded data follows, up to the end marker
    size: tuple[int, int]  # (width, height)


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
    check = {"jpeg": _check_coded, "jpeg2000": _check_coded, "lzw": _check_coded,
             "packbits": _check_coded, "none": _check_black}.get(tiles.coding)  # fmt: skip
    if check:
        bad_range[disjoint] = check(file, tiles, starts[disjoint], ends[disjoint])
    other_length = counts[with_bytes] != (ends - starts)[range_of_tile]
    bad[with_bytes] |= bad_range[range_of_tile] | other_length
    return bad


def parse_jpeg(data: bytes, tiles: Tiles) -> Header | None:
    """Read the segments before a JPEG's coded data; None if a decoder would refuse them.

    Layout of the bytes (all numbers big-endian; C components, of 3 bytes or 2 each):

        frame = marker, precision, height (2), width (2), C, then id, sampling, quantisation table
        scan  = C, then id, Huffman tables (DC and AC, 4 bits each); first and last coefficient,
                bits of precision

    Args:
        data: the tile from its first byte.
        tiles: its sizes and JPEGTables.
    """
    zeros: dict[int, tuple[int, int]] = {}
    quantisation: set[int] = set()
    if tiles.tables:
        _read_segments(tiles.tables, zeros, quantisation)
    segments = _read_segments(data, zeros, quantisation)
    if segments is None:
        return None
    end, frame, scan = segments
    count = tiles.samples
    if len(frame) != 7 + 3 * count or len(scan) < 6 or len(scan) != 4 + 2 * scan[0]:
        return None
    size = int.from_bytes(frame[4:6], "big"), int.from_bytes(frame[2:4], "big")
    if frame[1] != 8 or size not in tiles.sizes or frame[6] != count:
        return None
    factors = [divmod(factor, 16) for factor in frame[8::3]]
    valid_factors = all(1 <= h <= 4 and 1 <= v <= 4 for h, v in factors)
    if not valid_factors or not {*frame[9::3]} <= quantisation:
        return None
    # A progressive JPEG (0xC2), or one with a scan per component, has several runs of coded data.
    single = frame[0] != 0xC2 and scan[0] == count
    if not single:
        return Header(data[:end], 0, False, size)
    tables = [divmod(pair, 16) for pair in scan[2:-3:2]]
    has_tables = all(dc in zeros and 16 + ac in zeros for dc, ac in tables)
    if not has_tables or scan[1:-3:2] != frame[7::3] or scan[-3:] != b"\0?\0":  # 0 to 63, all bits
        return None
    return Header(data[:end], _jpeg_hole(size, factors, tables, zeros), True, size)


def _jpeg_hole(
    size: tuple[int, int],
    factors: list[tuple[int, int]],
    tables: list[tuple[int, int]],
    zeros: dict[int, tuple[int, int]],
) -> int:
    """Return how many zero bytes in a row are more than the coded data of a JPEG can contain.

    Zero bits decode to the first code of the Huffman tables. With the tables of the standard that
    is, for AC, a coefficient of -1: a block of zero bits has 63 of them and takes 191 bits, 24
    bytes, which no picture has. Tables made for one image may give the first codes to "same DC
    value" and "end of block", which take a few bits per block: in a uniform area there may then be
    as many zero bits as all blocks of the tile take.
    """
    across, down = max(h for h, _ in factors), max(v for _, v in factors)
    units = -(-size[0] // (8 * across)) * -(-size[1] // (8 * down))
    bits = 0
    for (h, v), (dc, ac) in zip(factors, tables, strict=True):
        (dc_length, category), (ac_length, symbol) = zeros[dc], zeros[16 + ac]
        if symbol != 0:  # not "end of block"
            return HOLE_BYTES
        bits += units * h * v * (dc_length + category + ac_length)
    return max(HOLE_BYTES, bits // 8 + 2)


def _read_segments(
    data: bytes, zeros: dict[int, tuple[int, int]], quantisation: set[int]
) -> tuple[int, bytes, bytes] | None:
    """Read the segments of a JPEG up to its coded data.

    A segment is 0xFF, the code of its marker, its length (2 bytes, which count themselves), and its
    body.

    Args:
        data: of a tile, or JPEGTables.
        zeros: for each Huffman table (16 is added to the numbers of AC tables), what zero bits
            decode to is added here: (number of bits, symbol).
        quantisation: the numbers of the quantisation tables are added here.

    Returns:
        Where the coded data begins, the code of the frame's marker with the frame header, and the
        scan header; None if one of these is missing.
    """
    at, frame = 2, b""
    while data[:2] == b"\xff\xd8" and at + 4 <= len(data):  # SOI
        marker = data[at + 1]
        if data[at] != 0xFF:
            return None
        if marker == 0xFF:  # a fill byte before a marker
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) < length - 2:
            return None
        if marker == 0xC4:  # DHT: Huffman tables
            if not _read_huffman(body, zeros):
                return None
        elif marker == 0xDB:  # DQT: quantisation tables, of 64 numbers of 1 or 2 bytes
            while body:
                entry = 1 + 64 * (1 + (body[0] >> 4))
                if body[0] >> 4 > 1 or body[0] & 15 > 3 or len(body) < entry:
                    return None
                quantisation.add(body[0] & 15)
                body = body[entry:]
        elif marker in (0xC0, 0xC1, 0xC2) and not frame:  # SOF: baseline, extended, progressive
            frame = bytes([marker]) + body
        elif marker == 0xDA:  # SOS: the coded data follows
            return (at + 2 + length, frame, body) if frame else None
        # Others that may come: APPn, comments, DRI.
        elif not (0xE0 <= marker <= 0xEF or marker == 0xFE or (marker == 0xDD and length == 4)):
            return None
        at += 2 + length
    return None


def _read_huffman(body: bytes, zeros: dict[int, tuple[int, int]]) -> bool:
    """Read the tables of a DHT segment; False if they are not valid.

    A table is its number (16 is added for AC), the numbers of codes of 1 to 16 bits, and the
    symbols. Codes are assigned in ascending order, so the first one is zero bits only.
    """
    while body:
        counts, symbols = body[1:17], body[17 : 17 + sum(body[1:17])]
        if body[0] & 0xEF > 3 or len(symbols) != sum(counts) or not symbols:
            return False
        if body[0] < 4 and max(symbols) > 15:
            return False
        code = 0
        for bits, count in enumerate(counts, 1):
            code = 2 * code + count
            if count and code >= 1 << bits:  # the standard forbids the code of ones only
                return False
        first_bits = next(bits for bits, count in enumerate(counts, 1) if count)
        zeros[body[0]] = first_bits, symbols[0]
        body = body[17 + len(symbols) :]
    return True


def parse_jpeg2000(data: bytes, tiles: Tiles) -> Header | None:
    """Read the main header and the first tile-part header of a JPEG 2000 codestream.

    Args:
        data: the tile from its first byte.
        tiles: its sizes.

    Returns:
        The header, None if it is not valid or of another size.
    """
    at, packets, single, size = 2 if data[:2] == b"\xff\x4f" else len(data), 0, False, (0, 0)
    while at + 4 <= len(data):
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == b"\xff\x93":  # SOD: the coded data follows
            hole = packets + HOLE_BYTES if packets else 0  # an empty packet is one zero byte
            return Header(data[: at + 2], hole, single, size) if size in tiles.sizes else None
        body = data[at + 4 : at + 2 + length]
        if marker[0] != 0xFF or length < 2 or len(body) < length - 2:
            return None
        if marker == b"\xff\x51" and len(body) >= 37:  # SIZ: size, components, bits per sample
            edges = [int.from_bytes(body[i : i + 4], "big") for i in range(2, 18, 4)]
            size = edges[0] - edges[2], edges[1] - edges[3]
            samples = int.from_bytes(body[34:36], "big")
            if samples != tiles.samples or body[36] != 7:  # 7: unsigned, 8 bits
                return None
        elif marker == b"\xff\x52" and len(body) >= 10 + (body[0] & 1) * (body[5] + 1):  # COD
            layers = int.from_bytes(body[2:4], "big")
            packets = layers * tiles.samples * _count_precincts(size, body)
        elif marker == b"\xff\x90" and len(body) >= 8:  # SOT: length of the tile-part, 0: all
            part_bytes = int.from_bytes(body[2:6], "big")
            single = part_bytes == 0 or at + part_bytes >= len(data) - 2
        at += 2 + length
    return None


def _count_precincts(size: tuple[int, int], cod: bytes) -> int:
    """Count the precincts of one component, over all its resolutions.

    Args:
        size: (width, height) of the tile.
        cod: body of the COD segment: byte 5 is the number of decompositions; from byte 10 on, if
            bit 0 of byte 0 is set, two exponents per resolution, else precincts are 2^15 px wide.
    """
    count, last = 0, min(cod[5], 32)
    for resolution in range(last + 1):
        sides = [ceil(side / 2 ** (last - resolution)) for side in size]
        exponents = cod[10 + resolution] if cod[0] & 1 else 0xFF
        count += ceil(sides[0] / 2 ** (exponents & 15)) * ceil(sides[1] / 2 ** (exponents >> 4))
    return count


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
        wrong |= _has_hole(data, begin, end, hole)
        bad[part] = wrong

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
    for i in np.flatnonzero(~ends_right & ~invalid):  # up to 62 fill bytes may follow the marker
        at = content.rfind(b"\xff\xd9", max(int(body[i]), int(end[i]) - 64), int(end[i]))
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


def _check_black(file: int, tiles: Tiles, starts: Index, ends: Index) -> NDArray[np.bool_]:
    """Return bool [k]: True for uncompressed RGB tiles that are completely black.

    Tiles with alpha or of one channel may be. 64 bytes from the middle are read first.
    """
    bad = np.zeros(len(starts), bool)
    if tiles.samples != 3:
        return bad
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if not any(os.pread(file, min(64, end - start), (start + end) // 2)):
            bad[i] = not any(os.pread(file, end - start, start))
    return bad
