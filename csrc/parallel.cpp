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

struct Job {
    const std::function<void(std::size_t, std::size_t)>& work;
    std::size_t size, parts;
    std::atomic<std::size_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure{};  // the first; none may leave a thread

    void run() noexcept {
        for (std::size_t part; (part = next.fetch_add(1)) < parts;) try {
                work(size * part / parts, size * (part + 1) / parts);
            } catch (...) {
                if (!failed.exchange(true)) failure = std::current_exception();
            }
    }
};

using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// GOMP_parallel of a libgomp that is loaded already; never loads one.
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
    Job job{work, size, parts};
    if (const Team team = openmp_team()) {
        team([](void* data) { static_cast<Job*>(data)->run(); }, &job, static_cast<unsigned>(parts),
             0);
        if (job.failed) std::rethrow_exception(job.failure);
        return;
    }
    std::vector<std::thread> others;
    try {
        for (std::size_t i = 1; i < parts; ++i) others.emplace_back([&job] { job.run(); });
    } catch (const std::system_error&) {
        // No thread to be had: those that there are take all parts.
    }
    job.run();
    for (auto& thread : others) thread.join();
    if (job.failed) std::rethrow_exception(job.failure);
}

}  // namespace motet
