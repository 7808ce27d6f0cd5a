// My op on the CPU; built once a CPU level.
#include "common/rows.h"
#include "my_op/my_op.h"

namespace viops::my_op {
namespace {

// to[c] = scale * from[c * stride].
template <class T, class A>
void multiply_row(T* to, const T* from, int64_t stride, A scale, int64_t channels) {
  int64_t c = 0;
  if (stride == 1) {
    for (; c + kLanes<A> <= channels; c += kLanes<A>) store<A>(to + c, scale * load<A>(from + c));
  }
  for (; c < channels; ++c) to[c] = Narrow<T, A>::of(scale * static_cast<A>(widen(from[c * stride])));
}

// in [B, N, C] of any strides -> out [B, N, C], contiguous.
template <class T>
void multiply_rows(const TensorView& in, double scale, const TensorView& out) {
  using A = decltype(widen(T()));
  const int64_t num_tokens = in.shape[1], channels = in.shape[2], num_rows = in.shape[0] * num_tokens;
  const int64_t bytes = 2 * num_rows * channels * static_cast<int64_t>(sizeof(T));
  const T* from = static_cast<const T*>(in.data);
  T* to = static_cast<T*>(out.data);
  const Pieces rows(num_rows, 1, bytes);
  rows.for_each(0, [&](int64_t row, int64_t, char*) {
    const int64_t b = row / num_tokens, n = row % num_tokens;
    multiply_row(to + row * channels, from + b * in.stride[0] + n * in.stride[1], in.stride[2],
                 static_cast<A>(scale), channels);
  });
}

template <class T>
void forward(const TensorView& x, double scale, const TensorView& y) {
  multiply_rows<T>(x, scale, y);
}

template <class T>
void backward(const TensorView& grad_y, double scale, const TensorView& grad_x) {
  multiply_rows<T>(grad_y, scale, grad_x);
}

const CpuKernels kernels = {
    [](const TensorView& x, double scale, const TensorView& y) { VIOPS_FOR_DTYPE(x, forward, x, scale, y) },
    [](const TensorView& grad_y, double scale, const TensorView& grad_x) {
      VIOPS_FOR_DTYPE(grad_y, backward, grad_y, scale, grad_x)
    },
};

}  // namespace

extern const CpuKernels VIOPS_LEVEL_NAME(kernels) = kernels;

}  // namespace viops::my_op
