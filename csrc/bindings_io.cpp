// motet.io._C: what io computes on pixels. Every buffer is checked here, so that no call from
// Python can read or write out of bounds.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "area_resample.hpp"

namespace py = pybind11;

namespace {

// uint8 [height, width, 3]; rows may lie apart, as in a crop.
py::buffer_info image_buffer(const py::buffer& buffer, const std::string& name, bool writable) {
    auto info = buffer.request(writable);
    const bool fits = info.item_type_is_equivalent_to<std::uint8_t>() && info.ndim == 3 &&
                      info.shape[2] == 3 && info.strides[2] == 1 &&
                      (info.shape[1] <= 1 || info.strides[1] == 3) &&
                      (info.shape[0] <= 1 || info.strides[0] >= 3 * info.shape[1]);
    if (!fits)
        throw std::invalid_argument(
            name + ": expected uint8 [height, width, 3], pixels without gaps between them");
    return info;
}

struct Bytes {
    std::uintptr_t begin, end;
};

Bytes bytes_of(const py::buffer_info& info) {
    const auto begin = reinterpret_cast<std::uintptr_t>(info.ptr);
    py::ssize_t size = info.size ? info.itemsize : 0;
    for (py::ssize_t axis = 0; size && axis < info.ndim; ++axis)
        size += (info.shape[axis] - 1) * info.strides[axis];
    return {begin, begin + static_cast<std::uintptr_t>(size)};
}

// Where windows begin: each has to lie within the image, whatever the numbers are, but for what
// rounding adds to its end.
std::span<const double> begins(const py::buffer_info& info, const std::string& name,
                               py::ssize_t expected, py::ssize_t side, double ratio) {
    if (!info.item_type_is_equivalent_to<double>() || info.ndim != 1 || info.shape[0] != expected ||
        (info.shape[0] > 1 && info.strides[0] != 8) ||
        reinterpret_cast<std::uintptr_t>(info.ptr) % alignof(double))
        throw std::invalid_argument(
            name + ": expected a contiguous vector of float64, as many as out has");
    const std::span<const double> numbers{static_cast<const double*>(info.ptr),
                                          static_cast<std::size_t>(expected)};
    for (const double x : numbers)
        if (!(x >= 0.0 && x + ratio <= static_cast<double>(side) + 1e-6))
            throw std::invalid_argument(name + ": expected windows of " + std::to_string(ratio) +
                                        " px within the " + std::to_string(side) +
                                        " px of the image, got one at " + std::to_string(x));
    return numbers;
}

void area_resample(const py::buffer& image, const py::buffer& rows, const py::buffer& columns,
                   double ratio, const py::buffer& out) {
    if (!(ratio >= 1.0 && std::isfinite(ratio)))
        throw std::invalid_argument("ratio: expected a number of 1 or more, got " +
                                    std::to_string(ratio));
    const auto in = image_buffer(image, "image", false), to = image_buffer(out, "out", true);
    const auto vertical = rows.request(), horizontal = columns.request();
    const auto down = begins(vertical, "rows", to.shape[0], in.shape[0], ratio);
    const auto across = begins(horizontal, "columns", to.shape[1], in.shape[1], ratio);
    const auto written = bytes_of(to);
    for (const auto* other : {&in, &vertical, &horizontal}) {
        const auto read = bytes_of(*other);
        if (read.begin < written.end && written.begin < read.end)
            throw std::invalid_argument("out: expected a buffer apart from the others");
    }
    py::gil_scoped_release release;
    motet::area_resample(
        {static_cast<const std::uint8_t*>(in.ptr), in.strides[0],
         static_cast<std::size_t>(in.shape[0]), static_cast<std::size_t>(in.shape[1])},
        down, across, ratio, static_cast<std::uint8_t*>(to.ptr), to.strides[0]);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Pixels on raw CPU buffers; motet.io is the public door.";
    module.def("area_resample", &area_resample, py::arg("image"), py::arg("rows"),
               py::arg("columns"), py::arg("ratio"), py::arg("out"));
}
