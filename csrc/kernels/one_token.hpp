// A few rows times a large matrix, each number of which is read from memory once.
#pragma once

#include <cstddef>

namespace motet {

// out [rows, outputs] = x [rows, inputs] weight [outputs, inputs]^T, for float and double, C order.
// A number of `out` has the same bits whatever the other rows and the number of threads.
template <typename T>
void few_rows(const T* x, const T* weight, std::size_t rows, std::size_t outputs,
              std::size_t inputs, T* out, int threads);

// out [rows, inputs] = grad [rows, outputs] weight [outputs, inputs], with the same promise.
template <typename T>
void few_rows_backward(const T* grad, const T* weight, std::size_t rows, std::size_t outputs,
                       std::size_t inputs, T* out, int threads);

}  // namespace motet
