// INT16 integer convolutions in dynamic fixed point (Das et al., ICLR 2018): the contracts of the kernels.
//
// A tensor in dynamic fixed point is int16 integers q and one float32 scale: its values are q * scale, and
// |q| <= limit = 2^bits - 1, bits at most 15.
//
//   S[b, o, y, x] = sum over c, i, j of x[b, c, y * stride + i * dilation - padding, ...] * w[o, c, i, j]
//   result = (float32(S) * factor) * shift (* gain) (+ bias) (+ residual), then ReLU where asked for
//
// Every S is the exact integer, whatever the order: products are summed in int32 in chains that cannot
// overflow, and each chain's sum goes into two words, sum / 2^16 and sum mod 2^16.  float32(S) is S rounded
// to nearest even.  factor * shift is the product of the two scales: shift is 1 unless that product is no
// normal float32.  So each backend, level and thread count gives the same bits.
//
// Images are [B, C, H, W], contiguous as [B, H, W, C] (channels_last), filters w [O, C / groups, I, J]
// contiguous.  Outputs overlap no input.  B may be zero, all other sizes are at least 1.  Shapes, dtypes and
// devices have been checked by bind.cpp, and values by nobody: integers beyond the limit give wrong sums.
#pragma once

#include "common/cpu_level.h"
#include "common/cuda_info.h"
#include "common/tensor_view.h"

namespace viops::integer_conv {

enum class Rounding { nearest, stochastic, truncate };

constexpr int kMostBits = 15;
// The two words hold sums of products below this bound.
constexpr double kMostSum = 0x1p46;

// How floats become integers: x * inverse, rounded, within ±limit; inverse = 1 / scale.
struct Quantization {
  float inverse;
  int32_t limit;
  Rounding rounding;
};

struct Geometry {
  int64_t batch, channels, height, width;  // x [B, C, H, W]
  int64_t filters, out_height, out_width;  // y [B, O, OH, OW]
  int64_t groups;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t group_channels() const { return channels / groups; }
  int64_t group_filters() const { return filters / groups; }
  int64_t taps() const { return kernel[0] * kernel[1]; }
};

// Of the filters as the kernels read them: y from x, or the gradient to x from that to y.
enum class Direction { forward, to_input };

// What is done to a result on its way out.
struct Finish {
  const float* gain;      // [channels of the result] or null
  const float* bias;      // [channels of the result] or null
  const float* residual;  // like the result, or null: added after the bias; it may be the result itself
  bool relu;
  bool wide;       // whether sums may reach 2^40
  bool read_next;  // the result is read right away: it stays in the caches
  float* largest;  // null, or where max|result| goes
};

struct CpuKernels {
  // max|x| of x [N], of any floating dtype, as float32; infinity or NaN where x has one.
  float (*largest)(const TensorView& x);

  // x [N] of any floating dtype, all finite -> data [N] int16.  noise [N] is float32 in [0, 1), for
  // stochastic rounding, else null.
  void (*quantize)(const TensorView& x, const Quantization& how, const TensorView* noise,
                   const TensorView& data);

  // The bytes of packed filters, at this level.
  int64_t (*packed_bytes)(const Geometry& geometry, Direction direction);

  // w [O, C / groups, I, J] -> packed, 64-byte aligned; limit is that of the integers to be multiplied with.
  void (*pack)(const TensorView& w, const Geometry& geometry, Direction direction, int32_t limit,
               void* packed);

  // x [B, C, H, W] -> y [B, O, OH, OW], or with to_input grad_y [B, O, OH, OW] -> grad_x [B, C, H, W].
  void (*convolve)(const TensorView& from, float factor, float shift, const void* packed,
                   const Geometry& geometry, Direction direction, const Finish& finish, const TensorView& to);

  // The same forward of float32 x, all finite, which becomes integers on its way, for filters of one tap,
  // stride 1 and no padding.
  void (*convolve_floats)(const TensorView& x, const Quantization& how, float factor, float shift,
                          const void* packed, const Geometry& geometry, const Finish& finish,
                          const TensorView& to);

  // grad_y [B, O, OH, OW], x [B, C, H, W] -> grad_w [O, C / groups, I, J], contiguous.
  void (*weight_gradient)(const TensorView& grad_y, const TensorView& x, float factor, float shift,
                          const Geometry& geometry, int32_t limit_grad, int32_t limit_x,
                          const TensorView& grad_w);
};

VIOPS_DECLARE_KERNELS(CpuKernels);

// What a device finds the scale by.
struct Scaling {
  int bits;
  bool power_of_two;  // else the scale is max|x| / limit
  Rounding rounding;
  int32_t limit() const { return (1 << bits) - 1; }
};

// On `stream`, a cudaStream_t.  Scales are read there; scratch is of any content.  bits: the more of both
// operands; the integers are within that limit.
struct CudaKernels {
  // x [N] of any floating dtype -> data [N] int16, scale [1] or []; where x is not all finite, the scale is
  // NaN and data zero.  noise is as above, scratch [1] float32.
  void (*quantize)(const TensorView& x, const Scaling& how, const TensorView* noise, const TensorView& data,
                   const TensorView& scale, const TensorView& scratch, void* stream);

  // x [B, C, H, W] -> y [B, O, OH, OW], or with to_input grad_y [B, O, OH, OW] -> grad_x [B, C, H, W].  w
  // [O, C / groups, I, J] has any strides; it is read fastest where those channels that are summed over, C
  // forward and O to the input, lie side by side.  bias [channels of the result] may be null.
  void (*convolve)(const TensorView& from, const TensorView& from_scale, const TensorView& w,
                   const TensorView& w_scale, int bits, const TensorView* bias, const Geometry& geometry,
                   Direction direction, const TensorView& to, void* stream);

  // grad_y [B, O, OH, OW], x [B, C, H, W] -> grad_w [O, C / groups, I, J], contiguous.  scratch is null or,
  // for pixels to be split among blocks, int64 of as many elements as grad_w, contiguous.
  void (*weight_gradient)(const TensorView& grad_y, const TensorView& grad_scale, const TensorView& x,
                          const TensorView& x_scale, int bits, const Geometry& geometry,
                          const TensorView* scratch, const TensorView& grad_w, void* stream);
};

VIOPS_DECLARE_CUDA_KERNELS(CudaKernels);

}  // namespace viops::integer_conv
