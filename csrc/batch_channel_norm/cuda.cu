// Batch channel norm on the GPU.
//
// Forward is three kernels, backward three or, where relu, four: a walk over all values leaves sums of pieces
// of planes in scratch, a block a group makes of them what a second walk multiplies with.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "batch_channel_norm/batch_channel_norm.h"
#include "batch_channel_norm/cuda_walk.cuh"

namespace viops::batch_channel_norm {
namespace {

constexpr int kColumns = 32;       // vectors side by side in channels_last: whole lines of memory
constexpr int kFewPlaces = 8;      // of which a block has more columns
constexpr int kVectorsOfWarp = 4;  // of each lane; a plane of more is a whole block's
constexpr int kBlocksWanted = 8;   // of a multiprocessor, before pieces grow
constexpr int kLeastRows = 4;  // that a thread has in channels_last: it reads coefficients for each channel
constexpr int kLeastVectors = 8;  // that a thread has of a piece of a plane

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned grid_of(int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("x: expected at most 2^31 - 1 blocks of threads for its size on CUDA, got " +
                                std::to_string(blocks));
  }
  return static_cast<unsigned>(blocks);
}

// Cuts planes into at most max_pieces pieces; without blocks where there are no values.
Deal deal_of(const TensorView& x, int vector, int64_t max_pieces) {
  const bool channels_last = is_channels_last(x);
  Deal deal = {};
  deal.batch = x.shape[0], deal.channels = x.shape[1], deal.places = x.shape[2];
  if (deal.batch == 0 || deal.places == 0) return deal;
  int64_t side_by_side, least;  // blocks without pieces; places that a block has at least
  if (channels_last) {
    const int64_t vectors = divide_up(deal.channels, vector);
    deal.wide = static_cast<int>(divide_up(vectors, deal.places < kFewPlaces ? kThreads : kColumns));
    deal.columns = static_cast<int>(divide_up(vectors, deal.wide));
    side_by_side = deal.batch * deal.wide;
    least = kLeastRows * (kThreads / deal.columns);
  } else {
    deal.wide = 1;
    deal.columns = deal.places <= 32 * kVectorsOfWarp * vector ? 32 : kThreads;
    side_by_side = divide_up(deal.batch * deal.channels, kThreads / deal.columns);
    least = kLeastVectors * deal.columns * vector;
  }
  const int64_t wanted = divide_up(static_cast<int64_t>(kBlocksWanted) * multiprocessors(), side_by_side);
  const int64_t pieces = std::clamp<int64_t>(std::min(wanted, deal.places / least), 1, max_pieces);
  deal.length = divide_up(divide_up(deal.places, pieces), vector) * vector;
  deal.pieces = static_cast<int>(divide_up(deal.places, deal.length));
  deal.blocks = channels_last ? side_by_side * deal.pieces
                              : divide_up(deal.batch * deal.channels * deal.pieces, kThreads / deal.columns);
  return deal;
}

// Whether vectors of 16 bytes lie whole in the planes, or the places, of tensors like x.
bool has_vectors(const TensorView& x, size_t size, std::initializer_list<const void*> data) {
  const int64_t run = is_channels_last(x) ? x.shape[1] : x.shape[2];
  return run * static_cast<int64_t>(size) % 16 == 0 &&
         std::all_of(data.begin(), data.end(),
                     [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; });
}

template <class A>
A* data_of(const TensorView* view) {
  return view ? static_cast<A*>(view->data) : nullptr;
}

template <class A>
Small<A> small_of(const TensorView& x, const Parameters& p, const Statistics& s, const TensorView& scratch) {
  const int64_t groups = p.weight.shape[0];
  return {data_of<A>(&p.bn_weight),
          data_of<A>(&p.bn_bias),
          data_of<A>(&p.weight),
          data_of<A>(&p.bias),
          data_of<A>(&s.shift),
          data_of<A>(&s.plane_mean),
          data_of<A>(&s.plane_square),
          data_of<A>(&s.mean),
          data_of<A>(&s.var),
          data_of<A>(&s.group_mean),
          data_of<A>(&s.group_rstd),
          data_of<A>(&scratch),
          x.shape[0],
          x.shape[1],
          x.shape[2],
          groups,
          x.shape[1] / groups,
          scratch.shape[0] - 1,
          p.eps};
}

LaunchConfig walk_config(const Deal& deal, cudaStream_t stream) {
  return {dim3(grid_of(deal.blocks)), dim3(kThreads), 0, stream};
}

LaunchConfig groups_config(int64_t groups, cudaStream_t stream) {
  return {dim3(grid_of(groups)), dim3(kGroupThreads), 0, stream};
}

template <class T, class A, int V, bool kChannelsLast>
struct Kernels {
  static void forward(const TensorView& x, const TensorView* residual, const TensorView* given_mean,
                      const TensorView* given_var, const TensorView* speed, bool relu, Mode mode,
                      const TensorView& y, const Small<A>& small, cudaStream_t stream) {
    const Deal deal = deal_of(x, V, small.max_pieces), second = deal_of(x, V, INT32_MAX);
    const T* from = data_of<T>(&x);
    const A* mean = data_of<A>(given_mean);
    const Strides strides = {x.stride[0], x.stride[1], x.stride[2]};
    if (deal.blocks > 0) {
      launch(moments_kernel<T, A, V, kChannelsLast>, walk_config(deal, stream), deal, small, from, mean,
             strides);
    }
    launch(forward_groups_kernel<T, A>, groups_config(small.groups, stream), small,
           Pieces{deal.pieces, deal.length, deal.places}, mode, from, strides, mean,
           static_cast<const A*>(data_of<A>(given_var)), static_cast<const A*>(data_of<A>(speed)));
    if (second.blocks == 0) return;
    launch(normalise_kernel<T, A, V, kChannelsLast>, walk_config(second, stream), second, small, from,
           static_cast<const T*>(data_of<T>(residual)), relu, data_of<T>(&y));
  }

  static void backward(const TensorView& x, Values<T> values, const Small<A>& small, bool relu,
                       const SmallGradients<A>& grads, cudaStream_t stream) {
    const Deal deal = deal_of(x, V, small.max_pieces), second = deal_of(x, V, INT32_MAX);
    if (relu && deal.blocks > 0) {
      const int64_t blocks = divide_up(small.batch * small.channels, kGroupThreads);
      launch(affines_kernel<A>, {dim3(grid_of(blocks)), dim3(kGroupThreads), 0, stream}, small);
    }
    if (deal.blocks > 0) {
      launch(gradient_sums_kernel<T, A, V, kChannelsLast>, walk_config(deal, stream), deal, small, values,
             relu);
    }
    launch(backward_groups_kernel<A>, groups_config(small.groups, stream), small,
           Pieces{deal.pieces, deal.length, deal.places}, grads);
    if (second.blocks == 0) return;
    const bool masked = relu && !values.kept;
    if (relu && values.kept) values.grad_y = values.kept;
    launch(gradient_kernel<T, A, V, kChannelsLast>, walk_config(second, stream), second, small, values,
           masked);
  }
};

// run(Kernels<...>()) for what x's dtype is, whether it has vectors, and its layout.
template <class T, class A, class Run>
void for_layout(const TensorView& x, bool vectors, const Run& run) {
  constexpr int kVector = 16 / sizeof(T);
  if (is_channels_last(x)) {
    return vectors ? run(Kernels<T, A, kVector, true>()) : run(Kernels<T, A, 1, true>());
  }
  vectors ? run(Kernels<T, A, kVector, false>()) : run(Kernels<T, A, 1, false>());
}

// run(T(), A())
template <class Run>
void for_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32: return run(float(), float());
    case DType::float64: return run(double(), double());
    case DType::bfloat16: return run(__nv_bfloat16(), float());
    default: return run(__half(), float());
  }
}

void forward(const TensorView& x, const TensorView* residual, const TensorView* given_mean,
             const TensorView* given_var, const TensorView* speed, const Parameters& parameters, Mode mode,
             const TensorView& y, const Statistics& statistics, const TensorView& scratch, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  for_dtype(x.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const Small<A> small = small_of<A>(x, parameters, statistics, scratch);
    const bool vectors = has_vectors(x, sizeof(T), {x.data, y.data, residual ? residual->data : nullptr});
    for_layout<T, A>(x, vectors, [&](auto kernels) {
      kernels.forward(x, residual, given_mean, given_var, speed, parameters.relu, mode, y, small, stream);
    });
  });
}

void backward(const TensorView& grad_y, const TensorView& x, const TensorView* residual,
              const Parameters& parameters, const Statistics& statistics, int64_t count,
              const TensorView* totals, const Gradients& gradients, const TensorView& scratch,
              void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  for_dtype(x.dtype, [&](auto t, auto a) {
    using T = decltype(t);
    using A = decltype(a);
    const Small<A> small = small_of<A>(x, parameters, statistics, scratch);
    const Values<T> values = {data_of<T>(&grad_y), data_of<T>(&x), data_of<T>(residual),
                              data_of<T>(gradients.residual), data_of<T>(&gradients.x)};
    const SmallGradients<A> grads = {data_of<A>(&gradients.bn_weight),
                                     data_of<A>(&gradients.bn_bias),
                                     data_of<A>(&gradients.weight),
                                     data_of<A>(&gradients.bias),
                                     data_of<A>(totals),
                                     count};
    const bool vectors =
        has_vectors(x, sizeof(T), {values.grad_y, values.x, values.residual, values.kept, values.grad_x});
    for_layout<T, A>(x, vectors, [&](auto kernels) {
      kernels.backward(x, values, small, parameters.relu, grads, stream);
    });
  });
}

}  // namespace

extern const CudaKernels cuda_kernels = {forward, backward};

}  // namespace viops::batch_channel_norm
