// The operands of y from x, and of the gradient to x from that to y, as a block on the GPU reads them.
//
// Rows are places of the result, columns its channels; the depth goes over taps, and for each over the
// channels of the source.
#pragma once

#include "integer_conv/cuda_window.cuh"

namespace viops::integer_conv {
namespace {

struct Convolution {
  const int16_t* from;  // [B, FH, FW, groups * channels]
  const int16_t* w;     // element [group, column, i, j, channel] by these strides
  int64_t w_group, w_column, w_down, w_across, w_channel;
  bool from_vectors, w_vectors;  // whether 16 bytes of channels can be read at a time
  Direction direction;
  Window down, across;
  int64_t batch, groups;
  int channels, columns;  // of a group: of the source, and of the result

  // What a block reads and where it writes.
  class Block {
   public:
    __device__ __forceinline__ Block(const Convolution& of, const Part& part, int64_t split_depth)
        : of_(of),
          down_(of.down.axis(of.direction, static_cast<int>(part.phase / of.across.phases(of.direction)))),
          across_(
              of.across.axis(of.direction, static_cast<int>(part.phase % of.across.phases(of.direction)))),
          group_(part.group),
          first_row_(part.first_row),
          first_column_(static_cast<int>(part.first_column)),
          begin_(static_cast<int>(part.first_depth)) {
      const bool forward = of.direction == Direction::forward;
      from_height_ = forward ? of.down.size : of.down.out_size;
      from_width_ = forward ? of.across.size : of.across.out_size;
      const int64_t depth = static_cast<int64_t>(down_.taps) * across_.taps * of.channels;
      end_ = static_cast<int>(min(depth, begin_ + split_depth));
      const int64_t all_channels = of.groups * of.channels;
#pragma unroll
      for (int r = 0; r < kChunks; ++r) {
        const Place place(*this, first_row_ + row(r));
        images_[r] = of.from + place.image * from_height_ * from_width_ * all_channels + group_ * of.channels;
        rows_[r] = place.any ? place.t_down * down_.step : kNowhere;
        columns_[r] = place.t_across * across_.step;
      }
    }

    __device__ __forceinline__ bool any() const { return first_row_ < all_rows(); }
    __device__ __forceinline__ int64_t begin() const { return begin_; }
    __device__ __forceinline__ int64_t end() const { return end_; }

    // Of the thread's r-th chunks: the row of both operands, and which chunk of it.
    static __device__ __forceinline__ int row(int r) {
      return static_cast<int>(threadIdx.x) / kChunksOfRow + r * (kThreads / kChunksOfRow);
    }
    static __device__ __forceinline__ int chunk(int) { return static_cast<int>(threadIdx.x) % kChunksOfRow; }

    // The thread's chunks of the tiles at this depth.
    __device__ __forceinline__ void load(int64_t depth, Chunk (&a)[kChunks], Chunk (&b)[kChunks]) const {
      int k = static_cast<int>(depth) + chunk(0) * kChunk;
      Step at = {k / of_.channels / across_.taps, k / of_.channels % across_.taps, k % of_.channels};
#pragma unroll
      for (int r = 0; r < kChunks; ++r) {
        if (of_.from_vectors) a[r] = load_chunk(k < end_ ? source(r, at) : nullptr);
        if (of_.w_vectors) b[r] = load_chunk(k < end_ ? filter(r, at) : nullptr);
      }
      if (of_.from_vectors && of_.w_vectors) return;
#pragma unroll
      for (int e = 0; e < kChunk; ++e, ++k) {
#pragma unroll
        for (int r = 0; r < kChunks; ++r) {
          if (!of_.from_vectors) put_element(a[r], e, load_element(k < end_ ? source(r, at) : nullptr));
          if (!of_.w_vectors) put_element(b[r], e, load_element(k < end_ ? filter(r, at) : nullptr));
        }
        at.advance(of_.channels, across_.taps);
      }
    }

    // Where a row and a column of the block's tile are in the result: their sum; negative where nowhere.
    __device__ __forceinline__ int64_t row_of_result(int row) const {
      const Place place(*this, first_row_ + row);
      if (!place.any) return -1;
      const bool forward = of_.direction == Direction::forward;
      const int64_t height = forward ? of_.down.out_size : of_.down.size;
      const int64_t width = forward ? of_.across.out_size : of_.across.size;
      const int64_t line = place.image * height + down_.first + place.t_down * down_.spread;
      return (line * width + across_.first + place.t_across * across_.spread) * of_.groups * of_.columns;
    }
    __device__ __forceinline__ int64_t column_of_result(int column) const {
      column += first_column_;
      return column < of_.columns ? group_ * of_.columns + column : -1;
    }

   private:
    static constexpr int kChunksOfRow = kDepth / kChunk;
    static constexpr int kNowhere = -(1 << 30);  // outside with any tap, as images have at most 2^29 places

    // A tap down, one across and a channel.
    struct Step {
      int n, m, channel;
      __device__ __forceinline__ void advance(int channels, int taps_across) {
        if (++channel < channels) return;
        channel = 0;
        if (++m < taps_across) return;
        m = 0, ++n;
      }
    };

    // Of a row of the product: the image, and the places down and across in the phase.
    struct Place {
      int64_t image;
      int t_down, t_across;
      bool any;
      __device__ __forceinline__ Place(const Block& block, int64_t row) {
        any = row < block.all_rows();
        const int64_t line = any ? row / block.across_.count : 0;
        t_across = any ? static_cast<int>(row - line * block.across_.count) : 0;
        image = line / block.down_.count;
        t_down = static_cast<int>(line - image * block.down_.count);
      }
    };

    __device__ __forceinline__ int64_t all_rows() const { return of_.batch * down_.count * across_.count; }

    // What row r meets at a place, null where that is outside of the image.
    __device__ __forceinline__ const int16_t* source(int r, const Step& at) const {
      const int y = rows_[r] + down_.offset(at.n), x = columns_[r] + across_.offset(at.m);
      if (static_cast<unsigned>(y) >= static_cast<unsigned>(from_height_)) return nullptr;
      if (static_cast<unsigned>(x) >= static_cast<unsigned>(from_width_)) return nullptr;
      return images_[r] + (static_cast<int64_t>(y) * from_width_ + x) * of_.groups * of_.channels +
             at.channel;
    }
    // What column r has there, null where it is none.
    __device__ __forceinline__ const int16_t* filter(int r, const Step& at) const {
      const int column = first_column_ + row(r);
      if (column >= of_.columns) return nullptr;
      return of_.w + group_ * of_.w_group + column * of_.w_column + down_.tap(at.n) * of_.w_down +
             across_.tap(at.m) * of_.w_across + at.channel * of_.w_channel;
    }

    const Convolution& of_;
    Axis down_, across_;
    int64_t group_, first_row_;
    int first_column_, begin_, end_;
    int from_height_, from_width_;
    const int16_t* images_[kChunks];        // the group's channels of the image that row r is in
    int rows_[kChunks], columns_[kChunks];  // where its places are in the source, before a tap's offset
  };
};

}  // namespace
}  // namespace viops::integer_conv
