// motet.kernels._C: the operators for anything that speaks the buffer protocol. Every buffer is
// checked here, so that no call from Python can read or write out of bounds.
#include <pybind11/complex.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "context_kv.hpp"
#include "harmonic_merge.hpp"
#include "one_token.hpp"
#include "slerp.hpp"

namespace py = pybind11;

namespace {

struct Operands {
    std::vector<py::buffer_info> inputs;
    py::buffer_info out;
    std::size_t size;
};

bool contiguous(const py::buffer_info& info) {
    py::ssize_t expected = info.itemsize;
    for (py::ssize_t axis = info.ndim; axis-- > 0;) {
        if (info.shape[axis] != 1 && info.strides[axis] != expected) return false;
        expected *= info.shape[axis];
    }
    return true;
}

// Vectors are loaded from any address, but single numbers must be aligned, as C++ requires.
bool aligned(const py::buffer_info& info, py::ssize_t number) {
    return reinterpret_cast<std::uintptr_t>(info.ptr) % static_cast<std::uintptr_t>(number) == 0;
}

// Returns whether two buffers of equal size share a part of their memory, but not all of it.
bool overlaps(const py::buffer_info& a, const py::buffer_info& b) {
    const auto begin_a = reinterpret_cast<std::uintptr_t>(a.ptr);
    const auto begin_b = reinterpret_cast<std::uintptr_t>(b.ptr);
    const auto bytes = static_cast<std::uintptr_t>(a.size * a.itemsize);
    return begin_a != begin_b && begin_a < begin_b + bytes && begin_b < begin_a + bytes;
}

// Returns the buffers of a merge after checking them; an item consists of `parts` numbers.
Operands checked(const std::vector<py::buffer>& inputs, const std::vector<double>& weights,
                 const py::buffer& out, py::ssize_t parts) {
    if (inputs.empty()) throw std::invalid_argument("inputs: expected at least one buffer");
    if (weights.size() != inputs.size())
        throw std::invalid_argument("weights: expected " + std::to_string(inputs.size()) +
                                    " values, got " + std::to_string(weights.size()));
    Operands operands{{}, out.request(/*writable=*/true), 0};
    const auto& target = operands.out;
    const auto number = std::max<py::ssize_t>(1, target.itemsize / parts);
    if (!contiguous(target) || !aligned(target, number))
        throw std::invalid_argument("out: expected a C-contiguous, aligned buffer");
    for (std::size_t j = 0; j < inputs.size(); ++j) {
        operands.inputs.push_back(inputs[j].request());
        const auto& input = operands.inputs.back();
        const std::string name = "inputs[" + std::to_string(j) + "]: expected ";
        if (input.format != target.format || input.itemsize != target.itemsize)
            throw std::invalid_argument(name + "the format of out, '" + target.format + "', got '" +
                                        input.format + "'");
        if (input.shape != target.shape) throw std::invalid_argument(name + "the shape of out");
        if (!contiguous(input) || !aligned(input, number))
            throw std::invalid_argument(name + "a C-contiguous, aligned buffer");
        if (overlaps(input, target))
            throw std::invalid_argument(name + "a buffer apart from out, or out itself");
    }
    operands.size = static_cast<std::size_t>(target.size);
    return operands;
}

template <typename T>
std::vector<const T*> pointers(const Operands& operands) {
    std::vector<const T*> result;
    for (const auto& input : operands.inputs) result.push_back(static_cast<const T*>(input.ptr));
    return result;
}

template <typename T>
void run_harmonic(const Operands& operands, const std::vector<double>& weights, motet::Phase phase,
                  int threads) {
    using Z = std::complex<T>;
    const auto inputs = pointers<Z>(operands);
    py::gil_scoped_release release;
    motet::harmonic_merge<T>(std::span<const Z* const>(inputs), weights, phase, operands.size,
                             static_cast<Z*>(operands.out.ptr), threads);
}

template <typename T>
void run_slerp(const Operands& operands, const std::vector<double>& weights, int threads) {
    const auto inputs = pointers<T>(operands);
    py::gil_scoped_release release;
    motet::slerp<T>(std::span<const T* const>(inputs), weights, operands.size,
                    static_cast<T*>(operands.out.ptr), threads);
}

void harmonic_merge(const std::vector<py::buffer>& inputs, const std::vector<double>& weights,
                    const std::string& phase, const py::buffer& out, int threads) {
    if (phase != "principal" && phase != "circular")
        throw std::invalid_argument("phase: expected 'principal' or 'circular', got '" + phase +
                                    "'");
    const auto kind = phase == "circular" ? motet::Phase::circular : motet::Phase::principal;
    const auto operands = checked(inputs, weights, out, 2);
    if (operands.out.item_type_is_equivalent_to<std::complex<float>>())
        run_harmonic<float>(operands, weights, kind, threads);
    else if (operands.out.item_type_is_equivalent_to<std::complex<double>>())
        run_harmonic<double>(operands, weights, kind, threads);
    else
        throw std::invalid_argument("out: expected complex64 or complex128, got '" +
                                    operands.out.format + "'");
}

void slerp(const std::vector<py::buffer>& inputs, const std::vector<double>& weights,
           const py::buffer& out, int threads) {
    const auto operands = checked(inputs, weights, out, 1);
    if (operands.out.item_type_is_equivalent_to<float>())
        run_slerp<float>(operands, weights, threads);
    else if (operands.out.item_type_is_equivalent_to<double>())
        run_slerp<double>(operands, weights, threads);
    else
        throw std::invalid_argument("out: expected float32 or float64, got '" +
                                    operands.out.format + "'");
}

motet::Kind kind_of(const std::string& name) {
    if (name == "float32") return motet::Kind::float32;
    if (name == "float64") return motet::Kind::float64;
    if (name == "bfloat16") return motet::Kind::bfloat16;
    if (name == "float16") return motet::Kind::float16;
    throw std::invalid_argument("kind: expected float32, float64, bfloat16 or float16, got '" +
                                name + "'");
}

py::ssize_t bytes_of(motet::Kind kind) {
    return kind == motet::Kind::float64 ? 8 : kind == motet::Kind::float32 ? 4 : 2;
}

// Returns a buffer of rows after checking it. Half-precision numbers come as integers of their
// size, since Python has no buffer format for bfloat16. columns < 0: a vector.
py::buffer_info rows_buffer(const py::buffer& buffer, const std::string& name, motet::Kind kind,
                            py::ssize_t rows, py::ssize_t columns, bool writable) {
    auto info = buffer.request(writable);
    const auto size = bytes_of(kind);
    const bool fits = info.itemsize == size && info.ndim == (columns < 0 ? 1 : 2) &&
                      info.shape[0] == rows && (columns < 0 || info.shape[1] == columns);
    if (!fits || !contiguous(info) || !aligned(info, size))
        throw std::invalid_argument(name + ": expected a C-contiguous buffer of " +
                                    std::to_string(rows) + " rows and " + std::to_string(size) +
                                    "-byte items");
    return info;
}

void standardise(const py::buffer& x, const std::string& kind, const py::object& positions,
                 std::size_t first, double eps, const py::buffer& out, const std::string& out_kind,
                 const py::buffer& mean, const py::buffer& rstd, int threads) {
    const auto in = x.request();
    const auto from = kind_of(kind), to = kind_of(out_kind);
    const auto size = bytes_of(from);
    const bool wide = from == motet::Kind::float64;
    const auto full = wide ? motet::Kind::float64 : motet::Kind::float32;
    if (to == motet::Kind::float16 || (to == motet::Kind::float64) != wide)
        throw std::invalid_argument("out_kind: expected float32 or bfloat16, float64 for float64");
    if (in.ndim != 2 || in.itemsize != size || (in.shape[1] > 1 && in.strides[1] != size) ||
        in.strides[0] % size || !aligned(in, size))
        throw std::invalid_argument("x: expected rows of " + kind + " without gaps");
    motet::Rows rows{in.ptr,
                     from,
                     in.strides[0] / size,
                     static_cast<std::size_t>(in.shape[0]),
                     static_cast<std::size_t>(in.shape[1]),
                     nullptr,
                     0,
                     1,
                     first};
    py::buffer_info places;
    if (!positions.is_none()) {
        places = positions.cast<py::buffer>().request();
        if (places.ndim != 2 || places.itemsize != bytes_of(full) || places.shape[0] < 1 ||
            !contiguous(places) || !aligned(places, places.itemsize))
            throw std::invalid_argument("positions: expected a C-contiguous matrix with rows");
        rows.positions = places.ptr;
        rows.width = static_cast<std::size_t>(places.shape[1]);
        rows.period = static_cast<std::size_t>(places.shape[0]);
    }
    const auto width = static_cast<py::ssize_t>(rows.dim + rows.width);
    const auto z = rows_buffer(out, "out", to, in.shape[0], width, true);
    const auto means = rows_buffer(mean, "mean", full, in.shape[0], -1, true);
    const auto rstds = rows_buffer(rstd, "rstd", full, in.shape[0], -1, true);
    if (width == 0) throw std::invalid_argument("x: expected rows of at least one number");
    py::gil_scoped_release release;
    motet::standardise(rows, eps, z.ptr, to, means.ptr, rstds.ptr, threads);
}

template <typename T>
using Product = void (*)(const T*, const T*, std::size_t, std::size_t, std::size_t, T*, int);

// Rows of `inner` numbers and a weight in, rows of `outer` numbers out.
template <typename T>
void run_few_rows(Product<T> product, const py::buffer_info& rows, const py::buffer_info& weight,
                  const py::buffer_info& out, int threads) {
    py::gil_scoped_release release;
    product(static_cast<const T*>(rows.ptr), static_cast<const T*>(weight.ptr),
            static_cast<std::size_t>(rows.shape[0]), static_cast<std::size_t>(weight.shape[0]),
            static_cast<std::size_t>(weight.shape[1]), static_cast<T*>(out.ptr), threads);
}

// Returns whether two buffers share no memory.
bool apart(const py::buffer_info& a, const py::buffer_info& b) {
    const auto begin_a = reinterpret_cast<std::uintptr_t>(a.ptr);
    const auto begin_b = reinterpret_cast<std::uintptr_t>(b.ptr);
    const auto bytes_a = static_cast<std::uintptr_t>(a.size * a.itemsize);
    const auto bytes_b = static_cast<std::uintptr_t>(b.size * b.itemsize);
    return begin_a + bytes_a <= begin_b || begin_b + bytes_b <= begin_a;
}

// Rows times the transposed weight [M, K], or, backward, times the weight itself.
void few_rows_either(const char* name, const py::buffer& rows, const py::buffer& weight,
                     const py::buffer& out, int threads, bool backward) {
    const auto matrix = weight.request();
    const bool wide = matrix.item_type_is_equivalent_to<double>();
    if (!(wide || matrix.item_type_is_equivalent_to<float>()) || matrix.ndim != 2 ||
        !contiguous(matrix) || !aligned(matrix, matrix.itemsize))
        throw std::invalid_argument("weight: expected a C-contiguous matrix of float32 or float64");
    const auto kind = wide ? motet::Kind::float64 : motet::Kind::float32;
    const auto count = rows.request().ndim ? rows.request().shape[0] : 0;
    const auto in = rows_buffer(rows, name, kind, count, matrix.shape[backward ? 0 : 1], false);
    const auto to = rows_buffer(out, "out", kind, count, matrix.shape[backward ? 1 : 0], true);
    if (in.format != matrix.format)
        throw std::invalid_argument(std::string(name) + ": expected the format of weight");
    if (to.format != matrix.format)
        throw std::invalid_argument("out: expected the format of weight");
    for (const auto* other : {&in, &matrix})
        if (!apart(*other, to))
            throw std::invalid_argument("out: expected a buffer apart from the others");
    if (wide)
        run_few_rows<double>(backward ? motet::few_rows_backward<double> : motet::few_rows<double>,
                             in, matrix, to, threads);
    else
        run_few_rows<float>(backward ? motet::few_rows_backward<float> : motet::few_rows<float>, in,
                            matrix, to, threads);
}

void few_rows(const py::buffer& x, const py::buffer& weight, const py::buffer& out, int threads) {
    few_rows_either("x", x, weight, out, threads, false);
}

void few_rows_backward(const py::buffer& grad, const py::buffer& weight, const py::buffer& out,
                       int threads) {
    few_rows_either("grad", grad, weight, out, threads, true);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Operators on raw CPU buffers; motet.kernels is the public interface.";
    module.def("harmonic_merge", &harmonic_merge, py::arg("inputs"), py::arg("weights"),
               py::arg("phase"), py::arg("out"), py::arg("threads") = 1);
    module.def("slerp", &slerp, py::arg("inputs"), py::arg("weights"), py::arg("out"),
               py::arg("threads") = 1);
    module.def("standardise", &standardise, py::arg("x"), py::arg("kind"), py::arg("positions"),
               py::arg("first"), py::arg("eps"), py::arg("out"), py::arg("out_kind"),
               py::arg("mean"), py::arg("rstd"), py::arg("threads"));
    module.def("few_rows", &few_rows, py::arg("x"), py::arg("weight"), py::arg("out"),
               py::arg("threads") = 1);
    module.def("few_rows_backward", &few_rows_backward, py::arg("grad"), py::arg("weight"),
               py::arg("out"), py::arg("threads") = 1);
}
