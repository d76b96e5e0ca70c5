// The harmonic merge on raw buffers. No torch, no Python: pointers and sizes in, pointers out.
#pragma once

#include <complex>
#include <cstddef>
#include <span>

namespace motet {

// Principal: the weighted mean of the phases in (-pi, pi]. Circular: the angle of the weighted
// mean of the unit phasors, which has no branch cut.
enum class Phase { principal, circular };

// Weighted harmonic mean of magnitudes with the weighted mean of phases (MM-Lego, Eq. 4):
//   out[i] = 1 / sum_j(w_j / |z_j[i]|) * exp(i * mean phase)
// Zero where any input is zero. `weights` sum to 1, one per input; `out` may be an input.
template <typename T>
void harmonic_merge(std::span<const std::complex<T>* const> inputs, std::span<const double> weights,
                    Phase phase, std::size_t size, std::complex<T>* out, int threads);

}  // namespace motet
