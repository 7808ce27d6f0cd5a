// Mix-shift on the GPU: how work is cut, and the launches.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "mix_shift/cuda_norm.cuh"
#include "mix_shift/cuda_weights.cuh"

namespace viops::mix_shift {
namespace {

constexpr int kColumns = 32;      // of a tile of planes
constexpr int kColumnsLast = 16;  // of a tile in channels_last
constexpr int kLeastColumns = 8;  // before a tile has fewer channels, or is given up
constexpr int kRunsLast = 2;
constexpr int kChannelsSideBySide = 32;
constexpr int64_t kReserved = 1 << 10;  // of shared memory, for each block

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A part of `size`, at most `most`, such that all parts are of about the same size.
int balanced(int64_t size, int64_t most) { return static_cast<int>(divide_up(size, divide_up(size, most))); }

unsigned grid_of(int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("x: expected at most 2^31 - 1 blocks of threads for its size on CUDA, got " +
                                std::to_string(blocks));
  }
  return static_cast<unsigned>(blocks);
}

enum class Work { mix, adjoint, norm, weights };

// Cuts work into tiles and slabs.
class Planner {
 public:
  Planner(const TensorView& x, const Groups& groups, Work work, bool channels_last, int64_t element)
      : groups_(groups), work_(work), last_(channels_last), element_(element) {
    for (int axis : {2, 3}) {
      if (x.shape[axis] >= kNever / 2) {
        throw std::invalid_argument("x: expected H and W below 2^29 on CUDA, got " +
                                    std::to_string(x.shape[axis]));
      }
    }
    deal_.batch = x.shape[0], deal_.channels = x.shape[1];
    deal_.height = static_cast<int>(x.shape[2]), deal_.width = static_cast<int>(x.shape[3]);
    deal_.groups = static_cast<int>(groups.count);
    deal_.group_size = groups.end(0);
    deal_.adjoint = work == Work::adjoint;
    for (int64_t g = 0; g < groups.count; ++g) {
      deal_.group[g] = {groups.offset[g], static_cast<int>(groups.kernel[g]),
                        reduced(groups.shift[g], x.shape[2]), reduced(groups.shift[g], x.shape[3])};
    }
    // two blocks of a multiprocessor, and half of that for tiles where u is staged as well
    const int64_t budget = max_shared_bytes() / 2 - kReserved;
    fit_tiles(work == Work::norm ? budget / 2 : budget);
    if (work == Work::norm) fit_stage(budget);
    finish();
  }

  const Deal& deal() const { return deal_; }
  int64_t tiles() const { return deal_.batch * deal_.tiles_down * deal_.tiles_across; }
  size_t shared_bytes() const {
    constexpr int64_t kLeast = 16;  // a kernel names it even where no group has a tile
    return static_cast<size_t>(std::max(tile_bytes() + stage_bytes(), kLeast));
  }

 private:
  static int reduced(int64_t shift, int64_t size) {
    const int64_t rest = shift % size;
    return static_cast<int>(rest < 0 ? rest + size : rest);
  }

  void start() {
    const int64_t all_runs = divide_up(deal_.height, kRun);
    deal_.columns = balanced(deal_.width, last_ ? kColumnsLast : kColumns);
    deal_.runs = balanced(all_runs, last_ ? kRunsLast : std::max(1, kThreads / deal_.columns));
    const int threads = deal_.columns * deal_.runs;
    // the gradient of weights has a thread for each row of an unrolled kernel
    const int most = last_ ? kChannelsSideBySide : std::clamp(kThreads / threads, 1, kThreads / kUnrolled);
    deal_.tile_channels = balanced(deal_.group_size, most);
    deal_.rows = deal_.runs * kRun;
  }

  // Halves a tile until it fits; where it does not, large kernels go without.
  void fit_tiles(int64_t budget) {
    deal_.most_tiled = INT16_MAX;
    start();
    while (tile_bytes() > budget) {
      if (halve(deal_.runs, 1)) {
        deal_.rows = deal_.runs * kRun;
      } else if (!halve(deal_.columns, kLeastColumns) && !halve(deal_.tile_channels, 1)) {
        leave_out_largest();
        start();
      }
    }
  }

  void leave_out_largest() {
    int largest = 0;
    for (int g = 0; g < deal_.groups; ++g) {
      if (deal_.group[g].kernel <= deal_.most_tiled) largest = std::max(largest, deal_.group[g].kernel);
    }
    if (largest <= kUnrolled) throw std::runtime_error("CUDA: too little shared memory for a block");
    deal_.most_tiled = largest - 1;
  }

  // Halves a tile until u of all channels fits beside it; where it does not, chunks of channels.
  void fit_stage(int64_t budget) {
    deal_.rows = static_cast<int>(std::min<int64_t>(deal_.rows, deal_.height));
    set_slabs();
    deal_.chunk_slabs = deal_.slabs;
    deal_.stage_stride = stride_of(deal_.channels);
    while (tile_bytes() + stage_bytes() > budget) {
      if (halve(deal_.runs, 1)) {
        deal_.rows = std::min(deal_.rows, deal_.runs * kRun);
      } else if (!halve(deal_.columns, 1) && !halve(deal_.rows, 1)) {
        const int64_t numbers = (budget - tile_bytes()) / element_ - kPlaceNumbers - 1;
        deal_.chunk_slabs = static_cast<int>(std::max<int64_t>(1, numbers / deal_.tile_channels));
        deal_.stage_stride = stride_of(int64_t{deal_.chunk_slabs} * deal_.tile_channels);
        return;
      }
    }
  }

  void finish() {
    set_slabs();
    deal_.tiles_down = static_cast<int>(divide_up(deal_.height, deal_.rows));
    deal_.tiles_across = static_cast<int>(divide_up(deal_.width, deal_.columns));
  }

  void set_slabs() {
    const int64_t last = deal_.groups - 1, of_last = groups_.end(last) - groups_.begin(last);
    const int64_t in_group = divide_up(deal_.group_size, deal_.tile_channels);
    const int64_t slabs = last * in_group + divide_up(of_last, deal_.tile_channels);
    deal_.slabs_in_group = static_cast<int>(grid_of(in_group));
    deal_.slabs = static_cast<int>(grid_of(slabs));
  }

  static bool halve(int& size, int least) {
    if (size <= least) return false;
    size = (size + 1) / 2;
    return true;
  }

  // An odd number: the places of a warp's lanes are in different banks.
  static int stride_of(int64_t channels) { return static_cast<int>(std::min<int64_t>(channels, kNever)) | 1; }

  static constexpr int64_t kPlaceNumbers = 4;  // of each place, as Stage has them

  int64_t stage_bytes() const {
    if (work_ != Work::norm) return 0;
    return int64_t{deal_.rows} * deal_.columns * (kPlaceNumbers + deal_.stage_stride) * element_;
  }

  // The most that a group needs, at the worst place for its shift.
  int64_t tile_bytes() const {
    int64_t most = 0;
    for (int g = 0; g < deal_.groups; ++g) {
      const Group& group = deal_.group[g];
      if (group.kernel <= deal_.most_tiled) most = std::max(most, tile_elements(group));
    }
    if (work_ == Work::weights) {
      most += int64_t{deal_.runs} * kRun * pitch(deal_.columns) * deal_.tile_channels;
      most = std::max<int64_t>(most, (2 * kUnrolled + 1) * kThreads);
    }
    return most * element_;
  }

  int64_t tile_elements(const Group& group) const {
    const int around = group.kernel - 1, turned = deal_.adjoint ? 2 * around : around;
    const int64_t rows = deal_.runs * kRun, columns = deal_.columns;
    const int64_t lr = (rows + around) * pitch(columns + turned);
    const int64_t td = (rows + turned) * pitch(columns + around);
    const int64_t weights =
        group.kernel <= kUnrolled && work_ != Work::weights ? 2 * int64_t{group.kernel} * group.kernel : 0;
    return (lr + td + weights) * deal_.tile_channels;
  }

  int64_t pitch(int64_t columns) const {
    return last_ ? pitch_of<true>(static_cast<int>(columns)) : pitch_of<false>(static_cast<int>(columns));
  }

  const Groups& groups_;
  const Work work_;
  const bool last_;
  const int64_t element_;
  Deal deal_ = {};
};

template <class A>
A* data_of(const TensorView* view) {
  return view ? static_cast<A*>(view->data) : nullptr;
}

template <class T>
Images<T> images_of(const TensorView& view) {
  return {static_cast<T*>(view.data), {view.stride[0], view.stride[1], view.stride[2], view.stride[3]}};
}

template <class A>
Filters<A> filters_of(const Weights& weights) {
  return {data_of<A>(&weights.lr), data_of<A>(weights.td), data_of<A>(weights.bias)};
}

template <class A>
NormOf<A> norm_of(const Norm& norm) {
  return {data_of<A>(&norm.weight), data_of<A>(norm.bias), norm.eps};
}

LaunchConfig config_of(const Planner& plan, int64_t blocks, cudaStream_t stream) {
  return {dim3(grid_of(blocks)), dim3(kThreads), plan.shared_bytes(), stream};
}

bool has_channels_last(const TensorView& view) { return view.shape[1] > 1 && view.stride[1] == 1; }

// run(T(), A(), whether channels are side by side in view)
template <class Run>
void for_dtype_and_layout(const TensorView& view, const Run& run) {
  const auto for_layout = [&](auto t, auto a) {
    has_channels_last(view) ? run(t, a, std::true_type()) : run(t, a, std::false_type());
  };
  switch (view.dtype) {
    case DType::float32: return for_layout(float(), float());
    case DType::float64: return for_layout(double(), double());
    case DType::bfloat16: return for_layout(__nv_bfloat16(), float());
    default: return for_layout(__half(), float());
  }
}

void mix(const TensorView& x, const Weights& weights, const Groups& groups, Work work, const TensorView& y,
         cudaStream_t stream) {
  if (x.shape[0] == 0) return;
  // lanes go as y lies in memory, as x does but where it is neither contiguous nor channels_last
  for_dtype_and_layout(y, [&](auto t, auto a, auto last) {
    using T = decltype(t);
    using A = decltype(a);
    const Planner plan(x, groups, work, last.value, sizeof(A));
    launch(mix_shift_kernel<T, A, last.value>, config_of(plan, plan.tiles() * plan.deal().slabs, stream),
           plan.deal(), images_of<const T>(x), filters_of<A>(weights), images_of<T>(y));
  });
}

void forward(const TensorView& x, const Weights& weights, const Groups& groups, const Norm* norm,
             const TensorView& y, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (!norm) return mix(x, weights, groups, Work::mix, y, stream);
  if (x.shape[0] == 0) return;
  for_dtype_and_layout(x, [&](auto t, auto a, auto last) {
    using T = decltype(t);
    using A = decltype(a);
    const Planner plan(x, groups, Work::norm, last.value, sizeof(A));
    launch(mix_shift_norm_kernel<T, A, last.value>, config_of(plan, plan.tiles(), stream), plan.deal(),
           images_of<const T>(x), filters_of<A>(weights), norm_of<A>(*norm), images_of<T>(y));
  });
}

void input_gradient(const TensorView& grad_u, const Weights& weights, const Groups& groups,
                    const TensorView& grad_x, void* stream) {
  const Weights without_bias = {weights.lr, weights.td, nullptr};
  mix(grad_u, without_bias, groups, Work::adjoint, grad_x, static_cast<cudaStream_t>(stream));
}

// Adds the rows of scratch that pieces have written.
template <class A>
void sum_pieces(const TensorView& scratch, int64_t pieces, const Sums<A>& sums, cudaStream_t stream) {
  const int64_t blocks = divide_up(sums.size[0] + sums.size[1] + sums.size[2], kThreads);
  launch(mix_shift_sum_kernel<A>, {dim3(grid_of(blocks)), dim3(kThreads), 0, stream},
         static_cast<const A*>(data_of<A>(&scratch)), pieces, sums);
}

void norm_backward(const TensorView& grad_y, const TensorView& x, const Weights& weights,
                   const Groups& groups, const Norm& norm, const TensorView& grad_u,
                   const TensorView& grad_norm_weight, const TensorView& grad_norm_bias,
                   const TensorView& scratch, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  for_dtype_and_layout(x, [&](auto t, auto a, auto last) {
    using T = decltype(t);
    using A = decltype(a);
    const Planner plan(x, groups, Work::norm, last.value, sizeof(A));
    const int64_t pieces = std::min(scratch.shape[0], plan.tiles());
    if (pieces > 0) {
      launch(mix_shift_norm_backward_kernel<T, A, last.value>, config_of(plan, pieces, stream), plan.deal(),
             plan.tiles(), images_of<const T>(grad_y), images_of<const T>(x), filters_of<A>(weights),
             norm_of<A>(norm), images_of<T>(grad_u), data_of<A>(&scratch));
    }
    const Sums<A> sums = {{data_of<A>(&grad_norm_weight), data_of<A>(&grad_norm_bias), nullptr},
                          {groups.channels, groups.channels, 0}};
    sum_pieces(scratch, pieces, sums, stream);
  });
}

void weight_gradient(const TensorView& grad_u, const TensorView& x, const Groups& groups,
                     const TensorView& grad_lr, const TensorView* grad_td, const TensorView* grad_bias,
                     const TensorView& scratch, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  for_dtype_and_layout(x, [&](auto t, auto a, auto last) {
    using T = decltype(t);
    using A = decltype(a);
    const Planner plan(x, groups, Work::weights, last.value, sizeof(A));
    const int64_t pieces = std::min(scratch.shape[0], plan.tiles()), k = groups.offset[groups.count];
    if (pieces > 0) {
      launch(mix_shift_weight_kernel<T, A, last.value>, config_of(plan, pieces * plan.deal().slabs, stream),
             plan.deal(), plan.tiles(), pieces, images_of<const T>(grad_u), images_of<const T>(x),
             WeightSums<A>{data_of<A>(&scratch), k, grad_td != nullptr, grad_bias != nullptr});
    }
    const Sums<A> sums = {{data_of<A>(&grad_lr), data_of<A>(grad_td), data_of<A>(grad_bias)},
                          {k, k, groups.channels}};
    sum_pieces(scratch, pieces, sums, stream);
  });
}

}  // namespace

extern const CudaKernels cuda_kernels = {forward, norm_backward, input_gradient, weight_gradient};

}  // namespace viops::mix_shift
