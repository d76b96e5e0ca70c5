#include "area_resample.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "simd.hpp"

// The mean over a window of ratio x ratio pixels, one output pixel each. A window weighs the pixels
// at its edges by the share that it covers; weights are products of one for the row and one for the
// column. So rows are summed first, with their weights, into one line as long as a row, then the
// columns of that line, window by window.
//
// Sums are doubles (integers for whole pixels): a mean is exact to 1e-11 grey levels before it is
// rounded. This file is compiled without fused products, so that the bits are
// the same in registers of every width.
namespace motet {
namespace {

constexpr std::size_t kChannels = 3;
constexpr double kHalf = 0.5 + 1e-9;  // so that a half minus its rounding error is rounded up too
constexpr std::size_t kBlock = 1024;  // numbers of a row in a step, whose sums stay in the cache

// The pixels that a window covers along one axis: a share `head` of the first, `tail` of the last,
// and all of those between. A window within one pixel (its ratio is 1) has a tail of 0.
struct Window {
    std::size_t first, last;
    double head, tail;

    Window(double begin, double ratio, std::size_t side) {
        const double end = std::min(begin + ratio, static_cast<double>(side));
        const double low = std::floor(begin);
        first = static_cast<std::size_t>(low);
        last = std::max(first, static_cast<std::size_t>(std::ceil(end)) - 1);
        head = std::min(low + 1.0, end) - begin;
        tail = last > first ? end - static_cast<double>(last) : 0.0;
    }
};

std::vector<Window> windows(std::span<const double> begins, double ratio, std::size_t side) {
    std::vector<Window> result;
    result.reserve(begins.size());
    for (const double begin : begins) result.emplace_back(begin, ratio, side);
    return result;
}

// The part of each row that the columns cover: `size` bytes from byte `begin` on.
struct Strip {
    const Image& image;
    std::size_t begin, size;

    const std::uint8_t* row(std::size_t y) const {
        return image.pixels + static_cast<std::ptrdiff_t>(y) * image.stride + begin;
    }
};

// sums[i] = the sum of `count` numbers, from x on, of the rows [from, to).
template <typename Sum>
MOTET_INLINE void add_rows(const Strip& strip, std::size_t from, std::size_t to, std::size_t x,
                           std::size_t count, Sum* sums) {
    std::fill_n(sums, count, Sum{0});
    for (std::size_t y = from; y < to; ++y) {
        const std::uint8_t* row = strip.row(y) + x;
        for (std::size_t i = 0; i < count; ++i) sums[i] = static_cast<Sum>(sums[i] + row[i]);
    }
}

// Writes a pixel of three bytes. Four bytes are one store, and the fourth is overwritten by the
// next pixel; for the `last` pixel of a row it must not be written.
template <typename Bytes>
MOTET_INLINE void put(Bytes pixel, std::uint8_t* out, bool last) {
    static_assert(sizeof(pixel) == 4);
    std::memcpy(out, &pixel, last ? 3 : 4);
}

// Windows at any place and of any ratio.
struct Means {
    template <std::size_t>
    static MOTET_INLINE void run(const Strip& strip, const std::vector<Window>& rows,
                                 const std::vector<Window>& columns, double ratio,
                                 std::uint8_t* out, std::ptrdiff_t out_stride) {
        using Pixel = typename Lanes<double, 4>::type;  // red, green, blue, and the next one's red
        const double inverse = 1.0 / (ratio * ratio);
        const std::size_t left = strip.begin / kChannels;
        std::vector<double> line(strip.size + 1);
        std::uint32_t sums[kBlock];
        const auto at = [&](std::size_t x) MOTET_LAMBDA {
            Pixel pixel;
            std::memcpy(&pixel, line.data() + kChannels * (x - left), sizeof(pixel));
            return pixel;
        };
        for (const Window& row : rows) {
            for (std::size_t x = 0; x < strip.size; x += kBlock) {
                const std::size_t count = std::min(kBlock, strip.size - x);
                const std::uint8_t *head = strip.row(row.first) + x,
                                   *tail = strip.row(row.last) + x;
                double* to = line.data() + x;
                if (row.last == row.first + 2) {  // three rows: by far the most frequent case
                    const std::uint8_t* between = strip.row(row.first + 1) + x;
                    for (std::size_t i = 0; i < count; ++i)
                        to[i] = row.head * head[i] + between[i] + row.tail * tail[i];
                } else {
                    add_rows(strip, row.first + 1, row.last, x, count, sums);
                    for (std::size_t i = 0; i < count; ++i)
                        to[i] = row.head * head[i] + static_cast<std::int32_t>(sums[i]) +
                                row.tail * tail[i];
                }
            }
            for (std::size_t j = 0; j < columns.size(); ++j) {
                const Window& column = columns[j];
                Pixel sum = column.head * at(column.first);
                for (std::size_t x = column.first + 1; x < column.last; ++x) sum += at(x);
                sum += column.tail * at(column.last);
                const auto mean = __builtin_convertvector(sum * inverse + kHalf,
                                                          typename Lanes<std::int32_t, 4>::type);
                put(__builtin_convertvector(mean, typename Lanes<std::uint8_t, 4>::type),
                    out + kChannels * j, j + 1 == columns.size());
            }
            out += out_stride;
        }
    }
};

// Windows of N x N whole pixels, N a power of two: sums are integers. The mean of a window is
// computed at every number of the line, needed or not: a plain loop over vectors takes less time
// than loading the needed ones from scattered places.
template <std::size_t N>
struct WholePixels {
    template <std::size_t>
    static MOTET_INLINE void run(const Strip& strip, const std::vector<Window>& rows,
                                 const std::vector<Window>& columns, double, std::uint8_t* out,
                                 std::ptrdiff_t out_stride) {
        const std::size_t left = strip.begin / kChannels;
        const std::size_t count = strip.size - (N - 1) * kChannels;
        std::vector<std::uint16_t> line(strip.size);
        std::vector<std::uint8_t> means(count + 1);
        for (const Window& row : rows) {
            add_rows(strip, row.first, row.first + N, 0, strip.size, line.data());
            const std::uint16_t* from = line.data();
            for (std::size_t i = 0; i < count; ++i) {
                std::uint16_t sum = N * N / 2;
                for (std::size_t x = 0; x < N; ++x)
                    sum = static_cast<std::uint16_t>(sum + from[i + kChannels * x]);
                means[i] = static_cast<std::uint8_t>(sum / (N * N));
            }
            for (std::size_t j = 0; j < columns.size(); ++j) {
                std::uint32_t pixel;
                std::memcpy(&pixel, means.data() + kChannels * (columns[j].first - left), 4);
                put(pixel, out + kChannels * j, j + 1 == columns.size());
            }
            out += out_stride;
        }
    }
};

// A ratio of 1 on whole pixels: copies them, as many at a time as lie side by side.
void copy(const Strip& strip, const std::vector<Window>& rows, const std::vector<Window>& columns,
          std::uint8_t* out, std::ptrdiff_t out_stride) {
    const std::size_t left = strip.begin / kChannels;
    for (const Window& row : rows) {
        for (std::size_t j = 0, next; j < columns.size(); j = next) {
            for (next = j + 1;
                 next < columns.size() && columns[next].first == columns[next - 1].first + 1;)
                ++next;
            std::memcpy(out + kChannels * j,
                        strip.row(row.first) + kChannels * (columns[j].first - left),
                        kChannels * (next - j));
        }
        out += out_stride;
    }
}

// Returns whether all numbers are integers.
bool are_integers(std::span<const double> numbers) {
    return std::all_of(numbers.begin(), numbers.end(), [](double x) { return x == std::floor(x); });
}

template <typename Body>
auto compiled() {
    return Compiled<Body, const Strip&, const std::vector<Window>&, const std::vector<Window>&,
                    double, std::uint8_t*, std::ptrdiff_t>::chosen();
}

}  // namespace

void area_resample(const Image& image, std::span<const double> rows,
                   std::span<const double> columns, double ratio, std::uint8_t* out,
                   std::ptrdiff_t out_stride) {
    if (rows.empty() || columns.empty()) return;
    const auto down = windows(rows, ratio, image.height);
    const auto across = windows(columns, ratio, image.width);
    std::size_t left = image.width, right = 0;
    for (const Window& column : across) {
        left = std::min(left, column.first);
        right = std::max(right, column.last + 1);
    }
    const Strip strip{image, kChannels * left, kChannels * (right - left)};
    const bool on_pixels = are_integers(rows) && are_integers(columns);
    if (on_pixels && ratio == 1.0)
        copy(strip, down, across, out, out_stride);
    else if (on_pixels && ratio == 2.0)
        compiled<WholePixels<2>>()(strip, down, across, ratio, out, out_stride);
    else if (on_pixels && ratio == 4.0)
        compiled<WholePixels<4>>()(strip, down, across, ratio, out, out_stride);
    else
        compiled<Means>()(strip, down, across, ratio, out, out_stride);
}

}  // namespace motet
