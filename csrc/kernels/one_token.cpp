#include "one_token.hpp"

#include <algorithm>
#include <memory>

#include "parallel.hpp"
#include "simd.hpp"

namespace motet {
namespace {

// Before a loop of constant length: once it is unrolled, the arrays that it indexes are registers.
#define MOTET_UNROLL _Pragma("GCC unroll 16")

// Backward, the columns are divided among threads in units of 16: a multiple of the numbers of a
// pack of any width.
constexpr std::size_t unit = 16;

// Calls use(0), ..., use(N - 1), each with a compile-time constant: for template arguments, and
// where even an unrolled loop would compute addresses more slowly.
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

// Loads a row of `inputs` numbers as packs: full ones, then one with the last `tail` numbers.
template <typename T, std::size_t Bytes>
struct Row {
    static constexpr std::size_t lanes = Bytes / sizeof(T);
    static constexpr std::size_t block = 2048 / sizeof(T);  // numbers of a row in a step: 2 KiB
    using Pack = typename Lanes<T, lanes>::type;
    using Mask = typename Lanes<Integer<T>, lanes>::type;

    std::size_t inputs, tail;
    Mask kept{};

    explicit MOTET_INLINE Row(std::size_t inputs) : inputs(inputs), tail(inputs % lanes) {
        for (std::size_t i = lanes - tail; i < lanes; ++i) kept[i] = -1;
    }

    static MOTET_INLINE Pack load(const T* x) {
        Pack pack;
        std::memcpy(&pack, x, sizeof(Pack));
        return pack;
    }

    // Returns the last `tail` numbers of a row, at the end of a pack whose other numbers are zero.
    // A row of at least a pack is read from its end backwards, and numbers that were read before
    // are masked out: so nothing behind the row is read.
    MOTET_INLINE Pack last(const T* row) const {
        if (inputs >= lanes)
            return std::bit_cast<Pack>(std::bit_cast<Mask>(load(row + inputs - lanes)) & kept);
        Pack pack = {};
        std::memcpy(reinterpret_cast<char*>(&pack) + (lanes - tail) * sizeof(T), row,
                    tail * sizeof(T));
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

// Forward: the products of all rows with the weight rows [begin, end), y[r][m] = x[r] . weight[m].
//
// Each weight is read from memory once, and multiplied with all rows. The rows, up to FEW_ROWS of
// kernels/one_token/cpu.py, are packed first: aligned, with the packs of the R rows of a group side
// by side. A block of 2 KiB of each row stays in the nearest cache while `stretch` weight rows are
// read; the sums of these, R x stretch packs, are kept in `sums` from one block to the next. In the
// innermost loop R x W sums are in registers. The numbers of a pack are added up at the end, always
// in the same order: so a result has the same bits whatever the other rows and the threads.
template <typename T, std::size_t Bytes>
struct Forward : Row<T, Bytes> {
    using Base = Row<T, Bytes>;
    using Pack = typename Base::Pack;
    static constexpr std::size_t lanes = Base::lanes;
    static constexpr std::size_t registers = Bytes == 64 ? 16 : 8;  // for sums: half of all
    static constexpr std::size_t group = registers / 2;             // rows at a time
    static constexpr std::size_t stretch = 16;                      // weight rows per block

    const Product<T>& p;
    Pack sums[stretch * group];

    explicit MOTET_INLINE Forward(const Product<T>& p) : Base(p.inputs), p(p) {}

    // Adds the products of R rows and W weight rows over the numbers [at, stop) to their sums. The
    // rows of the next weights are prefetched.
    template <std::size_t R, std::size_t W>
    MOTET_INLINE void add(const Pack* x, std::size_t at, std::size_t stop, const T* w,
                          Pack* sums) const {
        Pack total[R][W];
        const std::size_t k = p.inputs;
        const auto multiply = [&](auto load) MOTET_LAMBDA {
            Pack weights[W];
            unrolled<W>([&](auto j) MOTET_LAMBDA { weights[j] = load(w + j * k); });
            MOTET_UNROLL
            for (std::size_t r = 0; r < R; ++r) {
                MOTET_UNROLL
                for (std::size_t j = 0; j < W; ++j) total[r][j] += x[r] * weights[j];
            }
            x += R;
        };
        MOTET_UNROLL
        for (std::size_t r = 0; r < R; ++r) {
            MOTET_UNROLL
            for (std::size_t j = 0; j < W; ++j) total[r][j] = at ? sums[j * R + r] : Pack{};
        }
        std::size_t i = at;
        for (; i + lanes <= stop; i += lanes) {
            unrolled<W>([&](auto j) MOTET_LAMBDA { __builtin_prefetch(w + (W + j) * k + i); });
            multiply([&](const T* row) MOTET_LAMBDA { return this->load(row + i); });
        }
        if (i < stop) multiply([&](const T* row) MOTET_LAMBDA { return this->last(row); });
        MOTET_UNROLL
        for (std::size_t r = 0; r < R; ++r) {
            MOTET_UNROLL
            for (std::size_t j = 0; j < W; ++j) sums[j * R + r] = total[r][j];
        }
    }

    template <std::size_t R>
    MOTET_INLINE void rows(const Pack* x, std::size_t row, std::size_t m, std::size_t count) {
        constexpr std::size_t W = registers / R;
        const std::size_t k = p.inputs;
        for (std::size_t at = 0; at < k; at += this->block) {
            const std::size_t stop = std::min(at + this->block, k);
            const Pack* block_x = x + at / lanes * R;
            std::size_t j = 0;
            for (; j + W <= count; j += W)
                add<R, W>(block_x, at, stop, p.weight + (m + j) * k, sums + j * R);
            for (; j < count; ++j)
                add<R, 1>(block_x, at, stop, p.weight + (m + j) * k, sums + j * R);
        }
        for (std::size_t j = 0; j < count; ++j)
            for (std::size_t r = 0; r < R; ++r)
                p.out[(row + r) * p.outputs + m + j] = k ? this->sum(sums[j * R + r]) : T{0};
    }

    static MOTET_INLINE void run(const Product<T>& p, std::size_t begin, std::size_t end) {
        Forward forward(p);
        const std::size_t groups = (p.rows + group - 1) / group;
        const std::size_t packs = (p.inputs + lanes - 1) / lanes;
        const auto first = [&](std::size_t g) { return p.rows * g / groups; };
        const std::unique_ptr<Cell[]> storage(new Cell[p.rows * packs]);
        Pack* const packed = reinterpret_cast<Pack*>(storage.get());
        for (std::size_t g = 0; g < groups; ++g)
            for (std::size_t r = first(g), R = first(g + 1) - r, i = 0; i < R; ++i)
                for (std::size_t j = 0; j < packs; ++j) {
                    const T* row = p.left + (r + i) * p.inputs;
                    packed[r * packs + j * R + i] = (j + 1) * lanes <= p.inputs
                                                        ? forward.load(row + j * lanes)
                                                        : forward.last(row);
                }
        for (std::size_t m = begin; m < end; m += stretch)
            for (std::size_t g = 0; g < groups; ++g)
                unrolled<group>([&](auto r) MOTET_LAMBDA {
                    if (first(g + 1) - first(g) == r + 1)
                        forward.template rows<r + 1>(packed + first(g) * packs, first(g), m,
                                                     std::min(stretch, end - m));
                });
    }

  private:
    struct Cell {
        Pack pack;
    };
};

// Backward: all rows of out[r] = sum_m left[r][m] weight[m], in the columns [begin, end), counted
// in units. The sums of a block of columns, 2 KiB of each of up to 8 rows, stay in the nearest
// cache while all weights of these columns are read; `together` weight rows at a time are in
// registers. The order of the additions is that of m, whatever the threads.
template <typename T, std::size_t Bytes>
struct Backward : Row<T, Bytes> {
    using Base = Row<T, Bytes>;
    using Pack = typename Base::Pack;
    static constexpr std::size_t lanes = Base::lanes;
    static constexpr std::size_t together = Bytes == 64 ? 8 : 4;  // weight rows in registers
    static constexpr std::size_t group = 8;                       // rows at a time
    static constexpr std::size_t width = Base::block / lanes;

    const Product<T>& p;
    Pack sums[group][width];

    explicit MOTET_INLINE Backward(const Product<T>& p) : Base(p.inputs), p(p) {}

    // Adds the weight rows m to m + W, each times its number in each row, in the columns [at,
    // stop).
    template <std::size_t W>
    MOTET_INLINE void add(std::size_t row, std::size_t rows, std::size_t m, std::size_t at,
                          std::size_t stop) {
        const std::size_t k = p.inputs;
        const T* w = p.weight + m * k;
        const auto add_packs = [&](std::size_t place, auto count, auto load) MOTET_LAMBDA {
            constexpr std::size_t N = count;
            Pack weights[W][N];
            unrolled<W>([&](auto j) MOTET_LAMBDA {
                unrolled<N>([&](auto n) MOTET_LAMBDA { weights[j][n] = load(w + j * k, n); });
            });
            for (std::size_t r = 0; r < rows; ++r) {
                const T* left = p.left + (row + r) * p.outputs + m;
                Pack* row_sums = sums[r] + place;
                Pack total[N];
                unrolled<N>([&](auto n) MOTET_LAMBDA { total[n] = row_sums[n]; });
                unrolled<W>([&](auto j) MOTET_LAMBDA {
                    unrolled<N>([&](auto n) MOTET_LAMBDA { total[n] += left[j] * weights[j][n]; });
                });
                unrolled<N>([&](auto n) MOTET_LAMBDA { row_sums[n] = total[n]; });
            }
        };
        std::size_t i = at;
        const auto next = [&](const T* from, std::size_t n) MOTET_LAMBDA {
            __builtin_prefetch(from + W * k + i + n * lanes);
            return this->load(from + i + n * lanes);
        };
        for (; i + 2 * lanes <= stop; i += 2 * lanes)
            add_packs((i - at) / lanes, std::integral_constant<std::size_t, 2>(), next);
        for (; i + lanes <= stop; i += lanes)
            add_packs((i - at) / lanes, std::integral_constant<std::size_t, 1>(), next);
        if (i < stop)
            add_packs((i - at) / lanes, std::integral_constant<std::size_t, 1>(),
                      [&](const T* from, std::size_t) MOTET_LAMBDA { return this->last(from); });
    }

    MOTET_INLINE void columns(std::size_t row, std::size_t rows, std::size_t at, std::size_t stop) {
        for (std::size_t r = 0; r < rows; ++r)
            for (auto& pack : sums[r]) pack = Pack{};
        std::size_t m = 0;
        for (; m + together <= p.outputs; m += together) add<together>(row, rows, m, at, stop);
        for (; m < p.outputs; ++m) add<1>(row, rows, m, at, stop);
        const std::size_t full = (stop - at) / lanes * lanes, tail = stop - at - full;
        for (std::size_t r = 0; r < rows; ++r) {
            T* out = p.out + (row + r) * p.inputs + at;
            std::memcpy(out, sums[r], full * sizeof(T));
            for (std::size_t i = 0; i < tail; ++i)
                out[full + i] = sums[r][full / lanes][lanes - tail + i];
        }
    }

    static MOTET_INLINE void run(const Product<T>& p, std::size_t begin, std::size_t end) {
        Backward backward(p);
        const std::size_t last = std::min(end * unit, p.inputs);
        for (std::size_t at = begin * unit; at < last; at += backward.block)
            for (std::size_t row = 0; row < p.rows; row += group)
                backward.columns(row, std::min(group, p.rows - row), at,
                                 std::min(at + backward.block, last));
    }
};

template <template <typename, std::size_t> typename Direction, typename T>
struct Body {
    template <std::size_t Bytes>
    static MOTET_INLINE void run(const Product<T>& p, std::size_t begin, std::size_t end) {
        Direction<T, Bytes>::run(p, begin, end);
    }

    // With fewer numbers than 32,768, torch's grain, starting a thread takes longer than the work.
    static void all(const Product<T>& p, std::size_t size, int threads) {
        const auto chosen = Compiled<Body, const Product<T>&, std::size_t, std::size_t>::chosen();
        const auto numbers = p.outputs * p.inputs;
        const auto useful = static_cast<int>(std::min<std::size_t>(numbers / 32768 + 1, 1024));
        parallel_for(p.rows ? size : 0, std::min(threads, useful),
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
    Body<Backward, T>::all({grad, weight, rows, outputs, inputs, out}, (inputs + unit - 1) / unit,
                           threads);
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
