// Threads without a runtime of our own: OpenMP's where the process has one, else std::thread.
#pragma once

#include <cstddef>
#include <functional>

namespace motet {

// Runs work(begin, end) on up to `threads` near-equal parts of [0, size). Where libgomp is loaded,
// its threads do the work: torch's OpenMP threads spin for a while after each operator, and other
// threads beside them would get half a core each.
void parallel_for(std::size_t size, int threads,
                  const std::function<void(std::size_t, std::size_t)>& work);

}  // namespace motet
