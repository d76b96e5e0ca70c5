#include "harmonic_merge.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.hpp"
#include "simd.hpp"

namespace motet {
namespace {

// Elements that one thread takes at least, as in torch: starting another takes longer than less.
constexpr std::size_t kGrain = 32768;

// A number times a power of two that keeps its modulus m from being rounded as subnormal ones are.
struct Raised {
    double re, im, up, m;

    template <typename T>
    explicit Raised(std::complex<T> z) : re(z.real()), im(z.imag()), up(1.0), m(modulus(z)) {
        if (m < 0x1p-900) {
            up = 0x1p100, re *= up, im *= up;
            m = std::hypot(re, im);
        }
    }

    // Squares of floats neither overflow nor vanish in double.
    static double modulus(std::complex<float> z) {
        const double re = z.real(), im = z.imag();
        return std::sqrt(re * re + im * im);
    }
    static double modulus(std::complex<double> z) { return std::hypot(z.real(), z.imag()); }
};

// One element by the definition, in double: what is infinite, NaN, or in double so large or small
// that squares leave its range.
template <typename T>
std::complex<T> merge_one(std::span<const std::complex<T>* const> inputs,
                          std::span<const double> weights, Phase phase, std::size_t i) {
    Raised low(inputs[0][i]);
    double total = 0.0;
    for (const auto* input : inputs) {
        const Raised z(input[i]);
        if (z.up > low.up || (z.up == low.up && z.m < low.m)) low = z;
        total += z.m;
    }
    if (std::isnan(total)) return {static_cast<T>(total), static_cast<T>(total)};
    if (low.m == 0.0) return {0, 0};
    // The ratios low / m lie in (0, 1], so that nothing over- or underflows on the way.
    double reciprocal = 0.0, angle = 0.0, x = 0.0, y = 0.0;
    for (std::size_t j = 0; j < inputs.size(); ++j) {
        const Raised z(inputs[j][i]);
        reciprocal += weights[j] * (low.m / z.m * (z.up / low.up));
        if (phase == Phase::principal) {
            angle += weights[j] * std::atan2(z.im, z.re);
        } else {
            x += weights[j] * (z.re / z.m);
            y += weights[j] * (z.im / z.m);
        }
    }
    if (phase == Phase::circular) angle = std::atan2(y, x);
    const double mean = low.m / reciprocal;
    return {static_cast<T>(mean * std::cos(angle) / low.up),
            static_cast<T>(mean * std::sin(angle) / low.up)};
}

// What the vectors of one kind of number share.
template <typename T, std::size_t N>
struct Numbers {
    using Pack = typename Lanes<T, N>::type;
    using Bits = typename Lanes<Integer<T>, N>::type;
    static constexpr int mantissa = sizeof(T) == 8 ? 52 : 23;
    using Limits = std::numeric_limits<Integer<T>>;
    static constexpr Integer<T> step = Integer<T>(1) << mantissa;  // doubles a number
    static constexpr Integer<T> sign = Limits::min();
    static constexpr Integer<T> special = Limits::max() & -step;  // infinity
    static constexpr Integer<T> one = special / 2 & special;      // the bits of 1.0

    static MOTET_INLINE Bits bits(Pack x) { return std::bit_cast<Bits>(x); }
    static MOTET_INLINE Pack number(Bits x) { return std::bit_cast<Pack>(x); }
    static MOTET_INLINE Pack size(Pack x) { return number(bits(x) & ~sign); }
    // All bits where true. GCC 12 takes comparisons apart, number by number, unless they choose.
    static MOTET_INLINE Bits where(decltype(Pack{} < Pack{}) truth) {
        return truth ? Bits{} - 1 : Bits{};
    }
    static MOTET_INLINE Bits larger(Bits a, Bits b) { return a > b ? a : b; }
    static MOTET_INLINE Bits smaller(Bits a, Bits b) { return a < b ? a : b; }
};

// Two inputs of equal weight, the papers' case, without atan2, sin or cos. With w = ab, the mean
// phase is the half of arg a + arg b, which is arg w or 2 pi from it:
//   |a||b| / (|a| + |b|) * 2 exp(i phase) = (+-p, +-q) or (+-q, +-p),
//   p = (|w| + |re w|) r, q = |im w| r, r = sqrt(|w| / (2 (|w| + |re w|))) * 2 / (|a| + |b|),
// in which no difference loses digits (docs/design/algebra.md, section 3).
//
// Scaled: by powers of two to sizes near 2 at first, so that nothing over- or underflows;
// `exponents` are the bits of those of a and b. It takes a quarter more time.
template <bool Scaled, typename T, std::size_t N, typename Bits>
MOTET_INLINE void merge_finite(const Parts<T, N>& a, const Parts<T, N>& b,
                               const std::array<Bits, 2>& exponents, T* out) {
    using Own = Numbers<T, N>;
    using Pack = typename Own::Pack;
    Pack ar = a.re, ai = a.im, br = b.re, bi = b.im;
    if constexpr (Scaled) {
        const Pack up_a = Own::number(Own::special - exponents[0]);
        const Pack up_b = Own::number(Own::special - exponents[1]);
        ar *= up_a, ai *= up_a, br *= up_b, bi *= up_b;
    }
    const Pack m = square_root(ar * ar + ai * ai), n = square_root(br * br + bi * bi);
    const Pack size = m * n;
    const Pack re = ar * br - ai * bi, im = rounded(ar * bi) + rounded(ai * br);
    const Pack both = size + Own::size(re);
    Pack p, q;
    if constexpr (Scaled) {
        const Bits highest = Own::larger(exponents[0], exponents[1]);
        const auto share = [&](Bits own) MOTET_LAMBDA {
            return Own::number(Own::larger(own - highest + Own::one, Bits{}));
        };
        const Pack sum = m * share(exponents[0]) + n * share(exponents[1]);
        const Pack root = square_root(size / ((both + both) * (sum * sum)));
        const Pack r = size > 0 ? root : Pack{};  // zero where an input is
        const Pack down = Own::number(Own::smaller(exponents[0], exponents[1]));
        p = both * r * down, q = Own::size(im) * r * down;
    } else {
        const Pack sum = m + n, r = square_root((size + size) / (both * (sum * sum)));
        p = both * r, q = Own::size(im) * r;
    }

    // Of phases with one sign, the sum has it too, and its half lies beyond a right angle if the
    // sine of the sum has the other; of different ones the sum lies within pi.
    const Bits sign_a = Own::bits(a.im), sign_im = Own::bits(im);
    const Bits apart = sign_a ^ Own::bits(b.im), beyond = sign_a ^ sign_im;
    const Parts<T, N> result{
        Own::number(Own::bits(re < 0 ? q : p) | (beyond & ~apart & Own::sign)),
        Own::number(Own::bits(re < 0 ? p : q) | ((sign_a ^ (apart & beyond)) & Own::sign))};
    const auto packs = result.together();
    std::memcpy(out, &packs[0], sizeof(Pack));
    std::memcpy(out + N, &packs[1], sizeof(Pack));
}

// Returns false, and writes nothing, where a number is not finite.
template <typename T, std::size_t N>
MOTET_INLINE bool merge_two(const T* first, const T* second, T* out) {
    using Own = Numbers<T, N>;
    using Bits = typename Own::Bits;
    const auto a = Parts<T, N>::load(first), b = Parts<T, N>::load(second);
    const auto exponent = [](const Parts<T, N>& z) MOTET_LAMBDA {
        const Bits largest =
            Own::larger(Own::bits(z.re) & ~Own::sign, Own::bits(z.im) & ~Own::sign);
        return Own::larger(largest & Own::special, Bits{} + Own::step);  // subnormals: the smallest
    };
    const std::array<Bits, 2> exponents{exponent(a), exponent(b)};
    const Bits highest = Own::larger(exponents[0], exponents[1]);
    const Bits lowest = Own::smaller(exponents[0], exponents[1]);
    // Between 2^-16 and 2^16, which in float is as far as three products of two go.
    const Bits furthest = Own::larger(highest, 2 * Own::one - lowest);
    if (!any(Own::where(furthest > Own::one + 16 * Own::step)))
        merge_finite<false>(a, b, exponents, out);
    else if (!any(Own::where(highest == Own::special)))
        merge_finite<true>(a, b, exponents, out);
    else
        return false;
    return true;
}

// Polynomials in x^2 for an angle / x, sin(x) / x and cos(x), |x| <= pi/4 in the last two: errors
// below 1e-9 for results in float, and below half a unit of the last place for double. They
// are derived in docs/design/merge-polynomials.md.
template <typename T>
struct Series;
template <>
struct Series<float> {
    // asin(x) / x, x^2 <= 1/2
    static constexpr double angle[] = {
        0.9999999996858518,   0.16666678687845748,  0.07499243158357356,  0.04482672617563304,
        0.028132398534147552, 0.037973727596226726, -0.04713553928006643, 0.17297146507971303,
        -0.20863296898552028, 0.14902494141596478};
    static constexpr double sin[] = {0.9999999999954279, -0.16666666630299798, 0.008333328676129518,
                                     -0.00019839174161687443, 2.7171142903332335e-06};
    static constexpr double cos[] = {0.9999999999436475, -0.49999999569795034, 0.041666613069603314,
                                     -0.00138865243466366, 2.4372245329538446e-05};
};
template <>
struct Series<double> {
    // atan(x) / x, x <= tan(pi/8)
    static constexpr double angle[] = {1.0,
                                       -0.33333333333328574,
                                       0.19999999998880064,
                                       -0.14285714182769085,
                                       0.1111110624584233,
                                       -0.09090774443948951,
                                       0.0768997093541422,
                                       -0.06640371270550702,
                                       0.056890020835806666,
                                       -0.043497680782936414,
                                       0.021154510542558586};
    static constexpr double sin[] = {1.0,
                                     -0.16666666666666616,
                                     0.008333333333319936,
                                     -0.00019841269828350317,
                                     2.7557313281166604e-06,
                                     -2.5050703036522795e-08,
                                     1.5893971671119346e-10};
    static constexpr double cos[] = {1.0,
                                     -0.5,
                                     0.04166666666666643,
                                     -0.001388888888885881,
                                     2.4801587282823838e-05,
                                     -2.7557312846436405e-07,
                                     2.087555272390469e-09,
                                     -1.1352004028462135e-11};
};

template <typename Pack, std::size_t K>
MOTET_INLINE Pack polynomial(Pack x, const double (&coefficients)[K]) {
    Pack sum = Pack{} + coefficients[K - 1];
    for (std::size_t k = K - 1; k-- > 0;) sum = sum * x + coefficients[k];
    return sum;
}

// Vectors of double, for results in T.
template <typename T, std::size_t N>
struct Trigonometry : Numbers<double, N> {
    using typename Numbers<double, N>::Pack;
    using typename Numbers<double, N>::Bits;
    using Own = Numbers<double, N>;

    // 1 / sqrt(x); huge at 0. For float by Newton's steps from a first guess, 3e-11 off at the end:
    // a quarter of the time of a square root and a division.
    static MOTET_INLINE Pack inverse_root(Pack x) {
        if constexpr (sizeof(T) == 8) {
            return 1.0 / square_root(x);
        } else {
            const Pack half = 0.5 * x;
            Pack y = Own::number(0x5fe6eb50c7b537a9 - (Own::bits(x) >> 1));
            for (int step = 0; step < 3; ++step) y *= 1.5 - half * (y * y);
            return y;
        }
    }

    // atan2(im, re), given 1 / |z|.
    static MOTET_INLINE Pack angle(Pack re, Pack im, Pack inverse) {
        const Pack height = Own::size(im), width = Own::size(re);
        const Bits steep = height > width;
        const Pack low = steep ? width : height, high = steep ? height : width;
        Pack angle;
        if constexpr (sizeof(T) == 8) {
            const Bits wide = low > 0.41421356237309503 * high;  // tan(pi/8)
            const Pack x = (wide ? low - high : low) / (wide ? low + high : high);
            angle = polynomial(x * x, Series<T>::angle) * x;
            angle = wide ? 0.78539816339744831 + (angle + 3.0616169978683830e-17) : angle;
        } else {
            const Pack x = low * inverse;
            angle = polynomial(x * x, Series<T>::angle) * x;
        }
        angle = steep ? 1.5707963267948966 - (angle - 6.1232339957367660e-17) : angle;
        angle = Own::bits(re) < 0 ? 3.1415926535897931 - (angle - 1.2246467991473532e-16) : angle;
        return Own::number(Own::bits(angle) | (Own::bits(im) & Own::sign));
    }

    // cos and sin of |angle| < 4.
    static MOTET_INLINE Parts<double, N> turned(Pack angle) {
        constexpr double shift = 0x1.8p52;  // leaves the nearest whole number in the last bits
        const Pack shifted = angle * 0.63661977236758134 + shift,
                   quarter = rounded(shifted) - shift;
        const Pack x = (angle - quarter * 1.5707963267948966) - quarter * 6.1232339957367660e-17;
        const Pack square = x * x, sine = polynomial(square, Series<T>::sin) * x,
                   cosine = polynomial(square, Series<T>::cos);
        const Bits turns = Own::bits(shifted);
        const Bits odd = -(turns & 1);
        const Bits c = odd ? Own::bits(sine) : Own::bits(cosine);
        const Bits s = odd ? Own::bits(cosine) : Own::bits(sine);
        return {Own::number(c ^ ((turns + 1) << 62 & Own::sign)),
                Own::number(s ^ (turns << 62 & Own::sign))};
    }
};

// Any number of inputs and weights, in double.
template <typename T, std::size_t N>
MOTET_INLINE bool merge_many(const std::complex<T>* const* inputs, std::size_t count,
                             const double* weights, Phase phase, std::size_t at, T* out) {
    using Own = Trigonometry<T, N>;
    using Pack = typename Own::Pack;
    using Bits = typename Own::Bits;
    Pack reciprocal{}, angle{}, x{}, y{};
    Bits largest{}, smallest = Bits{} + Own::one;
    for (std::size_t j = 0; j < count; ++j) {
        const auto z = Parts<T, N>::load(reinterpret_cast<const T*>(inputs[j] + at));
        const auto re = __builtin_convertvector(z.re, Pack),
                   im = __builtin_convertvector(z.im, Pack);
        const Bits size = Own::larger(Own::bits(Own::size(re)), Own::bits(Own::size(im)));
        largest = Own::larger(largest, size);
        if constexpr (sizeof(T) == 8)
            smallest = Own::smaller(smallest, size == 0 ? Bits{} + Own::one : size);
        const Pack inverse = Own::inverse_root(re * re + im * im);
        reciprocal += weights[j] * inverse;
        if (phase == Phase::principal) {
            angle += weights[j] * Own::angle(re, im, inverse);
        } else {
            x += weights[j] * (re * inverse);
            y += weights[j] * (im * inverse);
        }
    }
    // float is finite; squares of double must stay within range, or be those of zero.
    const Bits low = Bits{} + Own::one - 500 * Own::step,
               high = Bits{} + Own::one + 500 * Own::step;
    if (any(Own::where(largest >= (sizeof(T) == 8 ? high : Bits{} + Own::special)))) return false;
    if constexpr (sizeof(T) == 8)
        if (any(Own::where(smallest < low))) return false;
    Parts<double, N> unit;
    if (phase == Phase::principal) {
        unit = Own::turned(angle);
    } else {
        const Pack square = x * x + y * y, inverse = Own::inverse_root(square);
        unit = {square == 0 ? Pack{} + 1.0 : x * inverse, y * inverse};  // 0 where phasors cancel
        unit.im = square == 0 ? Pack{} : unit.im;
    }
    const Pack mean = 1.0 / reciprocal;
    using Narrow = typename Parts<T, N>::Pack;
    // Elsewhere an input is zero, and the phase may be NaN.
    const Pack x_part = mean > 0 ? mean * unit.re : Pack{},
               y_part = mean > 0 ? mean * unit.im : Pack{};
    const Parts<T, N> result{__builtin_convertvector(x_part, Narrow),
                             __builtin_convertvector(y_part, Narrow)};
    const auto packs = result.together();
    std::memcpy(out, &packs[0], sizeof(Narrow));
    std::memcpy(out + N, &packs[1], sizeof(Narrow));
    return true;
}

template <typename T>
struct Job {
    std::span<const std::complex<T>* const> inputs;
    std::span<const double> weights;
    Phase phase;
    std::complex<T>* out;
};

// Calls whole(at) for every N elements of [begin, end), and rest(at) where it returns false and for
// the last elements, one by one.
template <typename T, bool Two>
struct Merge {
    template <std::size_t Bytes>
    static MOTET_INLINE void run(const Job<T>& job, std::size_t begin, std::size_t end) {
        constexpr std::size_t lanes = Two ? Bytes / sizeof(T) : Bytes / sizeof(double);
        // Copies, which no store of a result can change.
        const auto* const inputs = job.inputs.data();
        const auto count = job.inputs.size();
        const auto* const weights = job.weights.data();
        const auto phase = job.phase;
        auto* const out = job.out;
        const auto whole = [&](const std::complex<T>* const* from, std::size_t at,
                               std::complex<T>* to) MOTET_LAMBDA {
            if constexpr (Two)
                return merge_two<T, lanes>(reinterpret_cast<const T*>(from[0] + at),
                                           reinterpret_cast<const T*>(from[1] + at),
                                           reinterpret_cast<T*>(to + at));
            else
                return merge_many<T, lanes>(from, count, weights, phase, at,
                                            reinterpret_cast<T*>(to + at));
        };
        std::size_t i = begin;
        for (; i + lanes <= end; i += lanes)
            if (!whole(inputs, i, out))
                for (std::size_t k = i; k < i + lanes; ++k)
                    out[k] = merge_one(job.inputs, job.weights, phase, k);
        if (i == end) return;
        // What is left, in buffers of full width.
        std::vector<std::complex<T>> room((count + 1) * lanes, std::complex<T>(1));
        std::vector<const std::complex<T>*> rows(count);
        for (std::size_t j = 0; j < count; ++j) {
            rows[j] = room.data() + j * lanes;
            std::copy_n(inputs[j] + i, end - i, room.data() + j * lanes);
        }
        auto* const last = room.data() + count * lanes;
        if (whole(rows.data(), 0, last))
            std::copy_n(last, end - i, out + i);
        else
            for (; i < end; ++i) out[i] = merge_one(job.inputs, job.weights, phase, i);
    }
};

}  // namespace

template <typename T>
void harmonic_merge(std::span<const std::complex<T>* const> inputs, std::span<const double> weights,
                    Phase phase, std::size_t size, std::complex<T>* out, int threads) {
    if (inputs.size() == 1) {
        std::copy_n(inputs[0], inputs[0] == out ? 0 : size, out);
        return;
    }
    const bool two = inputs.size() == 2 && weights[0] == weights[1] && phase == Phase::principal;
    using Kernel = void (*)(const Job<T>&, std::size_t, std::size_t);
    const Kernel chosen =
        two ? Compiled<Merge<T, true>, const Job<T>&, std::size_t, std::size_t>::chosen()
            : Compiled<Merge<T, false>, const Job<T>&, std::size_t, std::size_t>::chosen();
    const Job<T> job{inputs, weights, phase, out};
    const auto useful = static_cast<int>(std::min<std::size_t>(size / kGrain + 1, 1024));
    parallel_for(size, std::min(threads, useful),
                 [&](std::size_t begin, std::size_t end) { chosen(job, begin, end); });
}

template void harmonic_merge(std::span<const std::complex<float>* const>, std::span<const double>,
                             Phase, std::size_t, std::complex<float>*, int);
template void harmonic_merge(std::span<const std::complex<double>* const>, std::span<const double>,
                             Phase, std::size_t, std::complex<double>*, int);

}  // namespace motet
