// Kernels with a bug each, and valid ones: `planted NAME [forward|reverse|random] [SEED]`.
//
// Exits 0 where all was right, 3 after a wrong result, 4 where the executor found an error; a sanitizer
// ends the program in its own way.  tests/cuda_on_host/test_executor.py says which build sees what.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/cuda.cuh"
#include "common/ptx.cuh"

namespace viops {
namespace {

constexpr int kThreads = 64;

// --- what bugs are planted into: out[i] = in[place(i)] by way of shared memory

struct Next {
  static __device__ int place(int i) { return (i + 1) % kThreads; }
};
struct Previous {  // which a lower thread has written, where threads run in rising order
  static __device__ int place(int i) { return i > 0 ? i - 1 : 0; }
};
struct OfAnotherWarp {
  static __device__ int place(int i) { return (i + 32) % kThreads; }
};

enum class Step { barrier, warp_barrier, none };

template <Step kStep, class Place, int kRoom = kThreads>
__global__ void permute(const int* in, int* out) {
  VIOPS_SHARED(int, values, [kRoom]);
  const int i = static_cast<int>(threadIdx.x);
  values[i] = in[i];
  if (kStep == Step::barrier) __syncthreads();
  if (kStep == Step::warp_barrier) __syncwarp();
  out[i] = values[Place::place(i)];
}

// Of exactly `count` elements, so that a step beyond them can be seen.
std::unique_ptr<int[]> numbers(int count) {
  std::unique_ptr<int[]> values(new int[static_cast<size_t>(count)]);
  for (int i = 0; i < count; ++i) values[i] = 10 * i;
  return values;
}

template <Step kStep, class Place, int kRoom = kThreads>
bool permutes() {
  const auto in = numbers(kThreads), out = numbers(kThreads);
  launch(permute<kStep, Place, kRoom>, {1, kThreads, 0, nullptr}, in.get(), out.get());
  for (int i = 0; i < kThreads; ++i) {
    if (out[i] != 10 * Place::place(i)) return false;
  }
  return true;
}

// --- memory

__global__ void write_to(int* out, int count) { out[blockIdx.x * blockDim.x + threadIdx.x] = count; }

bool global_overrun() {
  const auto out = numbers(kThreads - 1);
  launch(write_to, {1, kThreads, 0, nullptr}, out.get(), 1);
  return true;
}

__global__ void overrun_dynamic(int* out) {
  VIOPS_DYNAMIC_SHARED(memory);
  int* values = reinterpret_cast<int*>(memory);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

bool dynamic_overrun() {
  const auto out = numbers(kThreads);
  launch(overrun_dynamic, {1, kThreads, (kThreads - 1) * sizeof(int), nullptr}, out.get());
  return true;
}

__global__ void load_vector(const float* in, float4* out) { *out = *reinterpret_cast<const float4*>(in + 1); }

bool misaligned_vector_load() {
  alignas(16) float in[8] = {};
  float4 out;
  launch(load_vector, {1, 1, 0, nullptr}, static_cast<const float*>(in), &out);
  return true;
}

__global__ void sum_into_uninitialised(const int* in, int* out) {
  VIOPS_SHARED(int, total, );
  atomicAdd(&total, in[threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) *out = total;
}

bool uninitialised_shared_memory() {
  const auto in = numbers(kThreads);
  int out = 0;
  launch(sum_into_uninitialised, {1, kThreads, 0, nullptr}, in.get(), &out);
  return out == 10 * kThreads * (kThreads - 1) / 2;
}

// --- blocks

__global__ void add_without_atomics(int* total) {
  if (threadIdx.x == 0) *total += 1;
}

bool race_between_blocks() {
  int total = 0;
  launch(add_without_atomics, {2, 32, 0, nullptr}, &total);
  return total == 2;
}

// --- barriers

__global__ void meet_in_two_places(int* out) {
  if (threadIdx.x < kThreads / 2) {
    __syncthreads();
  } else {
    out[threadIdx.x] = 1;
    __syncthreads();
  }
}

bool divergent_barrier() {
  const auto out = numbers(kThreads);
  launch(meet_in_two_places, {1, kThreads, 0, nullptr}, out.get());
  return true;
}

__global__ void return_early(int* out) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

bool early_return() {
  const auto out = numbers(kThreads);
  launch(return_early, {1, kThreads, 0, nullptr}, out.get());
  return true;
}

// --- exchanges

__global__ void shuffle_half_with_full_mask(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x), 3);
  } else {
    __syncthreads();
  }
}

bool wrong_mask() {
  const auto out = numbers(kThreads);
  launch(shuffle_half_with_full_mask, {1, 32, 0, nullptr}, out.get());
  return true;
}

__global__ void shuffle_outside_its_mask(int* out) {
  out[threadIdx.x] = __shfl_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 3);
}

bool mask_without_the_caller() {
  const auto out = numbers(32);
  launch(shuffle_outside_its_mask, {1, 32, 0, nullptr}, out.get());
  return true;
}

__global__ void vote_in_two_ways(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = static_cast<int>(__ballot_sync(0xffffffffu, 1));
  } else {
    out[threadIdx.x] = __any_sync(0xffffffffu, 1);
  }
}

bool two_exchanges_meet() {
  const auto out = numbers(32);
  launch(vote_in_two_ways, {1, 32, 0, nullptr}, out.get());
  return true;
}

__global__ void use_both_kinds_of_shared_memory(int* out) {
  VIOPS_SHARED(int, fixed, [2048]);
  VIOPS_DYNAMIC_SHARED(memory);
  memory[threadIdx.x] = 1;
  fixed[threadIdx.x] = memory[threadIdx.x];
  out[threadIdx.x] = fixed[threadIdx.x];
}

bool too_much_shared_memory() {
  const auto out = numbers(32);
  launch(use_both_kinds_of_shared_memory, {1, 32, 44 << 10, nullptr}, out.get());
  return true;
}

__global__ void shuffle_from_inactive(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 20);
}

bool inactive_lane() {
  const auto out = numbers(32);
  launch(shuffle_from_inactive, {1, 32, 0, nullptr}, out.get());
  return true;
}

__global__ void read_before_the_copy_ends(const int* in, int* out) {
  VIOPS_SHARED(int4, values, [32]);
  cp_async_16(&values[threadIdx.x], in + 4 * threadIdx.x);
  cp_async_commit();
  out[threadIdx.x] = values[threadIdx.x].y;
}

bool copy_not_waited_for() {
  const auto in = numbers(128), out = numbers(32);
  launch(read_before_the_copy_ends, {1, 32, 0, nullptr}, in.get(), out.get());
  for (int i = 0; i < 32; ++i) {
    if (out[i] != 10 * (4 * i + 1)) return false;
  }
  return true;
}

// --- valid kernels

__global__ void sum_blocks(const int* in, int* out, int count) {
  VIOPS_SHARED(int, partial, [8]);
  int sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    sum += in[blockIdx.x * count + i];
  }
  for (int step = 16; step; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 8) {
    sum = partial[threadIdx.x];
    for (int step = 4; step; step /= 2) sum += __shfl_xor_sync(0xffu, sum, step, 8);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

bool valid_reduction() {
  constexpr int kBlocks = 64, kCount = 1000;
  const auto in = numbers(kBlocks * kCount), out = numbers(kBlocks);
  launch(sum_blocks, {kBlocks, 256, 0, nullptr}, in.get(), out.get(), kCount);
  for (int b = 0; b < kBlocks; ++b) {
    if (out[b] != 10 * (b * kCount * kCount + kCount * (kCount - 1) / 2)) return false;
  }
  return true;
}

__global__ void sort_falling(int* values) {
  VIOPS_DYNAMIC_SHARED(memory);
  int* sorted = reinterpret_cast<int*>(memory);
  const int i = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x);
  sorted[i] = values[blockIdx.x * blockDim.x + i];
  for (int size = 2; size <= count; size *= 2) {
    for (int step = size / 2; step; step /= 2) {
      __syncthreads();
      const int other = i ^ step;
      const bool falling = (i & size) == 0;
      if (other > i && (sorted[i] < sorted[other]) == falling) {
        const int moved = sorted[i];
        sorted[i] = sorted[other];
        sorted[other] = moved;
      }
    }
  }
  __syncthreads();
  values[blockIdx.x * blockDim.x + i] = sorted[i];
}

#if defined(__SANITIZE_THREAD__)
constexpr int kSortBlocks = 2;  // each takes seconds
#else
constexpr int kSortBlocks = 64;
#endif

bool valid_sort() {
  constexpr int kBlocks = kSortBlocks, kCount = 1024;
  const auto values = numbers(kBlocks * kCount);
  for (int i = 0; i < kBlocks * kCount; ++i) values[i] = (i * 7919) % 1009;
  launch(sort_falling, {kBlocks, kCount, kCount * sizeof(int), nullptr}, values.get());
  for (int i = 0; i + 1 < kBlocks * kCount; ++i) {
    if ((i + 1) % kCount && values[i] < values[i + 1]) return false;
  }
  return true;
}

// Each warp for itself, with lanes that have left, and masks of part of a warp.
__global__ void use_part_of_warps(int* out) {
  const unsigned lane = threadIdx.x % 32;
  if (lane >= 24) return;
  int value = static_cast<int>(lane);
  if (lane < 8) {
    value += __shfl_xor_sync(0x000000ffu, value, 1);
  } else {
    value += __shfl_up_sync(0x00ffff00u, value, 1, 8);
  }
  __syncwarp(0x00ffffffu);
  out[threadIdx.x] = value + __popc(__ballot_sync(0xffffffffu, value & 1));
}

bool valid_part_of_warps() {
  const auto out = numbers(70);
  launch(use_part_of_warps, {1, 70, 0, nullptr}, out.get());
  // the sums of lanes 0 to 7, 9 to 15 and 17 to 23 are odd; the last warp has lanes 0 to 5
  return out[0] == 1 + 22 && out[8] == 16 + 22 && out[9] == 17 + 22 && out[30] == 300 && out[64] == 1 + 6;
}

__global__ void exchange_through_warps(int* out) {
  VIOPS_SHARED(int, values, [kThreads]);
  const unsigned i = threadIdx.x;
  for (int round = 0; round < 3; ++round) {
    values[i] = static_cast<int>(i) + round;
    __syncwarp();
    out[i] = values[i ^ 1];
    __syncwarp();
  }
}

bool valid_warp_barriers() {
  const auto out = numbers(kThreads);
  launch(exchange_through_warps, {1, kThreads, 0, nullptr}, out.get());
  for (int i = 0; i < kThreads; ++i) {
    if (out[i] != (i ^ 1) + 2) return false;
  }
  return true;
}

// The block that comes last adds what the others left.
__global__ void sum_by_the_last_block(const int* in, int* partial, unsigned* arrived, int* out) {
  VIOPS_SHARED(bool, is_last, );
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = in[blockIdx.x];
    __threadfence();
    is_last = atomicAdd(arrived, 1u) + 1 == gridDim.x;
  }
  __syncthreads();
  if (!is_last || threadIdx.x) return;
  __threadfence();
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
  *out = sum;
}

bool valid_last_block() {
  const auto in = numbers(5), partial = numbers(5);
  unsigned arrived = 0;
  int out = 0;
  launch(sum_by_the_last_block, {5, 32, 0, nullptr}, in.get(), partial.get(), &arrived, &out);
  return out == 100;
}

const std::map<std::string, std::function<bool()>> kPrograms = {
    {"shared_overrun", permutes<Step::barrier, Next, kThreads - 1>},
    {"dynamic_shared_overrun", dynamic_overrun},
    {"global_overrun", global_overrun},
    {"misaligned_vector_load", misaligned_vector_load},
    {"missing_barrier", permutes<Step::none, Next>},
    {"missing_barrier_that_forward_order_hides", permutes<Step::none, Previous>},
    {"warp_barrier_for_a_block_barrier", permutes<Step::warp_barrier, OfAnotherWarp>},
    {"race_between_blocks", race_between_blocks},
    {"divergent_barrier", divergent_barrier},
    {"early_return", early_return},
    {"wrong_mask", wrong_mask},
    {"mask_without_the_caller", mask_without_the_caller},
    {"inactive_lane", inactive_lane},
    {"two_exchanges_meet", two_exchanges_meet},
    {"too_much_shared_memory", too_much_shared_memory},
    {"uninitialised_shared_memory", uninitialised_shared_memory},
    {"copy_not_waited_for", copy_not_waited_for},
    {"valid_permutation", permutes<Step::barrier, Next>},
    {"valid_reduction", valid_reduction},
    {"valid_sort", valid_sort},
    {"valid_part_of_warps", valid_part_of_warps},
    {"valid_warp_barriers", valid_warp_barriers},
    {"valid_last_block", valid_last_block},
};

int run(const std::string& name, const std::string& order, uint64_t seed) {
  using on_host::Order;
  on_host::settings().order = order == "reverse"  ? Order::reverse
                              : order == "random" ? Order::random
                                                  : Order::forward;
  on_host::settings().seed = seed;
  try {
    if (kPrograms.at(name)()) return 0;
  } catch (const on_host::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 4;
  }
  std::fprintf(stderr, "wrong result\n");
  return 3;
}

}  // namespace
}  // namespace viops

int main(int argc, char** argv) {
  if (argc < 2) {
    for (const auto& [name, program] : viops::kPrograms) std::printf("%s\n", name.c_str());
    return 0;
  }
  return viops::run(argv[1], argc > 2 ? argv[2] : "forward",
                    argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 0);
}
