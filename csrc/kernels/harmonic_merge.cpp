#include "harmonic_merge.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parallel.hpp"
#include "simd.hpp"

namespace motet {
namespace {

// The fewest elements of a thread, as in torch: to start one takes longer than to merge fewer.
constexpr std::size_t kGrain = 32768;

// The parts and the modulus m of a complex number z, all three multiplied by `up`: 2^100 where
// |z| < 2^-900, so that the modulus is not subnormal and keeps all its digits; else 1.
struct Raised {
    double re, im, up, m;

    template <typename T>
    explicit Raised(std::complex<T> z) : re(z.real()), im(z.imag()), up(1.0), m(modulus(z)) {
        if (m < 0x1p-900) {
            up = 0x1p100, re *= up, im *= up;
            m = std::hypot(re, im);
        }
    }

    // Squares of floats neither overflow nor underflow in double.
    static double modulus(std::complex<float> z) {
        const double re = z.real(), im = z.imag();
        return std::sqrt(re * re + im * im);
    }
    static double modulus(std::complex<double> z) { return std::hypot(z.real(), z.imag()); }
};

// Merges one element by the definition, in double. It is for the elements that the vectors cannot
// merge: infinite ones, NaN, and doubles so large or small that their squares leave the range.
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
    // Magnitudes relative to the smallest: the ratios low / m lie in (0, 1] and cannot overflow.
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

// Vectors of N numbers of type T, and their bits as integers: signs, exponents, comparisons.
template <typename T, std::size_t N>
struct Numbers {
    using Pack = typename Lanes<T, N>::type;
    using Bits = typename Lanes<Integer<T>, N>::type;
    static constexpr int mantissa = sizeof(T) == 8 ? 52 : 23;
    using Limits = std::numeric_limits<Integer<T>>;
    static constexpr Integer<T> step = Integer<T>(1) << mantissa;  // added to the bits: times 2
    static constexpr Integer<T> sign = Limits::min();
    static constexpr Integer<T> special = Limits::max() & -step;  // infinity
    static constexpr Integer<T> one = special / 2 & special;      // the bits of 1.0

    static MOTET_INLINE Bits bits(Pack x) { return std::bit_cast<Bits>(x); }
    static MOTET_INLINE Pack number(Bits x) { return std::bit_cast<Pack>(x); }
    static MOTET_INLINE Pack size(Pack x) { return number(bits(x) & ~sign); }
    // Returns all bits set where true. GCC 12 compiles a bare comparison number by number, but not
    // one that selects.
    static MOTET_INLINE Bits where(decltype(Pack{} < Pack{}) truth) {
        return truth ? Bits{} - 1 : Bits{};
    }
    static MOTET_INLINE Bits larger(Bits a, Bits b) { return a > b ? a : b; }
    static MOTET_INLINE Bits smaller(Bits a, Bits b) { return a < b ? a : b; }
};

// Merges two inputs of equal weight, the papers' case, without atan2, sin or cos. With w = ab, the
// mean phase is half of arg a + arg b, and that sum is arg w, or differs from it by 2 pi. So the
// cosine and sine of the mean phase follow from w by half-angle formulas, which take square roots:
//   |a||b| / (|a| + |b|) * 2 exp(i phase) = (+-p, +-q) or (+-q, +-p),
//   p = (|w| + |re w|) r, q = |im w| r, r = sqrt(|w| / (2 (|w| + |re w|))) * 2 / (|a| + |b|),
// in which no difference loses digits. docs/design/algebra.md, section 3, derives this.
//
// Scaled: a and b are first multiplied by powers of two, to magnitudes near 2, so that no product
// over- or underflows; `exponents` are the bits of their exponents. It takes a quarter more time,
// so that it is only called where a number is far from 1.
template <bool Scaled, typename T, std::size_t N, typename Bits>
MOTET_INLINE void merge_finite(const Parts<T, N>& a, const Parts<T, N>& b,
                               const std::array<Bits, 2>& exponents, T* out) {
    using Num = Numbers<T, N>;
    using Pack = typename Num::Pack;
    Pack ar = a.re, ai = a.im, br = b.re, bi = b.im;
    if constexpr (Scaled) {
        const Pack up_a = Num::number(Num::special - exponents[0]);
        const Pack up_b = Num::number(Num::special - exponents[1]);
        ar *= up_a, ai *= up_a, br *= up_b, bi *= up_b;
    }
    const Pack m = square_root(ar * ar + ai * ai), n = square_root(br * br + bi * bi);
    const Pack size = m * n;
    const Pack re = ar * br - ai * bi, im = rounded(ar * bi) + rounded(ai * br);
    const Pack both = size + Num::size(re);
    Pack p, q;
    if constexpr (Scaled) {
        const Bits highest = Num::larger(exponents[0], exponents[1]);
        // 2^(exponent - highest), or 0 if that is below the range: then the number adds nothing.
        const auto share = [&](Bits exponent) MOTET_LAMBDA {
            return Num::number(Num::larger(exponent - highest + Num::one, Bits{}));
        };
        const Pack sum = m * share(exponents[0]) + n * share(exponents[1]);
        const Pack root = square_root(size / ((both + both) * (sum * sum)));
        const Pack r = size > 0 ? root : Pack{};  // the result is zero if an input is zero
        const Pack down = Num::number(Num::smaller(exponents[0], exponents[1]));
        p = both * r * down, q = Num::size(im) * r * down;
    } else {
        const Pack sum = m + n, r = square_root((size + size) / (both * (sum * sum)));
        p = both * r, q = Num::size(im) * r;
    }

    // The signs. If the phases of a and b have the same sign, so does their sum; the sum is beyond
    // pi, and its half beyond a right angle (a negative cosine), if im w has the other sign. If
    // they have different signs (`apart`), the sum is within pi: the cosine of its half is
    // positive, and the sine has the sign of im w. Sign bits are used, so that im = -0.0 counts as
    // negative.
    const Bits sign_a = Num::bits(a.im), sign_im = Num::bits(im);
    const Bits apart = sign_a ^ Num::bits(b.im), beyond = sign_a ^ sign_im;
    const Parts<T, N> result{
        Num::number(Num::bits(re < 0 ? q : p) | (beyond & ~apart & Num::sign)),
        Num::number(Num::bits(re < 0 ? p : q) | ((sign_a ^ (apart & beyond)) & Num::sign))};
    const auto packs = result.together();
    std::memcpy(out, &packs[0], sizeof(Pack));
    std::memcpy(out + N, &packs[1], sizeof(Pack));
}

// Merges N elements of two inputs of equal weight. Returns false, and writes nothing, if a number
// is not finite.
template <typename T, std::size_t N>
MOTET_INLINE bool merge_two(const T* first, const T* second, T* out) {
    using Num = Numbers<T, N>;
    using Bits = typename Num::Bits;
    const auto a = Parts<T, N>::load(first), b = Parts<T, N>::load(second);
    const auto exponent = [](const Parts<T, N>& z) MOTET_LAMBDA {
        const Bits largest =
            Num::larger(Num::bits(z.re) & ~Num::sign, Num::bits(z.im) & ~Num::sign);
        return Num::larger(largest & Num::special, Bits{} + Num::step);  // subnormals: the smallest
    };
    const std::array<Bits, 2> exponents{exponent(a), exponent(b)};
    const Bits highest = Num::larger(exponents[0], exponents[1]);
    const Bits lowest = Num::smaller(exponents[0], exponents[1]);
    // Numbers between 2^-16 and 2^16 need no scaling: three products of two numbers each, the most
    // that are multiplied together, stay within the range of float.
    const Bits furthest = Num::larger(highest, 2 * Num::one - lowest);
    if (!any(Num::where(furthest > Num::one + 16 * Num::step)))
        merge_finite<false>(a, b, exponents, out);
    else if (!any(Num::where(highest == Num::special)))
        merge_finite<true>(a, b, exponents, out);
    else
        return false;
    return true;
}

// Coefficients of polynomials in x^2, lowest first, for angle / x, sin(x) / x and cos(x), the last
// two for |x| <= pi/4. Relative errors are below 1e-9 for results in float, and below half a unit
// of the last place for double. docs/design/merge-polynomials.md derives them, says how arguments
// reach these intervals, and computes the tables again.
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

// Horner's rule.
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
    using Num = Numbers<double, N>;

    // Returns 1 / sqrt(x), and a huge number at 0. For results in float by three Newton steps from
    // a first guess: halving the exponent in the bits of x is off by 3.4 % at most, and each step
    // squares the error, to 3e-11. They take a quarter of the time of a square root and a division.
    static MOTET_INLINE Pack inverse_root(Pack x) {
        if constexpr (sizeof(T) == 8) {
            return 1.0 / square_root(x);
        } else {
            const Pack half = 0.5 * x;
            Pack y = Num::number(0x5fe6eb50c7b537a9 - (Num::bits(x) >> 1));
            for (int step = 0; step < 3; ++step) y *= 1.5 - half * (y * y);
            return y;
        }
    }

    // Returns atan2(im, re), given inverse = 1 / |z|. The polynomial gives an angle of 0 to 45
    // degrees from the smaller and the larger of |re| and |im|; pi/2 - a and pi - a bring it to its
    // octant. The small constants are what the doubles pi/4, pi/2 and pi lack.
    static MOTET_INLINE Pack angle(Pack re, Pack im, Pack inverse) {
        const Pack height = Num::size(im), width = Num::size(re);
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
        angle = Num::bits(re) < 0 ? 3.1415926535897931 - (angle - 1.2246467991473532e-16) : angle;
        return Num::number(Num::bits(angle) | (Num::bits(im) & Num::sign));
    }

    // Returns cos and sin of |angle| < 4. The nearest multiple of pi/2 is subtracted, in two steps
    // since pi/2 as a double lacks 6.1e-17; its number modulo 4 chooses which polynomial is the
    // cosine, and the signs.
    static MOTET_INLINE Parts<double, N> turned(Pack angle) {
        // Added to a number, it rounds it to an integer, which is then in the last bits of the sum.
        constexpr double shift = 0x1.8p52;
        const Pack shifted = angle * 0.63661977236758134 + shift,
                   quarter = rounded(shifted) - shift;
        const Pack x = (angle - quarter * 1.5707963267948966) - quarter * 6.1232339957367660e-17;
        const Pack square = x * x, sine = polynomial(square, Series<T>::sin) * x,
                   cosine = polynomial(square, Series<T>::cos);
        const Bits turns = Num::bits(shifted);
        const Bits odd = -(turns & 1);
        const Bits c = odd ? Num::bits(sine) : Num::bits(cosine);
        const Bits s = odd ? Num::bits(cosine) : Num::bits(sine);
        return {Num::number(c ^ ((turns + 1) << 62 & Num::sign)),
                Num::number(s ^ (turns << 62 & Num::sign))};
    }
};

// Merges N elements of any number of inputs with any weights, in double. Returns false, and writes
// nothing, if an element is not finite, or is a double whose square leaves the range.
template <typename T, std::size_t N>
MOTET_INLINE bool merge_many(const std::complex<T>* const* inputs, std::size_t count,
                             const double* weights, Phase phase, std::size_t at, T* out) {
    using Num = Trigonometry<T, N>;
    using Pack = typename Num::Pack;
    using Bits = typename Num::Bits;
    Pack reciprocal{}, angle{}, x{}, y{};
    Bits largest{}, smallest = Bits{} + Num::one;
    for (std::size_t j = 0; j < count; ++j) {
        const auto z = Parts<T, N>::load(reinterpret_cast<const T*>(inputs[j] + at));
        const auto re = __builtin_convertvector(z.re, Pack),
                   im = __builtin_convertvector(z.im, Pack);
        const Bits size = Num::larger(Num::bits(Num::size(re)), Num::bits(Num::size(im)));
        largest = Num::larger(largest, size);
        if constexpr (sizeof(T) == 8)
            smallest = Num::smaller(smallest, size == 0 ? Bits{} + Num::one : size);
        const Pack inverse = Num::inverse_root(re * re + im * im);
        reciprocal += weights[j] * inverse;
        if (phase == Phase::principal) {
            angle += weights[j] * Num::angle(re, im, inverse);
        } else {
            x += weights[j] * (re * inverse);
            y += weights[j] * (im * inverse);
        }
    }
    // floats must be finite; doubles must be zero, or have squares within range.
    const Bits low = Bits{} + Num::one - 500 * Num::step,
               high = Bits{} + Num::one + 500 * Num::step;
    if (any(Num::where(largest >= (sizeof(T) == 8 ? high : Bits{} + Num::special)))) return false;
    if constexpr (sizeof(T) == 8)
        if (any(Num::where(smallest < low))) return false;
    Parts<double, N> unit;
    if (phase == Phase::principal) {
        unit = Num::turned(angle);
    } else {
        const Pack square = x * x + y * y, inverse = Num::inverse_root(square);
        // Where the phasors cancel exactly, the phase is 0.
        unit = {square == 0 ? Pack{} + 1.0 : x * inverse, y * inverse};
        unit.im = square == 0 ? Pack{} : unit.im;
    }
    const Pack mean = 1.0 / reciprocal;
    using Narrow = typename Parts<T, N>::Pack;
    // mean is 0 where an input is zero (the reciprocal is infinite); the phase may be NaN there.
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
struct MergeArguments {
    std::span<const std::complex<T>* const> inputs;
    std::span<const double> weights;
    Phase phase;
    std::complex<T>* out;
};

// Merges [begin, end), as many elements at a time as a register holds; one by one where that fails.
// Two: two inputs of equal weight.
template <typename T, bool Two>
struct Merge {
    template <std::size_t Bytes>
    static MOTET_INLINE void run(const MergeArguments<T>& arguments, std::size_t begin,
                                 std::size_t end) {
        constexpr std::size_t lanes = Two ? Bytes / sizeof(T) : Bytes / sizeof(double);
        // Local copies: the compiler need not assume that storing a result changes them.
        const auto* const inputs = arguments.inputs.data();
        const auto count = arguments.inputs.size();
        const auto* const weights = arguments.weights.data();
        const auto phase = arguments.phase;
        auto* const out = arguments.out;
        const auto merge_lanes = [&](const std::complex<T>* const* from, std::size_t at,
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
            if (!merge_lanes(inputs, i, out))
                for (std::size_t k = i; k < i + lanes; ++k)
                    out[k] = merge_one(arguments.inputs, arguments.weights, phase, k);
        if (i == end) return;
        // The last elements, fewer than a register holds, are copied to buffers of full width: so
        // they are computed as all others, and do not depend on where a thread's part ends.
        std::vector<std::complex<T>> buffer((count + 1) * lanes, std::complex<T>(1));
        std::vector<const std::complex<T>*> rows(count);
        for (std::size_t j = 0; j < count; ++j) {
            rows[j] = buffer.data() + j * lanes;
            std::copy_n(inputs[j] + i, end - i, buffer.data() + j * lanes);
        }
        auto* const last = buffer.data() + count * lanes;
        if (merge_lanes(rows.data(), 0, last))
            std::copy_n(last, end - i, out + i);
        else
            for (; i < end; ++i) out[i] = merge_one(arguments.inputs, arguments.weights, phase, i);
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
    using Kernel = void (*)(const MergeArguments<T>&, std::size_t, std::size_t);
    const Kernel chosen =
        two ? Compiled<Merge<T, true>, const MergeArguments<T>&, std::size_t, std::size_t>::chosen()
            : Compiled<Merge<T, false>, const MergeArguments<T>&, std::size_t,
                       std::size_t>::chosen();
    const MergeArguments<T> arguments{inputs, weights, phase, out};
    const auto useful = static_cast<int>(std::min<std::size_t>(size / kGrain + 1, 1024));
    parallel_for(size, std::min(threads, useful),
                 [&](std::size_t begin, std::size_t end) { chosen(arguments, begin, end); });
}

template void harmonic_merge(std::span<const std::complex<float>* const>, std::span<const double>,
                             Phase, std::size_t, std::complex<float>*, int);
template void harmonic_merge(std::span<const std::complex<double>* const>, std::span<const double>,
                             Phase, std::size_t, std::complex<double>*, int);

}  // namespace motet
