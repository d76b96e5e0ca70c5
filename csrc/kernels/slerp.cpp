#include "slerp.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "parallel.hpp"
#include "simd.hpp"

namespace motet {
namespace {

// Both as in kernels/slerp/coefficients.py.
// Vectors whose cosine is closer than this to -1 count as opposite: many great circles join them.
constexpr double kOpposite = 1e-7;
// The least y . p from which c = y / (y . p) is computed: see below.
constexpr double kFlat = 1e-3;

// Returns angle / sin(angle) of an angle's cosine, continuous at 1; the series there avoids 0 / 0.
double inverse_sinc(double cosine) {
    const double c = std::clamp(cosine, -1.0, 1.0), sine = std::sqrt((1.0 - c) * (1.0 + c));
    return sine < 1e-6 ? 1.0 + (1.0 - c) / 3.0 : std::acos(c) / sine;
}

// Returns the coefficients c_j of the Karcher mean sum c_j u_j of the unit vectors u_j, from the
// row-major matrix of the cosines between the inputs; a zero vector has the cosine 0 with itself.
// The mean minimises the weighted sum of squared angles to the u_j. Everything is computed in
// coefficients and cosines: the vectors themselves are not read again.
std::vector<double> coefficients(std::span<const double> cosines, std::span<const double> weights) {
    const std::size_t n = weights.size();
    const std::vector<double> linear(weights.begin(), weights.end());
    for (std::size_t i = 0; i < n; ++i) {
        if (!(cosines[i * n + i] > 0.5)) return linear;  // a zero vector, or NaN
        for (std::size_t j = 0; j < i; ++j)
            if (!(cosines[i * n + j] > -1.0 + kOpposite)) return linear;
    }
    if (n == 2) {
        const double angle = std::acos(std::clamp(cosines[1], -1.0, 1.0)), sine = std::sin(angle);
        if (sine < 1e-8) return linear;
        return {std::sin(weights[0] * angle) / sine, std::sin(weights[1] * angle) / sine};
    }
    // Riemannian gradient steps from the linear mean. At u = sum c_j u_j, with the cosines p to the
    // u_j, the logarithm of u_j is the tangent at u towards u_j, as long as the angle between them.
    // The weighted mean of the logarithms is sum_j t_j u_j with t = y - (y . p) c and
    // y_j = w_j * angle_j / sin(angle_j). A step goes along it, on the great circle, by its length;
    // at the mean that length is zero. v . (cosines v) is the squared length of sum v_j u_j.
    std::vector<double> c = linear, p(n), y(n), t(n);
    const auto times_cosines = [&](const std::vector<double>& v, std::vector<double>& out) {
        double square = 0.0;
        for (std::size_t i = 0; i < n; ++i) {
            out[i] = 0.0;
            for (std::size_t j = 0; j < n; ++j) out[i] += cosines[i * n + j] * v[j];
            square += v[i] * out[i];
        }
        return square;
    };
    for (int round = 0; round < 1000; ++round) {
        const double square = times_cosines(c, p);
        if (!(square > 1e-14)) return linear;
        const double length = std::sqrt(square);
        double along = 0.0;
        for (std::size_t i = 0; i < n; ++i) {
            c[i] /= length, p[i] /= length;
            if (p[i] < -1.0 + kOpposite) return linear;
            y[i] = weights[i] * inverse_sinc(p[i]);
            along += y[i] * p[i];
        }
        for (std::size_t i = 0; i < n; ++i) t[i] = y[i] - along * c[i];
        const double step = std::sqrt(std::max(0.0, times_cosines(t, p)));
        if (step < 1e-13) {
            // If the vectors are linearly dependent, several c give the same mean. t = 0 says that
            // c = y / (y . p) is one of them, and it is unique. It needs y . p far from zero.
            if (!(along > kFlat)) return linear;
            for (std::size_t i = 0; i < n; ++i) c[i] = y[i] / along;
            return c;
        }
        for (std::size_t i = 0; i < n; ++i)
            c[i] = std::cos(step) * c[i] + std::sin(step) / step * t[i];
    }
    return linear;
}

// Products of all pairs are summed over a block (4 KiB of each input, in the nearest cache), blocks
// over a chunk, and chunks in order. A thread takes whole chunks: so sums do not depend on the
// number of threads.
constexpr std::size_t kBlock = 512, kChunk = 128 * kBlock;

template <typename Pack, typename T>
MOTET_INLINE Pack widened(const T* x) {
    typename Lanes<T, sizeof(Pack) / sizeof(double)>::type pack;
    std::memcpy(&pack, x, sizeof(pack));
    return __builtin_convertvector(pack, Pack);
}

// Adds the products of a row with K others to out[0], ..., out[K - 1].
template <typename Pack, std::size_t K>
MOTET_INLINE void add_products(const double* row, const double* const* others, std::size_t size,
                               double* out) {
    constexpr auto lanes = sizeof(Pack) / sizeof(double);
    Pack sums[2][K] = {};  // two in turns, so that an addition need not wait for the one before
    std::size_t i = 0;
    for (; i + 2 * lanes <= size; i += 2 * lanes)
        for (std::size_t turn = 0; turn < 2; ++turn) {
            const Pack x = widened<Pack>(row + i + turn * lanes);
            for (std::size_t k = 0; k < K; ++k)
                sums[turn][k] += x * widened<Pack>(others[k] + i + turn * lanes);
        }
    for (std::size_t k = 0; k < K; ++k) {
        const Pack both = sums[0][k] + sums[1][k];
        double sum = 0.0;
        for (std::size_t lane = 0; lane < lanes; ++lane) sum += both[lane];
        for (std::size_t last = i; last < size; ++last) sum += row[last] * others[k][last];
        out[k] += sum;
    }
}

template <typename T>
struct Vectors {
    std::span<const T* const> inputs;
    std::span<const double> factors;  // one for each input, or none
};

// Adds the products of all pairs i >= j of inputs to out, row by row.
template <typename T>
struct Products {
    template <std::size_t Bytes>
    static MOTET_INLINE void run(const Vectors<T>& v, std::size_t begin, std::size_t end,
                                 double* out) {
        constexpr auto lanes = Bytes / sizeof(double);
        using Pack = typename Lanes<double, lanes>::type;
        const std::size_t n = v.inputs.size();
        std::vector<double> buffer(n * kBlock);
        std::vector<const double*> rows(n);
        for (; begin < end; begin += kBlock) {
            const auto size = std::min(kBlock, end - begin);
            for (std::size_t j = 0; j < n; ++j) {
                const T* const input = v.inputs[j] + begin;
                double* const row = buffer.data() + j * kBlock;
                if constexpr (std::is_same_v<T, double>) {
                    rows[j] = input;
                    if (v.factors.empty()) continue;
                }
                const double factor = v.factors.empty() ? 1.0 : v.factors[j];
                std::size_t i = 0;
                for (; i + lanes <= size; i += lanes) {
                    const Pack scaled = widened<Pack>(input + i) * factor;
                    std::memcpy(row + i, &scaled, sizeof(scaled));
                }
                for (; i < size; ++i) row[i] = input[i] * factor;
                rows[j] = row;
            }
            double* sum = out;
            for (std::size_t i = 0; i < n; ++i) {
                std::size_t j = 0;
                for (; j + 4 <= i + 1; j += 4, sum += 4)
                    add_products<Pack, 4>(rows[i], &rows[j], size, sum);
                for (; j + 2 <= i + 1; j += 2, sum += 2)
                    add_products<Pack, 2>(rows[i], &rows[j], size, sum);
                for (; j < i + 1; ++j, ++sum) add_products<Pack, 1>(rows[i], &rows[j], size, sum);
            }
        }
    }
};

// The row-major matrix of products between inputs times factors, in one sweep.
template <typename T>
std::vector<double> gram(const Vectors<T>& v, std::size_t size, int threads) {
    const std::size_t n = v.inputs.size(), pairs = n * (n + 1) / 2;
    const std::size_t chunks = (size + kChunk - 1) / kChunk;
    const auto products =
        Compiled<Products<T>, const Vectors<T>&, std::size_t, std::size_t, double*>::chosen();
    std::vector<double> partial(chunks * pairs, 0.0);
    parallel_for(chunks, threads, [&](std::size_t first, std::size_t last) {
        for (std::size_t chunk = first; chunk < last; ++chunk)
            products(v, chunk * kChunk, std::min((chunk + 1) * kChunk, size),
                     partial.data() + chunk * pairs);
    });
    std::vector<double> result(n * n, 0.0);
    for (std::size_t chunk = 0; chunk < chunks; ++chunk)
        for (std::size_t i = 0, pair = 0; i < n; ++i)
            for (std::size_t j = 0; j <= i; ++j, ++pair)
                result[i * n + j] += partial[chunk * pairs + pair];
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = i + 1; j < n; ++j) result[i * n + j] = result[j * n + i];
    return result;
}

// Returns 1 / the largest absolute entry, at most 2^1023; 1 if that entry is zero or not finite.
template <typename T>
double factor_of(const T* v, std::size_t size) {
    double largest = 0.0;
    for (std::size_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(double(v[i])));
    return largest > 0.0 && std::isfinite(largest) ? std::min(1.0 / largest, 0x1p1023) : 1.0;
}

// out = sum_j c_j inputs[j], in double.
template <typename T>
struct Combine {
    template <std::size_t Bytes>
    static MOTET_INLINE void run(std::span<const T* const> inputs, const double* c,
                                 std::size_t begin, std::size_t end, T* out) {
        constexpr auto lanes = Bytes / sizeof(double);
        using Pack = typename Lanes<double, lanes>::type;
        using Narrow = typename Lanes<T, lanes>::type;
        const auto* const rows = inputs.data();
        const auto n = inputs.size();
        std::size_t i = begin;
        for (; i + 2 * lanes <= end; i += 2 * lanes) {
            Pack sums[2] = {};
            for (std::size_t j = 0; j < n; ++j)
                for (std::size_t turn = 0; turn < 2; ++turn)
                    sums[turn] += c[j] * widened<Pack>(rows[j] + i + turn * lanes);
            for (std::size_t turn = 0; turn < 2; ++turn) {
                const auto narrow = __builtin_convertvector(sums[turn], Narrow);
                std::memcpy(out + i + turn * lanes, &narrow, sizeof(narrow));
            }
        }
        for (; i < end; ++i) {
            double sum = 0.0;
            for (std::size_t j = 0; j < n; ++j) sum += c[j] * rows[j][i];
            out[i] = static_cast<T>(sum);
        }
    }
};

}  // namespace

template <typename T>
void slerp(std::span<const T* const> inputs, std::span<const double> weights, std::size_t size,
           T* out, int threads) {
    const std::size_t n = inputs.size();
    auto cosines = gram<T>({inputs, {}}, size, threads);
    if constexpr (std::is_same_v<T, double>) {
        // Squares of doubles overflow near 1e154 and vanish near 1e-162 (those of floats do not, in
        // double). Then the products are computed again, of vectors divided by their largest entry:
        // cosines do not change.
        bool safe = true;
        for (std::size_t j = 0; j < n; ++j)
            safe = safe && cosines[j * n + j] > 1e-200 && cosines[j * n + j] < 1e200;
        if (!safe) {
            std::vector<double> factors(n);
            for (std::size_t j = 0; j < n; ++j) factors[j] = factor_of(inputs[j], size);
            cosines = gram<T>({inputs, factors}, size, threads);
        }
    }
    std::vector<double> norm(n);
    for (std::size_t j = 0; j < n; ++j) norm[j] = std::sqrt(cosines[j * n + j]);
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j)
            cosines[i * n + j] = norm[i] > 0.0 && norm[j] > 0.0
                                     ? (i == j ? 1.0 : cosines[i * n + j] / (norm[i] * norm[j]))
                                     : 0.0;

    const auto c = coefficients(cosines, weights);
    const auto useful = static_cast<int>(std::min<std::size_t>(size / kChunk + 1, 1024));
    const auto combine = Compiled<Combine<T>, std::span<const T* const>, const double*, std::size_t,
                                  std::size_t, T*>::chosen();
    parallel_for(size, std::min(threads, useful), [&](std::size_t begin, std::size_t end) {
        combine(inputs, c.data(), begin, end, out);
    });
}

template void slerp(std::span<const float* const>, std::span<const double>, std::size_t, float*,
                    int);
template void slerp(std::span<const double* const>, std::span<const double>, std::size_t, double*,
                    int);

}  // namespace motet
