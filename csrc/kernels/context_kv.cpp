#include "context_kv.hpp"

#include <algorithm>
#include <type_traits>

#include "parallel.hpp"
#include "simd.hpp"

namespace motet {
namespace {

struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};

// Loads, stores and sums of vectors of Wide: float, or double for rows of double. Half precision is
// converted in registers, since compilers have no vectors of it for all processors.
template <typename Wide, std::size_t Bytes>
struct Simd {
    static constexpr std::size_t lanes = Bytes / sizeof(Wide);
    using Pack = typename Lanes<Wide, lanes>::type;
    using Bits = typename Lanes<std::uint32_t, lanes>::type;
    using Halves = typename Lanes<std::uint16_t, lanes>::type;

    static MOTET_INLINE Pack widened(Halves halves, bfloat16) {
        return std::bit_cast<Pack>(__builtin_convertvector(halves, Bits) << 16);
    }
    // Moves exponent and mantissa to their places in a float, then multiplies by 2^112, the
    // difference of the exponents' biases. The product is exact, of subnormal numbers too, unless
    // the thread flushes these to zero.
    static MOTET_INLINE Pack widened(Halves halves, float16) {
        const Bits bits = __builtin_convertvector(halves, Bits), magnitude = bits & 0x7fffu;
        const auto scaled = std::bit_cast<Bits>(std::bit_cast<Pack>(magnitude << 13) * 0x1p112f);
        const auto special = std::bit_cast<Bits>(magnitude >= 0x7c00u) & 0x7f800000u;  // inf, NaN
        return std::bit_cast<Pack>(scaled | (bits & 0x8000u) << 16 | special);
    }

    // Loads `count` numbers, at most a pack, followed by zeros.
    template <typename In>
    static MOTET_INLINE Pack load(const In* x, std::size_t count) {
        if constexpr (std::is_same_v<In, Wide>) {
            Pack pack = {};
            std::memcpy(&pack, x, count * sizeof(In));
            return pack;
        } else {
            Halves halves = {};
            std::memcpy(&halves, x, count * sizeof(In));
            return widened(halves, In{});
        }
    }

    static MOTET_INLINE void store(Wide* out, Pack pack, std::size_t count) {
        std::memcpy(out, &pack, count * sizeof(Wide));
    }
    // Rounds to nearest, ties to even; NaN stays NaN.
    static MOTET_INLINE void store(bfloat16* out, Pack pack, std::size_t count) {
        const auto bits = std::bit_cast<Bits>(pack);
        const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const auto nan = std::bit_cast<Bits>(pack != pack);
        const Halves halves = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Halves);
        std::memcpy(out, &halves, count * sizeof(bfloat16));
    }

    static MOTET_INLINE Wide sum(const Pack (&packs)[2]) {
        const Pack both = packs[0] + packs[1];
        Wide total = 0;
        for (std::size_t i = 0; i < lanes; ++i) total += both[i];
        return total;
    }

    // Calls use(start, count, k) for every pack of `size` numbers; only the last may be short. k is
    // 0 and 1 in turns: with two sums, an addition need not wait for the one before it.
    template <typename Use>
    static MOTET_INLINE void each(std::size_t size, Use use) {
        std::size_t i = 0;
        for (; i + 2 * lanes <= size; i += 2 * lanes) {
            use(i, lanes, 0);
            use(i + lanes, lanes, 1);
        }
        if (i + lanes <= size) {
            use(i, lanes, 0);
            i += lanes;
        }
        if (i < size) use(i, size - i, 1);
    }
};

// Three sweeps over a row, which stays in the nearest cache. The first computes the mean, as a
// pivot. The second sums x - pivot and its square: these differences are nearly exact where the
// mean is far above the standard deviation, and their mean corrects the pivot's rounding. The third
// writes z.
template <std::size_t Bytes, typename In, typename Wide, typename Out>
MOTET_INLINE void standardise_rows(const Rows& r, Wide eps, Out* out, Wide* mean, Wide* rstd,
                                   std::size_t begin, std::size_t end) {
    using S = Simd<Wide, Bytes>;
    using Pack = typename S::Pack;
    const auto total = static_cast<Wide>(r.dim + r.width);
    for (std::size_t row = begin; row < end; ++row) {
        const In* x = static_cast<const In*>(r.x) + static_cast<std::ptrdiff_t>(row) * r.stride;
        const Wide* p =
            r.width ? static_cast<const Wide*>(r.positions) + (r.first + row) % r.period * r.width
                    : nullptr;
        Out* z = out + row * (r.dim + r.width);

        Pack sums[2] = {};
        S::each(r.dim, [&](std::size_t i, std::size_t n, int k)
                           MOTET_LAMBDA { sums[k] += S::load(x + i, n); });
        S::each(r.width, [&](std::size_t i, std::size_t n, int k)
                             MOTET_LAMBDA { sums[k] += S::load(p + i, n); });
        const Wide pivot = S::sum(sums) / total;

        Pack offsets[2] = {}, squares[2] = {};
        const auto add = [&](Pack off, std::size_t n, int k) MOTET_LAMBDA {
            for (std::size_t i = n; i < S::lanes; ++i) off[i] = 0;
            offsets[k] += off;
            squares[k] += off * off;
        };
        S::each(r.dim, [&](std::size_t i, std::size_t n, int k)
                           MOTET_LAMBDA { add(S::load(x + i, n) - pivot, n, k); });
        S::each(r.width, [&](std::size_t i, std::size_t n, int k)
                             MOTET_LAMBDA { add(S::load(p + i, n) - pivot, n, k); });
        const Wide correction = S::sum(offsets) / total;
        const Wide variance = S::sum(squares) / total - correction * correction;
        // Rounding may leave a constant row a variance just below zero; NaN stays NaN.
        const Wide scale = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);

        S::each(r.dim, [&](std::size_t i, std::size_t n, int) MOTET_LAMBDA {
            __builtin_prefetch(x + r.stride + i);  // the next row
            S::store(z + i, ((S::load(x + i, n) - pivot) - correction) * scale, n);
        });
        S::each(r.width, [&](std::size_t i, std::size_t n, int) MOTET_LAMBDA {
            S::store(z + r.dim + i, ((S::load(p + i, n) - pivot) - correction) * scale, n);
        });
        mean[row] = pivot + correction;
        rstd[row] = scale;
    }
}

template <typename In, typename Wide, typename Out>
struct Body {
    template <std::size_t Bytes>
    static MOTET_INLINE void run(const Rows& r, Wide eps, Out* out, Wide* mean, Wide* rstd,
                                 std::size_t begin, std::size_t end) {
        standardise_rows<Bytes, In, Wide, Out>(r, eps, out, mean, rstd, begin, end);
    }

    static void all(const Rows& r, double eps, void* out, void* mean, void* rstd, int threads) {
        const auto chosen = Compiled<Body, const Rows&, Wide, Out*, Wide*, Wide*, std::size_t,
                                     std::size_t>::chosen();
        // With fewer numbers than 32,768, torch's grain, starting a thread takes longer than the
        // work.
        const auto numbers = r.rows * (r.dim + r.width);
        const auto useful = static_cast<int>(std::min<std::size_t>(numbers / 32768 + 1, 1024));
        parallel_for(r.rows, std::min(threads, useful), [&](std::size_t begin, std::size_t end) {
            chosen(r, static_cast<Wide>(eps), static_cast<Out*>(out), static_cast<Wide*>(mean),
                   static_cast<Wide*>(rstd), begin, end);
        });
    }
};

}  // namespace

void standardise(const Rows& rows, double eps, void* out, Kind out_kind, void* mean, void* rstd,
                 int threads) {
    const auto run = [&]<typename In>(In) {
        if (out_kind == Kind::bfloat16)
            Body<In, float, bfloat16>::all(rows, eps, out, mean, rstd, threads);
        else
            Body<In, float, float>::all(rows, eps, out, mean, rstd, threads);
    };
    switch (rows.kind) {
        case Kind::float64:
            return Body<double, double, double>::all(rows, eps, out, mean, rstd, threads);
        case Kind::bfloat16:
            return run(bfloat16{});
        case Kind::float16:
            return run(float16{});
        case Kind::float32:
            return run(float{});
    }
}

}  // namespace motet
