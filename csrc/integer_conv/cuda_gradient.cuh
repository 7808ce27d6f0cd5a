// The operands of the gradient to the filters, as a block on the GPU reads them.
//
// Rows are filters of a group, columns its channels at each tap, and the depth goes over pixels of grad_y.
#pragma once

#include "integer_conv/cuda_window.cuh"

namespace viops::integer_conv {
namespace {

struct WeightGradient {
  const int16_t* grad_y;  // [B, OH, OW, groups * filters]
  const int16_t* x;       // [B, H, W, groups * channels]
  Window down, across;
  int64_t batch, groups;
  int filters, channels;  // of a group

  class Block {
   public:
    __device__ __forceinline__ Block(const WeightGradient& of, const Part& part, int64_t split_depth)
        : of_(of),
          group_(part.group),
          first_row_(part.first_row),
          first_column_(static_cast<int>(part.first_column)),
          begin_(static_cast<int>(part.first_depth)) {
      const int64_t pixels = of.batch * of.down.out_size * of.across.out_size;
      end_ = static_cast<int>(min(pixels, begin_ + split_depth));
      const int64_t filter = first_row_ + row(0);
      has_row_ = filter < of.filters;
      grads_ = of.grad_y + group_ * of.filters + filter;
      const int column = first_column_ + row(0), tap = column / of.channels;
      has_column_ = tap < of.down.kernel * of.across.kernel;
      y0_ = tap / of.across.kernel * of.down.dilation - of.down.padding;
      x0_ = tap % of.across.kernel * of.across.dilation - of.across.padding;
      images_ = of.x + group_ * of.channels + column % of.channels;
    }

    __device__ __forceinline__ bool any() const { return true; }
    __device__ __forceinline__ int64_t begin() const { return begin_; }
    __device__ __forceinline__ int64_t end() const { return end_; }

    // Of the thread's r-th chunks: the row of both operands, and which chunk of it.  Neighbours have
    // neighbouring filters and channels.
    static __device__ __forceinline__ int row(int) { return static_cast<int>(threadIdx.x) % kTile; }
    static __device__ __forceinline__ int chunk(int r) {
      return static_cast<int>(threadIdx.x) / kTile * kChunks + r;
    }

    // The thread's chunks of the tiles at this depth.
    __device__ __forceinline__ void load(int64_t depth, Chunk (&a)[kChunks], Chunk (&b)[kChunks]) const {
      const int width = of_.across.out_size, height = of_.down.out_size;
      const int64_t of_pixel = of_.groups * of_.filters, of_place = of_.groups * of_.channels;
      const int first = static_cast<int>(depth) + chunk(0) * kChunk;
      int out_x = first % width, out_y = first / width % height;
      int64_t pixel = first, image = first / width / height;
      const int16_t* line = nullptr;  // of x, null where it is outside
      const auto find_line = [&] {
        const int y = y0_ + out_y * of_.down.stride;
        const bool inside = has_column_ && static_cast<unsigned>(y) < static_cast<unsigned>(of_.down.size);
        line = inside ? images_ + (image * of_.down.size + y) * of_.across.size * of_place : nullptr;
      };
      find_line();
#pragma unroll
      for (int r = 0; r < kChunks; ++r) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e, ++pixel) {
          const bool any = pixel < end_;
          const int x = x0_ + out_x * of_.across.stride;
          const bool inside =
              any && line && static_cast<unsigned>(x) < static_cast<unsigned>(of_.across.size);
          put_element(a[r], e, load_element(any && has_row_ ? grads_ + pixel * of_pixel : nullptr));
          put_element(b[r], e, load_element(inside ? line + x * of_place : nullptr));
          if (++out_x < width) continue;
          out_x = 0;
          if (++out_y == height) out_y = 0, ++image;
          find_line();
        }
      }
    }

    // Where a row and a column of the block's tile are in the result: their sum; negative where nowhere.
    __device__ __forceinline__ int64_t row_of_result(int row) const {
      const int64_t filter = first_row_ + row;
      return filter < of_.filters ? (group_ * of_.filters + filter) * of_.channels * taps() : -1;
    }
    __device__ __forceinline__ int64_t column_of_result(int column) const {
      column += first_column_;
      const int tap = column / of_.channels;
      return tap < taps() ? static_cast<int64_t>(column - tap * of_.channels) * taps() + tap : -1;
    }

   private:
    __device__ __forceinline__ int64_t taps() const {
      return static_cast<int64_t>(of_.down.kernel) * of_.across.kernel;
    }

    const WeightGradient& of_;
    int64_t group_, first_row_;
    int first_column_, begin_, end_;
    bool has_row_, has_column_;
    const int16_t *grads_, *images_;  // the thread's filter in pixel 0, and its channel in place 0
    int y0_, x0_;                     // where its tap meets the source from pixel 0
  };
};

}  // namespace
}  // namespace viops::integer_conv
