#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "merge.hpp"

namespace motet {
namespace {

// Closer than this to opposite, the great circle between two vectors is undefined in practice.
constexpr double kOpposite = 1e-7;
// Less of the weighted logarithms along the mean than this cannot stand for its direction.
constexpr double kFlat = 1e-3;

// angle / sin(angle) of a cosine, continuous at 1.
double inverse_sinc(double cosine) {
    const double c = std::clamp(cosine, -1.0, 1.0), sine = std::sqrt((1.0 - c) * (1.0 + c));
    return sine < 1e-6 ? 1.0 + (1.0 - c) / 3.0 : std::acos(c) / sine;
}

// Double squares overflow near 1e154, so doubles are divided by their largest entry first. float
// squares always fit into double.
template <typename T>
double scale_of(const T* v, std::size_t size) {
    if constexpr (std::is_same_v<T, float>) return 1.0;
    double largest = 0.0;
    for (std::size_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(double(v[i])));
    return largest > 0.0 && std::isfinite(largest) ? largest : 1.0;
}

// The coefficients c_j of the Karcher mean, from the row-major matrix of cosines between the
// inputs. A zero vector has a cosine of 0 with itself.
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
    // The Karcher mean u = sum c_j u_j by Riemannian gradient steps, in coefficients: the mean of
    // the logarithms of the u_j at u is sum_j t_j u_j with t = y - (y . p) c, p the cosines to u
    // and y_j = w_j * angle_j / sin(angle_j). Step along it until its length vanishes.
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
            // Where vectors depend on each other c is not unique; this form, which the mean
            // satisfies, is. Without a component along the mean there is no such form.
            if (!(along > kFlat)) return linear;
            for (std::size_t i = 0; i < n; ++i) c[i] = y[i] / along;
            return c;
        }
        for (std::size_t i = 0; i < n; ++i)
            c[i] = std::cos(step) * c[i] + std::sin(step) / step * t[i];
    }
    return linear;
}

}  // namespace

template <typename T>
void slerp(std::span<const T* const> inputs, std::span<const double> weights, std::size_t size,
           T* out) {
    const std::size_t n = inputs.size();
    std::vector<double> scale(n), cosines(n * n, 0.0);
    for (std::size_t j = 0; j < n; ++j) scale[j] = scale_of(inputs[j], size);
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j <= i; ++j) {
            double dot = 0.0;
            for (std::size_t k = 0; k < size; ++k)
                dot += (inputs[i][k] / scale[i]) * (inputs[j][k] / scale[j]);
            cosines[i * n + j] = cosines[j * n + i] = dot;
        }
    std::vector<double> norm(n);
    for (std::size_t j = 0; j < n; ++j) norm[j] = std::sqrt(cosines[j * n + j]);
    for (std::size_t i = 0; i < n; ++i)
        for (std::size_t j = 0; j < n; ++j)
            cosines[i * n + j] = norm[i] > 0.0 && norm[j] > 0.0
                                     ? (i == j ? 1.0 : cosines[i * n + j] / (norm[i] * norm[j]))
                                     : 0.0;

    const auto c = coefficients(cosines, weights);
    for (std::size_t k = 0; k < size; ++k) {
        double sum = 0.0;
        for (std::size_t j = 0; j < n; ++j) sum += c[j] * inputs[j][k];
        out[k] = static_cast<T>(sum);
    }
}

template void slerp(std::span<const float* const>, std::span<const double>, std::size_t, float*);
template void slerp(std::span<const double* const>, std::span<const double>, std::size_t, double*);

}  // namespace motet
