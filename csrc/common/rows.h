// Loops over one contiguous row, and memory for a call.  Local to the including file: see cpu_level.h.
//
// T is an element's type (float, double, bfloat16, float16), A the type that sums are held in.
#pragma once

#include <new>

#include "common/simd.h"
#include "common/threads.h"

namespace viops {
namespace {

constexpr int64_t kCacheLine = 64;

// Below this many bytes moved, waking other threads costs more than they save.
constexpr int64_t kSerialBytes = 128 << 10;
int threads_for(int64_t bytes) { return bytes < kSerialBytes ? 1 : max_threads(); }

// Memory for one call; freed with it.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(static_cast<char*>(::operator new(static_cast<size_t>(bytes + kCacheLine)))) {}
  ~Scratch() { ::operator delete(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return memory_; }

 private:
  char* memory_;
};

constexpr int64_t padded(int64_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// sum[c] = (fresh ? 0 : sum[c]) + the weighted rows, in their order.
template <class T, class A>
void add_rows(A* sum, bool fresh, const T* const* rows, const A* weights, int count, int64_t channels) {
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) {
    Vector<A> total = fresh ? Vector<A>{} : load<A>(sum + c);
    for (int r = 0; r < count; ++r) total += weights[r] * load<A>(rows[r] + c);
    store<A>(sum + c, total);
  }
  for (; c < channels; ++c) {
    A total = fresh ? A(0) : sum[c];
    for (int r = 0; r < count; ++r) total += weights[r] * static_cast<A>(widen(rows[r][c]));
    sum[c] = total;
  }
}

template <class T, class A>
void narrow_row(T* to, const A* from, int64_t channels) {
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) store<A>(to + c, load<A>(from + c));
  for (; c < channels; ++c) to[c] = Narrow<T, A>::of(from[c]);
}

template <class T, class A>
void widen_row(A* to, const T* from, int64_t channels) {
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) store<A>(to + c, load<A>(from + c));
  for (; c < channels; ++c) to[c] = static_cast<A>(widen(from[c]));
}

template <class T, class A>
void scale_row(T* to, const A* from, A weight, int64_t channels) {
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) store<A>(to + c, weight * load<A>(from + c));
  for (; c < channels; ++c) to[c] = Narrow<T, A>::of(weight * from[c]);
}

template <class T, class A>
A dot_row(const T* a, const A* b, int64_t channels) {
  Vector<A> even{}, odd{};
  int64_t c = 0;
  for (; c + 2 * kLanes<A> <= channels; c += 2 * kLanes<A>) {
    even += load<A>(a + c) * load<A>(b + c);
    odd += load<A>(a + c + kLanes<A>) * load<A>(b + c + kLanes<A>);
  }
  for (; c + kLanes<A> <= channels; c += kLanes<A>) even += load<A>(a + c) * load<A>(b + c);
  A sum = sum_lanes(even + odd);
  for (; c < channels; ++c) sum += static_cast<A>(widen(a[c])) * b[c];
  return sum;
}

}  // namespace
}  // namespace viops
