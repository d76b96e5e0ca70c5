#include "smooth.hpp"

#include <algorithm>
#include <vector>

#include "simd.hpp"

// This file is compiled without fused products, so that the bits are the same in registers of every
// width.
namespace motet {
namespace {

constexpr std::size_t kBlock = 512;  // columns in a step, whose sums stay in the cache

struct Task {
    const float* image;
    std::size_t height, width;
    std::span<const double> weights;
    float* out;
};

struct Smooth {
    // out[x] = weights[0] middle[x] + the sum of weights[i] (before(i)[x] + after(i)[x]).
    template <typename Number, typename Before, typename After>
    static MOTET_INLINE void add_lines(std::span<const double> weights, const Number* middle,
                                       const Before& before, const After& after, std::size_t count,
                                       float* out) {
        double sums[kBlock];
        for (std::size_t x = 0; x < count; ++x)
            sums[x] = static_cast<double>(middle[x]) * weights[0];
        for (auto i = weights.size() - 1; i > 0; --i) {
            const Number *low = before(i), *high = after(i);
            const double weight = weights[i];
            for (std::size_t x = 0; x < count; ++x)
                sums[x] += (static_cast<double>(low[x]) + static_cast<double>(high[x])) * weight;
        }
        for (std::size_t x = 0; x < count; ++x) out[x] = static_cast<float>(sums[x]);
    }

    template <std::size_t>
    static MOTET_INLINE void run(const Task& task) {
        const auto [image, height, width, weights, out] = task;
        const std::size_t reach = weights.size() - 1;
        std::vector<float> column(width);            // a row after the vertical sums
        std::vector<double> row(width + 2 * reach);  // the same, continued on both sides
        for (std::size_t y = 0; y < height; ++y) {
            for (std::size_t x = 0; x < width; x += kBlock) {
                const auto at = [&](std::size_t line)
                                    MOTET_LAMBDA { return image + width * line + x; };
                const auto before = [&](std::size_t i) { return at(y > i ? y - i : 0); };
                const auto after = [&](std::size_t i) { return at(std::min(y + i, height - 1)); };
                add_lines(weights, at(y), before, after, std::min(kBlock, width - x),
                          column.data() + x);
            }
            std::fill_n(row.begin(), reach, static_cast<double>(column.front()));
            std::copy(column.begin(), column.end(),
                      row.begin() + static_cast<std::ptrdiff_t>(reach));
            std::fill_n(row.end() - static_cast<std::ptrdiff_t>(reach), reach,
                        static_cast<double>(column.back()));
            for (std::size_t x = 0; x < width; x += kBlock) {
                const double* const middle = row.data() + reach + x;
                const auto before = [&](std::size_t i) { return middle - i; };
                const auto after = [&](std::size_t i) { return middle + i; };
                add_lines(weights, middle, before, after, std::min(kBlock, width - x),
                          out + width * y + x);
            }
        }
    }
};

}  // namespace

void smooth(const float* image, std::size_t height, std::size_t width,
            std::span<const double> weights, float* out) {
    if (height && width)
        Compiled<Smooth, const Task&>::chosen()({image, height, width, weights, out});
}

}  // namespace motet
