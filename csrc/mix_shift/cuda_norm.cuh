// Mix-shift followed by a layer norm over the channels of a place, and the norm's gradient, on the GPU.
//
// A block has all channels of a tile of places: their u are staged in shared memory, or where a place has too
// many channels a chunk of them at a time, to be computed again where they are needed again.
#pragma once

#include "mix_shift/cuda_mix.cuh"

namespace viops::mix_shift {
namespace {

template <class A>
struct NormOf {
  const A *weight, *bias;  // [C], [C] or null
  double eps;
};

// Slabs first_slab .. last_slab - 1, and their channels.
struct Chunk {
  int first_slab, last_slab;
  int64_t first;
  int channels;
};

// u of a tile of places, and what a norm needs of each place.
template <class T, class A, bool kChannelsLast>
struct Stage {
  const Deal& deal;
  const Filters<A>& filters;
  A* mean;     // [rows, columns] of the tile, as the next three
  A* rstd;     // before all chunks are met: the sum of squared distances from the mean
  A* grad;     // the mean of g over channels, where there is a gradient
  A* product;  // the mean of g times the normed value
  A* u;        // [rows, columns, stage_stride]
  Mixer<T, A, kChannelsLast> mixer;

  __device__ __forceinline__ Stage(const Deal& deal, const Images<const T>& x, const Filters<A>& filters,
                                   char* memory)
      : deal(deal),
        filters(filters),
        mean(reinterpret_cast<A*>(memory)),
        rstd(mean + deal.rows * deal.columns),
        grad(rstd + deal.rows * deal.columns),
        product(grad + deal.rows * deal.columns),
        u(product + deal.rows * deal.columns),
        mixer{deal, x, filters, u + deal.rows * deal.columns * deal.stage_stride} {}

  __device__ __forceinline__ bool is_whole() const { return deal.chunk_slabs >= deal.slabs; }

  // Calls use(chunk) with the chunk's u there, and a barrier after each.
  template <class Use>
  __device__ __forceinline__ void for_each_chunk(const Spot& spot, bool is_there, const Use& use) const {
#pragma unroll 1
    for (int slab = 0; slab < deal.slabs; slab += deal.chunk_slabs) {
      const int last = min(slab + deal.chunk_slabs, deal.slabs);
      const Slab begin = deal.slab(slab), end = deal.slab(last - 1);
      const Chunk chunk = {slab, last, begin.first, static_cast<int>(end.first + end.channels - begin.first)};
      if (!is_there) fill(spot, chunk);
      use(chunk);
      __syncthreads();
    }
  }

  __device__ __forceinline__ void fill(const Spot& spot, const Chunk& chunk) const {
#pragma unroll 1
    for (int index = chunk.first_slab; index < chunk.last_slab; ++index) {
      const Slab slab = deal.slab(index);
      mixer.run(spot, slab, [&](const Item& item, const A(&sum)[kRun]) {
        if (item.column >= spot.columns) return;
        const int64_t channel = slab.first + item.channel;
        const A bias = filters.bias ? filters.bias[channel] : A(0);
        A* const to = values(item.row, item.column) + (channel - chunk.first);
#pragma unroll
        for (int v = 0; v < kRun; ++v) {
          if (item.row + v < spot.rows) to[v * deal.columns * deal.stage_stride] = sum[v] + bias;
        }
      });
      __syncthreads();
    }
  }

  __device__ __forceinline__ A* values(int row, int column) const {
    return u + (row * deal.columns + column) * deal.stage_stride;
  }

  // Calls use(place in the tile, row, column) for this warp's places.
  template <class Use>
  __device__ __forceinline__ void for_each_place(const Spot& spot, const Use& use) const {
#pragma unroll 1
    for (int i = warp(); i < spot.rows * spot.columns; i += kWarps) {
      const int row = i / spot.columns, column = i - row * spot.columns;
      use(row * deal.columns + column, row, column);
    }
  }

  // Makes mean and rstd, chunks merged as Chan et al. do.
  __device__ __forceinline__ void measure(const Spot& spot, double eps) const {
    for_each_chunk(spot, false, [&](const Chunk& chunk) {
      for_each_place(spot, [&](int place, int row, int column) {
        const A* const from = values(row, column);
        A sum = 0, square = 0;
        for (int c = lane(); c < chunk.channels; c += 32) sum += from[c];
        const A count = static_cast<A>(chunk.channels), before = static_cast<A>(chunk.first);
        const A own = warp_sum(sum) / count;
        for (int c = lane(); c < chunk.channels; c += 32) square += (from[c] - own) * (from[c] - own);
        square = warp_sum(square);
        if (lane() > 0) return;
        const A distance = chunk.first == 0 ? A(0) : own - mean[place], share = count / (before + count);
        A all = chunk.first == 0 ? square : rstd[place] + square + distance * distance * before * share;
        if (chunk.first + chunk.channels == deal.channels) {
          all = static_cast<A>(rsqrt(static_cast<double>(all) / static_cast<double>(deal.channels) + eps));
        }
        rstd[place] = all;
        mean[place] = chunk.first == 0 ? own : mean[place] + distance * share;
      });
    });
  }
};

// x -> y, channels_last.
template <class T, class A, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 2)
    mix_shift_norm_kernel(Deal deal, Images<const T> x, Filters<A> filters, NormOf<A> norm, Images<T> y) {
  VIOPS_DYNAMIC_SHARED(memory);
  const Stage<T, A, kChannelsLast> stage(deal, x, filters, memory);
  const Spot spot = deal.spot(blockIdx.x);
  stage.measure(spot, norm.eps);
  stage.for_each_chunk(spot, stage.is_whole(), [&](const Chunk& chunk) {
    stage.for_each_place(spot, [&](int place, int row, int column) {
      const A mean = stage.mean[place], rstd = stage.rstd[place];
      const A* const from = stage.values(row, column);
      T* const to = y.at(spot.image, chunk.first, spot.row + row, spot.column + column);
      for (int c = lane(); c < chunk.channels; c += 32) {
        const int64_t channel = chunk.first + c;
        const A bias = norm.bias ? __ldg(norm.bias + channel) : A(0);
        to[c * y.stride[1]] = Narrow<T>::of((from[c] - mean) * rstd * __ldg(norm.weight + channel) + bias);
      }
    });
  });
}

// Block p has tiles p, p + P, ...: grad_u of these, channels_last, and the sums of grad_norm_weight and
// grad_norm_bias over them, row p of scratch [P, 2, C].
template <class T, class A, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 2)
    mix_shift_norm_backward_kernel(Deal deal, int64_t tiles, Images<const T> grad_y, Images<const T> x,
                                   Filters<A> filters, NormOf<A> norm, Images<T> grad_u, A* scratch) {
  VIOPS_DYNAMIC_SHARED(memory);
  const Stage<T, A, kChannelsLast> stage(deal, x, filters, memory);
  A* const sums = scratch + 2 * deal.channels * blockIdx.x;  // [2, C]
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Spot spot = deal.spot(tile);
    stage.measure(spot, norm.eps);
    stage.for_each_chunk(spot, stage.is_whole(), [&](const Chunk& chunk) {
      stage.for_each_place(spot, [&](int place, int row, int column) {
        const A mean = stage.mean[place], rstd = stage.rstd[place];
        const A* const from = stage.values(row, column);
        const T* const grads = grad_y.at(spot.image, chunk.first, spot.row + row, spot.column + column);
        A grad = 0, product = 0;
        for (int c = lane(); c < chunk.channels; c += 32) {
          const A g = static_cast<A>(widen(__ldg(grads + c * grad_y.stride[1]))) *
                      __ldg(norm.weight + chunk.first + c);
          grad += g;
          product += g * ((from[c] - mean) * rstd);
        }
        grad = warp_sum(grad) / static_cast<A>(deal.channels);
        product = warp_sum(product) / static_cast<A>(deal.channels);
        if (lane() > 0) return;
        stage.grad[place] = chunk.first == 0 ? grad : stage.grad[place] + grad;
        stage.product[place] = chunk.first == 0 ? product : stage.product[place] + product;
      });
    });
    stage.for_each_chunk(spot, stage.is_whole(), [&](const Chunk& chunk) {
#pragma unroll 1
      for (int c = static_cast<int>(threadIdx.x); c < chunk.channels; c += kThreads) {
        const int64_t channel = chunk.first + c;
        const A weight = __ldg(norm.weight + channel);
        A of_weight = 0, of_bias = 0;
#pragma unroll 1
        for (int row = 0; row < spot.rows; ++row) {
#pragma unroll 2
          for (int column = 0; column < spot.columns; ++column) {
            const int place = row * deal.columns + column;
            const int h = spot.row + row, w = spot.column + column;
            const A grad = static_cast<A>(widen(__ldg(grad_y.at(spot.image, channel, h, w))));
            const A normed = (stage.values(row, column)[c] - stage.mean[place]) * stage.rstd[place];
            of_weight += grad * normed;
            of_bias += grad;
            *grad_u.at(spot.image, channel, h, w) = Narrow<T>::of(
                stage.rstd[place] * (grad * weight - stage.grad[place] - normed * stage.product[place]));
          }
        }
        const bool is_first = tile == blockIdx.x;
        sums[channel] = is_first ? of_weight : sums[channel] + of_weight;
        sums[deal.channels + channel] = is_first ? of_bias : sums[deal.channels + channel] + of_bias;
      }
    });
  }
}

}  // namespace
}  // namespace viops::mix_shift
