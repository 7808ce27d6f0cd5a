// Loops over threads on the OpenMP runtime that torch already runs, so that the process has one
// runtime and torch.set_num_threads holds.
#pragma once

#include <cstdint>

namespace viops {

// How many threads a loop may use: omp_get_max_threads() of torch's runtime; 1 in a forked child,
// where that runtime's threads do not exist.
int max_threads();

// The path of the OpenMP runtime in use, or "none": then loops run on one thread.
const char* openmp_runtime();

// Splits [0, count) into at most `threads` contiguous ranges, always the same for the same thread count,
// and calls body(context, part, begin, end) for each that is not empty, part in 0..threads-1 and each on a
// thread of its own.  The body must not throw.
void parallel_ranges(int64_t count, int threads, void (*body)(void*, int, int64_t, int64_t), void* context);

// The same for a callable.  `Body` is a lambda of the calling file, so nothing is shared between files
// that are compiled for different CPU levels.
template <class Body>
inline __attribute__((always_inline)) void parallel_for(int64_t count, int threads, Body&& body) {
  parallel_ranges(
      count, threads,
      [](void* context, int part, int64_t begin, int64_t end) {
        (*static_cast<Body*>(context))(part, begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace viops
