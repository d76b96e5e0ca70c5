// motet.io._C: computations on pixels. Every buffer is checked here, so that no call from Python
// can read or write out of bounds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "area_resample.hpp"
#include "jpeg_tiles.hpp"
#include "smooth.hpp"
#include "stain_planes.hpp"

namespace py = pybind11;

namespace {

// Returns uint8 [height, width, 3]; there may be gaps between rows, as in a crop.
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

// Returns where windows begin. Each must lie within the image, except that rounding may put its end
// 1e-6 beyond; NaN is refused too.
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

// Returns an array without gaps, of this type and shape.
template <typename T>
py::buffer_info contiguous_buffer(const py::buffer& buffer, const std::string& name,
                                  const char* type, const std::vector<py::ssize_t>& shape,
                                  bool writable = false) {
    auto info = buffer.request(writable);
    const bool fits = info.item_type_is_equivalent_to<T>() && info.shape == shape &&
                      reinterpret_cast<std::uintptr_t>(info.ptr) % alignof(T) == 0;
    py::ssize_t step = info.itemsize;
    bool contiguous = fits;
    for (auto axis = shape.size(); contiguous && axis-- > 0; step *= shape[axis])
        contiguous = shape[axis] <= 1 || info.strides[axis] == step;
    if (!contiguous) {
        std::string sides;
        for (const auto side : shape) sides += (sides.empty() ? "" : ", ") + std::to_string(side);
        throw std::invalid_argument(name + ": expected a contiguous array of " + type + " [" +
                                    sides + "]");
    }
    return info;
}

// Returns where a patch is cut into pieces along one side.
std::span<const std::int64_t> cuts(const py::buffer& buffer, const std::string& name,
                                   py::buffer_info& info, py::ssize_t side) {
    info = buffer.request();
    const auto count = info.ndim == 1 ? info.shape[0] : 0;
    info = contiguous_buffer<std::int64_t>(buffer, name, "int64", {count});
    const std::span<const std::int64_t> places{static_cast<const std::int64_t*>(info.ptr),
                                               static_cast<std::size_t>(count)};
    bool fits = count > 1 && places.front() == 0 && places.back() == side;
    for (std::size_t i = 1; fits && i < places.size(); ++i)
        fits = places[i] > places[i - 1] &&
               places[i] - places[i - 1] <= static_cast<std::int64_t>(motet::kMostInPiece);
    if (!fits)
        throw std::invalid_argument(name + ": expected 0 to " + std::to_string(side) +
                                    " in steps of 1 to " + std::to_string(motet::kMostInPiece));
    return places;
}

void stain_planes(const py::buffer& pixels, const py::buffer& down, const py::buffer& across,
                  const py::buffer& table, const py::buffer& planes, const py::buffer& within) {
    auto in = pixels.request();
    if (in.ndim != 4) throw std::invalid_argument("pixels: expected uint8 [b, height, width, 3]");
    const auto patches = in.shape[0];
    in = contiguous_buffer<std::uint8_t>(pixels, "pixels", "uint8",
                                         {patches, in.shape[1], in.shape[2], 3});
    py::buffer_info rows, columns;
    const auto vertical = cuts(down, "down", rows, in.shape[1]);
    const auto horizontal = cuts(across, "across", columns, in.shape[2]);
    const auto levels = contiguous_buffer<float>(table, "table", "float32",
                                                 {3, motet::kStainLevels, motet::kStainPlanes});
    const auto to = contiguous_buffer<float>(
        planes, "planes", "float32",
        {motet::kStainPlanes, patches, rows.shape[0] - 1, columns.shape[0] - 1}, true);
    const auto squares =
        contiguous_buffer<std::int64_t>(within, "within", "int64", {patches, 3}, true);
    for (const auto* written : {&to, &squares})
        for (const py::buffer_info* other : std::initializer_list<const py::buffer_info*>{
                 &in, &rows, &columns, &levels, &to, &squares}) {
            const auto one = bytes_of(*written), two = bytes_of(*other);
            if (written != other && one.begin < two.end && two.begin < one.end)
                throw std::invalid_argument(
                    "planes, within: expected buffers apart from the others");
        }
    py::gil_scoped_release release;
    motet::stain_planes(static_cast<const std::uint8_t*>(in.ptr), static_cast<std::size_t>(patches),
                        vertical, horizontal, static_cast<const float*>(levels.ptr),
                        static_cast<float*>(to.ptr), static_cast<std::int64_t*>(squares.ptr));
}

void smooth(const py::buffer& image, const std::vector<double>& weights, const py::buffer& out) {
    auto in = image.request();
    if (in.ndim != 2) throw std::invalid_argument("image: expected float32 [height, width]");
    in = contiguous_buffer<float>(image, "image", "float32", in.shape);
    const auto to = contiguous_buffer<float>(out, "out", "float32", in.shape, true);
    if (weights.empty()) throw std::invalid_argument("weights: expected at least one");
    const auto read = bytes_of(in), written = bytes_of(to);
    if (read.begin < written.end && written.begin < read.end)
        throw std::invalid_argument("out: expected a buffer apart from the image");
    py::gil_scoped_release release;
    motet::smooth(static_cast<const float*>(in.ptr), static_cast<std::size_t>(in.shape[0]),
                  static_cast<std::size_t>(in.shape[1]), weights, static_cast<float*>(to.ptr));
}

motet::JpegTiles jpeg_tiles(const std::string& library, int file, const py::buffer& offsets,
                            const py::buffer& counts, py::ssize_t columns,
                            std::array<py::ssize_t, 2> size, const py::bytes& tables, bool ycbcr) {
    const auto sides = offsets.request();
    const auto n = sides.ndim == 1 ? sides.shape[0] : 0;
    const auto begin = contiguous_buffer<std::int64_t>(offsets, "offsets", "int64", {n});
    const auto length = contiguous_buffer<std::int64_t>(counts, "counts", "int64", {n});
    if (n < 1 || columns < 1 || n % columns)
        throw std::invalid_argument("columns: expected a divisor of the " + std::to_string(n) +
                                    " tiles, got " + std::to_string(columns));
    for (const auto side : size)
        if (side < 1 || side > 65'535)
            throw std::invalid_argument("size: expected sides of 1 to 65535 px, got " +
                                        std::to_string(side));
    const auto *first = static_cast<const std::int64_t*>(begin.ptr),
               *lengths = static_cast<const std::int64_t*>(length.ptr);
    const std::string bytes = tables;
    return {motet::load_jpeg_library(library),
            file,
            {first, first + n},
            {lengths, lengths + n},
            static_cast<std::size_t>(columns),
            static_cast<std::size_t>(size[0]),
            static_cast<std::size_t>(size[1]),
            {bytes.begin(), bytes.end()},
            ycbcr};
}

std::vector<std::string> read_regions(const motet::JpegTiles& tiles,
                                      const std::vector<std::array<py::ssize_t, 2>>& corners,
                                      const std::vector<py::buffer>& out) {
    if (corners.size() != out.size())
        throw std::invalid_argument("out: expected an image for each of " +
                                    std::to_string(corners.size()) + " corners, got " +
                                    std::to_string(out.size()));
    const auto width = static_cast<py::ssize_t>(tiles.columns * tiles.width),
               height = static_cast<py::ssize_t>(tiles.rows() * tiles.height);
    std::vector<py::buffer_info> images;  // they hold the memory until the end
    std::vector<motet::JpegRegion> regions;
    for (std::size_t i = 0; i < out.size(); ++i) {
        const auto& to = images.emplace_back(image_buffer(out[i], "out", true));
        const auto [x, y] = corners[i];
        if (x < 0 || y < 0 || x > width - to.shape[1] || y > height - to.shape[0])
            throw std::invalid_argument("corners: expected regions within the tiles, got one at " +
                                        std::to_string(x) + ", " + std::to_string(y));
        regions.push_back({static_cast<std::size_t>(x), static_cast<std::size_t>(y),
                           static_cast<std::size_t>(to.shape[1]),
                           static_cast<std::size_t>(to.shape[0]),
                           static_cast<std::uint8_t*>(to.ptr), to.strides[0]});
    }
    py::gil_scoped_release release;
    return motet::read_regions(tiles, regions);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Pixels on raw CPU buffers; motet.io is the public interface.";
    module.def("area_resample", &area_resample, py::arg("image"), py::arg("rows"),
               py::arg("columns"), py::arg("ratio"), py::arg("out"));
    module.def("stain_planes", &stain_planes, py::arg("pixels"), py::arg("down"), py::arg("across"),
               py::arg("table"), py::arg("planes"), py::arg("within"));
    module.def("smooth", &smooth, py::arg("image"), py::arg("weights"), py::arg("out"));
    py::class_<motet::JpegTiles>(module, "JpegTiles")
        .def(py::init(&jpeg_tiles), py::arg("library"), py::arg("file"), py::arg("offsets"),
             py::arg("counts"), py::arg("columns"), py::arg("size"), py::arg("tables"),
             py::arg("ycbcr"))
        .def("read", &read_regions, py::arg("corners"), py::arg("out"));
}
