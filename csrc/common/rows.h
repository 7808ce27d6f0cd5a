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

// Memory for one call; freed with it.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(static_cast<char*>(::operator new(static_cast<size_t>(bytes + kCacheLine)))) {}
  ~Scratch() { ::operator delete(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  // Aligned to a cache line.
  char* data() const {
    const auto place = reinterpret_cast<uintptr_t>(memory_);
    return memory_ + (kCacheLine - place % kCacheLine) % kCacheLine;
  }

 private:
  char* memory_;
};

constexpr int64_t padded(int64_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

// Work on a batch of images, cut further where images are fewer than threads.
struct Pieces {
  int64_t batch, per_image;
  int threads;

  // An image can be cut into `most` pieces; `bytes` is what the whole call moves.
  Pieces(int64_t batch, int64_t most, int64_t bytes)
      : batch(batch), per_image(1), threads(bytes < kSerialBytes ? 1 : max_threads()) {
    if (batch > 0 && batch < threads) {
      const int64_t wanted = (threads + batch - 1) / batch;
      per_image = most < 1 ? 1 : most < wanted ? most : wanted;
    }
  }

  // Calls work(b, piece, memory), memory being the calling thread's own scratch_bytes.
  template <class Work>
  void for_each(int64_t scratch_bytes, const Work& work) const {
    if (batch * per_image == 0) return;
    const Scratch memory(threads * scratch_bytes);
    parallel_for(batch * per_image, threads, [&](int part, int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        work(item / per_image, item % per_image, memory.data() + part * scratch_bytes);
      }
    });
  }
};

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

// Calls Function<T> for the dtype of a checked floating-point tensor.
#define VIOPS_FOR_DTYPE(view, Function, ...)                      \
  switch ((view).dtype) {                                         \
    case DType::float32: return Function<float>(__VA_ARGS__);     \
    case DType::float64: return Function<double>(__VA_ARGS__);    \
    case DType::bfloat16: return Function<bfloat16>(__VA_ARGS__); \
    default: return Function<float16>(__VA_ARGS__);               \
  }

}  // namespace viops
