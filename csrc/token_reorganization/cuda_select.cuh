// Which patches stay: the order of the scores on the GPU, exact and the same in every run.
//
// Scores become integers of their order.  Up to kMaxCounted patches a block counts for each how many come
// before it; up to kMaxSorted it sorts them; beyond, a kernel of its own counts over the whole grid.
#pragma once

#include "common/cuda.cuh"
#include "token_reorganization/cuda_rows.cuh"
#include "token_reorganization/token_reorganization.h"

namespace viops::token_reorganization {
namespace {

constexpr int kMaxCounted = 512;    // a thread a patch at most
constexpr int kMaxSorted = 4096;    // what a block holds in shared memory
constexpr int kRankedInBlock = 64;  // patches that a block of rank_kernel ranks

// Scores [B, P] of any floating dtype.
struct Scores {
  void* data;
  DType dtype;
  int64_t stride_b, stride_p;

  template <class A>
  __device__ A get(int64_t b, int64_t place) const {
    const int64_t at = b * stride_b + place * stride_p;
    switch (dtype) {
      case DType::float32: return static_cast<A>(static_cast<const float*>(data)[at]);
      case DType::float64: return static_cast<A>(static_cast<const double*>(data)[at]);
      case DType::bfloat16: return static_cast<A>(widen(static_cast<const __nv_bfloat16*>(data)[at]));
      default: return static_cast<A>(widen(static_cast<const __half*>(data)[at]));
    }
  }

  template <class A>
  __device__ void set(int64_t b, int64_t place, A value) const {
    const int64_t at = b * stride_b + place * stride_p;
    switch (dtype) {
      case DType::float32: static_cast<float*>(data)[at] = static_cast<float>(value); break;
      case DType::float64: static_cast<double*>(data)[at] = static_cast<double>(value); break;
      case DType::bfloat16: static_cast<__nv_bfloat16*>(data)[at] = Narrow<__nv_bfloat16>::of(value); break;
      default: static_cast<__half*>(data)[at] = Narrow<__half>::of(value);
    }
  }
};

// An integer in the order of the score, at least 1: NaN highest, -0 equal to 0.
__device__ __forceinline__ uint32_t sort_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return score != score ? UINT32_MAX : bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ __forceinline__ uint64_t sort_key(double score) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(score + 0.0));
  return score != score ? UINT64_MAX : bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

template <class A>
using SortKey = decltype(sort_key(A()));

// Keys that one load brings from shared memory.
template <class Key>
struct alignas(16) KeyVector {
  static constexpr int kSize = 16 / sizeof(Key);
  Key at[kSize];
};

// The shared memory of a block that selects, for `capacity` places, a multiple of 32.
template <class A>
struct Room {
  int capacity;
  int* places;          // [capacity]
  A* weights;           // [capacity]
  SortKey<A>* keys;     // [capacity], where the weights are written later
  int* ranks;           // [capacity]
  unsigned* is_kept;    // [capacity / 32], a bit a place; where ranks are not needed
  int* dropped_before;  // [capacity / 32], how many places of earlier words are not kept

  static int64_t bytes(int64_t capacity) {
    return capacity * static_cast<int64_t>(2 * sizeof(int) + sizeof(A));
  }

  __device__ Room(char* memory, int capacity)
      : capacity(capacity),
        places(reinterpret_cast<int*>(memory)),
        weights(reinterpret_cast<A*>(places + capacity)),
        keys(reinterpret_cast<SortKey<A>*>(weights)),
        ranks(reinterpret_cast<int*>(weights + capacity)),
        is_kept(reinterpret_cast<unsigned*>(ranks)),
        dropped_before(ranks + capacity / 32) {}
};

// How many of the keys [first, last) * kSize of a tile come before `own`, which stands at `place`, counted
// from the tile's first: those of a higher key, and the earlier ones of an equal key.
template <class Key>
__device__ __forceinline__ int count_before(const KeyVector<Key>* tile, int first, int last, Key own,
                                            int place) {
  constexpr int kSize = KeyVector<Key>::kSize;
  const int own_vector = place < 0 ? -1 : place / kSize;
  int count = 0;
  for (int i = first; i < last; ++i) {
    const KeyVector<Key> keys = tile[i];
    // an earlier one comes before an equal one: compare with one less, which no key underflows
    const Key limit = own - (i < own_vector);
#pragma unroll
    for (int k = 0; k < kSize; ++k) count += keys.at[k] > limit;
  }
  if (first <= own_vector && own_vector < last) {
    for (int k = 0; k < place % kSize; ++k) count += tile[own_vector].at[k] == own;
  }
  return count;
}

// room.places [P] = the places by falling score, each patch's rank counted by several threads.
template <class A>
__device__ void order_by_counting(const Scores& scores, int64_t b, int num_patches, const Room<A>& room) {
  using Key = SortKey<A>;
#pragma unroll 1
  for (int i = threadIdx.x; i < room.capacity; i += kThreads) {
    room.keys[i] = i < num_patches ? sort_key(scores.get<A>(b, i)) : Key(0);
    room.ranks[i] = 0;
  }
  __syncthreads();
  const int parts = kThreads / room.capacity;
  const int part = static_cast<int>(threadIdx.x) / room.capacity;
  const int own = static_cast<int>(threadIdx.x) % room.capacity;
  if (part < parts && own < num_patches) {
    const int vectors = room.capacity / KeyVector<Key>::kSize;
    const auto* tile = reinterpret_cast<const KeyVector<Key>*>(room.keys);
    const int count =
        count_before(tile, vectors * part / parts, vectors * (part + 1) / parts, room.keys[own], own);
    atomicAdd(&room.ranks[own], count);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_patches; i += kThreads) room.places[room.ranks[i]] = i;
  __syncthreads();
}

// The same by a bitonic sort; the capacity is a power of two.
template <class A>
__device__ void order_by_sorting(const Scores& scores, int64_t b, int num_patches, const Room<A>& room) {
  using Key = SortKey<A>;
#pragma unroll 1
  for (int i = threadIdx.x; i < room.capacity; i += kThreads) {
    room.keys[i] = i < num_patches ? sort_key(scores.get<A>(b, i)) : Key(0);
    room.places[i] = i;
  }
  __syncthreads();
  for (int run = 2; run <= room.capacity; run *= 2) {
    for (int distance = run / 2; distance > 0; distance /= 2) {
      for (int pair = threadIdx.x; pair < room.capacity / 2; pair += kThreads) {
        const int i = 2 * pair - (pair & (distance - 1)), j = i + distance;
        const Key a = room.keys[i], c = room.keys[j];
        const int place_a = room.places[i], place_c = room.places[j];
        const bool in_order = a > c || (a == c && place_a < place_c);
        const bool falling = (i & run) == 0;
        if (in_order != falling) {
          room.keys[i] = c, room.keys[j] = a;
          room.places[i] = place_c, room.places[j] = place_a;
        }
      }
      __syncthreads();
    }
  }
}

// How many places the room must have for order_places.
inline int capacity_to_order(int num_patches) {
  int capacity = (num_patches + 31) / 32 * 32;
  if (num_patches > kMaxCounted) {
    for (capacity = kMaxCounted; capacity < num_patches;) capacity *= 2;
  }
  return capacity > 32 ? capacity : 32;
}

template <class A>
__device__ void order_places(const Scores& scores, int64_t b, int num_patches, const Room<A>& room) {
  if (num_patches <= kMaxCounted) {
    order_by_counting(scores, b, num_patches, room);
  } else {
    order_by_sorting(scores, b, num_patches, room);
  }
}

// index [B, keep] contiguous = the places by falling score, for any P.  A block ranks kRankedInBlock patches
// of an image against all, several threads a patch.
template <class A>
__global__ void __launch_bounds__(kThreads)
    rank_kernel(Scores scores, int num_patches, int keep, int64_t* index) {
  using Key = SortKey<A>;
  constexpr int kParts = kThreads / kRankedInBlock;
  constexpr int kPartVectors = 64;
  constexpr int kTileKeys = kParts * kPartVectors * KeyVector<Key>::kSize;
  VIOPS_SHARED(KeyVector<Key>, tile, [kParts * kPartVectors]);
  VIOPS_SHARED(int, ranks, [kRankedInBlock]);
  const unsigned blocks_an_image = (static_cast<unsigned>(num_patches) + kRankedInBlock - 1) / kRankedInBlock;
  const int64_t b = blockIdx.x / blocks_an_image;
  const int own = static_cast<int>(threadIdx.x) % kRankedInBlock;
  const int part = static_cast<int>(threadIdx.x) / kRankedInBlock;
  const int64_t place = int64_t{blockIdx.x % blocks_an_image} * kRankedInBlock + own;
  const Key key = place < num_patches ? sort_key(scores.get<A>(b, place)) : Key(1);
  if (part == 0) ranks[own] = 0;
  int count = 0;
  for (int64_t first = 0; first < num_patches; first += kTileKeys) {
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kTileKeys; i += kThreads) {
      tile[i / KeyVector<Key>::kSize].at[i % KeyVector<Key>::kSize] =
          first + i < num_patches ? sort_key(scores.get<A>(b, first + i)) : Key(0);
    }
    __syncthreads();
    count += count_before(tile, kPartVectors * part, kPartVectors * (part + 1), key,
                          static_cast<int>(place - first));
  }
  atomicAdd(&ranks[own], count);
  __syncthreads();
  if (part == 0 && place < num_patches && ranks[own] < keep) index[b * keep + ranks[own]] = place;
}

// index [B, keep] of any strides, as a caller gave it.
struct Index {
  int64_t* data;
  int64_t stride_b, stride_k;
  int keep;

  __device__ int64_t get(int64_t b, int64_t k) const { return data[b * stride_b + k * stride_k]; }
};

// A place that a caller gave; one outside 0..P-1 ends the kernel before anything is read there.
__device__ __forceinline__ int checked_place(const Index& index, int64_t b, int64_t k, int num_patches) {
  const int64_t place = index.get(b, k);
  VIOPS_DEVICE_ASSERT(place >= 0 && place < num_patches, "index: expected places from 0 to P - 1");
  return static_cast<int>(place);
}

// room.places = those of the places [first, first + count) that row b of the index lacks, rising; returns how
// many.  At most `capacity` places at a time.  `twice` becomes true where the thread met a place again.
template <class A>
__device__ int list_dropped(const Index& index, int64_t b, int first, int count, const Room<A>& room,
                            bool& twice) {
  const int words = (count + 31) / 32;
  for (int word = threadIdx.x; word < words; word += kThreads) room.is_kept[word] = 0;
  __syncthreads();
#pragma unroll 1
  for (int k = threadIdx.x; k < index.keep; k += kThreads) {
    const int64_t place = index.get(b, k) - first;
    if (place < 0 || place >= count) continue;
    const unsigned bit = 1u << place % 32;
    twice |= (atomicOr(&room.is_kept[place / 32], bit) & bit) != 0;
  }
  __syncthreads();
  for (int word = threadIdx.x; word < words; word += kThreads) {
    int before = 0;
    for (int i = 0; i < word; ++i) before += __popc(~room.is_kept[i]);
    room.dropped_before[word] = before;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const unsigned dropped = ~room.is_kept[i / 32], bit = 1u << i % 32;
    if (dropped & bit) room.places[room.dropped_before[i / 32] + __popc(dropped & (bit - 1))] = first + i;
  }
  const int last = words - 1;
  const unsigned in_last = count % 32 ? (1u << count % 32) - 1 : ~0u;
  const int num_dropped = room.dropped_before[last] + __popc(~room.is_kept[last] & in_last);
  __syncthreads();
  return num_dropped;
}

}  // namespace
}  // namespace viops::token_reorganization
