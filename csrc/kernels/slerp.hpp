// SLERP on raw buffers. No torch, no Python: pointers and sizes in, pointers out.
#pragma once

#include <cstddef>
#include <span>

namespace motet {

// Spherical interpolation of whole vectors: the weighted Karcher mean of the unit vectors,
// written as sum_j c_j u_j, applied to the vectors themselves as sum_j c_j v_j. For two inputs
// that is a sin((1-t)T)/sin T + b sin(tT)/sin T. Inputs that are zero, opposite, or spread so
// far that no mean stands out are interpolated linearly. `out` may be an input.
template <typename T>
void slerp(std::span<const T* const> inputs, std::span<const double> weights, std::size_t size,
           T* out, int threads);

}  // namespace motet
