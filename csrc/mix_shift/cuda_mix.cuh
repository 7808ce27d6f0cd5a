// The convolutions of both directions on the GPU: u, and the gradient of x, which is the same of grad_u with
// kernels flipped and rolls after the convolution.
#pragma once

#include "mix_shift/cuda_places.cuh"

namespace viops::mix_shift {
namespace {

// A thread's outputs: `sum` is of kRun rows from `row` on, in the tile, of one column and one channel of the
// slab.
struct Item {
  int channel, row, column;

  template <bool kChannelsLast>
  static __device__ __forceinline__ Item of(const Deal& deal, const Slab& slab, int index) {
    if (kChannelsLast) {
      const int place = index / slab.channels, run = place / deal.columns;
      return {index - place * slab.channels, run * kRun, place - run * deal.columns};
    }
    const int line = index / deal.columns, channel = line / deal.runs;
    return {channel, (line - channel * deal.runs) * kRun, index - line * deal.columns};
  }
};

// sum[v] += the K x K values from row v on, times weights.  A column's values are read once for all rows.
template <int K, class A>
__device__ __forceinline__ void convolve_run(const A* values, int row_stride, int column_stride,
                                             const A* weight, A (&sum)[kRun]) {
#pragma unroll 1
  for (int j = 0; j < K; ++j) {
    A column[kRun + K - 1];
#pragma unroll
    for (int n = 0; n < kRun + K - 1; ++n) column[n] = values[n * row_stride];
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const A tap = weight[i * K + j];
#pragma unroll
      for (int v = 0; v < kRun; ++v) sum[v] += tap * column[v + i];
    }
    values += column_stride;
  }
}

// The same of an item.  A run of rows at which the outputs turn is computed for either side, and each row
// taken from its own.
template <int K, class A, bool kChannelsLast>
__device__ __forceinline__ void convolve_item(const Tile<A, kChannelsLast>& tile, const Item& item,
                                              const A* weight, A (&sum)[kRun]) {
  const int turn = tile.axes.down.turn, column = tile.axes.across.from(item.column);
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    if (side == 0 ? item.row >= turn : item.row + kRun <= turn) continue;
    A part[kRun] = {};
    const A* const values = tile.at(item.channel, item.row + side * (K - 1), column);
    convolve_run<K>(values, tile.row_stride(), tile.column_stride(), weight + item.channel * K * K, part);
#pragma unroll
    for (int v = 0; v < kRun; ++v) {
      if ((item.row + v >= turn) == (side == 1)) sum[v] += part[v];
    }
  }
}

// Kernels of any size, `read(channel, row, column)` giving the values; weight is of the item's channel.
template <class A, class Read>
__device__ void convolve_any(const Axes& axes, const Item& item, const A* weight, bool flipped,
                             const Read& read, A (&sum)[kRun]) {
  const int kernel = 2 * axes.down.radius + 1;
  const int64_t last = static_cast<int64_t>(kernel) * kernel - 1;
#pragma unroll
  for (int v = 0; v < kRun; ++v) {
    const int rows = axes.down.last_tap(item.row + v), columns = axes.across.last_tap(item.column);
    const int row = axes.down.from(item.row + v), column = axes.across.from(item.column);
    A all = 0;
#pragma unroll 1
    for (int i = axes.down.first_tap(item.row + v); i < rows; ++i) {
#pragma unroll 1
      for (int j = axes.across.first_tap(item.column); j < columns; ++j) {
        const int64_t tap = static_cast<int64_t>(i) * kernel + j;
        all += __ldg(weight + (flipped ? last - tap : tap)) * read(item.channel, row + i, column + j);
      }
    }
    sum[v] += all;
  }
}

// What a block needs to compute u, or grad_x, of a slab.
template <class T, class A, bool kChannelsLast>
struct Mixer {
  const Deal& deal;
  const Images<const T>& x;
  const Filters<A>& filters;
  A* memory;  // shared

  // Calls sink(item, sum) for all items of a slab, with no barrier after the last.  Of what is around the
  // image, values are unspecified.
  template <class Sink>
  __device__ __forceinline__ void run(const Spot& spot, const Slab& slab, const Sink& sink) const {
    const Group& group = deal.group[slab.group];
    const int kernel = group.kernel, radius = kernel / 2;
    const Axes lr = Axes::of(deal, spot, radius, 0, group.shift_w);
    const Axes td = Axes::of(deal, spot, radius, group.shift_h, 0);
    const int64_t taps = static_cast<int64_t>(kernel) * kernel;
    const int64_t offset = group.offset + (slab.first - slab.group * deal.group_size) * taps;
    const A* const weight_lr = filters.lr + offset;
    const A* const weight_td = filters.td ? filters.td + offset : nullptr;
    if (kernel > deal.most_tiled) return direct(spot, slab, lr, td, weight_lr, weight_td, sink);

    const Tile<A, kChannelsLast> tile_lr = tile_of(slab, lr, memory);
    const Tile<A, kChannelsLast> tile_td = tile_of(slab, td, memory + tile_lr.size());
    tile_lr.load(x, spot.image, slab.first);
    if (weight_td) tile_td.load(x, spot.image, slab.first);
    if (kernel > kUnrolled) {
      __syncthreads();
      return any(slab, tile_lr, tile_td, weight_lr, weight_td, sink);
    }
    const int size = static_cast<int>(taps);
    A* const shared_lr = tile_td.data + (weight_td ? tile_td.size() : 0);
    A* const shared_td = shared_lr + slab.channels * size;
    load_weights(slab, size, weight_lr, shared_lr);
    if (weight_td) load_weights(slab, size, weight_td, shared_td);
    __syncthreads();
    const A* const own_td = weight_td ? shared_td : nullptr;
    switch (kernel) {
      case 1: return unrolled<1>(slab, tile_lr, tile_td, shared_lr, own_td, sink);
      case 3: return unrolled<3>(slab, tile_lr, tile_td, shared_lr, own_td, sink);
      case 5: return unrolled<5>(slab, tile_lr, tile_td, shared_lr, own_td, sink);
      default: return unrolled<7>(slab, tile_lr, tile_td, shared_lr, own_td, sink);
    }
  }

 private:
  __device__ __forceinline__ Tile<A, kChannelsLast> tile_of(const Slab& slab, const Axes& axes,
                                                            A* data) const {
    return {data, axes.down.values(deal.runs * kRun), axes.across.values(deal.columns), slab.channels, axes};
  }

  // [channels, kernel * kernel], which is odd: the channels of a warp's lanes are in different banks.
  __device__ __forceinline__ void load_weights(const Slab& slab, int taps, const A* from, A* to) const {
    for (int i = static_cast<int>(threadIdx.x); i < slab.channels * taps; i += kThreads) {
      const int tap = i % taps;
      to[i - tap + (deal.adjoint ? taps - 1 - tap : tap)] = __ldg(from + i);
    }
  }

  template <class Compute, class Sink>
  __device__ __forceinline__ void for_each_item(const Slab& slab, const Compute& compute,
                                                const Sink& sink) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < slab.channels * deal.columns * deal.runs; i += kThreads) {
      const Item item = Item::of<kChannelsLast>(deal, slab, i);
      A sum[kRun] = {};
      compute(item, sum);
      sink(item, sum);
    }
  }

  template <int K, class Sink>
  __device__ __forceinline__ void unrolled(const Slab& slab, const Tile<A, kChannelsLast>& lr,
                                           const Tile<A, kChannelsLast>& td, const A* weight_lr,
                                           const A* weight_td, const Sink& sink) const {
    for_each_item(
        slab,
        [&](const Item& item, A(&sum)[kRun]) {
          convolve_item<K>(lr, item, weight_lr, sum);
          if (weight_td) convolve_item<K>(td, item, weight_td, sum);
        },
        sink);
  }

  template <class Sink>
  __device__ __forceinline__ void any(const Slab& slab, const Tile<A, kChannelsLast>& lr,
                                      const Tile<A, kChannelsLast>& td, const A* weight_lr,
                                      const A* weight_td, const Sink& sink) const {
    with_reads(
        slab, lr.axes, td.axes, weight_lr, weight_td,
        [&](int channel, int row, int column) { return *lr.at(channel, row, column); },
        [&](int channel, int row, int column) { return *td.at(channel, row, column); }, sink);
  }

  template <class Sink>
  __device__ __forceinline__ void direct(const Spot& spot, const Slab& slab, const Axes& lr, const Axes& td,
                                         const A* weight_lr, const A* weight_td, const Sink& sink) const {
    const T* const from = x.at(spot.image, slab.first, 0, 0);
    const Direct<T> read_lr = {from, x.stride[1], x.stride[2], x.stride[3], lr};
    const Direct<T> read_td = {from, x.stride[1], x.stride[2], x.stride[3], td};
    with_reads(
        slab, lr, td, weight_lr, weight_td,
        [&](int channel, int row, int column) { return read_lr.value(channel, row, column); },
        [&](int channel, int row, int column) { return read_td.value(channel, row, column); }, sink);
  }

  template <class ReadLr, class ReadTd, class Sink>
  __device__ __forceinline__ void with_reads(const Slab& slab, const Axes& lr, const Axes& td,
                                             const A* weight_lr, const A* weight_td, const ReadLr& read_lr,
                                             const ReadTd& read_td, const Sink& sink) const {
    const int64_t taps = (2 * int64_t(lr.down.radius) + 1) * (2 * int64_t(lr.down.radius) + 1);
    for_each_item(
        slab,
        [&](const Item& item, A(&sum)[kRun]) {
          convolve_any(lr, item, weight_lr + item.channel * taps, deal.adjoint, read_lr, sum);
          if (weight_td) {
            convolve_any(td, item, weight_td + item.channel * taps, deal.adjoint, read_td, sum);
          }
        },
        sink);
  }
};

// x -> u without a norm, or grad_u -> grad_x: y is either.
template <class T, class A, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 2)
    mix_shift_kernel(Deal deal, Images<const T> x, Filters<A> filters, Images<T> y) {
  VIOPS_DYNAMIC_SHARED(memory);
  const Slab slab = deal.slab(static_cast<int>(blockIdx.x % static_cast<unsigned>(deal.slabs)));
  const Spot spot = deal.spot(blockIdx.x / static_cast<unsigned>(deal.slabs));
  const Mixer<T, A, kChannelsLast> mixer = {deal, x, filters, reinterpret_cast<A*>(memory)};
  mixer.run(spot, slab, [&](const Item& item, const A(&sum)[kRun]) {
    if (item.column >= spot.columns) return;
    const int64_t channel = slab.first + item.channel;
    const A bias = filters.bias ? filters.bias[channel] : A(0);
    T* const to = y.at(spot.image, channel, spot.row + item.row, spot.column + item.column);
#pragma unroll
    for (int v = 0; v < kRun; ++v) {
      if (item.row + v < spot.rows) to[v * y.stride[2]] = Narrow<T>::of(sum[v] + bias);
    }
  });
}

}  // namespace
}  // namespace viops::mix_shift
