#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace motet {

// Pixels of three bytes, without gaps within a row; rows may have gaps between them.
struct Image {
    const std::uint8_t* pixels;
    std::ptrdiff_t stride;  // bytes from one row to the next
    std::size_t height, width;
};

// out[i, j] is the mean of the image over [rows[i], rows[i] + ratio) x [columns[j], columns[j] +
// ratio), rounded to nearest, halves up; ratio >= 1. All windows lie within the image, except for
// rounding: what lies beyond the image is left out.
void area_resample(const Image& image, std::span<const double> rows,
                   std::span<const double> columns, double ratio, std::uint8_t* out,
                   std::ptrdiff_t out_stride);

}  // namespace motet
