// The product of two matrices of 16-bit integers, exact, and what becomes of its sums on the GPU.
#pragma once

#include "integer_conv/cuda_convolve.cuh"
#include "integer_conv/cuda_gradient.cuh"

namespace viops::integer_conv {
namespace {

constexpr int kBlocksAtOnce = 2;  // of a multiprocessor

// The product of two scales as factor * shift: no subnormal between.
struct Factors {
  float factor, shift = 1;
  __device__ __forceinline__ Factors(float first, float second) {
    double product = static_cast<double>(first) * static_cast<double>(second);
    if (fabs(product) < 0x1p-126) {
      product *= 0x1p126, shift = 0x1p-126f;
    } else if (fabs(product) >= 0x1p127) {
      product *= 0x1p-127, shift = 0x1p127f;
    }
    factor = static_cast<float>(product);
  }
};

// Where sums go.
struct Output {
  float* to;
  const float* bias;  // by column, or null
  const float *first_scale, *second_scale;
  int64_t* totals;  // null, or what sums over parts of the depth are added to, like `to`
};

__device__ __forceinline__ float scaled(int64_t sum, const Factors& factors) {
  return __fmul_rn(__fmul_rn(__ll2float_rn(sum), factors.factor), factors.shift);
}

// For each of the thread's sums, where chains of the depth are added up; none where there is one chain.
constexpr int kSumsOfThread = kFragmentRows * kFragmentColumns * 4;
constexpr int kTotalBytes = kSumsOfThread * kThreads * static_cast<int>(sizeof(int64_t));

// Dynamic memory: a Tile, and kTotalBytes more where a split has more than one chain.
template <int kProducts, class Problem>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce)
    product_kernel(Problem problem, Tiling tiling, Output output) {
  VIOPS_DYNAMIC_SHARED(memory);
  const typename Problem::Block block(problem, Part(tiling, blockIdx.x), tiling.split_depth);
  if (!block.any()) return;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int first_row = warp / 2 * (kTile / 2), first_column = warp % 2 * (kTile / 2);
  const Tile<kProducts> tile = {memory};
  auto* totals = reinterpret_cast<int64_t*>(memory + Tile<kProducts>::kBytes) + thread;
  Sums<kProducts> sums;
  sums.clear();
  Chunk a[kChunks], b[kChunks];
  if (block.begin() < block.end()) block.load(block.begin(), a, b);
  bool chained = false;  // whether totals hold earlier chains
#pragma unroll 1
  for (int64_t depth = block.begin(), next; depth < block.end(); depth = next) {
    next = depth + kDepth;
#pragma unroll
    for (int r = 0; r < kChunks; ++r) {
      tile.put(0, block.row(r), block.chunk(r), a[r]);
      tile.put(1, block.row(r), block.chunk(r), b[r]);
    }
    __syncthreads();
    if (next < block.end()) block.load(next, a, b);
    sums.add(tile, first_row, first_column);
    __syncthreads();
    if ((next - block.begin()) % kChain != 0 || next >= block.end()) continue;
    sums.for_each([&](int) {
      return [&](int, int index, int64_t sum) {
        totals[index * kThreads] = chained ? totals[index * kThreads] + sum : sum;
      };
    });
    sums.clear();
    chained = true;
  }
  const Factors factors(*output.first_scale, *output.second_scale);
  sums.for_each([&](int row) {
    const int64_t of_row = block.row_of_result(first_row + row);
    return [&, of_row](int column, int index, int64_t sum) {
      const int64_t of_column = block.column_of_result(first_column + column);
      if (of_row < 0 || of_column < 0) return;
      if (chained) sum += totals[index * kThreads];
      if (output.totals) {
        atomicAdd(reinterpret_cast<unsigned long long*>(output.totals + of_row + of_column),
                  static_cast<unsigned long long>(sum));
        return;
      }
      const float value = scaled(sum, factors);
      output.to[of_row + of_column] = output.bias ? __fadd_rn(value, output.bias[of_column]) : value;
    };
  });
}

constexpr int kTotalsThreads = 256;

__device__ __forceinline__ int64_t own_total() {
  return static_cast<int64_t>(blockIdx.x) * kTotalsThreads + threadIdx.x;
}

__global__ void __launch_bounds__(kTotalsThreads) clear_totals_kernel(int64_t* totals, int64_t count) {
  if (own_total() < count) totals[own_total()] = 0;
}

__global__ void __launch_bounds__(kTotalsThreads) scale_totals_kernel(Output output, int64_t count) {
  if (own_total() >= count) return;
  const Factors factors(*output.first_scale, *output.second_scale);
  output.to[own_total()] = scaled(output.totals[own_total()], factors);
}

}  // namespace
}  // namespace viops::integer_conv
