// The LayerNorm of a row, which context_kv computes before its product. Pointers and sizes in,
// pointers out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace motet {

enum class Kind { float32, float64, bfloat16, float16 };

// Rows [first, first + rows) of tokens joined with positions: z = [x | p], W = D + P wide.
struct Rows {
    const void* x;
    Kind kind;
    std::ptrdiff_t stride;  // elements from one row of x to the next
    std::size_t rows, dim;
    const void* positions;  // [period, width], Wide; row r takes the one at (first + r) % period
    std::size_t width, period, first;
};

// out = (z - mean) / sqrt(var + eps), rows of W numbers without gaps, in float32 or bfloat16
// (float64 for float64 rows), with each row's mean and 1 / sqrt(var + eps) in Wide: float, or
// double for float64 rows.
void standardise(const Rows& rows, double eps, void* out, Kind out_kind, void* mean, void* rstd,
                 int threads);

}  // namespace motet
