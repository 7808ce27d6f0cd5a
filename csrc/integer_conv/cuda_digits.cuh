// 16-bit integers as digits of 8 bits, their products on tensor cores and the exact sums of these.
//
// Tensor cores multiply bytes.  An integer is split into a high and a low digit where it goes into shared
// memory, and a product of two integers is made of products of their digits:
//
//   three, of integers up to 13 bits (Karatsuba): q = 128 high + low, -64 <= low < 64.  Of |q| < 2^13 the
//   high digit is from -64 to 64.  high + low fits a signed byte: high = 64 is of q from 64 * 128 - 64 on,
//   below 2^13 = 64 * 128, so there low < 0; high = -64 is of q > -64 * 128, so there low > 0; all other sums
//   are from -63 - 64 to 63 + 63.  So |high + low| <= 127, and
//     q q' = 2^14 high high' + 2^7 ((high + low) (high' + low') - high high' - low low') + low low'
//
//   four, of any int16: q = 256 high + low, 0 <= low < 256, the two bytes as they are: signed and unsigned,
//   which tensor cores multiply in all mixtures.  (Two signed digits give no more than 127 * 257 = 32639.)
//     q q' = 2^16 high high' + 2^8 (high low' + low high') + low low'
#pragma once

#include "common/ptx.cuh"

namespace viops::integer_conv {
namespace {

// So many products of digits are summed in int32, at most.
constexpr int64_t kChain = 32768;

constexpr int kThreads = 128;        // of a block: 2 x 2 warps
constexpr int kTile = 64;            // rows and columns of a block's part of the result
constexpr int kDepth = 64;           // depth that is in shared memory at a time
constexpr int kPitch = kDepth + 16;  // bytes between rows of a plane: ldmatrix finds rows in all banks
constexpr int kPlaneBytes = kTile * kPitch;
constexpr int kChunk = 8;                                    // integers that are split at a time
constexpr int kChunks = kTile * kDepth / kChunk / kThreads;  // of a thread, of each operand
constexpr int kSums = 3;                                     // of each element: see Digits
constexpr int kFragmentRows = 2, kFragmentColumns = 4;       // 16 x 8 fragments of a warp
static_assert(kChain % kDepth == 0);

// Eight integers that follow each other along the depth: element e is half e % 2 of word e / 2.
struct Chunk {
  uint32_t words[kChunk / 2];
};

template <int kProducts>
struct Digits;

template <>
struct Digits<3> {
  static constexpr int kPlanes = 3;  // high, low and their sums
  static_assert(127 * 127 * kChain < INT32_MAX);

  // Of four integers, two a word: their digits in the bytes of a word for each plane.
  static __device__ __forceinline__ void split(uint32_t first, uint32_t second, uint32_t (&planes)[3]) {
    first = add_64(first), second = add_64(second);
    const uint32_t high = __byte_perm(first >> 7, second >> 7, 0x6420);  // bits 7 to 14
    const uint32_t shifted = (__byte_perm(first, second, 0x6420) & 0x7f7f7f7fu) ^ 0x40404040u;
    const uint32_t low = shifted | (shifted & 0x40404040u) << 1;  // from 7 bits, signed, to 8
    planes[0] = high, planes[1] = low;
    planes[2] = ((high & 0x7f7f7f7fu) + (low & 0x7f7f7f7fu)) ^ ((high ^ low) & 0x80808080u);
  }

  static __device__ __forceinline__ void multiply(int32_t (&sums)[kSums][4], const uint32_t (&a)[3][4],
                                                  const uint32_t (&b)[3][2]) {
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) mma_m16n8k32_s8(sums[plane], a[plane], b[plane]);
  }

  static __device__ __forceinline__ int64_t combine(int32_t high, int32_t low, int32_t both) {
    return static_cast<int64_t>(high) * (1 << 14) + (static_cast<int64_t>(both) - high - low) * (1 << 7) +
           low;
  }

 private:
  // To both integers of a word.
  static __device__ __forceinline__ uint32_t add_64(uint32_t word) {
    return ((word & 0x7fff7fffu) + 0x00400040u) ^ (word & 0x80008000u);
  }
};

template <>
struct Digits<4> {
  static constexpr int kPlanes = 2;  // high and low
  static_assert(128 * 128 * kChain < INT32_MAX && 2 * 128 * 255 * kChain < INT32_MAX &&
                255 * 255 * kChain < INT32_MAX);

  static __device__ __forceinline__ void split(uint32_t first, uint32_t second, uint32_t (&planes)[2]) {
    planes[0] = __byte_perm(first, second, 0x7531);
    planes[1] = __byte_perm(first, second, 0x6420);
  }

  static __device__ __forceinline__ void multiply(int32_t (&sums)[kSums][4], const uint32_t (&a)[2][4],
                                                  const uint32_t (&b)[2][2]) {
    mma_m16n8k32_s8(sums[0], a[0], b[0]);
    mma_m16n8k32_u8(sums[1], a[1], b[1]);
    mma_m16n8k32_s8_u8(sums[2], a[0], b[1]);
    mma_m16n8k32_u8_s8(sums[2], a[1], b[0]);
  }

  static __device__ __forceinline__ int64_t combine(int32_t high, int32_t low, int32_t mixed) {
    return static_cast<int64_t>(high) * (1 << 16) + static_cast<int64_t>(mixed) * (1 << 8) + low;
  }
};

// The digits of a block's part of both operands, in shared memory: planes [kTile, kDepth] of bytes.
template <int kProducts>
struct Tile {
  using Split = Digits<kProducts>;
  static constexpr int kBytes = 2 * Split::kPlanes * kPlaneBytes;
  char* memory;

  __device__ __forceinline__ char* plane(int operand, int plane) const {
    return memory + (operand * Split::kPlanes + plane) * kPlaneBytes;
  }

  // A chunk's digits, to a row of an operand.
  __device__ __forceinline__ void put(int operand, int row, int chunk, const Chunk& integers) const {
    uint32_t first[Split::kPlanes], second[Split::kPlanes];
    Split::split(integers.words[0], integers.words[1], first);
    Split::split(integers.words[2], integers.words[3], second);
#pragma unroll
    for (int p = 0; p < Split::kPlanes; ++p) {
      *reinterpret_cast<uint2*>(plane(operand, p) + row * kPitch + chunk * kChunk) =
          make_uint2(first[p], second[p]);
    }
  }
};

// A warp's sums of products of digits, over at most kChain of them.
template <int kProducts>
struct Sums {
  using Split = Digits<kProducts>;
  int32_t values[kFragmentRows][kFragmentColumns][kSums][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kFragmentRows; ++i) {
#pragma unroll
      for (int j = 0; j < kFragmentColumns; ++j) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) {
#pragma unroll
          for (int e = 0; e < 4; ++e) values[i][j][s][e] = 0;
        }
      }
    }
  }

  // Adds the products of a tile; the warp's part begins at this row and column of it.
  __device__ __forceinline__ void add(const Tile<kProducts>& tile, int row, int column) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int of_a = (row + lane % 16) * kPitch + lane / 16 * 16;
    const int of_b = (column + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16;
#pragma unroll
    for (int k = 0; k < kDepth; k += 32) {
      uint32_t a[kFragmentRows][Split::kPlanes][4];
#pragma unroll
      for (int i = 0; i < kFragmentRows; ++i) {
#pragma unroll
        for (int p = 0; p < Split::kPlanes; ++p) {
          ldmatrix_x4(a[i][p], tile.plane(0, p) + of_a + i * 16 * kPitch + k);
        }
      }
#pragma unroll
      for (int j = 0; j < kFragmentColumns; j += 2) {
        uint32_t b[2][Split::kPlanes][2];
#pragma unroll
        for (int p = 0; p < Split::kPlanes; ++p) {
          uint32_t both[4];
          ldmatrix_x4(both, tile.plane(1, p) + of_b + j * 8 * kPitch + k);
          b[0][p][0] = both[0], b[0][p][1] = both[1];
          b[1][p][0] = both[2], b[1][p][1] = both[3];
        }
#pragma unroll
        for (int i = 0; i < kFragmentRows; ++i) {
          Split::multiply(values[i][j], a[i], b[0]);
          Split::multiply(values[i][j + 1], a[i], b[1]);
        }
      }
    }
  }

  // Calls work(row)(column, index, sum) for each sum of the thread: its place in the warp's part, and its
  // number.
  template <class Work>
  __device__ __forceinline__ void for_each(const Work& work) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int row = 0; row < 2 * kFragmentRows; ++row) {
      const auto of_row = work(row * 8 + lane / 4);
#pragma unroll
      for (int j = 0; j < kFragmentColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto& of = values[row / 2][j];
          const int at = row % 2 * 2 + e;
          of_row(j * 8 + lane % 4 * 2 + e, (row * kFragmentColumns + j) * 2 + e,
                 Split::combine(of[0][at], of[1][at], of[2][at]));
        }
      }
    }
  }
};

}  // namespace
}  // namespace viops::integer_conv
