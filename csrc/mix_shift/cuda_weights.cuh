// The gradients of mix-shift's kernels and biases on the GPU.
//
// A block has a slab of channels and one of P pieces: tiles p, p + P, ... of all images.  It sums over these
// into row p of scratch [P, 2 K + C], and the rows are added in their order: the same bits every time.
#pragma once

#include "mix_shift/cuda_places.cuh"

namespace viops::mix_shift {
namespace {

// Row p of scratch: gradients of weight_lr [K], weight_td [K] and bias [C]; of what is null they are left
// out.
template <class A>
struct WeightSums {
  A* data;
  int64_t weights;  // K
  bool td, bias;

  __device__ __forceinline__ A* row(int64_t piece, int64_t channels) const {
    return data + piece * (2 * weights + channels);
  }
};

template <class T, class A, bool kChannelsLast>
struct WeightSummer {
  const Deal& deal;
  const Images<const T>& grad_u;
  const Images<const T>& x;
  const WeightSums<A>& sums;
  int64_t tiles, pieces, piece;
  Slab slab;
  A* memory;  // shared

  __device__ __forceinline__ void run() const {
    const int kernel = deal.group[slab.group].kernel;
    if (kernel > deal.most_tiled) return for_each_tap(false);
    switch (kernel) {
      case 1: return unrolled<1>();
      case 3: return unrolled<3>();
      case 5: return unrolled<5>();
      case 7: return unrolled<7>();
      default: return for_each_tap(true);
    }
  }

 private:
  using Values = Tile<A, kChannelsLast>;

  // What is read of a tile's places.
  struct Tiles {
    Values grad, lr, td;

    __device__ __forceinline__ Tiles(const WeightSummer& summer, const Spot& spot) {
      const Deal& deal = summer.deal;
      const Group& group = deal.group[summer.slab.group];
      const int channels = summer.slab.channels;
      const auto place = [&](A* data, int radius, int shift_h, int shift_w) -> Values {
        const Axes axes = Axes::of(deal, spot, radius, shift_h, shift_w);
        return {data, axes.down.values(deal.rows), axes.across.values(deal.columns), channels, axes};
      };
      grad = place(summer.memory, 0, 0, 0);
      lr = place(grad.data + grad.size(), group.kernel / 2, 0, group.shift_w);
      td = place(lr.data + lr.size(), group.kernel / 2, group.shift_h, 0);
    }
  };

  // Also the barriers before and after.
  __device__ __forceinline__ void load(const Tiles& tiles, const Spot& spot) const {
    __syncthreads();
    tiles.grad.load(grad_u, spot.image, slab.first);
    tiles.lr.load(x, spot.image, slab.first);
    if (sums.td) tiles.td.load(x, spot.image, slab.first);
    __syncthreads();
  }

  // A thread has row i of a channel's kernels, both directions, in registers, and every so many-th row of
  // places: along such a row each value is read once.
  template <int K>
  __device__ __forceinline__ void unrolled() const {
    const int thread = static_cast<int>(threadIdx.x), lines = slab.channels * K, parts = kThreads / lines;
    const int part = thread / lines, line = thread - part * lines;
    const int channel = kChannelsLast ? line % slab.channels : line / K;
    const int i = kChannelsLast ? line / slab.channels : line % K;
    A lr[K] = {}, td[K] = {}, bias = 0;
#pragma unroll 1
    for (int64_t tile = piece; tile < tiles; tile += pieces) {
      const Spot spot = deal.spot(tile);
      const Tiles values(*this, spot);
      load(values, spot);
      if (part >= parts) continue;
#pragma unroll 1
      for (int row = part; row < spot.rows; row += parts) {
        const A* const grad = values.grad.at(channel, row, 0);
        add_row<K>(grad, values.grad, values.lr, values.lr.at(channel, row + i, 0), spot.columns, lr);
        if (sums.td) {
          add_row<K>(grad, values.grad, values.td, values.td.at(channel, row + i, 0), spot.columns, td);
        }
        if (i == 0) {
          for (int column = 0; column < spot.columns; ++column) {
            bias += grad[column * values.grad.column_stride()];
          }
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < K; ++j) {
      memory[j * kThreads + thread] = lr[j];
      memory[(K + j) * kThreads + thread] = td[j];
    }
    memory[2 * K * kThreads + thread] = bias;
    __syncthreads();
    for (int index = thread; index < (2 * K + 1) * lines; index += kThreads) {
      const int number = index / lines, of_line = index - number * lines;
      A sum = 0;
      for (int other = 0; other < parts; ++other) sum += memory[number * kThreads + other * lines + of_line];
      const int c = kChannelsLast ? of_line % slab.channels : of_line / K;
      const int row = kChannelsLast ? of_line / slab.channels : of_line % K;
      const int64_t tap = row * K + number % K;
      if (number < 2 * K) {
        if (number < K || sums.td) *weight(number >= K, c, tap) = sum;
      } else if (row == 0 && sums.bias) {
        *of_bias(c) = sum;
      }
    }
  }

  // taps[j] += over the columns of a row the products of grad and the value j to the right.
  template <int K>
  __device__ __forceinline__ void add_row(const A* grad, const Values& grads, const Values& tile,
                                          const A* value, int columns, A (&taps)[K]) const {
    const int grad_stride = grads.column_stride(), stride = tile.column_stride();
    A window[K];  // of column n the value j to the right is at (n + j) % K
#pragma unroll
    for (int j = 0; j < K - 1; ++j) window[j] = value[j * stride];
    value += (K - 1) * stride;
#pragma unroll 1
    for (int first = 0; first < columns; first += K) {
#pragma unroll
      for (int n = 0; n < K; ++n) {
        if (first + n < columns) {
          window[(n + K - 1) % K] = value[n * stride];
          const A own = grad[n * grad_stride];
#pragma unroll
          for (int j = 0; j < K; ++j) taps[j] += own * window[(n + j) % K];
        }
      }
      value += K * stride;
      grad += K * grad_stride;
    }
  }

  // Kernels of any size: a thread has every so many-th tap, and its sums in scratch.
  __device__ __forceinline__ void for_each_tap(bool tiled) const {
#pragma unroll 1
    for (int64_t tile = piece; tile < tiles; tile += pieces) {
      const Spot spot = deal.spot(tile);
      const Tiles values(*this, spot);
      if (tiled) load(values, spot);
      const bool is_first = tile == piece;
      add_taps(values.grad, values.lr, spot, tiled, false, is_first);
      if (sums.td) add_taps(values.grad, values.td, spot, tiled, true, is_first);
      if (!sums.bias) continue;
      for (int channel = static_cast<int>(threadIdx.x); channel < slab.channels; channel += kThreads) {
        add(of_bias(channel), sum_of_grad(values.grad, spot, channel, tiled), is_first);
      }
    }
  }

  __device__ __forceinline__ void add_taps(const Values& grads, const Values& tile, const Spot& spot,
                                           bool tiled, bool td, bool is_first) const {
    const int kernel = deal.group[slab.group].kernel;
    const int64_t taps = static_cast<int64_t>(kernel) * kernel;
#pragma unroll 1
    for (int64_t index = threadIdx.x; index < slab.channels * taps; index += kThreads) {
      const int channel = static_cast<int>(index / taps);
      const int64_t tap = index - channel * taps;
      const int i = static_cast<int>(tap / kernel), j = static_cast<int>(tap % kernel);
      add(weight(td, channel, tap), sum_of_tap(grads, tile, spot, channel, i, j, tiled), is_first);
    }
  }

  static __device__ __forceinline__ void add(A* to, A sum, bool is_first) {
    *to = is_first ? sum : *to + sum;
  }

  __device__ __forceinline__ A sum_of_tap(const Values& grads, const Values& tile, const Spot& spot,
                                          int channel, int i, int j, bool tiled) const {
    // The values that meet no zero.
    const Axis &down = tile.axes.down, &across = tile.axes.across;
    const int first_row = max(0, -(down.start + i)), rows = min(spot.rows, down.size - down.start - i);
    const int first = max(0, -(across.start + j)),
              columns = min(spot.columns, across.size - across.start - j);
    A sum = 0;
#pragma unroll 1
    for (int row = first_row; row < rows; ++row) {
#pragma unroll 1
      for (int column = first; column < columns; ++column) {
        if (tiled) {
          sum += *grads.at(channel, row, column) * *tile.at(channel, row + i, column + j);
        } else {
          sum += grad_at(spot, channel, row, column) *
                 static_cast<A>(widen(__ldg(
                     x.at(spot.image, slab.first + channel, down.place(row + i), across.place(column + j)))));
        }
      }
    }
    return sum;
  }

  __device__ __forceinline__ A sum_of_grad(const Values& grads, const Spot& spot, int channel,
                                           bool tiled) const {
    A sum = 0;
    for (int row = 0; row < spot.rows; ++row) {
      for (int column = 0; column < spot.columns; ++column) {
        sum += tiled ? *grads.at(channel, row, column) : grad_at(spot, channel, row, column);
      }
    }
    return sum;
  }

  __device__ __forceinline__ A grad_at(const Spot& spot, int channel, int row, int column) const {
    return static_cast<A>(
        widen(__ldg(grad_u.at(spot.image, slab.first + channel, spot.row + row, spot.column + column))));
  }

  // Where the sum of a channel's tap goes.
  __device__ __forceinline__ A* weight(bool td, int channel, int64_t tap) const {
    const Group& group = deal.group[slab.group];
    const int64_t taps = static_cast<int64_t>(group.kernel) * group.kernel;
    const int64_t of_group = slab.first - slab.group * deal.group_size + channel;
    return sums.row(piece, deal.channels) + (td ? sums.weights : 0) + group.offset + of_group * taps + tap;
  }
  __device__ __forceinline__ A* of_bias(int channel) const {
    return sums.row(piece, deal.channels) + 2 * sums.weights + slab.first + channel;
  }
};

template <class T, class A, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 2)
    mix_shift_weight_kernel(Deal deal, int64_t tiles, int64_t pieces, Images<const T> grad_u,
                            Images<const T> x, WeightSums<A> sums) {
  VIOPS_DYNAMIC_SHARED(memory);
  const auto slabs = static_cast<unsigned>(deal.slabs);
  const WeightSummer<T, A, kChannelsLast> summer = {deal,
                                                    grad_u,
                                                    x,
                                                    sums,
                                                    tiles,
                                                    pieces,
                                                    static_cast<int64_t>(blockIdx.x / slabs),
                                                    deal.slab(static_cast<int>(blockIdx.x % slabs)),
                                                    reinterpret_cast<A*>(memory)};
  summer.run();
}

// Vectors that lie one after the other in each row of scratch; those that are null are passed over.
template <class A>
struct Sums {
  A* to[3];
  int64_t size[3];
};

// scratch [rows, size] -> the sums over its first rows, in their order; zeros where there are none.
template <class A>
__global__ void __launch_bounds__(kThreads)
    mix_shift_sum_kernel(const A* scratch, int64_t rows, Sums<A> sums) {
  const int64_t size = sums.size[0] + sums.size[1] + sums.size[2];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int64_t within = index;
  A* to = sums.to[0];
  int64_t left = sums.size[0];
#pragma unroll
  for (int next = 1; next < 3; ++next) {
    if (within >= left) within -= left, to = sums.to[next], left = sums.size[next];
  }
  if (index >= size || !to) return;
  double sum = 0;
#pragma unroll 4
  for (int64_t row = 0; row < rows; ++row) sum += static_cast<double>(scratch[row * size + index]);
  to[within] = static_cast<A>(sum);
}

}  // namespace
}  // namespace viops::mix_shift
