#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace motet {

// The functions of a libjpeg-turbo that is loaded at run time.
struct JpegLibrary;

// Returns the libjpeg-turbo of a shared library: its symbols, or those of a library that it is
// linked to. It is loaded once and never unloaded. Throws std::runtime_error if there is none.
const JpegLibrary& load_jpeg_library(const std::string& path);

// The tiles of a level of a TIFF: baseline JPEG of three samples, all of the same size.
struct JpegTiles {
    const JpegLibrary& library;
    int file;  // descriptor, read with pread
    std::vector<std::int64_t> offsets, counts;
    std::size_t columns, width, height;  // tiles per row of the level; px of a tile
    std::vector<std::uint8_t> tables;    // the tag JPEGTables, may be empty
    bool ycbcr;                          // false: the samples are red, green and blue

    std::size_t rows() const { return offsets.size() / columns; }
};

// A region of the level, which must lie within its tiles, and where its pixels are written.
struct JpegRegion {
    std::size_t x, y, width, height;
    std::uint8_t* out;
    std::ptrdiff_t stride;  // bytes from one row to the next
};

// Decodes the tiles of each region straight into its memory. Returns for each region "", or why a
// tile of it cannot be decoded without an error or a warning; its pixels are then undefined.
std::vector<std::string> read_regions(const JpegTiles& tiles, std::span<const JpegRegion> regions);

}  // namespace motet
