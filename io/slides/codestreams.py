"""The headers of JPEG and JPEG 2000 tiles: what stands before their coded data."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray

HOLE_BYTES = 32  # zero bytes in a row that are damage in coded data

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
