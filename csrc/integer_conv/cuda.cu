// INT16 integer convolutions on the GPU: quantization, and convolutions as implicit matrix products of
// integers on tensor cores, by digits of 8 bits.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "integer_conv/cuda_product.cuh"
#include "integer_conv/cuda_quantize.cuh"

namespace viops::integer_conv {
namespace {

constexpr int kMostBitsOfThree = 13;  // of integers whose products are made of three of digits
constexpr int kBlocksOfX = 8;         // of a multiprocessor that quantizes
constexpr int kBlocksWanted = 4;      // of a multiprocessor, before a gradient's depth is not split further
constexpr int64_t kLeastSplit = 8 * kDepth;
// Sizes of images, up to which places are int32 wherever taps and padding lead from them.
constexpr int64_t kMostPlaces = 1 << 29;
// Of a product's depth and columns, which are int32 with a tile more.
constexpr int64_t kMostOfAxis = INT32_MAX - 2 * kTile;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

unsigned grid_of(int64_t blocks) {
  if (blocks > INT32_MAX) {
    throw std::invalid_argument("x: expected at most 2^31 - 1 blocks of threads for its size on CUDA, got " +
                                std::to_string(blocks));
  }
  return static_cast<unsigned>(blocks);
}

void check_fits(const char* what, int64_t size, int64_t most) {
  if (size <= most) return;
  throw std::invalid_argument("x: expected at most " + std::to_string(most) + " " + what + " on CUDA, got " +
                              std::to_string(size));
}

template <class T>
T* data_of(const TensorView* view) {
  return view ? static_cast<T*>(view->data) : nullptr;
}

template <class T>
void quantize_dtype(const TensorView& x_view, const Scaling& how, const TensorView* noise_view,
                    const TensorView& data, const TensorView& scale, const TensorView& scratch,
                    cudaStream_t stream) {
  const int64_t count = x_view.shape[0], most = static_cast<int64_t>(kBlocksOfX) * multiprocessors();
  const int64_t blocks = std::clamp<int64_t>(divide_up(count, kQuantizeThreads * kInFlight), 1, most);
  const LaunchConfig config = {dim3(grid_of(blocks)), dim3(kQuantizeThreads), 0, stream};
  const T* x = data_of<T>(&x_view);
  const float* noise = data_of<float>(noise_view);
  auto* largest = data_of<int32_t>(&scratch);
  launch(clear_largest_kernel, {dim3(1), dim3(1), 0, stream}, largest);
  if (count > 0) launch(largest_kernel<T>, config, x, count, largest);
  const auto run = [&](auto kernel) {
    launch(kernel, config, x, noise, count, how, static_cast<const int32_t*>(largest),
           data_of<int16_t>(&data), data_of<float>(&scale));
  };
  switch (how.rounding) {
    case Rounding::nearest: return run(quantize_kernel<T, Rounding::nearest>);
    case Rounding::stochastic: return run(quantize_kernel<T, Rounding::stochastic>);
    default: return run(quantize_kernel<T, Rounding::truncate>);
  }
}

void quantize(const TensorView& x, const Scaling& how, const TensorView* noise, const TensorView& data,
              const TensorView& scale, const TensorView& scratch, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  switch (x.dtype) {
    case DType::float32: return quantize_dtype<float>(x, how, noise, data, scale, scratch, stream);
    case DType::float64: return quantize_dtype<double>(x, how, noise, data, scale, scratch, stream);
    case DType::bfloat16: return quantize_dtype<__nv_bfloat16>(x, how, noise, data, scale, scratch, stream);
    default: return quantize_dtype<__half>(x, how, noise, data, scale, scratch, stream);
  }
}

Window window_of(const Geometry& g, int axis) {
  const int64_t size = axis ? g.width : g.height, out_size = axis ? g.out_width : g.out_height;
  check_fits("places down or across images", size, kMostPlaces);
  return {static_cast<int>(size),
          static_cast<int>(out_size),
          static_cast<int>(g.kernel[axis]),
          static_cast<int>(g.stride[axis]),
          static_cast<int>(g.padding[axis]),
          static_cast<int>(g.dilation[axis])};
}

// With one split of this depth.
Tiling tiling_of(int64_t rows, int64_t columns, int64_t depth, int64_t phases, int64_t groups) {
  check_fits("products in a sum", depth, kMostOfAxis);
  check_fits("channels and taps of a group", columns, kMostOfAxis);
  return {divide_up(rows, kTile),           divide_up(columns, kTile), 1, phases, groups,
          divide_up(depth, kDepth) * kDepth};
}

template <class Problem>
void multiply(const Problem& problem, const Tiling& tiling, const Output& output, int bits,
              cudaStream_t stream) {
  const size_t totals = tiling.split_depth > kChain ? kTotalBytes : 0;
  const dim3 grid(grid_of(tiling.blocks())), block(kThreads);
  if (bits <= kMostBitsOfThree) {
    launch(product_kernel<3, Problem>, {grid, block, Tile<3>::kBytes + totals, stream}, problem, tiling,
           output);
  } else {
    launch(product_kernel<4, Problem>, {grid, block, Tile<4>::kBytes + totals, stream}, problem, tiling,
           output);
  }
}

// Whether vectors of 16 bytes along an axis of int16 are aligned, whatever the places on the other axes.
bool has_vectors(const TensorView& view, int along, int64_t run) {
  bool aligned =
      reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && run % kChunk == 0 && view.stride[along] == 1;
  for (int axis = 0; axis < view.rank; ++axis) {
    aligned = aligned && (axis == along || view.shape[axis] == 1 || view.stride[axis] % kChunk == 0);
  }
  return aligned;
}

void convolve(const TensorView& from, const TensorView& from_scale, const TensorView& w,
              const TensorView& w_scale, int bits, const TensorView* bias, const Geometry& g,
              Direction direction, const TensorView& to, void* stream) {
  if (g.batch == 0) return;
  const bool forward = direction == Direction::forward;
  Convolution problem = {};
  problem.from = data_of<int16_t>(&from), problem.w = data_of<int16_t>(&w);
  const int of_column = forward ? 0 : 1, of_channel = forward ? 1 : 0;
  problem.w_group = w.stride[0] * g.group_filters();
  problem.w_column = w.stride[of_column], problem.w_channel = w.stride[of_channel];
  problem.w_down = w.stride[2], problem.w_across = w.stride[3];
  problem.direction = direction;
  problem.down = window_of(g, 0), problem.across = window_of(g, 1);
  problem.batch = g.batch, problem.groups = g.groups;
  const int64_t channels = forward ? g.group_channels() : g.group_filters();
  const int64_t columns = forward ? g.group_filters() : g.group_channels();
  const int64_t rows = g.batch * problem.down.most_places(direction) * problem.across.most_places(direction);
  const int64_t phases =
      static_cast<int64_t>(problem.down.phases(direction)) * problem.across.phases(direction);
  const Tiling tiling = tiling_of(rows, columns, channels * g.taps(), phases, g.groups);
  problem.channels = static_cast<int>(channels), problem.columns = static_cast<int>(columns);
  // channels_last, whatever the strides of axes of size 1
  problem.from_vectors = reinterpret_cast<uintptr_t>(from.data) % 16 == 0 && channels % kChunk == 0;
  problem.w_vectors = has_vectors(w, of_channel, channels);
  multiply(problem, tiling,
           {data_of<float>(&to), data_of<float>(bias), data_of<float>(&from_scale), data_of<float>(&w_scale),
            nullptr},
           bits, static_cast<cudaStream_t>(stream));
}

void weight_gradient(const TensorView& grad_y, const TensorView& grad_scale, const TensorView& x,
                     const TensorView& x_scale, int bits, const Geometry& g, const TensorView* scratch,
                     const TensorView& grad_w, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  WeightGradient problem = {};
  problem.grad_y = data_of<int16_t>(&grad_y), problem.x = data_of<int16_t>(&x);
  problem.down = window_of(g, 0), problem.across = window_of(g, 1);
  problem.batch = g.batch, problem.groups = g.groups;
  const int64_t depth = g.batch * g.out_height * g.out_width, columns = g.group_channels() * g.taps();
  Tiling tiling = tiling_of(g.group_filters(), columns, depth, 1, g.groups);
  problem.filters = static_cast<int>(g.group_filters()),
  problem.channels = static_cast<int>(g.group_channels());
  Output output = {data_of<float>(&grad_w), nullptr, data_of<float>(&grad_scale), data_of<float>(&x_scale),
                   nullptr};
  if (scratch && depth > 0) {
    const int64_t wanted =
        divide_up(static_cast<int64_t>(kBlocksWanted) * multiprocessors(), tiling.blocks());
    const int64_t splits = std::max<int64_t>(std::min(wanted, depth / kLeastSplit), 1);
    tiling.split_depth = divide_up(divide_up(depth, splits), kDepth) * kDepth;
    tiling.splits = divide_up(depth, tiling.split_depth);
  }
  if (tiling.splits == 1) return multiply(problem, tiling, output, bits, stream);
  output.totals = data_of<int64_t>(scratch);
  const int64_t count = g.filters * columns;
  const LaunchConfig config = {dim3(grid_of(divide_up(count, kTotalsThreads))), dim3(kTotalsThreads), 0,
                               stream};
  launch(clear_totals_kernel, config, output.totals, count);
  multiply(problem, tiling, output, bits, stream);
  launch(scale_totals_kernel, config, output, count);
}

}  // namespace

extern const CudaKernels cuda_kernels = {quantize, convolve, weight_gradient};

}  // namespace viops::integer_conv
