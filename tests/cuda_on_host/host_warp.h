// CUDA's barriers and warp exchanges.
#pragma once

#include <cstring>
#include <type_traits>

#include "executor.h"

using viops::on_host::Lanes;
using viops::on_host::Location;

inline void __syncthreads(Location where = Location::current()) {
  viops::on_host::block_barrier("__syncthreads", 0, where);
}
inline int __syncthreads_count(int predicate, Location where = Location::current()) {
  return viops::on_host::block_barrier("__syncthreads_count", predicate, where).count;
}
inline int __syncthreads_or(int predicate, Location where = Location::current()) {
  return viops::on_host::block_barrier("__syncthreads_or", predicate, where).count > 0;
}
inline int __syncthreads_and(int predicate, Location where = Location::current()) {
  const auto votes = viops::on_host::block_barrier("__syncthreads_and", predicate, where);
  return votes.count == votes.threads;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, Location where = Location::current()) {
  viops::on_host::together("__syncwarp", mask, nullptr, [](const Lanes&) {}, where, true);
}

namespace viops::on_host {

template <class T>
struct Shuffle {
  T value;
  int source;  // a lane
  T result;
};

template <class T>
void shuffle(const Lanes& lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!lanes.has(lane)) continue;
    auto& own = lanes.get<Shuffle<T>>(lane);
    if (!lanes.has(own.source)) fail_of(lane, "reads from an inactive lane");
    own.result = lanes.get<Shuffle<T>>(own.source).value;
  }
}

template <class T>
T shuffle_from(const char* name, unsigned mask, T value, int source, Location where) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles take 4 or 8 bytes");
  Shuffle<T> own = {value, source, value};
  together(name, mask, &own, shuffle<T>, where);
  return own.result;
}

inline void check_width(int width, Location where) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("a width that is no power of two up to 32", where);
}

struct Vote {
  uint64_t value;
  unsigned result;
};

inline void ballot(const Lanes& lanes) {
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes.has(lane) && lanes.get<Vote>(lane).value) result |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes.has(lane)) lanes.get<Vote>(lane).result = result;
  }
}

inline void match(const Lanes& lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!lanes.has(lane)) continue;
    auto& own = lanes.get<Vote>(lane);
    own.result = 0;
    for (int other = 0; other < 32; ++other) {
      if (lanes.has(other) && lanes.get<Vote>(other).value == own.value) own.result |= 1u << other;
    }
  }
}

// How many lanes take part, beside their votes.
struct CountedVote : Vote {
  unsigned active;
};

inline void counted_ballot(const Lanes& lanes) {
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes.has(lane) && lanes.get<CountedVote>(lane).value) result |= 1u << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!lanes.has(lane)) continue;
    lanes.get<CountedVote>(lane).result = result;
    lanes.get<CountedVote>(lane).active = lanes.active;
  }
}

template <class T>
struct Reduction {
  T value;
  T (*join)(T, T);
};

template <class T>
void reduce(const Lanes& lanes) {
  bool first = true;
  T total = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!lanes.has(lane)) continue;
    auto& own = lanes.get<Reduction<T>>(lane);
    total = first ? own.value : own.join(total, own.value);
    first = false;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes.has(lane)) lanes.get<Reduction<T>>(lane).value = total;
  }
}

template <class T>
T reduce_sync(const char* name, unsigned mask, T value, T (*join)(T, T), Location where) {
  Reduction<T> own = {value, join};
  together(name, mask, &own, reduce<T>, where);
  return own.value;
}

}  // namespace viops::on_host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Location where = Location::current()) {
  viops::on_host::check_width(width, where);
  const int lane = viops::on_host::lane_of_this_thread();
  const int from = (lane & ~(width - 1)) | (source & (width - 1));
  return viops::on_host::shuffle_from("__shfl_sync", mask, value, from, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 Location where = Location::current()) {
  viops::on_host::check_width(width, where);
  const int lane = viops::on_host::lane_of_this_thread();
  const int from = lane - static_cast<int>(delta & 31);
  return viops::on_host::shuffle_from("__shfl_up_sync", mask, value,
                                      from < (lane & ~(width - 1)) ? lane : from, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   Location where = Location::current()) {
  viops::on_host::check_width(width, where);
  const int lane = viops::on_host::lane_of_this_thread();
  const int from = lane + static_cast<int>(delta & 31);
  return viops::on_host::shuffle_from("__shfl_down_sync", mask, value,
                                      from > (lane | (width - 1)) ? lane : from, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  Location where = Location::current()) {
  viops::on_host::check_width(width, where);
  const int lane = viops::on_host::lane_of_this_thread();
  const int from = lane ^ (lane_mask & 31);
  return viops::on_host::shuffle_from("__shfl_xor_sync", mask, value,
                                      from > (lane | (width - 1)) ? lane : from, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Location where = Location::current()) {
  viops::on_host::Vote own = {predicate != 0, 0};
  viops::on_host::together("__ballot_sync", mask, &own, viops::on_host::ballot, where);
  return own.result;
}
inline int __any_sync(unsigned mask, int predicate, Location where = Location::current()) {
  viops::on_host::Vote own = {predicate != 0, 0};
  viops::on_host::together("__any_sync", mask, &own, viops::on_host::ballot, where);
  return own.result != 0;
}
inline int __all_sync(unsigned mask, int predicate, Location where = Location::current()) {
  viops::on_host::CountedVote own = {{predicate != 0, 0}, 0};
  viops::on_host::together("__all_sync", mask, &own, viops::on_host::counted_ballot, where);
  return own.result == own.active;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, Location where = Location::current()) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "matches take 4 or 8 bytes");
  viops::on_host::Vote own = {0, 0};
  std::memcpy(&own.value, &value, sizeof(value));
  viops::on_host::together("__match_any_sync", mask, &own, viops::on_host::match, where);
  return own.result;
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* predicate, Location where = Location::current()) {
  const unsigned same = __match_any_sync(mask, value, where);
  *predicate = __all_sync(mask, __popc(same) == __popc(__ballot_sync(mask, 1, where)), where);
  return *predicate ? same : 0;
}

#define VIOPS_REDUCE(name, type, expression)                                                      \
  inline type name(unsigned mask, type value, Location where = Location::current()) {             \
    return viops::on_host::reduce_sync<type>(                                                     \
        #name, mask, value, [](type a, type b) { return static_cast<type>(expression); }, where); \
  }
VIOPS_REDUCE(__reduce_add_sync, unsigned, a + b)
VIOPS_REDUCE(__reduce_add_sync, int, static_cast<unsigned>(a) + static_cast<unsigned>(b))
VIOPS_REDUCE(__reduce_min_sync, unsigned, b < a ? b : a)
VIOPS_REDUCE(__reduce_min_sync, int, b < a ? b : a)
VIOPS_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
VIOPS_REDUCE(__reduce_max_sync, int, a < b ? b : a)
VIOPS_REDUCE(__reduce_and_sync, unsigned, a& b)
VIOPS_REDUCE(__reduce_or_sync, unsigned, a | b)
VIOPS_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef VIOPS_REDUCE
