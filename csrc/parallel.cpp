#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace motet {
namespace {

// One parallel_for: its threads take parts until none is left.
struct ParallelLoop {
    const std::function<void(std::size_t, std::size_t)>& work;
    std::size_t size, parts;
    std::atomic<std::size_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure{};  // the first one: an exception that left a thread would abort

    void run() noexcept {
        for (std::size_t part; (part = next.fetch_add(1)) < parts;) try {
                work(size * part / parts, size * (part + 1) / parts);
            } catch (...) {
                if (!failed.exchange(true)) failure = std::current_exception();
            }
    }
};

using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Returns GOMP_parallel of a libgomp that the process has loaded already, else null; loads none.
Team openmp_team() {
#if defined(__linux__)
    static const Team team = [] {
        void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
        return library ? reinterpret_cast<Team>(dlsym(library, "GOMP_parallel")) : nullptr;
    }();
    return team;
#else
    return nullptr;
#endif
}

}  // namespace

void parallel_for(std::size_t size, int threads,
                  const std::function<void(std::size_t, std::size_t)>& work) {
    const auto parts = std::min(size, static_cast<std::size_t>(std::max(threads, 1)));
    if (parts <= 1) {
        if (size) work(0, size);
        return;
    }
    ParallelLoop loop{work, size, parts};
    if (const Team team = openmp_team()) {
        team([](void* data) { static_cast<ParallelLoop*>(data)->run(); }, &loop,
             static_cast<unsigned>(parts), 0);
        if (loop.failed) std::rethrow_exception(loop.failure);
        return;
    }
    std::vector<std::thread> others;
    try {
        for (std::size_t i = 1; i < parts; ++i) others.emplace_back([&loop] { loop.run(); });
    } catch (const std::system_error&) {
        // The system has no more threads: those that were started take all parts.
    }
    loop.run();
    for (auto& thread : others) thread.join();
    if (loop.failed) std::rethrow_exception(loop.failure);
}

}  // namespace motet
