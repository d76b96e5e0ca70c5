#include <algorithm>
#include <cmath>

#include "merge.hpp"

namespace motet {
namespace {

// float magnitudes are formed in double, where squares neither overflow nor vanish; double needs
// hypot for the same.
double modulus(std::complex<float> z) {
    const double re = z.real(), im = z.imag();
    return std::sqrt(re * re + im * im);
}
double modulus(std::complex<double> z) { return std::hypot(z.real(), z.imag()); }

// exp(i arg(z) / 2) on the principal branch, from z and |z| > 0: the half-angle formula in the
// form that is stable on both sides, the sign of zero deciding at the branch cut as in atan2.
template <typename T>
std::complex<double> half_phase(std::complex<T> z, double magnitude) {
    const double cosine = z.real() / magnitude, sine = std::fabs(z.imag() / magnitude);
    const double p = std::sqrt(0.5 * (1.0 + std::fabs(cosine))), q = sine / (2.0 * p);
    const bool right = cosine >= 0.0;
    return {right ? p : q, std::copysign(right ? q : p, static_cast<double>(z.imag()))};
}

template <typename T>
std::complex<T> rounded(double magnitude, std::complex<double> phase) {
    return {static_cast<T>(magnitude * phase.real()), static_cast<T>(magnitude * phase.imag())};
}

// A product with zero: zero, unless a magnitude in the sum is NaN.
template <typename T>
std::complex<T> zero_unless_nan(double sum) {
    return std::isnan(sum) ? std::complex<T>(static_cast<T>(sum), static_cast<T>(sum))
                           : std::complex<T>(0, 0);
}

template <typename T>
std::complex<T> merge_many(std::span<const std::complex<T>* const> inputs,
                           std::span<const double> weights, Phase phase, std::size_t i) {
    double low = modulus(inputs[0][i]), total = 0.0;
    for (const auto* input : inputs) {
        const double m = modulus(input[i]);
        low = std::min(low, m);
        total += m;
    }
    if (low == 0.0) return zero_unless_nan<T>(total);

    // The ratios low / m lie in (0, 1], so that nothing over- or underflows on the way.
    double reciprocal = 0.0, angle = 0.0, x = 0.0, y = 0.0;
    for (std::size_t j = 0; j < inputs.size(); ++j) {
        const auto z = inputs[j][i];
        const double m = modulus(z);
        reciprocal += weights[j] * (low / m);
        if (phase == Phase::principal) {
            angle += weights[j] * std::atan2(double(z.imag()), double(z.real()));
        } else {
            x += weights[j] * (z.real() / m);
            y += weights[j] * (z.imag() / m);
        }
    }
    if (phase == Phase::circular) angle = std::atan2(y, x);
    return rounded<T>(low / reciprocal, {std::cos(angle), std::sin(angle)});
}

// Two inputs of equal weight, the papers' case: no atan2, sin or cos.
template <typename T>
std::complex<T> merge_two(std::span<const std::complex<T>* const> inputs,
                          std::span<const double> weights, std::size_t i) {
    const auto a = inputs[0][i], b = inputs[1][i];
    const double m = modulus(a), n = modulus(b);
    if (!std::isfinite(m + n)) return merge_many(inputs, weights, Phase::principal, i);
    if (m == 0.0 || n == 0.0) return {0, 0};
    const double low = std::min(m, n), high = std::max(m, n);
    const auto p = half_phase(a, m), q = half_phase(b, n);
    return rounded<T>(2.0 * low / (1.0 + low / high), {p.real() * q.real() - p.imag() * q.imag(),
                                                       p.real() * q.imag() + p.imag() * q.real()});
}

}  // namespace

template <typename T>
void harmonic_merge(std::span<const std::complex<T>* const> inputs, std::span<const double> weights,
                    Phase phase, std::size_t size, std::complex<T>* out) {
    if (inputs.size() == 1) {
        std::copy_n(inputs[0], inputs[0] == out ? 0 : size, out);
    } else if (inputs.size() == 2 && weights[0] == weights[1] && phase == Phase::principal) {
        for (std::size_t i = 0; i < size; ++i) out[i] = merge_two(inputs, weights, i);
    } else {
        for (std::size_t i = 0; i < size; ++i) out[i] = merge_many(inputs, weights, phase, i);
    }
}

template void harmonic_merge(std::span<const std::complex<float>* const>, std::span<const double>,
                             Phase, std::size_t, std::complex<float>*);
template void harmonic_merge(std::span<const std::complex<double>* const>, std::span<const double>,
                             Phase, std::size_t, std::complex<double>*);

}  // namespace motet
