#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace motet {

// Pixels of three bytes without gaps, in rows that may have some.
struct Image {
    const std::uint8_t* pixels;
    std::ptrdiff_t stride;  // bytes from one row to the next
    std::size_t height, width;
};

// out[i, j] is the mean of the image over [rows[i], rows[i] + ratio) x [columns[j], columns[j] +
// ratio), rounded to nearest, halves up. All windows lie within the image, give or
// take rounding, of which what is beyond counts nothing; ratio >= 1.
void area_resample(const Image& image, std::span<const double> rows,
                   std::span<const double> columns, double ratio, std::uint8_t* out,
                   std::ptrdiff_t out_stride);

}  // namespace motet
