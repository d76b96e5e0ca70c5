#include "jpeg_tiles.hpp"

#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csetjmp>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

// libjpeg is called through pointers, so that nothing is needed when motet is built. The structures
// below have the layout of libjpeg's own up to the last field that is used here. That layout is the
// same in its versions 6.2, 7 and 8, whose interfaces libjpeg-turbo offers; the library itself says
// which of them it has, and how large its structure is.
namespace motet {
namespace {

constexpr int kRgb = 2, kYcbcr = 3;  // colour spaces
constexpr int kWithImage = 1, kHeaderIsComplete = 1;
constexpr std::size_t kSlack = 1 << 16;  // most bytes of a tile above four times its pixels

struct Errors {  // jpeg_error_mgr
    void (*error_exit)(void*);
    void (*emit_message)(void*, int);
    void (*output_message)(void*);
    void (*format_message)(void*, char*);
    void (*reset)(void*);
    int code;
    int parameters[20];
    int trace_level;
    long warnings;
    const char* const* messages;
    int last_message;
    const char* const* more_messages;
    int first_more, last_more;
};

struct Decompressor {  // jpeg_decompress_struct
    Errors* errors;
    void *memory, *progress, *client;
    int is_decompressor, state;
    void* source;
    unsigned width, height;
    int components, colours, out_colours;
    unsigned scale, scale_denominator;
    double gamma;
    int is_buffered, is_raw, dct, fancy_upsampling, smoothing, quantised, dither, two_pass;
    int palette_size, one_pass_enabled, palette_enabled, two_pass_enabled;
    unsigned out_width, out_height;
    int out_colour_components, out_components, rows_at_once, palette_colours;
    void* palette;
    unsigned row;
    unsigned char others[1024];
};
static_assert(sizeof(void*) != 8 || sizeof(long) != 8 ||
              (offsetof(Errors, warnings) == 128 && sizeof(Errors) == 168 &&
               offsetof(Decompressor, out_width) == 136 && offsetof(Decompressor, row) == 168));

}  // namespace

struct JpegLibrary {
    Errors* (*std_error)(Errors*);
    void (*create)(Decompressor*, int version, std::size_t size);
    void (*set_source)(Decompressor*, const unsigned char*, unsigned long size);
    int (*read_header)(Decompressor*, int);
    int (*start)(Decompressor*);
    unsigned (*read_rows)(Decompressor*, unsigned char**, unsigned count);
    int (*finish)(Decompressor*);
    void (*abort)(Decompressor*);
    void (*destroy)(Decompressor*);
    int version;
    std::size_t size;
};

namespace {

// One decompressor with its errors. No C++ object is on the stack of a function that calls setjmp,
// since a jump does not run destructors.
struct Decoder {
    const JpegLibrary& library;
    Decompressor jpeg{};
    Errors errors{};
    std::jmp_buf escape;
    char why[256] = "";  // libjpeg writes at most 200

    explicit Decoder(const JpegLibrary& libjpeg) : library(libjpeg) {
        jpeg.errors = library.std_error(&errors);
        jpeg.client = this;
        errors.error_exit = [](void* jpeg) {
            Decoder& decoder = of(jpeg);
            decoder.errors.format_message(jpeg, decoder.why);
            std::longjmp(decoder.escape, 1);
        };
        errors.emit_message = [](void* jpeg, int level) {
            Decoder& decoder = of(jpeg);
            if (level < 0 && !decoder.errors.warnings++)
                decoder.errors.format_message(jpeg, decoder.why);
        };
    }
    Decoder(const Decoder&) = delete;
    ~Decoder() {
        if (jpeg.memory) library.destroy(&jpeg);
    }

    static Decoder& of(void* jpeg) {
        return *static_cast<Decoder*>(static_cast<Decompressor*>(jpeg)->client);
    }

    // Returns false if the library has another version or size of the structure; it writes its own
    // as the first parameter of the error.
    bool create(int version, std::size_t size) {
        if (setjmp(escape)) return false;
        library.create(&jpeg, version, size);
        return true;
    }

    // Decodes a tile into its rows. Returns false, and why, after an error or a warning.
    bool decode(const JpegTiles& tiles, const unsigned char* data, std::size_t size,
                unsigned char** rows) {
        if (setjmp(escape)) {
            library.abort(&jpeg);
            return false;
        }
        if (!tiles.tables.empty()) {
            library.set_source(&jpeg, tiles.tables.data(), tiles.tables.size());
            library.read_header(&jpeg, !kWithImage);
        }
        library.set_source(&jpeg, data, size);
        if (library.read_header(&jpeg, kWithImage) != kHeaderIsComplete ||
            jpeg.width != tiles.width || jpeg.height != tiles.height || jpeg.components != 3) {
            std::strcpy(why, "a tile of another size or number of samples");
            library.abort(&jpeg);
            return false;
        }
        jpeg.colours = tiles.ycbcr ? kYcbcr : kRgb;
        jpeg.out_colours = kRgb;
        errors.warnings = 0;  // those of the header, such as of its JFIF version, are no damage
        library.start(&jpeg);
        while (jpeg.row < jpeg.height)
            library.read_rows(&jpeg, rows + jpeg.row, jpeg.height - jpeg.row);
        library.finish(&jpeg);
        return errors.warnings == 0;
    }
};

template <typename Function>
void find(void* library, const char* name, Function& function) {
    void* symbol = dlsym(library, name);
    if (!symbol) throw std::runtime_error(std::string("it has no function ") + name);
    function = reinterpret_cast<Function>(symbol);
}

JpegLibrary open_library(const std::string& path) {
    void* const file = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!file) throw std::runtime_error(dlerror());
    JpegLibrary library{};
    void* turbo = nullptr;  // other libjpegs, which lack this function, give other pixels
    find(file, "jpeg_skip_scanlines", turbo);
    find(file, "jpeg_std_error", library.std_error);
    find(file, "jpeg_CreateDecompress", library.create);
    find(file, "jpeg_mem_src", library.set_source);
    find(file, "jpeg_read_header", library.read_header);
    find(file, "jpeg_start_decompress", library.start);
    find(file, "jpeg_read_scanlines", library.read_rows);
    find(file, "jpeg_finish_decompress", library.finish);
    find(file, "jpeg_abort_decompress", library.abort);
    find(file, "jpeg_destroy_decompress", library.destroy);
    Decoder decoder(library);
    if (!decoder.create(0, 0)) library.version = decoder.errors.parameters[0];
    if (!decoder.create(library.version, 0))
        library.size = static_cast<std::size_t>(decoder.errors.parameters[0]);
    const bool is_known = library.version == 62 || library.version == 70 || library.version == 80;
    if (!is_known || library.size < offsetof(Decompressor, others) ||
        library.size > sizeof(Decompressor))
        throw std::runtime_error("its interface has version " + std::to_string(library.version));
    return library;
}

// Reads a range of the file. Returns why it cannot, else "".
std::string read_bytes(int file, std::int64_t offset, std::vector<unsigned char>& bytes) {
    for (std::size_t done = 0; done < bytes.size();) {
        const auto got = pread(file, bytes.data() + done, bytes.size() - done,
                               static_cast<off_t>(offset + static_cast<std::int64_t>(done)));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return std::strerror(errno);
        if (got == 0) return "a tile ends beyond the end of the file";
        done += static_cast<std::size_t>(got);
    }
    return "";
}

// Decodes the tiles of regions, one after the other, with the memory for it.
class Reader {
  public:
    explicit Reader(const JpegTiles& tiles)
        : tiles_(tiles), decoder_(tiles.library), rows_(tiles.height), pixels_(3 * tiles.width) {
        if (!decoder_.create(tiles.library.version, tiles.library.size))
            throw std::runtime_error(decoder_.why);
    }

    std::string read(const JpegRegion& region) {
        const auto right = region.x + region.width, bottom = region.y + region.height;
        for (auto row = region.y / tiles_.height; row * tiles_.height < bottom; ++row)
            for (auto column = region.x / tiles_.width; column * tiles_.width < right; ++column)
                if (auto why = read_tile(region, column, row); !why.empty()) return why;
        return "";
    }

  private:
    std::string read_tile(const JpegRegion& region, std::size_t column, std::size_t row) {
        const auto number = row * tiles_.columns + column;
        const auto count = tiles_.counts[number];
        const auto most = 12 * tiles_.width * tiles_.height + kSlack;
        if (count < 1 || static_cast<std::uint64_t>(count) > most || tiles_.offsets[number] < 0)
            return "a tile of " + std::to_string(count) + " bytes";
        data_.resize(static_cast<std::size_t>(count));
        if (auto why = read_bytes(tiles_.file, tiles_.offsets[number], data_); !why.empty())
            return why;
        // The part of the tile that the region covers: rows top to bottom - 1, and likewise.
        const auto x = column * tiles_.width, y = row * tiles_.height;
        const auto left = std::max(region.x, x) - x, top = std::max(region.y, y) - y;
        const auto right = std::min(region.x + region.width - x, tiles_.width);
        const auto bottom = std::min(region.y + region.height - y, tiles_.height);
        std::uint8_t* const to = region.out +
                                 static_cast<std::ptrdiff_t>(y + top - region.y) * region.stride +
                                 3 * static_cast<std::ptrdiff_t>(x + left - region.x);
        const bool in_place = right - left == tiles_.width;
        // Rows that the region does not need, or needs in part, are decoded into memory aside.
        if (!in_place) pixels_.resize(3 * tiles_.width * tiles_.height);
        for (std::size_t i = 0; i < tiles_.height; ++i) {
            if (in_place)
                rows_[i] = i < top || i >= bottom
                               ? pixels_.data()
                               : to + static_cast<std::ptrdiff_t>(i - top) * region.stride;
            else
                rows_[i] = pixels_.data() + 3 * tiles_.width * i;
        }
        if (!decoder_.decode(tiles_, data_.data(), data_.size(), rows_.data())) return decoder_.why;
        for (auto i = top; !in_place && i < bottom; ++i)
            std::memcpy(to + static_cast<std::ptrdiff_t>(i - top) * region.stride,
                        rows_[i] + 3 * left, 3 * (right - left));
        return "";
    }

    const JpegTiles& tiles_;
    Decoder decoder_;
    std::vector<unsigned char> data_;
    std::vector<unsigned char*> rows_;
    std::vector<unsigned char> pixels_;
};

}  // namespace

const JpegLibrary& load_jpeg_library(const std::string& path) {
    static std::mutex mutex;
    static std::map<std::string, std::unique_ptr<JpegLibrary>> libraries;
    const std::lock_guard lock(mutex);
    auto& library = libraries[path];
    if (!library) library = std::make_unique<JpegLibrary>(open_library(path));
    return *library;
}

std::vector<std::string> read_regions(const JpegTiles& tiles, std::span<const JpegRegion> regions) {
    Reader reader(tiles);
    std::vector<std::string> why;
    why.reserve(regions.size());
    for (const auto& region : regions) why.push_back(reader.read(region));
    return why;
}

}  // namespace motet

#else

namespace motet {

const JpegLibrary& load_jpeg_library(const std::string&) {
    throw std::runtime_error("libraries are loaded at run time on Linux and macOS only");
}

std::vector<std::string> read_regions(const JpegTiles&, std::span<const JpegRegion>) { return {}; }

}  // namespace motet

#endif
