#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace motet {

constexpr std::size_t kMostInPiece = 7;             // the most pixels along a side of a piece
constexpr std::size_t kStainLevels = 16 * 255 + 1;  // mean levels, in sixteenths
constexpr std::size_t kStainPlanes = 4;             // numbers in the table per colour and level

// Patches of pixels, each cut into pieces at `down` and `across`, which rise from 0 to the patch's
// sides in steps of 1 to kMostInPiece. planes[p, patch, i, j] is the sum over the three colours of
// table[colour, mean of the piece, p]; within[patch, colour] is 256 times the sum of squares of the
// patch's pixels, less that of the means of the pieces.
void stain_planes(const std::uint8_t* pixels, std::size_t patches,
                  std::span<const std::int64_t> down, std::span<const std::int64_t> across,
                  const float* table, float* planes, std::int64_t* within);

}  // namespace motet
