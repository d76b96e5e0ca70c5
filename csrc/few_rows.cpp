#include "few_rows.hpp"

#include <algorithm>

#include "parallel.hpp"
#include "simd.hpp"

namespace motet {
namespace {

// Calls use(0), ..., use(N - 1), each with a constant, so that arrays they index are registers.
template <std::size_t N, typename Use>
MOTET_INLINE void unrolled(Use use) {
    [&]<std::size_t... I>(std::index_sequence<I...>) MOTET_LAMBDA {
        (use(std::integral_constant<std::size_t, I>()), ...);
    }(std::make_index_sequence<N>());
}

template <typename T>
struct Product {
    const T* left;  // x, or the gradient
    const T* weight;
    std::size_t rows, outputs, inputs;
    T* out;
};

template <typename T, std::size_t Bytes>
struct Simd {
    static constexpr std::size_t lanes = Bytes / sizeof(T);
    using Pack = typename Lanes<T, lanes>::type;

    static MOTET_INLINE Pack load(const T* x) {
        Pack pack;
        std::memcpy(&pack, x, sizeof(Pack));
        return pack;
    }
    static MOTET_INLINE void store(T* x, Pack pack) { std::memcpy(x, &pack, sizeof(Pack)); }

    // The `count` numbers before `end`, fewer than a pack, with zeros for the others. Where the
    // row is as long as a pack, that one is loaded, which is quicker than to copy by count.
    static MOTET_INLINE Pack last(const T* end, std::size_t count, bool whole) {
        Pack pack = {};
        if (whole) {
            pack = load(end - lanes);
            for (std::size_t i = 0; i < lanes; ++i) pack[i] = i < lanes - count ? 0 : pack[i];
        } else {
            for (std::size_t i = 0; i < count; ++i) pack[lanes - count + i] = end[i - count];
        }
        return pack;
    }

    template <typename Part>
    static MOTET_INLINE T sum(Part pack) {
        if constexpr (sizeof(Part) == 2 * sizeof(T)) {
            return pack[0] + pack[1];
        } else {
            using Half = typename Lanes<T, sizeof(Part) / sizeof(T) / 2>::type;
            const auto halves = std::bit_cast<std::array<Half, 2>>(pack);
            return sum(halves[0] + halves[1]);
        }
    }
};

// R rows by weight rows [begin, end), up to R * W sums in registers.
template <typename T, std::size_t Bytes>
struct Forward : Simd<T, Bytes> {
    using S = Simd<T, Bytes>;
    using Pack = typename S::Pack;
    static constexpr std::size_t sums = Bytes == 64 ? 16 : 8;  // of 32 or 16 registers
    static constexpr std::size_t group = sums / 2;
    static constexpr std::size_t stretch = 16;  // weight rows for all groups of rows in turn

    template <std::size_t R, std::size_t W>
    static MOTET_INLINE void block(const Product<T>& p, std::size_t row, std::size_t m) {
        const std::size_t k = p.inputs;
        const T* x = p.left + row * k;
        const T* w = p.weight + m * k;
        Pack total[R][W] = {};
        const auto add = [&](auto load) MOTET_LAMBDA {
            Pack weights[W];
            unrolled<W>([&](auto j) MOTET_LAMBDA { weights[j] = load(w + j * k); });
            unrolled<R>([&](auto r) MOTET_LAMBDA {
                const Pack own = load(x + r * k);
                unrolled<W>([&](auto j) MOTET_LAMBDA { total[r][j] += own * weights[j]; });
            });
        };
        std::size_t i = 0;
        for (; i + S::lanes <= k; i += S::lanes) {
            unrolled<W>([&](auto j) MOTET_LAMBDA { __builtin_prefetch(w + (W + j) * k + i); });
            add([&](const T* from) MOTET_LAMBDA { return S::load(from + i); });
        }
        if (i < k)
            add([&](const T* from)
                    MOTET_LAMBDA { return S::last(from + k, k - i, k >= S::lanes); });
        unrolled<R>([&](auto r) MOTET_LAMBDA {
            unrolled<W>([&](auto j) MOTET_LAMBDA {
                p.out[(row + r) * p.outputs + m + j] = S::sum(total[r][j]);
            });
        });
    }

    template <std::size_t R>
    static MOTET_INLINE void blocks(const Product<T>& p, std::size_t row, std::size_t begin,
                                    std::size_t end) {
        constexpr std::size_t W = sums / R;
        std::size_t m = begin;
        for (; m + W <= end; m += W) block<R, W>(p, row, m);
        for (; m < end; ++m) block<R, 1>(p, row, m);
    }

    static MOTET_INLINE void run(const Product<T>& p, std::size_t begin, std::size_t end) {
        const std::size_t groups = (p.rows + group - 1) / group;
        for (std::size_t m = begin; m < end; m += stretch)
            for (std::size_t g = 0; g < groups; ++g) {
                const std::size_t row = p.rows * g / groups;
                const std::size_t count = p.rows * (g + 1) / groups - row;
                unrolled<group>([&](auto r) MOTET_LAMBDA {
                    if (count == r + 1) blocks<r + 1>(p, row, m, std::min(m + stretch, end));
                });
            }
    }
};

// Columns [begin, end) of all rows. A block of them stays in the cache while the weights pass.
template <typename T, std::size_t Bytes>
struct Backward : Simd<T, Bytes> {
    using S = Simd<T, Bytes>;
    using Pack = typename S::Pack;
    static constexpr std::size_t together = Bytes == 64 ? 8 : 4;  // weight rows in registers
    static constexpr std::size_t columns = 2048 / sizeof(T);

    // Adds W weight rows from m on, each times its number of `left`.
    template <std::size_t W>
    static MOTET_INLINE void add(const Product<T>& p, std::size_t m, std::size_t begin,
                                 std::size_t end) {
        const std::size_t k = p.inputs;
        const T* w = p.weight + m * k;
        const auto some = [&]<std::size_t N>(std::size_t i,
                                             std::integral_constant<std::size_t, N>) MOTET_LAMBDA {
            Pack weights[W][N];
            unrolled<W>([&](auto j) MOTET_LAMBDA {
                unrolled<N>([&](auto n) MOTET_LAMBDA {
                    __builtin_prefetch(w + (W + j) * k + i + n * S::lanes);
                    weights[j][n] = S::load(w + j * k + i + n * S::lanes);
                });
            });
            for (std::size_t r = 0; r < p.rows; ++r) {
                T* out = p.out + r * k + i;
                const T* left = p.left + r * p.outputs + m;
                Pack total[N];
                unrolled<N>([&](auto n) MOTET_LAMBDA { total[n] = S::load(out + n * S::lanes); });
                unrolled<W>([&](auto j) MOTET_LAMBDA {
                    unrolled<N>([&](auto n) MOTET_LAMBDA { total[n] += left[j] * weights[j][n]; });
                });
                unrolled<N>([&](auto n) MOTET_LAMBDA { S::store(out + n * S::lanes, total[n]); });
            }
        };
        std::size_t i = begin;
        for (; i + 2 * S::lanes <= end; i += 2 * S::lanes)
            some(i, std::integral_constant<std::size_t, 2>());
        for (; i + S::lanes <= end; i += S::lanes)
            some(i, std::integral_constant<std::size_t, 1>());
        for (; i < end; ++i)
            for (std::size_t r = 0; r < p.rows; ++r)
                for (std::size_t j = 0; j < W; ++j)
                    p.out[r * k + i] += p.left[r * p.outputs + m + j] * w[j * k + i];
    }

    static MOTET_INLINE void run(const Product<T>& p, std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; i += columns) {
            const std::size_t stop = std::min(i + columns, end);
            for (std::size_t r = 0; r < p.rows; ++r)
                std::fill(p.out + r * p.inputs + i, p.out + r * p.inputs + stop, T{0});
            std::size_t m = 0;
            for (; m + together <= p.outputs; m += together) add<together>(p, m, i, stop);
            for (; m < p.outputs; ++m) add<1>(p, m, i, stop);
        }
    }
};

template <template <typename, std::size_t> typename Way, typename T>
struct Body {
    template <std::size_t Bytes>
    static MOTET_INLINE void run(const Product<T>& p, std::size_t begin, std::size_t end) {
        Way<T, Bytes>::run(p, begin, end);
    }

    // Below torch's own grain, starting a thread takes longer than the work.
    static void all(const Product<T>& p, std::size_t size, int threads) {
        const auto chosen = Compiled<Body, const Product<T>&, std::size_t, std::size_t>::chosen();
        const auto numbers = p.outputs * p.inputs;
        const auto useful = static_cast<int>(std::min<std::size_t>(numbers / 32768 + 1, 1024));
        parallel_for(size, std::min(threads, useful),
                     [&](std::size_t begin, std::size_t end) { chosen(p, begin, end); });
    }
};

}  // namespace

template <typename T>
void few_rows(const T* x, const T* weight, std::size_t rows, std::size_t outputs,
              std::size_t inputs, T* out, int threads) {
    Body<Forward, T>::all({x, weight, rows, outputs, inputs, out}, outputs, threads);
}

template <typename T>
void few_rows_backward(const T* grad, const T* weight, std::size_t rows, std::size_t outputs,
                       std::size_t inputs, T* out, int threads) {
    Body<Backward, T>::all({grad, weight, rows, outputs, inputs, out}, inputs, threads);
}

template void few_rows(const float*, const float*, std::size_t, std::size_t, std::size_t, float*,
                       int);
template void few_rows(const double*, const double*, std::size_t, std::size_t, std::size_t, double*,
                       int);
template void few_rows_backward(const float*, const float*, std::size_t, std::size_t, std::size_t,
                                float*, int);
template void few_rows_backward(const double*, const double*, std::size_t, std::size_t, std::size_t,
                                double*, int);

}  // namespace motet
