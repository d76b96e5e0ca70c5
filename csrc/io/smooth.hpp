#pragma once

#include <cstddef>
#include <span>

namespace motet {

// out = image [height, width] convolved along both axes with a kernel that is symmetric: weights[0]
// is the middle, weights[i] that of both pixels at distance i. The image is continued by its edges.
// Sums are doubles, added from the largest distance to the smallest; between the axes pixels are
// rounded to float, as in scipy.ndimage.gaussian_filter. `out` must not overlap the image.
void smooth(const float* image, std::size_t height, std::size_t width,
            std::span<const double> weights, float* out);

}  // namespace motet
