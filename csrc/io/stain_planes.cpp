#include "stain_planes.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "simd.hpp"

// A patch is cut into pieces of some 4 x 4 pixels. Of each piece and colour the mean level is
// computed in integers, in sixteenths, and looked up in a table of four float planes; the entries
// of the three colours are added in their order. So the bits are the same in registers of every
// width, and those that numpy gives. Beside the planes, the sum of squares within the pieces is
// computed: how much the pixels differ from the means of their pieces.
namespace motet {
namespace {

constexpr std::size_t kChannels = 3;
// Rows of pieces after which the sums of squares are moved to 64 bits: 8192 x 7 x 255^2 < 2^32.
constexpr std::size_t kFlush = 8192;

using Cell = Lanes<float, kStainPlanes>::type;
using Sums = Lanes<std::uint16_t, 4>::type;  // red, green, blue, and the next one's red

struct Patch {
    const std::uint8_t* pixels;
    std::span<const std::int64_t> down, across;
    const float* table;
    float* planes;       // the first plane of this patch
    std::size_t stride;  // floats from one plane to the next
    std::int64_t* within;
};

// A square of 8 bits fits 16, in which vectors have twice as many numbers as in 32.
MOTET_INLINE std::uint32_t square(std::uint8_t level) {
    return static_cast<std::uint16_t>(level * level);
}

// Sums the `count` rows of pieces, number by number: `sums` anew, and squares on top of `squares`.
MOTET_INLINE void add_rows(const std::uint8_t* rows, std::size_t count, std::size_t size,
                           std::uint16_t* sums, std::uint32_t* squares) {
    if (count == 4) {  // by far the most frequent case
        const std::uint8_t *second = rows + size, *third = second + size, *last = third + size;
        for (std::size_t i = 0; i < size; ++i) {
            const std::uint8_t a = rows[i], b = second[i], c = third[i], d = last[i];
            sums[i] = static_cast<std::uint16_t>(a + b + c + d);
            squares[i] += square(a) + square(b) + square(c) + square(d);
        }
        return;
    }
    std::fill_n(sums, size, std::uint16_t{0});
    for (std::size_t y = 0; y < count; ++y, rows += size)
        for (std::size_t i = 0; i < size; ++i) {
            sums[i] = static_cast<std::uint16_t>(sums[i] + rows[i]);
            squares[i] += square(rows[i]);
        }
}

struct Planes {
    template <std::size_t>
    static MOTET_INLINE void run(const Patch& patch) {
        const std::size_t height = patch.down.size() - 1, width = patch.across.size() - 1;
        const std::size_t size = kChannels * static_cast<std::size_t>(patch.across.back());
        std::vector<std::uint32_t> squares(size);
        std::vector<std::uint16_t> sums(size + 1);
        std::vector<float> cells(kStainPlanes * width);
        std::array<std::uint64_t, kChannels> total{}, between{};
        for (std::size_t i = 0; i < height; ++i) {
            const auto rows = static_cast<std::size_t>(patch.down[i + 1] - patch.down[i]);
            add_rows(patch.pixels + size * static_cast<std::size_t>(patch.down[i]), rows, size,
                     sums.data(), squares.data());
            if ((i + 1) % kFlush == 0 || i + 1 == height) {
                for (std::size_t x = 0; x < size; x += kChannels)
                    for (std::size_t c = 0; c < kChannels; ++c) total[c] += squares[x + c];
                std::fill(squares.begin(), squares.end(), 0);
            }
            for (std::size_t j = 0; j < width; ++j) {
                const auto begin = static_cast<std::size_t>(patch.across[j]);
                const auto columns = static_cast<std::size_t>(patch.across[j + 1]) - begin;
                const auto at = [&](std::size_t x) MOTET_LAMBDA {
                    Sums pixel;
                    std::memcpy(&pixel, sums.data() + kChannels * (begin + x), sizeof(pixel));
                    return pixel;
                };
                Sums sum = at(0);
                for (std::size_t x = 1; x < columns; ++x) sum += at(x);
                const auto area = static_cast<std::uint32_t>(rows * columns);
                Cell cell{};
                for (std::size_t c = 0; c < kChannels; ++c) {
                    const std::uint32_t mean =
                        area == 16 ? sum[c] : (sum[c] * 16u + area / 2) / area;
                    between[c] += area * mean * mean;
                    Cell entry;
                    std::memcpy(&entry, patch.table + kStainPlanes * (kStainLevels * c + mean),
                                sizeof(entry));
                    cell = c ? cell + entry : entry;
                }
                std::memcpy(cells.data() + kStainPlanes * j, &cell, sizeof(cell));
            }
            for (std::size_t p = 0; p < kStainPlanes; ++p) {
                float* plane = patch.planes + patch.stride * p + width * i;
                for (std::size_t j = 0; j < width; ++j) plane[j] = cells[kStainPlanes * j + p];
            }
        }
        for (std::size_t c = 0; c < kChannels; ++c)
            patch.within[c] = static_cast<std::int64_t>(256 * total[c] - between[c]);
    }
};

}  // namespace

void stain_planes(const std::uint8_t* pixels, std::size_t patches,
                  std::span<const std::int64_t> down, std::span<const std::int64_t> across,
                  const float* table, float* planes, std::int64_t* within) {
    const std::size_t cells = (down.size() - 1) * (across.size() - 1);
    const auto bytes = kChannels * static_cast<std::size_t>(down.back() * across.back());
    for (std::size_t i = 0; i < patches; ++i)
        Compiled<Planes, const Patch&>::chosen()({pixels + bytes * i, down, across, table,
                                                  planes + cells * i, cells * patches,
                                                  within + kChannels * i});
}

}  // namespace motet
